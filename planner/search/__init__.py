"""Searchers over plan spaces. The registry is a literal: a method's name, and who keeps it."""

from __future__ import annotations

from collections.abc import Callable

from hardware import InputError
from planner.plans import PlanSpace
from planner.search.base import Cancelled, Judged, Outcome, Progress, Rejected, Searcher, Support
from planner.search.cpsat import CpSatSearch
from planner.search.exhaustive import ExhaustiveSearch
from planner.search.mcts import MctsSearch
from planner.search.pairs import PairSearch, counted_with, together
from planner.search.run import front_of

SEARCHERS: dict[str, Callable[[], Searcher]] = {
    "exhaustive": ExhaustiveSearch,
    "cp-sat": CpSatSearch,
    "mcts": MctsSearch,
}


#: What one simulated request, one simulated plan, one bounded plan and one new shape cost, s; measured on one
#: core, rounded up. In large spaces about half of the plans fail the memory gate, which costs little.
_REQUEST_S, _PLAN_S, _BOUND_S, _SHAPE_S = 2e-6, 1e-3, 4e-5, 5e-3
#: Share of the budget up to which bounds of all plans are worth their time.
_BOUND_SHARE = 0.65


def choose_searcher(
    method: str,
    path: str = "search.method",
    *,
    space: PlanSpace | None = None,
    requests: int = 0,
    budget_s: float = float("inf"),
    workers: int = 1,
) -> tuple[Searcher, str]:
    """The searcher of a method, and why `auto` took it ("" for a method that was named).

    `auto` takes the exhaustive search where it should end within the budget, and where bounds of all
    plans leave time to simulate the best of them (then it knows its gap); else tree search.
    """
    if method != "auto":
        if method not in SEARCHERS:
            known = ", ".join(["auto", *SEARCHERS])
            raise InputError(path, f"method {method!r} is not known, use one of {known}")
        return SEARCHERS[method](), ""
    if space is None:
        return ExhaustiveSearch(), ""
    shapes = len(
        {(layout.pool, layout.degrees, layout.gpu_clock_hz, formats) for layout, formats in space.groups}
    )
    plans = sum(
        len(space.batching(space.cluster.pool(layout.pool), layout.degrees)) for layout, _ in space.groups
    )
    bounds_s = shapes * _SHAPE_S + plans * _BOUND_S
    needed_s = bounds_s + plans * (_PLAN_S + requests * _REQUEST_S) / workers
    if needed_s <= budget_s:
        return ExhaustiveSearch(), f"all {plans:,} plans take about {needed_s:.0f} s at most"
    why = f"all {plans:,} plans would take up to {needed_s:.0f} s, the budget is {budget_s:g} s"
    if bounds_s <= _BOUND_SHARE * budget_s:
        return ExhaustiveSearch(), f"{why}; bounds of all take about {bounds_s:.0f} s, the best come first"
    return MctsSearch(), why


__all__ = [
    "Cancelled",
    "CpSatSearch",
    "ExhaustiveSearch",
    "Judged",
    "MctsSearch",
    "Outcome",
    "PairSearch",
    "Progress",
    "Rejected",
    "Searcher",
    "Support",
    "choose_searcher",
    "counted_with",
    "front_of",
    "together",
]
