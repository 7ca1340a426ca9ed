"""The conformance battery on every searcher, and exhaustive search against itself without pruning."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware import InputError
from planner.objectives import OBJECTIVES
from planner.search import SEARCHERS, ExhaustiveSearch, choose_searcher
from tests.planner.fakes import FakeEvaluator, FakeSpace
from tests.planner.search import conformance

makers = st.sampled_from(sorted(SEARCHERS)).map(lambda name: SEARCHERS[name])
spaces = st.builds(FakeSpace, st.integers(1, 12), st.integers(1, 8), st.integers(0, 1))
slos = st.one_of(
    st.just({}),
    st.builds(
        lambda ttft, tpot: {"ttft_s": {"p95": ttft}, "tpot_s": {"mean": tpot}},
        st.floats(0.3, 7),
        st.floats(0.3, 7),
    ),
)
evaluators = st.builds(
    FakeEvaluator,
    st.integers(0, 2**31),
    levels=st.sampled_from([1, 3, 6, 1000]),
    slack=st.sampled_from([0.0, 0.3, 0.9]),
    misfits=st.sampled_from([0.0, 0.2, 1.0]),
    slo=slos,
)
objectives = st.lists(st.sampled_from(sorted(OBJECTIVES)), min_size=1, max_size=4, unique=True)


@settings(max_examples=120)
@given(makers, evaluators, spaces, objectives)
def test_the_front_is_that_of_the_whole_space(make: Any, evaluator: Any, space: Any, wanted: Any) -> None:
    conformance.check_front(make, evaluator, space, wanted)


@settings(max_examples=80)
@given(evaluators, spaces, objectives)
def test_pruning_changes_neither_the_front_nor_its_plans(evaluator: Any, space: Any, wanted: Any) -> None:
    pruned = conformance.run(ExhaustiveSearch, evaluator, space, wanted)
    simulated = conformance.run(lambda: ExhaustiveSearch(prune=False), evaluator, space, wanted)
    if any(item.meets_slo for item in simulated.judged):
        assert conformance.identity(pruned.front) == conformance.identity(simulated.front)
    else:
        # The same distances; of plans that miss by the same, pruning may keep another.
        assert [item.distance for item in pruned.front] == [item.distance for item in simulated.front]
    assert pruned.simulated <= simulated.simulated


def test_pruning_saves_simulations() -> None:
    evaluator, space = FakeEvaluator(3, levels=1000, slack=0.1), FakeSpace(30, 20)
    outcome = conformance.run(ExhaustiveSearch, evaluator, space)
    assert outcome.bounded > outcome.simulated > 0
    assert len(evaluator.calls) == outcome.simulated


@settings(max_examples=30)
@given(makers, evaluators, spaces)
def test_the_same_seed_gives_the_same_search(make: Any, evaluator: Any, space: Any) -> None:
    conformance.check_deterministic(make, evaluator, space)


@settings(max_examples=30)
@given(makers, evaluators, spaces)
def test_threads_change_nothing(make: Any, evaluator: Any, space: Any) -> None:
    conformance.check_workers(make, evaluator, space)


@settings(max_examples=60)
@given(makers, evaluators, spaces, st.floats(0.1, 200))
def test_a_search_that_runs_out_is_honest(make: Any, evaluator: Any, space: Any, budget_s: float) -> None:
    conformance.check_budget(make, evaluator, space, budget_s)


@settings(max_examples=40)
@given(makers, evaluators, spaces, st.integers(0, 60))
def test_a_cancelled_search_ends_at_once(make: Any, evaluator: Any, space: Any, after: int) -> None:
    conformance.check_cancel(make, evaluator, space, after)


@settings(max_examples=40)
@given(makers, evaluators, spaces)
def test_progress_never_goes_back(make: Any, evaluator: Any, space: Any) -> None:
    conformance.check_progress(make, evaluator, space)


def test_the_front_does_not_depend_on_the_seed() -> None:
    evaluator, space = FakeEvaluator(1, levels=4), FakeSpace(9, 6)
    fronts = [
        conformance.identity(conformance.run(ExhaustiveSearch, evaluator, space, seed=seed).front)
        for seed in range(4)
    ]
    assert all(front == fronts[0] for front in fronts)


def test_without_a_plan_that_meets_the_slo_the_nearest_are_given() -> None:
    evaluator = FakeEvaluator(2, levels=100, slo={"ttft_s": {"p95": 0.5}}, misfits=0.0)
    space = FakeSpace(6, 6)
    outcome = conformance.run(ExhaustiveSearch, evaluator, space)
    least = sorted(evaluator.metrics(point)["ttft_s"]["p95"] / 0.5 - 1 for point in space)[:5]
    assert [item.distance for item in outcome.front] == pytest.approx(least)
    assert outcome.certified


def test_methods_are_found_by_name() -> None:
    assert choose_searcher("auto")[0].name == "exhaustive"
    for name in SEARCHERS:
        assert choose_searcher(name)[0].name == name
    with pytest.raises(InputError, match=r"^search\.method: "):
        choose_searcher("simulated-annealing")
