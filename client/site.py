"""One hospital, opened: its data, policy, ledger and gate, from the site file that it owns.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field

from client.data.checks import SiteReport, check_splits
from client.data.content import Content, look_at, sheet
from client.data.sources import SourceConfig, Splits, open_source
from client.log import write_error
from client.privacy.fingerprints import Fingerprints
from client.privacy.ledger import Approval, Ledger
from client.privacy.policy import Cohort, SitePolicy
from client.registry import open_ledger
from common.errors import DataError
from common.images import Units
from common.protocol import SiteFacts, SiteName
from common.settings import Settings, checked, read_toml
from common.study import DataConfig, Study

MOST_SHOWN = 64  # unusual images on one picture
_MOST_OPEN = 4  # sites that one process keeps in memory


class Performance(Settings):
    """Settings that cannot change the guarantee."""

    threads: int = Field(default=2, ge=1, le=256)
    max_message_mb: int = Field(default=256, ge=1, le=1024, description="largest request that is read")
    memory_mb: int = Field(
        default=1500, ge=64, description="bounds the physical batch; the logical batch does not change"
    )


class SiteConfig(Settings):
    """The site file (TOML)."""

    name: SiteName
    state: Path = Field(description="folder of ledger, answers and logs; only this site writes there")
    data: SourceConfig
    registry: Path | None = Field(default=None, description="list of this machine's ledgers; default: the user's own")
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
            StorageError: there is none, it cannot be opened, or was changed.
        """
        return open_ledger(self.name, self.state, self.registry)

    @property
    def missing(self) -> Path | None:
        """The file of its images, where it is not there."""
        path = getattr(self.data, "path", None)
        return path if path is not None and not path.exists() else None

    def require_images(self) -> None:
        """See that there is a file of images, before anything that takes long.

        Raises:
            DataError: there is none.
        """
        if self.missing is not None:
            remedy = "Put the images there, or give their path in the site file ([data] path)."
            raise DataError("no such file", where=str(self.missing), remedy=remedy)

    def facts(self) -> SiteFacts:
        """What this site says of itself with every answer; nothing of it depends on records."""
        from client.privacy.randomness import NoiseSource  # late: `init`, `budget` and others need no torch

        source = NoiseSource(self.test_noise_seed).name
        return SiteFacts(name=self.name, phantoms=self.data.source == "phantoms", random_source=source)


@dataclass(frozen=True)
class Site:
    """A site's own records and rules. Nothing of it is sent but through `gate`.

    Attributes:
        train, holdout: the partitions by the study's privacy unit.
        cohort: what the policy's smallest numbers are compared with when the study is approved.
        schema: what the study says of its images.
    """

    config: SiteConfig
    splits: Splits
    report: SiteReport
    train: Units
    holdout: Units
    cohort: Cohort
    schema: DataConfig

    @classmethod
    def open(cls, path: Path, study: Study) -> Site:
        """Read the site file, load the images and check them.

        Raises:
            DataError: the site file or the images cannot be used; says which file, field and remedy.
        """
        return _kept.get(path, study)

    @classmethod
    def approved(cls, path: Path, study: Study, ledger: Ledger, approval: Approval) -> Site:
        """Open it, and see that the images are those of an approval. Cheap while no file has changed.

        Raises:
            DataError: they are others, or cannot be used.
        """
        site = cls.open(path, study)
        if site.fingerprints(ledger.key).digest != approval.data:
            raise DataError(
                "the images are not those that were there when the study was approved", where=str(path),
                remedy="Approve the study again, or put the images back.",
            )  # fmt: skip
        return site

    @staticmethod
    def forget_replaced(path: Path) -> None:
        """Let go of what this process has read of a site's file that is another one by now."""
        _kept.forget_replaced(path)

    @cached_property
    def content(self) -> Content:
        """What the pixels look like; exact numbers, for the site's own eyes."""
        return look_at(self.splits, self.schema)

    @property
    def unusual(self) -> bytes:
        """PNG of the train images that are least like the others."""
        return sheet(self.splits.train, self.content.unusual[:MOST_SHOWN])

    @cached_property
    def _fingerprints(self) -> dict[bytes, Fingerprints]:
        return {}

    def fingerprints(self, key: bytes) -> Fingerprints:
        """Of both partitions, under a ledger's key."""
        if key not in self._fingerprints:
            self._fingerprints[key] = Fingerprints.of(key, self.splits.train, self.splits.holdout)
        return self._fingerprints[key]

    @contextmanager
    def logged(self, what: str) -> Iterator[None]:
        """Write into the site's log what goes wrong inside, and go on: for work beside an answer that is sealed."""
        try:
            yield
        except Exception as error:
            write_error(self.state, error, doing=what)

    @property
    def state(self) -> Path:
        return self.config.state


def load_site_config(path: Path) -> SiteConfig:
    """Read and check a site file; relative paths are relative to it.

    Raises:
        DataError: missing, not TOML, or a key or value cannot be used.
    """
    raw = read_toml(path, what="site", error=DataError)
    config = checked(SiteConfig, raw, where=f"{path}: ", error=DataError)
    base = path.resolve().parent
    data = config.data
    if data.source == "npz":
        data = data.model_copy(update={"path": base / data.path})
    if config.test_noise_seed is not None and data.source != "phantoms":
        raise DataError(
            "seeded noise protects nobody", where=f"{path}: test_noise_seed", remedy="Remove it; it is for phantoms."
        )
    registry = None if config.registry is None else base / config.registry
    return config.model_copy(update={"state": base / config.state, "data": data, "registry": registry})


def _versions(path: Path) -> tuple[object, ...]:
    """Of a site file and of its images' file; changes when one of them does, be its time and size set back."""
    files = (path, getattr(load_site_config(path).data, "path", None))
    found = [file.stat() for file in files if file is not None and file.exists()]
    return tuple((at.st_ctime_ns, at.st_mtime_ns, at.st_size, at.st_ino, at.st_dev) for at in found)


class _Kept:
    """The sites that were opened last; nothing of a file that has changed since: somebody may have withdrawn."""

    def __init__(self) -> None:
        self._opened: dict[tuple[Path, str], tuple[object, Site]] = {}

    def forget_replaced(self, path: Path) -> object:
        versions: object = None  # a site file that cannot be read: nothing that was opened is of it
        try:
            versions = _versions(path)
        finally:
            for known, (before, _) in list(self._opened.items()):
                if known[0] == path and before != versions:
                    del self._opened[known]
        return versions

    def get(self, path: Path, study: Study) -> Site:
        versions = self.forget_replaced(path)  # before it is read: what changes meanwhile is another version
        key = (path, study.sha256)
        if key not in self._opened:
            while len(self._opened) >= _MOST_OPEN:
                del self._opened[next(iter(self._opened))]
            self._opened[key] = (versions, _open(path, study))
        return self._opened[key][1]


_kept = _Kept()


def _open(path: Path, study: Study) -> Site:
    config = load_site_config(path)
    splits = open_source(config.data, study.data, modality=study.study.modality)
    where = str(getattr(config.data, "path", path))
    report = check_splits(splits, study.data, where=where)
    try:
        train, holdout = (Units.of(part, study.privacy.unit) for part in (splits.train, splits.holdout))
    except DataError as error:
        raise DataError(error.what, where=f"{where}: train_groups", remedy=error.remedy) from error
    cohort = Cohort.of(train, holdout, len(study.data.classes))
    return Site(config, splits, report, train, holdout, cohort, study.data)
