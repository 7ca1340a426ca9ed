"""What every searcher keeps. A searcher's own tests call these with a function that makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from planner.objectives import objective_vector, slo_misses
from planner.pareto import dominates
from planner.search import Judged, Outcome, Progress, Searcher
from tests.planner.fakes import FakeEvaluator, FakeSpace, StepClock

Make = Callable[[], Searcher]
OBJECTIVES = ("latency", "energy", "memory")


def run(
    make: Make, evaluator: Any, space: Any, objectives: Sequence[str] = OBJECTIVES, **options: Any
) -> Outcome:
    """One search with a clock that stands still unless one is given."""
    settings: dict[str, Any] = {"budget_s": 60.0, "seed": 0, "clock": StepClock(), **options}
    return make().search(evaluator, space, objectives, **settings)


def identity(items: Sequence[Judged]) -> list[tuple[str, tuple[float, ...]]]:
    """Plans and their values."""
    return [(item.point.id, item.objectives) for item in items]


def everything(
    evaluator: FakeEvaluator, space: FakeSpace, objectives: Sequence[str]
) -> list[tuple[float, ...]]:
    """The front's values by brute force, without any searcher: those of all plans that meet the SLO."""
    values = []
    for point in space:
        metrics = evaluator.metrics(point)
        if evaluator.reject(point) is None and not slo_misses(evaluator.slo, metrics):
            values.append(tuple(float(v) for v in objective_vector(objectives, metrics)))
    return sorted({v for v in values if not any(dominates(other, v) for other in values)})


def check_front(make: Make, evaluator: FakeEvaluator, space: FakeSpace, objectives: Sequence[str]) -> Outcome:
    """A finished search has the whole space's front, and accounts for every plan."""
    outcome = run(make, evaluator, space, objectives)
    truth = everything(evaluator, space, objectives)
    assert outcome.certified
    assert outcome.reason == ""
    if truth:
        assert [item.objectives for item in outcome.front] == truth
        assert all(item.meets_slo for item in outcome.front)
    else:
        assert not any(item.meets_slo for item in outcome.front)
    rejected = sum(item.plans for item in outcome.rejected)
    assert outcome.simulated == len(outcome.judged)
    assert outcome.space_size == len(space) == outcome.simulated + outcome.bounded + rejected
    assert len({item.point.id for item in outcome.judged}) == len(outcome.judged), (
        "a plan was simulated twice"
    )
    return outcome


def check_deterministic(make: Make, evaluator: FakeEvaluator, space: FakeSpace) -> None:
    """The same seed gives the same search, plan by plan."""
    first, second = run(make, evaluator, space, seed=7), run(make, evaluator, space, seed=7)
    assert identity(first.judged) == identity(second.judged)
    assert identity(first.front) == identity(second.front)


def check_workers(make: Make, evaluator: FakeEvaluator, space: FakeSpace) -> None:
    """Threads change nothing about the front."""
    one, two = run(make, evaluator, space, workers=1), run(make, evaluator, space, workers=2)
    assert identity(one.front) == identity(two.front)
    assert one.certified
    assert two.certified


def check_budget(make: Make, evaluator: FakeEvaluator, space: FakeSpace, budget_s: float) -> None:
    """A search that runs out says so, and what it has is true: a front of what it simulated."""
    whole = run(make, evaluator, space)
    cut = run(make, evaluator, space, clock=StepClock(1.0), budget_s=budget_s)
    if whole.simulated + whole.bounded:
        assert cut.simulated >= 1, "even the smallest budget has an answer"
    if cut.certified:
        assert identity(cut.front) == identity(whole.front)
    else:
        assert "budget" in cut.reason
    for item in cut.front:
        assert (
            not any(dominates(other.objectives, item.objectives) for other in cut.judged if other.meets_slo)
            or not item.meets_slo
        )
    assert cut.simulated + cut.bounded + sum(item.plans for item in cut.rejected) <= len(space)


def check_cancel(make: Make, evaluator: FakeEvaluator, space: FakeSpace, after: int) -> None:
    """A cancelled search ends at once and is not certified."""
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    outcome = run(make, evaluator, space, cancelled=cancelled)
    assert asked <= after + 3, "it went on after it was cancelled"
    if asked > after:
        assert not outcome.certified
        assert outcome.reason == "cancelled"


def check_progress(make: Make, evaluator: FakeEvaluator, space: FakeSpace) -> None:
    """Counts never fall and never pass the size of the space; incumbents are simulated plans."""
    seen: list[Progress] = []
    outcome = run(make, evaluator, space, clock=StepClock(0.06), budget_s=1e9, progress=seen.append)
    assert seen
    for before, after in pairwise(seen):
        assert after.elapsed_s > before.elapsed_s
        for name in ("considered", "rejected", "bounded", "simulated"):
            assert getattr(after, name) >= getattr(before, name), name
    for item in seen:
        assert item.considered == item.rejected + item.bounded + item.simulated <= item.space_size
    last = seen[-1]
    assert (last.simulated, last.bounded) == (outcome.simulated, outcome.bounded)
    assert sorted(identity(last.best)) == sorted(identity(outcome.front))
