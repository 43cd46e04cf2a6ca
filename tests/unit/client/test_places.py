"""Places: every record is computed once, and where is no matter of the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from client.privacy.places import own_places


class Drawn(np.random.Generator):
    """A generator whose draws are given: record i draws place `drawn[i]`."""

    def __init__(self, drawn) -> None:
        super().__init__(np.random.PCG64(0))
        self._drawn = np.asarray(drawn, dtype=np.int64)

    def integers(self, low, high=None, size=None, **_):  # pyright: ignore
        assert size == len(self._drawn)
        return self._drawn


def _place_of(batches) -> dict[int, int]:
    return {int(record): place for batch in batches for place, record in enumerate(batch) if record >= 0}


@given(st.integers(0, 200), st.integers(1, 33), st.integers(0, 5))
def test_every_record_is_computed_exactly_once(records, size, seed):
    batches = own_places(records, size, np.random.default_rng(seed))
    assert batches.shape[1] == size
    assert sorted(batches[batches >= 0].tolist()) == list(range(records))
    assert not (batches < 0).all(axis=1).any()  # and no batch is empty


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.data())
def test_a_record_more_or_less_moves_no_other_one(drawn, data):
    """With the same draws the others keep their places, whoever goes; their batch does not matter."""
    gone = data.draw(st.integers(0, len(drawn) - 1))
    with_it = _place_of(own_places(len(drawn), 7, Drawn(drawn)))
    without = _place_of(own_places(len(drawn) - 1, 7, Drawn(drawn[:gone] + drawn[gone + 1 :])))
    others = [record for record in range(len(drawn)) if record != gone]
    assert [with_it[record] for record in others] == [without[number] for number in range(len(others))]
    assert [with_it[record] for record in others] == [drawn[record] for record in others]


@pytest.mark.parametrize("which", [0, 17, 63])
def test_every_place_is_as_likely_for_every_record(which):
    """Chi-square at alpha 1e-6 over 4,000 draws; a record that always comes to one place is seen for certain."""
    choice = np.random.default_rng(0)
    seen = np.zeros(8)
    for _ in range(4000):
        seen[_place_of(own_places(64, 8, choice))[which]] += 1
    assert stats.chisquare(seen).pvalue > 1e-6
