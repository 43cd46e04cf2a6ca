"""The Flower ClientApp: carries requests to the site's own process and its answers back. Touches nothing else.

SPDX-License-Identifier: Apache-2.0

This file reaches a hospital in the coordinator's bundle. It is not trusted there: what guards the records is
`client/service.py`, which the hospital installed and which speaks to this file over a local socket only.
"""

from __future__ import annotations

import os
from pathlib import Path

import grpc
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.errors import DataError
from common.protocol import Answer, Unreachable, encode
from common.sockets import address_of
from common.wire import from_record, to_record

app = ClientApp()
SOCKETS_VARIABLE = "SYNTHWARD_SOCKETS"
ANSWER = "/synthward.Site/Answer"


@app.query("canary")
def handle_canary(message: Message, context: Context) -> Message:
    return relay(message, context)


@app.query("enrol")
def handle_enrol(message: Message, context: Context) -> Message:
    return relay(message, context)


@app.query("moments")
def handle_moments(message: Message, context: Context) -> Message:
    return relay(message, context)


@app.query("features")
def handle_features(message: Message, context: Context) -> Message:
    return relay(message, context)


@app.train()
def handle_train(message: Message, context: Context) -> Message:
    return relay(message, context)


@app.evaluate()
def handle_validate(message: Message, context: Context) -> Message:
    return relay(message, context)


def relay(message: Message, context: Context) -> Message:
    """One request to the site's process and its answer; or, where that cannot be reached, that it cannot."""
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    try:
        with grpc.insecure_channel(address_of(socket_of(context)), options=limits) as channel:
            answer = channel.unary_unary(ANSWER)
            reply = answer(from_record(message.content), timeout=message.metadata.ttl)
    except Exception as error:  # else Flower would say nothing but a number
        reply = encode(Answer(site=None, spent=None, body=_unreachable(context, error)))
    return Message(content=to_record(reply), reply_to=message)


def _unreachable(context: Context, error: Exception) -> Unreachable:
    """What the coordinator reads in the place of an answer: whose carrier this is, and why it has none."""
    name = str(context.node_config.get("name") or Path(str(context.node_config.get("site", ""))).stem or "a carrier")
    code = error.code() if isinstance(error, grpc.Call) else None
    too_large = isinstance(error, grpc.Call) and "larger than max" in str(error.details())  # it may be busy, too
    if too_large:
        what = "the request is larger than the site reads (performance.max_message_mb of its site file)"
    elif isinstance(error, grpc.RpcError):
        what = f"its process does not answer ({type(error).__name__ if code is None else code.name})"
    else:  # a DataError of ours says what to set; anything else may hold a path
        what = f"its carrier failed ({error.what if isinstance(error, DataError) else type(error).__name__})"
    return Unreachable(carrier=name[:100], what=what[:400], again=not too_large)


def socket_of(context: Context) -> Path:
    """The site's socket: node config "site" in a deployment; by partition under the simulation engine."""
    given = context.node_config.get("site")
    if given:
        return Path(str(given))
    folder = os.environ.get(SOCKETS_VARIABLE)
    if not folder:
        raise DataError(
            "no site given", where="node-config: site", remedy='Start the SuperNode with site="/path/site.sock".'
        )
    return Path(folder) / f"site-{int(context.node_config.get('partition-id', 0)) + 1}.sock"
