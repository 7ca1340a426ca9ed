"""The contract's documents: every field is taken, and every mistake gets one sentence with its path."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware import InputError
from planner.request import Plan, PlanningRequest, RequestError, parse_plan, parse_request

FULL: dict[str, Any] = {
    "schema_version": "1",
    "model": "llama-3.1-70b",
    "engine": {"name": "vllm", "version": "0.24"},
    "cluster": {
        "pools": [{"name": "main", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 8}],
        "inter_node": {"kind": "infiniband-400g"},
    },
    "workload": {
        "synthetic": {
            "arrivals": {"process": "poisson", "rate_rps": 4.0},
            "requests": 1000,
            "input_tokens": {"distribution": "lognormal", "mean": 1024, "cv": 1.0},
            "output_tokens": {"distribution": "constant", "value": 256},
            "shared_prefix": {"tokens": 512, "groups": 4},
            "turns": {"mean": 1, "think_time_s": 0},
            "seed": 0,
        }
    },
    "slo": {"ttft_s": {"p95": 1.0}, "tpot_s": {"p95": 0.05}, "e2e_s": {"p95": 30}},
    "objectives": ["latency", "energy", "memory"],
    "space": {"tensor": [1, 2, 4], "weights": ["bf16", "fp8"], "serving": ["aggregated"]},
    "search": {"method": "auto", "budget_s": 60, "seed": 0},
    "prices": {"h100-sxm-80gb": 2.5},
}

PLAN: dict[str, Any] = {
    "serving": "aggregated",
    "replicas": 1,
    "worker": {
        "pool": "main",
        "parallelism": {"tensor": 4, "pipeline": 1, "expert": 1, "attention_data": 1, "context": 1},
        "quantization": {"weights": "bf16", "activations": "bf16", "kv_cache": "bf16"},
        "batching": {
            "policy": "continuous",
            "max_num_seqs": 256,
            "max_num_batched_tokens": 8192,
            "chunked_prefill": True,
            "cuda_graphs": True,
        },
        "memory_fraction": 0.9,
        "prefix_caching": False,
        "speculative": {"method": "eagle", "draft_tokens": 3, "acceptance": 0.7},
        "kv_offload": {"target": "cpu", "bytes": 1 << 34},
    },
}


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at `path` (dots; digits are list positions) replaced."""
    result = copy.deepcopy(document)
    at: Any = result
    *way, last = path.split(".")
    for part in way:
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
    if isinstance(at, list):
        at[int(last)] = value
    else:
        at[last] = value
    return result


def test_every_field_of_the_contract_is_taken_and_comes_back() -> None:
    request = parse_request(FULL)
    assert request.to_dict() == FULL
    assert parse_request(json.loads(json.dumps(request.to_dict()))) == request


@pytest.mark.parametrize(
    "arrivals",
    [
        {"process": "poisson", "rate_rps": 1},
        {"process": "gamma", "rate_rps": 1, "cv": 2.5},
        {"process": "constant", "rate_rps": 0.25},
        {"process": "burst", "rate_rps": 2, "size": 8},
        {"process": "closed", "concurrency": 16},
    ],
)
def test_every_arrival_process_is_taken(arrivals: dict[str, Any]) -> None:
    request = parse_request(changed(FULL, "workload.synthetic.arrivals", arrivals))
    assert request.to_dict()["workload"]["synthetic"]["arrivals"] == arrivals


@pytest.mark.parametrize(
    "lengths",
    [
        {"distribution": "constant", "value": 7},
        {"distribution": "uniform", "low": 1, "high": 9},
        {"distribution": "lognormal", "mean": 100, "cv": 0},
        {"distribution": "empirical", "values": [3, 1, 2, 3]},
    ],
)
def test_every_length_distribution_is_taken_and_values_keep_their_order(lengths: dict[str, Any]) -> None:
    request = parse_request(changed(FULL, "workload.synthetic.input_tokens", lengths))
    assert request.to_dict()["workload"]["synthetic"]["input_tokens"] == lengths


def test_a_trace_is_taken_with_its_defaults() -> None:
    request = parse_request({**FULL, "workload": {"trace": {"path": "conv.jsonl"}}})
    trace = request.workload.trace
    assert trace is not None
    assert (trace.format, trace.rate_scale, trace.limit, trace.on_bad_row) == ("auto", 1.0, None, "refuse")


def test_defaults_are_those_of_the_contract() -> None:
    request = parse_request({key: FULL[key] for key in ("model", "cluster", "workload")})
    assert request.engine.name == "vllm"
    assert request.engine.version is None
    assert request.objectives == ("latency", "energy", "memory")
    assert (request.search.method, request.search.budget_s, request.search.seed) == ("auto", 60.0, 0)
    assert request.slo.bounds() == {}
    assert request.space.model_dump(exclude_none=True) == {}
    assert request.prices == {}


def test_numbers_that_yaml_reads_for_text_are_understood() -> None:
    assert parse_request(changed(FULL, "engine.version", 0.24)).engine.version == "0.24"
    assert parse_request(changed(FULL, "schema_version", 1)).schema_version == "1"
    requests = parse_request(changed(FULL, "workload.synthetic.requests", 1e3)).workload.synthetic
    assert requests is not None
    assert (requests.requests, type(requests.requests)) == (1000, int)


def test_repeated_values_of_the_space_and_objectives_count_once() -> None:
    request = parse_request(
        {**FULL, "space": {"tensor": [4, 2, 4]}, "objectives": ["cost", "latency", "cost"]}
    )
    assert request.space.tensor == (4, 2)
    assert request.objectives == ("cost", "latency")


BAD = [
    ("modle", "x", "modle", "unknown field 'modle', did you mean 'model'?"),
    ("tensor", [1], "tensor", "unknown field 'tensor', did you mean space.tensor?"),
    ("devices_per_node", 8, "devices_per_node", "did you mean cluster.pools.devices_per_node?"),
    ("p95", 0.1, "p95", "unknown field 'p95'"),
    ("space.budget_s", 5, "space.budget_s", "did you mean search.budget_s?"),
    (
        "workload.synthetic.rate_rps",
        4.0,
        "workload.synthetic.rate_rps",
        "did you mean workload.synthetic.arrivals.rate_rps?",
    ),
    ("space.tensr", [1], "space.tensr", "unknown field 'tensr', did you mean 'tensor'?"),
    ("cluster.pools.0.devcie", "x", "cluster.pools[0].devcie", "did you mean 'device'?"),
    ("schema_version", "2", "schema_version", "must be one of 1, not '2'"),
    ("model", "", "model", "must not be empty"),
    ("model", 70, "model", "must be text, not 70"),
    ("model", None, "model", "must be text, not None"),
    ("engine", "vllm", "engine", "must be a mapping of fields, not 'vllm'"),
    ("engine.name", "vlm", "engine.name", "did you mean 'vllm'?"),
    ("engine.version", True, "engine.version", "must be text, not True"),
    ("cluster", None, "cluster", "must be a mapping of fields, not None"),
    ("cluster.pools", [], "cluster.pools", "must not be empty"),
    ("cluster.pools", {"device": "t4"}, "cluster.pools", "must be a list"),
    ("cluster.pools.0.nodes", 0, "cluster.pools[0].nodes", "must be at least 1, not 0"),
    ("cluster.pools.0.nodes", -3, "cluster.pools[0].nodes", "must be at least 1, not -3"),
    ("cluster.pools.0.nodes", 1.5, "cluster.pools[0].nodes", "must be a whole number, not 1.5"),
    ("cluster.pools.0.nodes", True, "cluster.pools[0].nodes", "must be a whole number, not True"),
    ("cluster.pools.0.nodes", "8", "cluster.pools[0].nodes", "must be a whole number, not '8'"),
    ("cluster.pools.0.nodes", float("inf"), "cluster.pools[0].nodes", "must be a"),
    ("cluster.pools.0.nodes", 10**12, "cluster.pools[0].nodes", "must be at most 1000000000, not"),
    ("cluster.pools.0.nodes", 10**5000, "cluster.pools[0].nodes", "too large to show"),
    ("cluster.pools.0.topology", "t.yaml", "cluster.pools[0]", "give either `device` or `topology`"),
    ("cluster.pools", [{"device": "t4"}, {"device": "a10"}], "cluster", "'main' stands twice"),
    ("workload", {}, "workload", "give exactly one of `trace` and `synthetic` (neither is given)"),
    ("workload.trace", {"path": "x"}, "workload", "(both are given)"),
    (
        "workload.synthetic.arrivals.rate_rps",
        -1,
        "workload.synthetic.arrivals.rate_rps",
        "more than 0, not -1",
    ),
    ("workload.synthetic.arrivals.rate_rps", 0, "workload.synthetic.arrivals.rate_rps", "more than 0, not 0"),
    ("workload.synthetic.arrivals.rate_rps", float("nan"), "workload.synthetic.arrivals.rate_rps", "finite"),
    (
        "workload.synthetic.arrivals.rate_rps",
        "4",
        "workload.synthetic.arrivals.rate_rps",
        "a number, not '4'",
    ),
    ("workload.synthetic.arrivals.process", "poison", "workload.synthetic.arrivals.process", "'poisson'?"),
    ("workload.synthetic.requests", 0, "workload.synthetic.requests", "must be at least 1, not 0"),
    ("workload.synthetic.requests", 10**30, "workload.synthetic.requests", "must be at most 20000000"),
    ("workload.synthetic.turns.mean", 0.5, "workload.synthetic.turns.mean", "must be at least 1"),
    ("workload.synthetic.seed", -1, "workload.synthetic.seed", "must be at least 0"),
    ("slo.ttft_s", {}, "slo.ttft_s", "must not be empty"),
    ("slo.ttft_s", {"p96": 1.0}, "slo.ttft_s.p96", "must be one of mean, p50, p90, p95, p99"),
    ("slo.tpot_s.p95", -0.1, "slo.tpot_s.p95", "must be more than 0"),
    ("slo.ttft", {"p95": 1.0}, "slo.ttft", "did you mean 'ttft_s'?"),
    ("objectives", [], "objectives", "must not be empty"),
    ("objectives", ["latncy"], "objectives[0]", "did you mean 'latency'?"),
    ("objectives", "latency", "objectives", "must be a list"),
    ("space.weights", ["bf17"], "space.weights[0]", "did you mean 'bf16'?"),
    ("space.weights", ["int2"], "space.weights[0]", "must be one of"),
    ("space.tensor", 4, "space.tensor", "must be a list, not 4"),
    ("space.tensor", [], "space.tensor", "must not be empty"),
    ("space.tensor", [0], "space.tensor[0]", "must be at least 1"),
    ("space.memory_fraction", [1.2], "space.memory_fraction[0]", "must be at most 1"),
    ("space.chunked_prefill", ["yes"], "space.chunked_prefill[0]", "must be true or false"),
    ("search.method", "magic", "search.method", "must be one of auto, exhaustive, cp-sat, mcts"),
    ("search.budget_s", 0, "search.budget_s", "must be more than 0"),
    ("search.budget_s", True, "search.budget_s", "must be a number, not True"),
    ("search.budget_s", float("inf"), "search.budget_s", "must be a finite number"),
    ("search.budget_s", 10**400, "search.budget_s", "must be a number"),
    ("search.seed", 1.5, "search.seed", "must be a whole number"),
    ("site", {"pue": True}, "site.pue", "must be a number, not True"),
    ("site", {"pue": "1.2"}, "site.pue", "must be a number, not '1.2'"),
    ("cluster.inter_node", {"kind": ""}, "cluster.inter_node.kind", "must not be empty"),
    ("prices", {"h100-sxm-80gb": -1}, "prices.h100-sxm-80gb", "must be at least 0"),
    ("prices", {"h100-sxm-80gb": "cheap"}, "prices.h100-sxm-80gb", "must be a number"),
]


@pytest.mark.parametrize(
    ("path", "value", "where", "words"), BAD, ids=[f"{n}-{b[0]}" for n, b in enumerate(BAD)]
)
def test_each_mistake_gets_one_sentence_at_its_path(path: str, value: Any, where: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_request(changed(FULL, path, value))
    error = caught.value
    assert error.path == where
    assert words in error.message
    assert "\n" not in str(error)
    assert len(str(error)) < 300
    assert isinstance(error, RequestError)
    assert len(error.problems) == 1, error.problems


def test_every_problem_is_reported_at_once() -> None:
    wrong = changed(changed(FULL, "search.budget_s", -1), "cluster.pools.0.nodes", 0)
    wrong["objectives"] = ["latency", "speed"]
    with pytest.raises(RequestError) as caught:
        parse_request(wrong)
    paths = [path for path, _ in caught.value.problems]
    assert sorted(paths) == ["cluster.pools[0].nodes", "objectives[1]", "search.budget_s"]
    assert caught.value.hint == "and 2 more problems"


@pytest.mark.parametrize("field", ["model", "cluster", "workload"])
def test_required_fields_are_asked_for(field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: this field is required$"):
        parse_request({key: value for key, value in FULL.items() if key != field})


@pytest.mark.parametrize("document", [None, [], "x", 1, float("nan")])
def test_what_is_no_mapping_is_refused(document: Any) -> None:
    with pytest.raises(InputError, match="mapping"):
        parse_request(document)
    with pytest.raises(InputError, match=r"^plan: "):
        parse_plan(document)


# --- plans ------------------------------------------------------------------------------------


def test_every_field_of_a_plan_is_taken_and_comes_back() -> None:
    plan = parse_plan(PLAN)
    assert plan.model_dump(mode="json", exclude_none=True) == PLAN
    disaggregated = {
        "serving": "disaggregated",
        "prefill": {"replicas": 2, "worker": PLAN["worker"]},
        "decode": {"replicas": 1, "worker": PLAN["worker"]},
    }
    parsed = parse_plan(disaggregated)
    assert parsed.prefill is not None
    assert parsed.prefill.replicas == 2


def test_a_plan_may_leave_out_everything_but_its_worker() -> None:
    plan = parse_plan({"worker": {}})
    assert plan.serving == "aggregated"
    assert plan.worker is not None
    assert plan.worker.parallelism.devices == 1


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_a_worker_takes_the_product_of_its_degrees(
    tensor: int, pipeline: int, data: int, context: int
) -> None:
    degrees = {
        "tensor": tensor,
        "pipeline": pipeline,
        "attention_data": data,
        "context": context,
        "expert": 2,
    }
    plan = parse_plan({"worker": {"parallelism": degrees}})
    assert plan.worker is not None
    assert plan.worker.parallelism.devices == tensor * pipeline * data * context


@pytest.mark.parametrize(
    ("path", "value", "where", "words"),
    [
        ("worker.parallelism.tensor", 0, "plan.worker.parallelism.tensor", "at least 1"),
        ("worker.parallelism.tensor", "4", "plan.worker.parallelism.tensor", "whole number"),
        ("worker.parallelism.tesnor", 4, "plan.worker.parallelism.tesnor", "did you mean 'tensor'?"),
        ("worker.quantization.weights", "fp12", "plan.worker.quantization.weights", "must be one of"),
        ("worker.quantization.kv_cache", "int3", "plan.worker.quantization.kv_cache", "int2"),
        ("worker.batching.policy", "static", "plan.worker.batching.policy", "continuous"),
        ("worker.batching.chunked_prefill", 1, "plan.worker.batching.chunked_prefill", "true or false"),
        ("worker.memory_fraction", 0, "plan.worker.memory_fraction", "more than 0"),
        ("worker.memory_fraction", 1.01, "plan.worker.memory_fraction", "at most 1"),
        ("worker.speculative.acceptance", 1.5, "plan.worker.speculative.acceptance", "at most 1"),
        ("worker.kv_offload.bytes", -1, "plan.worker.kv_offload.bytes", "at least 1"),
        ("replicas", 0, "plan.replicas", "at least 1"),
        ("prefill", {"worker": {}}, "plan", "no `prefill` or `decode`"),
        ("serving", "disaggregated", "plan", "has `prefill` and `decode`"),
        ("worker", None, "plan", "`replicas` and `worker`"),
    ],
)
def test_each_mistake_in_a_plan_gets_its_path(path: str, value: Any, where: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_plan(changed(PLAN, path, value))
    assert caught.value.path == where
    assert words in caught.value.message


# --- anything at all ----------------------------------------------------------------------------

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from(["bf16", "vllm", "auto", "poisson", "1", "p95"]),
)
_names = st.sampled_from(
    [
        *PlanningRequest.model_fields,
        *Plan.model_fields,
        *("pools", "device", "synthetic", "trace", "path", "p95", "arrivals", "process", "tensor"),
        *("parallelism", "weights", "ttft_s", "budget_s", "version"),
    ]
)
_anything = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(_names, st.text(max_size=4), st.integers(-2, 2)), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=150)
@given(_anything)
def test_nothing_but_an_input_error_comes_of_any_document(document: Any) -> None:
    for parse in (parse_request, parse_plan):
        try:
            parse(document)
        except InputError as error:
            assert error.message  # noqa: PT017


_leaves = [path for path, *_ in BAD]


@settings(max_examples=150)
@given(st.sampled_from(_leaves), _anything)
def test_nothing_but_an_input_error_comes_of_any_value_anywhere(path: str, value: Any) -> None:
    try:
        document = changed(FULL, path, value)
    except (AttributeError, TypeError):
        return
    try:
        request = parse_request(document)
    except InputError as error:
        assert error.path or error.message  # noqa: PT017
    else:
        json.dumps(request.to_dict(), allow_nan=False)
