"""What a kernel's cost depends on, as columns: the same for a measured row and for an operator.

A `Batch` is one family's rows: raw columns [n] in a fixed order, seconds of a closed form for each (what the
trees correct), and features [n, f] made of both. Training and prediction meet only here. GEMMs are corrected
from the geometric mean of their closed form and the roofline: it errs less on matrices never measured than
either of them. What narrowing the activations takes is added to that.

Features are physics, mostly as logarithms to base 2: sizes, FLOPs, bytes, arithmetic intensity, the two
roofline times and their ratio, how the work falls into tiles and waves over the SMs, alignment (powers of
two that divide a size), and the closed form's own time. Whoever changes a feature raises
`FEATURES_VERSION`: artifacts fitted on others are refused, and a test holds their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodels.fitted import Choice, choose
from costmodels.kernels import (
    Rates,
    decode_time,
    gemm_time,
    moe_time,
    narrowing_time,
    prefill_time,
)
from costmodels.ops import BYTES_PER_ELEMENT, FloatArray
from costmodels.roofline import OUTPUT_BYTES, peak_flops_per_s
from hardware.device import Device

Matrix = npt.NDArray[np.float32]

#: Raw columns of each family, in the order of a batch's matrix.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "prefill": ("batch", "query", "heads", "kv_heads", "head_dim", "window", "kv_bytes"),
    "decode": ("sequences", "context", "heads", "kv_heads", "head_dim", "window", "kv_bytes"),
    "moe": ("tokens", "hidden", "intermediate", "experts", "local_experts", "top_k"),
    "mla_prefill": ("batch", "query", "heads", "kv_bytes"),
    "mla_decode": ("sequences", "context", "heads", "kv_bytes"),
    "bmm": ("m", "n", "k", "batch"),
}
FAMILIES = tuple(COLUMNS)

#: Format of a fit -> (bytes of a weight, bytes of an activation, arithmetic).
FORMATS: Mapping[str, tuple[float, float, str]] = {
    "bf16": (2.0, 2.0, "bf16"),
    "fp8": (1.0, 1.0, "fp8"),
    "fp8_block": (BYTES_PER_ELEMENT["fp8_block"], 1.0, "fp8"),
    "fp4": (BYTES_PER_ELEMENT["fp4"], BYTES_PER_ELEMENT["fp4"], "fp4"),
    "int4_wo": (BYTES_PER_ELEMENT["int4"], 2.0, "bf16"),
    "int8_wo": (1.0, 2.0, "bf16"),
    "int8": (1.0, 1.0, "int8"),
    "fp4_wo": (BYTES_PER_ELEMENT["fp4"], 2.0, "bf16"),
    "fp4_a8": (BYTES_PER_ELEMENT["fp4"], 1.0, "fp8"),
}

#: The package whose measured kernels the shipped predictors were fitted on.
PUBLISHED = "aiconfigurator-core"
#: Engines whose fp8 checkpoints bring one scale per tensor of activations: TensorRT-LLM's come from ModelOpt,
#: which writes them. Their published GEMM tables hold the search for it (7 us and more on H100), their
#: servers do not.
STATIC_SCALES = ("trtllm",)

#: Latent attention as DeepSeek V2 to V3, Kimi K2 and others have it, and as it was measured: sizes of a
#: head's queries and keys, of its values, of the cached latent vector, and of its part that holds the values.
MLA_HEAD, MLA_VALUE, MLA_CACHED, MLA_LATENT = 192, 128, 576, 512

FEATURES_VERSION = 4
#: Upper edges of the base time's classes, s: intervals differ between them.
TIME_CLASSES = (20e-6, 100e-6, 500e-6, np.inf)
_TINY = 1e-12
#: Seconds that starting a kernel costs at the least, beside its roofline.
_START_S = 2e-6
#: Output tiles whose waves over the SMs stand for what a GEMM reads again and again.
_WAVE_TILES = ((128, 256), (128, 128))
#: Parts that a kernel may cut the inner dimension into at the most.
_MOST_SPLITS = 16.0


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one family: raw columns [n, c], closed-form seconds [n], features [n, f]."""

    raw: FloatArray
    base_s: FloatArray
    features: Matrix


def make_batch(
    family: str, raw: FloatArray, device: Device, engine: str, dtype: str, choice: Choice | None = None
) -> Batch:
    """Features and closed-form times of raw rows. KeyError when no closed form stands for them."""
    fit = choice or closed_form(family, device, engine, dtype)
    rates = rates_of(device, family, dtype)
    base, rows = _MAKERS[family](raw, device, rates, dtype, fit)
    return Batch(raw, base, np.column_stack(rows).astype(np.float32))


def closed_form(family: str, device: Device, engine: str, dtype: str) -> Choice:
    """The closed form that a family's learned correction stands on."""
    form = "gemm" if family == "bmm" else family
    return choose(device, engine, form, dtype if form in ("gemm", "moe") else "bf16")


def arithmetic_of(dtype: str) -> str:
    """The tensor cores' format of a predictor's; attention of any format computes in 16 bits."""
    return FORMATS[dtype][2] if dtype in FORMATS else "bf16"


def rates_of(device: Device, family: str, dtype: str) -> Rates:
    """The device's own peaks for a family's arithmetic."""
    arithmetic = FORMATS[dtype][2] if family in ("gemm", "moe", "bmm") else "bf16"
    if arithmetic == "bf16" and "bf16" not in device.peak_flops_per_s:
        arithmetic = "fp16"
    return Rates(
        peak_flops_per_s(device, arithmetic), device.memory_bandwidth_bytes_per_s, float(device.sm_count)
    )


def bound_s(family: str, raw: FloatArray, device: Device, dtype: str) -> FloatArray:
    """[n] roofline times of raw rows: no kernel is faster."""
    rates = rates_of(device, family, dtype)
    work, moved = _WORK[family](raw, dtype)
    return np.maximum(work / rates.peak, moved / rates.bandwidth)


def work_of(family: str, raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    """(FLOPs, bytes) [n] of raw rows."""
    return _WORK[family](raw, dtype)


def time_class(base_s: FloatArray) -> npt.NDArray[np.intp]:
    """[n] which class of size a row is in."""
    return np.searchsorted(np.array(TIME_CLASSES[:-1]), base_s, side="right")


def _log(values: FloatArray) -> FloatArray:
    return np.log2(np.maximum(values, _TINY))


def _twos(values: FloatArray, most: int = 8) -> FloatArray:
    """How often two divides a whole number, at most `most` times."""
    whole = np.maximum(values, 1.0).astype(np.int64)
    found = np.zeros(len(whole))
    for power in range(1, most + 1):
        found += whole % (1 << power) == 0
    return found


def _tiles(rows: FloatArray, cols: FloatArray, units: float, a: int, b: int) -> list[FloatArray]:
    """Thread blocks per SM, how full the last wave is, and how much of the tiles is padding."""
    blocks = np.ceil(rows / a) * np.ceil(cols / b)
    waves = blocks / units
    return [_log(waves), waves / np.ceil(waves), rows * cols / (blocks * a * b)]


def _cached(
    m: FloatArray, n: FloatArray, k: FloatArray, bytes_each: tuple[float, float], rates: Rates, cache: float
) -> list[FloatArray]:
    """How much of a GEMM's operands the L2 cache holds, and what is read from memory when it does not.

    Each wave of tiles, as square as can be, reads its rows and columns anew; what fits into the cache is
    read once.
    """
    weight, act = bytes_each
    left, right = m * k * act, n * k * weight
    once = left + right
    roof = np.maximum(2.0 * m * n * k / rates.peak, (once + 2.0 * m * n) / rates.bandwidth)
    rows = [_log(part / cache) for part in (left, right, np.minimum(left, right), once + 2.0 * m * n)]
    for a, b in _WAVE_TILES:
        down, across = np.ceil(m / a), np.ceil(n / b)
        tall = np.clip(np.sqrt(rates.units * b / a), 1.0, down)
        wide = np.clip(rates.units / tall, 1.0, across)
        tall = np.clip(rates.units / wide, 1.0, down)
        read = np.ceil(down / tall) * np.ceil(across / wide) * k * (tall * a * act + wide * b * weight)
        fits = np.minimum(1.0, cache / np.maximum(np.minimum(left, right), 1.0))
        mixed = np.maximum(once, read * (1.0 - fits) + once * fits)
        rows += [_log(mixed / rates.bandwidth / roof), _log(read / rates.bandwidth / roof)]
    return rows


def _split(m: FloatArray, n: FloatArray, k: FloatArray, units: float) -> list[FloatArray]:
    """How busy the SMs are when few tiles are cut along the inner dimension, and what is left of it."""
    rows = []
    for size in (64, 128):
        blocks = np.ceil(m / size) * np.ceil(n / size)
        parts = np.clip(np.floor(units / blocks), 1.0, _MOST_SPLITS)
        rows += [_log(blocks * parts / units), _log(k / parts)]
    return rows


def _roof(
    work: FloatArray, moved: FloatArray, rates: Rates, base: FloatArray, cache_bytes: float
) -> list[FloatArray]:
    compute, memory = work / rates.peak, moved / rates.bandwidth
    return [
        _log(work),
        _log(moved),
        _log(work / np.maximum(moved, 1.0)),
        _log(compute / np.maximum(memory, _TINY)),
        _log(np.maximum(compute, memory)),
        _log(base),
        _log(base / np.maximum(np.maximum(compute, memory), _TINY)),
        _log(moved / cache_bytes),
    ]


_Made = tuple[FloatArray, list[FloatArray]]


def _gemm_work(raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    m, n, k = raw.T
    weight, act, _ = FORMATS[dtype]
    return 2.0 * m * n * k, n * k * weight + m * k * act + 2.0 * m * n


def _gemm(raw: FloatArray, device: Device, rates: Rates, dtype: str, fit: Choice) -> _Made:
    m, n, k = raw.T
    weight, act, _ = FORMATS[dtype]
    form = gemm_time(fit.fit.values, m, n, k, 1, weight, act, rates)
    narrowing = narrowing_time(fit.fit.values, m, k, rates)
    work, moved = _gemm_work(raw, dtype)
    roof = np.maximum(work / rates.peak, moved / rates.bandwidth)
    base = np.sqrt((form - narrowing) * (roof + _START_S)) + narrowing
    rows = [_log(m), _log(n), _log(k), _log(n * k), _log(m * n), _log(m * k), _log(n / k)]
    rows += _roof(work, moved, rates, base, device.l2_bytes)
    rows += [_twos(m), _twos(n), _twos(k)]
    for a, b in ((64, 64), (64, 128), (128, 128), (128, 256), (256, 128)):
        rows += _tiles(m, n, rates.units, a, b)
    rows += _cached(m, n, k, (weight, act), rates, device.l2_bytes)
    return base, rows + _split(m, n, k, rates.units)


def _attention_columns(raw: FloatArray) -> tuple[FloatArray, ...]:
    return tuple(raw.T)


def _prefill_work(raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    batch, q, heads, kv_heads, dim, window, kv_bytes = _attention_columns(raw)
    seen = np.where(window > 0, np.minimum(window, q), q)
    pairs = q * seen - seen * (seen - 1.0) / 2.0
    moved = batch * q * (2.0 * heads * dim * 2.0 + kv_heads * 2.0 * dim * kv_bytes)
    return 4.0 * batch * heads * dim * pairs, moved


def _prefill(raw: FloatArray, device: Device, rates: Rates, dtype: str, fit: Choice) -> _Made:
    batch, q, heads, kv_heads, dim, window, kv_bytes = _attention_columns(raw)
    base = prefill_time(
        fit.fit.values, q, 0.0, batch, heads, kv_heads, 2.0 * dim, window, 2.0 * dim * kv_bytes, rates
    )
    work, moved = _prefill_work(raw, dtype)
    rows = [_log(batch), _log(q), _log(heads), _log(kv_heads), _log(heads / kv_heads), dim, kv_bytes]
    rows += [_log(batch * q), _log(batch * heads), _log(batch * kv_heads), _twos(q), _twos(heads)]
    rows += [
        _log(np.where(window > 0, window, 1 << 20)),
        _log(np.where(window > 0, q / np.maximum(window, 1.0), 0.25)),
    ]
    rows += _roof(work, moved, rates, base, device.l2_bytes)
    for tile in (64, 128):
        blocks = batch * heads * np.ceil(q / tile)
        rows += [_log(blocks / rates.units), blocks / rates.units / np.ceil(blocks / rates.units)]
    # What one head of a prompt holds, and rows of queries in all.
    return base, [*rows, _log(q * dim), _log(batch * heads * q)]


def _decode_work(raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    n, context, heads, kv_heads, dim, window, kv_bytes = _attention_columns(raw)
    seen = np.where(window > 0, np.minimum(window, context), context)
    return 4.0 * n * heads * dim * seen, n * (seen * kv_heads * 2.0 * dim * kv_bytes + 4.0 * heads * dim)


def _decode(raw: FloatArray, device: Device, rates: Rates, dtype: str, fit: Choice) -> _Made:
    n, context, heads, kv_heads, dim, window, kv_bytes = _attention_columns(raw)

    def form(kv_heads: FloatArray) -> FloatArray:
        each = 2.0 * dim * kv_bytes
        return decode_time(fit.fit.values, n, context, heads, kv_heads, 2.0 * dim, window, each, rates)

    base = form(kv_heads)
    work, moved = _decode_work(raw, dtype)
    seen = np.where(window > 0, np.minimum(window, context), context)
    shared = _log(heads / kv_heads)
    rows = [_log(n), _log(context), _log(seen), _log(heads), _log(kv_heads), shared]
    rows += [dim, kv_bytes, _log(n * kv_heads), _log(n * heads), _log(n * seen), _twos(context), _twos(n)]
    rows += [_log(np.where(window > 0, window, 1 << 20))]
    rows += _roof(work, moved, rates, base, device.l2_bytes)
    for blocks in (n * kv_heads, n * kv_heads * np.ceil(seen / 256.0)):
        rows += [_log(blocks / rates.units), blocks / rates.units / np.ceil(blocks / rates.units)]
    # What one thread block reads of one head, and what all walk through, windows or not.
    rows += [_log(seen * dim * kv_bytes), _log(n * context * kv_heads * dim * kv_bytes)]
    # Queries of one KV head share blocks of a power of two; where they do not fill one, or are too many, some
    # kernels read the cache again for each.
    unfilled = np.where(shared % 1.0 > 0.0, 1.0, 0.0)
    return base, [*rows, unfilled, _log(form(kv_heads=heads) / base)]


def _moe_active(raw: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Local experts that get a token (routing taken as even), and tokens of each."""
    tokens, _, _, experts, local, top_k = raw.T
    share = np.minimum(top_k / experts, 1.0)
    active = local * (1.0 - np.power(1.0 - share, tokens))
    return np.maximum(active, 1e-3), tokens * top_k * local / experts / np.maximum(active, 1e-3)


def _moe_work(raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    tokens, hidden, inter, experts, local, top_k = raw.T
    weight, act, _ = FORMATS[dtype]
    active, _ = _moe_active(raw)
    pairs = tokens * top_k * local / experts
    return 6.0 * pairs * hidden * inter, active * 3.0 * hidden * inter * weight + tokens * hidden * (
        act + 2.0
    )


def _moe(raw: FloatArray, device: Device, rates: Rates, dtype: str, fit: Choice) -> _Made:
    tokens, hidden, inter, experts, local, top_k = raw.T
    weight, act, _ = FORMATS[dtype]
    base = moe_time(fit.fit.values, tokens, hidden, inter, experts, local, top_k, 3.0, weight, act, rates)
    work, moved = _moe_work(raw, dtype)
    active, each = _moe_active(raw)
    rows = [_log(tokens), _log(hidden), _log(inter), _log(experts), _log(local), _log(top_k)]
    rows += [_log(active), _log(each), active / local, _log(hidden * inter), _log(tokens * top_k)]
    rows += [_twos(hidden), _twos(inter), _log(experts / local)]
    rows += _roof(work, moved, rates, base, device.l2_bytes)
    for a, b in ((16, 128), (64, 128), (128, 128)):
        for wide in (2.0 * inter, hidden):
            blocks = active * np.ceil(each / a) * np.ceil(wide / b)
            rows += [_log(blocks / rates.units), each / (np.ceil(each / a) * a)]
    # Where experts are spread over devices, kernels go over the pairs of all of them.
    moved_by_all = tokens * top_k * (hidden + 3.0 * inter) * OUTPUT_BYTES
    return base, [*rows, _log(moved_by_all / rates.bandwidth / base)]


def _bmm_work(raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    m, n, k, batch = raw.T
    weight, act, _ = FORMATS[dtype]
    return 2.0 * m * n * k * batch, batch * (n * k * weight + m * k * act + 2.0 * m * n)


def _bmm(raw: FloatArray, device: Device, rates: Rates, dtype: str, fit: Choice) -> _Made:
    m, n, k, batch = raw.T
    weight, act, _ = FORMATS[dtype]
    base = gemm_time(fit.fit.values, m, n, k, batch, weight, act, rates)
    work, moved = _bmm_work(raw, dtype)
    rows = [_log(m), _log(batch), n, _log(m * batch), _twos(m)]
    rows += _roof(work, moved, rates, base, device.l2_bytes)
    for a, b in ((64, 64), (128, 128)):
        blocks = batch * np.ceil(m / a) * np.ceil(n / b) / rates.units
        rows += [_log(blocks), blocks / np.ceil(blocks)]
    return base, rows


def _mla_prefill_work(raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    batch, q, heads, kv_bytes = raw.T
    wide = float(MLA_HEAD + MLA_VALUE)
    return batch * heads * q * (q + 1.0) * wide, batch * q * heads * wide * (2.0 + kv_bytes)


def _mla_prefill(raw: FloatArray, device: Device, rates: Rates, dtype: str, fit: Choice) -> _Made:
    batch, q, heads, kv_bytes = raw.T
    wide = float(MLA_HEAD + MLA_VALUE)
    base = prefill_time(fit.fit.values, q, 0.0, batch, heads, heads, wide, 0.0, wide * kv_bytes, rates)
    work, moved = _mla_prefill_work(raw, dtype)
    rows = [_log(batch), _log(q), _log(heads), _log(batch * q), _log(batch * heads), kv_bytes, _twos(q)]
    rows += _roof(work, moved, rates, base, device.l2_bytes)
    for tile in (64, 128):
        blocks = batch * heads * np.ceil(q / tile) / rates.units
        rows += [_log(blocks), blocks / np.ceil(blocks)]
    return base, rows


def _mla_decode_work(raw: FloatArray, dtype: str) -> tuple[FloatArray, FloatArray]:
    n, context, heads, kv_bytes = raw.T
    wide = float(MLA_CACHED + MLA_LATENT)
    return 2.0 * n * heads * context * wide, n * (context * MLA_CACHED * kv_bytes + 2.0 * heads * wide)


def _mla_decode(raw: FloatArray, device: Device, rates: Rates, dtype: str, fit: Choice) -> _Made:
    n, context, heads, kv_bytes = raw.T
    wide = float(MLA_CACHED + MLA_LATENT)
    base = decode_time(fit.fit.values, n, context, heads, 1.0, wide, 0.0, MLA_CACHED * kv_bytes, rates)
    work, moved = _mla_decode_work(raw, dtype)
    rows = [_log(n), _log(context), _log(heads), _log(n * context), _log(n * heads), kv_bytes]
    rows += [_twos(context), _twos(n)]
    rows += _roof(work, moved, rates, base, device.l2_bytes)
    for blocks in (n * np.ceil(heads / 64.0), n * np.ceil(heads / 64.0) * np.ceil(context / 256.0)):
        rows += [_log(blocks / rates.units), blocks / rates.units / np.ceil(blocks / rates.units)]
    return base, rows


_MAKERS: Mapping[str, Callable[[FloatArray, Device, Rates, str, Choice], _Made]] = {
    "gemm": _gemm,
    "prefill": _prefill,
    "decode": _decode,
    "moe": _moe,
    "mla_prefill": _mla_prefill,
    "mla_decode": _mla_decode,
    "bmm": _bmm,
}
_WORK: Mapping[str, Callable[[FloatArray, str], tuple[FloatArray, FloatArray]]] = {
    "gemm": _gemm_work,
    "prefill": _prefill_work,
    "decode": _decode_work,
    "moe": _moe_work,
    "mla_prefill": _mla_prefill_work,
    "mla_decode": _mla_decode_work,
    "bmm": _bmm_work,
}


def kinds_of(family: str, raw: FloatArray) -> FloatArray:
    """[kinds, 4] of attention's rows: with a window (1) or without (0), KV bytes an element, least and
    greatest head size. Kernels differ between kinds, and no kind tells of another; [0, 4] elsewhere."""
    if family not in ("prefill", "decode"):
        return np.zeros((0, 4))
    windowed, kv_bytes, dim = raw[:, 5] > 0, raw[:, 6], raw[:, 4]
    found = []
    for a, b in np.unique(np.column_stack([windowed, kv_bytes]), axis=0):
        own = dim[(windowed == a) & (kv_bytes == b)]
        found.append([a, b, own.min(), own.max()])
    return np.array(found)


def known(kinds: FloatArray, raw: FloatArray) -> npt.NDArray[np.bool_]:
    """[n] whether a row is of one of `kinds` (all are, where there are none)."""
    if not len(kinds):
        return np.ones(len(raw), dtype=bool)
    windowed, kv_bytes, dim = raw[:, 5, None] > 0, raw[:, 6, None], raw[:, 4, None]
    a, b, low, high = kinds.T
    return np.asarray(((windowed == a) & (kv_bytes == b) & (dim >= low) & (dim <= high)).any(axis=1))


def columns(family: str, **values: object) -> FloatArray:
    """Raw rows [n, c] from named columns that broadcast."""
    names: Sequence[str] = COLUMNS[family]
    arrays = np.broadcast_arrays(*(np.asarray(values[name], dtype=np.float64) for name in names))
    return np.column_stack([array.reshape(-1) for array in arrays])
