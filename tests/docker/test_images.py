"""The images are built, kept small, and do their work under their own users. `make docker-test` runs this.

Their network is this machine's: buildah's chroots have none of their own. So ports are chosen free.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from support.datasets import good_arrays, write_npz
from support.images import Image, lacking, make_base, megabytes
from support.paths import REPOSITORY
from support.sites import site_toml
from support.studies import tiny_toml

ASKED = "SYNTHWARD_DOCKER_TEST"
LIMITS = {"carrier": 400, "site": 2000, "coordinator": 2000}  # megabytes, the base included, with a CPU torch
USERS = {"carrier": 1502, "site": 1501, "coordinator": 1503}
GROUP = 1500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SOCKETS, SITE, CARRIER, DEPLOYMENT = "/run/synthward", "/site", "/carrier", "/deployment"


@pytest.fixture(scope="module")
def images():
    if os.environ.get(ASKED) != "1":
        pytest.skip("builds images for minutes: make docker-test")
    if lacking():
        pytest.fail(lacking(), pytrace=False)
    base = make_base()
    print(f"base image: {base} MB")
    built = {target: Image(target) for target in LIMITS}
    for image in built.values():
        began = time.monotonic()
        image.build()
        print(f"{image.name}: built in {time.monotonic() - began:.0f} s")
    return built


@pytest.fixture(scope="module")
def sizes(images):
    """Megabytes by image, with the base."""
    found = {}
    for kind, image in images.items():
        with image.container() as container:
            found[kind] = megabytes(container.root)
    return found


@pytest.fixture(params=sorted(LIMITS))
def image(request, images):
    return images[request.param]


@pytest.fixture
def folder():
    """One that every user can reach: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="images-", ignore_cleanup_errors=True) as path:
        Path(path).chmod(0o755)
        yield Path(path)


def owned(path: Path, kind: str, mode: int = 0o700) -> Path:
    """A folder to be mounted, as docs/containers.md has it made."""
    path.mkdir(parents=True, exist_ok=True)
    for part in (path, *path.rglob("*")):
        os.chown(part, USERS[kind], GROUP if kind != "coordinator" else USERS[kind])
    path.chmod(mode)
    return path


def wait_until(what, told=str, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, told()
        time.sleep(0.5)


@contextmanager
def going_on(container, *arguments, mounts, until):
    """A container's command that goes on; its own process, told to stop, has to end with exit code 0."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below, after the process)
    process = container.start(*arguments, mounts=mounts, output=log)

    def said():
        log.seek(0)
        return log.read()

    try:
        wait_until(lambda: until in said() or process.poll() is not None, said)
        assert process.poll() is None, said()
        yield said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        log.close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_images_are_no_larger_than_said(sizes, capsys):
    with capsys.disabled():
        print("\n" + "\n".join(f"synthward-{kind}: {found} MB" for kind, found in sizes.items()))
    assert all(100 < found <= LIMITS[kind] for kind, found in sizes.items())
    text = (REPOSITORY / "docs" / "containers.md").read_text()
    said = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) MB \|", text, re.MULTILINE))
    assert set(said) == set(sizes)
    assert all(abs(int(said[kind].replace(",", "")) - found) <= 0.05 * found for kind, found in sizes.items())


def test_an_image_says_who_runs_it_and_how_its_health_is_seen(image):
    user, kind = image.config["User"], image.target
    assert user == f"{USERS[kind]}:{GROUP if kind != 'coordinator' else USERS[kind]}"
    assert image.config["Healthcheck"]["Test"] == ["CMD", "python", "/opt/health.py", kind]
    assert image.config["Labels"]["org.opencontainers.image.title"] == f"synthward-{kind}"


def test_its_user_can_write_to_nothing_but_what_is_mounted(image):
    """So that the root file system may be read-only."""
    pruned = ("(", "-path", "/proc", "-o", "-path", "/sys", "-o", "-path", "/dev", ")", "-prune", "-o")
    writable = ("find", "/", "-xdev", *pruned, "-writable", "-not", "-type", "l", "-print")
    with image.container() as container:
        _, out, _ = container.run(*writable, entry=False)
    places = {"/tmp", "/var/tmp", "/var/lock", "/run/lock", *image.config["Volumes"]}
    assert [line for line in out.splitlines() if line not in places] == []


def test_an_image_has_no_cache_no_installer_and_of_the_carriers_no_torch(image):
    with image.container() as container:
        assert not (container.root / "root" / ".cache").exists()
        packages = next((container.root / "opt/synthward/lib").glob("python3*/site-packages"))
        assert not (container.root / "opt/synthward/bin/pip").exists()
        assert not (container.root / "opt/synthward/bin/uv").exists()
        assert (packages / "torch").exists() == (image.target != "carrier")
        assert (packages / "ray").exists() == (image.target == "coordinator")


def test_an_image_that_does_nothing_is_not_well(image):
    with image.container() as container:
        code, _, error = container.run(*image.config["Healthcheck"]["Test"][1:], entry=False)
    assert code == 1
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_a_container_whose_folder_is_not_set_up_says_so_in_one_line(images, kind):
    image = images[kind]
    with image.container() as container:
        code, _, error = container.run(*image.config["Cmd"])
    assert code == 2
    assert re.fullmatch(r"error: .+\n", error), error
    assert {"carrier": CARRIER, "site": SITE, "coordinator": DEPLOYMENT}[kind] in error


def test_a_site_is_begun_approved_served_and_well_and_its_carrier_reaches_the_socket_alone(images, folder):
    home = folder / "site"
    home.mkdir()
    write_npz(home / "images.npz", good_arrays(train=200, test=60, size=16, patients=True))
    (home / "study.toml").write_text(tiny_toml(privacy={"unit": "patient"}))
    owned(home, "site")
    sockets = owned(folder / "sockets", "site", 0o2710)
    mounts = {home: SITE, sockets: SOCKETS}
    with images["site"].container() as site, images["carrier"].container() as carrier:
        for words in (
            ["init", "/site/site.toml", "--name", "hospital-a", "--data", "images.npz"],
            ["check", "/site/site.toml", "--study", "/site/study.toml"],
            ["approve", "/site/site.toml", "--study", "/site/study.toml", "--by", "Dr. A. Example"],
            ["page", "/site/site.toml", "--once", "/site/page.html"],
        ):
            code, out, error = site.run(*words, mounts=mounts)
            assert code == 0, (words, out, error)
        with going_on(site, *images["site"].config["Cmd"], mounts=mounts, until="ready:"):
            health = images["site"].config["Healthcheck"]["Test"][1:]
            assert site.run(*health, mounts=mounts, entry=False) == (0, "", "")
            ask = ("import grpc, sys; grpc.channel_ready_future(grpc.insecure_channel('unix:/run/synthward/site.sock'))"
                   ".result(timeout=20)")  # fmt: skip
            code, _, error = carrier.run("python", "-c", ask, mounts={sockets: SOCKETS}, entry=False)
            assert code == 0, error
            code, _, error = carrier.run("ls", "/site", mounts=mounts, entry=False)
            assert code != 0 and "denied" in error
            code, _, _ = carrier.run("touch", "/run/synthward/other.sock", mounts=mounts, entry=False)
            assert code != 0
        assert (home / "synthward" / "ledgers.json").exists()  # the list of ledgers outlives the container


def test_a_study_goes_through_the_containers_to_its_release(images, folder, capsys):
    """Three hospitals of two containers each, and a coordinator, as the images start them, on read-only roots."""
    with ExitStack() as stack:
        all_of_us = _Deployment(stack, images, folder)
        carriers = [all_of_us.hospital(number) for number in (1, 2, 3)]
        wait_until(lambda: all("online" in said() for said in carriers), lambda: [said() for said in carriers])
        for kind, mounts in (("coordinator", all_of_us.mounts), ("carrier", {})):
            health = images[kind].config["Healthcheck"]["Test"][1:]
            all_of_us.run(kind, *health, mounts=mounts, entry=False)
        began = time.monotonic()
        all_of_us.run("coordinator", "deploy", "run", DEPLOYMENT, "/studies/study.toml", mounts=all_of_us.mounts)
        with capsys.disabled():
            print(f"\na study through seven containers: {time.monotonic() - began:.0f} s")
    (run,) = (folder / "deployment" / "runs").iterdir()
    release = run / "release"
    assert (release / "SHA256SUMS").exists() and (release / "report.html").exists()
    assert json.loads((release / "claim.json").read_text())


class _Deployment:
    """A coordinator whose services run; its folders are made and mounted as docs/containers.md has it."""

    def __init__(self, stack, images, folder):
        self._stack, self._images, self._folder = stack, images, folder
        self._containers = {
            kind: stack.enter_context(image.container(read_only=True)) for kind, image in images.items()
        }
        self._studies = folder / "studies"
        self._studies.mkdir(mode=0o755)
        (self._studies / "study.toml").write_text(tiny_toml())
        self.mounts = {owned(folder / "deployment", "coordinator"): DEPLOYMENT, self._studies: "/studies"}
        ports = ("--port", free_port(), "--superlink-port", free_port())
        out = self.run("coordinator", "deploy", "init", DEPLOYMENT, "--host", "localhost", *ports, mounts=self.mounts)
        self._said = _fingerprint(out)
        shutil.copyfile(folder / "deployment" / "invitation.json", self._studies / "invitation.json")
        self._start("coordinator", self.mounts, "ready:")

    def run(self, kind, *words, mounts, entry=True):
        """What a command that has to work has written."""
        code, out, error = self._containers[kind].run(*words, mounts=mounts, entry=entry, seconds=1500)
        assert code == 0, (words, out[-3000:], error[-3000:])
        return out

    def _start(self, kind, mounts, until):
        words = self._images[kind].config["Cmd"]
        return self._stack.enter_context(going_on(self._containers[kind], *words, mounts=mounts, until=until))

    def hospital(self, number):
        """One that has approved the study, serves it, and whose carrier is let in; what its carrier says."""
        name, home = f"hospital-{number}", self._folder / f"hospital-{number}"
        home.mkdir()
        (home / "site.toml").write_text(site_toml(name=name, index=number - 1, records=300))
        sockets = owned(self._folder / f"sockets-{number}", "site", 0o2710)
        site = {owned(home, "site"): SITE, sockets: SOCKETS, self._studies: "/studies"}
        self.run("site", "init", "/site/site.toml", mounts=site)
        approve = ("approve", "/site/site.toml", "--study", "/studies/study.toml", "--by", "Dr. A. Example")
        self.run("site", *approve, mounts=site)
        self._start("site", site, "ready:")
        carrying = owned(self._folder / f"carrier-{number}", "carrier")
        carrier = {carrying: CARRIER, sockets: SOCKETS, self._studies: "/studies"}
        join = (
            "join",
            CARRIER,
            "--invitation",
            "/studies/invitation.json",
            "--fingerprint",
            self._said,
            "--name",
            name,
        )
        out = self.run("carrier", *join, "--socket", f"{SOCKETS}/site.sock", mounts=carrier)
        shutil.copyfile(carrying / f"{name}.pub", self._studies / f"{name}.pub")
        admit = ("deploy", "admit", DEPLOYMENT, f"/studies/{name}.pub", "--fingerprint", _fingerprint(out))
        self.run("coordinator", *admit, mounts=self.mounts)
        return self._start("carrier", carrier, "")


def _fingerprint(output):
    return re.search(r"fingerprint +((?:[0-9a-f]{4} ?){8})", output)[1].strip()
