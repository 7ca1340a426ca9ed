"""What every CostModel must keep to; `check(model, device)` runs the whole battery."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from costmodels import (
    Collective,
    CostModel,
    DecodeAttention,
    Elementwise,
    Gemm,
    GroupedGemm,
    PrefillAttention,
    roofline_bound,
    utilisation,
)
from hardware.device import Device
from tests.costmodels.devices import half, nvlink

SIZES = np.array([1.0, 2, 7, 16, 17, 64, 100, 256, 1000, 4096, 8192])


def operators(device: Device) -> list[Any]:
    """One call of every family over a curve of sizes (pairs for attention)."""
    kind = half(device)
    x = SIZES
    found: list[Any] = [
        Gemm(x, 8192, 1024, kind, kind),
        Gemm(x, 1280, 8192, "int4", kind),
        Gemm(x, 512, 128, kind, kind, batch=16),
        GroupedGemm(x, 4096, 1536, 128, 128, 8, kind, kind),
        GroupedGemm(x, 2880, 2880, 32, 8, 4, kind, kind, gated=False),
        PrefillAttention(x[:, None], np.array([0.0, 100, 8192]), 8, 1, 128, 128, kind),
        PrefillAttention(x[:, None], np.array([0.0, 100, 8192]), 16, 16, 192, 128, kind),
        PrefillAttention(x, 4096.0, 8, 2, 64, 64, kind, window=1024),
        DecodeAttention(x[:, None], np.array([1.0, 100, 4096, 131072]), 8, 1, 128, 128, kind),
        DecodeAttention(x, 2048.0, 128, 1, 576, 512, kind, latent=True),
        DecodeAttention(x, 8192.0, 32, 8, 128, 128, kind, window=128),
        Elementwise(x * 16384.0, launches=2),
        Collective("all_reduce", x * 8192.0, nvlink(8)),
        Collective("all_to_all", x * 8192.0, nvlink(16)),
    ]
    if "fp8" in device.peak_flops_per_s:
        found += [
            Gemm(x, 4096, 4096, "fp8", "fp8"),
            Gemm(x, 4096, 4096, "fp8_block", "fp8"),
            GroupedGemm(x, 7168, 2048, 256, 32, 8, "fp8_block", "fp8"),
            DecodeAttention(x, 4096.0, 8, 1, 128, 128, "fp8"),
            PrefillAttention(x, 0.0, 8, 1, 128, 128, "fp8"),
        ]
    if "fp4" in device.peak_flops_per_s:
        found.append(Gemm(x, 4096, 4096, "fp4", "fp4"))
    return found


def check(model: CostModel, device: Device) -> None:
    for op in operators(device):
        guess = model.predict(op, device)
        bound = roofline_bound(op, device)
        again = model.predict(op, device)
        for name in ("time_s", "power_w", "low_s", "high_s"):
            values = getattr(guess, name)
            assert np.isfinite(values).all(), (op, name)
            assert (values > 0).all(), (op, name)
            np.testing.assert_array_equal(values, getattr(again, name))
        assert (guess.time_s >= bound * (1 - 1e-12)).all(), op
        assert (guess.low_s >= bound * (1 - 1e-12)).all(), op
        assert (guess.low_s <= guess.time_s).all()
        assert (guess.time_s <= guess.high_s).all()
        assert (guess.power_w <= device.tdp_w + 1e-9).all()
        assert (guess.power_w >= device.idle_w - 1e-9).all()
        assert guess.kind in ("measured", "learned", "transferred", "roofline")
        assert guess.source
        if not isinstance(op, Collective):
            mfu, mbu = utilisation(op, device, guess.time_s)
            assert (mfu <= 1 + 1e-12).all()
            assert (mbu <= 1 + 1e-12).all()
        _scalar_equals_vector(model, device, op, guess.time_s)
        _empty(model, device, op)
    _rates(model, device)


def _scalar_equals_vector(model: CostModel, device: Device, op: Any, times: np.ndarray) -> None:
    sizes = [n for n in op.__dataclass_fields__ if isinstance(getattr(op, n), np.ndarray)]
    arrays = np.broadcast_arrays(*(getattr(op, n) for n in sizes))
    flat = times.ravel()
    for at in (0, len(flat) // 2, len(flat) - 1):
        single = replace(op, **{n: float(a.ravel()[at]) for n, a in zip(sizes, arrays, strict=True)})
        np.testing.assert_allclose(float(model.predict(single, device).time_s), flat[at], rtol=1e-12)


def _empty(model: CostModel, device: Device, op: Any) -> None:
    """No work takes no time (elementwise kernels are launched all the same)."""
    if isinstance(op, Elementwise):
        return
    first = {
        Gemm: "m",
        GroupedGemm: "tokens",
        PrefillAttention: "query_tokens",
        DecodeAttention: "sequences",
        Collective: "message_bytes",
    }[type(op)]
    second = {"query_tokens": "context_tokens", "sequences": "context_tokens"}.get(first)
    extra = {second: 100.0} if second else {}
    assert float(model.predict(replace(op, **{first: 0.0}, **extra), device).time_s) == 0.0


def _rates(model: CostModel, device: Device) -> None:
    """A device of twice the rates halves what is bound by compute or by memory."""
    kind = half(device)
    fast = replace(
        device,
        memory_bandwidth_bytes_per_s=2 * device.memory_bandwidth_bytes_per_s,
        peak_flops_per_s={k: 2 * v for k, v in device.peak_flops_per_s.items()},
    )
    for op in (Gemm(8192, 8192, 8192, kind, kind), Gemm(1, 28672, 8192, kind, kind)):
        now, then = model.predict(op, device), model.predict(op, fast)
        if now.kind == then.kind:  # what was learned on one device is not asked about another
            assert 0.45 < float(then.time_s) / float(now.time_s) < 0.72
        assert float(roofline_bound(op, fast)) * 2 == float(roofline_bound(op, device))
