"""Checkpoints, races, and workers that die."""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
from planner.search.pool import Here, Workers, _pack, _unpack, judge, make_pool
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


#: Set in workers by `_deadly`: which plan kills, how often, and where that is counted.
_KILLS = "PLANFRONT_TEST_KILLS"


def _deadly(token: str, payload: bytes, task: Any) -> Any:
    """A worker's work; a plan (by its id) kills the process, as often as said."""
    victim, times, log = os.environ[_KILLS].split(":")
    for _, point in task:
        if point.id == victim and Path(log).stat().st_size < int(times):
            with open(log, "a") as out:
                out.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
    with open(log + ".done", "a") as out:
        out.write("".join(f"{point.id}\n" for _, point in task))
    return judge(token, payload, task)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["processes", "dask", "ray"])
def test_a_worker_is_killed_and_the_search_goes_on(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluator, space = real(requests=20)
    plain = conformance.run(ExhaustiveSearch, evaluator, space, objectives=("latency", "energy"))
    log = tmp_path / "kills"
    log.touch()
    monkeypatch.setenv(_KILLS, f"{plain.front[0].point.id}:1:{log}")
    monkeypatch.setattr("planner.search.pool.judge", _deadly)
    with CLUSTERS[backend]():
        found = conformance.run(
            ExhaustiveSearch, evaluator, space, objectives=("latency", "energy"), workers=2,
            support=Support(backend=backend),
        )  # fmt: skip
    assert log.read_text() == "x", "nobody was killed"
    assert found.certified
    assert conformance.identity(found.front) == conformance.identity(plain.front)
    # What had arrived was not done again: only what was under way, a task of each worker.
    done = Counter(Path(f"{log}.done").read_text().split())
    assert sum(count - 1 for count in done.values()) <= 2 * 16


@contextmanager
def _loky() -> Iterator[None]:
    from joblib.externals.loky import get_reusable_executor

    # New processes see this test's environment, and later tests do not.
    get_reusable_executor().shutdown(wait=True)
    yield
    get_reusable_executor().shutdown(wait=True)


@contextmanager
def _dask() -> Iterator[None]:
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster),
    ):
        yield


@contextmanager
def _ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    yield
    assert not ray.is_initialized(), "the local cluster was left behind"


CLUSTERS = {"processes": _loky, "dask": _dask, "ray": _ray}


class _Scripted(Workers):
    """Workers of which a script says what kills them."""

    def __init__(self, evaluator: Evaluator, deadly: Callable[[Any], bool]) -> None:
        super().__init__(evaluator, 2)
        self.deadly, self.ran = deadly, Counter[int]()

    def _open(self) -> None:
        pass

    def _run(self, tasks: Any) -> Any:
        for task in tasks:
            if self.deadly(task):
                raise RuntimeError("a worker is gone")
            self.ran.update(index for index, _ in task)
            yield judge(self._token, self._payload, task)


def test_results_that_have_arrived_outlive_a_worker() -> None:
    evaluator, space = real(requests=20)
    points = [point for point in space if evaluator.reject(point) is None][:48]
    here = Here(evaluator).evaluate(points)
    left = [2]

    def twice(task: Any) -> bool:
        left[0] -= any(index == 20 for index, _ in task)
        return left[0] >= 0 and any(index == 20 for index, _ in task)

    pool = _Scripted(evaluator, twice)
    assert pool.evaluate(points) == here
    assert set(pool.ran.values()) == {1}, "finished work was done again"
    assert (pool.deaths, pool.lost) == (2, 0)
    # A plan that kills whoever runs it is given up, the others are not.
    pool = _Scripted(evaluator, lambda task: any(index == 20 for index, _ in task))
    found = pool.evaluate(points)
    assert found[20] is None
    assert [*found[:20], *found[21:]] == [*here[:20], *here[21:]]
    assert (pool.lost, pool.gone) == (1, False)
    # Where nothing gets through any more, the work is done here, from then on at once.
    pool = _Scripted(evaluator, lambda task: True)
    assert pool.evaluate(points) == here
    deaths = pool.deaths
    assert pool.gone
    assert pool.evaluate(points) == here
    assert pool.deaths == deaths


def test_a_search_that_gives_a_plan_up_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, space = real(requests=20, max_num_seqs=[64], max_num_batched_tokens=[2048])
    plain = conformance.run(ExhaustiveSearch, evaluator, space, objectives=("latency", "energy"))
    victim = plain.front[0].point
    pool = _Scripted(evaluator, lambda task: any(point == victim for _, point in task))
    monkeypatch.setattr("planner.search.run.make_pool", lambda *args, **more: pool)
    for searcher in SEARCHERS.values():
        found = conformance.run(searcher, evaluator, space, objectives=("latency", "energy"), workers=2)
        assert victim not in [item.point for item in found.judged]
        assert not found.certified
        assert "killed every worker" in found.reason
        assert found.gap is not None
        assert found.gap.open >= 1


def test_what_goes_wrong_with_a_plan_is_no_dead_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, space = real(requests=20)
    point = next(iter(space))

    def wrong(*args: Any, **more: Any) -> Any:
        raise InputError("plan", "cannot be")

    monkeypatch.setattr(Evaluator, "evaluate", wrong)
    pool = _Scripted(evaluator, lambda task: False)
    with pytest.raises(InputError, match="cannot be"):
        pool.evaluate([point])
    assert pool.deaths == 0
    error = pickle.loads(pickle.dumps(InputError("plan", "cannot be")))
    assert (error.path, error.message) == ("plan", "cannot be")


def test_unknown_and_missing_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, _ = real()
    with pytest.raises(InputError, match="use one of auto, threads"):
        make_pool(evaluator, 1, "slurm")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match="not installed"):
        make_pool(evaluator, 1, "ray")
