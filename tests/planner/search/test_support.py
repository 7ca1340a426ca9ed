"""Checkpoints, races, and workers that die."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware import InputError
from planner.evaluate import Evaluator, table_sizes
from planner.pipeline import Planner
from planner.plans import PlanSpace
from planner.search import SEARCHERS, ExhaustiveSearch, Support
from planner.search.pool import Here, Joblib, _pack, _unpack, judge, make_pool
from planner.search.race import Race, prefix
from tests.planner.conftest import request_of
from tests.planner.fakes import FakeEvaluator, FakeSpace, StepClock
from tests.planner.search import conformance


def real(requests: int = 60, **limits: Any) -> tuple[Evaluator, PlanSpace]:
    asked = Planner().load(request_of(requests=requests, space=limits))
    space = PlanSpace(asked.spec, asked.cluster, asked.engine, asked.request.space)
    tokens, seqs = table_sizes(space)
    return asked.evaluator(table_tokens=tokens, table_seqs=seqs), space


# --- checkpoints -----------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.sampled_from(sorted(SEARCHERS)), st.integers(0, 2**31), st.integers(2, 60), st.integers(1, 2))
def test_interrupted_and_resumed_equals_uninterrupted(
    name: str, seed: int, budget: int, workers: int
) -> None:
    space = FakeSpace(8, 6)
    options: dict[str, Any] = {"seed": seed % 100, "workers": workers}
    whole = conformance.run(SEARCHERS[name], FakeEvaluator(seed), space, **options)
    saved: list[dict[str, Any]] = []
    cut = conformance.run(
        SEARCHERS[name], FakeEvaluator(seed), space, clock=StepClock(1.0), budget_s=float(budget),
        support=Support(checkpoint=saved.append), **options,
    )  # fmt: skip
    # Through a file and back.
    parts = [json.loads(json.dumps(part)) for part in saved]
    assert sum(len(part["plans"]) for part in parts) == cut.simulated
    evaluator = FakeEvaluator(seed)
    resumed = conformance.run(SEARCHERS[name], evaluator, space, support=Support(resume=parts), **options)
    assert conformance.identity(resumed.judged) == conformance.identity(whole.judged)
    assert conformance.identity(resumed.front) == conformance.identity(whole.front)
    assert (resumed.bounded, resumed.certified) == (whole.bounded, whole.certified)
    known = {row["id"] for part in parts for row in part["plans"]}
    assert not any(point.id in known for point in evaluator.calls), "a plan was simulated again"


def test_a_checkpoint_of_another_search_is_refused() -> None:
    part = {"schema_version": "1", "seed": 1, "objectives": ["latency"], "space_size": 4, "plans": []}
    with pytest.raises(InputError, match="another seed"):
        conformance.run(ExhaustiveSearch, FakeEvaluator(0), FakeSpace(2, 2), support=Support(resume=[part]))


# --- races -----------------------------------------------------------------------------------------


def test_a_prefix_is_the_beginning_of_the_same_traffic() -> None:
    evaluator, _ = real(requests=50)
    short = prefix(evaluator.workload, 20)
    assert len(short) == 20
    np.testing.assert_array_equal(short.arrival_s, evaluator.workload.arrival_s[:20])
    assert len(prefix(evaluator.workload, 500)) == 50


def test_a_race_puts_plans_that_are_behind_last_and_excludes_none() -> None:
    evaluator, space = real(requests=100)
    points = [point for point in space if evaluator.reject(point) is None]
    race = Race(evaluator, ("latency", "energy"), requests=40)
    order, out = race.order(points)
    assert sorted(order) == list(range(len(points)))
    assert 0 < out < len(points)
    # Where the whole traffic says who is best in one objective, the beginning did not throw it out.
    best = min(
        range(len(points)),
        key=lambda i: evaluator.evaluate(points[i], interval=False).metrics["e2e_s"]["mean"],
    )
    assert order.index(best) < len(points) - out


def test_a_raced_search_that_ends_has_the_whole_front() -> None:
    evaluator, space = real(requests=1700, max_num_seqs=[64], max_num_batched_tokens=[2048, 8192])
    options: dict[str, Any] = {"objectives": ("latency", "energy")}
    plain = conformance.run(ExhaustiveSearch, evaluator, space, support=Support(race=False), **options)
    # A budget that says there is no time for all, and a clock that never uses it up.
    raced = conformance.run(ExhaustiveSearch, evaluator, space, budget_s=1e-3, **options)
    assert raced.certified
    assert raced.statistics["raced_out"] > 0
    assert conformance.identity(raced.front) == conformance.identity(plain.front)


# --- backends --------------------------------------------------------------------------------------


def test_an_evaluator_travels() -> None:
    evaluator, space = real()
    point = next(point for point in space if evaluator.reject(point) is None)
    other = _unpack(_pack(evaluator))
    assert other.evaluate(point, interval=False) == evaluator.evaluate(point, interval=False)


def test_a_worker_that_dies_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, space = real(max_num_seqs=[64], max_num_batched_tokens=[2048])
    points = [point for point in space if evaluator.reject(point) is None]

    def dead(*args: Any) -> Any:
        raise RuntimeError("a worker is gone")

    monkeypatch.setattr("planner.search.pool.judge", dead)
    pool = Joblib(evaluator, 1, "processes")
    assert pool.evaluate(points) == Here(evaluator).evaluate(points)
    assert pool.lost == 1


def test_unknown_and_missing_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, _ = real()
    with pytest.raises(InputError, match="use one of auto, threads"):
        make_pool(evaluator, 1, "slurm")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match="not installed"):
        make_pool(evaluator, 1, "ray")


def _slow(token: str, payload: bytes, points: list[Any]) -> list[Any]:
    """A worker's work, with time to be killed in."""
    time.sleep(0.3)
    return judge(token, payload, points)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_worker_is_killed_and_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    import signal
    import threading

    evaluator, space = real(requests=30)
    plain = conformance.run(ExhaustiveSearch, evaluator, space, objectives=("latency", "energy"))
    monkeypatch.setattr("planner.search.pool.judge", _slow)
    monkeypatch.setattr("planner.search.pool._TASK", 4)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = client.run(os.getpid)
        victim = sorted(pids.values())[0]
        timer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
        timer.start()
        found = conformance.run(
            ExhaustiveSearch, evaluator, space, objectives=("latency", "energy"), workers=2,
            support=Support(backend="dask"),
        )  # fmt: skip
        timer.join()
        assert victim not in client.run(os.getpid).values(), "nobody was killed"
    assert found.certified
    assert conformance.identity(found.front) == conformance.identity(plain.front)
