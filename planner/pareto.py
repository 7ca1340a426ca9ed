"""Dominance, front, hypervolume. Everything here minimises; callers negate what they maximise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def dominates(a: Sequence[float] | FloatArray, b: Sequence[float] | FloatArray) -> bool:
    """True when `a` is nowhere worse than `b` and somewhere better."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return bool(np.all(first <= second) and np.any(first < second))


def non_dominated(points: FloatArray) -> npt.NDArray[np.intp]:
    """Indices of the Pareto front of `points` [n, m], ascending.

    Of several equal points the first is kept, so that a front never lists one trade-off twice.
    """
    count = len(points)
    if count == 0:
        return np.empty(0, dtype=np.intp)
    # Lexicographic order: a point can only be dominated by one that comes before it.
    order = np.lexsort(tuple(points[:, column] for column in range(points.shape[1] - 1, -1, -1)))
    kept: list[int] = []
    front = np.empty((0, points.shape[1]))
    for index in order:
        point = points[index]
        if len(front) and bool(np.any(np.all(front <= point, axis=1))):
            continue
        kept.append(int(index))
        front = points[kept]
    return np.sort(np.asarray(kept, dtype=np.intp))


def hypervolume(points: FloatArray, reference: FloatArray) -> float:
    """Volume dominated by `points` [n, m] up to `reference` [m].

    Exclusive volumes are summed, each by limiting the rest to the point's own box, as in
    While, Bradstreet and Barone, "A fast way of calculating exact hypervolumes" (WFG, IEEE
    TEVC 2012). Points that are not better than the reference everywhere add nothing. The exact
    sum grows steeply with objectives and points, so that a large front of many objectives is
    estimated from 32,768 fixed random points of its box instead (standard error below 0.3 % of it).
    """
    inside = points[np.all(points < reference, axis=1)]
    if not len(inside):
        return 0.0
    front = inside[non_dominated(inside)]
    if len(front) > _EXACT_POINTS.get(front.shape[1], 40):
        return _estimate(front, reference)
    return _wfg(front[np.argsort(-front[:, 0])], reference)


#: Points up to which each number of objectives is summed exactly: a few tenths of a second.
_EXACT_POINTS = {1: 10**9, 2: 10**9, 3: 500, 4: 250, 5: 100, 6: 40, 7: 20}


def _estimate(front: FloatArray, reference: FloatArray) -> float:
    low = front.min(axis=0)
    samples = low + np.random.default_rng(0).random((1 << 15, front.shape[1])) * (reference - low)
    hit = np.zeros(len(samples), dtype=np.bool_)
    for point in front:
        hit |= np.all(point <= samples, axis=1)
    return float(np.prod(reference - low) * hit.mean())


def _wfg(front: FloatArray, reference: FloatArray) -> float:
    if front.shape[1] == 1:
        return float(reference[0] - front[:, 0].min())
    if front.shape[1] == 2:
        order = np.argsort(front[:, 0])
        total, height = 0.0, float(reference[1])
        for x, y in front[order]:
            if y < height:
                total += (float(reference[0]) - float(x)) * (height - float(y))
                height = float(y)
        return total
    total = 0.0
    for index, point in enumerate(front):
        box = float(np.prod(reference - point))
        rest = front[index + 1 :]
        if len(rest):
            limited = np.maximum(rest, point)
            limited = limited[non_dominated(limited)]
            box -= _wfg(limited[np.argsort(-limited[:, 0])], reference)
        total += box
    return total


def normalise(points: FloatArray) -> FloatArray:
    """Each column scaled to [0, 1] between the best and the worst of `points`."""
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.where(high > low, high - low, 1.0)
    return np.asarray((points - low) / span, dtype=np.float64)


def knee(points: FloatArray) -> int:
    """Index of the point nearest to the ideal one, every objective counted alike.

    Distances are Euclidean between normalised values; ties go to the first.
    """
    distance = np.sqrt((normalise(points) ** 2).sum(axis=1))
    return int(np.argmin(distance))
