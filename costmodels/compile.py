"""Terms of a model's step compiled to `StepTables`: arrays the simulator reads in nanoseconds.

Costs are evaluated at the sizes of `costmodels.sizes`, where predictors answer, with straight lines between.
Terms are added up at these sizes only, and only for stages that differ; what the simulator looks up in its
loop is then spread over all sizes, what it reads afterwards stays a `Sampled` curve. Curves are cached by
what they depend on, so plans that differ in batching or in depth share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from costmodels.base import CostModel
from costmodels.ops import FloatArray, Operator
from costmodels.roofline import bytes_moved, causal_pairs, flops, roofline_bound
from costmodels.sizes import cached_knots, context_knots, length_knots, sample_sizes, sequence_knots
from costmodels.table import HostOverhead, IntArray, Sampled, StepTables, Term, spread
from hardware.device import Device
from hardware.errors import InputError

CATEGORIES = ("gemm", "attention", "moe", "communication")
SIZES = ("tokens", "micro_batch", "logits", "prefill", "decode")


@dataclass(slots=True, eq=False)
class _Curve:
    """One call's cost at `sample_sizes`: seconds, interval, joules above idle, FLOPs, bytes."""

    time_s: FloatArray
    low_s: FloatArray
    high_s: FloatArray
    energy_j: FloatArray
    flops: FloatArray
    bytes_moved: FloatArray
    bound_s: FloatArray  # no kernel is faster
    kind: str
    source: str

    def overlapped(self, seconds: float) -> float | FloatArray:
        """How much of the call hides behind its neighbours when each could hide `seconds`."""
        if seconds <= 0:
            return 0.0
        return np.minimum(seconds, self.time_s - self.bound_s)


@dataclass(slots=True, eq=False)
class _Sum:
    """Cost of all terms of one size class at `sizes` [K], per kind of stage [U, K], and its accounting."""

    sizes: FloatArray
    stages: FloatArray
    low: FloatArray
    high: FloatArray
    launches: FloatArray  # [U]
    energy: FloatArray
    flops: FloatArray
    bytes_moved: FloatArray
    categories: dict[str, FloatArray] = field(default_factory=dict)  # over all stages

    def at(self, where: IntArray) -> FloatArray:
        """[U, n] seconds of each kind of stage at any sizes."""
        return np.stack([np.interp(where, self.sizes, row) for row in self.stages])


_CACHE: dict[tuple[Any, ...], _Curve] = {}
_CACHE_LIMIT = 4096


def _hashable(operator: Operator) -> tuple[Any, ...]:
    """What identifies an operator built for one scalar size."""
    values = (getattr(operator, name) for name in type(operator).__dataclass_fields__)
    plain = tuple(value.tolist() if isinstance(value, np.ndarray) else value for value in values)
    return (type(operator).__name__, *plain)


def _device_key(device: Device) -> tuple[Any, ...]:
    peaks = tuple(sorted(device.peak_flops_per_s.items()))
    return (
        device.name,
        device.architecture,
        device.memory_bandwidth_bytes_per_s,
        peaks,
        device.sm_count,
        device.tdp_w,
        device.idle_w,
    )


def _curve(term: Term, model: CostModel, device: Device, largest: int) -> _Curve:
    probe = tuple(_hashable(term.operator(size)) for size in (1.0, 2.0, float(largest)))
    key = (model.name, _device_key(device), probe, largest)
    found = _CACHE.get(key)
    if found is None:
        sizes = sample_sizes(largest)
        operator = term.operator(sizes)
        guess = model.predict(operator, device)

        def dense(values: FloatArray) -> FloatArray:
            curve = np.array(np.broadcast_to(values, sizes.shape), dtype=np.float64)
            curve[0] = 0.0
            return curve

        found = _Curve(
            dense(guess.time_s),
            dense(guess.low_s),
            dense(guess.high_s),
            dense((guess.power_w - device.idle_w) * guess.time_s),
            dense(flops(operator)),
            dense(bytes_moved(operator)),
            dense(np.minimum(roofline_bound(operator, device), guess.low_s)),
            guess.kind,
            guess.source,
        )
        if len(_CACHE) >= _CACHE_LIMIT:
            _CACHE.clear()
        _CACHE[key] = found
    return found


_SURFACES: dict[tuple[Any, ...], Any] = {}


def _surface(term: Term, model: CostModel, device: Device, first: FloatArray, second: FloatArray) -> Any:
    """The cost model's answer for attention on a grid, kept: plans of one tensor degree share it."""
    probe = tuple(_hashable(term.operator(a, b)) for a, b in ((1.0, 1.0), (2.0, 64.0), (64.0, 4096.0)))
    key = (model.name, _device_key(device), probe, first.tobytes(), second.tobytes())
    found = _SURFACES.get(key)
    if found is None:
        found = model.predict(term.operator(first[:, None], second[None, :]), device)
        if len(_SURFACES) >= _CACHE_LIMIT:
            _SURFACES.clear()
        _SURFACES[key] = found
    return found


def _accumulate(
    terms: Sequence[Term],
    kinds: IntArray,
    size: str,
    model: CostModel,
    device: Device,
    largest: int,
    rows: set[Any],
    host: HostOverhead,
) -> _Sum:
    """The sum of all terms of a size; `kinds` are the stages that stand for all others."""
    sizes = sample_sizes(largest)

    def flat() -> FloatArray:
        return np.zeros(len(sizes))

    def staged() -> FloatArray:
        return np.zeros((len(kinds), len(sizes)))

    total = _Sum(sizes, staged(), staged(), staged(), np.zeros(len(kinds)), flat(), flat(), flat())
    total.categories = {name: flat() for name in CATEGORIES}
    for term in terms:
        if term.size != size:
            continue
        curve = _curve(term, model, device, largest)
        everywhere = np.array(term.stage_counts, dtype=np.float64)
        counts = everywhere[kinds]
        late: FloatArray | float
        if term.category == "communication":
            # Collectives wait for every device: nothing of them hides, and the last one comes late.
            late = np.where(sizes > 0, host.collective_s, 0.0)
        else:
            late = -curve.overlapped(host.overlap_s * term.launches)
        time_s = curve.time_s + late
        total.stages += counts[:, None] * time_s
        total.low += counts[:, None] * np.minimum(curve.low_s + np.maximum(late, 0.0), time_s)
        total.high += counts[:, None] * (curve.high_s + late)
        total.launches += counts * term.launches
        often = everywhere.sum()
        total.energy += often * curve.energy_j
        total.flops += often * curve.flops
        total.bytes_moved += often * curve.bytes_moved
        total.categories[term.category] += often * time_s
        rows.add((term.category, term.name, curve.source, curve.kind))
    return total


def _stage_kinds(terms: Sequence[Term], pipeline: int) -> tuple[IntArray, IntArray]:
    """(stages that stand for all others, how many each stands for): stages with the same terms are alike."""
    if not terms or pipeline == 1:
        return np.zeros(1, dtype=np.int64), np.array([pipeline])
    counts = np.array([term.stage_counts for term in terms])
    _, first, often = np.unique(counts, axis=1, return_index=True, return_counts=True)
    return first.astype(np.int64), often.astype(np.int64)


def _check(terms: Sequence[Term], pipeline: int) -> None:
    for term in terms:
        if term.size not in SIZES:
            raise InputError(f"terms.{term.name}.size", f"unknown size {term.size!r}", ", ".join(SIZES))
        if term.category not in CATEGORIES:
            raise InputError(
                f"terms.{term.name}.category", f"unknown category {term.category!r}", ", ".join(CATEGORIES)
            )
        if len(term.stage_counts) != pipeline:
            raise InputError(
                f"terms.{term.name}.stage_counts",
                f"{len(term.stage_counts)} stages are given, the pipeline has {pipeline}",
            )


def _padding(sizes: tuple[int, ...], largest: int) -> tuple[IntArray, FloatArray]:
    """(padded size of each batch, whether it runs as a graph) for batches 0..largest."""
    batch = np.arange(largest + 1)
    if not sizes:
        return batch, np.zeros(largest + 1)
    captured = np.array(sorted(sizes))
    at = np.searchsorted(captured, batch)
    graph = at < len(captured)
    padded = np.where(graph, captured[np.minimum(at, len(captured) - 1)], batch)
    padded[0] = 0
    return padded, graph.astype(np.float64)


def _latency_cycle(stages: FloatArray, often: IntArray) -> tuple[FloatArray, FloatArray]:
    """Time through all stages, and of as many steps as there are stages on the slowest."""
    if len(often) == 1:
        both = stages[0] * often[0]
        return both, both
    return (stages * often[:, None]).sum(axis=0), often.sum() * stages.max(axis=0)


def compile_tables(
    terms: Sequence[Term],
    device: Device,
    model: CostModel,
    *,
    pipeline: int,
    attention_data: int,
    max_slot_tokens: int,
    max_slot_sequences: int,
    max_context_tokens: int,
    cap_tokens: int,
    host: HostOverhead,
    devices_per_worker: int,
) -> StepTables:
    """The step tables of one model shape on one device; see `StepTables` for every field.

    Pure but for a cache of curves. Raises InputError for malformed terms or sizes below 1, KeyError
    for formats `device` cannot run.
    """
    for name, value in (
        ("pipeline", pipeline),
        ("attention_data", attention_data),
        ("max_slot_tokens", max_slot_tokens),
        ("max_slot_sequences", max_slot_sequences),
        ("max_context_tokens", max_context_tokens),
        ("devices_per_worker", devices_per_worker),
    ):
        if value < 1:
            raise InputError(name, f"must be at least 1, not {value}")
    _check(terms, pipeline)
    largest_graph = max((s for s in host.graph_sizes), default=0)
    tokens = max(max_slot_tokens, max_slot_sequences)
    seqs, reach = max_slot_sequences, max(tokens, min(largest_graph, 2 * max_slot_sequences + 16))
    rows: set[Any] = set()
    # A device's share of a stage: each of its devices does the same, so totals scale by devices / stages.
    scale = devices_per_worker / pipeline
    kinds, often = _stage_kinds(terms, pipeline)
    dense = _accumulate(terms, kinds, "tokens", model, device, reach, rows, host)
    logits = _accumulate(terms, kinds, "logits", model, device, seqs, rows, host)
    moe_reach = attention_data * reach
    moe = _accumulate(terms, kinds, "micro_batch", model, device, moe_reach, rows, host)
    attention_launches = np.zeros(len(kinds))
    for term in terms:
        if term.size in ("prefill", "decode"):
            attention_launches += np.array(term.stage_counts)[kinds] * term.launches / 2.0

    # --- steps with prefill
    m = np.arange(max_slot_tokens + 1)
    floor = dense.launches + moe.launches + attention_launches
    mixed_stages = dense.at(m)
    eager = m > host.mixed_graph_max_tokens
    moe_at = np.minimum(attention_data * m, moe_reach)
    waiting = np.maximum(0.0, floor[:, None] * host.launch_s - mixed_stages - moe.at(moe_at)) * eager
    waiting += host.mixed_launch_s * np.where(eager, floor[:, None], attention_launches[:, None])
    waiting[:, 0] = 0.0
    routed = any(term.size == "micro_batch" for term in terms)
    host_mixed = m * (host.mixed_per_token_s if routed else 0.0)
    mixed_latency, mixed_cycle = _latency_cycle(mixed_stages + waiting, often)
    mixed_latency, mixed_cycle = mixed_latency + host_mixed, mixed_cycle + host_mixed

    # --- decode-only steps
    n = np.arange(seqs + 1)
    padded, graph = _padding(host.graph_sizes, seqs)
    padded = np.minimum(padded, reach)
    head = logits.at(n)
    decode_stages = dense.at(padded) + head
    moe_padded = np.minimum(attention_data * padded, moe_reach)
    stalled = (floor + logits.launches)[:, None] * host.launch_s - decode_stages - moe.at(moe_padded)
    stalled = np.maximum(0.0, stalled) * (1.0 - graph)
    stalled[:, 0] = 0.0
    host_decode = np.where(n > 0, host.decode_step_s + n * host.decode_per_sequence_s, 0.0)
    decode_latency, decode_cycle = _latency_cycle(decode_stages + stalled, often)
    decode_latency, decode_cycle = decode_latency + host_decode, decode_cycle + host_decode

    # --- routed experts, by tokens of a micro-batch over all ranks; padding as in the dense part
    batch = np.arange(attention_data * seqs + 1)
    rank_rows = -(-batch // attention_data)
    moe_decode_at = np.where(graph[rank_rows] > 0, attention_data * padded[rank_rows], batch)
    moe_decode_at = np.minimum(moe_decode_at, moe_reach)
    most = attention_data * max_slot_tokens
    moe_latency, moe_cycle = _latency_cycle(moe.stages, often)
    # Waiting costs time, and energy at rest only: work and the energy above idle stay as they are.
    slower = 1.0 + host.mixed_experts_share
    moe_mixed_latency = slower * spread(moe.sizes, moe_latency, most)
    moe_decode_latency = np.interp(moe_decode_at, moe.sizes, moe_latency)
    moe_mixed_cycle, moe_decode_cycle = moe_mixed_latency, moe_decode_latency
    if moe_cycle is not moe_latency:
        moe_mixed_cycle = slower * spread(moe.sizes, moe_cycle, most)
        moe_decode_cycle = np.interp(moe_decode_at, moe.sizes, moe_cycle)

    def account(part: _Sum, values: FloatArray, where: IntArray | int) -> Sampled:
        index = where if isinstance(where, np.ndarray) else None
        length = len(where) if isinstance(where, np.ndarray) else where + 1
        return Sampled(part.sizes, values, length, index)

    at: dict[str, tuple[_Sum, IntArray | int]] = {
        "mixed": (dense, max_slot_tokens),
        "decode": (dense, padded),
        "moe_mixed": (moe, most),
        "moe_decode": (moe, moe_decode_at),
        "logits": (logits, seqs),
    }

    def accounts(of: Callable[[_Sum], FloatArray], factor: float, wait: float = 1.0) -> dict[str, FloatArray]:
        found: dict[str, Any] = {}
        for name, (part, where) in at.items():
            values = of(part) * (factor * wait if name == "moe_mixed" else factor)
            # Routed experts over many ranks have a million sizes: no curve that is zero everywhere.
            if name in ("mixed", "decode") or values.any():
                found[name] = account(part, values, where)
        found["decode"] = np.asarray(found["decode"]) + np.asarray(account(logits, of(logits) * factor, seqs))
        return found

    breakdown: dict[str, dict[str, FloatArray]] = {
        category: accounts(
            lambda part, name=category: part.categories[name],  # type: ignore[misc]
            1.0 / pipeline,
            slower,
        )
        for category in CATEGORIES
    }
    breakdown["host"] = {
        "mixed": (host_mixed + waiting.max(axis=0)) / pipeline,
        "decode": (host_decode + stalled.max(axis=0)) / pipeline,
    }
    attention = _attention(
        terms, device, model, max_slot_tokens, seqs, max_context_tokens, cap_tokens, rows, scale
    )
    interval = _interval([(dense, reach), (logits, seqs), (moe, moe_reach)], often, attention)
    provenance = tuple(
        {"operator": category, "name": name, "device": device.name, "source": source, "kind": kind}
        for category, name, source, kind in sorted(rows)
    )
    return StepTables(
        pipeline=pipeline,
        attention_data=attention_data,
        mixed_latency_s=mixed_latency,
        mixed_cycle_s=mixed_cycle,
        decode_latency_s=decode_latency,
        decode_cycle_s=decode_cycle,
        moe_mixed_latency_s=moe_mixed_latency,
        moe_mixed_cycle_s=moe_mixed_cycle,
        moe_decode_latency_s=moe_decode_latency,
        moe_decode_cycle_s=moe_decode_cycle,
        logits_s=_latency_cycle(head, often)[0],
        attention_cycle_factor=attention.cycle_factor,
        cap_tokens=cap_tokens,
        decode_seq_knots=attention.seq_knots,
        decode_ctx_knots=attention.ctx_knots,
        decode_full_s=attention.decode[0],
        decode_capped_s=attention.decode[1],
        prefill_len_knots_log2=np.log2(attention.len_knots),
        prefill_ctx_knots_log2=np.log2(attention.cached_knots + 1.0),
        prefill_full_s_per_pair=attention.prefill[0],
        prefill_capped_s_per_pair=attention.prefill[1],
        breakdown_s=breakdown,
        energy_j=accounts(lambda part: part.energy, scale),
        decode_attention_w=attention.decode_w * devices_per_worker / pipeline,
        prefill_attention_w=attention.prefill_w * devices_per_worker / pipeline,
        flops=accounts(lambda part: part.flops, scale),
        bytes_moved=accounts(lambda part: part.bytes_moved, scale),
        flops_per_pair=attention.flops_per_pair[0] * scale / attention_data,
        flops_per_capped_pair=attention.flops_per_pair[1] * scale / attention_data,
        bytes_per_context_token=attention.bytes_per_token[0] * scale / attention_data,
        bytes_per_capped_token=attention.bytes_per_token[1] * scale / attention_data,
        interval_factor=interval,
        provenance=provenance,
    )


@dataclass(slots=True, eq=False)
class _Attention:
    seq_knots: FloatArray
    ctx_knots: FloatArray
    len_knots: FloatArray
    cached_knots: FloatArray
    decode: tuple[FloatArray, FloatArray]  # full, capped
    prefill: tuple[FloatArray, FloatArray]
    cycle_factor: float
    decode_w: float
    prefill_w: float
    flops_per_pair: tuple[float, float]
    bytes_per_token: tuple[float, float]
    low: float
    high: float
    weight: float  # seconds of a typical step, to weigh the interval


def _attention(
    terms: Sequence[Term],
    device: Device,
    model: CostModel,
    tokens: int,
    seqs: int,
    context: int,
    cap: int,
    rows: set[Any],
    scale: float,
) -> _Attention:
    seq_knots, ctx_knots = sequence_knots(seqs), context_knots(context)
    len_knots, cached = length_knots(tokens), cached_knots(context)
    decode = (np.zeros((len(seq_knots), len(ctx_knots))), np.zeros((len(seq_knots), len(ctx_knots))))
    prefill = (np.zeros((len(len_knots), len(cached))), np.zeros((len(len_knots), len(cached))))
    work, stored = [0.0, 0.0], [0.0, 0.0]
    stage = np.zeros(len(terms[0].stage_counts) if terms else 1)
    low = high = weight = 0.0
    power = {"decode": [0.0, 0.0], "prefill": [0.0, 0.0]}
    for term in terms:
        if term.size not in ("decode", "prefill"):
            continue
        often = float(sum(term.stage_counts))
        kind = 1 if term.capped and cap > 0 else 0
        first, second = (seq_knots, ctx_knots) if term.size == "decode" else (len_knots, cached)
        guess = _surface(term, model, device, first, second)
        time = np.broadcast_to(guess.time_s, (len(first), len(second))) * often
        rows.add((term.category, term.name, guess.source, guess.kind))
        middle = time[len(first) // 2, len(second) // 2]
        low += float(np.median(guess.low_s / np.maximum(guess.time_s, 1e-30))) * middle
        high += float(np.median(guess.high_s / np.maximum(guess.time_s, 1e-30))) * middle
        weight += middle
        joules = (np.broadcast_to(guess.power_w, time.shape) - device.idle_w) * time
        power[term.size][0] += float(joules[1:, 1:].sum())
        power[term.size][1] += float(time[1:, 1:].sum())
        if term.size == "decode":
            table = decode[kind]
            table += time
            stage = stage + np.array(term.stage_counts)
            one, two = bytes_moved(term.operator(1.0, 1.0)), bytes_moved(term.operator(1.0, 2.0))
            stored[kind] += often * float(two - one)
            pair = flops(term.operator(1.0, 2.0)) - flops(term.operator(1.0, 1.0))
            work[kind] += often * float(pair)
        else:
            pairs = causal_pairs(first[:, None], second[None, :], cap if kind else 0)
            table = prefill[kind]
            table += time / pairs
    shares = stage / stage.sum() if stage.sum() > 0 else np.full(len(stage), 1.0 / len(stage))

    def watts(size: str) -> float:
        joules, seconds = power[size]
        return joules / seconds if seconds > 0 else 0.0

    return _Attention(
        seq_knots,
        ctx_knots,
        len_knots,
        cached,
        decode,
        prefill,
        float(len(stage) * shares.max()),
        watts("decode"),
        watts("prefill"),
        (work[0], work[1]),
        (stored[0], stored[1]),
        low,
        high,
        weight,
    )


def _interval(
    parts: Sequence[tuple[_Sum, int]], often: IntArray, attention: _Attention
) -> tuple[float, float]:
    """(low, high) factors of a whole step. Operators' errors are taken as fully correlated, which is
    the cautious end: a sum of independent ones would be narrower."""
    low, high, weight = attention.low, attention.high, attention.weight
    for part, largest in parts:
        middle = (largest + 1) // 2

        def typical(rows: FloatArray, part: _Sum = part, middle: int = middle) -> float:
            seconds = [np.interp(middle, part.sizes, row) for row in rows]
            return float((np.array(seconds) * often).sum())

        low += typical(part.low)
        high += typical(part.high)
        weight += typical(part.stages)
    if weight <= 0:
        return 1.0, 1.0
    return float(min(1.0, low / weight)), float(max(1.0, high / weight))


def lookup_decode_attention(tables: StepTables, sequences: float, context_tokens: float) -> float:
    """Seconds of decode attention, all layers, for `sequences` of one slot with that mean context.

    The reference for the simulator's lookup: bilinear, extrapolated with the last segment. The capped
    class reads min(context, cap).
    """
    total = _bilinear(
        tables.decode_seq_knots, tables.decode_ctx_knots, tables.decode_full_s, sequences, context_tokens
    )
    if tables.cap_tokens > 0:
        seen = min(context_tokens, float(tables.cap_tokens))
        total += _bilinear(
            tables.decode_seq_knots, tables.decode_ctx_knots, tables.decode_capped_s, sequences, seen
        )
    return total


def lookup_prefill_attention(tables: StepTables, query_tokens: float, context_tokens: float) -> float:
    """Seconds of prefill attention, all layers, of `query_tokens` after `context_tokens` cached ones."""
    x, y = float(np.log2(query_tokens)), float(np.log2(context_tokens + 1.0))
    a, b = tables.prefill_len_knots_log2, tables.prefill_ctx_knots_log2
    x, y = min(max(x, float(a[0])), float(a[-1])), min(max(y, float(b[0])), float(b[-1]))
    pairs = float(causal_pairs(query_tokens, context_tokens))
    total = pairs * _bilinear(a, b, tables.prefill_full_s_per_pair, x, y)
    if tables.cap_tokens > 0:
        pairs = float(causal_pairs(query_tokens, context_tokens, tables.cap_tokens))
        total += pairs * _bilinear(a, b, tables.prefill_capped_s_per_pair, x, y)
    return total


def _bracket(knots: FloatArray, value: float) -> tuple[int, float]:
    if len(knots) == 1:
        return 0, 0.0
    low = min(max(int(np.searchsorted(knots, value, side="right")) - 1, 0), len(knots) - 2)
    return low, float((value - knots[low]) / (knots[low + 1] - knots[low]))


def _bilinear(rows: FloatArray, cols: FloatArray, table: FloatArray, x: float, y: float) -> float:
    i, u = _bracket(rows, x)
    j, v = _bracket(cols, y)
    i2, j2 = min(i + 1, len(rows) - 1), min(j + 1, len(cols) - 1)
    low = table[i, j] + v * (table[i, j2] - table[i, j])
    high = table[i2, j] + v * (table[i2, j2] - table[i2, j])
    return float(low + u * (high - low))
