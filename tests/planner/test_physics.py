"""No step is faster than its roofline, no device busier than whole, no power above the limit."""

from __future__ import annotations

import os

import pytest

from tests.planner.physics_sweep import half, pairs, violations

# Large mixtures, latent attention, windows, recurrent layers and old devices are always looked at.
ALWAYS = [
    ("llama-3.1-8b", "h100-sxm-80gb", "vllm"),
    ("llama-3.1-70b", "a100-sxm-80gb", "trtllm"),
    ("deepseek-v3", "h200-sxm-141gb", "sglang"),
    ("gpt-oss-20b", "b200-sxm-180gb", "vllm"),
    ("mixtral-8x7b", "mi300x-192gb", "vllm"),
    ("gemma-3-12b", "l40s", "sglang"),
    ("qwen3-30b-a3b", "h100-sxm-80gb", "trtllm"),
    ("llama-2-7b", "v100-sxm2-32gb", "vllm"),
    ("qwen2.5-0.5b", "t4", "vllm"),
]


@pytest.mark.parametrize(("model", "device", "engine"), ALWAYS)
def test_no_prediction_breaks_physics(model: str, device: str, engine: str) -> None:
    assert violations(model, device, engine) == []


def test_nor_does_any_pair_of_the_catalog() -> None:
    """Every model on every second device that holds it on one node, in continuous integration on all.

    Engines take turns.
    """
    broken = {}
    fitting = 0
    chosen = pairs() if os.environ.get("CI") else half(0)
    for index, (model, device) in enumerate(chosen):
        found = violations(model, device, ("vllm", "sglang", "trtllm")[index % 3])
        fitting += found is not None
        if found:
            broken[model, device] = found
    assert broken == {}
    assert fitting > 0.75 * len(chosen) > 700
