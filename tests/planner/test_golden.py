"""Whole answers to two small requests, kept in reviewed files with a tolerance.

A change of a cost model or a scheduler rule shows here first, in numbers that a person can judge.
`python -m tests.planner.test_golden` writes the files anew; look at the difference before it is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.pipeline import Planner
from planner.request import parse_plan
from tests.planner.conftest import request_of

FOLDER = Path(__file__).parent / "golden"
REQUESTS: dict[str, dict[str, Any]] = {
    "dense-8b-two-h100": request_of(
        slo={"ttft_s": {"p95": 1.0}},
        space={"weights": ["bf16", "fp8"], "max_num_seqs": [256], "max_num_batched_tokens": [2048, 8192]},
    ),
    "mixture-30b-four-a100": request_of(
        "qwen3-30b-a3b",
        "a100-sxm-80gb",
        4,
        engine="sglang",
        rate_rps=8.0,
        objectives=["throughput", "tpot", "cost"],
        space={"max_num_seqs": [128], "max_num_batched_tokens": [4096], "pipeline": [1]},
    ),
    "disaggregated-8b-four-h200": request_of(
        "llama-3.1-8b",
        "h200-sxm-141gb",
        4,
        engine="trtllm",
        rate_rps=6.0,
        inputs=3000,
        objectives=["ttft", "tpot", "energy"],
        space={
            "serving": ["disaggregated"],
            "weights": ["fp8"],
            "kv_cache": ["fp8"],
            "tensor": [1, 2],
            "max_num_seqs": [128],
            "max_num_batched_tokens": [8192],
        },
    ),
}
#: Relative; further apart, somebody should have a look.
TOLERANCE = 0.03


def workers(plan: dict[str, Any]) -> dict[str, Any]:
    """How many workers there are, and how they are cut and stored; of a pair, by their names."""
    if plan["serving"] == "disaggregated":
        return {role: workers({"serving": "", **plan[role]}) for role in ("prefill", "decode")}
    return {
        "replicas": plan["replicas"],
        "parallelism": plan["worker"]["parallelism"],
        "quantization": plan["worker"]["quantization"],
    }


def summary(planner: Planner, request: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an answer: the front with its main numbers, the choice, the counts."""
    result = planner.plan(request)
    rows = []
    for plan_id in result.front:
        entry = result.plan(plan_id)
        parse_plan(entry.plan)
        metrics, memory = entry.metrics, entry.memory_bytes_per_device
        rows.append(
            {
                "id": plan_id,
                **workers(entry.plan),
                "ttft_s_p95": metrics["ttft_s"]["p95"],
                "tpot_s_mean": metrics["tpot_s"]["mean"],
                "e2e_s_mean": metrics["e2e_s"]["mean"],
                "output_tokens_per_s": metrics["output_tokens_per_s"],
                "energy_j_per_output_token": metrics["energy_j_per_output_token"],
                "usd_per_million_output_tokens": metrics["usd_per_million_output_tokens"],
                "weights_bytes_per_device": memory["weights"],
                "kv_cache_bytes_per_device": memory["kv_cache"],
            }
        )
    assert result.recommended is not None
    return {
        "status": result.status,
        "space_size": result.search.space_size,
        "certified": result.search.certified,
        "recommended": result.recommended.plan_id,
        "front": rows,
    }


def differences(kept: Any, found: Any, path: str = "") -> list[str]:
    """Where two summaries differ: numbers by more than the tolerance, anything else at all."""
    if isinstance(kept, dict) and isinstance(found, dict) and kept.keys() == found.keys():
        return [text for key in kept for text in differences(kept[key], found[key], f"{path}.{key}")]
    if isinstance(kept, list) and isinstance(found, list) and len(kept) == len(found):
        pairs = enumerate(zip(kept, found, strict=True))
        return [text for i, (a, b) in pairs for text in differences(a, b, f"{path}[{i}]")]
    if isinstance(kept, float) and isinstance(found, float):
        return (
            [] if found == pytest.approx(kept, rel=TOLERANCE) else [f"{path}: {kept:.6g} became {found:.6g}"]
        )
    return [] if kept == found else [f"{path}: {kept!r} became {found!r}"]


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_the_answer_is_the_reviewed_one(planner: Planner, name: str) -> None:
    path = FOLDER / f"{name}.json"
    if not path.exists():
        pytest.skip("no reviewed answer yet: python -m tests.planner.test_golden writes it")
    kept = json.loads(path.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(summary(planner, REQUESTS[name])))
    assert differences(kept, found) == []


def test_a_difference_is_seen() -> None:
    kept = {"a": [1.0, 2.0], "b": "x"}
    assert differences(kept, {"a": [1.0, 2.0 * (1 + TOLERANCE / 2)], "b": "x"}) == []
    assert differences(kept, {"a": [1.0, 2.2], "b": "y"}) == [".a[1]: 2 became 2.2", ".b: 'x' became 'y'"]
    assert differences(kept, {"a": [1.0], "b": "x"})


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for request_name, request_data in REQUESTS.items():
        text = json.dumps(summary(Planner(), request_data), indent=1) + "\n"
        (FOLDER / f"{request_name}.json").write_text(text, encoding="utf-8")
