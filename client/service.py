"""The site's own process: owns images, policy, ledger and noise, and answers requests over a local socket.

SPDX-License-Identifier: Apache-2.0

It runs what the hospital installed. The code that a coordinator ships (`client/app.py`, in Flower's bundle) only
carries bytes to this socket and back, so that it may be anything at all and still gets nothing but what the gate
releases (docs/adr/0009). Transport: gRPC over a Unix socket, one method, bytes in and bytes out.
"""

from __future__ import annotations

import fcntl
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from client.privacy.gate import Gate, Released
from client.site import Site, SiteConfig, load_site_config
from client.stages.enrol import enrol
from client.stages.moments import moments
from client.stages.train import train
from client.stages.validate import validate
from common.errors import DataError, Refused, ReplyError, StorageError
from common.files import append_line
from common.messages import (
    MAX_MESSAGE_BYTES,
    EnrolReply,
    EnrolRequest,
    MomentsReply,
    MomentsRequest,
    Refusal,
    Request,
    Spent,
    TrainReply,
    TrainRequest,
    ValidateReply,
    ValidateRequest,
    decode_request,
    encode,
    identity,
)

SERVICE, METHOD = "synthward.Site", "Answer"  # as in client/app.py; a test holds them together


class SiteService:
    """Answers the requests of one site file, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def answer(self, data: bytes) -> bytes:
        """The bytes of a released reply, or of a readable refusal; never raises for what a request contains."""
        request: Request | None = None
        try:
            load_site_config(self.path)
            request = decode_request(data)
            return encode(self._released(request, identity(data)).reply)
        except Exception as error:  # the text of an exception may speak of records: only known, clean texts go out
            _log(self.path, error)
            return encode(_refusal(self.path, request, error))

    def _released(self, request: Request, number: str) -> Released[Any]:
        reply_type, stage = _stage(request)
        site = Site.open(self.path, request.agreement.study)
        gate = site.gate(request.agreement, number)
        try:
            return gate.stored(reply_type) or stage(site, gate, request)
        except Refused as error:
            gate.ledger.note(
                "refused", request.agreement.study.sha256, name=request.agreement.study.study.name, stage=request.stage,
                rule=error.where, asked=error.asked, allowed=error.allowed, what=error.what,
            )  # fmt: skip
            raise
        finally:
            gate.ledger.close()


def _stage(request: Request) -> tuple[type[Any], Callable[[Site, Gate, Any], Released[Any]]]:
    if isinstance(request, EnrolRequest):
        return EnrolReply, enrol
    if isinstance(request, MomentsRequest):
        return MomentsReply, moments
    if isinstance(request, TrainRequest):
        return TrainReply, train
    assert isinstance(request, ValidateRequest)
    return ValidateReply, validate


def _refusal(path: Path, request: Request | None, error: Exception) -> Refusal:
    kind, what, remedy = "Error", "the site failed", "The site's own log says why."
    rule = asked = allowed = ""
    if isinstance(error, Refused | ReplyError):
        kind, remedy = type(error).__name__, error.remedy
        what = f"{error.where}: {error.what}" if error.where else error.what
    elif isinstance(error, DataError | StorageError):
        kind, what = type(error).__name__, "the site's data or disk cannot be used"
    if isinstance(error, Refused):
        rule, asked, allowed = error.where, error.asked, error.allowed
    name, spent = path.stem, None
    try:
        config = load_site_config(path)
        name = config.name
        spent = None if request is None else _spent(config, request)
    except Exception as second:  # the first error is the one to tell
        _log(path, second)
    return Refusal(site=name, kind=kind, what=what, remedy=remedy, rule=rule, asked=asked, allowed=allowed, spent=spent)


def _spent(config: SiteConfig, request: Request) -> Spent:
    study = request.agreement.study
    ledger = config.ledger()
    try:
        privacy = study.privacy
        cost = ledger.spent(delta=privacy.delta, accountant=privacy.accountant, study=study.sha256)
        return Spent(cost["train"], cost["holdout"], *ledger.counts(study.sha256))
    finally:
        ledger.close()


def _log(path: Path, error: Exception) -> None:
    """Keep the whole story at the site."""
    try:
        folder = load_site_config(path).state
        folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        text = str(error) if isinstance(error, Refused) else "".join(traceback.format_exception(error))
        append_line(folder / "site.log", f"{stamp} {type(error).__name__}: {text}")
    except Exception:
        return


@contextmanager
def serving(sites: Sequence[Path], sockets: Path) -> Iterator[list[Path]]:
    """Serve every site file on `sockets`/<its stem>.sock until the block ends; the sites take turns.

    Raises:
        DataError: a site file cannot be used, or another process serves it already.
        StorageError: a socket cannot be made.
    """
    with ExitStack() as stack:
        turns = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="site"))
        made = []
        for path in sites:
            stack.enter_context(_only_one(load_site_config(path)))
            made.append(sockets / f"{path.stem}.sock")
            stack.callback(_listen(SiteService(path), made[-1], turns).stop, None)
        yield made


def _listen(service: SiteService, socket: Path, turns: ThreadPoolExecutor) -> grpc.Server:
    limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", -1)]
    server = grpc.server(turns, options=limits)
    handler = grpc.unary_unary_rpc_method_handler(lambda data, _: service.answer(data))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    before = os.umask(0o117)  # owner and group of the socket may connect, nobody else
    try:
        socket.parent.mkdir(parents=True, exist_ok=True)
        server.add_insecure_port(f"unix:{socket.resolve()}")
        server.start()
    except (RuntimeError, OSError) as error:
        raise StorageError(
            f"cannot listen there ({error})", where=str(socket),
            remedy="Give another --sockets folder, with a path shorter than 90 characters.",
        ) from error  # fmt: skip
    finally:
        os.umask(before)
    return server


def exposed(config: SiteConfig) -> list[Path]:
    """Files of the site that every user of the machine may read, the coordinator's code included."""
    paths = [path for path in (getattr(config.data, "path", None),) if isinstance(path, Path) and path.exists()]
    return [path for path in paths if path.stat().st_mode & 0o007 and path.parent.stat().st_mode & 0o007]


@contextmanager
def _only_one(config: SiteConfig) -> Iterator[None]:
    """Hold the site's lock: two processes would answer the same request twice."""
    config.state.mkdir(parents=True, exist_ok=True)
    config.state.chmod(0o700)
    with (config.state / "service.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                "another process serves this site", where=str(config.state), remedy="End it first, or use that one."
            ) from error
        yield
