"""What bounds say of a plan, and which plans are likely to add to the front, by what simulations taught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.pairs import Point
from planner.search.base import Judged, Judging

FloatArray = npt.NDArray[np.float64]

#: How many simulations of a worker weigh as much as what is known of all; weight of the regression's prior.
_SHRINK, _RIDGE = 2.0, 1.0


@dataclass(slots=True, eq=False)
class Bound:
    """What bounds say of a plan that passed the gates.

    `vector` [m] is no worse than the plan in any objective; `distance` is the least possible SLO miss.
    """

    point: Point
    vector: FloatArray
    distance: float
    _evaluator: Judging
    _objectives: tuple[str, ...]
    _pieces: FloatArray | None = None

    @property
    def pieces(self) -> FloatArray:
        """[k, m] points that `vector` is no worse than, of which one at least is no worse than the plan.

        Worked out when first read: most plans are left out by their vector.
        """
        if self._pieces is None:
            self._pieces = self._evaluator.bound_pieces(self.point, self._objectives, self.vector)
        return self._pieces


class Ranks:
    """Which plans are likely to add to the front: bounds, corrected by how far simulations were above theirs.

    How far is learned by ridge regression of its logarithm on what a plan is made of; what is left over is
    averaged by worker, then by worker with its replicas and sequence cap, each shrunk to what is known above
    it. Each ranking leans to other objectives, so that all parts of the front are looked for.
    """

    def __init__(self, objectives: Sequence[str], seed: int = 0) -> None:
        self.objectives = tuple(objectives)
        self.at: dict[Point, int] = {}
        self.items: list[Bound] = []
        self._workers: dict[Any, int] = {}
        self._groups: dict[Any, int] = {}
        self._names: dict[Any, int] = {}
        self._levels: list[tuple[int, int]] = []
        self._rows: list[list[float]] = []
        self._shape = (0, 0)  # of a row: sizes, and names as codes
        self._arrays: tuple[FloatArray, FloatArray, npt.NDArray[np.int64]] | None = None
        self.rng = np.random.default_rng(seed)

    def extend(self, items: Sequence[Bound]) -> None:
        """Take more plans in."""
        for item in items:
            point, traits = item.point, item.point.traits()
            self._levels.append(
                (
                    self._groups.setdefault(traits.group, len(self._groups)),
                    self._workers.setdefault(traits.worker, len(self._workers)),
                )
            )
            codes = [
                float(self._names.setdefault((at, name), len(self._names)))
                for at, name in enumerate(traits.names)
            ]
            self._rows.append([*(log2(value) for value in traits.sizes), *traits.flags, *codes])
            self._shape = len(traits.sizes), len(traits.names)
            self.at[point] = len(self.items)
            self.items.append(item)
        self._arrays = None

    def _features(self) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
        """([n, d] features of unit spread, [n, m] bounds, [2, n] levels)."""
        if self._arrays is None:
            rows = np.array(self._rows)
            count, names = self._shape
            codes, plain = rows[:, -names:], rows[:, :-names]
            sizes = plain[:, :count]
            hot = [codes[:, at] == code for at in range(names) for code in np.unique(codes[:, at])[1:]]
            crossed = [
                sizes[:, a] * sizes[:, b]
                for a in range(count)
                for b in range(a, count)
                if np.ptp(sizes[:, a]) > 0
            ]
            features = np.column_stack([plain, *hot, *crossed])
            spread = features.std(axis=0)
            features = (features - features.mean(axis=0))[:, spread > 0] / spread[spread > 0]
            bounds = np.array([item.vector for item in self.items])
            self._arrays = features, bounds, np.array(self._levels, dtype=np.int64).T
        return self._arrays

    def scores(self, left: npt.NDArray[np.int64], judged: Sequence[Judged], front: FloatArray) -> FloatArray:
        """[n] the less, the sooner: how far plans are likely to lie behind the front [k, m]."""
        features, bounds, levels = self._features()
        seen = [(self.at[item.point], item.objectives) for item in judged if item.point in self.at]
        index = np.array([row[0] for row in seen], dtype=np.int64)
        values = np.array([row[1] for row in seen])
        sound = (bounds[index] * values > 0) & (np.abs(bounds[index]) > 1e-300)
        ratio = np.divide(values, bounds[index], out=np.ones_like(values), where=sound)
        drift = np.clip(np.log(ratio), -4.0, 4.0)
        middle = drift.mean(axis=0)
        known, rest = np.broadcast_to(middle, (len(left), len(middle))).copy(), drift - middle
        if features.shape[1] and len(index) > 8:
            own = features[index]
            weight = np.linalg.solve(own.T @ own + _RIDGE * np.eye(own.shape[1]), own.T @ rest)
            known += features[left] @ weight
            rest = rest - own @ weight
        more: FloatArray = np.zeros((len(left), len(middle)))
        for level, size in ((1, len(self._workers)), (0, len(self._groups))):
            ids = levels[level]
            sums = np.zeros((size, len(middle)))
            np.add.at(sums, ids[index], rest)
            times = np.bincount(ids[index], minlength=size)[ids[left], None]
            more = (sums[ids[left]] + _SHRINK * more) / (times + _SHRINK)
        likely = bounds[left] * np.exp(np.clip(known + more, -4.0, 4.0))
        low = np.minimum(likely.min(axis=0), front.min(axis=0))
        span = np.maximum(front.max(axis=0) - front.min(axis=0), 1e-3 * np.abs(front).max(axis=0) + 1e-300)
        # Column by column: a front has a hundred points, and there may be a hundred thousand plans.
        columns = np.ascontiguousarray(((likely - low) / span).T)
        behind = np.full(len(left), np.inf)
        for point in (front - low) / span:
            worst = columns[0] - point[0]
            for column, value in zip(columns[1:], point[1:], strict=True):
                np.maximum(worst, column - value, out=worst)
            np.minimum(behind, worst, out=behind)
        weights = self.rng.dirichlet(np.ones(bounds.shape[1]))
        return np.asarray(behind + 0.2 * (weights @ columns), dtype=np.float64)
