"""Disaggregated plans beside aggregated ones: searched exhaustively, and put together to one answer.

The space of pairs is a product of two kinds of workers, so most of it is far from any front. Plans of the
other kind that were simulated before prune it: a pair that they are nowhere worse than cannot add to the
front of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from planner.evaluate_pair import PairEvaluator
from planner.pairs import PairSpace
from planner.search.base import Clock, Judged, Left, Outcome, Progress, ProgressCallback, Support
from planner.search.gap import measure_gap
from planner.search.run import SearchRun, front_of


class PairSearch:
    """Every pair of the space, bounds first; `beside`: plans of another space that pairs have to beat."""

    name = "exhaustive"

    def search(
        self,
        evaluator: PairEvaluator,
        space: PairSpace,
        objectives: Sequence[str],
        *,
        budget_s: float,
        seed: int,
        clock: Clock,
        progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
        workers: int = 1,
        support: Support | None = None,
        beside: Sequence[Judged] = (),
    ) -> Outcome:
        """See `Searcher.search`."""
        run = SearchRun(
            evaluator, space, tuple(objectives), clock, clock(), budget_s, progress, cancelled,
            seed=seed, workers=workers, support=support,
        )  # fmt: skip
        with run:
            for item in beside:
                run.compare(item)
            run.simulate(run.collect(seed), prune=True)
            return run.outcome(self.name)


def counted_with(progress: ProgressCallback | None, first: Outcome) -> ProgressCallback | None:
    """Progress of a second search as that of both."""
    if progress is None:
        return None
    refused = sum(item.plans for item in first.rejected)
    done = refused + first.bounded + first.simulated

    def tell(found: Progress) -> None:
        progress(
            replace(
                found,
                space_size=found.space_size + first.space_size,
                considered=found.considered + done,
                rejected=found.rejected + refused,
                bounded=found.bounded + first.bounded,
                simulated=found.simulated + first.simulated,
                elapsed_s=found.elapsed_s + first.wall_s,
            )
        )

    return tell


def together(first: Outcome, second: Outcome, objectives: Sequence[str]) -> Outcome:
    """What two searches of different spaces found, as one."""
    judged = [*first.judged, *second.judged]
    front = front_of(judged)
    parts = [part.left or Left(np.empty((0, len(objectives))), 0, 0) for part in (first, second)]
    meets = bool(front) and front[0].meets_slo
    values = np.array([item.objectives for item in front]) if meets else np.empty((0, len(objectives)))
    return Outcome(
        method=first.method if first.method == second.method else f"{first.method} and {second.method}",
        space_size=first.space_size + second.space_size,
        judged=judged,
        front=front,
        rejected=[*first.rejected, *second.rejected],
        bounded=first.bounded + second.bounded,
        simulated=first.simulated + second.simulated,
        certified=first.certified and second.certified,
        wall_s=first.wall_s + second.wall_s,
        reason="; ".join(dict.fromkeys(text for text in (first.reason, second.reason) if text)),
        gap=measure_gap(
            objectives,
            values,
            np.concatenate([part.points for part in parts]),
            open_plans=sum(part.open_plans for part in parts),
            unbounded=sum(part.unbounded for part in parts),
        ),
        statistics={**first.statistics, **second.statistics},
    )
