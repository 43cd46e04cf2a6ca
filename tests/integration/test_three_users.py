"""A hospital's process, the carrier of its answers and root, each as its own user of the machine.

Where the tests do not run as root they cannot become others, and these are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from common.protocol import EnrolReply, EnrolRequest, decode_answer, encode
from common.sockets import address_of
from support.datasets import good_arrays, write_npz
from support.studies import agreement, tiny_study, tiny_toml
from support.users import CARRIER, COORDINATOR, SHARED, SITE, environment, owners, start, why_not

STUDY = tiny_study(privacy={"unit": "patient"})
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
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


@pytest.fixture
def packages(srv):
    """The environment of the hospital's user."""
    return environment(srv / "hospital")


def _site(uid, *arguments, env, cwd):
    process = start(uid, "-m", "client.cli", *arguments, env=env, cwd=cwd)
    out, error = process.communicate(timeout=120)
    return process.returncode, out.decode(), error.decode()


def _served(hospital, sockets, env, groups=()):
    words = ("-m", "client.cli", "serve", "site.toml", "--sockets", sockets)
    return start(SITE, *words, env=env, cwd=hospital, groups=groups)


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


@pytest.mark.slow
def test_what_root_approves_stays_the_sites_own_and_the_carrier_reaches_the_socket_alone(hospital, srv, packages):
    approve = ("approve", "site.toml", "--study", "study.toml", "--by", "Dr. A. Example")
    code, out, error = _site(0, *approve, env=packages, cwd=hospital)
    assert code == 0, error
    assert f"acting as user {SITE}" in error and "approved" in out
    assert owners(hospital) == {SITE}
    for command in ("budget", "verify-ledger"):
        code, _, error = _site(SITE, command, "site.toml", env=packages, cwd=hospital)
        assert code == 0, error
    sockets = srv / "sockets"
    sockets.mkdir()
    os.chown(sockets, SITE, SHARED)
    sockets.chmod(0o2710)
    serve = _served(hospital, sockets, packages, groups=[SHARED])
    try:
        assert serve.stdout.readline().startswith(b"ready"), serve.stderr.read()
        socket = sockets / "site.sock"
        for groups, answered in (([SHARED], True), ([], False)):
            carrier = start(
                CARRIER, "-c", ASK, address_of(socket), env=packages, cwd="/", groups=groups, stdin=subprocess.PIPE
            )
            answer, _ = carrier.communicate(encode(EnrolRequest(agreement=agreement(STUDY))), timeout=120)
            assert (carrier.returncode == 0) == answered
            if answered:
                assert isinstance(decode_answer(answer)[0].body, EnrolReply)
        reader = start(
            CARRIER, "-c", "import os, sys; os.listdir(sys.argv[1])", hospital, env=packages, cwd="/", groups=[SHARED]
        )
        assert reader.wait(60) != 0  # nothing of the hospital's but the socket
    finally:
        serve.terminate()
        serve.wait(60)
    assert owners(hospital) == {SITE}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in (hospital / "state").rglob("*"))


@pytest.mark.slow
def test_another_user_is_told_whose_site_it_is(hospital, packages):
    for path in (hospital, *hospital.rglob("*")):
        path.chmod(path.stat().st_mode | 0o055)
    code, _, error = _site(CARRIER, "budget", "site.toml", env=packages, cwd=hospital)
    assert code == 2 and len(error.splitlines()) == 1
    assert f"belongs to user {SITE}" in error and "Run it as" in error
    assert owners(hospital) == {SITE}


@pytest.mark.slow
def test_a_first_serve_of_another_user_makes_a_folder_it_can_use(hospital, srv, packages):
    os.chown(srv, SITE, SITE)
    serve = _served(hospital, srv / "new" / "sockets", packages)
    try:
        assert serve.stdout.readline().startswith(b"ready"), serve.stderr.read()
    finally:
        serve.terminate()
        serve.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_one_line_says_what_to_write_and_then_it_works(hospital, packages, home):
    """This user has no entry in /etc/passwd either. Before: a traceback."""
    env = {name: value for name, value in packages.items() if name != "HOME"} | ({} if home is None else {"HOME": home})
    site, check = hospital / "site.toml", ("approve", "site.toml", "--study", "study.toml", "--by", "Dr. A. Example")
    text = site.read_text()
    site.write_text(re.sub(r"(?m)^registry = .*$", "", text))
    for command in (check, ("verify-ledger", "site.toml")):
        code, _, error = _site(SITE, *command, env=env, cwd=hospital)
        assert (code, len(error.splitlines())) == (2, 1), error
        assert "no home folder" in error and "registry = " in error
    site.write_text(text)
    for command in (check, ("verify-ledger", "site.toml"), ("budget", "site.toml")):
        code, _, error = _site(SITE, *command, env=env, cwd=hospital)
        assert code == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("state", ["gone", "empty and root's"])
def test_a_restore_by_root_gives_the_folder_to_the_sites_user_or_says_why_not(hospital, srv, packages, state):
    """Before: where the state folder lay in one of root's, root's files were put there, and `serve` was shut out."""
    code, _, error = _site(SITE, "backup", "site.toml", "--to", "b.tar", env=packages, cwd=hospital)
    assert code == 0, error
    shutil.rmtree(hospital / "state")
    theirs = srv / "state"  # in a folder of root's
    site = hospital / "site.toml"
    site.write_text(re.sub(r"(?m)^state = .*$", f'state = "{theirs}"', site.read_text()))
    if state != "gone":
        theirs.mkdir(mode=0o700)
    restore = ("restore", "site.toml", "--from", "b.tar")
    code, _, error = _site(0, *restore, env=packages, cwd=hospital)
    assert code == 2 and f"acting as user {SITE}" in error and "ermission denied" in error.splitlines()[-1]
    assert not theirs.exists() or not list(theirs.iterdir())
    theirs.mkdir(exist_ok=True)
    os.chown(theirs, SITE, SITE)
    code, _, error = _site(0, *restore, env=packages, cwd=hospital)
    assert code == 0, error
    assert owners(theirs) == {SITE}
    code, _, error = _site(SITE, "verify-ledger", "site.toml", env=packages, cwd=hospital)
    assert code == 0, error


@pytest.mark.slow
def test_a_run_needs_no_home(srv, packages):
    """Nor an entry in /etc/passwd. Before: Flower's engine ended with "Could not determine home directory"."""
    folder = srv / "coordinator"
    folder.mkdir()
    (folder / "tiny.toml").write_text(tiny_toml())
    os.chown(folder, COORDINATOR, COORDINATOR)
    env = {name: value for name, value in packages.items() if name != "HOME"}
    command = ("-m", "server.cli", "run", "tiny.toml", "--out", "runs", "--set", "training.rounds=1")
    run = start(COORDINATOR, *command, env=env, cwd=folder)
    _, error = run.communicate(timeout=400)
    assert run.returncode == 0, error.decode()
    assert list(folder.glob("runs/*/release/report.html"))
