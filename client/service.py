"""The site's own process: owns images, policy, ledger and noise, and answers requests over a local socket.

SPDX-License-Identifier: Apache-2.0

It runs what the hospital installed. The code that a coordinator ships (`client/app.py`, in Flower's bundle) only
carries bytes to this socket and back, so that it may be anything at all and still gets nothing but what the gate
releases (docs/adr/0009). Transport: gRPC over a Unix socket, one method, bytes in and bytes out.

A request goes through in this order, and stops at the first no: its head is read; the study has to be approved here,
with that very plan (a question to ledger and policy); its arrays are read, the images opened and held against what was
approved; a stored answer is sent again, or a stage makes one. So no refusal depends on more of the records than whether
they are those that were approved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any

import grpc

from client.log import write_error
from client.privacy.gate import Gate, Released
from client.privacy.ledger import Ledger
from client.privacy.randomness import NoiseSource
from client.privacy.store import Store
from client.registry import Registry, holds
from client.site import Site, SiteConfig, load_site_config
from client.stages.canary import Blank, canary
from client.stages.enrol import enrol
from client.stages.features import features
from client.stages.moments import moments
from client.stages.train import train
from client.stages.validate import validate
from common.errors import DataError, NotApproved, Refused, ReplyError, StorageError
from common.locks import held
from common.protocol import (
    Answer,
    Arrays,
    CanaryRequest,
    Refusal,
    Request,
    Spent,
    decode_arrays,
    decode_request,
    encode,
    identity,
)
from common.sockets import address_of, taken, unusable

SERVICE, METHOD = "synthward.Site", "Answer"  # as in client/app.py; a test holds them together
STAGES: dict[str, Callable[[Site, Gate, Any, Arrays], Released]] = {
    "enrol": enrol, "moments": moments, "features": features, "train": train, "validate": validate,
}  # fmt: skip
_WORKERS = 16  # requests of one site that may be on their way at a time
_MOST_TEXT = 400  # characters of a refusal's texts
_LOOK_SECONDS = 0.5  # between two looks whether whoever waits for a turn is still there
_GRACE_SECONDS = 5.0  # for an answer that is ready to leave


class SiteService:
    """Answers the requests of one site file, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, str] | None = None  # the newest entry of the ledger after the last answer
        self._listed: tuple[int, str] | None = None  # the newest that the machine's list knows
        self._state: Path | None = None  # where the log is, also while the site file cannot be read

    def answer(self, data: bytes) -> bytes:
        """The bytes of a released reply, or of a readable refusal; never raises for what a request contains."""
        config, request = None, None
        try:
            Site.forget_replaced(self.path)  # also where this request opens no image
            config = load_site_config(self.path)
            self._state = config.state
            if len(data) > config.performance.max_message_mb << 20:
                raise ReplyError(f"a request of over {config.performance.max_message_mb} MiB", where="request")
            request, rest = decode_request(data)
            with closing(config.ledger()) as ledger:
                self._require_same(config, ledger)
                gate = self._gate(config, ledger, request, identity(data))
                try:
                    released = self._released(gate, request, rest, config.performance.max_message_mb << 20)
                finally:
                    self._note(config, ledger)
                with gate.still():  # last of all: beside a sealed answer a site may have worked for hours
                    return released.data
        except Exception as error:  # the text of an exception may speak of records: only known, clean texts go out
            self._log(error)
            return self._refusal(config, request, error)

    def _require_same(self, config: SiteConfig, ledger: Ledger) -> None:
        """See that nobody has put an older ledger, or another one, in the place of the one we answered from."""
        if self._seen is not None and not holds(ledger, *self._seen):
            raise StorageError(
                "the ledger lacks entries that it had a moment ago: an older one was put in its place",
                where=str(config.state), remedy="Put the newest one back; until then nobody gets an answer.",
            )  # fmt: skip

    def _note(self, config: SiteConfig, ledger: Ledger) -> None:
        """Remember the newest entry, here and in the machine's list, so that an older backup shows."""
        self._seen = ledger.head()
        if self._seen == self._listed:
            return
        try:
            registry = Registry(config.registry)
            with registry.locked(wait=False):  # it is only the second witness, and an answer waits
                registry.place(config.name, ledger)
            self._listed = self._seen
        except StorageError as error:
            self._log(error)

    def _released(self, gate: Gate, request: Request, rest: bytes, most_bytes: int) -> Released | Blank:
        study, ledger = request.agreement.study, gate.ledger
        try:
            approval = gate.admit()
            arrays = decode_arrays(rest, "request")
            site = Site.approved(self.path, study, ledger, approval)
            if isinstance(request, CanaryRequest):
                return canary(gate, request, most_bytes=most_bytes)
            return gate.stored() or STAGES[request.stage](site, gate, request, arrays)
        except NotApproved:  # nobody's study: no entry, or thirty studies would make thirty
            raise
        except Refused as error:
            ledger.refused(
                study, stage=request.stage, rule=error.where, asked=error.asked, allowed=error.allowed, what=error.what
            )
            raise

    def _gate(self, config: SiteConfig, ledger: Ledger, request: Request, number: str) -> Gate:
        study = request.agreement.study
        return Gate(
            facts=config.facts(), agreement=request.agreement, request=number, policy=config.policy, ledger=ledger,
            source=NoiseSource(config.test_noise_seed), store=Store(config.state),
            images=lambda approval: Site.approved(self.path, study, ledger, approval),
        )  # fmt: skip

    def _refusal(self, config: SiteConfig | None, request: Request | None, error: Exception) -> bytes:
        """A no that says nothing of records: refusals and bad requests are told, all else is one text."""
        kind, what, remedy = "Unavailable", "the site cannot answer now", "The site's own log says why."
        rule = asked = allowed = ""
        if isinstance(error, Refused | ReplyError):
            kind, remedy = type(error).__name__, error.remedy
            what = f"{error.where}: {error.what}" if error.where else error.what
        if isinstance(error, Refused):
            rule, asked, allowed = error.where, error.asked, error.allowed
        kind, what, remedy, rule, asked, allowed = (t[:_MOST_TEXT] for t in (kind, what, remedy, rule, asked, allowed))
        body = Refusal(kind=kind, what=what, remedy=remedy, rule=rule, asked=asked, allowed=allowed)
        facts = spent = None
        try:
            facts = None if config is None else config.facts()
            spent = None if config is None or request is None else self._spent(config, request)
        except Exception as second:  # the first error is the one to tell
            self._log(second)
        return encode(Answer(site=facts, spent=spent, body=body))

    def _log(self, error: Exception) -> None:
        if self._state is not None:
            write_error(self._state, error)

    def _spent(self, config: SiteConfig, request: Request) -> Spent | None:
        """What the ledger holds of an approved study; None for any other."""
        with closing(config.ledger()) as ledger:
            if ledger.approval(request.agreement.study.sha256) is None:
                return None
            return self._gate(config, ledger, request, "").spent()


@contextmanager
def serving(sites: Sequence[Path], sockets: Path) -> Iterator[list[Path]]:
    """Serve every site file on `sockets`/<its stem>.sock until the block ends; the sites take turns.

    Raises:
        DataError: a site file cannot be used, or another process serves it already.
        StorageError: a socket cannot be made.
    """
    with ExitStack() as stack:
        turns, made, listening = _Turns(), list[Path](), list[grpc.Server]()
        try:
            for path in sites:
                if sockets / f"{path.stem}.sock" in made:
                    raise DataError(
                        f"two site files are called {path.stem}, and so would their sockets be", where=str(path),
                        remedy="Rename one, or serve them over two folders.",
                    )  # fmt: skip
                config = load_site_config(path)
                config.ledger().close()  # before anybody is told that the site is ready
                stack.enter_context(held(config.state / "service.lock", busy=_served(config)))
                made.append(sockets / f"{path.stem}.sock")
                stack.enter_context(taken(made[-1]))
                listening.append(_listen(SiteService(path), made[-1], turns, config.performance.max_message_mb))
            yield made
        finally:  # before the locks are let go
            _finish(listening, turns)


class _Turns:
    """One request at a time, over all sites of the process; none once it is about to end."""

    def __init__(self) -> None:
        self._lock, self._over = Lock(), Event()

    def take(self, context: grpc.ServicerContext) -> None:
        """Wait for one's turn; a call that is given up meanwhile, or comes too late, ends here."""
        while context.is_active() and not self._over.is_set():
            if self._lock.acquire(timeout=_LOOK_SECONDS):
                if context.is_active() and not self._over.is_set():
                    return
                self._lock.release()
        context.abort(grpc.StatusCode.UNAVAILABLE, "the site's process ends")

    def give(self) -> None:
        self._lock.release()

    def end(self) -> None:
        """Wait for the one who has it, and let nobody else have it."""
        self._over.set()
        self._lock.acquire()


def _finish(listening: list[grpc.Server], turns: _Turns) -> None:
    """Let the answer under way come to its end and leave; only then may another process take this one's place, or the
    same request would be computed, and paid for, in both."""
    turns.end()
    for ended in [server.stop(_GRACE_SECONDS) for server in listening]:
        ended.wait()


def _listen(service: SiteService, socket: Path, turns: _Turns, largest_mb: int) -> grpc.Server:
    """A server whose requests take turns; one that is never sent to its end holds up one worker of sixteen."""
    limits = [("grpc.max_receive_message_length", (largest_mb << 20) + 1024), ("grpc.max_send_message_length", -1)]
    workers = ThreadPoolExecutor(max_workers=_WORKERS, thread_name_prefix="site")
    server = grpc.server(workers, options=limits, maximum_concurrent_rpcs=_WORKERS)

    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        turns.take(context)
        try:
            return service.answer(data)
        finally:
            turns.give()

    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    before = os.umask(0o117)  # owner and group of the socket may connect, nobody else
    try:
        server.add_insecure_port(address_of(socket))
        server.start()
    except (RuntimeError, OSError) as error:
        raise unusable(socket, error) from error
    finally:
        os.umask(before)
    return server


def shortcomings(sites: Sequence[Path]) -> Iterator[str]:
    """What stands in the way of an answer, or of its secrecy, as far as it can be seen before anybody asks."""
    for config in map(load_site_config, sites):
        path = getattr(config.data, "path", None)
        if path is not None and not path.exists():
            yield f"{path} is not there: {config.name} answers nobody until it is"
        elif path is not None and path.stat().st_mode & 0o007 and path.parent.stat().st_mode & 0o007:
            yield f"{path}: every user of this machine may read it, the coordinator's code included; chmod o-rwx"
        with closing(config.ledger()) as ledger:
            if not ledger.approvals():
                yield f"{config.name} has approved no study, so nobody gets an answer"


def _served(config: SiteConfig) -> DataError:
    return DataError(
        "another process serves this site", where=str(config.state), remedy="End it first, or use that one."
    )  # fmt: skip
