"""What `init` does: a commented site file and an empty ledger, once.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import tomli_w

from client.registry import Registry
from client.site import SiteConfig, load_site_config
from common.errors import DataError
from common.files import storage_error


def begin(site: Path, name: str | None, data: Path | None) -> SiteConfig:
    """Write a site file, where name and data are given, and begin its ledger.

    Raises:
        DataError: the site file is there already, or missing; or name or path cannot be used.
        StorageError: the site has a ledger, or had one; or a file cannot be written. A site file that was written for
            it is removed again.
    """
    if name is None or data is None:
        if name is not None or data is not None or not site.exists():
            what = "a new site file needs a name and images"
            raise DataError(what, where=str(site), remedy="Give --name and --data.")
        return _with_ledger(site)
    _write_new(site, site_file_text(name, data))
    try:
        return _with_ledger(site)
    except BaseException:
        site.unlink()
        raise


def site_file_text(name: str, data: Path) -> str:
    """`client/site.example.toml` with name and path replaced."""
    text = files("client").joinpath("site.example.toml").read_text(encoding="utf-8")
    for key, example, value in (("name", "hospital-a", name), ("path", "images.npz", str(data))):
        before, found, after = text.partition(f'\n{key} = "{example}"')
        assert found, key
        text = f"{before}\n{tomli_w.dumps({key: value}).strip()}{after}"
    return text


def _with_ledger(site: Path) -> SiteConfig:
    config = load_site_config(site)
    Registry(config.registry).begin(config.name, config.state)
    return config


def _write_new(path: Path, text: str) -> None:
    try:
        data = text.encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
    except FileExistsError as error:
        raise DataError("exists already", where=str(path), remedy="Edit it, or give another path.") from error
    except UnicodeEncodeError as error:
        raise DataError("a name or path that is no text", where=repr(str(path)), remedy="Give plain text.") from error
    except OSError as error:
        raise storage_error(error, path) from error
