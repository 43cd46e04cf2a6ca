"""Which record is computed at which place of a physical batch: a matter of the record's own chance, not of the others.

SPDX-License-Identifier: Apache-2.0

A processor adds up, and even takes an exponential, a little differently at different places of a tensor: the last few
numbers do not go through the vector unit. Weights that an enemy chose can blow that bit up to a whole gradient. So it
must not depend on one record where another one is computed. Batches have one fixed size; every record draws its place
in a batch by itself, and waits for the first batch in which that place is free. With the same draws, a record more or
less changes nobody's place, and so no other record's numbers; and a mechanism that is private for every draw of places
is private (the draws are independent of the records).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def own_places(records: int, size: int, choice: np.random.Generator) -> NDArray[np.int64]:
    """Batches of `size` places, (batches, size): the number of the record at each, or -1 for nobody.

    Args:
        records: how many; 0 gives no batch.
        size: at least 1. The fewer places, the fewer of them stay empty.
    """
    place = choice.integers(0, size, records)
    order = np.argsort(place, kind="stable")
    first = np.searchsorted(place[order], np.arange(size))
    turn = np.arange(records) - first[place[order]]  # how many with the same place come before
    batches = np.full((int(turn.max()) + 1 if records else 0, size), -1, dtype=np.int64)
    batches[turn, place[order]] = order
    return batches


def at_places(rows: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
    """One batch: each record's row at its place, and zeros where nobody is."""
    batch, taken = np.zeros((len(places), *rows.shape[1:]), dtype=rows.dtype), places >= 0
    batch[taken] = rows[places[taken]]
    return batch
