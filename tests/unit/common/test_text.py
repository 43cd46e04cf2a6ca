"""Whatever somebody else wrote, a terminal shows it and does nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.text import printable


@given(st.text(st.characters()))
def test_no_letter_is_lost_and_none_is_a_command(text):
    shown = printable(text)
    assert shown.isprintable() and len(shown) == len(text)
    assert all(a == b or (b == " " and not a.isprintable()) for a, b in zip(text, shown, strict=True))
