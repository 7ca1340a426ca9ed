"""Disaggregated plans: what can be one, their space, what they cost, and the front beside aggregated ones."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from hardware import InputError
from planner import Planner, parse_plan
from planner.evaluate_pair import PairEvaluator
from planner.objectives import objective_vector, slo_misses
from planner.pairs import PairPoint, PairSpace, check, pair_sizes, resolve
from planner.pareto import non_dominated
from planner.pipeline import Judges, Question, Spaces
from planner.request import SpaceLimits

REQUEST: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": {"pools": [{"name": "main", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 4}]},
    "workload": {
        "synthetic": {
            "arrivals": {"process": "poisson", "rate_rps": 8.0},
            "requests": 60,
            "input_tokens": {"distribution": "lognormal", "mean": 900, "cv": 0.8},
            "output_tokens": {"distribution": "lognormal", "mean": 120, "cv": 0.7},
        }
    },
    "space": {"serving": ["disaggregated"], "weights": ["bf16"], "kv_cache": ["bf16"], "tensor": [1, 2]},
}
PLAN: dict[str, Any] = {
    "serving": "disaggregated",
    "prefill": {"replicas": 1, "worker": {"parallelism": {"tensor": 1}}},
    "decode": {"replicas": 2, "worker": {"parallelism": {"tensor": 1}}},
}


def asked(**changes: Any) -> dict[str, Any]:
    """The request with parts of it replaced."""
    return {**deepcopy(REQUEST), **changes}


def synthetic(**changes: Any) -> dict[str, Any]:
    """Its traffic with parts of it replaced."""
    return {"synthetic": {**deepcopy(REQUEST["workload"]["synthetic"]), **changes}}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


@pytest.fixture(scope="module")
def question(planner: Planner) -> Question:
    return planner.load(REQUEST)


def point_of(question: Question, plan: dict[str, Any]) -> PairPoint:
    found = resolve(parse_plan(plan), question.spec, question.cluster, question.engine)
    assert isinstance(found, PairPoint)
    return found


# --- plans -----------------------------------------------------------------------------------------


def test_a_plan_states_every_value_and_comes_back_as_it_is(question: Question) -> None:
    point = point_of(question, PLAN)
    assert point.devices == 3
    plan = point.to_dict()
    assert plan["serving"] == "disaggregated"
    assert plan["decode"]["replicas"] == 2
    assert plan["prefill"]["worker"]["prefix_caching"] is True  # the engine's default
    assert plan["decode"]["worker"]["prefix_caching"] is False
    assert point_of(question, plan) == point
    assert point.id == point_of(question, plan).id
    assert point.id != point_of(question, {**PLAN, "prefill": PLAN["decode"]}).id
    assert point.label() == "TP1 bf16 kv-bf16 b1024/8192 prefill + 2x TP1 bf16 kv-bf16 b1024/8192 decode"


@pytest.mark.parametrize(
    ("role", "worker", "path"),
    [
        ("prefill", {"pool": "other"}, "plan.prefill.worker.pool"),
        ("decode", {"parallelism": {"context": 2}}, "plan.decode.worker.parallelism.context"),
        ("decode", {"speculative": {"method": "mtp"}}, "plan.decode.worker.speculative"),
        ("decode", {"prefix_caching": True}, "plan.decode.worker.prefix_caching"),
    ],
)
def test_what_is_not_modelled_is_refused_at_its_path(
    question: Question, role: str, worker: dict[str, Any], path: str
) -> None:
    plan = deepcopy(PLAN)
    plan[role]["worker"] = worker
    with pytest.raises(InputError) as caught:
        point_of(question, plan)
    assert caught.value.path == path


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"decode": {"replicas": 4, "worker": {}}}, "decode.replicas", "takes 5 devices"),
        (
            {"decode": {"worker": {"quantization": {"kv_cache": "fp8"}}}},
            "decode.worker.quantization.kv_cache",
            "prefill workers in bf16 and decode workers in fp8",
        ),
        (
            {"prefill": {"worker": {"parallelism": {"tensor": 3}}}},
            "prefill.worker.parallelism",
            "prefill workers:",
        ),
    ],
)
def test_what_cannot_be_a_pair_says_why(
    planner: Planner, question: Question, change: dict[str, Any], field: str, words: str
) -> None:
    plan = {**deepcopy(PLAN), **change}
    problem = check(point_of(question, plan), question.spec, question.cluster, question.engine)
    assert problem is not None
    assert problem.field == field
    assert words in problem.reason
    answer = planner.evaluate(asked(), plan)
    assert answer["status"] == "infeasible"
    assert answer["rejected"][0]["field"] == f"plan.{field}"
    assert words in answer["rejected"][0]["reason"]


def test_memory_that_a_worker_lacks_names_the_worker(planner: Planner) -> None:
    plan = deepcopy(PLAN)
    plan["prefill"]["worker"]["memory_fraction"] = 0.1
    answer = planner.evaluate(asked(), plan)
    assert answer["rejected"][0]["reason"].startswith("prefill workers: ")


def test_state_of_recurrent_layers_goes_between_workers_cut_alike_in_vllm(planner: Planner) -> None:
    request = asked(model="nemotron-nano-9b-v2")
    question = planner.load(request)
    plan = deepcopy(PLAN)
    plan["decode"] = {"replicas": 1, "worker": {"parallelism": {"tensor": 2}}}
    problem = check(point_of(question, plan), question.spec, question.cluster, question.engine)
    assert problem is not None
    assert problem.field == "decode.worker.parallelism.tensor"


# --- the space -------------------------------------------------------------------------------------


def test_the_space_counts_what_it_holds_and_fits_the_pool(question: Question) -> None:
    space = PairSpace(question.spec, question.cluster, question.engine, question.request.space)
    points = list(space)
    assert len(points) == len(space) == len({point.id for point in points})
    assert all(point.devices <= 4 for point in points)
    counts = {(p.prefill.tensor, p.prefill.replicas, p.decode.tensor, p.decode.replicas) for p in points}
    assert counts == {
        (here, one, there, two)
        for here in (1, 2)
        for there in (1, 2)
        for one in range(1, 5)
        for two in range(1, 5)
        if here * one + there * two <= 4
    }
    assert {p.decode.prefix_caching for p in points} == {False}
    assert len({p.prefill.max_num_batched_tokens for p in points}) == 3
    assert len({p.decode.max_num_seqs for p in points}) == 3
    tokens, seqs = pair_sizes(space)
    parts = [part for point in points for part in (point.prefill, point.decode)]
    assert tokens == max(part.max_num_batched_tokens for part in parts)
    assert seqs == max(part.max_num_seqs for part in parts)


def test_limits_hold_for_both_kinds_of_workers(question: Question) -> None:
    limits = SpaceLimits(tensor=(2,), replicas=(1,), max_num_seqs=(32,), max_num_batched_tokens=(4096,))
    for point in PairSpace(question.spec, question.cluster, question.engine, limits):
        assert (point.prefill.tensor, point.decode.tensor) == (2, 2)
        assert (point.prefill.replicas, point.decode.replicas) == (1, 1)
        assert point.decode.max_num_seqs == 32
        assert point.prefill.max_num_batched_tokens == 4096


def test_each_kind_of_workers_takes_every_clock_asked_for(question: Question) -> None:
    limits = SpaceLimits(tensor=(2,), replicas=(1,), gpu_clock_hz=(1.2e9, None))
    space = PairSpace(question.spec, question.cluster, question.engine, limits)
    points = list(space)
    assert len(points) == len(space) == len({point.id for point in points})
    clocks = {(point.prefill.gpu_clock_hz, point.decode.gpu_clock_hz) for point in points}
    assert clocks == {(1.2e9, 1.2e9), (1.2e9, None), (None, 1.2e9), (None, None)}
    plain = PairSpace(
        question.spec, question.cluster, question.engine, limits.model_copy(update={"gpu_clock_hz": None})
    )
    assert len(space) == 4 * len(plain)


def test_a_slower_decode_worker_saves_energy_and_is_certified(planner: Planner) -> None:
    limits = {**REQUEST["space"], "tensor": [2], "replicas": [1], "gpu_clock_hz": [1.2e9, None]}
    result = planner.plan(asked(objectives=["tpot", "energy"], space=limits))
    assert result.search.certified
    clocks = {
        entry.plan["decode"]["worker"]["gpu_clock_hz"] for entry in result.plans if entry.id in result.front
    }
    assert clocks == {1.2e9, None}


def test_what_no_pair_can_be_is_counted_with_its_reason(planner: Planner, question: Question) -> None:
    limits = SpaceLimits(tensor=(1, 3), replicas=(1,), gpu_clock_hz=(None, 9e9))
    space = PairSpace(question.spec, question.cluster, question.engine, limits)
    left_out = sum(item.plans for item in space.excluded)
    assert len(list(space)) == len(space) - left_out
    assert len(space.excluded) == len({item.reason for item in space.excluded}) == 2
    fields = {**REQUEST["space"], "tensor": [2], "gpu_clock_hz": [9e9]}
    with pytest.raises(InputError, match=r"no plan can be built: .*9000 MHz"):
        planner.plan(asked(space=fields))


def test_workers_may_stand_in_pools_of_different_devices(planner: Planner) -> None:
    pools = [
        {"name": "fast", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 1},
        {"name": "cheap", "device": "l40s", "nodes": 1, "devices_per_node": 2},
    ]
    question = planner.load(asked(cluster={"pools": pools}))
    space = PairSpace(question.spec, question.cluster, question.engine, question.request.space)
    found = {(point.prefill.pool, point.decode.pool) for point in space}
    assert found == {("fast", "cheap"), ("cheap", "fast"), ("cheap", "cheap")}
    one = next(point for point in space if point.prefill.pool == "fast")
    entry = planner.evaluate(asked(cluster={"pools": pools}), one.to_dict())["plans"][0]
    prices = {name: planner.catalog.device(name).usd_per_hour for name in ("h100-sxm-80gb", "l40s")}
    assert entry["metrics"]["usd_per_hour"] == pytest.approx(
        prices["h100-sxm-80gb"] + prices["l40s"] * one.decode.replicas
    )


# --- what they cost --------------------------------------------------------------------------------


def lone(engine: str) -> dict[str, Any]:
    """A request at a time, minutes apart."""
    return asked(
        engine={"name": engine},
        workload=synthetic(
            arrivals={"process": "constant", "rate_rps": 0.01},
            requests=4,
            input_tokens={"distribution": "constant", "value": 1000},
            output_tokens={"distribution": "constant", "value": 50},
        ),
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_alone_a_request_waits_for_its_prompt_and_its_cache(planner: Planner, engine: str) -> None:
    """At no load TTFT is that of an aggregated worker and the hand-over, TPOT that of its decode steps."""
    request = lone(engine)
    plan = {**PLAN, "decode": {"replicas": 1, "worker": {}}}
    pair = planner.evaluate(request, plan)["plans"][0]["metrics"]
    one = planner.evaluate(request, {"worker": {}})["plans"][0]["metrics"]
    question = planner.load(request)
    judge = PairEvaluator(question.evaluator())
    handover_s = float(judge.handover(point_of(question, plan)).seconds[0])
    step_s = one["tpot_s"]["mean"] if engine == "vllm" else 0.0  # the last prompt token is computed again
    assert pair["ttft_s"]["mean"] == pytest.approx(one["ttft_s"]["mean"] + handover_s + step_s, rel=2e-3)
    assert pair["tpot_s"]["mean"] == pytest.approx(one["tpot_s"]["mean"], rel=1e-3)
    assert pair["devices"] == 2
    assert pair["preemptions"] == 0


def test_a_cache_takes_its_bytes_over_the_link_between_the_workers(planner: Planner) -> None:
    """Llama 3.1 8B keeps 128 KiB a token in 16 bits, which one 400 Gbit/s port takes over in 2.6 us."""
    request = lone("sglang")  # its router adds nothing
    far = deepcopy(request)
    far["cluster"] = {
        "pools": [{"name": "main", "device": "h100-sxm-80gb", "nodes": 2, "devices_per_node": 1}],
        "inter_node": {"kind": "infiniband-400g"},
    }
    plan = {**PLAN, "decode": {"replicas": 1, "worker": {}}}
    times = []
    for data in (request, far):
        question = planner.load(data)
        found = PairEvaluator(question.evaluator()).handover(point_of(question, plan))
        times.append(float(found.seconds[0]))
        assert found.source["operator"] == "kv_transfer"
    sent_bytes = 1000 * 131072
    assert times[1] >= sent_bytes / 50e9
    assert times[1] == pytest.approx(sent_bytes / 50e9, rel=0.5)
    assert times[0] < 0.3 * times[1]


def test_two_ranks_send_half_of_a_cache_each(planner: Planner) -> None:
    question = planner.load(lone("sglang"))
    judge = PairEvaluator(question.evaluator())
    seconds = []
    for tensor in (1, 2):
        worker = {"parallelism": {"tensor": tensor}}
        plan = {**PLAN, "prefill": {"worker": worker}, "decode": {"replicas": 1, "worker": worker}}
        seconds.append(float(judge.handover(point_of(question, plan)).seconds[0]))
    assert 0.4 * seconds[0] < seconds[1] < 0.8 * seconds[0]


def test_energy_memory_and_cost_are_those_of_all_workers(planner: Planner) -> None:
    entry = planner.evaluate(asked(), PLAN)["plans"][0]
    metrics = entry["metrics"]
    assert metrics["devices"] == 3
    assert metrics["power_w_per_device"] * 3 == pytest.approx(metrics["power_w"])
    assert metrics["usd_per_hour"] == pytest.approx(3 * planner.catalog.device("h100-sxm-80gb").usd_per_hour)
    weights = entry["memory_bytes_per_device"]["weights"]
    assert entry["prefill_memory_bytes_per_device"]["weights"] == weights
    assert metrics["memory_bytes"] > 3 * weights
    assert sum(entry["breakdown_s"].values()) == pytest.approx(metrics["makespan_s"])
    for name in ("ttft_s", "tpot_s"):
        low, high = entry["interval"][name]["mean"]
        assert low < metrics[name]["mean"] < high


def test_the_site_is_paid_for_once(planner: Planner) -> None:
    plain = planner.evaluate(asked(), PLAN)["plans"][0]["metrics"]
    site = planner.evaluate(asked(site={"pue": 1.5, "host_w_per_device": 100.0}), PLAN)["plans"][0]["metrics"]
    expected = 1.5 * (plain["energy_j"] + 300.0 * plain["makespan_s"])
    assert site["energy_j"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "arrivals",
    [
        {"process": "poisson", "rate_rps": 8.0},
        {"process": "poisson", "rate_rps": 200.0},
        {"process": "closed", "concurrency": 12},
    ],
)
def test_no_simulated_pair_beats_its_bound(planner: Planner, arrivals: dict[str, Any]) -> None:
    request = asked(workload=synthetic(arrivals=arrivals, turns={"mean": 2, "think_time_s": 0.1}))
    question = planner.load(request)
    space = PairSpace(question.spec, question.cluster, question.engine, question.request.space)
    judge = Judges.of(question, Spaces(None, space), {}).pairs
    assert judge is not None
    objectives = ("latency", "ttft", "tpot", "throughput", "energy", "memory", "cost")
    wanted = judge.wanted(objectives)
    points = list(space)
    for point in points[:: max(1, len(points) // 40)]:
        assert judge.reject(point) is None
        bound = judge.bound_vector(point, objectives, judge.bounds(point, wanted))
        values = objective_vector(objectives, judge.evaluate(point, interval=False).metrics)
        assert np.all(bound <= values + 1e-9 * np.abs(values)), (point.label(), bound, values)


@pytest.mark.parametrize("fraction", [0.9, 0.24])
def test_what_pairs_share_is_simulated_once_and_the_same(planner: Planner, fraction: float) -> None:
    """Prefill workers of many pairs, and decode workers whose limits do not bind, against a fresh judge."""
    limits = {
        "serving": ["disaggregated"], "weights": ["bf16"], "kv_cache": ["bf16"], "tensor": [1],
        "replicas": [1, 2], "max_num_seqs": [2, 64, 128, 256], "max_num_batched_tokens": [2048, 8192],
        "memory_fraction": [fraction],
    }  # fmt: skip
    question = planner.load(asked(space=limits))
    space = PairSpace(question.spec, question.cluster, question.engine, question.request.space)
    judge = Judges.of(question, Spaces(None, space), {}).pairs
    assert judge is not None
    for point in space:
        assert judge.reject(point) is None
        found = judge.evaluate(point, interval=False)
        result, memory = judge.run(point)
        truth = result.metrics()
        assert found.breakdown_s == truth.pop("breakdown_s")
        peaks = result.prefill.peak_kv_blocks, result.decode.peak_kv_blocks
        held = zip(judge.parts(point), memory, peaks, strict=True)
        truth["memory_bytes"] = sum(part.used_bytes(own, *rest) for (part, own), *rest in held)
        assert found.metrics == truth, point.label()
    assert 0 < judge.reused < len(space)


# --- the front -------------------------------------------------------------------------------------


def test_both_modes_make_one_front_that_an_unpruned_look_confirms(planner: Planner) -> None:
    request = asked(objectives=["latency", "cost"])
    request["space"] = {**REQUEST["space"], "serving": ["aggregated", "disaggregated"]}
    result = planner.plan(request)
    assert result.search.certified
    assert result.search.gap is not None
    assert result.search.gap["open"] == 0
    question = planner.load(request)
    spaces = Spaces.of(question, ("aggregated", "disaggregated"))
    assert spaces.one is not None
    assert spaces.pairs is not None
    assert result.search.space_size == len(spaces.one) + len(spaces.pairs)
    judges = Judges.of(question, spaces, {})
    values = []
    for space in (spaces.one, spaces.pairs):
        for point in space:
            judge = judges.of_point(point)
            if judge.reject(point) is None:
                metrics = judge.evaluate(point, interval=False).metrics
                assert not slo_misses({}, metrics)
                values.append(objective_vector(("latency", "cost"), metrics))
    front = np.array(values)[non_dominated(np.array(values))]
    found = np.array(
        [objective_vector(("latency", "cost"), result.plan(name).metrics) for name in result.front]
    )
    np.testing.assert_allclose(np.unique(found, axis=0), np.unique(front, axis=0), rtol=1e-9)
    kinds = {result.plan(name).plan["serving"] for name in result.front}
    assert kinds <= {"aggregated", "disaggregated"}


def test_where_decode_steps_must_not_wait_for_prompts_pairs_are_needed(planner: Planner) -> None:
    """Long prompts hold an aggregated worker's decodes up; a decode worker never sees them."""
    request = asked(
        workload=synthetic(
            arrivals={"process": "poisson", "rate_rps": 6.0},
            input_tokens={"distribution": "constant", "value": 12000},
        ),
        slo={"tpot_s": {"p95": 0.012}},
        objectives=["ttft", "cost"],
    )
    request["space"] = {**REQUEST["space"], "serving": ["aggregated", "disaggregated"], "tensor": [1]}
    result = planner.plan(request)
    assert result.status == "ok"
    assert {result.plan(name).plan["serving"] for name in result.front} == {"disaggregated"}
    assert any(entry.plan["serving"] == "aggregated" and not entry.meets_slo for entry in result.plans)


def test_a_search_of_pairs_goes_on_from_its_checkpoint(planner: Planner) -> None:
    from planner.search import Support

    request = asked(objectives=["latency", "cost"])
    request["space"] = {**REQUEST["space"], "serving": ["aggregated", "disaggregated"]}
    parts: list[dict[str, Any]] = []
    whole = planner.plan(request, support=Support(checkpoint=parts.append, every_s=0.0))
    assert len({part["space_size"] for part in parts}) == 2
    again = planner.plan(request, support=Support(resume=parts))
    assert again.front == whole.front
    assert again.recommended == whole.recommended
    assert {part.get("serving") for part in parts} == {None, "disaggregated"}
