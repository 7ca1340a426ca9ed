"""`RooflineModel`: closed kernel forms with fitted coefficients, behind the CostModel protocol."""

from __future__ import annotations

import numpy as np

from costmodels.base import Prediction
from costmodels.collectives import collective_interval, collective_time
from costmodels.fitted import Choice, choose, power_headroom, vendor_efficiency
from costmodels.kernels import (
    COMPILED_SCALES,
    Rates,
    compiled_narrowing,
    decode_time,
    gemm_time,
    less_scaling,
    moe_time,
    prefill_time,
    splits_cached,
)
from costmodels.ops import (
    Collective,
    DecodeAttention,
    Elementwise,
    FloatArray,
    Gemm,
    GroupedGemm,
    Operator,
    PrefillAttention,
)
from costmodels.power import operator_power, served_factor
from costmodels.roofline import (
    arithmetic,
    array,
    bytes_moved,
    compute_format,
    element_bytes,
    flops,
    peak_flops_per_s,
    roofline_bound,
)
from hardware.device import Device

#: A memory-bound kernel inside a CUDA graph: the gap to the one before it, start and drain. The quantize
#: kernels of the aiconfigurator-core 0.12 tables take 1.3-2.0 us at no work and reach 0.88-0.91 of the
#: memory bandwidth at 5 GB (H100, TensorRT-LLM 1.3 and vLLM 0.24).
ELEMENTWISE_S = 1.8e-6
ELEMENTWISE_MEMORY = 0.88
#: Spread of fused elementwise kernels around that: some are merged away, some read twice.
ELEMENTWISE_INTERVAL = (0.6, 1.5)

#: A chip with one or two large matrix units (TPU) has no grid of thread blocks; the tile and wave terms
#: then count as on the A100 whose coefficients it borrows.
_FEWEST_UNITS = 16
_STAND_IN_UNITS = 108


def format_key(device: Device, weights: str, activations: str) -> str:
    """Under which format the kernels of a (weights, activations) pair were fitted."""
    compute = compute_format(device, weights, activations)
    if compute in ("bf16", "fp16", "fp32"):
        if weights in ("bf16", "fp16", "fp32"):
            return "bf16"
        return {
            "int8": "int8_wo",
            "fp8": "int8_wo",
            "fp8_block": "int8_wo",
            "int4": "int4_wo",
            "fp4": "fp4_wo",
        }.get(weights, "bf16")
    if weights == "fp8_block" or activations == "fp8_block":
        return "fp8_block"
    if compute == "fp8" and weights == "int4":
        return "w4a8"
    if compute == "fp8" and weights == "fp4":
        return "fp4_a8"
    return compute


class RooflineModel:
    """Times of kernels from their work, tiles and waves, with coefficients fitted on measurements.

    `engine` picks whose kernels (vllm, sglang, trtllm); "" takes whichever is measured.
    `sustained=True` slows kernels that would run into the device's power limit, as a server under
    load does (the measured tables are short bursts).
    """

    def __init__(self, engine: str = "vllm", *, sustained: bool = True) -> None:
        self.engine = engine
        self.sustained = sustained
        self.name = f"roofline-{engine or 'any'}{'' if sustained else '-burst'}"

    def predict(self, op: Operator, device: Device) -> Prediction:
        """Cost of one call of `op`; KeyError for a format `device` cannot run."""
        time, low, high, kind, source = self._time(op, device)
        bound = roofline_bound(op, device)
        time = np.where(bound > 0, np.maximum(time, bound), 0.0)
        power = operator_power(op, device, time)
        if self.sustained:
            slow = served_factor(op, device, time)
            time = time * slow
        low_s, high_s = np.maximum(time * low, bound), np.maximum(time * high, bound)
        return Prediction(time, power, np.minimum(low_s, time), np.maximum(high_s, time), kind, source)

    # --- families ---------------------------------------------------------------------------

    def _time(self, op: Operator, device: Device) -> tuple[FloatArray, float, float, str, str]:
        if isinstance(op, Collective):
            low, high = collective_interval(op)
            time, source = collective_time(op, self.engine)
            return time, low, high, "measured" if source.startswith("measured") else "roofline", source
        if isinstance(op, Elementwise):
            moved = array(op.bytes_moved)
            rate = device.memory_bandwidth_bytes_per_s * ELEMENTWISE_MEMORY
            compute = array(op.flops) / (0.5 * peak_flops_per_s(device, arithmetic(op, device)))
            time = op.launches * ELEMENTWISE_S + np.maximum(moved / rate, compute)
            return time, *ELEMENTWISE_INTERVAL, "roofline", "0.88 of memory bandwidth + 1.8 us per kernel"
        if isinstance(op, Gemm):
            key = format_key(device, op.weights, op.activations)
            choice = choose(device, self.engine, "gemm", key)
            time = gemm_time(
                choice.fit.values,
                op.m,
                op.n,
                op.k,
                op.batch,
                element_bytes(op.weights),
                element_bytes(op.activations),
                self._rates(op, device, choice),
            )
            if key == "fp8" and op.batch == 1 and choice.fit.engine in COMPILED_SCALES:
                spared = compiled_narrowing(choice.fit.values, op.m, op.k, self._rates(op, device, choice))
                time = less_scaling(time, spared)
            time = np.where(array(op.m) > 0, time, 0.0)
        elif isinstance(op, GroupedGemm):
            key = format_key(device, op.weights, op.activations)
            choice = choose(device, self.engine, "moe", key)
            time = moe_time(
                choice.fit.values,
                op.tokens,
                op.hidden,
                op.intermediate,
                op.experts,
                op.local_experts,
                op.top_k,
                3 if op.gated else 2,
                element_bytes(op.weights),
                element_bytes(op.activations),
                self._rates(op, device, choice),
            )
            time = np.where(array(op.tokens) > 0, time, 0.0)
        elif isinstance(op, PrefillAttention):
            choice = choose(
                device, self.engine, "mla_prefill" if op.qk_dim != op.v_dim else "prefill", kv_key(op.kv)
            )
            time = prefill_time(
                choice.fit.values,
                op.query_tokens,
                op.context_tokens,
                1.0,
                op.heads,
                1 if op.latent else op.kv_heads,
                op.qk_dim + op.v_dim,
                op.window,
                (op.qk_dim if op.latent else op.qk_dim + op.v_dim) * element_bytes(op.kv),
                self._rates(op, device, choice, half=True),
                split=splits_cached(self.engine),
            )
            time = np.where(array(op.query_tokens) > 0, time, 0.0)
        elif isinstance(op, DecodeAttention):
            choice = choose(device, self.engine, "mla_decode" if op.latent else "decode", kv_key(op.kv))
            time = decode_time(
                choice.fit.values,
                op.sequences,
                op.context_tokens,
                op.heads,
                1 if op.latent else op.kv_heads,
                op.qk_dim + op.v_dim,
                op.window,
                (op.qk_dim if op.latent else op.qk_dim + op.v_dim) * element_bytes(op.kv),
                self._rates(op, device, choice, half=True),
            )
            time = np.where(array(op.sequences) > 0, time, 0.0)
        source = f"{choice.fit.family}/{choice.fit.dtype}: {choice.fit.fitted_on}"
        if choice.reason:
            source += f" ({choice.reason})"
        return time, choice.low, choice.high, choice.kind, source

    def _rates(self, op: Operator, device: Device, choice: Choice, *, half: bool = False) -> Rates:
        share = 1.0 if choice.fit.architecture == device.architecture else vendor_efficiency(device)
        compute = arithmetic(op, device)
        if half:
            compute = "bf16" if "bf16" in device.peak_flops_per_s else "fp16"
        return Rates(
            peak_flops_per_s(device, compute) * share * power_headroom(device, choice),
            device.memory_bandwidth_bytes_per_s * share,
            float(device.sm_count if device.sm_count >= _FEWEST_UNITS else _STAND_IN_UNITS),
        )


def kv_key(kv: str) -> str:
    """Under which KV format attention kernels were fitted."""
    if kv in ("bf16", "fp16", "fp32"):
        return "bf16"
    return "fp8"


def utilisation(op: Operator, device: Device, time_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(MFU, MBU) of a call that takes `time_s`: shares of peak FLOP/s and of memory bandwidth."""
    seconds = np.where(time_s > 0, time_s, np.inf)
    peak = peak_flops_per_s(device, arithmetic(op, device))
    return flops(op) / peak / seconds, bytes_moved(op) / device.memory_bandwidth_bytes_per_s / seconds
