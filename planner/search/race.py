"""Short simulations first: a race over the beginning of the same traffic, to order the plans that count.

Every plan that enters runs the first requests of the workload, the same for all (common random numbers), so
that what differs between two plans is the plans. A plan's objectives get a confidence interval from means
over batches of successive requests. A plan whose interval lies behind another's everywhere is *raced out*: it
comes last. Nothing is ever excluded by a race, because a beginning is not the whole: a plan that was raced
out and never simulated whole leaves the search open, and its bound counts in the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.evaluate import Evaluator, one_worker
from planner.objectives import objective_vector
from planner.pairs import Point
from planner.pareto import non_dominated
from planner.workload import Workload

FloatArray = npt.NDArray[np.float64]

#: Requests of a short run, and how many times more the whole must have for a race to pay.
SHORT_REQUESTS, WORTH = 200, 8
_BATCHES = 10
#: 95 % of a t distribution with nine degrees of freedom.
_T = 2.262


@dataclass(frozen=True, slots=True)
class Heat:
    """A short run: objectives (to minimise) and the half-width of their intervals."""

    values: FloatArray
    half: FloatArray


def prefix(workload: Workload, requests: int) -> Workload:
    """The first rows of a workload; what they trigger later on is left out."""
    count = min(requests, len(workload))
    end = int(workload.prefix_offset[count]) if len(workload.prefix_offset) > count else 0
    return Workload(
        arrival_s=workload.arrival_s[:count],
        input_tokens=workload.input_tokens[:count],
        output_tokens=workload.output_tokens[:count],
        parent=workload.parent[:count],
        delay_s=workload.delay_s[:count],
        session=workload.session[:count],
        concurrency=min(workload.concurrency, count),
        block_tokens=workload.block_tokens,
        prefix_offset=workload.prefix_offset[: count + 1],
        prefix_ids=workload.prefix_ids[:end],
        prefix_unique=workload.prefix_unique,
        source=workload.source,
    )


class Race:
    """Short runs of plans, and who is behind whom."""

    def __init__(
        self, evaluator: Evaluator, objectives: Sequence[str], requests: int = SHORT_REQUESTS
    ) -> None:
        self.objectives = tuple(objectives)
        self.short = Evaluator(
            evaluator.spec,
            evaluator.cluster,
            prefix(evaluator.workload, requests),
            evaluator.engine,
            evaluator.model,
            slo=evaluator.slo,
            prices=evaluator.prices,
            table_tokens=evaluator.table_tokens,
            table_seqs=evaluator.table_seqs,
        )
        self.heats: dict[Point, Heat] = {}

    def run(self, point: Point) -> Heat:
        """One short run; a plan runs once."""
        if point not in self.heats:
            plan = one_worker(point)
            result, memory = self.short.run(plan)
            metrics = result.metrics()
            metrics["memory_bytes"] = self.short.used_bytes(plan, memory, result.peak_kv_blocks)
            values = objective_vector(self.objectives, metrics)
            taken = result.finish_s - result.arrival_s
            means = np.array([part.mean() for part in np.array_split(taken, min(_BATCHES, len(taken)))])
            spread = float(means.std(ddof=1)) / np.sqrt(len(means)) if len(means) > 1 else float(means[0])
            share = _T * spread / max(float(taken.mean()), 1e-300)
            self.heats[point] = Heat(values, np.abs(values) * share)
        return self.heats[point]

    def order(self, points: Sequence[Point]) -> tuple[list[int], int]:
        """(positions: contenders first, in the order they came, then those raced out; how many are out)."""
        heats = [self.run(point) for point in points]
        low = np.array([heat.values - heat.half for heat in heats])
        high = np.array([heat.values + heat.half for heat in heats])
        out = np.zeros(len(points), dtype=np.bool_)
        # Pessimistic points that none of the others beats are enough to judge by.
        for values in high[non_dominated(high)]:
            out |= np.all(values < low, axis=1)
        return [*np.flatnonzero(~out).tolist(), *np.flatnonzero(out).tolist()], int(out.sum())
