"""The closed-form model: conformance, the table behind it, spot checks against published measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels import (
    DecodeAttention,
    Gemm,
    GroupedGemm,
    PrefillAttention,
    RooflineModel,
    default_cost_model,
    utilisation,
)
from costmodels.fitted import choose, coefficient_sets, power_headroom
from costmodels.kernels import Rates, moe_time
from hardware import Device, load_catalog
from tests.costmodels.conformance import check
from tests.costmodels.devices import A100, ALL, B200, H100, MI300X


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm", ""])
@pytest.mark.parametrize("device", ALL, ids=lambda d: d.name)
def test_conformance(engine: str, device: Device) -> None:
    check(RooflineModel(engine), device)
    if engine == "vllm":
        check(RooflineModel(engine, sustained=False), device)


@pytest.mark.parametrize("name", sorted(device.name for device in load_catalog().devices.values()))
def test_conformance_on_the_catalog(name: str) -> None:
    check(RooflineModel("vllm"), load_catalog().device(name))


def test_no_fp8_on_ampere() -> None:
    with pytest.raises(KeyError):
        default_cost_model("vllm").predict(Gemm(8, 4096, 4096, "fp8", "fp8"), A100)
    assert float(default_cost_model("vllm").predict(Gemm(8, 4096, 4096, "fp8", "bf16"), A100).time_s) > 0


def test_every_shipped_set_is_whole() -> None:
    sets = coefficient_sets()
    assert len(sets) > 150
    keys = {(s.device, s.engine, s.family, s.dtype) for s in sets}
    assert len(keys) == len(sets)
    for item in sets:
        assert item.fitted_on.startswith("aiconfigurator-core")
        assert item.rows > 50
        assert 0 < item.low <= 1 <= item.high
        assert all(value >= 0 for value in item.values.values())
    for engine in ("vllm", "trtllm", "sglang"):
        gemm = [s.mape for s in sets if s.family == "gemm" and s.dtype == "bf16" and s.engine == engine]
        assert np.mean(gemm) < 0.12
    assert np.mean([s.mape for s in sets if s.family == "decode" and s.engine == "vllm"]) < 0.15
    for engine in ("vllm", "trtllm", "sglang"):
        assert np.mean([s.mape for s in sets if s.family == "moe" and s.engine == engine]) < 0.21


def test_experts_of_other_devices_cost_their_buffers() -> None:
    """Kernels of routed experts go over every pair of token and expert, whoever holds the expert."""
    asked = ("h100-sxm-80gb", "sglang", "moe", "fp8_block")
    found = next(s for s in coefficient_sets() if (s.device, s.engine, s.family, s.dtype) == asked)
    rates = Rates(H100.peak_flops_per_s["fp8"], H100.memory_bandwidth_bytes_per_s, H100.sm_count)
    plain = {name: value for name, value in found.values.items() if name != "routed"}

    def seconds(values: Mapping[str, float], local: int) -> float:
        return float(moe_time(values, 8192, 7168, 2048, 256, local, 8, 3, 1.0, 1.0, rates))

    assert seconds(found.values, 256) == seconds(plain, 256)
    others, each = 8192 * 8 * 7 / 8, 7168 * (1.0 + 4.0) + 2048 * 6.0
    more = seconds(found.values, 32) - seconds(plain, 32)
    assert more == pytest.approx(found.values["routed"] * others * each / rates.bandwidth)
    # Measured by aiconfigurator-core 0.12 with 32 of 256 experts, half of it for the pairs of others.
    assert seconds(found.values, 32) == pytest.approx(3362e-6, rel=0.2)
    assert seconds(plain, 32) < 0.6 * 3362e-6


def test_borrowed_sets_say_so_and_are_wider() -> None:
    own = choose(H100, "vllm", "gemm", "bf16")
    other = choose(MI300X, "vllm", "gemm", "bf16")
    assert own.kind == "roofline"
    assert other.kind == "transferred"
    assert "mi300x-192gb" in other.reason
    assert other.high / other.low > own.high / own.low
    twin = replace(H100, name="h100-sxm-96gb", kernels_like="h100-sxm-80gb")
    assert choose(twin, "vllm", "gemm", "bf16").fit.device == "h100-sxm-80gb"


def test_a_relative_with_more_power_keeps_its_clock() -> None:
    devices, model = load_catalog().devices, RooflineModel("vllm", sustained=False)
    op = Gemm(8192.0, 8192, 8192, "bf16", "bf16")
    share = {
        name: float(utilisation(op, devices[name], model.predict(op, devices[name]).time_s)[0])
        for name in ("rtx-4090", "l40s", "l4")
    }
    # 450 W for 165 TFLOP/s against 350 W for 362; an L4 has 72 W for 121 and gains nothing.
    assert share["l40s"] < 0.7
    assert 0.75 < share["rtx-4090"] <= 0.9
    assert share["l4"] <= share["l40s"] + 0.05
    borrowed = choose(devices["rtx-4090"], "vllm", "gemm", "bf16")
    assert borrowed.fit.device == "l40s"
    assert 1.0 < power_headroom(devices["rtx-4090"], borrowed) < 1.4
    for name, fit in (("l40s", "l40s"), ("l4", "l40s"), ("mi300x-192gb", "h100-sxm-80gb")):
        found = choose(devices[name], "vllm", "gemm", "bf16")
        assert (found.fit.device, power_headroom(devices[name], found)) == (fit, 1.0)


def test_large_gemm_reaches_published_utilisation() -> None:
    # cuBLAS on H100 SXM: 600-800 dense bf16 TFLOP/s for large squares.
    model = RooflineModel("vllm", sustained=False)
    op = Gemm(8192, 8192, 8192)
    mfu, _ = utilisation(op, H100, model.predict(op, H100).time_s)
    assert 0.6 < float(mfu) < 0.85
    _, mbu = utilisation(Gemm(1, 57344, 8192), H100, model.predict(Gemm(1, 57344, 8192), H100).time_s)
    assert 0.75 < float(mbu) <= 0.97


def test_sustained_is_slower_only_when_hot() -> None:
    burst, long = RooflineModel("vllm", sustained=False), RooflineModel("vllm")
    hot, cool = Gemm(8192, 8192, 8192), Gemm(8, 8192, 8192)
    assert 1.03 < float(long.predict(hot, H100).time_s / burst.predict(hot, H100).time_s) <= 1.08
    assert float(long.predict(cool, H100).time_s) == float(burst.predict(cool, H100).time_s)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 512), context=st.integers(64, 60_000), more=st.floats(1.1, 4.0))
def test_decode_attention_grows(n: int, context: int, more: float) -> None:
    model = default_cost_model("vllm")

    def time(n: float, context: float) -> float:
        return float(model.predict(DecodeAttention(n, context, 8, 1, 128, 128), H100).time_s)

    assert time(n, context * more) >= time(n, context) * 0.9
    assert time(n * more, context) >= time(n, context) * 0.9


def test_formats_and_sizes_order_as_physics_says() -> None:
    model = default_cost_model("vllm")

    def gemm(weights: str, activations: str, m: int) -> float:
        return float(model.predict(Gemm(m, 28672, 8192, weights, activations), B200).time_s)

    assert gemm("fp4", "fp4", 8192) < gemm("fp8", "fp8", 8192) < gemm("bf16", "bf16", 8192)
    assert gemm("fp4", "fp4", 1) < gemm("fp8", "fp8", 1) < gemm("bf16", "bf16", 1)
    assert gemm("int4", "bf16", 1) < 0.45 * gemm("bf16", "bf16", 1)
    prefill = [
        float(model.predict(PrefillAttention(2048, p, 8, 1, 128, 128), H100).time_s) for p in (0, 4096, 32768)
    ]
    assert prefill[0] < prefill[1] < prefill[2]
    one, all_ = (GroupedGemm(64, 4096, 1536, 128, local, 8) for local in (16, 128))
    assert float(model.predict(one, H100).time_s) < float(model.predict(all_, H100).time_s)
