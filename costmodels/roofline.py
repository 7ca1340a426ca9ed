"""Work of an operator (FLOPs, bytes) and the least time any kernel could take for it.

Everything here is exact arithmetic on shapes; nothing is fitted. `roofline_bound` is what every
predictor is clamped to from below and what utilisation (MFU, MBU) is measured against.
Units: FLOP (a multiply-add is two), bytes, seconds. S. Williams, A. Waterman, D. Patterson,
"Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import numpy as np

from costmodels.ops import (
    BYTES_PER_ELEMENT,
    Collective,
    DecodeAttention,
    Elementwise,
    FloatArray,
    Gemm,
    GroupedGemm,
    Operator,
    PrefillAttention,
    Size,
)
from hardware.device import Device

#: Bytes of an activation as it enters or leaves a kernel that accumulates in fp32.
OUTPUT_BYTES = 2.0

_HALF = ("bf16", "fp16")
#: The peak that a quantized arithmetic format is looked up under.
_PEAK_OF = {"fp8_block": "fp8"}
#: NVIDIA generations before Ampere have neither bf16 nor the kernels of weight-only fp8 and fp8 KV
#: (vLLM's Marlin kernels ask for compute capability 8.0).
_PRE_AMPERE = frozenset({"volta", "turing"})


def array(value: Size) -> FloatArray:
    """A size as float64 array (0-d for scalars)."""
    return np.asarray(value, dtype=np.float64)


def element_bytes(dtype: str) -> float:
    """Bytes of one stored element, scales included; KeyError for an unknown format."""
    return BYTES_PER_ELEMENT[dtype]


# --- formats ------------------------------------------------------------------------------


def peak_flops_per_s(device: Device, dtype: str) -> float:
    """Dense peak of arithmetic in `dtype`; KeyError where the device has none.

    bf16 and fp16 run at one rate on every device that has both; a catalog entry that names only
    one of them stands for both, except on devices older than bf16.
    """
    peaks = device.peak_flops_per_s
    name = _PEAK_OF.get(dtype, dtype)
    if name in peaks:
        return float(peaks[name])
    if name == "fp16" and "bf16" in peaks and device.vendor != "google":
        return float(peaks["bf16"])
    raise KeyError(f"{device.name} has no {name} arithmetic")


def compute_format(device: Device, weights: str, activations: str) -> str:
    """The format in which `weights` times `activations` is multiplied on `device`.

    16-bit activations multiply in 16 bits whatever the weights are stored in (Marlin-style
    weight-only kernels: W8A16, W4A16). fp8 and int8 activations multiply in their own format,
    with weights of the same or fewer bits (W8A8, W4A8). fp4 x fp4 runs in fp4.
    Raises KeyError for a pair the device cannot run.
    """
    element_bytes(weights)
    element_bytes(activations)
    if activations in ("fp32", *_HALF):
        peak_flops_per_s(device, activations)
        return activations
    peak_flops_per_s(device, activations)
    if weights in _HALF or weights == "fp32":
        raise KeyError(f"{activations} activations need weights of 8 bits or fewer, not {weights}")
    return "fp8" if activations == "fp8_block" else activations


def _family(dtype: str) -> str:
    return "fp8" if dtype == "fp8_block" else dtype


def supports(device: Device, weights: str, activations: str, kv: str) -> str | None:
    """Why `device` cannot serve these formats, in one sentence, or None when it can."""
    for name in (weights, activations, kv):
        if name not in BYTES_PER_ELEMENT:
            known = ", ".join(sorted(BYTES_PER_ELEMENT))
            return f"unknown format {name}; known are {known}"
    if weights == "int2" or activations in ("int2", "int4"):
        return f"no kernel multiplies {weights} weights by {activations} activations"
    old = device.architecture in _PRE_AMPERE
    try:
        compute_format(device, weights, activations)
    except KeyError:
        if activations in _HALF:
            other = "fp16" if activations == "bf16" else "bf16"
            return f"{device.name} has no {activations} arithmetic; use {other}"
        narrow = _family(activations)
        if narrow not in device.peak_flops_per_s:
            bits = {"fp8": 8, "int8": 8, "fp4": 4}.get(narrow, 8)
            return (
                f"{device.name} has no {narrow} arithmetic; {narrow} weights run weight-only "
                f"with 16-bit activations (W{bits}A16)"
            )
        return f"{activations} activations need weights of 8 bits or fewer, not {weights}"
    if activations in _HALF and old and _family(weights) in ("fp8", "fp4"):
        return (
            f"{device.name} cannot run {weights} weights: weight-only {_family(weights)} kernels need "
            "Ampere or newer"
        )
    if activations == "fp8" and weights == "int8":
        return "no kernel multiplies int8 weights by fp8 activations"
    if activations == "fp8" and weights == "fp4" and "fp4" not in device.peak_flops_per_s:
        # mxfp4 x mxfp8 is an instruction of Blackwell; before it, fp4 weights run weight-only.
        return f"{device.name} cannot multiply fp4 weights by fp8 activations; use 16-bit activations"
    if activations == "int8" and weights not in ("int8", "int4"):
        return f"no kernel multiplies {weights} weights by int8 activations"
    if activations == "fp4" and weights != "fp4":
        return f"no kernel multiplies {weights} weights by fp4 activations"
    if _family(kv) == "fp8" and old:
        return f"{device.name} cannot read an fp8 KV cache; its attention kernels need Ampere or newer"
    if kv == "fp4" and "fp4" not in device.peak_flops_per_s:
        return f"{device.name} has no fp4 arithmetic, so it cannot read an fp4 KV cache"
    if kv == "bf16" and old:
        return f"{device.name} has no bf16 arithmetic; use an fp16 KV cache"
    return None


def attention_format(device: Device, kv: str) -> str:
    """Arithmetic of attention: 16 bits (an fp8 cache is widened, or run in fp8 where the kernel
    can; the bound takes the faster of the two so that it stays a bound)."""
    half = "bf16" if "bf16" in device.peak_flops_per_s else "fp16"
    if _family(kv) == "fp8" and "fp8" in device.peak_flops_per_s:
        return "fp8"
    return half


# --- attention geometry ---------------------------------------------------------------------


def causal_pairs(query_tokens: Size, context_tokens: Size, window: int = 0) -> FloatArray:
    """(query, key) pairs of one causal chunk: sum over i in 1..q of min(p + i, window or inf)."""
    q, p = array(query_tokens), array(context_tokens)
    if window <= 0:
        return q * p + q * (q + 1) / 2
    growing = np.clip(window - p, 0.0, q)  # queries that still see everything before them
    return growing * p + growing * (growing + 1) / 2 + (q - growing) * window


def active_experts(tokens: Size, experts: int, local_experts: int, top_k: int) -> FloatArray:
    """Expected local experts that get at least one of `tokens`, routed uniformly at random:
    local * (1 - (1 - k/E)^T). Linear below one token, so that it stays continuous at zero."""
    t = array(tokens)
    miss = 1.0 - top_k / experts
    many = 1.0 - np.power(miss, np.maximum(t, 1.0)) if miss > 0 else np.ones_like(t)
    return np.asarray(local_experts * np.where(t < 1, many * t, many), dtype=np.float64)


def _kv_bytes_per_token(op: PrefillAttention | DecodeAttention) -> float:
    width = op.qk_dim if op.latent else op.kv_heads * (op.qk_dim + op.v_dim)
    return width * element_bytes(op.kv)


# --- work -----------------------------------------------------------------------------------


def flops(op: Operator) -> FloatArray:
    """FLOPs of one call, over the broadcast shape of its sizes. Collectives count none."""
    match op:
        case Gemm():
            return 2.0 * op.batch * array(op.m) * op.n * op.k
        case PrefillAttention():
            pairs = causal_pairs(op.query_tokens, op.context_tokens, op.window)
            return 2.0 * pairs * op.heads * (op.qk_dim + op.v_dim)
        case DecodeAttention():
            context = array(op.context_tokens)
            seen = np.minimum(context, op.window) if op.window else context
            return 2.0 * array(op.sequences) * seen * op.heads * (op.qk_dim + op.v_dim)
        case GroupedGemm():
            pairs = array(op.tokens) * op.top_k * op.local_experts / op.experts
            return 2.0 * pairs * op.hidden * op.intermediate * (3 if op.gated else 2)
        case Elementwise():
            return np.broadcast_arrays(array(op.flops), array(op.bytes_moved))[0] + 0.0
        case Collective():
            return np.zeros_like(array(op.message_bytes))


def bytes_moved(op: Operator) -> FloatArray:
    """Bytes that must cross device memory once, over the broadcast shape of its sizes."""
    match op:
        case Gemm():
            matrix = op.n * op.k * element_bytes(op.weights)
            row = op.k * element_bytes(op.activations) + op.n * OUTPUT_BYTES
            return np.where(array(op.m) > 0, op.batch * (matrix + array(op.m) * row), 0.0)
        case PrefillAttention():
            q, p = array(op.query_tokens), array(op.context_tokens)
            keys = np.minimum(p + q, op.window + q) if op.window else p + q
            io = q * op.heads * (op.qk_dim + op.v_dim) * OUTPUT_BYTES
            return np.where(q > 0, io + keys * _kv_bytes_per_token(op), 0.0)
        case DecodeAttention():
            n, context = array(op.sequences), array(op.context_tokens)
            seen = np.minimum(context, op.window) if op.window else context
            each = op.heads * (op.qk_dim + op.v_dim) * OUTPUT_BYTES
            return n * (each + seen * _kv_bytes_per_token(op))
        case GroupedGemm():
            tokens = array(op.tokens)
            matrices = 3 if op.gated else 2
            expert = matrices * op.hidden * op.intermediate * element_bytes(op.weights)
            active = active_experts(tokens, op.experts, op.local_experts, op.top_k)
            arriving = tokens * min(1.0, op.top_k * op.local_experts / op.experts)
            moving = arriving * op.hidden * (element_bytes(op.activations) + OUTPUT_BYTES)
            return active * expert + moving
        case Elementwise():
            return array(op.bytes_moved) + 0.0
        case Collective():
            return array(op.message_bytes) + 0.0


def arithmetic(op: Operator, device: Device) -> str:
    """The format an operator computes in on `device`; KeyError where it cannot."""
    match op:
        case Gemm() | GroupedGemm():
            return compute_format(device, op.weights, op.activations)
        case PrefillAttention() | DecodeAttention():
            element_bytes(op.kv)
            return attention_format(device, op.kv)
        case _:
            return "bf16" if "bf16" in device.peak_flops_per_s else "fp16"


def roofline_bound(op: Operator, device: Device) -> FloatArray:
    """Least seconds: max(FLOPs / peak, bytes / memory bandwidth); link rate for collectives.

    Raises KeyError for a format the device cannot run.
    """
    if isinstance(op, Collective):
        from costmodels.collectives import collective_bound

        return collective_bound(op)
    compute = flops(op) / peak_flops_per_s(device, arithmetic(op, device))
    return np.maximum(compute, bytes_moved(op) / device.memory_bandwidth_bytes_per_s)


def arithmetic_intensity(op: Operator) -> FloatArray:
    """FLOP per byte."""
    return flops(op) / bytes_moved(op)
