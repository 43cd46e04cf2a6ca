"""How both commands end: an error is one line on standard error and its exit code, never a trace.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import sys

import typer

from common.errors import SynthwardError


def run(app: typer.Typer, *, interrupted: str) -> None:
    """Run a command line.

    Args:
        interrupted: what to say after Ctrl-C (exit code 130).

    Raises:
        SystemExit: with the error's exit code; 2 for a command line that cannot be read.
    """
    try:
        app(standalone_mode=False)
    except SynthwardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
    except (
        Exception
    ) as error:  # typer's own complaint about the command line; anything else is a defect: keep its trace
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        print(f"error: {show()}", file=sys.stderr)
        raise SystemExit(2) from None
