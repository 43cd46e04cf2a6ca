"""What server and site say to each other, stage by stage, as plain frozen dataclasses.

SPDX-License-Identifier: Apache-2.0

A message is encoded as safetensors (its arrays) plus JSON (everything else): no pickle. The SHA-256 of a request's
bytes is its identity at the site: the same bytes are answered once and the answer is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.accounting import StudyPlan
from common.errors import CheckpointError, ReplyError
from common.files import pack_arrays, unpack_arrays
from common.study import Study, canonical_json

Arrays = dict[str, NDArray[Any]]
MAX_MESSAGE_BYTES = 1 << 30
_MAGIC = b"SYNW1\n"


@dataclass(frozen=True)
class Agreement:
    """What every request repeats, since a site starts a new process for each: the study and its plan."""

    study: Study
    plan: StudyPlan


@dataclass(frozen=True)
class EnrolRequest:
    """Asks for the private class counts of the train partition."""

    stage: ClassVar[str] = "enrol"
    agreement: Agreement
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class MomentsRequest:
    """Asks for the private class moments of the train partition (`common/moments.py`).

    Attributes:
        counts: the site's own noisy class counts, as it gave them; with them its sums become the means that the squares
            are taken about.
    """

    stage: ClassVar[str] = "moments"
    agreement: Agreement
    counts: tuple[float, ...]
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class TrainRequest:
    """Asks for one round of private training from these weights.

    Attributes:
        round: 1-based.
        expected_batch: public estimate of the records a step (sample_rate × the site's own noisy count).
        arrays: float32 weights of the whole model by name, its prior included.
    """

    stage: ClassVar[str] = "train"
    agreement: Agreement
    round: int
    expected_batch: float
    arrays: Arrays


@dataclass(frozen=True)
class ValidateRequest:
    """Asks for noisy score histograms of this classifier (arrays: its state) on the holdout partition."""

    stage: ClassVar[str] = "validate"
    agreement: Agreement
    expected_reference_batch: float
    arrays: Arrays


@dataclass(frozen=True)
class Spent:
    """What the site's ledger says of this study after the answer; a function of the plan alone, not of the data."""

    train: float
    holdout: float
    reserved: int
    confirmed: int


@dataclass(frozen=True)
class EnrolReply:
    """Noisy class counts: arrays["counts"], float64 (classes,)."""

    stage: ClassVar[str] = "enrol"
    site: str
    phantoms: bool
    random_source: str
    spent: Spent
    arrays: Arrays


@dataclass(frozen=True)
class MomentsReply:
    """Noisy sums, float64: "means" (classes, d), "squares" (d (d + 1) / 2,) and "energies" (classes, bands)."""

    stage: ClassVar[str] = "moments"
    site: str
    spent: Spent
    arrays: Arrays


@dataclass(frozen=True)
class TrainReply:
    """Of each trained parameter, float32: the change of the weights, or in a summed step the noisy gradient sum.

    Beside it the noisy mean loss a draw.
    """

    stage: ClassVar[str] = "train"
    site: str
    round: int
    loss: float
    spent: Spent
    arrays: Arrays


@dataclass(frozen=True)
class ValidateReply:
    """Noisy `ScoreCounts` vectors: arrays["synthetic"] and, where the study has one, arrays["reference"]."""

    stage: ClassVar[str] = "validate"
    site: str
    spent: Spent
    arrays: Arrays


@dataclass(frozen=True)
class Refusal:
    """A site's readable no: nothing was computed, or the answer is lost but counted.

    Attributes:
        kind: "PolicyRefusal", "BudgetError", ...: the name of the site's error.
        rule, asked, allowed: which rule said no, and the two values that do not fit; empty where there is none.
        spent: what the ledger holds now; None when it could not be read.
    """

    stage: ClassVar[str] = "refusal"
    site: str
    kind: str
    what: str
    remedy: str
    rule: str = ""
    asked: str = ""
    allowed: str = ""
    spent: Spent | None = None
    arrays: Arrays = field(default_factory=dict)


Request = EnrolRequest | MomentsRequest | TrainRequest | ValidateRequest
Reply = EnrolReply | MomentsReply | TrainReply | ValidateReply | Refusal
_REQUESTS = {kind.stage: kind for kind in (EnrolRequest, MomentsRequest, TrainRequest, ValidateRequest)}
_REPLIES = {kind.stage: kind for kind in (EnrolReply, MomentsReply, TrainReply, ValidateReply, Refusal)}


def encode(message: Request | Reply) -> bytes:
    """A message as bytes; equal messages give equal bytes."""
    head: dict[str, Any] = {}
    for part in fields(message):
        value = getattr(message, part.name)
        if part.name == "arrays":
            continue
        if isinstance(value, Agreement):
            value = {"study": value.study.model_dump(mode="json"), "plan": value.plan.to_json()}
        elif isinstance(value, Spent):
            value = vars(value)
        head[part.name] = value
    text = canonical_json({"stage": message.stage, **head}).encode()
    return _MAGIC + len(text).to_bytes(8, "big") + text + pack_arrays(message.arrays)


def decode_request(data: bytes) -> Request:
    """Read a request.

    Raises:
        ReplyError: malformed bytes, unknown stage, wrong fields.
    """
    return _decode(data, _REQUESTS, "request")


def decode_reply(data: bytes) -> Reply:
    """Read a reply.

    Raises:
        ReplyError: malformed bytes, unknown stage, wrong fields.
    """
    return _decode(data, _REPLIES, "reply")


def identity(data: bytes) -> str:
    """A request's identity: SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()


def _decode(data: bytes, kinds: dict[str, Any], name: str) -> Any:
    try:
        if len(data) > MAX_MESSAGE_BYTES or not data.startswith(_MAGIC):
            raise ValueError("not a synthward message")
        start = len(_MAGIC) + 8
        length = int.from_bytes(data[len(_MAGIC) : start], "big")
        head = json.loads(data[start : start + length])
        kind = kinds[head.pop("stage")]
        if "agreement" in head:
            agreed = head["agreement"]
            head["agreement"] = Agreement(Study.model_validate(agreed["study"]), StudyPlan.from_json(agreed["plan"]))
        if head.get("spent") is not None:
            head["spent"] = Spent(**head["spent"])
        arrays = unpack_arrays(data[start + length :], where=name)
        return kind(**head, arrays=arrays)
    except (ValueError, KeyError, TypeError, AttributeError, CheckpointError, RecursionError) as error:
        raise ReplyError(
            f"malformed {name} ({type(error).__name__})", where=name, remedy="Update both sides."
        ) from error


def finite(arrays: Arrays) -> bool:
    """Whether every value of every array is finite."""
    return all(bool(np.isfinite(array).all()) for array in arrays.values())
