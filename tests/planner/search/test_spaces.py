"""Bound-and-prune and CP-SAT against an unpruned search on thirty small spaces of real models and devices."""

from __future__ import annotations

import pytest

from planner.evaluate import table_sizes
from planner.pipeline import Planner
from planner.plans import PlanSpace
from planner.search import CpSatSearch, ExhaustiveSearch
from tests.planner.search import conformance

MODELS = (
    ("llama-3.1-8b", "vllm"),
    ("llama-3.1-70b", "trtllm"),
    ("qwen3-32b", "sglang"),
    ("mixtral-8x7b", "vllm"),
    ("qwen3-30b-a3b", "sglang"),
)
MACHINES = (("h100-sxm-80gb", 4), ("a100-sxm-80gb", 8), ("l40s", 8))
#: Light, medium and heavy load in turn; with and without an SLO.
RATES = (2.0, 12.0, 60.0)
CASES = [
    (model, engine, device, count, objectives, RATES[at % 3], at % 4 == 0)
    for at, (model, engine, device, count, objectives) in enumerate(
        (model, engine, device, count, objectives)
        for model, engine in MODELS
        for device, count in MACHINES
        for objectives in (("latency", "energy", "memory"), ("ttft", "throughput", "cost"))
    )
]
PLANNER = Planner()


@pytest.mark.parametrize(
    ("model", "engine", "device", "count", "objectives", "rate_rps", "bounded"),
    CASES,
    ids=[f"{c[0]}-{c[2]}-{c[4][0]}-{c[5]:g}" for c in CASES],
)
def test_the_front_is_exact(
    model: str,
    engine: str,
    device: str,
    count: int,
    objectives: tuple[str, ...],
    rate_rps: float,
    bounded: bool,
) -> None:
    asked = PLANNER.load(
        {
            "model": model,
            "engine": {"name": engine},
            "cluster": {"pools": [{"device": device, "nodes": 1, "devices_per_node": count}]},
            "workload": {
                "synthetic": {
                    "preset": "chat",
                    "requests": 40,
                    "arrivals": {"process": "poisson", "rate_rps": rate_rps},
                }
            },
            "objectives": list(objectives),
            "slo": {"ttft_s": {"p95": 1.0}, "tpot_s": {"p95": 0.1}} if bounded else {},
            "space": {
                "pipeline": [1, 2],
                "attention_data": [1],
                "max_num_seqs": [8, 64],
                "max_num_batched_tokens": [2048, 8192],
            },
        }
    )
    space = PlanSpace(asked.spec, asked.cluster, asked.engine, asked.request.space)
    tokens, seqs = table_sizes(space)
    evaluator = asked.evaluator(table_tokens=tokens, table_seqs=seqs)
    whole = conformance.run(lambda: ExhaustiveSearch(prune=False), evaluator, space, objectives)
    for make in (ExhaustiveSearch, CpSatSearch):
        found = conformance.run(make, evaluator, space, objectives)
        assert found.certified
        if whole.front and whole.front[0].meets_slo:
            assert conformance.identity(found.front) == conformance.identity(whole.front)
        else:
            assert [i.distance for i in found.front] == [i.distance for i in whole.front]
        assert found.simulated + found.bounded + sum(i.plans for i in found.rejected) == len(space)
    # The bound of every plan that was simulated is no better than the plan, in every objective, and one of
    # its pieces is not either.
    for item in whole.judged:
        bounds = evaluator.bounds(item.point, evaluator.wanted(objectives))
        vector = evaluator.bound_vector(item.point, objectives, bounds)
        slack = [1e-9 * abs(value) for value in item.objectives]
        assert all(v <= o + s for v, o, s in zip(vector, item.objectives, slack, strict=True))
        pieces = evaluator.bound_pieces(item.point, objectives, vector)
        assert any(
            all(v <= o + s for v, o, s in zip(row, item.objectives, slack, strict=True)) for row in pieces
        )
