"""Container images without a container engine: Debian's buildah builds docker/Dockerfile and runs what it built.

The base is made by debootstrap, under the name that the Dockerfile asks for, since no registry is asked; it is put on a
diet as the slim images are. pip's configuration, and the folders that it names, are mounted into the build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from support.paths import REPOSITORY

DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
STATE = REPOSITORY / "build" / "docker"
TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap"}  # by the Debian package that has each
_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
_FAT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/lib/apt/lists", "var/cache/apt")
_CERTIFICATES = Path("/etc/ssl/certs")
_BUILDAHS_OWN = re.compile(r"^(subprocess exited with|Error: exit) status \d+\n", re.MULTILINE)
# As an engine does it with --read-only. $1 a root, $2 user:group, then what is mounted, --, environment and command.
_READ_ONLY = r"""
root=$1 user=$2; shift 2
for mount in "$@"; do [ "$mount" = -- ] && break; mkdir -p "$root${mount#*:}"; done
mount --bind "$root" "$root" && mount -o remount,ro,bind "$root" && mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for shared in /proc /dev /etc/hosts; do mount --rbind "$shared" "$root$shared"; done
while [ "$1" != -- ]; do mount --bind "${1%%:*}" "$root${1#*:}"; shift; done; shift
exec chroot --userspec="$user" "$root" env -i "$@"
"""
_MEGABYTE = 1_000_000


def lacking() -> str:
    """What this machine lacks to build and run images; empty where nothing."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"needs {' and '.join(missing)} (apt install {' '.join(missing)})"
    return "" if os.geteuid() == 0 else "needs root, for debootstrap and buildah"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def base_name() -> str:
    """What the Dockerfile builds on unless it is told otherwise."""
    (name,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return name


def _command(*words: object, check: bool = True, seconds: float = 1800) -> str:
    ended = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, env=_environment(),
                           cwd=REPOSITORY, timeout=seconds)  # fmt: skip
    if check and ended.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: exit code {ended.returncode}\n{ended.stdout[-3000:]}\n"
                           f"{ended.stderr[-3000:]}")  # fmt: skip
    return ended.stdout.strip()


def _environment() -> dict[str, str]:
    return {"BUILDAH_ISOLATION": "chroot"} | os.environ | {"PATH": _path()}


def _storage() -> list[str]:
    """Its own place in the checkout's build/; overlay where that works, else vfs, unless the environment says which."""
    driver = os.environ.get("STORAGE_DRIVER")
    where = ["--root", str(STATE / "storage"), "--runroot", str(STATE / "run")]
    return [*where, "--storage-driver", driver] if driver else where


def buildah(*words: object, **options: Any) -> str:
    """Run one of buildah's commands to its end; what it has written."""
    return _command("buildah", *_storage(), *words, **options)


def make_base() -> int:
    """Make the base image unless it is there; its megabytes."""
    folder, name = STATE / "base", base_name()
    if not (STATE / "base.made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        release = name.rpartition("-")[2]
        _command("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", release, folder)
        for fat in _FAT:
            shutil.rmtree(folder / fat)
            (folder / fat).mkdir()
        for marker in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        (folder / "usr/bin/python").symlink_to("python3")
        (STATE / "base.made").touch()
    if not buildah("images", "--quiet", f"localhost/{name}", check=False):
        container = buildah("from", "scratch")
        buildah("copy", "--quiet", container, folder, "/")
        buildah("commit", "--quiet", "--rm", container, name)
    return megabytes(folder)


def megabytes(folder: Path) -> int:
    """Of the files in a folder, as `du` counts them."""
    return round(int(_command("du", "--summarize", "--block-size=1", folder).split()[0]) / _MEGABYTE)


def _pip_mounts() -> Iterator[str]:
    """This machine's pip configuration as one file, and the files and folders that it names."""
    listed = _command(sys.executable, "-m", "pip", "config", "list")
    settings: dict[str, str] = {}
    for level, key, value in re.findall(r"^(:env:|global|install)\.\.?(\S+?)='(.*)'$", listed, re.MULTILINE):
        if level == ":env:" or key not in settings:  # the environment wins
            settings[key] = value
    file = STATE / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key.lstrip('.')} = {value}\n" for key, value in settings.items()))
    yield f"{file}:/etc/pip.conf:ro"
    for word in {word for value in settings.values() for word in value.split()}:
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists() and not path.is_relative_to(_CERTIFICATES):
            place = path.parent if word.startswith("file://") else path  # an index names files beside it
            yield f"{place}:{place}:ro"


class Image:
    """One target of the Dockerfile, built."""

    def __init__(self, target: str) -> None:
        self.target, self.name = target, f"synthward-{target}"

    def build(self) -> None:
        """Build it anew."""
        mounts = [f"--volume={mount}" for mount in (f"{_CERTIFICATES}:{_CERTIFICATES}:ro", *_pip_mounts())]
        how = ("--layers", "--pull-never", "--network=host", "--format=docker", *mounts)
        buildah("bud", *how, "--target", self.target, "--tag", self.name, "--file", DOCKERFILE, REPOSITORY)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What an engine would start, as whom, and how it would see that it is well."""
        return json.loads(buildah("inspect", "--type=image", self.name))["Docker"]["config"]

    @contextmanager
    def container(self, *, read_only: bool = False) -> Iterator[Container]:
        """A container of it, which is thrown away; buildah runs its commands, and where its root is read-only we do."""
        name = buildah("from", "--pull-never", self.name)
        for place in self.config["Volumes"] or ():  # buildah puts back, after each command, what a volume had before
            buildah("config", f"--volume={place}-", name)
        try:
            yield Container(self, name, read_only=read_only)
        finally:
            buildah("rm", name)


class Container:
    """A container whose commands run as the image's own user."""

    def __init__(self, image: Image, name: str, *, read_only: bool) -> None:
        self._image, self._name, self._read_only = image, name, read_only
        self.root = Path(buildah("mount", name))

    def words(self, arguments: Sequence[object], mounts: dict[Path, str], *, entry: bool = True) -> list[str]:
        """The command line that runs these arguments of the image's entry point, or a command of their own."""
        given = [*(self._image.config["Entrypoint"] if entry else ()), *map(str, arguments)]
        volumes = [f"{path}:{place}" for path, place in mounts.items()]
        if self._read_only:
            config = self._image.config
            script = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _READ_ONLY, "sh")
            return [*script, str(self.root), config["User"], *volumes, "--", *config["Env"], *given]
        return ["buildah", *_storage(), "run", *(f"--volume={v}" for v in volumes), self._name, "--", *given]

    def run(self, *arguments: object, mounts: dict[Path, str] | None = None, entry: bool = True,
            seconds: float = 300) -> tuple[int, str, str]:  # fmt: skip
        """(exit code, output, errors) of one command."""
        ended = self.start(*arguments, mounts=mounts, entry=entry)
        out, error = ended.communicate(timeout=seconds)
        return ended.returncode, out, _BUILDAHS_OWN.sub("", error)

    def start(self, *arguments: object, mounts: dict[Path, str] | None = None, entry: bool = True,
              output: IO[str] | None = None) -> subprocess.Popen[str]:  # fmt: skip
        """A command that goes on; all that it says goes to `output` where that is given."""
        return subprocess.Popen(self.words(arguments, mounts or {}, entry=entry), env=_environment(), text=True,
                                start_new_session=True, stdout=output or subprocess.PIPE,
                                stderr=subprocess.STDOUT if output else subprocess.PIPE)  # fmt: skip
