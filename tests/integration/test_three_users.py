"""A hospital's process, the carrier of its answers and root, each as its own user of the machine.

Where the tests do not run as root they cannot become others, and these are skipped.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from common.protocol import EnrolReply, EnrolRequest, decode_answer, encode
from common.sockets import address_of
from support.datasets import good_arrays, write_npz
from support.paths import REPOSITORY
from support.studies import agreement, tiny_study, tiny_toml

SITE, CARRIER, SHARED = 61001, 61002, 61003  # uids, and the group of the socket; nobody on a test machine has them
STUDY = tiny_study(privacy={"unit": "patient"})
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")
ASK = """
import sys, grpc
channel = grpc.insecure_channel(sys.argv[1])
sys.stdout.buffer.write(channel.unary_unary("/synthward.Site/Answer")(sys.stdin.buffer.read(), timeout=60))
"""


@pytest.fixture
def srv():
    """A folder that every user can reach: pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="three-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _open_to_all(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o001 for folder in path.parents)


def _interpreter() -> str | None:
    """One of this version that other users may run."""
    own, system = Path(sys.executable).resolve(), Path(f"/usr/bin/python3.{sys.version_info.minor}")
    return next((str(python) for python in (own, system) if python.exists() and _open_to_all(python)), None)


@pytest.fixture
def packages(srv):
    """What is installed, where it can be read by others."""
    folders = [REPOSITORY, Path(sysconfig.get_path("purelib"))]
    if _interpreter() is None or not all(map(_open_to_all, folders)):
        pytest.skip("interpreter and packages lie in folders that others cannot enter")
    other = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1", "HOME": str(srv / "hospital")}
    return {name: value for name, value in os.environ.items() if name != "XDG_STATE_HOME"} | other


def _as(uid, *command, env, cwd, groups=(), **options):
    return subprocess.Popen(
        [_interpreter(), *map(str, command)], user=uid, group=uid, extra_groups=list(groups), env=env, cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, umask=0o022, **options,
    )  # fmt: skip


def _site(uid, *arguments, env, cwd):
    process = _as(uid, "-m", "client.cli", *arguments, env=env, cwd=cwd)
    out, error = process.communicate(timeout=120)
    return process.returncode, out.decode(), error.decode()


def _served(hospital, sockets, env, groups=()):
    words = ("-m", "client.cli", "serve", "site.toml", "--sockets", sockets)
    return _as(SITE, *words, env=env, cwd=hospital, groups=groups)


@pytest.fixture
def hospital(srv, packages):
    home = srv / "hospital"
    home.mkdir(mode=0o700)
    write_npz(home / "images.npz", good_arrays(size=16, patients=True))
    (home / "study.toml").write_text(tiny_toml(privacy={"unit": "patient"}))
    for path in (home, *home.iterdir()):
        os.chown(path, SITE, SITE)
    code, _, error = _site(
        SITE, "init", "site.toml", "--name", "hospital-a", "--data", "images.npz", env=packages, cwd=home
    )
    assert code == 0, error
    text = (home / "site.toml").read_text().replace("min_units = 50", "min_units = 5")
    (home / "site.toml").write_text(text.replace('name = "hospital-a"', 'name = "hospital-a"\nregistry = "list.json"'))
    return home


def _theirs(folder: Path) -> set[int]:
    return {path.stat().st_uid for path in folder.rglob("*")}


@pytest.mark.slow
def test_what_root_approves_stays_the_sites_own_and_the_carrier_reaches_the_socket_alone(hospital, srv, packages):
    approve = ("approve", "site.toml", "--study", "study.toml", "--by", "Dr. A. Example")
    code, out, error = _site(0, *approve, env=packages, cwd=hospital)
    assert code == 0, error
    assert f"acting as user {SITE}" in error and "approved" in out
    assert _theirs(hospital) == {SITE}
    for command in ("budget", "verify-ledger"):
        code, _, error = _site(SITE, command, "site.toml", env=packages, cwd=hospital)
        assert code == 0, error
    sockets = srv / "sockets"
    sockets.mkdir()
    os.chown(sockets, SITE, SHARED)
    sockets.chmod(0o2710)
    serve = _as(
        SITE,
        "-m",
        "client.cli",
        "serve",
        "site.toml",
        "--sockets",
        sockets,
        env=packages,
        cwd=hospital,
        groups=[SHARED],
    )
    try:
        assert serve.stdout.readline().startswith(b"ready"), serve.stderr.read()
        socket = sockets / "site.sock"
        for groups, answered in (([SHARED], True), ([], False)):
            carrier = _as(
                CARRIER, "-c", ASK, address_of(socket), env=packages, cwd="/", groups=groups, stdin=subprocess.PIPE
            )
            answer, _ = carrier.communicate(encode(EnrolRequest(agreement=agreement(STUDY))), timeout=120)
            assert (carrier.returncode == 0) == answered
            if answered:
                assert isinstance(decode_answer(answer)[0].body, EnrolReply)
        reader = _as(
            CARRIER, "-c", "import os, sys; os.listdir(sys.argv[1])", hospital, env=packages, cwd="/", groups=[SHARED]
        )
        assert reader.wait(60) != 0  # nothing of the hospital's but the socket
    finally:
        serve.terminate()
        serve.wait(60)
    assert _theirs(hospital) == {SITE}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in (hospital / "state").rglob("*"))


@pytest.mark.slow
def test_another_user_is_told_whose_site_it_is(hospital, packages):
    for path in (hospital, *hospital.rglob("*")):
        path.chmod(path.stat().st_mode | 0o055)
    code, _, error = _site(CARRIER, "budget", "site.toml", env=packages, cwd=hospital)
    assert code == 2 and len(error.splitlines()) == 1
    assert f"belongs to user {SITE}" in error and "Run it as" in error
    assert _theirs(hospital) == {SITE}


@pytest.mark.slow
def test_a_first_serve_of_another_user_makes_a_folder_it_can_use(hospital, srv, packages):
    os.chown(srv, SITE, SITE)
    serve = _as(
        SITE, "-m", "client.cli", "serve", "site.toml", "--sockets", srv / "new" / "sockets", env=packages, cwd=hospital
    )
    try:
        assert serve.stdout.readline().startswith(b"ready"), serve.stderr.read()
    finally:
        serve.terminate()
        serve.wait(60)
