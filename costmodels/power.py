"""Watts while an operator runs, from how busy it keeps the tensor cores and the memory.

    P = idle + (TDP - idle) * min(1, live + compute * MFU^a + memory * MBU^b)

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
    """Shares of (TDP - idle), the mean absolute error of watts where they were fitted, and the powers of MFU
    and MBU."""

    live: float
    compute: float
    memory: float
    mape: float
    fitted_on: str
    compute_power: float = 0.5
    memory_power: float = 0.5


#: By arithmetic. Fitted on log watts, every table and family with one weight. Runs of a second and more of
#: kernels from 2 us on (own H100 and H200; by family 9 % for GEMM, 10 for decode, 6 for prompts in bf16; 3
#: for 19 GEMMs in fp8): a kernel that keeps nothing busy draws a tenth, not a quarter, of what a device has
#: above idle.
POWER_FITS: Mapping[str, PowerFit] = MappingProxyType(
    {
        "bf16": PowerFit(0.065, 1.60, 0.885, 0.081, "GEMM and attention, own H100 and H200", 1.0, 0.72),
        "fp8": PowerFit(0.065, 2.15, 0.66, 0.026, "GEMM, own H100", 0.835, 0.71),
        "fp4": PowerFit(0.10, 0.79, 0.28, 0.091, "nvfp4 GEMM, B200; median error 7.5 % (GB200: 31.8 %)"),
    }
)
#: The same of Blackwell, which draws more of its TDP at equal utilisation: decode attention on B200 twice
#: what the curve above says. Fitted on published tables, whole (N, K) or head groups held out; no short
#: kernel was at steady power there. The mean error is several times the median one because the labels of
#: short windows and of GB200 nvfp4 are noisy.
BLACKWELL_FITS: Mapping[str, PowerFit] = MappingProxyType(
    {
        **POWER_FITS,
        "bf16": PowerFit(
            0.27, 0.69, 0.48, 0.118, "GEMM and decode attention, H200, B200, GB200; median error 2.9 %"
        ),
        "fp8": PowerFit(0.47, 0.54, 0.22, 0.133, "GEMM, B200 and GB200; median error 5.8 %"),
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
#: Share of that in a served step: the limit holds the mean of some milliseconds, and kernels that draw less
#: run between. A full H100 (vLLM 0.24, Llama 3.1 8B) keeps 1,567 MHz in the mean where large GEMMs alone keep
#: 1,230 to 1,490 and bursts of them about 1,640; its steps with prompts are met to 1 % so, 7 % too slow
#: without. The calibrate rows of docs/accuracy.md are indifferent (loss 0.2607 and 0.2604).
SERVED_SHARE = 0.3


def power_fit(device: Device, compute: str) -> PowerFit:
    """The curve of a device's arithmetic."""
    return _fit_of(BLACKWELL_FITS if device.architecture == "blackwell" else POWER_FITS, compute)


def _fit_of(fits: Mapping[str, PowerFit], compute: str) -> PowerFit:
    return fits.get({"fp16": "bf16", "fp32": "bf16", "int8": "fp8"}.get(compute, compute), fits["bf16"])


def demand_of(fit: PowerFit, mfu: FloatArray, mbu: FloatArray) -> FloatArray:
    """Share of (TDP - idle) that a kernel of this utilisation would draw without a cap; may exceed 1."""
    return np.asarray(fit.live + fit.compute * mfu**fit.compute_power + fit.memory * mbu**fit.memory_power)


def _used(op: Operator, device: Device, time_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(MFU, MBU) of a call."""
    seconds = np.where(time_s > 0, time_s, np.inf)
    mfu = flops(op) / peak_flops_per_s(device, arithmetic(op, device)) / seconds
    mbu = bytes_moved(op) / device.memory_bandwidth_bytes_per_s / seconds
    return np.clip(mfu, 0.0, 1.0), np.clip(mbu, 0.0, 1.0)


def _demand(op: Operator, device: Device, time_s: FloatArray) -> FloatArray:
    """Share of (TDP - idle) that the kernel would draw without a cap; may exceed 1."""
    return demand_of(power_fit(device, arithmetic(op, device)), *_used(op, device, time_s))


def demand_shares(
    op: Operator, device: Device, time_s: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What part of the watts above idle clocks, arithmetic and memory draw; the three add up to 1.

    By the curves of `BLACKWELL_FITS` for all devices: a clock locked on an H200 saves what was published with
    these parts (see `costmodels.clocks`), while the curves of `POWER_FITS` only say what the parts add up to.
    """
    fit = _fit_of(BLACKWELL_FITS, arithmetic(op, device))
    mfu, mbu = _used(op, device, time_s)
    compute, memory = fit.compute * mfu**fit.compute_power, fit.memory * mbu**fit.memory_power
    whole = fit.live + compute + memory
    return fit.live / whole, compute / whole, memory / whole


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


def served_factor(op: Operator, device: Device, time_s: FloatArray) -> FloatArray:
    """How much longer the call takes in the steps of a busy server than in a burst of a few runs."""
    return np.asarray(1.0 + SERVED_SHARE * (sustained_factor(op, device, time_s) - 1.0), dtype=np.float64)
