"""Which plan to simulate next, as a constraint programme: exact, and quick to prove that nothing is left.

Every plan that passes the gates is a Boolean, one of which is true; its admissible bounds are linear in
them. A simulated plan on the front adds a clause: the next plan's bound must be better in some objective.
The programme asks for the plan with the best bounds under all clauses; when it is infeasible, no plan that
was not simulated can add to the front, and the front is certified. The search ends with the same front as
the exhaustive one; it is of use where a space comes with linear limits of its own, and as a second
algorithm that the exhaustive search is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hardware import InputError
from planner.evaluate import Evaluator
from planner.pareto import normalise
from planner.plans import PlanSpace
from planner.search.base import Clock, Outcome, ProgressCallback, Support
from planner.search.run import EQUAL, Candidates, SearchRun

#: Beyond so many plans that can run, a programme with one Boolean each is the wrong tool.
MOST_PLANS = 20_000
#: Bounds become integers: parts of each objective's spread, rounded down, so that they stay admissible.
_PARTS = 1_000_000
#: Plans asked for at a time: proofs cost more than simulations.
_BATCH = 16


class CpSatSearch:
    """Bounds as a CP-SAT programme; see the module."""

    name = "cp-sat"

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
        support: Support | None = None,
    ) -> Outcome:
        """See `Searcher.search`. Raises InputError when more than `MOST_PLANS` plans can run."""
        start = clock()
        run = SearchRun(
            evaluator, space, tuple(objectives), clock, start, budget_s, progress, cancelled,
            seed=seed, workers=workers, support=support,
        )  # fmt: skip
        candidates = run.collect(seed)
        if len(candidates.items) > MOST_PLANS:
            raise InputError(
                "search.method",
                f"cp-sat takes up to {MOST_PLANS:,} plans that can run, this space has "
                f"{len(candidates.items):,}; use mcts or exhaustive",
            )
        return self._solve(run, candidates, seed)

    def _solve(self, run: SearchRun, candidates: Candidates, seed: int) -> Outcome:
        order = {item.point.id: index for index, item in enumerate(candidates.items)}
        run.order = lambda item: order[item.point.id]
        if candidates.items:
            with run:
                _Programme(run, candidates, seed).solve()
                return run.outcome(self.name)
        return run.outcome(self.name)


class _Programme:
    """The Booleans, the clauses, and what is left."""

    def __init__(self, run: SearchRun, candidates: Candidates, seed: int) -> None:
        from ortools.sat.python import cp_model

        self.run, self.candidates, self.cp = run, candidates, cp_model
        self.low = candidates.bounds.min(axis=0)
        span = candidates.bounds.max(axis=0) - self.low
        self.span = np.where(span > 0, span, 1.0)
        self.scaled = np.floor((candidates.bounds - self.low) / self.span * _PARTS).astype(np.int64)
        scores = normalise(candidates.bounds).sum(axis=1)
        self.score = np.rint(scores * 1000).astype(np.int64) * len(scores) + np.arange(len(scores))
        self.left = [i for i in range(len(scores)) if candidates.distance[i] <= EQUAL]
        self.hopeless = [i for i in range(len(scores)) if candidates.distance[i] > EQUAL]
        self.seed = seed

    def solve(self) -> None:
        """Ask, simulate, exclude; until nothing is left or the budget is."""
        run = self.run
        points = [item.point for item in self.candidates.items]
        while not run.stop(done=len(run.judged)):
            asked = self._best()
            if not asked:
                run.bounded += len(self.left)
                self.hopeless.sort(key=lambda i: (self.candidates.distance[i], self.score[i]))
                run.nearest([(points[i], float(self.candidates.distance[i])) for i in self.hopeless])
                return
            for index in asked:
                if run.stop(done=len(run.judged)):
                    return
                self.left.remove(index)
                run.keep(run.evaluate(points[index]))

    def _best(self) -> list[int]:
        """The plans with the best bounds that the front leaves possible; none when that is proven."""
        if not self.left:
            return []
        model = self.cp.CpModel()
        chosen = {i: model.new_bool_var(f"plan{i}") for i in self.left}
        count = min(_BATCH, len(self.left))
        for index, literal in chosen.items():
            self._clauses(model, index, literal)
        picked = model.new_int_var(1, count, "picked")
        model.add(sum(chosen.values()) == picked)
        # As many as asked for where there are as many; among those the best bounds.
        reward = int(self.score.max()) + 1
        model.minimize(sum(int(self.score[i] - reward) * literal for i, literal in chosen.items()))
        solver = self.cp.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = self.seed % 2**31
        status = solver.solve(model)
        if status == self.cp.INFEASIBLE:
            return []
        found = [i for i, literal in chosen.items() if solver.boolean_value(literal)]
        return sorted(found, key=lambda i: int(self.score[i]))

    def _clauses(self, model: Any, index: int, literal: Any) -> None:
        """For every point of the front, an objective at least in which a piece of the plan's bound is better.

        A plan that could only equal a point is kept when it comes first, so that of equal plans the front
        always holds the first.
        """
        run, item = self.run, self.candidates.items[index]
        # Of plans with equal values the front keeps the first.
        before = [run.order is not None and index < run.order(found) for found in run.incumbents]
        first = np.array(before, dtype=np.bool_)
        for piece in item.pieces:
            slack = EQUAL * np.abs(piece)
            better = (piece + slack < run.front_values).any(axis=1)
            equal = (np.abs(run.front_values - piece) <= slack).all(axis=1)
            if bool((better | (equal & first)).all()):
                return
        # The clause over constants: no piece of the bound is left, which forbids the plan.
        model.add(literal == 0)
