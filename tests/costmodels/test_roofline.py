"""Work of operators against closed forms, and what formats a device can run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels import (
    Collective,
    DecodeAttention,
    Elementwise,
    Gemm,
    GroupedGemm,
    PrefillAttention,
    active_experts,
    arithmetic_intensity,
    bytes_moved,
    causal_pairs,
    compute_format,
    flops,
    roofline_bound,
    supports,
)
from tests.costmodels.devices import A100, ALL, B200, H100, MI300X, V100, nvlink


def test_llama_2_7b_query_projection() -> None:
    prefill, decode = Gemm(2048, 4096, 4096, "fp16", "fp16"), Gemm(1, 4096, 4096, "fp16", "fp16")
    assert float(flops(prefill)) == pytest.approx(68.7e9, rel=1e-3)
    assert float(bytes_moved(prefill)) == pytest.approx(67.1e6, rel=1e-3)
    assert float(arithmetic_intensity(prefill)) == pytest.approx(1024.0)
    assert float(flops(decode)) == pytest.approx(33.6e6, rel=2e-3)
    assert float(arithmetic_intensity(decode)) == pytest.approx(1.0, rel=1e-3)


def test_intensity_of_a_cube_in_fp32() -> None:
    side, element = 512, 4
    op = Gemm(side, side, side, "fp32", "fp32")
    ideal = 2 * side**3 / (3 * side * side * element)
    assert ideal == pytest.approx(85.333, rel=1e-5)
    # Our outputs leave in 16 bits, so a third of the traffic halves.
    assert float(arithmetic_intensity(op)) == pytest.approx(ideal * 3 / 2.5)


@given(q=st.integers(1, 60), p=st.integers(0, 80), window=st.integers(0, 50))
def test_pairs_equal_the_sum_they_stand_for(q: int, p: int, window: int) -> None:
    want = sum(min(p + i, window) if window else p + i for i in range(1, q + 1))
    assert float(causal_pairs(q, p, window)) == want
    op = PrefillAttention(q, p, 4, 2, 64, 32, window=window)
    assert float(flops(op)) == 2 * want * 4 * 96


@given(q=st.integers(1, 500), p=st.integers(0, 500), cut=st.integers(1, 499))
def test_chunks_do_the_work_of_the_whole(q: int, p: int, cut: int) -> None:
    cut = min(cut, q - 1)
    parts = causal_pairs(cut, p) + causal_pairs(q - cut, p + cut)
    assert float(parts) == float(causal_pairs(q, p))


def test_decode_reads_its_cache_once() -> None:
    op = DecodeAttention(8, 1000, 32, 8, 128, 128)
    assert float(bytes_moved(op)) == 8 * (1000 * 8 * 256 * 2 + 32 * 256 * 2)
    windowed = DecodeAttention(8, 1000, 32, 8, 128, 128, window=100)
    assert float(flops(windowed)) == 8 * 100 * 32 * 2 * 256
    latent = DecodeAttention(1, 1000, 128, 1, 576, 512, latent=True)
    assert float(bytes_moved(latent)) == 1000 * 576 * 2 + 128 * 1088 * 2


def test_active_experts_closed_form_and_monte_carlo() -> None:
    assert float(active_experts(1, 128, 128, 8)) == pytest.approx(8.0)
    assert float(active_experts(10_000, 128, 32, 8)) == pytest.approx(32.0)
    rng = np.random.default_rng(0)
    hits = [len({e for _ in range(16) for e in rng.choice(64, 4, replace=False)}) for _ in range(400)]
    assert float(active_experts(16, 64, 64, 4)) == pytest.approx(float(np.mean(hits)), rel=0.02)


def test_grouped_gemm_counts_its_share() -> None:
    whole = GroupedGemm(512, 1024, 256, 16, 16, 2)
    part = GroupedGemm(512, 1024, 256, 16, 4, 2)
    assert float(flops(whole)) == 512 * 2 * 6 * 1024 * 256
    assert float(flops(part)) * 4 == float(flops(whole))
    assert float(flops(GroupedGemm(512, 1024, 256, 16, 16, 2, gated=False))) * 3 == float(flops(whole)) * 2


def test_bound_is_the_larger_of_compute_and_memory() -> None:
    big, small = Gemm(8192, 8192, 8192), Gemm(1, 8192, 8192)
    assert float(roofline_bound(big, H100)) == pytest.approx(2 * 8192**3 / 989.4e12)
    assert float(roofline_bound(small, H100)) == pytest.approx(float(bytes_moved(small)) / 3.35e12)
    assert float(roofline_bound(Elementwise(3.35e9), H100)) == pytest.approx(1e-3)
    assert float(roofline_bound(Collective("all_gather", 1e9, nvlink(8)), H100)) == pytest.approx(
        1e9 * 7 / 8 / 450e9
    )


def test_compute_formats() -> None:
    assert compute_format(H100, "int4", "bf16") == "bf16"
    assert compute_format(A100, "fp8", "bf16") == "bf16"
    assert compute_format(H100, "fp8_block", "fp8") == "fp8"
    assert compute_format(B200, "fp4", "fp4") == "fp4"
    with pytest.raises(KeyError, match="a100-sxm-80gb has no fp8 arithmetic"):
        compute_format(A100, "fp8", "fp8")
    with pytest.raises(KeyError):
        compute_format(H100, "bf16", "fp8")


@pytest.mark.parametrize(
    ("device", "formats", "words"),
    [
        (H100, ("bf16", "bf16", "bf16"), None),
        (H100, ("fp8", "fp8", "fp8"), None),
        (H100, ("int4", "bf16", "fp8"), None),
        (A100, ("fp8", "bf16", "bf16"), None),
        (A100, ("int8", "int8", "bf16"), None),
        (B200, ("fp4", "fp4", "fp8"), None),
        (V100, ("fp16", "fp16", "fp16"), None),
        (V100, ("int4", "fp16", "fp16"), None),
        (MI300X, ("fp8", "fp8", "fp8"), None),
        (A100, ("fp8", "fp8", "bf16"), "no fp8 arithmetic; fp8 weights run weight-only"),
        (H100, ("fp4", "fp4", "bf16"), "no fp4 arithmetic"),
        (V100, ("bf16", "bf16", "fp16"), "no bf16 arithmetic; use fp16"),
        (V100, ("fp8", "fp16", "fp16"), "Ampere or newer"),
        (V100, ("fp16", "fp16", "fp8"), "Ampere or newer"),
        (H100, ("bf16", "fp8", "bf16"), "8 bits or fewer"),
        (H100, ("bf16", "bf16", "fp7"), "unknown format"),
        (H100, ("bf16", "bf16", "fp4"), "no fp4 arithmetic"),
    ],
)
def test_supports_says_why_not(device: object, formats: tuple[str, str, str], words: str | None) -> None:
    reason = supports(device, *formats)  # type: ignore[arg-type]
    if words is None:
        assert reason is None
    else:
        assert reason is not None
        assert words in reason


@pytest.mark.parametrize("device", ALL, ids=lambda d: d.name)
def test_what_is_supported_can_be_computed(device: object) -> None:
    names = ("bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "fp4", "int2", "fp32")
    for weights in names:
        for activations in names:
            if supports(device, weights, activations, "fp16") is None:  # type: ignore[arg-type]
                assert compute_format(device, weights, activations)  # type: ignore[arg-type]
