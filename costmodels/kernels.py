"""How long a kernel takes: closed forms with a handful of coefficients per family.

Each function is the *shape* of a kernel's cost; `coefficients.toml` holds its coefficients, fitted
on measured kernels by `benchmarks/roofline_fit.py`. All are vectorised over their sizes and work
in seconds, bytes and FLOP/s. The parts are physical: a fixed cost per kernel, the memory system's
share, the tensor cores' share with tiles rounded up and spread over the SMs in whole waves, and a
smooth maximum that lets the two overlap (p -> infinity is a perfect roofline).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from costmodels.ops import FloatArray, Size

Coefficients = Mapping[str, float]


class Rates(NamedTuple):
    """What a kernel's form needs of a device: FLOP/s of the arithmetic, bytes/s, SMs."""

    peak: float
    bandwidth: float
    units: float


#: Output tiles (rows, columns) of dense GEMM kernels, and splits of the inner dimension.
_TILES = np.array(
    [
        (16, 64),
        (16, 128),
        (32, 64),
        (32, 128),
        (64, 64),
        (64, 128),
        (128, 64),
        (128, 128),
        (128, 256),
        (256, 128),
    ],
    dtype=np.float64,
)
_SPLITS = np.array([1, 2, 4, 8, 16], dtype=np.float64)
_COMBOS = np.array([(a, b, s) for a, b in _TILES for s in _SPLITS])


def smooth_max(a: FloatArray, b: FloatArray, p: float) -> FloatArray:
    """(a^p + b^p)^(1/p) without overflow."""
    high, low = np.maximum(a, b), np.minimum(a, b)
    ratio = np.divide(low, high, out=np.zeros_like(high), where=high > 0)
    return np.asarray(high * np.power(1.0 + np.power(ratio, p), 1.0 / p), dtype=np.float64)


def gemm_time(
    c: Coefficients,
    m: Size,
    n: Size,
    k: Size,
    batch: Size,
    weight_bytes: float,
    act_bytes: float,
    rates: Rates,
) -> FloatArray:
    """(m x k) @ (k x n), `batch` times: the best of a few tilings and splits of k.

    One tiling costs waves x (work of one tile / rate of one SM); a tile of a x b reuses its
    operands less than a large one, hence the factor 1 + reuse (1/a + 1/b). Few thread blocks
    cannot draw full bandwidth (`fill`: the share of SMs that must be busy for that). What
    narrowing the activations takes comes first (`narrowing_time`).
    """
    m, n, k, batch = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (m, n, k, batch)))
    shape = m.shape
    m, n, k, batch = (x.reshape(-1, 1) for x in (m, n, k, batch))
    rows, cols, splits = _COMBOS.T
    blocks = np.ceil(m / rows) * np.ceil(n / cols) * splits * batch
    depth = np.ceil(k / splits / 32) * 32
    waves = np.ceil(blocks / rates.units)
    waves = waves + c["tail"] * (blocks / rates.units - waves) * (waves > 1)
    per_unit = rates.peak / rates.units * c["compute"]
    reuse = 1.0 + c["reuse"] * 32.0 * (1.0 / rows + 1.0 / cols)
    compute = waves * (2.0 * rows * cols * depth * reuse / per_unit + c["wave_s"])
    moved = batch * (n * k * weight_bytes + m * k * act_bytes + 2.0 * m * n)
    fill = np.clip(blocks / (c["fill"] * rates.units), 1e-9, 1.0)
    memory = moved / (rates.bandwidth * c["memory"] * fill)
    partial = np.where(splits > 1, splits * m * n * batch * 8.0 / (3.0 * rates.bandwidth) + c["split_s"], 0.0)
    time = smooth_max(compute, memory, c["overlap"]) + partial
    # Rows that are no multiple of 16 miss the aligned loads of narrow formats (CUTLASS fp8: +20 % to +90 %).
    time = time + narrowing_time(c, batch * m, k, rates)
    time = time + c["odd"] * np.where(
        (m > 256) & (m % 16 > 0), n * k * batch * weight_bytes / rates.bandwidth, 0.0
    )
    return np.asarray(c["fixed_s"] + time.min(axis=1).reshape(shape), dtype=np.float64)


def narrowing_time(c: Coefficients, m: Size, k: Size, rates: Rates) -> FloatArray:
    """Scaling activations [m, k] and narrowing them from 16 bits, by kernels before a GEMM of narrow format.

    They move `prepare` bytes per element; a thread block per row takes `row_s` of the device at the least.
    """
    m, k = np.asarray(m, dtype=np.float64), np.asarray(k, dtype=np.float64)
    moved = c.get("prepare", 0.0) * m * k / rates.bandwidth
    return np.asarray(np.maximum(moved, c.get("row_s", 0.0) * m), dtype=np.float64)


#: Cached keys of a prompt: share of the bandwidth at which they come, and the fewest that one SM is dealt.
_CACHED_MEMORY, _SPLIT_KEYS = 0.9, 256.0


#: Engines that compile the quantization of activations into the kernel before; tables of their fp8 GEMMs hold
#: it as kernels of its own (some 100 us for 8,192 x 4,096 on H100, where one pass takes 30).
COMPILED_SCALES = ("vllm",)
#: Seconds that these take to start (vLLM's rows of up to 64 tokens take 2.4 to 3.6 us more than bare GEMMs on
#: our own H100 and H200), and the share of products before which a pass is left: of a layer's four,
#: attention's output is the one that no compiled kernel writes.
_QUANTIZE_S, _PASSES = 3e-6, 0.25
#: Share of a table's GEMM that is left at the least when the scaling of its activations is taken off.
_LEAST_LEFT = 0.25


def compiled_narrowing(c: Coefficients, m: Size, k: Size, rates: Rates) -> FloatArray:
    """Seconds that a table's fp8 GEMM takes for narrowing [m, k] and a compiled model does not.

    The closed form tells them from the GEMM, as they do not hang on its width. Bare GEMMs on our own H100 and
    H200 (1,441 shapes): 53 and 32 % off as tables have them, 17 and 11 % less this (docs/accuracy.md).
    """
    m, k = np.asarray(m, dtype=np.float64), np.asarray(k, dtype=np.float64)
    one_pass = 3.0 * m * k / rates.bandwidth
    spared = _QUANTIZE_S + narrowing_time(c, m, k, rates) - _PASSES * one_pass
    return np.asarray(np.where(m > 0, np.maximum(spared, 0.0), 0.0))


def less_scaling(time_s: FloatArray, spared_s: FloatArray) -> FloatArray:
    """A table's GEMM without the scaling of its activations that a server does not do."""
    return np.asarray(np.maximum(time_s - spared_s, _LEAST_LEFT * time_s))


def prefill_time(
    c: Coefficients,
    q: Size,
    p: Size,
    batch: Size,
    heads: Size,
    kv_heads: Size,
    dims: Size,
    window: Size,
    kv_bytes: Size,
    rates: Rates,
    *,
    split: bool = True,
) -> FloatArray:
    """Causal flash attention of `batch` chunks of q new tokens after p cached ones.

    dims = qk_dim + v_dim; kv_bytes = bytes of one cached token of one KV head. Thread blocks of
    128 queries of one head, each over the keys it may see in blocks of 128; softmax costs as much
    as `softmax` more head dimensions would. The longest block bounds a grid that is not full; with `split`
    the cached keys of such a grid are dealt out to idle SMs (FlashAttention 3 and FlashInfer do so).

    Cached tokens were measured on H100 and H200 (vLLM 0.24; docs/accuracy.md): long rows of keys come at
    `_CACHED_MEMORY` of the bandwidth, where the short ones that coefficients are fitted on reach less.
    """
    block = 128.0
    q, p, batch, heads, kv_heads, dims, window, kv_bytes = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (q, p, batch, heads, kv_heads, dims, window, kv_bytes))
    )
    reach = np.where(window > 0, window, np.inf)
    # Pairs with every block of queries and keys rounded up to whole tiles on the diagonal.
    rows = np.ceil(q / block) * block
    padded = np.where(q < block, np.maximum(16.0, 2.0 ** np.ceil(np.log2(np.maximum(q, 1.0)))), rows)
    growing = np.clip(reach - p, 0.0, padded)
    pairs = (
        growing * p
        + growing * (growing + block) / 2
        + (padded - growing) * np.minimum(reach + block, p + q + block)
    )
    blocks = batch * heads * np.ceil(q / block)
    width = dims + c["softmax"]
    work = 2.0 * batch * heads * pairs * width
    longest = 2.0 * np.minimum(padded, block) * np.minimum(p + padded, reach + block) * width
    rate = rates.peak * c["compute"]
    cached = np.minimum(p, reach)
    most = np.maximum(1.0, cached / _SPLIT_KEYS) if split else 1.0
    splits = np.clip(rates.units / np.maximum(blocks, 1.0), 1.0, most)
    blocks = blocks * splits
    waves = np.maximum(1.0, np.ceil(blocks / rates.units))
    compute = np.maximum(work / rate, longest / splits * rates.units / rate)
    compute = compute * (1.0 + c["tail"] * (waves * rates.units / np.maximum(blocks, 1.0) - 1.0) / waves)
    new = batch * q * (heads * dims * 2.0 + kv_heads * kv_bytes) / c["memory"]
    old = batch * cached * kv_heads * kv_bytes / max(c["memory"], _CACHED_MEMORY)
    memory = (new + old) / rates.bandwidth
    time = smooth_max(compute, memory, c["overlap"])
    return np.asarray(c["fixed_s"] + waves * c["wave_s"] + time, dtype=np.float64)


def splits_cached(engine: str) -> bool:
    """Whether an engine's prompt kernels deal the cached keys of a small grid out to idle SMs.

    Measured of vLLM, whose libraries SGLang shares; of TensorRT-LLM nobody did, so it is not assumed."""
    return engine != "trtllm"


def decode_time(
    c: Coefficients,
    n: Size,
    context: Size,
    heads: Size,
    kv_heads: Size,
    dims: Size,
    window: Size,
    kv_bytes: Size,
    rates: Rates,
) -> FloatArray:
    """One query token for each of n sequences over `context` cached ones (flash decoding).

    Reads every cached byte once at `memory` of the bandwidth; the queries that share a KV head
    are padded to 16 rows of the tensor cores; each (sequence, KV head) costs `block_s` of one SM,
    and a cache cut over idle SMs is put together again in `combine_s`.
    """
    n, context, heads, kv_heads, dims, window, kv_bytes = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (n, context, heads, kv_heads, dims, window, kv_bytes))
    )
    seen = np.where(window > 0, np.minimum(context, window), context)
    group = np.ceil(heads / np.maximum(kv_heads, 1.0) / 16.0) * 16.0
    # With a window some kernels (FlashAttention 2) do not fold the queries of one KV head into one block.
    fold = np.where(window > 0, np.power(heads / np.maximum(kv_heads, 1.0), c["unpacked"]), 1.0)
    blocks = n * kv_heads * np.maximum(1.0, np.ceil(group / 128.0)) * fold
    tiles = np.ceil(np.maximum(seen, 1.0) / 64.0) * 64.0
    work = 2.0 * n * kv_heads * group * tiles * fold * (dims + c["softmax"])
    compute = work / (rates.peak * c["compute"])
    moved = n * (heads * dims * 2.0 + seen * kv_heads * kv_bytes)
    memory = moved / (rates.bandwidth * c["memory"])
    # A thread block walks at least one tile of keys, and no split is shorter than `chunk` tiles.
    splits = np.clip(rates.units / np.maximum(blocks, 1.0), 1.0, np.maximum(1.0, tiles / 64.0 / c["chunk"]))
    spread = np.clip(blocks * splits / rates.units, 1e-9, 1.0)
    walk = tiles / 64.0 / splits * c["tile_s"]
    body = smooth_max(compute / spread, memory / spread, c["overlap"])
    body = smooth_max(body, walk, c["overlap"])
    combine = np.where(splits > 1.5, c["combine_s"], 0.0)
    return np.asarray(c["fixed_s"] + blocks / rates.units * c["block_s"] + combine + body, dtype=np.float64)


def moe_time(
    c: Coefficients,
    tokens: Size,
    hidden: Size,
    intermediate: Size,
    experts: Size,
    local: Size,
    top_k: Size,
    matrices: Size,
    weight_bytes: float,
    act_bytes: float,
    rates: Rates,
) -> FloatArray:
    """Routed experts of one layer on one device: sort, two grouped GEMMs, weighted sum.

    `active` experts stream their weights; the rows of each are padded to a tile whose height the
    kernel picks from 16 to 128 by the mean rows per expert. A few large experts on few tiles
    leave SMs idle, hence whole waves. Where experts are spread over devices, `routed` of what all
    pairs of token and expert hold crosses memory on each: buffers and sums go over those of others too.
    """
    tokens, hidden, intermediate, experts, local, top_k, matrices = np.broadcast_arrays(
        *(
            np.asarray(x, dtype=np.float64)
            for x in (tokens, hidden, intermediate, experts, local, top_k, matrices)
        )
    )
    miss = np.clip(1.0 - top_k / experts, 0.0, 1.0)
    active = np.maximum(local * (1.0 - miss ** np.maximum(tokens, 1.0)), 1e-9)
    rows = tokens * top_k * local / experts
    mean = np.maximum(rows / active, 1.0)
    tile = np.clip(2.0 ** np.ceil(np.log2(mean)), 16.0, 128.0)
    padded = active * (mean + c["pad"] * tile)
    work = 2.0 * padded * hidden * intermediate * matrices
    reuse = 1.0 + c["reuse"] * 32.0 * (1.0 / tile + 1.0 / 128.0)
    blocks = np.maximum(active * np.ceil(mean / tile), 1.0) * np.ceil((matrices - 1) * intermediate / 128.0)
    second = np.maximum(active * np.ceil(mean / tile), 1.0) * np.ceil(hidden / 128.0)
    waves = np.maximum(1.0, blocks / rates.units) + np.maximum(1.0, second / rates.units)
    idle = waves / (blocks / rates.units + second / rates.units)
    compute = work * reuse * np.power(idle, c["idle"]) / (rates.peak * c["compute"])
    streamed = active * matrices * hidden * intermediate * weight_bytes
    memory = streamed * np.power(idle, c["idle"]) / (rates.bandwidth * c["memory"])
    each = hidden * (act_bytes + 4.0) + intermediate * (2.0 * matrices)
    others = np.maximum(tokens * top_k - rows, 0.0) * each * c.get("routed", 0.0)
    body = smooth_max(compute, memory, c["overlap"])
    return np.asarray(
        c["fixed_s"]
        + active * c["expert_s"]
        + waves * c["wave_s"]
        + rows * each / (rates.bandwidth * c["shuffle"])
        + others / rates.bandwidth
        + body,
        dtype=np.float64,
    )
