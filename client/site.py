"""One hospital, opened: its data, policy, ledger and gate, from the site file that it owns.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import Field, ValidationError

from client.data.checks import SiteReport, check_splits
from client.data.sources import SourceConfig, Splits, open_source
from client.privacy.gate import Gate
from client.privacy.ledger import Ledger
from client.privacy.policy import Cohort, SitePolicy
from client.privacy.randomness import NoiseSource
from common.errors import DataError, PolicyRefusal
from common.images import Units
from common.messages import Agreement
from common.study import Settings, Study, settings_error_line


class Performance(Settings):
    """Settings that cannot change the guarantee."""

    threads: int = Field(default=2, ge=1, le=256)
    memory_mb: int = Field(
        default=1500, ge=64, description="bounds the physical batch; the logical batch does not change"
    )


class SiteConfig(Settings):
    """The site file (TOML)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")
    state: Path = Field(description="folder of ledger, answers and logs; only this site writes there")
    data: SourceConfig
    policy: SitePolicy = SitePolicy()
    performance: Performance = Performance()
    own_reference: bool = Field(
        default=False, description="also train a non-private classifier, for this site's eyes only"
    )
    test_noise_seed: int | None = Field(
        default=None, description="seeds the noise; phantoms only, and every claim says so"
    )

    def ledger(self) -> Ledger:
        """The site's ledger, opened.

        Raises:
            StorageError: it cannot be opened, or was changed.
        """
        return Ledger(self.state / "ledger.sqlite")


@dataclass(frozen=True)
class Site:
    """A site's own records and rules. Nothing of it is sent but through `gate`.

    Attributes:
        train, holdout: the partitions by the study's privacy unit.
        cohort: what the policy's smallest numbers are compared with.
    """

    config: SiteConfig
    splits: Splits
    report: SiteReport
    train: Units
    holdout: Units
    cohort: Cohort

    @classmethod
    def open(cls, path: Path, study: Study) -> Site:
        """Read the site file, load the images and check them.

        Raises:
            DataError: the site file or the images cannot be used; says which file, field and remedy.
        """
        return _open(path, path.stat().st_mtime_ns if path.exists() else 0, study)

    @property
    def state(self) -> Path:
        return self.config.state

    def gate(self, agreement: Agreement, request: str) -> Gate:
        """The gate for one request; opens the ledger."""
        return Gate(
            agreement=agreement,
            request=request,
            policy=self.config.policy,
            ledger=self.config.ledger(),
            source=NoiseSource(self.config.test_noise_seed),
            cohort=self.cohort,
            replies=self.state / "replies",
        )


def load_site_config(path: Path) -> SiteConfig:
    """Read and check a site file; relative paths are relative to it.

    Raises:
        DataError: missing, not TOML, or a key or value cannot be used.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read the site file ({error.strerror})", where=str(path), remedy="Give the path of a site TOML."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not valid TOML: {error}", where=str(path), remedy="Mend that line.") from error
    try:
        config = SiteConfig.model_validate(raw)
    except ValidationError as error:
        field, what, remedy = settings_error_line(error, SiteConfig)
        raise DataError(what, where=f"{path}: {field}", remedy=remedy) from error
    base = path.resolve().parent
    data = config.data
    if data.source == "npz":
        data = data.model_copy(update={"path": base / data.path})
    if config.test_noise_seed is not None and data.source != "phantoms":
        raise PolicyRefusal(
            "seeded noise protects nobody", where=f"{path}: test_noise_seed", remedy="Remove it; it is for phantoms."
        )
    return config.model_copy(update={"state": base / config.state, "data": data})


@lru_cache(maxsize=8)
def _open(path: Path, _changed: int, study: Study) -> Site:
    config = load_site_config(path)
    splits = open_source(config.data, study.data, modality=study.study.modality)
    where = str(getattr(config.data, "path", path))
    report = check_splits(splits, study.data, where=where)
    try:
        train, holdout = (Units.of(part, study.privacy.unit) for part in (splits.train, splits.holdout))
    except DataError as error:
        raise DataError(error.what, where=f"{where}: train_groups", remedy=error.remedy) from error
    cohort = Cohort(len(train), int(train.with_class(len(study.data.classes)).min()))
    return Site(config, splits, report, train, holdout, cohort)
