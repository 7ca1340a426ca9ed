"""Memory of a plan: by hand where engines have reported it, and by what can never happen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware import load_catalog
from planner.engines import load_profile
from planner.memory import MemoryPlan, effective_kv_bytes, plan_memory
from planner.models import Degrees, KvFootprint, check_degrees, load_model

GIB = 2**30


def memory_of(
    model: str = "llama-3.1-8b",
    device: str = "h100-sxm-80gb",
    engine: str = "vllm",
    version: str | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    attention_data: int = 1,
    **more: Any,
) -> MemoryPlan:
    """`plan_memory` at the engine's defaults on the device."""
    card, profile = load_catalog().device(device), load_profile(engine, version)
    tier = profile.tier(card)
    budget = more.get("max_num_batched_tokens", tier.max_num_batched_tokens)
    options: dict[str, Any] = {
        "weights": "bf16",
        "kv_cache": "bf16",
        "max_num_seqs": tier.max_num_seqs,
        "max_num_batched_tokens": budget,
        "cuda_graphs": True,
        "memory_fraction": profile.memory_fraction(
            card, tensor=tensor, pipeline=pipeline, attention_data=attention_data, token_budget=budget
        ),
        "mean_sequence_tokens": 1024.0,
        "longest_sequence_tokens": 2048,
        **more,
    }
    degrees = Degrees(tensor, pipeline, expert, attention_data, 1)
    return plan_memory(load_model(model), card, profile, degrees, **options)


def test_vllm_on_a_4090_has_the_blocks_it_reported() -> None:
    # vLLM 0.19, Llama-3.1-8B bf16, RTX 4090, defaults: "# GPU blocks: 2588" of 16 tokens
    # (validation run published with LLMServingSim, MIT licence).
    plan = memory_of(device="rtx-4090", version="0.19.0")
    assert plan.shortfall == ""
    assert plan.kv_tokens / 16 == pytest.approx(2588, rel=0.08)
    assert plan.kv_bytes_per_token == 131072  # 32 layers x 2 x 8 heads x 128 x 2 bytes


def test_llama_3_70b_over_two_devices_is_what_others_count() -> None:
    # APEX counts 63.75 GiB per device for the 80 layers at fp16 and tensor 2: 80 x (attention
    # 8192 x (2 x 8192 + 2 x 1024) + feed-forward 3 x 8192 x 28672) x 2 bytes / 2.
    layers = 80 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672)
    assert layers * 2 / 2 / GIB == pytest.approx(63.75, abs=0.01)
    plan = memory_of("llama-3-70b", "h100-sxm-80gb", tensor=2, weights="fp16")
    parts = plan.weights_by_component
    sharded = sum(value for name, value in parts.items() if name in ("attention", "dense_ffn", "ffn"))
    assert sharded / GIB == pytest.approx(63.75, abs=0.02)
    # Beside them the engine holds half of the embedding and of the LM head (128256 x 8192 each), and
    # the whole of the norms (two per layer and a last one).
    beside = 2 * 128256 * 8192 * 2 / 2 + 161 * 8192 * 2
    assert plan.weights_bytes - sharded == pytest.approx(beside, rel=0.01)


CASES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(
            ["llama-3.1-8b", "mixtral-8x7b", "gemma-3-12b", "qwen3-30b-a3b", "deepseek-v2-lite"]
        ),
        "device": st.sampled_from(["t4", "l4", "rtx-4090", "a100-sxm-40gb", "h100-sxm-80gb", "mi300x-192gb"]),
        "engine": st.sampled_from(["vllm", "sglang", "trtllm"]),
        "weights": st.sampled_from(["bf16", "fp8", "int4"]),
        "kv_cache": st.sampled_from(["bf16", "fp8"]),
        "max_num_seqs": st.sampled_from([8, 64, 256]),
        "max_num_batched_tokens": st.sampled_from([512, 2048, 8192]),
        "cuda_graphs": st.booleans(),
        "memory_fraction": st.floats(0.3, 1.0),
        "longest_sequence_tokens": st.sampled_from([512, 4096, 32768]),
    }
)


@settings(max_examples=150)
@given(CASES)
def test_components_add_up_to_the_device(case: dict[str, Any]) -> None:
    plan = memory_of(**case)
    parts = plan.as_dict()
    assert sum(plan.weights_by_component.values()) == pytest.approx(plan.weights_bytes)
    if not plan.shortfall:
        capacity = parts.pop("capacity")
        assert sum(parts.values()) == pytest.approx(capacity)
        assert min(parts.values()) >= 0
        assert plan.kv_tokens >= case["longest_sequence_tokens"]
        assert plan.kv_tokens * plan.kv_bytes_per_token <= plan.kv_cache_bytes * (1 + 1e-9)


@settings(max_examples=80)
@given(CASES, st.sampled_from([2, 4, 8]))
def test_more_tensor_parallelism_never_needs_more_weights_or_activations(
    case: dict[str, Any], tensor: int
) -> None:
    if check_degrees(load_model(case["model"]), Degrees(tensor, 1, 1, 1, 1)):
        return
    one, many = memory_of(**case), memory_of(**case, tensor=tensor)
    assert many.weights_bytes <= one.weights_bytes
    assert many.activations_bytes <= one.activations_bytes
    assert many.kv_bytes_per_token <= one.kv_bytes_per_token


@settings(max_examples=80)
@given(CASES)
def test_larger_budgets_never_leave_more_cache(case: dict[str, Any]) -> None:
    base = memory_of(**case)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        assert memory_of(**{**case, name: 2 * case[name]}).kv_cache_bytes <= base.kv_cache_bytes


@settings(max_examples=80)
@given(CASES, st.floats(0.0, 0.5))
def test_a_larger_share_of_memory_never_leaves_less_cache(case: dict[str, Any], more: float) -> None:
    fraction = min(1.0, case["memory_fraction"] + more)
    base, larger = memory_of(**case), memory_of(**{**case, "memory_fraction": fraction})
    assert larger.kv_cache_bytes >= base.kv_cache_bytes
    assert larger.kv_tokens >= base.kv_tokens
    assert not (larger.shortfall and not base.shortfall)


def test_what_does_not_fit_is_named() -> None:
    assert memory_of("llama-3.1-70b").shortfall.startswith("weights need 141.1 GB of ")
    assert (
        "leave no room for KV cache"
        in memory_of("llama-3.1-8b", "t4", weights="int8", memory_fraction=0.65).shortfall
    )
    long = memory_of(device="rtx-4090", longest_sequence_tokens=100_000).shortfall
    assert long.startswith("the longest request (100000 tokens) needs 13.1 GB of KV cache per device")


def test_each_engine_keeps_its_own_rule() -> None:
    case: dict[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "memory_fraction": 0.8}
    vllm = memory_of(engine="vllm", **case)
    sglang = memory_of(engine="sglang", **case)
    trtllm = memory_of(engine="trtllm", **case)
    capacity = vllm.capacity_bytes
    context = vllm.runtime_bytes  # graphs included
    graphs = context - memory_of(engine="vllm", **case, cuda_graphs=False).runtime_bytes
    # vLLM: the fraction holds all but the graphs. SGLang: weights and cache alone. TensorRT-LLM: of
    # what is left once everything else is there.
    assert vllm.kv_cache_bytes == pytest.approx(
        0.8 * capacity - vllm.weights_bytes - vllm.activations_bytes - (context - graphs)
    )
    assert sglang.kv_cache_bytes == pytest.approx(0.8 * capacity - sglang.weights_bytes)
    assert trtllm.kv_cache_bytes == pytest.approx(
        0.8 * (capacity - trtllm.weights_bytes - trtllm.activations_bytes - trtllm.runtime_bytes)
    )


def test_attention_data_ranks_have_a_cache_each() -> None:
    one = memory_of("deepseek-v2-lite", tensor=1, attention_data=1)
    two = memory_of("deepseek-v2-lite", tensor=1, attention_data=2)
    assert two.weights_bytes < one.weights_bytes, "routed experts are spread"
    assert two.kv_tokens > 2 * one.kv_tokens * 0.95


def test_windows_and_states_are_averaged_over_a_sequence() -> None:
    footprint = KvFootprint(
        full_bytes_per_token=10.0,
        windowed_bytes_per_token=20.0,
        window_tokens=100,
        state_bytes_per_sequence=1000.0,
    )
    assert effective_kv_bytes(footprint, 50) == pytest.approx(10 + 20 + 1000 / 50)
    assert effective_kv_bytes(footprint, 400) == pytest.approx(10 + 20 * 100 / 400 + 1000 / 400)
