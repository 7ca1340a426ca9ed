"""Watts while an operator runs, from how busy it keeps the tensor cores and the memory.

    P = idle + (TDP - idle) * min(1, live + compute * MFU^0.5 + memory * MBU^0.5)

`live` is what clocks and schedulers draw while any kernel runs. Fitted on power measured over at
least a second per kernel (shorter windows average in idle time); see `POWER_FITS`. Other devices
take the same normalised curve between their own idle and TDP.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from costmodels.ops import Collective, DecodeAttention, Elementwise, FloatArray, Gemm, GroupedGemm, Operator
from costmodels.roofline import arithmetic, bytes_moved, flops, peak_flops_per_s
from hardware.device import Device


class PowerFit(NamedTuple):
    """Shares of (TDP - idle), and the held-out mean absolute error of watts."""

    live: float
    compute: float
    memory: float
    mape: float
    fitted_on: str


#: By arithmetic. Fitted on log watts of GEMMs (all formats) and decode attention (bf16) run for at least
#: a second (H200 vLLM 0.22, B200 and GB200 TensorRT-LLM 1.3), whole (N, K) or head groups held out. The mean
#: error is several times the median one because the labels of short windows and of GB200 nvfp4 are noisy.
POWER_FITS: Mapping[str, PowerFit] = MappingProxyType(
    {
        "bf16": PowerFit(
            0.27, 0.69, 0.48, 0.118, "GEMM and decode attention, H200, B200, GB200; median error 2.9 %"
        ),
        "fp8": PowerFit(0.47, 0.54, 0.22, 0.133, "GEMM, B200 and GB200; median error 5.8 %"),
        "fp4": PowerFit(0.10, 0.79, 0.28, 0.091, "nvfp4 GEMM, B200; median error 7.5 % (GB200: 31.8 %)"),
    }
)
#: A collective keeps a few SMs and the links busy, nothing else.
_COLLECTIVE_SHARE = 0.25
#: Time in a second of continuous running / in a burst of six, of GEMMs present in both kinds of table, by
#: their MFU in the burst. bf16 on H200, B200, GB200: 0.2-0.4: 1.00, 1.04, 1.05; 0.4-0.5: 1.04, 1.13, 1.16;
#: 0.6-0.7: 1.12, 1.16, 1.22; 0.7-0.8: 1.15, 1.18, 1.26; above: 1.20 (H200). fp8 on GB200: 1.06, 1.13, 1.22 at
#: 0.2-0.4, 0.4-0.5, 0.6-0.7. Kernels below the cap: 0.99-1.01.
SUSTAINED_FROM_MFU = 0.25
SUSTAINED_SLOPE = 0.33
#: Share of (TDP - idle) at which the slowdown sets in, and where it is whole.
SUSTAINED_DEMAND = (0.75, 0.90)


def _terms(op: Operator, device: Device, time_s: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """Shares of (TDP - idle) that clocks, arithmetic and memory would draw without a cap."""
    seconds = np.where(time_s > 0, time_s, np.inf)
    compute = arithmetic(op, device)
    fit = POWER_FITS.get(
        {"fp16": "bf16", "fp32": "bf16", "int8": "fp8"}.get(compute, compute), POWER_FITS["bf16"]
    )
    mfu = np.clip(flops(op) / peak_flops_per_s(device, compute) / seconds, 0.0, 1.0)
    mbu = np.clip(bytes_moved(op) / device.memory_bandwidth_bytes_per_s / seconds, 0.0, 1.0)
    return fit.live, fit.compute * np.sqrt(mfu), fit.memory * np.sqrt(mbu)


def _demand(op: Operator, device: Device, time_s: FloatArray) -> FloatArray:
    """Share of (TDP - idle) that the kernel would draw without a cap; may exceed 1."""
    live, compute, memory = _terms(op, device, time_s)
    return np.asarray(live + compute + memory, dtype=np.float64)


def demand_shares(
    op: Operator, device: Device, time_s: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What part of the watts above idle clocks, arithmetic and memory draw; the three add up to 1."""
    live, compute, memory = _terms(op, device, time_s)
    whole = live + compute + memory
    return live / whole, compute / whole, memory / whole


def operator_power(op: Operator, device: Device, time_s: FloatArray) -> FloatArray:
    """Mean watts of the device during a call that takes `time_s` (idle included, at most TDP)."""
    span = max(0.0, device.tdp_w - device.idle_w)
    if isinstance(op, Collective):
        return np.full_like(time_s, device.idle_w + _COLLECTIVE_SHARE * span)
    return np.asarray(device.idle_w + span * np.minimum(1.0, _demand(op, device, time_s)), dtype=np.float64)


def sustained_factor(op: Operator, device: Device, time_s: FloatArray) -> FloatArray:
    """How much longer the call takes under continuous load than in a burst of a few runs.

    It sets in as the power the kernel would draw uncapped nears the TDP, and grows with MFU: the cap
    lowers the core clock, not the memory's, so memory-bound work keeps its speed. Attention, whose
    softmax draws less, slows half as much (assumed: no attention table has both protocols).
    """
    if isinstance(op, Collective | Elementwise | DecodeAttention):
        return np.ones_like(time_s)
    slope = SUSTAINED_SLOPE if isinstance(op, Gemm | GroupedGemm) else 0.5 * SUSTAINED_SLOPE
    seconds = np.where(time_s > 0, time_s, np.inf)
    mfu = np.clip(flops(op) / peak_flops_per_s(device, arithmetic(op, device)) / seconds, 0.0, 1.0)
    low, high = SUSTAINED_DEMAND
    hot = np.clip((_demand(op, device, time_s) - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 + hot * slope * np.maximum(mfu - SUSTAINED_FROM_MFU, 0.0), dtype=np.float64)
