"""How both commands end: an error or a signal is one line on standard error and its exit code, never a trace.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from common.errors import SynthwardError
from common.text import printable

EXTRAS = {"synthward": "coordinator", "synthward-site": "site"}  # of pyproject.toml: what a program's commands need
OF_ONE_OPTION = {"pydicom": "dicom"}  # what one option alone needs has an extra of its own
# What only the extras bring, under the names by which we import it; a test holds this to pyproject.toml.
OF_EXTRAS = {
    "jinja2", "matplotlib", "opacus", "PIL", "prometheus_client", "pydicom", "ray", "scipy", "timm", "torch",
    "torchvision",
}  # fmt: skip
_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO}  # of a pipe without a reader, and of a terminal that was closed


class Stopped(BaseException):
    """The command was told to stop: Ctrl-C, SIGTERM, or the terminal was closed.

    No KeyboardInterrupt, which typer would take for its own, and end with exit code 0.

    Args:
        number: of the signal; the exit code is 128 more.
        advice: what to say in place of the command's usual line; empty for that.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(number, advice)
        self.number, self.advice = number, advice


def run(app: typer.Typer, *, program: str, interrupted: str) -> None:
    """Run a command line.

    Args:
        program: what it is called in messages.
        interrupted: what to say after Ctrl-C (exit code 130), SIGTERM (143) or SIGHUP (129).

    Raises:
        SystemExit: with the error's exit code; 2 for a command line that cannot be read.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no such letter gets its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if (
        isinstance(app, typer.Typer) and len(app.registered_commands) + len(app.registered_groups) > 1
    ):  # else the one command would get a name
        app.callback()(_with_version)
    try:
        app(prog_name=program, standalone_mode=False)
        _written_out()
    except SynthwardError as error:
        _end(f"error: {error}", error.exit_code)
    except MemoryError:
        _end("error: not enough memory. Give this command more, or fewer or smaller images.", 2)
    except OSError as error:
        from common.files import storage_error  # with numpy: --help is quick

        where = Path(str(error.filename or "a file"))
        _end(f"error: {storage_error(error, where)}", 2)
    except Stopped as stop:
        _end(stop.advice or interrupted, 128 + stop.number)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in OF_EXTRAS:
            raise
        _end(f"error: {_missing(missing, program)}", 2)
    except (
        Exception
    ) as error:  # typer's own complaint about the command line; anything else is a defect: keep its trace
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        context = getattr(error, "ctx", None)
        help_line = f" See `{context.command_path} --help`." if context is not None else ""
        _end(f"error: {show().rstrip('.')}.{help_line}", 2)


def _version(asked: bool) -> None:
    if asked:
        print(f"synthward {version('synthward')}")
        raise typer.Exit


def _with_version(
    _asked: Annotated[
        bool, typer.Option("--version", help="print the version and end", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def told_to_stop() -> threading.Event:
    """Set by the signals that end a command which runs until it is told to; for those that end what they began."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: stop.set())
    return stop


def need(*modules: str) -> None:
    """See that what a long command needs at its end is there before it begins.

    Raises:
        ModuleNotFoundError: the first that is not.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def _missing(module: str, program: str) -> str:
    extra = OF_ONE_OPTION.get(module, EXTRAS[program])
    return (
        f"this command needs {module}, which is not installed here: it comes with the extra '{extra}'."
        f" Install it: pip install 'synthward[{extra}]'"
    )


def _stop(number: int, _frame: FrameType | None) -> None:
    """Raise `Stopped`, once: what has to be ended then is not cut off by a second signal."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


def _end(line: str, code: int) -> None:
    with suppress(OSError):  # the terminal is gone
        print(printable(line), file=sys.stderr, flush=True)
    with suppress(OSError):
        _written_out()
    raise SystemExit(code) from None


def _written_out() -> None:
    """Write out what is left; where nobody reads it any more, let it go, or Python would end with exit code 120.

    Raises:
        OSError: somebody reads it, and it cannot be written: a full disk.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed before we began
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            if isinstance(error, OSError) and error.errno not in _GONE:
                raise
