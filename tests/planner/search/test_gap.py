"""What a search that was cut short says of the truth contains the truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.objectives import OBJECTIVES
from planner.pareto import hypervolume
from planner.search import SEARCHERS, ExhaustiveSearch
from planner.search.gap import gap_words, measure_gap
from tests.planner.fakes import FakeEvaluator, FakeSpace, StepClock
from tests.planner.search import conformance

makers = st.sampled_from(["exhaustive", "cp-sat", "mcts"]).map(lambda name: SEARCHERS[name])


@settings(max_examples=40)
@given(
    makers,
    st.integers(0, 2**31),
    st.sampled_from([3, 1000]),
    st.sampled_from([0.1, 0.6]),
    st.integers(2, 80),
    st.lists(st.sampled_from(sorted(OBJECTIVES)), min_size=1, max_size=3, unique=True),
)
def test_the_truth_lies_inside_the_gap(
    make: Any, seed: int, levels: int, slack: float, budget: int, wanted: list[str]
) -> None:
    evaluator, space = FakeEvaluator(seed, levels=levels, slack=slack), FakeSpace(10, 6)
    whole = conformance.run(lambda: ExhaustiveSearch(prune=False), evaluator, space, wanted)
    if not whole.front:
        return
    cut = conformance.run(make, evaluator, space, wanted, clock=StepClock(1.0), budget_s=float(budget))
    gap = cut.gap
    assert gap is not None
    if cut.certified:
        assert gap.closed
        assert gap.ratio == pytest.approx(1.0)
        return
    truth = np.array([item.objectives for item in whole.front])
    found = np.array([item.objectives for item in cut.front])
    for column, row in enumerate(gap.objectives):
        sign = -1.0 if OBJECTIVES[row.name].maximise else 1.0
        best = truth[:, column].min()
        assert row.best is not None
        assert sign * row.best == pytest.approx(found[:, column].min())
        if row.bound is not None:
            assert sign * row.bound <= best + 1e-9 * abs(best)
    assert gap.found <= gap.at_most + 1e-12
    if gap.unbounded == 0:
        low = np.array([row.bound for row in gap.objectives], dtype=float)
        low *= [-1.0 if OBJECTIVES[name].maximise else 1.0 for name in wanted]
        span = np.where(found.max(axis=0) > low, found.max(axis=0) - low, 1.0)
        reference, box = np.full(len(wanted), 1.1), 1.1 ** len(wanted)
        true_volume = hypervolume((truth - low) / span, reference) / box
        assert gap.found <= true_volume + 1e-9
        assert true_volume <= gap.at_most + 1e-9


def test_words_name_what_is_open() -> None:
    front = np.array([[1.0, 4.0], [2.0, 2.0]])
    gap = measure_gap(["latency", "energy"], front, np.array([[0.5, 3.0]]), open_plans=3, unbounded=0)
    assert gap_words(gap.as_dict()).startswith(
        "3 plans are open, with latency at most 50 % better, energy at most 0 % better; the front covers"
    )
    assert 0 < gap.ratio < 1
    blind = measure_gap(["latency", "energy"], front, np.empty((0, 2)), open_plans=0, unbounded=9)
    assert gap_words(blind.as_dict()) == "9 plans are open, 9 of them without any bound"
    assert blind.objectives[0].relative is None
    closed = measure_gap(["latency", "energy"], front, np.empty((0, 2)), open_plans=0, unbounded=0)
    assert gap_words(closed.as_dict()) == "nothing is left open"
    assert closed.ratio == 1.0
