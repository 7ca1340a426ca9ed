"""Regret, trade-offs and what would have to change, by small examples that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from planner.evaluate import Evaluation
from planner.explain import (
    miss_distance,
    nearest_ways,
    relaxed_slos,
    robustness,
    too_close,
    trade_offs,
    variations,
)
from planner.objectives import objective_vector, slo_misses
from planner.pipeline import Planner
from planner.search import Judged
from tests.planner.conftest import request_of
from tests.planner.fakes import FakeEvaluator, FakeSpace


def judged(values: dict[str, float], slo: Any = None, index: int = 0) -> Judged:
    point = list(FakeSpace(3, 3))[index]
    metrics = FakeEvaluator(0).metrics(point)
    for name, value in values.items():
        if name in ("ttft_s", "tpot_s", "e2e_s"):
            metrics[name] = dict.fromkeys(metrics[name], value)
        else:
            metrics[name] = value
    evaluation = Evaluation(point, metrics, FakeEvaluator(0).memory(point), {}, {})
    wanted = ("latency", "energy")
    return Judged(
        evaluation,
        tuple(float(v) for v in objective_vector(wanted, metrics)),
        tuple(slo_misses(slo or {}, metrics)),
    )


def interval(item: Judged, low: float, high: float) -> Evaluation:
    value = item.objectives[0]
    energy = item.evaluation.metrics["energy_j"] = 100.0 * item.objectives[1]
    return replace(
        item.evaluation,
        interval={"e2e_s": {"mean": (value * low, value * high)}, "energy_j": {"value": (energy, energy)}},
    )


def test_a_plan_with_a_wide_interval_has_regret() -> None:
    front = [
        judged({"e2e_s": 1.0, "energy_j_per_output_token": 4.0}),
        judged({"e2e_s": 2.0, "energy_j_per_output_token": 2.0}, index=1),
        judged({"e2e_s": 4.0, "energy_j_per_output_token": 1.0}, index=2),
    ]
    objectives = ("latency", "energy")
    sure = robustness(front, [interval(item, 1.0, 1.0) for item in front], objectives, {})
    assert sure.regret[1] == 0.0, "the knee is nearest in every scenario when there is one only"
    wild = robustness(
        front,
        [interval(front[0], 1.0, 1.0), interval(front[1], 0.9, 3.0), interval(front[2], 1.0, 1.0)],
        objectives,
        {"e2e_s": {"mean": 5.0}},
    )
    assert wild.regret[1] > sure.regret[1]
    assert wild.risks == ((), ("e2e_s mean (6 s of 5 s)",), ())
    assert "misses e2e_s mean" in wild.words(1, ["a", "b", "c"])
    assert sure.words(1, ["a", "b", "c"]).startswith("robust")
    # What all plans share of their error changes no order.
    shared = {"tpot": (1 / 1.01, 1.01), "ttft": (1 / 1.01, 1.01)}
    wide = [interval(item, 0.5, 2.0) for item in front]
    assert robustness(front, wide, objectives, {}, shared).regret[1] < 0.01
    assert robustness(front, wide, objectives, {}).regret[1] > 0.03


def test_a_front_narrower_than_its_intervals_is_told_in_words_not_in_shares() -> None:
    front = [
        judged({"e2e_s": 1.0, "energy_j_per_output_token": 1.001}),
        judged({"e2e_s": 1.001, "energy_j_per_output_token": 1.0}, index=1),
    ]
    sure = robustness(front, [interval(item, 0.7, 1.4) for item in front], ("latency", "energy"), {})
    assert min(sure.regret) > 100
    assert sure.words(0, ["a", "b"]) == (
        "the plans of the front differ by less than their 90 % intervals, so any of them may turn out best"
    )
    wide = replace(sure, regret=(250.0, 0.2))
    assert "more than the front's spread behind, b at most 20 %" in wide.words(0, ["a", "b"])


def test_plans_that_differ_by_less_than_their_own_errors_are_too_close() -> None:
    error = {"tpot": (0.8, 1.25), "ttft": (0.5, 2.0)}
    both = math.hypot(math.log(1.25), math.log(1.25))
    assert too_close(error, "tpot_s", 1.0, math.exp(both) - 1e-9)
    assert not too_close(error, "tpot_s", math.exp(both) + 1e-9, 1.0)
    assert too_close(error, "ttft_s", 1.0, 2.5)
    assert too_close(error, "tpot_s", 0.0, 0.0)
    assert not too_close(error, "tpot_s", 0.0, 1.0)


def test_trade_offs_say_what_the_best_of_an_objective_costs() -> None:
    front = [
        judged({"e2e_s": 1.0, "energy_j_per_output_token": 4.0}),
        judged({"e2e_s": 2.0, "energy_j_per_output_token": 2.0}, index=1),
    ]
    rows = trade_offs(front, ("latency", "energy"), front[1])
    assert rows == [
        {"objective": "latency", "plan_id": front[0].point.id, "gain": 0.5, "price": {"energy": 1.0}}
    ]


def test_the_slo_is_relaxed_to_what_the_nearest_plans_reach() -> None:
    slo = {"ttft_s": {"p95": 1.0}, "tpot_s": {"p95": 1.0}}
    items = [
        judged({"ttft_s": 1.5004, "tpot_s": 0.5}, slo),
        judged({"ttft_s": 0.5, "tpot_s": 3.0}, slo, 1),
        judged({"ttft_s": 9.0, "tpot_s": 9.0}, slo, 2),
    ]
    rows = relaxed_slos(items)
    assert [row["change"] for row in rows] == [
        {"slo.ttft_s.p95": [1.0, 1.51]},
        {"slo.tpot_s.p95": [1.0, 3.0]},
    ]
    both = relaxed_slos(items[2:])
    assert both[0]["change"] == {"slo.ttft_s.p95": [1.0, 9.0], "slo.tpot_s.p95": [1.0, 9.0]}


def test_variations_leave_the_request_as_it_is() -> None:
    request = {"cluster": {"pools": [{"name": "main", "nodes": 1, "devices_per_node": 2}]}, "space": {}}
    rows = variations(request, ["fp8"])
    assert [row[1] for row in rows] == [
        "int8 weights",
        "int4 weights",
        "fp4 weights",
        "4 devices of pool 'main' in place of 2",
        "8 devices of pool 'main' in place of 2",
        "16 devices of pool 'main' in place of 2",
    ]
    assert request["cluster"]["pools"][0]["nodes"] == 1


@pytest.mark.parametrize(
    ("workload", "rates"),
    [
        ({"trace": {"path": "t.csv", "rate_scale": 2.0}}, [1.0, 0.5, 0.25]),
        ({"synthetic": {"arrivals": {"process": "gamma", "rate_rps": 8.0, "cv": 2.0}}}, [4.0, 2.0, 1.0]),
        ({"synthetic": {"preset": "chat", "arrivals": None}}, [2.0, 1.0, 0.5]),
        ({"synthetic": {"arrivals": {"process": "closed", "concurrency": 8}}}, []),
    ],
)
def test_less_traffic_is_tried_where_it_has_a_rate(workload: dict[str, Any], rates: list[float]) -> None:
    request = {"cluster": {"pools": [{"name": "main"}]}, "space": {}, "workload": workload}
    rows = [row for row in variations(request, ["fp8", "int8", "int4", "fp4"]) if row[0] == "traffic"]
    names = ["half of the traffic", "a quarter of the traffic", "an eighth of the traffic"]
    assert [row.words for row in rows] == names[: len(rates)]
    for row, rate in zip(rows, rates, strict=True):
        changed = row.request["workload"]
        if "trace" in changed:
            assert changed["trace"] == {"path": "t.csv", "rate_scale": rate}
        else:
            before = workload["synthetic"]["arrivals"] or {"process": "gamma", "cv": 1.3}
            assert changed["synthetic"]["arrivals"] == {**before, "rate_rps": rate}


def test_the_most_traffic_that_a_cluster_can_serve_is_told() -> None:
    asked = request_of(
        "llama-3.1-8b",
        devices=1,
        requests=60,
        rate_rps=120.0,
        slo={"ttft_s": {"p95": 0.1}},
        space={"weights": ["bf16"], "kv_cache": ["bf16"]},
        search={"budget_s": 20},
    )
    result = Planner().plan(asked)
    told = [row for row in result.changes if row["kind"] == "traffic"]
    assert len(told) == 1
    assert Planner().plan({**asked, **told[0]["change"]}, changes=False).status == "ok"


def test_an_infeasible_request_is_told_what_would_help() -> None:
    asked = request_of(
        "llama-3.1-70b",
        devices=1,
        requests=20,
        rate_rps=0.5,
        slo={"tpot_s": {"p95": 0.2}},
        space={"weights": ["bf16"]},
        search={"budget_s": 20},
    )
    result = Planner().plan(asked)
    assert result.status == "infeasible"
    kinds = {row["kind"] for row in result.changes}
    assert kinds == {"quantization", "devices"}
    for row in result.changes:
        again = {**asked, **row["change"]}
        again["search"] = {"budget_s": 5}
        other = Planner().plan(again, changes=False)
        assert other.status == "ok", row["words"]


def test_a_front_tells_its_regret_and_trades(planner: Planner) -> None:
    result = planner.plan(request_of(space={"max_num_batched_tokens": [2048]}))
    assert result.recommended is not None
    assert all(result.plan(ident).regret is not None for ident in result.front)
    if len(result.front) > 1:
        assert "90 % interval" in result.recommended.reason
    for row in result.recommended.trade_offs:
        assert row["gain"] > 0
        assert row["plan_id"] in result.front
    assert result.search.gap is not None
    assert result.search.gap["open"] == 0
    assert result.search.gap["hypervolume"]["ratio"] == pytest.approx(1.0)


def missed(tensor: int, sequences: int, *distances: float) -> dict[str, Any]:
    worker = {"parallelism": {"tensor": tensor}, "batching": {"max_num_seqs": sequences}}
    return {
        "id": f"{tensor}-{sequences}",
        "plan": {"serving": "aggregated", "replicas": 1, "worker": worker},
        "slo_misses": [{"metric": "ttft_s", "distance": distance} for distance in distances],
    }


def test_of_each_way_only_the_nearest_batching_is_listed() -> None:
    entries = [missed(2, 8, 0.5, 0.1), missed(2, 64, 0.4), missed(4, 8, 0.45), missed(4, 64, 0.45)]
    entries.append(missed(8, 8, 9.0))
    assert [miss_distance(entry) for entry in entries] == [0.5, 0.4, 0.45, 0.45, 9.0]
    assert [entry["id"] for entry in nearest_ways(entries, 5)] == ["2-64", "4-8", "8-8"]
    assert [entry["id"] for entry in nearest_ways(entries, 2)] == ["2-64", "4-8"]
    assert nearest_ways([], 3) == []
    assert miss_distance({"slo_misses": []}) == 0.0


def test_halves_of_a_disaggregated_plan_are_told_apart_by_all_but_batching() -> None:
    def halves(prefill: dict[str, Any], decode: dict[str, Any], distance: float) -> dict[str, Any]:
        plan = {"prefill": {"replicas": 1, "worker": prefill}, "decode": {"replicas": 1, "worker": decode}}
        return {"id": f"{distance}", "plan": plan, "slo_misses": [{"distance": distance}]}

    one, two = ({"tensor": n, "batching": {"max_num_seqs": n}} for n in (1, 2))
    other = {"tensor": 1, "batching": {"max_num_seqs": 64}}
    entries = [halves(one, two, 0.3), halves(other, two, 0.2), halves(two, two, 0.4)]
    assert [entry["id"] for entry in nearest_ways(entries, 9)] == ["0.2", "0.4"]
