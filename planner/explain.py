"""Why a plan is recommended, in words and numbers that the result itself holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.objectives import OBJECTIVES
from planner.pareto import knee
from planner.search import Judged


def recommend(
    front: Sequence[Judged], objectives: Sequence[str], *, certified: bool = True
) -> tuple[Judged, str]:
    """The plan to take and why: the knee of the front, or the nearest miss of the SLO.

    `certified` says whether the search looked at every plan; the words promise no more.

    The knee is the plan nearest to the ideal point when every objective is scaled to [0, 1]
    over the front. Raises ValueError for an empty front.
    """
    if not front:
        raise ValueError("an empty front has no recommendation")
    if not front[0].meets_slo:
        best = front[0]
        missed = "; ".join(miss.words() for miss in best.misses)
        none = "no plan meets" if certified else "the search ended before a plan was found that meets"
        return best, f"{none} the SLO; this one is nearest: {missed}"
    values = np.array([item.objectives for item in front])
    index = knee(values)
    chosen = front[index]
    if len(front) == 1:
        words = "none is better in any objective" if certified else "no simulated plan is better"
        return chosen, f"it is the only plan on the front: {words}"
    parts = []
    for column, name in enumerate(objectives):
        best = values[:, column].min()
        own = values[index, column]
        words = OBJECTIVES[name].words
        if own == best:
            parts.append(f"the best {words}")
        else:
            gap = abs(own - best) / max(abs(best), 1e-300)
            side = "below" if OBJECTIVES[name].maximise else "above"
            parts.append(
                f"{words} within 1 % of the best"
                if gap < 0.01
                else f"{words} {100 * gap:.0f} % {side} the best"
            )
    return chosen, f"the knee of a front of {len(front)}: it has " + ", ".join(parts)
