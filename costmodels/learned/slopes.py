"""Leaves that slope: the arithmetic of trees whose leaves are planes, not numbers.

A leaf's plane leans on the features that its path asked about, each once, in ascending order, and its box is
what the path left of each of them, between the least and the most that was measured: trees say both, so
files need not. A plane is its level at the middle of the box and, for each feature, how far it rises from
there to the edge. Those are log units, as the answer is, so one step serves all of them: what rounding moves
is then the same for a gentle slope over a wide box as for a steep one over a narrow box.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from costmodels.ops import FloatArray

#: The feature of a leaf.
LEAF = 255
#: Log units between two levels, or two rises, of a file: half of it costs a sixth more bytes, errs no less.
STEP = 0.002


class Boxes(NamedTuple):
    """Of leaves: start [N + 1] of each node's own (inner nodes have none), and the features that its path
    asked about, the middles and half widths of what the path left of them [S]."""

    start: npt.NDArray[np.int64]
    leans: npt.NDArray[np.uint8]
    middle: FloatArray
    half: FloatArray

    def slopes(self, rise: FloatArray) -> FloatArray:
        """[S] of rises from the middle to the edge. A feature with one value in a box tells no rows apart."""
        return np.divide(rise, self.half, out=np.zeros(len(self.half)), where=self.half > 0.0)


def boxes(
    feature: npt.NDArray[np.uint8],
    threshold: npt.NDArray[Any],
    right: npt.NDArray[np.int32],
    roots: npt.NDArray[np.int32],
    low: npt.NDArray[Any],
    high: npt.NDArray[Any],
) -> Boxes:
    """The boxes of nodes [N] in preorder, tree after tree, of features between `low` and `high` [f]."""
    # From the roots down, all nodes of a depth at once: another compiled loop would cost a first run seconds.
    least, most = (np.repeat(ends[None], len(feature), axis=0) for ends in (low, high))
    asked = np.zeros(least.shape, bool)
    nodes = np.asarray(roots, np.int64)
    while len(nodes):
        nodes = nodes[feature[nodes] != LEAF]
        name, cut = feature[nodes], threshold[nodes]
        for child in (nodes + 1, right[nodes]):
            least[child], most[child], asked[child] = least[nodes], most[nodes], asked[nodes]
            asked[child, name] = True
        most[nodes + 1, name] = np.minimum(most[nodes, name], cut)
        least[right[nodes], name] = np.maximum(least[nodes, name], cut)
        nodes = np.concatenate([nodes + 1, right[nodes]])
    asked[feature != LEAF] = False
    start = np.concatenate([[0], np.cumsum(asked.sum(axis=1))])
    least, most = least[asked], most[asked]
    middle, half = (ends.astype(np.float64) / 2.0 for ends in (least + most, np.maximum(most - least, 0.0)))
    return Boxes(start, np.nonzero(asked)[1].astype(np.uint8), middle, half)


@njit(cache=True, nogil=True)
def leaf_under(feature, threshold, right, at, rows, row):  # type: ignore[no-untyped-def]
    """The leaf below node `at` that a row falls on: left, which comes next, up to the threshold."""
    while feature[at] != LEAF:
        if rows[row, feature[at]] <= threshold[at]:
            at += 1
        else:
            at = right[at]
    return at


@njit(cache=True, nogil=True)
def means(feature, threshold, right, roots, start, leans, middle, rows):  # type: ignore[no-untyped-def]
    """[S] of each leaf's rows: the mean of the features that it leans on; the middle where it has no rows."""
    total, count = np.zeros(leans.shape[0]), np.zeros(feature.shape[0])
    for tree in range(roots.shape[0]):
        root = roots[tree]
        for row in range(rows.shape[0]):
            at = leaf_under(feature, threshold, right, root, rows, row)
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
