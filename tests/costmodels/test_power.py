"""Power: limits, order, and levels measured over a second or more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from costmodels import Collective, DecodeAttention, Elementwise, Gemm, default_cost_model
from hardware import load_catalog
from tests.costmodels.devices import H100, nvlink

MODEL = default_cost_model("vllm")


def watts(op: object, device: object = H100) -> float:
    return float(MODEL.predict(op, device).power_w)  # type: ignore[arg-type]


def test_busy_kernels_draw_more() -> None:
    big, thin = Gemm(8192, 8192, 8192), Gemm(1, 256, 128)
    assert H100.idle_w < watts(thin) < watts(big) <= H100.tdp_w
    assert watts(big) > 0.95 * H100.tdp_w
    assert watts(thin) < 0.5 * H100.tdp_w
    assert watts(Collective("all_reduce", 1e6, nvlink(8))) < watts(DecodeAttention(64, 8192, 8, 1, 128, 128))
    assert watts(Elementwise(1e3)) < watts(Elementwise(1e9))


def test_large_gemms_run_at_the_limit_of_an_h200() -> None:
    # Median of 11,461 bf16 GEMMs of an H200 that ran for a second or more: 690 of 700 W.
    device = load_catalog().device("h200-sxm-141gb")
    drawn = [watts(Gemm(m, 8192, 8192), device) for m in (1024, 4096, 16384)]
    assert np.median(drawn) == pytest.approx(690, rel=0.05)


def test_power_scales_with_the_device() -> None:
    half = replace(H100, tdp_w=350.0, idle_w=35.0)
    op = Gemm(256, 4096, 4096)
    assert watts(op, half) == pytest.approx(0.5 * watts(op), rel=1e-9)
