"""From a request to an answer: the contract's shape, honest statuses, arithmetic that agrees."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware import InputError, load_catalog
from planner.evaluate import table_sizes
from planner.objectives import objective_vector
from planner.pareto import dominates
from planner.pipeline import Planner
from planner.plans import PlanSpace
from planner.result import PlanningResult
from planner.search import ExhaustiveSearch
from tests.planner.conftest import request_of
from tests.planner.fakes import StepClock

METRICS = {
    "ttft_s", "tpot_s", "itl_s", "e2e_s", "makespan_s", "output_tokens_per_s",
    "output_tokens_per_s_per_device", "requests_per_s", "goodput_rps", "energy_j",
    "energy_j_per_output_token", "power_w", "devices", "power_w_per_device", "usd_per_hour",
    "usd_per_million_output_tokens", "mfu", "mbu", "preemptions", "prefix_hit_rate",
}  # fmt: skip
PARTS = {"weights", "kv_cache", "activations", "runtime", "free", "capacity"}
SPENT = {"gemm", "attention", "moe", "communication", "host", "idle"}
STATISTICS = {"mean", "p50", "p90", "p95", "p99"}
SMALL = {"weights": ["bf16", "fp8"], "max_num_seqs": [64, 256], "max_num_batched_tokens": [2048]}


@pytest.fixture(scope="module")
def result(planner: Planner) -> PlanningResult:
    return planner.plan(request_of(space=SMALL))


def numbers(value: Any) -> list[float]:
    """Every number inside a JSON value."""
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_the_result_has_the_contracts_shape(result: PlanningResult) -> None:
    data = result.to_dict()
    text = json.dumps(data, allow_nan=False)
    assert PlanningResult.model_validate(json.loads(text)).to_dict() == json.loads(text)
    assert all(math.isfinite(n) for n in numbers(data))
    assert data["schema_version"] == "1"
    assert data["status"] == "ok"
    assert data["request"] == request_of(space=SMALL) | {
        key: data["request"][key]
        for key in ("schema_version", "objectives", "search", "slo", "prices", "cluster")
    }
    for entry in data["plans"]:
        assert set(entry["metrics"]) >= METRICS
        assert set(entry["memory_bytes_per_device"]) == PARTS
        assert set(entry["breakdown_s"]) == SPENT
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            assert set(entry["metrics"][name]) == STATISTICS
    assert set(data["search"]) >= {
        "method", "space_size", "bounded", "simulated", "wall_s", "certified", "hypervolume", "seed",
    }  # fmt: skip
    assert set(data["provenance"]) >= {"planfront", "catalog", "cost_models"}
    for row in data["provenance"]["cost_models"]:
        assert set(row) >= {"operator", "device", "source", "kind"}


def test_every_plan_of_the_space_is_accounted_for(result: PlanningResult) -> None:
    search = result.search
    assert search.certified
    assert search.space_size == search.simulated + search.bounded + search.rejected
    assert len(result.plans) == search.simulated
    assert 0 < search.hypervolume <= 1


def test_the_front_holds_no_dominated_plan_and_the_recommended_one(result: PlanningResult) -> None:
    names = ("latency", "energy", "memory")
    values = {
        entry.id: [
            entry.metrics["e2e_s"]["mean"],
            entry.metrics["energy_j_per_output_token"],
            entry.metrics["memory_bytes"],
        ]
        for entry in result.plans
    }
    assert list(result.request["objectives"]) == list(names)
    for plan_id in result.front:
        assert not any(dominates(other, values[plan_id]) for other in values.values())
    assert result.recommended is not None
    assert result.recommended.plan_id in result.front
    assert "front" in result.recommended.reason


def test_intervals_hold_the_prediction(result: PlanningResult) -> None:
    for plan_id in result.front:
        entry = result.plan(plan_id)
        for name in ("ttft_s", "tpot_s"):
            low, high = entry.interval[name]["mean"]
            assert 0 < low <= entry.metrics[name]["mean"] <= high
        assert entry.interval["tpot_s"]["mean"][0] < entry.interval["tpot_s"]["mean"][1]


def test_the_arithmetic_of_a_plan_agrees_with_itself(result: PlanningResult) -> None:
    card = load_catalog().device("h100-sxm-80gb")
    for entry in result.plans:
        m = entry.metrics
        worker = entry.plan["worker"]
        devices = entry.plan["replicas"] * math.prod(
            worker["parallelism"][name] for name in ("tensor", "pipeline", "attention_data", "context")
        )
        tokens, requests = 60 * 64, 60
        assert m["devices"] == devices
        assert m["output_tokens_per_s"] * m["makespan_s"] == pytest.approx(tokens)
        assert m["output_tokens_per_s_per_device"] == pytest.approx(m["output_tokens_per_s"] / devices)
        assert m["requests_per_s"] * m["makespan_s"] == pytest.approx(requests)
        assert m["goodput_rps"] <= m["requests_per_s"]
        assert m["energy_j"] == pytest.approx(m["power_w"] * m["makespan_s"])
        assert m["energy_j_per_output_token"] == pytest.approx(m["energy_j"] / tokens)
        assert m["power_w_per_device"] == pytest.approx(m["power_w"] / devices)
        assert card.idle_w <= m["power_w_per_device"] <= card.tdp_w
        assert m["usd_per_hour"] == pytest.approx(card.usd_per_hour * devices)
        cost = m["usd_per_hour"] * m["makespan_s"] / 3600 / tokens * 1e6
        assert m["usd_per_million_output_tokens"] == pytest.approx(cost)
        assert 0 < m["mfu"] < 1
        assert 0 < m["mbu"] < 1
        assert 0 <= m["prefix_hit_rate"] <= 1
        assert sum(entry.breakdown_s.values()) == pytest.approx(m["makespan_s"])
        parts = dict(entry.memory_bytes_per_device)
        capacity = parts.pop("capacity")
        assert sum(parts.values()) == pytest.approx(capacity)
        assert capacity == card.memory_bytes
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            row = m[name]
            assert row["p50"] <= row["p90"] <= row["p95"] <= row["p99"]
        assert m["e2e_s"]["mean"] == pytest.approx(m["ttft_s"]["mean"] + 63 * m["tpot_s"]["mean"])


def test_pruned_and_unpruned_planning_agree(planner: Planner, result: PlanningResult) -> None:

    question = planner.load(request_of(space=SMALL))
    space = PlanSpace(question.spec, question.cluster, question.engine, question.request.space)
    tokens, seqs = table_sizes(space)
    outcome = ExhaustiveSearch(prune=False).search(
        question.evaluator(table_tokens=tokens, table_seqs=seqs),
        space,
        question.request.objectives,
        budget_s=60,
        seed=0,
        clock=StepClock(),
    )
    assert [item.point.id for item in outcome.front] == result.front


def test_no_simulated_plan_beats_its_bound(planner: Planner) -> None:

    every = ("latency", "throughput", "energy", "memory", "cost", "ttft", "tpot")
    for options in (
        {"space": SMALL},
        {"model": "qwen3-30b-a3b", "rate_rps": 40.0, "space": {**SMALL, "replicas": [1]}},
        {"engine": "sglang", "rate_rps": 100.0, "space": SMALL},
    ):
        question = planner.load(request_of(**options))
        evaluator = question.evaluator()
        space = PlanSpace(question.spec, question.cluster, question.engine, question.request.space)
        for point in list(space)[::3]:
            if evaluator.reject(point) is None:
                metrics = evaluator.evaluate(point, interval=False).metrics
                bound = evaluator.bound_vector(point, every, evaluator.bounds(point))
                value = objective_vector(every, metrics)
                assert np.all(bound <= value + 1e-9 * np.abs(value)), (point.label(), bound, value)


def test_evaluating_a_plan_of_the_front_gives_its_entry(planner: Planner, result: PlanningResult) -> None:
    entry = result.plan(result.front[0])
    answer = planner.evaluate({**request_of(), "plan": entry.plan, "id": "x"})
    assert answer["status"] == "ok"
    again = answer["plans"][0]
    assert again["id"] == entry.id
    for name in ("makespan_s", "energy_j", "usd_per_million_output_tokens"):
        assert again["metrics"][name] == pytest.approx(entry.metrics[name], rel=1e-3)
    json.dumps(answer, allow_nan=False)


def test_threads_give_the_same_front(planner: Planner, result: PlanningResult) -> None:
    assert planner.plan(request_of(space=SMALL), workers=2).front == result.front


def test_nearest_misses_are_given_when_nothing_meets_the_slo(planner: Planner) -> None:
    answer = planner.plan(request_of(space=SMALL, slo={"tpot_s": {"p95": 1e-5}}))
    assert answer.status == "infeasible"
    assert answer.front == []
    assert answer.recommended is not None
    assert "no plan meets the SLO" in answer.recommended.reason
    assert "tpot_s p95" in answer.recommended.reason
    nearest = answer.plan(answer.recommended.plan_id)
    assert not nearest.meets_slo
    miss = nearest.slo_misses[0]
    assert miss["distance"] == pytest.approx(miss["value_s"] / miss["bound_s"] - 1)
    distances = [entry.slo_misses[0]["distance"] for entry in answer.plans]
    assert distances[0] == min(distances)
    json.dumps(answer.to_dict(), allow_nan=False)


def test_a_model_that_fits_nowhere_is_infeasible_with_the_reason(planner: Planner) -> None:
    answer = planner.plan(request_of("llama-3.1-405b", devices=1, space={"weights": ["bf16"]}))
    assert answer.status == "infeasible"
    assert answer.recommended is None
    assert answer.plans == []
    assert answer.rejected[0].reason.startswith("weights need 811.")
    json.dumps(answer.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("device", "weights"), [("t4", "int8"), ("v100-sxm2-32gb", "int4")])
def test_what_is_not_quantized_runs_in_the_device_s_own_16_bits(
    planner: Planner, device: str, weights: str
) -> None:
    """Devices without bf16: the head and the experts' routers beside 8-bit activations are fp16."""
    plan = {"worker": {"quantization": {"weights": weights}}}
    answer = planner.evaluate({**request_of(device=device, devices=1), "plan": plan})
    assert answer["status"] == "ok", answer


def test_a_model_too_large_for_a_device_without_bf16_is_told_what_would_help(planner: Planner) -> None:
    answer = planner.plan(request_of(device="t4", devices=1))
    assert answer.status == "infeasible"
    assert "int8 weights" in [row["words"] for row in answer.to_dict()["changes"]]


def test_an_engine_that_does_not_run_on_a_device_is_an_answer(planner: Planner) -> None:
    amd = {"pools": [{"device": "mi300x-192gb", "nodes": 1, "devices_per_node": 4}]}
    found = planner.evaluate(request_of(engine="trtllm", cluster=amd), {"worker": {}})
    assert found["status"] == "infeasible"
    assert found["rejected"][0]["reason"] == "TensorRT-LLM runs on NVIDIA devices only, not on mi300x-192gb"


def test_trtllm_spreads_attention_by_requests_or_by_heads() -> None:
    pool = {"pools": [{"device": "h200-sxm-141gb", "nodes": 1, "devices_per_node": 8}]}
    asked = request_of("deepseek-v3", engine="trtllm", cluster=pool, requests=4)
    both = {"worker": {"parallelism": {"tensor": 2, "attention_data": 4, "expert": 8}}}
    found = Planner().evaluate(asked, both)
    assert found["status"] == "infeasible"
    assert "attention_data 4 goes with tensor 1" in found["rejected"][0]["reason"]
    alone = {"worker": {"parallelism": {"tensor": 1, "attention_data": 8, "expert": 8}}}
    assert Planner().evaluate(asked, alone)["status"] == "ok"


def test_a_plan_that_does_not_fit_is_an_answer(planner: Planner) -> None:
    answer = planner.evaluate({**request_of("llama-3.1-70b"), "plan": {"worker": {}}})
    assert answer["status"] == "infeasible"
    assert answer["plans"] == []
    assert answer["rejected"][0]["reason"].startswith("weights need 141.1 GB of ")
    assert answer["rejected"][0]["field"] == ""
    assert answer["rejected"][0]["plan"]["worker"]["parallelism"]["tensor"] == 1


@pytest.mark.parametrize(
    ("plan", "field", "words"),
    [
        ({"worker": {"parallelism": {"tensor": 3}}}, "plan.worker.parallelism", "3"),
        ({"replicas": 3, "worker": {}}, "plan.replicas", "the plan takes 3 devices, pool 'main' has 2"),
        ({"worker": {"quantization": {"activations": "fp4"}}}, "plan.worker.quantization", "fp4"),
        ({"worker": {"gpu_clock_hz": 3e8}}, "plan.worker.gpu_clock_hz", "300 MHz is outside"),
    ],
)
def test_a_plan_that_cannot_be_built_names_its_field(
    planner: Planner, plan: dict[str, Any], field: str, words: str
) -> None:
    answer = planner.evaluate({**request_of(), "plan": plan})
    assert answer["status"] == "infeasible"
    assert answer["rejected"][0]["field"] == field
    assert words in answer["rejected"][0]["reason"]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"model": "llama-9"}, "model"),
        ({"cluster": {"pools": [{"device": "h1000"}]}}, "cluster.pools[0].device"),
        ({"prices": {"h1000": 1.0}}, "prices.h1000"),
        ({"prices": {"l40s": 1.0, "L40S": 2.0}}, "prices.L40S"),
        ({"engine": {"name": "vllm", "version": "0.1"}}, "engine.version"),
        ({"space": {"tensor": [3]}}, "space"),
        ({"space": {"gpu_clock_hz": [1410]}}, "space.gpu_clock_hz[0]"),
        ({"search": {"method": "annealing"}}, "search.method"),
        ({"workload": {"trace": {"path": "/nowhere/x.jsonl"}}}, "workload.trace.path"),
    ],
)
def test_what_cannot_be_used_is_refused_at_its_path(
    planner: Planner, change: dict[str, Any], path: str
) -> None:
    with pytest.raises(InputError) as caught:
        planner.plan({**request_of(), **change})
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


def test_no_file_is_read_where_paths_are_not_allowed() -> None:
    closed = Planner(allow_paths=False)
    for change, path in (
        ({"workload": {"trace": {"path": "x.jsonl"}}}, "workload.trace.path"),
        ({"cluster": {"pools": [{"topology": "x.yaml"}]}}, "cluster.pools[0].topology"),
        ({"model": "/etc"}, "model"),
    ):
        with pytest.raises(InputError) as caught:
            closed.load({**request_of(), **change})
        assert caught.value.path == path


def test_evaluate_asks_for_its_plan(planner: Planner) -> None:
    with pytest.raises(InputError, match=r"^plan: "):
        planner.evaluate(request_of())


def test_prices_change_cost_and_nothing_else(planner: Planner) -> None:
    plan: dict[str, Any] = {"worker": {}}
    one = planner.evaluate({**request_of(prices={"h100-sxm-80gb": 2.0}), "plan": plan})["plans"][0]["metrics"]
    two = planner.evaluate({**request_of(prices={"H100-SXM-80GB": 6.0}), "plan": plan})["plans"][0]["metrics"]
    assert one["usd_per_hour"] == 2.0
    assert two["usd_per_million_output_tokens"] == pytest.approx(3 * one["usd_per_million_output_tokens"])
    assert one["energy_j"] == two["energy_j"]


def test_a_search_cut_short_says_so_and_still_answers(planner: Planner) -> None:
    answer = planner.plan(request_of(search={"budget_s": 0.5}), clock=StepClock(0.2))
    assert not answer.search.certified
    assert "budget" in answer.search.reason
    assert answer.search.simulated >= 1
    assert answer.front


def test_answers_of_one_token_have_no_tpot_and_no_nan(planner: Planner) -> None:
    answer = planner.plan(
        request_of(outputs=1, space=SMALL, objectives=["tpot", "ttft"], slo={"tpot_s": {"p95": 0.1}})
    )
    assert answer.status == "ok"
    json.dumps(answer.to_dict(), allow_nan=False)
    assert answer.plans[0].metrics["tpot_s"]["mean"] is None


def test_a_closed_loop_of_few_clients_runs_on_a_plan_of_many_sequences(planner: Planner) -> None:
    request = request_of()
    request["workload"]["synthetic"]["arrivals"] = {"process": "closed", "concurrency": 3}
    answer = planner.evaluate({**request, "plan": {"worker": {}}})
    assert answer["status"] == "ok"


def test_files_that_changed_are_read_again(tmp_path: Path) -> None:
    trace, folder = tmp_path / "t.jsonl", tmp_path / "model"
    folder.mkdir()
    row = '{"arrival_s": 0, "input_tokens": 100, "output_tokens": 10}\n'
    config = {
        "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 4096, "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    asked = request_of(model="./model", workload={"trace": {"path": "t.jsonl"}})
    planner = Planner(base_dir=tmp_path)
    counts, layers = [], []
    for times in (1, 3):
        trace.write_text(row * times)
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 8 * times}))
        question = planner.load(asked)
        counts.append(len(question.workload))
        layers.append(question.spec.num_layers)
    assert (counts, layers) == ([1, 3], [8, 24])


def test_two_models_of_one_name_do_not_share_their_tables(planner: Planner) -> None:

    question = planner.load(request_of())
    spec, layers = question.spec, question.spec.num_layers
    smaller = replace(
        spec,
        layers=tuple(replace(group, count=group.count // 2) for group in spec.layers),
        layer_order=spec.layer_order[: layers // 2],
    )
    other = replace(question, spec=smaller)
    shared: dict[tuple[Any, ...], Any] = {}
    point = next(iter(PlanSpace(spec, question.cluster, question.engine, question.request.space)))
    full = question.evaluator(tables=shared).evaluate(point, interval=False).metrics
    half = other.evaluator(tables=shared).evaluate(point, interval=False).metrics
    assert half["tpot_s"]["mean"] < 0.8 * full["tpot_s"]["mean"]


def test_a_lower_clock_trades_time_for_energy(planner: Planner) -> None:
    clocks = [None, 1.41e9, 1e9]
    asked = request_of(
        objectives=["latency", "energy"],
        space={**SMALL, "gpu_clock_hz": clocks, "tensor": [1], "pipeline": [1], "replicas": [1]},
    )
    found = planner.plan(asked).to_dict()
    assert found["search"]["certified"]
    by_clock: dict[Any, dict[Any, dict[str, Any]]] = {}
    for entry in found["plans"]:
        worker = entry["plan"]["worker"]
        rest = json.dumps({**worker, "gpu_clock_hz": None}, sort_keys=True)
        by_clock.setdefault(rest, {})[worker["gpu_clock_hz"]] = entry["metrics"]
    compared = [rows for rows in by_clock.values() if len(rows) == len(clocks)]
    assert compared
    for rows in compared:
        e2e = [rows[clock]["e2e_s"]["mean"] for clock in clocks]
        joules = [rows[clock]["energy_j_per_output_token"] for clock in clocks]
        assert e2e == sorted(e2e)
        assert joules[0] > joules[1]
    on_front = {e["plan"]["worker"]["gpu_clock_hz"] for e in found["plans"] if e["id"] in found["front"]}
    assert None in on_front
    assert len(on_front) > 1
    kinds = {row["kind"] for row in found["provenance"]["cost_models"] if "MHz" in row["source"]}
    assert kinds == {"transferred"}


def test_hosts_and_cooling_are_on_the_meter() -> None:
    request = {
        "model": "llama-3.1-8b",
        "cluster": {"pools": [{"name": "a", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 1}]},
        "workload": {"synthetic": {"preset": "chat", "requests": 50}},
        "plan": {"worker": {"parallelism": {"tensor": 1}}},
    }
    planner = Planner()
    bare = planner.evaluate(request)["plans"][0]["metrics"]
    met = planner.evaluate({**request, "site": {"pue": 1.3, "host_w_per_device": 150}})["plans"][0]["metrics"]
    assert met["power_w"] == pytest.approx(1.3 * (bare["power_w"] + 150))
    assert met["energy_j"] == pytest.approx(1.3 * (bare["energy_j"] + 150 * bare["makespan_s"]))
    assert met["ttft_s"] == bare["ttft_s"]
    with pytest.raises(InputError) as caught:
        planner.evaluate({**request, "site": {"pue": 0.9}})
    assert caught.value.path == "site.pue"
