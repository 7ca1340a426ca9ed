"""How far what a search found may be from the truth, when it could not look at everything.

A plan that was neither simulated nor left out for certain is *open*: it is nowhere better than its admissible
bound. So the best possible value of an objective is no better than the best found and the least bound of the
open plans, and the true front dominates no more than the found front and the bounds of the open plans do
together. A plan whose bounds were not worked out leaves nothing to say: then there is no limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.objectives import OBJECTIVES
from planner.pareto import hypervolume, non_dominated

FloatArray = npt.NDArray[np.float64]

#: Optimistic points are moved outwards to a grid of so many steps, so that few are left.
_GRID = 256


@dataclass(frozen=True, slots=True)
class ObjectiveGap:
    """One objective, in its own sense (throughput: more is better). `bound` None: nothing is known."""

    name: str
    best: float | None
    bound: float | None

    @property
    def relative(self) -> float | None:
        """How much better than the best found the truth may be, as a share of the best found."""
        if self.best is None or self.bound is None:
            return None
        return abs(self.bound - self.best) / max(abs(self.best), 1e-300)


@dataclass(frozen=True, slots=True)
class Gap:
    """`open` plans were neither simulated nor excluded; of `unbounded` ones among them nothing is known.

    `found` and `at_most` are hypervolumes as shares of the box between the best that is possible and one a
    tenth beyond the worst of the front: that of the true front lies between them.
    """

    objectives: tuple[ObjectiveGap, ...]
    found: float
    at_most: float
    open: int
    unbounded: int

    @property
    def closed(self) -> bool:
        """Nothing is open."""
        return self.open == 0

    @property
    def ratio(self) -> float:
        """The least share of the true hypervolume that was found: 1 when nothing is open."""
        return self.found / self.at_most if self.at_most > 0 else float(self.closed)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the result."""
        return {
            "objectives": {
                item.name: {"best": item.best, "bound": item.bound, "relative": item.relative}
                for item in self.objectives
            },
            "hypervolume": {"found": self.found, "at_most": self.at_most, "ratio": self.ratio},
            "open": self.open,
            "unbounded": self.unbounded,
        }


def gap_words(gap: Mapping[str, Any]) -> str:
    """A gap in plain values in one line: `12 plans are open, with latency at most 12 % better; ...`."""
    if not gap["open"]:
        return "nothing is left open"
    if gap["unbounded"]:
        return f"{gap['open']:,} plans are open, {gap['unbounded']:,} of them without any bound"
    parts = [
        f"{name} at most {100 * row['relative']:.0f} % better"
        for name, row in gap["objectives"].items()
        if row["relative"] is not None
    ]
    covered = 100 * gap["hypervolume"]["ratio"]
    return (
        f"{gap['open']:,} plans are open, with {', '.join(parts)}; "
        f"the front covers at least {covered:.0f} % of what is possible"
    )


def measure_gap(
    objectives: Sequence[str], front: FloatArray, optimistic: FloatArray, *, open_plans: int, unbounded: int
) -> Gap:
    """The gap of a front [n, m] with optimistic points [k, m] of `open_plans` plans (all minimised).

    `unbounded` further plans are open too. Without a front there is nothing to compare: 0 and 1.
    """
    count = open_plans + unbounded
    least = np.full(len(objectives), np.inf)
    if len(front):
        least = front.min(axis=0)
    known = np.minimum(least, optimistic.min(axis=0)) if len(optimistic) else least
    rows = []
    for column, name in enumerate(objectives):
        sign = -1.0 if OBJECTIVES[name].maximise else 1.0
        best = float(sign * least[column]) if len(front) else None
        limit = None if unbounded or not np.isfinite(known[column]) else float(sign * known[column])
        rows.append(ObjectiveGap(name, best, limit))
    if not len(front):
        return Gap(tuple(rows), 0.0, 1.0 if count else 0.0, count, unbounded)
    high = front.max(axis=0)
    span = np.where(high > known, high - known, 1.0)
    reference = np.full(len(objectives), 1.1)
    box = 1.1 ** len(objectives)
    found = hypervolume((front - known) / span, reference) / box
    if unbounded:
        return Gap(tuple(rows), found, 1.0, count, unbounded)
    if not len(optimistic):
        return Gap(tuple(rows), found, found, count, unbounded)
    scaled = np.floor((optimistic - known) / span * _GRID) / _GRID
    scaled = np.unique(np.maximum(scaled[np.all(scaled < reference, axis=1)], 0.0), axis=0)
    points = np.vstack((scaled[non_dominated(scaled)], (front - known) / span))
    return Gap(tuple(rows), found, max(found, hypervolume(points, reference) / box), count, unbounded)
