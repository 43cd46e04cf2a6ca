"""Peak memory of a run: this process and every process under it, sampled while it goes on.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Samples the summed resident size every two seconds; on systems without /proc, this process alone."""

    def __init__(self, *, seconds: float = 2.0) -> None:
        self._seconds = seconds
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory-watch")

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak_mb(self) -> float:
        """Largest sum seen so far, MB (shared pages count in each process)."""
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(self._peak, own) / 1e6

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, resident_bytes(os.getpid()))
            self._stop.wait(self._seconds)


def resident_bytes(root: int) -> int:
    """Resident bytes of a process and its descendants; 0 where /proc is missing."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            sizes[int(entry.name)] = int((entry / "statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):  # it has ended meanwhile
            continue
        parents[int(entry.name)] = int(after_name[1])
    total = 0
    for process, size in sizes.items():
        ancestor: int | None = process
        while ancestor is not None and ancestor != root:
            ancestor = parents.get(ancestor)
        total += size if ancestor == root else 0
    return total
