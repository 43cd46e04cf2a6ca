"""A small phantom site on the disk, with a ledger and an approved study, opened and asked as the client does it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from client.beginning import begin
from client.privacy.gate import Gate
from client.privacy.ledger import Ledger
from client.privacy.randomness import NoiseSource
from client.privacy.store import Store
from client.service import SiteService
from client.site import Site
from common.accounting import plan_study
from common.protocol import Answer, Arrays, Request, decode_answer, decode_arrays, encode
from common.study import Study
from support.studies import agreement


def site_toml(
    *, name: str = "site-1", index: int = 0, records: int = 80, extra: str = "", policy: str = "", seed: int = 5
) -> str:
    return (
        f'name = "{name}"\nstate = "{name}"\nregistry = "registry.json"\n{extra}\n[data]\nsource = "phantoms"\n'
        f'modality = "radiology"\nrecords = {records}\nshard_index = {index}\nshard_count = 3\nlabel_skew = 0.3\n'
        f'seed = {seed}\n[policy]\nmin_units = 10\nunit = "image"\naccountant = "rdp"\n{policy}\n'
        "[performance]\nthreads = 1\n"
    )


def make_site(folder: Path, name: str = "site-1", **changes: str | int) -> Path:
    """A site file with a ledger; approves nothing."""
    path = folder / f"{name}.toml"
    path.write_text(site_toml(name=name, **changes))  # pyright: ignore[reportArgumentType]
    if not (folder / name / "ledger.sqlite").exists():
        begin(path, None, None)
    return path


def make_npz_site(
    folder: Path, name: str = "site-1", *, train: int = 60, holdout: int = 30, size: int = 16, policy: str = "",
    seed: int = 0, data: Path | None = None,
) -> Path:  # fmt: skip
    """A site file with a ledger over random images in a file of its own, or in `data`; approves nothing."""
    if data is None:
        data = folder / f"{name}.npz"
        write_images(data, train=train, holdout=holdout, size=size, seed=seed)
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\nstate = "{name}"\nregistry = "registry.json"\n[data]\nsource = "npz"\npath = "{data}"\n'
        f"[policy]\n{'' if 'min_units =' in policy else 'min_units = 2'}\n"
        f'accountant = "rdp"\n{policy}\n[performance]\nthreads = 1\n'
    )
    begin(path, None, None)
    return path


def write_images(path: Path, *, train: int, holdout: int, size: int, seed: int, swap: bool = False) -> None:
    """Random images of two classes in turn, in MedMNIST's layout; `swap` exchanges the two parts."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, 256, (count, size, size), dtype=np.uint8) for count in (train, holdout)]
    parts = parts[::-1] if swap else parts
    labels = [(np.arange(len(part)) % 2).astype(np.uint8)[:, None] for part in parts]
    np.savez(path, train_images=parts[0], train_labels=labels[0], test_images=parts[1], test_labels=labels[1])


def approve(site: Site, study: Study) -> None:
    """Write the approval of a study and of the data as they are into the site's ledger; asks no policy."""
    with closing(Ledger.open(site.state)) as ledger:
        ledger.approve(study, plan_study(study), site.fingerprints(ledger.key), by="Dr. T. Test")


def open_phantom_site(folder: Path, study: Study, *, approved: bool = True, **changes: str | int) -> Site:
    """A site with a ledger of its own, in which the study is approved where it is asked for."""
    site = Site.open(make_site(folder, **changes), study)
    if approved:
        approve(site, study)
    return site


def gate_of(site: Site, study: Study, request: str = "x", ledger: Ledger | None = None) -> Gate:
    """A gate as the service makes one."""
    ledger, path = ledger or site.config.ledger(), site.state.parent / f"{site.config.name}.toml"
    return Gate(
        facts=site.config.facts(), agreement=agreement(study), request=request, policy=site.config.policy,
        ledger=ledger, source=NoiseSource(site.config.test_noise_seed),
        store=Store(site.state), images=lambda approval: Site.approved(path, study, ledger, approval),
    )  # fmt: skip


def ask(path: Path, request: Request, arrays: Arrays | None = None) -> tuple[Answer, Arrays]:
    """What the site's service answers."""
    answer, rest = decode_answer(SiteService(path).answer(encode(request, arrays)))
    return answer, decode_arrays(rest, "reply")
