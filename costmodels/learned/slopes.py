"""Leaves that slope: the arithmetic of trees whose leaves are planes, not numbers.

A leaf's plane leans on the features that its path asked about, each once, in ascending order, and its box is
what the path left of each of them, between the least and the most that was measured: trees say both, so
files need not. A plane is its level at the middle of the box and, for each feature, how far it rises from
there to the edge. Those are log units, as the answer is, so one step serves all of them: what rounding moves
is then the same for a gentle slope over a wide box as for a steep one over a narrow box.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from costmodels.ops import FloatArray

#: The feature of a leaf.
LEAF = 255
#: Log units between two levels, or two rises, of a file: half of it costs a sixth more bytes, errs no less.
STEP = 0.002
#: No path is longer.
_DEEP = 256


@njit(cache=True)
def boxes(feature, threshold, low, high):  # type: ignore[no-untyped-def]
    """(start [N + 1], features, middles and half widths [S]) of the boxes of nodes [N] in preorder, tree
    after tree, in features between `low` and `high` [f]; inner nodes have none."""
    count = feature.shape[0]
    start = np.zeros(count + 1, np.int64)
    path = np.zeros(_DEEP, np.int64)
    # Whether the right branch of each node on the path is being walked.
    right = np.zeros(_DEEP, np.bool_)
    least, most = low.copy(), high.copy()
    asked = np.zeros(low.shape[0], np.bool_)
    size = count * 8 + 64
    leans, middle, half = np.zeros(size, np.uint8), np.zeros(size), np.zeros(size)
    depth = place = 0
    for at in range(count):
        start[at] = place
        if feature[at] != LEAF:
            path[depth], right[depth] = at, False
            depth += 1
            continue
        least[:], most[:], asked[:] = low, high, False
        for step in range(depth):
            node = path[step]
            name = feature[node]
            asked[name] = True
            if right[step]:
                least[name] = max(least[name], threshold[node])
            else:
                most[name] = min(most[name], threshold[node])
        for name in range(asked.shape[0]):
            if asked[name]:
                if place == leans.shape[0]:
                    leans = np.concatenate((leans, np.zeros(place, np.uint8)))
                    middle = np.concatenate((middle, np.zeros(place)))
                    half = np.concatenate((half, np.zeros(place)))
                leans[place] = name
                middle[place] = (least[name] + most[name]) / 2.0
                half[place] = max(most[name] - least[name], 0.0) / 2.0
                place += 1
        while depth > 0 and right[depth - 1]:
            depth -= 1
        if depth > 0:
            right[depth - 1] = True
    start[count] = place
    return start, leans[:place].copy(), middle[:place].copy(), half[:place].copy()


@njit(cache=True, nogil=True)
def walk(feature, threshold, right, roots, level, start, leans, slope, rows):  # type: ignore[no-untyped-def]
    """[n] sums over trees of the planes that rows [n, f] fall on: `level` [N] where all features are zero."""
    found = np.zeros(rows.shape[0])
    for tree in range(roots.shape[0]):
        root = roots[tree]
        for row in range(rows.shape[0]):
            at = root
            while feature[at] != LEAF:
                if rows[row, feature[at]] <= threshold[at]:
                    at += 1
                else:
                    at = right[at]
            total = level[at]
            for place in range(start[at], start[at + 1]):
                total += slope[place] * rows[row, leans[place]]
            found[row] += total
    return found


@njit(cache=True, nogil=True)
def means(feature, threshold, right, roots, start, leans, middle, rows):  # type: ignore[no-untyped-def]
    """[S] of each leaf's rows: the mean of the features that it leans on; the middle where it has no rows."""
    total, count = np.zeros(leans.shape[0]), np.zeros(feature.shape[0])
    for tree in range(roots.shape[0]):
        root = roots[tree]
        for row in range(rows.shape[0]):
            at = root
            while feature[at] != LEAF:
                if rows[row, feature[at]] <= threshold[at]:
                    at += 1
                else:
                    at = right[at]
            count[at] += 1.0
            for place in range(start[at], start[at + 1]):
                total[place] += rows[row, leans[place]]
    for at in range(feature.shape[0]):
        for place in range(start[at], start[at + 1]):
            total[place] = total[place] / count[at] if count[at] > 0.0 else middle[place]
    return total


def of_leaf(start: npt.NDArray[np.int64], values: FloatArray) -> FloatArray:
    """[N] sums over each node's own of `values` [S]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return np.asarray(sums[start[1:]] - sums[start[:-1]])


def coded(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Multiples of a step, those nearest to zero first: 0, -1, 1, -2, ... ValueError: beyond 16 bits."""
    steps = np.rint(values / STEP).astype(np.int64)
    found = np.where(steps < 0, -2 * steps - 1, 2 * steps)
    if len(found) and found.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"a plane of {found.max() // 2} steps is too steep to be written")
    return np.asarray(found, np.uint16)


def decoded(code: npt.NDArray[np.uint16]) -> npt.NDArray[Any]:
    """What `coded` was given, to the nearest step."""
    steps = code.astype(np.int64)
    return np.where(steps % 2 == 1, -(steps + 1) // 2, steps // 2) * STEP
