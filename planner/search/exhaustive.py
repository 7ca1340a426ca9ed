"""Exhaustive search with admissible bounds: every plan is simulated or proven not to matter.

A plan is left out without simulation only when its bound shows one of two things: it cannot
meet the SLO whatever happens, or a simulated plan that meets the SLO is nowhere worse than the
plan's bound, so that the plan could at best repeat a point of the front. The front is therefore
the one of the whole space (`certified`), which a test compares with an unpruned search.

Plans with tight competition are simulated first: the smaller a plan's bound on the normalised
objectives, the likelier it is to be on the front and to prune others. Half of the budget at most
goes into bounds, and parts of the space are bounded in an order drawn from the seed, so that a
search cut short has looked at all kinds of plans.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.evaluate import Evaluator
from planner.objectives import objective_vector, slo_distance_bound, slo_misses
from planner.pareto import non_dominated, normalise
from planner.plans import PlanPoint, PlanSpace
from planner.search.base import Clock, Judged, Outcome, Progress, ProgressCallback, Rejected

FloatArray = npt.NDArray[np.float64]

#: Bounds and simulated values are sums of floats in different order: what differs by less is equal.
_EQUAL = 1e-9
#: Least time between two reports of progress, in s; the last one always comes.
_REPORT_S = 0.05
#: Share of the budget that bounds may take.
_BOUND_SHARE = 0.5
#: How many plans nearest to the SLO are simulated when none can meet it.
_NEAREST = 5


@dataclass(slots=True)
class _Candidates:
    points: list[PlanPoint]
    bounds: FloatArray  # [n, m]
    distance: FloatArray  # [n] least possible SLO miss


class ExhaustiveSearch:
    """Every plan of the space, bounds first. `prune=False` simulates all of them (the reference)."""

    name = "exhaustive"

    def __init__(self, *, prune: bool = True) -> None:
        self.prune = prune

    def search(
        self,
        evaluator: Evaluator,
        space: PlanSpace,
        objectives: Sequence[str],
        *,
        budget_s: float,
        seed: int,
        clock: Clock,
        progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
        workers: int = 1,
    ) -> Outcome:
        """See `Searcher.search`."""
        start = clock()
        run = _Run(evaluator, space, tuple(objectives), clock, start, budget_s, progress, cancelled)
        candidates = run.collect(seed)
        run.simulate(candidates, prune=self.prune, workers=workers)
        return run.outcome(self.name)


class _Run:
    """The state of one search."""

    def __init__(
        self,
        evaluator: Evaluator,
        space: PlanSpace,
        objectives: tuple[str, ...],
        clock: Clock,
        start: float,
        budget_s: float,
        progress: ProgressCallback | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self.evaluator, self.space, self.objectives = evaluator, space, objectives
        self.clock, self.start, self.budget_s = clock, start, budget_s
        self.report, self.is_cancelled = progress, cancelled
        self.judged: list[Judged] = []
        self.rejected: list[Rejected] = []
        self.rejected_plans = sum(item.plans for item in space.excluded)
        self.bounded = 0
        self.complete = True
        self.reason = ""
        self._front: list[Judged] = []
        self._front_values: FloatArray = np.empty((0, len(objectives)))
        self._last_report = -1.0

    # --- gates and bounds ---------------------------------------------------------------------

    def collect(self, seed: int) -> _Candidates:
        """Every plan through the memory gate, with its bounds, in the order of the space."""
        for item in self.space.excluded:
            example = next(self.space.points(item.layout, item.formats or ("bf16",) * 3))
            self.rejected.append(Rejected(example, item.reason, item.plans))
        order = list(range(len(self.space.groups)))
        random.Random(seed).shuffle(order)
        found: list[tuple[int, PlanPoint, FloatArray, float]] = []
        refused: list[tuple[int, list[Rejected]]] = []
        for group in order:
            if self._stop(_BOUND_SHARE, done=len(found)):
                break
            reasons: dict[str, list[PlanPoint]] = {}
            for point in self.space.points(*self.space.groups[group]):
                reason = self.evaluator.reject(point)
                if reason:
                    reasons.setdefault(reason, []).append(point)
                    continue
                bounds = self.evaluator.bounds(point)
                vector = self.evaluator.bound_vector(point, self.objectives, bounds)
                found.append((group, point, vector, slo_distance_bound(self.evaluator.slo, bounds)))
            refused.append(
                (group, [Rejected(plans[0], reason, len(plans)) for reason, plans in reasons.items()])
            )
            self.rejected_plans += sum(map(len, reasons.values()))
            self._progress("bounds")
        # The sort is stable: within a group plans keep their order, engine defaults first.
        found.sort(key=lambda row: row[0])
        for _, rows in sorted(refused, key=lambda row: row[0]):
            self.rejected += rows
        return _Candidates(
            [row[1] for row in found],
            np.array([row[2] for row in found]),
            np.array([row[3] for row in found]),
        )

    # --- simulation ---------------------------------------------------------------------------

    def simulate(self, candidates: _Candidates, *, prune: bool, workers: int) -> None:
        """Simulate what the bounds cannot exclude, most promising first."""
        if not candidates.points:
            return
        scores = normalise(candidates.bounds).sum(axis=1)
        order = sorted(
            range(len(candidates.points)), key=lambda i: (candidates.distance[i] > 0, scores[i], i)
        )
        if prune:
            hopeless = [i for i in order if candidates.distance[i] > _EQUAL]
            order = [i for i in order if candidates.distance[i] <= _EQUAL]
        else:
            hopeless = []
        self._judge_all(candidates, order, prune=prune, workers=workers)
        if any(item.meets_slo for item in self.judged) or not hopeless:
            self.bounded += len(hopeless)
            return
        # Nothing meets the SLO: the nearest misses are wanted, so those with the least possible miss are run.
        hopeless.sort(key=lambda i: (candidates.distance[i], scores[i], i))
        for position, index in enumerate(hopeless):
            nearest = sorted(item.distance for item in self.judged)[:_NEAREST]
            if len(nearest) == _NEAREST and candidates.distance[index] >= nearest[-1]:
                self.bounded += len(hopeless) - position
                return
            if self._stop(done=len(self.judged)):
                return
            self._judge(candidates.points[index])

    def _judge_all(self, candidates: _Candidates, order: list[int], *, prune: bool, workers: int) -> None:
        if workers <= 1:
            for index in self._alive(candidates, order, prune):
                self._judge(candidates.points[index])
            return
        # The compiled simulator releases the interpreter lock, so threads share tables and workload.
        with ThreadPoolExecutor(workers) as pool:
            alive = self._alive(candidates, order, prune)
            while True:
                batch = [index for _, index in zip(range(2 * workers), alive, strict=False)]
                if not batch:
                    return
                for item in pool.map(lambda i: self._evaluate(candidates.points[i]), batch):
                    self._keep(item)

    def _alive(self, candidates: _Candidates, order: list[int], prune: bool) -> Iterator[int]:
        for index in order:
            if self._stop(done=len(self.judged)):
                return
            bound = candidates.bounds[index]
            slack = _EQUAL * np.abs(bound)
            if (
                prune
                and len(self._front_values)
                and bool(np.any(np.all(self._front_values <= bound + slack, axis=1)))
            ):
                self.bounded += 1
                continue
            yield index

    def _evaluate(self, point: PlanPoint) -> Judged:
        evaluation = self.evaluator.evaluate(point, interval=False)
        return Judged(
            evaluation,
            tuple(float(v) for v in objective_vector(self.objectives, evaluation.metrics)),
            tuple(slo_misses(self.evaluator.slo, evaluation.metrics)),
        )

    def _judge(self, point: PlanPoint) -> None:
        self._keep(self._evaluate(point))

    def _keep(self, item: Judged) -> None:
        self.judged.append(item)
        if item.meets_slo:
            own = np.array(rounded(item.objectives))
            if not bool(np.any(np.all(self._front_values <= own, axis=1))):
                beaten = np.all(own <= self._front_values, axis=1)
                self._front_values = np.vstack([self._front_values[~beaten], own])
                self._front = [kept for kept, gone in zip(self._front, beaten, strict=True) if not gone]
                self._front.append(item)
        self._progress("simulating")

    # --- ends and reports ---------------------------------------------------------------------

    def _stop(self, share: float = 1.0, *, done: int) -> bool:
        """Whether the search was cancelled, or has used `share` of its budget with something `done`.

        One plan at least is bounded and simulated, so that even the smallest budget has an answer.
        """
        if self.is_cancelled is not None and self.is_cancelled():
            self.complete, self.reason = False, "cancelled"
            return True
        if done and self.clock() - self.start > share * self.budget_s:
            self.complete, self.reason = False, f"the budget of {self.budget_s:g} s ran out"
            return True
        return False

    def _progress(self, phase: str, *, always: bool = False) -> None:
        if self.report is None:
            return
        now = self.clock() - self.start
        if not always and now - self._last_report < _REPORT_S:
            return
        self._last_report = now
        self.report(
            Progress(
                phase=phase,
                space_size=len(self.space),
                considered=self.rejected_plans + self.bounded + len(self.judged),
                rejected=self.rejected_plans,
                bounded=self.bounded,
                simulated=len(self.judged),
                front=len(self._front_values),
                elapsed_s=now,
                best=tuple(self._front) or tuple(front_of(self.judged)),
            )
        )

    def outcome(self, method: str) -> Outcome:
        """The front of what was simulated, and whether it is that of the whole space."""
        self._progress("done", always=True)
        return Outcome(
            method=method,
            space_size=len(self.space),
            judged=self.judged,
            front=front_of(self.judged),
            rejected=self.rejected,
            bounded=self.bounded,
            simulated=len(self.judged),
            certified=self.complete,
            wall_s=self.clock() - self.start,
            reason=self.reason,
        )


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """Values to nine significant digits: what differs by less is one trade-off, not two."""
    return tuple(float(f"{value:.9g}") for value in values)


def front_of(judged: Sequence[Judged]) -> list[Judged]:
    """The Pareto front of the plans that meet the SLO; without any, the nearest misses."""
    meeting = [item for item in judged if item.meets_slo]
    if not meeting:
        nearest = sorted(judged, key=lambda item: (item.distance, item.objectives))
        return nearest[:_NEAREST]
    values = np.array([rounded(item.objectives) for item in meeting])
    return sorted((meeting[i] for i in non_dominated(values)), key=lambda item: item.objectives)
