"""A small phantom site on the disk, opened as the client opens it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

from client.site import Site
from common.study import Study


def site_toml(
    *, name: str = "site-1", index: int = 0, records: int = 80, extra: str = "", policy: str = "",
    approval: bool = False,
) -> str:  # fmt: skip
    return (
        f'name = "{name}"\nstate = "{name}"\n{extra}\n[data]\nsource = "phantoms"\nmodality = "radiology"\n'
        f"records = {records}\nshard_index = {index}\nshard_count = 3\nlabel_skew = 0.3\nseed = 5\n"
        f'[policy]\nmin_units = 10\nrequire_approval = {str(approval).lower()}\naccountant = "rdp"\n{policy}\n'
        "[performance]\nthreads = 1\n"
    )


def open_phantom_site(folder: Path, study: Study, **changes: str | int | bool) -> Site:
    path = folder / "site-1.toml"
    path.write_text(site_toml(**changes))  # pyright: ignore[reportArgumentType]
    return Site.open(path, study)
