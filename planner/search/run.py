"""What every searcher does alike: gates, bounds, simulation, incumbents, progress, the outcome."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hardware import InputError
from planner.evaluate import Evaluation, Evaluator
from planner.evaluate_pair import PairEvaluator
from planner.objectives import objective_vector, slo_distance_bound, slo_misses
from planner.pairs import PairSpace, Point
from planner.pareto import non_dominated, normalise
from planner.search.base import (
    Clock,
    Judged,
    Judging,
    Left,
    Outcome,
    Progress,
    ProgressCallback,
    Rejected,
    Space,
    Support,
)
from planner.search.gap import Gap, measure_gap
from planner.search.pool import Here, Pool, make_pool
from planner.search.race import SHORT_REQUESTS, WORTH, Race
from planner.search.rank import Bound, Ranks

FloatArray = npt.NDArray[np.float64]

#: Bounds and simulated values are sums of floats in different order: what differs by less is equal.
EQUAL = 1e-9
#: Least time between two reports of progress, in s; the last one always comes.
_REPORT_S = 0.05
#: Share of the budget that bounds may take.
_BOUND_SHARE = 0.6
#: Share of what is left of the budget that a race may take.
_RACE_SHARE = 0.2
#: Plans simulated between two rankings.
_ROUND = 128
#: Open plans up to which a gap reads the pieces of their bounds, beyond it only the corners.
_MOST_PIECES = 4000
#: What a search leaves of its budget for its gap and the intervals of its front: a share, at most so many s.
_FINISH_SHARE, _MOST_FINISH_S = 0.1, 3.0
#: How many plans nearest to the SLO are simulated when none can meet it.
_NEAREST = 5


@dataclass(slots=True)
class Candidates:
    """Plans that pass the gates, with what bounds say of them."""

    items: list[Bound]
    bounds: FloatArray  # [n, m]
    distance: FloatArray  # [n] least possible SLO miss


class SearchRun:
    """The state of one search."""

    def __init__(
        self,
        evaluator: Judging,
        space: Space,
        objectives: tuple[str, ...],
        clock: Clock,
        start: float,
        budget_s: float,
        progress: ProgressCallback | None,
        cancelled: Callable[[], bool] | None,
        *,
        seed: int = 0,
        workers: int = 1,
        support: Support | None = None,
    ) -> None:
        self.seed, self.workers, self.support = seed, workers, support or Support()
        self.pool: Pool = Here(evaluator)
        self._unsaved: list[Judged] = []
        self._last_save = start
        self.raced = 0
        self.evaluator, self.space, self.objectives = evaluator, space, objectives
        self.clock, self.start, self.budget_s = clock, start, budget_s
        self.report, self.is_cancelled = progress, cancelled
        self.wanted = evaluator.wanted(objectives)
        self.judged: list[Judged] = []
        self.rejected: list[Rejected] = []
        self.rejected_plans = sum(item.plans for item in space.excluded)
        self.bounded = 0
        #: Plans that killed every worker that simulated them.
        self.lost = 0
        self.complete = True
        self.reason = ""
        self.incumbents: list[Judged] = []
        self.front_values: FloatArray = np.empty((0, len(objectives)))
        self.known: list[Bound] = []
        self._last_report = -1.0
        #: Of plans with equal values the front keeps the first by this; None: the first simulated.
        self.order: Callable[[Judged], Any] | None = None
        self.remembered = self._remembered()
        #: What the gap was measured from.
        self.left: Left | None = None

    # --- who evaluates, and what is kept --------------------------------------------------------

    def __enter__(self) -> SearchRun:
        requests = len(getattr(self.evaluator, "workload", ()))
        work_s = len(self.space) * (1e-3 + 2e-6 * requests) if self.support.backend == "auto" else 0.0
        if isinstance(self.evaluator, PairEvaluator):
            self.pool = Here(self.evaluator, self.workers)
        elif self.workers > 1 or self.support.backend != "auto":
            self.pool = make_pool(
                cast(Evaluator, self.evaluator), self.workers, self.support.backend, work_s=work_s
            )
        self.pool.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.__exit__(*exc)
        self.save()

    def _remembered(self) -> dict[str, Mapping[str, Any]]:
        """Plans that an earlier run of this search simulated. Raises InputError for those of another."""
        found: dict[str, Mapping[str, Any]] = {}
        for part in self.support.resume:
            for name, own in self._identity().items():
                if part.get(name) != own:
                    raise InputError(
                        "resume", f"it belongs to a search with another {name}: {part.get(name)!r}"
                    )
            found.update({row["id"]: row for row in part["plans"]})
        return found

    def _identity(self) -> dict[str, Any]:
        return {
            "schema_version": "1",
            "seed": self.seed,
            "objectives": list(self.objectives),
            "space_size": len(self.space),
        }

    def save(self) -> None:
        """Hand what was simulated since the last time to the checkpoint."""
        if self.support.checkpoint is None or not self._unsaved:
            return
        rows = [
            {
                "id": item.point.id,
                "metrics": item.evaluation.metrics,
                "breakdown_s": item.evaluation.breakdown_s,
            }
            for item in self._unsaved
        ]
        self._unsaved = []
        self._last_save = self.clock()
        self.support.checkpoint({**self._identity(), "plans": rows})

    # --- gates and bounds ---------------------------------------------------------------------

    def collect(self, seed: int) -> Candidates:
        """Every plan through the memory gate, with its bounds, in the order of the space."""
        self.exclude()
        order = list(range(len(self.space.groups)))
        random.Random(seed).shuffle(order)
        found: list[tuple[int, Bound]] = []
        refused: list[tuple[int, list[Rejected]]] = []
        for group in order:
            if self.stop(_BOUND_SHARE, done=len(found)):
                break
            passed, rejected = self.gate(group)
            found += [(group, item) for item in passed]
            refused.append((group, rejected))
            self.rejected_plans += sum(item.plans for item in rejected)
            self.tell("bounds")
        # The sort is stable: within a group plans keep their order, engine defaults first.
        found.sort(key=lambda row: row[0])
        for _, rows in sorted(refused, key=lambda row: row[0]):
            self.rejected += rows
        items = [item for _, item in found]
        return Candidates(
            items, np.array([item.vector for item in items]), np.array([item.distance for item in items])
        )

    def exclude(self) -> None:
        """Note what the space itself leaves out."""
        for item in self.space.excluded:
            example = next(self.space.points(item.layout, item.formats or ("bf16",) * 3))
            self.rejected.append(Rejected(example, item.reason, item.plans))

    def gate(self, group: int) -> tuple[list[Bound], list[Rejected]]:
        """A group's plans that can run, with their bounds; the others with their reasons."""
        layout, formats = self.space.groups[group]
        if not isinstance(self.evaluator, PairEvaluator) or not isinstance(self.space, PairSpace):
            return self.gate_points(self.space.points(layout, formats))
        points, refused = self.evaluator.sift(*self.space.halves(layout, formats))
        return [self._bound(point) for point in points], [Rejected(*row) for row in refused]

    def gate_points(self, points: Iterable[Point]) -> tuple[list[Bound], list[Rejected]]:
        """The same for any plans."""
        passed: list[Bound] = []
        reasons: dict[str, list[Point]] = {}
        for point in points:
            reason = self.evaluator.reject(point)
            if reason:
                reasons.setdefault(reason, []).append(point)
            else:
                passed.append(self._bound(point))
        return passed, [Rejected(plans[0], reason, len(plans)) for reason, plans in reasons.items()]

    def _bound(self, point: Point) -> Bound:
        """What bounds say of a plan that passed the gates; the gap is measured from all of these."""
        evaluator = self.evaluator
        bounds = evaluator.bounds(point, self.wanted)
        vector = evaluator.bound_vector(point, self.objectives, bounds)
        distance = slo_distance_bound(evaluator.slo, bounds)
        found = Bound(point, vector, distance, evaluator, self.objectives)
        self.known.append(found)
        return found

    # --- simulation ---------------------------------------------------------------------------

    def simulate(self, candidates: Candidates, *, prune: bool) -> None:
        """Simulate what the bounds cannot exclude, most promising first."""
        if not candidates.items:
            return
        places = {item.point: index for index, item in enumerate(candidates.items)}
        # What other parts of the space found comes first.
        self.order = lambda found: places.get(found.point, -1)
        scores = normalise(candidates.bounds).sum(axis=1)
        order = sorted(range(len(candidates.items)), key=lambda i: (candidates.distance[i] > 0, scores[i], i))
        if prune:
            hopeless = [i for i in order if candidates.distance[i] > EQUAL]
            order = [i for i in order if candidates.distance[i] <= EQUAL]
        else:
            hopeless = []
        self._judge_all(candidates, self._race(candidates, order), prune=prune)
        hopeless.sort(key=lambda i: (candidates.distance[i], scores[i], i))
        self.nearest([(candidates.items[i].point, float(candidates.distance[i])) for i in hopeless])

    def nearest(self, hopeless: Sequence[tuple[Point, float]]) -> None:
        """What to do with plans that cannot meet the SLO (each with its least possible miss, ascending).

        They matter only when nothing meets it: then those that may miss by the least are run.
        """
        if self.incumbents:
            self.bounded += len(hopeless)
            return
        for position, (point, distance) in enumerate(hopeless):
            nearest = sorted(item.distance for item in self.judged)[:_NEAREST]
            if len(nearest) == _NEAREST and distance >= nearest[-1]:
                self.bounded += len(hopeless) - position
                return
            if self.stop(done=len(self.judged)):
                return
            self.keep(self.evaluate(point))

    def _race(self, candidates: Candidates, order: list[int]) -> list[int]:
        """The same plans, those that short runs show to be behind last, where time is short."""
        workload = getattr(self.evaluator, "workload", None)
        requests = 0 if workload is None else len(workload)
        left_s = self.budget_s - (self.clock() - self.start)
        needed_s = len(order) * (1e-3 + 2e-6 * requests) / self.workers
        if isinstance(self.evaluator, PairEvaluator) or not self.support.race:
            return order
        if requests < WORTH * SHORT_REQUESTS or needed_s < left_s:
            return order
        race, until = (
            Race(cast(Evaluator, self.evaluator), self.objectives),
            self.clock() + _RACE_SHARE * left_s,
        )
        entered: list[int] = []
        for index in order:
            if self.clock() > until or self.stop(done=0):
                break
            race.run(candidates.items[index].point)
            entered.append(index)
            self.tell("race")
        places, self.raced = race.order([candidates.items[index].point for index in entered])
        first = [entered[place] for place in places[: len(places) - self.raced]]
        last = [entered[place] for place in places[len(places) - self.raced :]]
        return [*first, *order[len(entered) :], *last]

    def _judge_all(self, candidates: Candidates, order: list[int], *, prune: bool) -> None:
        alive = self._alive(candidates, order, prune)
        while True:
            batch = [index for _, index in zip(range(self.pool.batch), alive, strict=False)]
            if not batch:
                return
            for item in self.evaluate_all([candidates.items[index].point for index in batch]):
                self.keep(item)

    def _alive(self, candidates: Candidates, order: list[int], prune: bool) -> Iterator[int]:
        """Plans to simulate, the most promising first; what simulations teach changes their order."""
        ranks = Ranks(self.objectives) if len(order) > 2 * _ROUND else None
        if ranks is not None:
            ranks.extend(candidates.items)
        left = np.array(order, dtype=np.int64)
        while len(left):
            # Rankings cost more the more is known, and change less.
            size = max(_ROUND, min(8 * _ROUND, len(self.judged) // 8))
            for index in left[:size]:
                if self.stop(done=len(self.judged)):
                    return
                if prune and self.beaten(candidates.items[index], int(index)):
                    self.bounded += 1
                    continue
                yield int(index)
            left = left[size:]
            if ranks is not None and len(left) > _ROUND and self.incumbents:
                left = left[np.argsort(ranks.scores(left, self.judged, self.front_values), kind="stable")]

    def beaten(self, item: Bound, place: Any = None) -> bool:
        """Whether simulated plans are nowhere worse than anything that a plan's bound leaves possible.

        A plan that could only equal a point of the front is kept if its `place` comes before that of the plan
        there, so that the front that is found does not depend on the order of the search.
        """
        front = self.front_values
        if not len(front):
            return False
        corner = np.all(front <= item.vector + EQUAL * np.abs(item.vector), axis=1)
        if not bool(corner.any()):
            # A corner that nothing beats may be beaten where the plan can really lie.
            reach = item.pieces + EQUAL * np.abs(item.pieces)
            if len(reach) == 1 or not bool(
                np.all(front[:, None, :] <= reach[None], axis=2).any(axis=0).all()
            ):
                return False
        elif place is None or bool(np.any(front[corner] < item.vector - EQUAL * np.abs(item.vector))):
            return True
        if place is None or self.order is None:
            return True
        before = np.array([self.order(found) < place for found in self.incumbents])
        for piece in item.pieces:
            slack = EQUAL * np.abs(piece)
            beats = np.all(front <= piece + slack, axis=1)
            strictly = beats & np.any(front < piece - slack, axis=1)
            if not bool((strictly | (beats & before)).any()):
                return False
        return True

    def evaluate(self, point: Point) -> Judged | None:
        """Simulate a plan; None if that kills every worker that tries."""
        return self.evaluate_all([point])[0]

    def evaluate_all(self, points: Sequence[Point]) -> list[Judged | None]:
        """Simulate plans; those that an earlier run of the search knows are taken from there."""
        found: dict[Point, Evaluation | None] = {}
        if self.remembered:
            for point in points:
                row = self.remembered.get(point.id)
                if row is not None:
                    found[point] = self.evaluator.recalled(
                        point, dict(row["metrics"]), dict(row["breakdown_s"])
                    )
        open_ = [point for point in points if point not in found]
        if open_:
            found.update(zip(open_, self.pool.evaluate(open_), strict=True))
        return [self._judge(found[point]) for point in points]

    def _judge(self, evaluation: Evaluation | None) -> Judged | None:
        if evaluation is None:
            return None
        return Judged(
            evaluation,
            tuple(float(v) for v in objective_vector(self.objectives, evaluation.metrics)),
            tuple(slo_misses(self.evaluator.slo, evaluation.metrics)),
        )

    def keep(self, item: Judged | None) -> None:
        """Take a simulated plan in, and update the incumbents. What could not be simulated stays open."""
        if item is None:
            self.lost += 1
            return
        self.judged.append(item)
        if self.support.checkpoint is not None and item.point.id not in self.remembered:
            self._unsaved.append(item)
            if self.clock() - self._last_save > self.support.every_s:
                self.save()
        self.compare(item)
        self.tell("simulating")

    def compare(self, item: Judged) -> None:
        """Update the incumbents by a plan, be it of this search or of another part of the space."""
        if item.meets_slo:
            own = np.array(rounded(item.objectives))
            if not bool(np.any(np.all(self.front_values <= own, axis=1))):
                stay = ~np.all(own <= self.front_values, axis=1)
                self.front_values = np.vstack([self.front_values[stay], own])
                self.incumbents = [kept for kept, stays in zip(self.incumbents, stay, strict=True) if stays]
                self.incumbents.append(item)
            elif self.order is not None:
                for index in np.flatnonzero(np.all(self.front_values == own, axis=1)):
                    if self.order(item) < self.order(self.incumbents[index]):
                        self.incumbents[index] = item

    # --- ends and reports ---------------------------------------------------------------------

    def stop(self, share: float = 1.0, *, done: int) -> bool:
        """Whether the search was cancelled, or has used `share` of its budget with something `done`.

        One plan at least is bounded and simulated, so that even the smallest budget has an answer.
        """
        if self.is_cancelled is not None and self.is_cancelled():
            self.complete, self.reason = False, "cancelled"
            return True
        finish_s = min(_MOST_FINISH_S, _FINISH_SHARE * self.budget_s)
        if done and self.clock() - self.start > share * (self.budget_s - finish_s):
            self.complete, self.reason = False, f"the budget of {self.budget_s:g} s ran out"
            return True
        return False

    def tell(self, phase: str, *, always: bool = False) -> None:
        """Report progress, not too often."""
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
                front=len(self.front_values),
                elapsed_s=now,
                best=tuple(self.incumbents) or tuple(front_of(self._ranked())),
            )
        )

    def _ranked(self) -> list[Judged]:
        return self.judged if self.order is None else sorted(self.judged, key=self.order)

    def outcome(self, method: str) -> Outcome:
        """The front of what was simulated, and whether it is that of the whole space."""
        self.tell("done", always=True)
        if self.lost and self.complete:
            self.complete, self.reason = False, f"{self.lost} plans killed every worker that simulated them"
        return Outcome(
            method=method,
            space_size=len(self.space),
            judged=self.judged,
            front=front_of(self._ranked()),
            rejected=self.rejected,
            bounded=self.bounded,
            simulated=len(self.judged),
            certified=self.complete,
            wall_s=self.clock() - self.start,
            reason=self.reason,
            gap=self.gap(),
            left=self.left,
            statistics={"raced_out": self.raced} if self.raced else {},
        )

    def gap(self) -> Gap:
        """How much better than what was found the plans may be that are neither simulated nor excluded."""
        self.left = self._left()
        return measure_gap(
            self.objectives,
            self.front_values,
            self.left.points,
            open_plans=self.left.open_plans,
            unbounded=self.left.unbounded,
        )

    def _left(self) -> Left:
        if self.complete:
            return Left(np.empty((0, len(self.objectives))), 0, 0)
        done = {item.point for item in self.judged}
        meets = bool(self.incumbents)
        left = [
            item for item in self.known if item.point not in done and (item.distance <= EQUAL or not meets)
        ]
        if meets and left:
            vectors = np.array([item.vector for item in left])
            reach = vectors + EQUAL * np.abs(vectors)
            beaten = np.zeros(len(left), dtype=np.bool_)
            for values in self.front_values:
                beaten |= np.all(values <= reach, axis=1)
            left = [item for item, out in zip(left, beaten, strict=True) if not out]
        if len(left) <= _MOST_PIECES:
            left = [item for item in left if not self.beaten(item)]
            points = [item.pieces for item in left]
        else:
            points = [item.vector[None] for item in left]
        unbounded = len(self.space) - len(self.known) - sum(item.plans for item in self.rejected)
        return Left(
            np.concatenate(points) if points else np.empty((0, len(self.objectives))),
            len(left),
            max(0, unbounded),
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
