"""What a deployment ships: the app folder that `flwr run` reads, copied from the installed packages, and its bundle.

SPDX-License-Identifier: Apache-2.0

The coordinator's ServerApp runs from it. A hospital's carrier only holds its hash against the list of those that it
answers to, and runs the client app that the hospital itself installed (`client/carrier/clientapp.py`).
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import tomli_w

from common.errors import StorageError
from common.files import atomic_write, sha256_file, storage_error

# Of the client no more than what carries bytes, as `fab-include` of pyproject.toml has it; a test holds them together.
SHIPPED = {"common": ("**/*.py", "*.json"), "client": ("__init__.py", "app.py"), "server": ("**/*.py",)}
RUN_CONFIG = {"study": "", "run-dir": "", "out": "runs", "sites": 0, "admitted": ""}
_PROJECT = {
    "project": {"name": "synthward", "version": "0.1.0", "description": "synthward", "license": "Apache-2.0",
                "requires-python": ">=3.11,<3.13", "dependencies": ["flwr>=1.41,<1.42"]},
    "tool": {"flwr": {"app": {
        "publisher": "synthward",
        "fab-include": ["common/**/*.py", "common/*.json", "client/__init__.py", "client/app.py", "server/**/*.py"],
        "components": {"serverapp": "server.app:app", "clientapp": "client.app:app"},
        "config": RUN_CONFIG,
    }}},
}  # fmt: skip


def make_app(folder: Path) -> None:
    """Write the app folder.

    Raises:
        StorageError: it cannot be written.
    """
    if folder.exists():  # what is not shipped any more would stay
        shutil.rmtree(folder)
    for package, patterns in SHIPPED.items():
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for file in sorted({path for pattern in patterns for path in root.glob(pattern)}):
            target = folder / package / file.relative_to(root)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            except OSError as error:
                raise storage_error(error, target) from error
    atomic_write(folder / "pyproject.toml", tomli_w.dumps(_PROJECT).encode())


def build(app: Path, flwr: Path, environment: dict[str, str]) -> tuple[bytes, str]:
    """(bundle, its SHA-256), as `flwr build` makes it of an app folder; the same folder gives the same bytes.

    Raises:
        StorageError: it cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="synthward-") as scratch:
        command = [str(flwr), "build", "--app", str(app)]
        clean = environment | {"PYTHONDONTWRITEBYTECODE": "1"}  # it imports the app, and the folder is what is agreed
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch, env=clean)
        built = [*Path(scratch).glob("*.fab")]
        if result.returncode != 0 or len(built) != 1:
            said = (result.stderr.strip() or result.stdout.strip()).splitlines() or [f"exit code {result.returncode}"]
            raise StorageError(f"the app bundle cannot be built ({said[-1]})", where=str(app), remedy="Look there.")
        return built[0].read_bytes(), sha256_file(built[0])
