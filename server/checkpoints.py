"""The run folder: what a stop or a crash must not lose, written atomically.

SPDX-License-Identifier: Apache-2.0

    runs/<study>-<time>/
        study.toml, study.sha256   settings as run
        plan.json                  every mechanism with its noise
        state.json                 results of the stages that are done
        checkpoints/               weights and moving average after each round (the last few)
        events.jsonl               what happened when; older parts are events-00001.jsonl and so on
        live.html                  how it stands, for a browser
        release/                   what may be given away; there whole, or not at all
        sites/                     simulated sites only: their site files and private state
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.accounting import StudyPlan
from common.errors import CheckpointError
from common.files import append_line, atomic_write, pack_arrays, read_json, sha256_file, unpack_arrays, write_json
from common.protocol import Arrays
from common.study import Study
from common.study_file import load_study, study_toml

_KEEP = 3
MOST_EVENT_BYTES = 8 << 20  # of one part


@dataclass(frozen=True)
class RoundRow:
    """One finished training round."""

    round: int
    loss: float | None
    epsilon: dict[str, float]
    accepted: list[str]
    rejected: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """Training after `round` rounds.

    Attributes:
        ema: what images are generated from.
        optimizer: the server's, where it makes the steps.
    """

    round: int
    weights: Arrays
    ema: Arrays
    rows: list[RoundRow] = field(default_factory=list)
    optimizer: Arrays = field(default_factory=dict)


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners = list[Callable[[dict[str, Any]], None]]()  # each is given every event after it was written

    @classmethod
    def create(cls, parent: Path, study: Study, plan: StudyPlan | None = None) -> RunFolder:
        """Make a new folder; never one that exists. It is a run's only when it has a plan (`keep_plan`).

        Raises:
            StorageError: it cannot be written.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        names = (f"{study.study.name}-{stamp}{extra}" for extra in ("", *(f"-{n}" for n in range(2, 1000))))
        path = next(parent / name for name in names if not (parent / name).exists())
        atomic_write(path / "study.toml", study_toml(study).encode())
        atomic_write(path / "study.sha256", f"{study.sha256}\n".encode())
        folder = cls(path)
        if plan is not None:
            folder.keep_plan(plan)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing folder.

        Raises:
            CheckpointError: it is none.
        """
        if not (path / "study.toml").is_file() or not (path / "plan.json").is_file():
            raise CheckpointError(
                "not a run folder (no study.toml and plan.json)", where=str(path),
                remedy="Give the folder that `synthward run` made, as in runs/demo-20260102-030405.",
            )  # fmt: skip
        return cls(path)

    @property
    def release(self) -> Path:
        """What the run releases: a folder of its own, that can be given away as it is."""
        return self.path / "release"

    @property
    def finished(self) -> bool:
        """Whether the release is out. It appears whole, and is never written again."""
        return (self.release / "SHA256SUMS").is_file()

    def study(self) -> Study:
        """The study as run; what was agreed is checked against its hash, settings of the machine may have changed."""
        study = load_study(self.path / "study.toml")
        if (self.path / "study.sha256").read_text().strip() != study.sha256:
            raise CheckpointError("study.toml was changed after the run began", where=str(self.path),
                                  remedy="Put it back, or start a new run.")  # fmt: skip
        return study

    def keep_plan(self, plan: StudyPlan) -> None:
        """Keep the plan: from now on this is a run's folder."""
        write_json(self.path / "plan.json", plan.model_dump(mode="json"))

    def plan(self) -> StudyPlan:
        try:
            return StudyPlan.model_validate(read_json(self.path / "plan.json"))
        except ValidationError as error:
            raise CheckpointError("not a plan", where=str(self.path / "plan.json"), remedy="Start anew.") from error

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl."""
        event = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind, **values}
        file = self.path / "events.jsonl"
        if file.exists() and file.stat().st_size > MOST_EVENT_BYTES:
            with suppress(OSError):  # then this part grows on
                file.rename(self.path / f"events-{len(self._older_events()) + 1:05d}.jsonl")
        append_line(file, json.dumps(event))
        for listener in self.listeners:
            listener(event)

    def events(self) -> list[dict[str, Any]]:
        """All whole lines of events.jsonl and of those before it; a line cut by a crash is passed over."""
        while True:
            older = self._older_events()
            whole = [event for path in (*older, self.path / "events.jsonl") for event in _whole_lines(path)]
            if self._older_events() == older:  # else the run has begun a new part meanwhile
                return whole

    def _older_events(self) -> list[Path]:
        return sorted(self.path.glob("events-*.jsonl"))

    def made_once(self, name: str, make: Callable[[], Arrays]) -> Arrays:
        """Arrays that were made and kept before; where there are none, or they are spoilt, what `make` gives, kept."""
        file = self.path / "checkpoints" / f"{name}.safetensors"
        try:
            return unpack_arrays(file.read_bytes(), where=str(file))
        except (OSError, CheckpointError):  # of an answer, sites have the same in their stores
            arrays = make()
            atomic_write(file, pack_arrays(arrays))
            return arrays

    def result(self, stage: str) -> Any | None:
        """The kept result of a stage, or None when it is not done."""
        path = self.path / "state.json"
        return read_json(path).get(stage) if path.exists() else None

    def keep_result(self, stage: str, value: Any) -> None:
        """Keep a stage's result: it is never computed again."""
        path = self.path / "state.json"
        state = read_json(path) if path.exists() else {}
        write_json(path, {**state, stage: value})

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a round's checkpoint, then point to it, then drop the oldest."""
        folder = self.path / "checkpoints"
        file = folder / f"round-{checkpoint.round:05d}.safetensors"
        arrays = {f"weights/{n}": a for n, a in checkpoint.weights.items()}
        arrays |= {f"ema/{n}": a for n, a in checkpoint.ema.items()}
        arrays |= {f"optimizer/{n}": a for n, a in checkpoint.optimizer.items()}
        atomic_write(file, pack_arrays(arrays))
        manifest = {"round": checkpoint.round, "file": file.name, "sha256": sha256_file(file),
                    "rows": [asdict(row) for row in checkpoint.rows]}  # fmt: skip
        write_json(folder / f"round-{checkpoint.round:05d}.json", manifest)
        for old in sorted(folder.glob("round-*.safetensors"))[:-_KEEP]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink(missing_ok=True)

    def last_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint; a damaged one is passed over for the one before. None when there is none.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        manifests = sorted((self.path / "checkpoints").glob("round-*.json"), reverse=True)
        for manifest in manifests:
            try:
                return self._read_checkpoint(manifest)
            except (CheckpointError, KeyError, TypeError, OSError):
                continue
        if manifests:
            raise CheckpointError("every checkpoint is damaged", where=str(self.path / "checkpoints"),
                                  remedy="Start a new run; the sites' ledgers stand.")  # fmt: skip
        return None

    @staticmethod
    def _read_checkpoint(manifest: Path) -> Checkpoint:
        head = read_json(manifest)
        if not re.fullmatch(r"round-\d{5}\.safetensors", head["file"]):
            raise CheckpointError("a file name that is none of ours", where=str(manifest))
        file = manifest.parent / head["file"]
        if sha256_file(file) != head["sha256"]:
            raise CheckpointError("checksum differs", where=str(file), remedy="Use an older checkpoint.")
        arrays = unpack_arrays(file.read_bytes(), where=str(file))
        return Checkpoint(
            round=int(head["round"]),
            weights=_part(arrays, "weights/"), ema=_part(arrays, "ema/"), optimizer=_part(arrays, "optimizer/"),
            rows=[RoundRow(**row) for row in head["rows"]],
        )  # fmt: skip


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except ValueError:
            continue
    return whole


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
