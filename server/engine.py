"""The process that Flower's engine runs in: one run folder, from its newest checkpoint to the release.

SPDX-License-Identifier: Apache-2.0

The engine and its workers can die, hang, or write pages to the terminal. Here they may: `server/simulation.py` watches
this process from outside, and ends it with all that it started. What a user is to see goes to standard output; all else
that anybody here writes is the run's `engine.log`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import psutil

from common.errors import SynthwardError
from common.files import write_json
from server.checkpoints import RunFolder

SERVER_APP, CLIENT_APP = "server.app:app", "client.app:app"  # as in pyproject.toml; a test holds them together
OUTCOME = "outcome.json"
FAILED = 70  # exit code where the engine itself failed


def main(run: str, sites: str, at_once: str, scratch: str) -> None:
    """Run the study of a run folder, and end this process.

    How it ended is written to `scratch`/outcome.json: the fields of the error, none for success. Where that file is
    not there, the engine never came to its end.

    Args:
        run: the run folder.
        sites: how many simulated sites there are.
        at_once: how many of them work at the same time.
        scratch: folder for what the engine keeps while it runs; its path is short and has no blanks.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from flwr.simulation import run_simulation

    logging.basicConfig(stream=sys.__stderr__, force=True)  # else a library would write where progress is shown
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.ERROR)
    for handler in flower.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.__stderr__)
    threading.excepthook = lambda args: traceback.print_exception(args.exc_value, file=sys.__stderr__)
    cores = os.cpu_count() or 1
    told: dict[str, str] = {}
    try:
        with contextlib.redirect_stderr(sys.stdout):
            run_simulation(
                server_app=_load(SERVER_APP), client_app=_load(CLIENT_APP), num_supernodes=int(sites),
                # A worker for each process of sites: it only carries bytes, since the work is done there.
                backend_config={
                    "client_resources": {"num_cpus": cores // int(at_once), "num_gpus": 0.0},
                    "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False,
                                  "logging_level": "ERROR", "_temp_dir": f"{scratch}/ray"},
                },
            )  # fmt: skip
        if not RunFolder(Path(run)).finished:  # it may end without a word when its workers are gone
            _exit(FAILED)
    except SynthwardError as error:
        told = {"kind": type(error).__name__, "what": error.what, "where": error.where, "remedy": error.remedy}
    except BaseException:
        traceback.print_exc()
        _exit(FAILED)
    try:
        write_json(Path(scratch) / OUTCOME, told)
    except BaseException:
        traceback.print_exc()
        _exit(FAILED)
    _exit(0)


def _exit(code: int) -> None:
    """End now: the engine's threads may wait for answers that never come."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    _end_children()
    os._exit(code)


def _end_with_parent() -> None:
    """Wait until whoever started us is gone, then end with all that was started here."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    _end_children()
    os._exit(FAILED)


def _end_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    main(*sys.argv[1:])
