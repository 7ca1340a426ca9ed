"""Least times that overload leaves possible, in whatever order the work is done.

R workers at their best rate are no faster than one machine R times as fast. On it:

* Mean. Of all orders, the shortest remaining work first has the least sum of completion times (Schrage, "A
  proof of the optimality of the shortest remaining processing time discipline", 1968).
* Percentiles. Where a percentile of all N requests is at most P, all but L of them are done by P after they
  arrive. So of the n requests that arrive within a window all but L have their work done between its start
  and P after its end: P is at least the n - L smallest works of the window on that machine, less the window.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

FloatArray = npt.NDArray[np.float64]

#: Windows: all arrivals, and each of so many equal parts of them.
_PARTS = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class Queue:
    """Requests [N] in order of arrival: when they arrive, when their work may begin (ascending, no earlier),
    and how long one worker takes for it at its best rate, all in s."""

    arrival_s: FloatArray
    release_s: FloatArray
    work_s: FloatArray

    def mean_s(self, workers: int) -> float:
        """Least mean time from arrival to the end of the work."""
        ends = _shortest_first(self.release_s, self.work_s / workers)
        return float(ends - self.arrival_s.sum()) / len(self.work_s)

    def percentile_s(self, percent: float, workers: int) -> float:
        """Least such percentile of these times (linear between ranks, as `numpy.percentile`)."""
        count = len(self.work_s)
        late = count - 1 - int((count - 1) * percent / 100.0)
        least = 0.0
        for span_s, done_s in self._windows:
            if len(done_s) > late:
                least = max(least, float(done_s[len(done_s) - 1 - late]) / workers - span_s)
        return least

    @cached_property
    def _windows(self) -> list[tuple[float, FloatArray]]:
        """Of each window its length and the sums of its smallest works: one, two, ... of them."""
        count, found = len(self.work_s), []
        for parts in _PARTS:
            edges = np.linspace(0, count, parts + 1).astype(np.int64)
            for first, end in itertools.pairwise(edges):
                if end > first:
                    span_s = float(self.arrival_s[end - 1] - self.release_s[first])
                    found.append((span_s, np.cumsum(np.sort(self.work_s[first:end]))))
        return found


@njit(cache=True, nogil=True)
def _shortest_first(release_s: Any, work_s: Any) -> Any:
    """Sum of completion times, the shortest remaining work first; releases ascend."""
    count = len(release_s)
    heap = np.empty(count)
    size, now, total = 0, 0.0, 0.0
    for index in range(count):
        if size == 0:
            now = max(now, release_s[index])
        at = size  # push
        size += 1
        while at > 0 and heap[(at - 1) >> 1] > work_s[index]:
            heap[at] = heap[(at - 1) >> 1]
            at = (at - 1) >> 1
        heap[at] = work_s[index]
        until = release_s[index + 1] if index + 1 < count else np.inf
        while size > 0 and now < until:
            if now + heap[0] > until:
                heap[0] -= until - now  # still the least, so the heap stays one
                now = until
                break
            now += heap[0]
            total += now
            size -= 1
            item, at = heap[size], 0
            while 2 * at + 1 < size:
                low = 2 * at + 1
                if low + 1 < size and heap[low + 1] < heap[low]:
                    low += 1
                if item <= heap[low]:
                    break
                heap[at] = heap[low]
                at = low
            heap[at] = item
    return total
