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

from collections.abc import Callable, Sequence

from planner.evaluate import Evaluator
from planner.plans import PlanSpace
from planner.search.base import Clock, Outcome, ProgressCallback, Support
from planner.search.run import SearchRun


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
        support: Support | None = None,
    ) -> Outcome:
        """See `Searcher.search`."""
        start = clock()
        run = SearchRun(
            evaluator, space, tuple(objectives), clock, start, budget_s, progress, cancelled,
            seed=seed, workers=workers, support=support,
        )  # fmt: skip
        with run:
            candidates = run.collect(seed)
            run.simulate(candidates, prune=self.prune)
            return run.outcome(self.name)
