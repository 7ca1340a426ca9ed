"""Optimistic bounds: what no simulation of a plan can beat, for many plans at once.

Every bound is *admissible*: no more than the simulated value of what is minimised, whatever
the load does. Notation: P pipeline stages, A attention-data ranks, slots = P x A; a step's times
come from the plan's `StepTables`. The argument:

* Prefill of one prompt. A chunk of q tokens leaves the pipe no sooner than one micro-batch's way
  with at least q tokens in it, so the sum over chunks is at least q x (least time per token), and
  at least one cheapest micro-batch. Attention is at least every (query, key) pair at the cheapest
  rate; with P > 1 up to P chunks' attention is averaged over a step, hence the division by P.
* Cached prefix. Only blocks that more than one request names can ever be found in the cache, only
  from the prompt's start on, and never the whole prompt; the rest must be computed.
* Decoding. Every output token but the first takes a step of its own: the cheapest that holds a
  sequence, plus decode attention over no less than the workload's shortest context.
* A request's TTFT and end-to-end time are no less than its own work; means and percentiles are
  monotone in each request. The makespan is no less than the latest end of a chain of such
  requests, nor than all work at the worker's best rate: tokens at the least time per token, and
  attention at the least time per pair or per cached token, each shared by all slots.
* A preempted sequence gets one token from recomputing its prompt in place of a decode step. Where
  the KV cache can run out, the bounds count the cheaper of the two.
* Energy is idle power over that makespan plus the same work at its least joules.

A test draws random tables, workloads and schedulers and checks that no simulation beats them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodels.table import StepTables
from planner.workload import Workload

FloatArray = npt.NDArray[np.float64]

_PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, eq=False)
class WorkBounds:
    """Least work of a workload on one worker shape and its batching limits.

    `statistics`: {"ttft_s.mean": s, "e2e_s.p95": s, ...}; `step_s` the cheapest decode step (0
    when nobody decodes); `chain_s` from the first arrival to the latest end, however many
    workers; `work_s` all work at one worker's best rate; `dynamic_j` its energy above idle.
    """

    statistics: dict[str, float]
    step_s: float
    output_tokens: float
    chain_s: float
    work_s: float
    dynamic_j: float


def work_bounds(
    workload: Workload,
    tables: StepTables,
    *,
    prefix_caching: bool,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    preemption: bool = True,
) -> WorkBounds:
    """Bounds for every plan of this shape and these limits, with any number of replicas.

    `preemption` False promises that the KV cache holds every sequence that can run at once.
    """
    stages, ranks = tables.pipeline, tables.attention_data
    slots = float(stages * ranks)
    inputs = workload.input_tokens.astype(np.float64)
    outputs = workload.output_tokens.astype(np.float64)
    cached = cacheable_tokens(workload).astype(np.float64) if prefix_caching else np.zeros_like(inputs)
    prompt = inputs - cached
    pairs = inputs * (inputs + 1.0) / 2.0 - cached * (cached + 1.0) / 2.0

    # A sequence beyond the cap shares its slot with at most the cap's sequences.
    seqs = min(max_num_seqs, len(tables.decode_latency_s) - 1)
    mixed = np.minimum(tables.mixed_latency_s, tables.mixed_cycle_s)[1 : max_num_batched_tokens + 1]
    decode = np.minimum(tables.decode_latency_s, tables.decode_cycle_s)[1 : seqs + 1]
    moe_mixed = np.minimum(tables.moe_mixed_latency_s, tables.moe_mixed_cycle_s)[1:]
    moe_decode = np.minimum(tables.moe_decode_latency_s, tables.moe_decode_cycle_s)[1 : ranks * seqs + 1]
    per_token, per_decode = _least_each(mixed), _least_each(decode)
    routed = min(_least_each(moe_mixed), _least_each(moe_decode))

    # One prompt: dense work, routed experts (with P > 1 tokens of a step are spread over its
    # micro-batches, which halves a chunk's share at most), attention.
    pair_s = max(0.0, float(tables.prefill_full_s_per_pair.min()))
    share = 1.0 if stages == 1 else 0.5
    ttft = np.maximum(prompt * per_token, float(mixed.min()))
    ttft += np.maximum(prompt * _least_each(moe_mixed) * share, _least(moe_mixed))
    ttft += pairs * pair_s / stages

    # One output token, from a decode-only step or from one with prefill.
    context = float(inputs.min()) + 1.0
    attention = _least_attention(tables, tables.decode_full_s, context)
    if tables.cap_tokens:
        attention += _least_attention(tables, tables.decode_capped_s, min(context, float(tables.cap_tokens)))
    recomputed = min(attention, pair_s * context / stages) if preemption else attention
    step = min(
        float(decode.min()) + _least(moe_decode) + attention,
        float(mixed.min()) + _least(moe_mixed) + recomputed,
    )
    e2e = ttft + (outputs - 1.0) * step

    # All requests on one worker at its best rate.
    decoded = outputs - 1.0
    tokens = float(prompt.sum() + decoded.sum())
    contexts = float((decoded * inputs + decoded * (decoded + 1.0) / 2.0).sum())
    prefill_s = float(pairs.sum()) * pair_s / slots
    per_context = _per_context(tables)
    if preemption:
        # One pair per key instead, and without a cache the whole sequence through the dense layers.
        has_cache = prefix_caching and workload.block_tokens > 0
        per_context = min(per_context, pair_s if has_cache else max(pair_s, 0.5 * per_token))
    attention_s = contexts * per_context / slots
    work_s = tokens * (min(per_token, per_decode) / slots + routed / stages) + prefill_s + attention_s
    joules = _least_joules(tables, "mixed", "decode") / slots
    if 1 in (stages, ranks):
        # Otherwise a partly filled pipeline counts fewer steps than its tokens fill.
        joules += _least_joules(tables, "moe_mixed", "moe_decode") / stages
    dynamic = tokens * joules
    dynamic += max(0.0, tables.prefill_attention_w) * prefill_s
    if not preemption:
        dynamic += max(0.0, tables.decode_attention_w) * attention_s
    statistics = {}
    for name, values in (("ttft_s", ttft), ("e2e_s", e2e)):
        statistics[f"{name}.mean"] = float(values.mean())
        for percent, value in zip(_PERCENTS, np.percentile(values, _PERCENTS), strict=True):
            statistics[f"{name}.p{percent}"] = float(value)
    return WorkBounds(
        statistics=statistics,
        step_s=step if bool((outputs > 1).any()) else 0.0,
        output_tokens=float(outputs.sum()),
        chain_s=_chain_s(workload, e2e),
        work_s=work_s,
        dynamic_j=max(0.0, dynamic),
    )


def cacheable_tokens(workload: Workload) -> npt.NDArray[np.int64]:
    """[N] most tokens of each input that a prefix cache can ever hold when the request comes."""
    block = workload.block_tokens
    count = len(workload)
    if block <= 0 or not len(workload.prefix_ids):
        return np.zeros(count, dtype=np.int64)
    ids, offset = workload.prefix_ids, workload.prefix_offset
    shared = np.bincount(ids, minlength=workload.prefix_unique)[ids] > 1
    # Leading run of shared blocks: up to the first unshared one at or after the row's start.
    positions = np.append(np.flatnonzero(~shared), len(ids))
    first = positions[np.searchsorted(positions, offset[:-1], side="left")]
    run = np.minimum(first, offset[1:]) - offset[:-1]
    return np.asarray(np.minimum(run, (workload.input_tokens - 1) // block) * block, dtype=np.int64)


def metric_bounds(
    bounds: WorkBounds, *, replicas: int, devices: int, idle_w: float, usd_per_hour: float
) -> dict[str, float]:
    """Bounds on the scalar metrics of a plan; throughput is an upper bound, the rest lower ones."""
    makespan = max(bounds.chain_s, bounds.work_s / replicas)
    return {
        "makespan_s": makespan,
        "energy_j": idle_w * devices * makespan + bounds.dynamic_j,
        "output_tokens_per_s": bounds.output_tokens / makespan if makespan > 0 else float("inf"),
        "usd_per_million_output_tokens": usd_per_hour * makespan / 3600.0 / bounds.output_tokens * 1e6,
        "tpot_s": bounds.step_s,
        **bounds.statistics,
    }


def _least(values: FloatArray) -> float:
    return max(0.0, float(values.min())) if len(values) else 0.0


def _least_each(values: FloatArray) -> float:
    """Least of values[i] / (i + 1): the best time (or energy) per token of a curve from 1 on."""
    return max(0.0, float((values / np.arange(1, len(values) + 1)).min())) if len(values) else 0.0


def _least_joules(tables: StepTables, *names: str) -> float:
    """Least energy per token of the fullest slot over the named tables; 0 when one is missing."""
    curves = [tables.energy_j.get(name) for name in names]
    return min(0.0 if curve is None else _least_each(curve[1:]) for curve in curves)


def _least_attention(tables: StepTables, values: FloatArray, context: float) -> float:
    """Least decode attention time of a step with a sequence and a mean context of at least `context`.

    The table is linear between knots, so its least value lies on a knot or on the edge of the
    region: one sequence, or the given context.
    """
    seqs, knots = tables.decode_seq_knots, tables.decode_ctx_knots
    low = int(np.clip(np.searchsorted(seqs, 1.0, side="right") - 1, 0, len(seqs) - 2))
    x = (1.0 - seqs[low]) / (seqs[low + 1] - seqs[low])
    rows = np.vstack([values[low] + (values[low + 1] - values[low]) * x, values[seqs > 1.0]])
    at = int(np.clip(np.searchsorted(knots, context, side="right") - 1, 0, len(knots) - 2))
    y = (context - knots[at]) / (knots[at + 1] - knots[at])
    edge = rows[:, at] + (rows[:, at + 1] - rows[:, at]) * y
    if bool((rows[:, -1] < rows[:, -2]).any()):
        return 0.0  # extrapolated with a falling slope, it has no least value
    beyond = rows[:, knots > context]
    return max(0.0, min(float(edge.min()), float(beyond.min()) if beyond.size else np.inf))


def _per_context(tables: StepTables) -> float:
    """b with attention(n, c) >= b * n * c everywhere: bilinear pieces above at their corners are above."""
    seqs, knots, values = tables.decode_seq_knots, tables.decode_ctx_knots, tables.decode_full_s
    area = np.outer(seqs, knots)
    inside = values[area > 0] / area[area > 0]
    n = seqs[seqs > 0]
    last = (values[seqs > 0, -1] - values[seqs > 0, -2]) / (n * (knots[-1] - knots[-2]))
    return max(0.0, min(float(inside.min()), float(last.min())))


def _chain_s(workload: Workload, e2e: FloatArray) -> float:
    """Least time from the first arrival to the last token, each request after its parent."""
    roots = workload.parent < 0
    if workload.concurrency:
        # Clients wait for each answer, so that together they are busy for all of them; not where an
        # answer triggers several requests at once.
        children = np.bincount(workload.parent[~roots]) if not roots.all() else np.zeros(1)
        return float(e2e.max()) if children.max() > 1 else float(e2e.sum()) / workload.concurrency
    first = float(workload.arrival_s[roots].min())
    end = np.where(roots, workload.arrival_s + e2e, -np.inf)
    level = np.flatnonzero(~roots)
    while len(level):
        ready = np.isfinite(end[workload.parent[level]])
        now = level[ready]
        if not len(now):
            break  # rows whose parent never runs; the simulator refuses such workloads
        end[now] = end[workload.parent[now]] + workload.delay_s[now] + e2e[now]
        level = level[~ready]
    return float(end.max()) - first
