"""What server and site say to each other: requests by stage, and one envelope for every answer.

SPDX-License-Identifier: Apache-2.0

A message is a JSON head, checked strictly (no value is turned into another type), then its arrays as safetensors: no
pickle. The SHA-256 of a request's bytes is its identity at the site: the same bytes are answered once, and the stored
bytes of that answer are what is sent again. Either side can read a head without touching the arrays behind it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_serializer

from common.accounting import StudyPlan
from common.errors import CheckpointError, ReplyError
from common.files import canonical_json, pack_arrays, unpack_arrays
from common.study import Study

Arrays = dict[str, NDArray[Any]]
MAX_HEAD_BYTES = 1 << 17
MAX_MESSAGE_BYTES = 1 << 30  # of an answer; a site bounds its requests by its own `performance.max_message_mb`
_MAGIC = b"SYNW2\n"
_START = len(_MAGIC) + 8

Text = Annotated[str, Field(max_length=500)]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]
Positive = Annotated[float, Field(ge=1e-3, le=1e12)]


class Part(BaseModel):
    """Base of everything that is said: frozen, strict, nothing unknown, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Agreement(Part):
    """What every request repeats, since a site may be restarted between any two: the study and its plan."""

    # Settings are read by their own rules (a list of the JSON is a tuple there).
    study: Annotated[Study, Field(strict=False)]
    plan: Annotated[StudyPlan, Field(strict=False)]

    @field_serializer("study")
    def _agreed(self, study: Study) -> dict[str, Any]:
        return study.agreed()


class CanaryRequest(Part):
    """Asks for zeros, and brings some: whether the study's largest messages get through, before anything is spent.

    Attributes:
        numbers: how many the answer is to have, float32.
    """

    stage: Literal["canary"] = "canary"
    agreement: Agreement
    numbers: int = Field(ge=0, le=MAX_MESSAGE_BYTES // 4)


class EnrolRequest(Part):
    """Asks for the private class counts of the train partition."""

    stage: Literal["enrol"] = "enrol"
    agreement: Agreement


class MomentsRequest(Part):
    """Asks for the private class moments of the train partition (`common/moments.py`).

    Attributes:
        counts: the site's own noisy class counts, as it gave them; with them its sums become the means that the squares
            are taken about.
    """

    stage: Literal["moments"] = "moments"
    agreement: Agreement
    counts: Annotated[tuple[float, ...], Field(strict=False, max_length=64)]


class FeaturesRequest(Part):
    """Asks for the private class features of the train partition; arrays: a `common.features.View`."""

    stage: Literal["features"] = "features"
    agreement: Agreement


class TrainRequest(Part):
    """Asks for one round of private training; arrays: float32 weights of the whole model by name.

    Attributes:
        round: 1-based.
        expected_batch: public estimate of the records per step (sample_rate × the site's own noisy count).
    """

    stage: Literal["train"] = "train"
    agreement: Agreement
    round: int = Field(ge=1, le=10_000)
    expected_batch: Positive


class ValidateRequest(Part):
    """Asks for noisy score histograms on the holdout partition; arrays: the classifier's state."""

    stage: Literal["validate"] = "validate"
    agreement: Agreement
    expected_reference_batch: Positive


class Spent(Part):
    """What the site's ledger says of this study after the answer; a function of the plan alone, not of the data."""

    train: float = Field(ge=0)
    holdout: float = Field(ge=0)
    reserved: int = Field(ge=0)
    confirmed: int = Field(ge=0)


class SiteFacts(Part):
    """What a site says of itself with every answer.

    Attributes:
        phantoms: its records are drawn, no patient's.
        random_source: where its noise comes from.
    """

    name: SiteName
    phantoms: bool
    random_source: Text


class CanaryReply(Part):
    """arrays["zeros"]: zeros, float32, as many as were asked for."""

    stage: Literal["canary"] = "canary"


class EnrolReply(Part):
    """arrays["counts"]: noisy class counts, float64 (classes,)."""

    stage: Literal["enrol"] = "enrol"


class MomentsReply(Part):
    """Noisy sums, float64: "means" (classes, d), "second_moments" (d (d + 1) / 2,), "band_power" (classes, bands) and
    "norm" (1,)."""

    stage: Literal["moments"] = "moments"


class FeaturesReply(Part):
    """Noisy sums, float64: "means" (classes, m) and "second_moments" (m (m + 1) / 2,)."""

    stage: Literal["features"] = "features"


class TrainReply(Part):
    """Of each trained parameter, float32: with FedAvg the change of the weights, with FedSGD the noisy gradient sum.

    Beside them arrays["loss"], float32 (1,): the noisy sum of clipped losses (`common/loss_curve.py` says of what).
    """

    stage: Literal["train"] = "train"
    round: int = Field(ge=1, le=10_000)


class ValidateReply(Part):
    """Noisy `ScoreCounts` vectors: arrays["synthetic"] and, where the study has one, arrays["reference"]."""

    stage: Literal["validate"] = "validate"


class Refusal(Part):
    """A site's readable no: nothing was computed, or the answer is lost but counted.

    Attributes:
        kind: "NotApproved", "BudgetError", ...: a fixed word.
        rule, asked, allowed: which rule said no, and the two values that do not fit; empty where there is none.
    """

    stage: Literal["refusal"] = "refusal"
    kind: Text
    what: Text
    remedy: Text = ""
    rule: Text = ""
    asked: Text = ""
    allowed: Text = ""


class Unreachable(Part):
    """What the carrier says in the place of a site whose process it cannot reach; it may be back in a minute.

    Attributes:
        carrier: how the carrier's operator calls the site; the site itself has not said so.
        what: what the socket said.
        again: whether asking again may help; what is too large for the site stays so.
    """

    stage: Literal["unreachable"] = "unreachable"
    carrier: Text
    what: Text
    again: bool


Request = CanaryRequest | EnrolRequest | MomentsRequest | FeaturesRequest | TrainRequest | ValidateRequest
Reply = CanaryReply | EnrolReply | MomentsReply | FeaturesReply | TrainReply | ValidateReply | Refusal | Unreachable


class Answer(Part):
    """The envelope of every answer.

    Attributes:
        site: None where the site file cannot be read, or the site was not reached.
        spent: of this study; None where the ledger was not read, which is before a study is approved.
    """

    site: SiteFacts | None
    spent: Spent | None
    body: Annotated[Reply, Field(discriminator="stage")]


M = TypeVar("M", bound=BaseModel)
_REQUEST: TypeAdapter[Any] = TypeAdapter(Annotated[Request, Field(discriminator="stage")])
_ANSWER: TypeAdapter[Any] = TypeAdapter(Answer)


def encode(message: Request | Answer, arrays: Mapping[str, NDArray[Any]] | None = None) -> bytes:
    """A message as bytes; equal messages give equal bytes."""
    text = canonical_json(message.model_dump(mode="json")).encode()
    if len(text) > MAX_HEAD_BYTES:
        raise ReplyError(f"a head of {len(text)} bytes", where="message")
    return _MAGIC + len(text).to_bytes(8, "big") + text + pack_arrays(arrays or {})


def decode_request(data: bytes) -> tuple[Request, bytes]:
    """Read a request's head; the arrays come behind it, unread (`decode_arrays`), since they may be anything.

    Raises:
        ReplyError: malformed bytes, unknown stage, wrong fields or types.
    """
    return _decode(data, _REQUEST, "request")


def decode_answer(data: bytes) -> tuple[Answer, bytes]:
    """Read an answer's head; the arrays as for `decode_request`.

    Raises:
        ReplyError: malformed bytes, unknown stage, wrong fields or types.
    """
    return _decode(data, _ANSWER, "reply")


def decode_arrays(data: bytes, where: str) -> Arrays:
    """Read the arrays behind a head.

    Raises:
        ReplyError: not safetensors, or cut short.
    """
    try:
        return unpack_arrays(data, where=where)
    except CheckpointError as error:
        raise ReplyError(f"malformed {where} (arrays)", where=where, remedy="Update both sides.") from error


def identity(data: bytes) -> str:
    """A request's identity: SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()


def _decode(data: bytes, kind: TypeAdapter[Any], name: str) -> tuple[Any, bytes]:
    try:
        if len(data) > MAX_MESSAGE_BYTES or not data.startswith(_MAGIC):
            raise ValueError("not a synthward message")
        length = int.from_bytes(data[len(_MAGIC) : _START], "big")
        if length > min(MAX_HEAD_BYTES, len(data) - _START):
            raise ValueError("a head longer than it may be")
        head = data[_START : _START + length]
        return kind.validate_python(json.loads(head)), data[_START + length :]
    except (ValidationError, ValueError, RecursionError) as error:
        raise ReplyError(
            f"malformed {name} ({type(error).__name__})", where=name, remedy="Update both sides."
        ) from error


def bounded_arrays(arrays: Arrays, largest: float) -> bool:
    """Whether every value of every array is a number of at most `largest`, in absolute value."""

    def fits(array: NDArray[Any]) -> bool:  # NaN compares as False
        return array.size == 0 or float(np.abs(array, dtype=np.float64).max()) <= largest < math.inf

    return all(array.dtype.kind == "f" and fits(array) for array in arrays.values())
