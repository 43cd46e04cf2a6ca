"""The Flower ClientApp of a site: one handler a stage; only released answers and readable refusals go out.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.privacy.gate import Gate, Released
from client.site import Site, load_site_config
from client.stages.enrol import enrol
from client.stages.train import train
from client.stages.validate import validate
from common.errors import BudgetError, DataError, PolicyRefusal, ReplyError, StorageError
from common.files import append_line
from common.messages import (
    EnrolReply,
    EnrolRequest,
    Refusal,
    TrainReply,
    TrainRequest,
    ValidateReply,
    ValidateRequest,
    decode_request,
    encode,
    identity,
)
from common.wire import from_record, to_record

app = ClientApp()
SITES_VARIABLE = "SYNTHWARD_SITES"


@app.query("enrol")
def handle_enrol(message: Message, context: Context) -> Message:
    return _answer(message, context, EnrolRequest, EnrolReply, enrol)


@app.train()
def handle_train(message: Message, context: Context) -> Message:
    return _answer(message, context, TrainRequest, TrainReply, train)


@app.evaluate()
def handle_validate(message: Message, context: Context) -> Message:
    return _answer(message, context, ValidateRequest, ValidateReply, validate)


def _answer(
    message: Message, context: Context, asks: type[Any], answers: type[Any],
    stage: Callable[[Site, Gate, Any], Released[Any]],
) -> Message:  # fmt: skip
    path = site_file(context)
    name = path.stem
    try:
        name = load_site_config(path).name
        data = from_record(message.content)
        request = decode_request(data)
        if not isinstance(request, asks):
            raise ReplyError(f"a {request.stage} request came to the wrong handler", where="request")
        site = Site.open(path, request.agreement.study)
        gate = site.gate(request.agreement, identity(data))
        try:
            released = gate.stored(answers) or stage(site, gate, request)
        finally:
            gate.ledger.close()
        reply: Any = released.reply
    except Exception as error:  # the text of an exception may speak of records: only known, clean texts go out
        _log(path, error)
        reply = _refusal(name, error)
    return Message(content=to_record(encode(reply)), reply_to=message)


def site_file(context: Context) -> Path:
    """The site file: node config "site" in a deployment; by partition under the simulation engine."""
    given = context.node_config.get("site")
    if given:
        return Path(str(given))
    folder = os.environ.get(SITES_VARIABLE)
    if not folder:
        raise DataError(
            "no site file given", where="node-config: site", remedy='Start the SuperNode with site="/path/site.toml".'
        )
    return Path(folder) / f"site-{int(context.node_config.get('partition-id', 0)) + 1}.toml"


def _refusal(site: str, error: Exception) -> Refusal:
    if isinstance(error, PolicyRefusal | BudgetError | ReplyError):
        return Refusal(site=site, kind=type(error).__name__, what=f"{error.where}: {error.what}", remedy=error.remedy)
    if isinstance(error, DataError | StorageError):
        what = "the site's data or disk cannot be used"
        return Refusal(site=site, kind=type(error).__name__, what=what, remedy="The site's own log says why.")
    return Refusal(site=site, kind="Error", what="the site failed", remedy="The site's own log says why.")


def _log(path: Path, error: Exception) -> None:
    """Keep the whole story at the site."""
    try:
        folder = load_site_config(path).state
        folder.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        text = str(error) if isinstance(error, PolicyRefusal | BudgetError) else traceback.format_exc()
        append_line(folder / "site.log", f"{stamp} {type(error).__name__}: {text}")
    except Exception:
        return
