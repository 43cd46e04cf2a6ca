"""Text of somebody else, as a terminal may show it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations


def printable(text: str) -> str:
    """The same with a blank for whatever cannot be printed (control characters, line ends, surrogates): no terminal
    takes it for a command."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
