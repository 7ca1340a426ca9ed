"""Optimistic bounds: what no simulation of a plan can beat, for many plans at once.

Every bound is *admissible*: no more than the simulated value of what is minimised, whatever
the load does. Notation: P pipeline stages, A attention-data ranks, slots = P x A; a step's times
come from the plan's `StepTables`. The argument:

* Prefill of one prompt. A chunk of q tokens leaves the pipe no sooner than one micro-batch's way
  with at least q tokens in it. Below the curve of a micro-batch lie lines a + b x tokens with a, b >= 0;
  a prompt in k chunks takes at least k a + b x tokens, so that each line holds however it is cut, and
  the highest of a few counts. Attention is at least every (query, key) pair at the cheapest
  rate; with P > 1 up to P chunks' attention is averaged over a step, hence the division by P. Logits
  once, and what the front end adds.
* Cached prefix. Only blocks that more than one request names can ever be found in the cache, only
  from the prompt's start on, and never the whole prompt; the rest must be computed.
* Decoding. Every output token but the first takes a step of its own: the cheapest that holds a
  sequence, plus decode attention over no less than the workload's shortest context, or over the
  request's own contexts at the cheapest rate.
* A request's TTFT and end-to-end time are no less than its own work; means and percentiles are
  monotone in each request. The makespan is no less than the latest end of a chain of such
  requests, nor than all work at the worker's best rate: tokens at the least time per token, and
  attention at the least time per pair or per cached token, each shared by all slots. No step holds more
  sequences than the cap, so there are D / cap steps for D tokens, and each costs the a of a line a + b x
  tokens that lies below all steps.
* Load. While n requests are in a worker it makes at most r(n) = max over k <= n of k / step(k) tokens per
  second, and r lies below lines a + m x n. So D tokens in T seconds of R workers need the integral of n over
  that time, which is the sum of times in the system, to be at least (D - a R T) / m, for every line. Up to
  the last arrival T is known. What is left then is held by some K requests at least, no more than the K
  longest answers; from there on the k-th last of them keeps k in the system for as long as its tokens
  take. The bound is the least of both parts over all K.
* Overload. At its best rate a worker is a machine that serves work, prompts by the time of the first token
  and all of it by that of the last: least means and percentiles of both (see `boundqueues`).
* A preempted sequence gets one token from recomputing its prompt in place of a decode step. Where
  the KV cache can run out, the bounds count the cheaper of the two.
* Energy is idle power over that makespan plus the same work at its least joules.
* Energy against latency. Few joules per token take large batches, and these take long steps: for
  every price t of a second, joules + t x seconds of a token are at least their least sum over all batch
  sizes. Summed over tokens this is a line that no simulation is below; a few such lines are a curve,
  and `trade` holds its steps: a plan is nowhere better than one of these points, while its plain
  bounds are the corner that combines the best of all.

A test draws random tables, workloads and schedulers and checks that no simulation beats them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.table import StepTables
from planner.boundfacts import STATISTICS, Own, ShapeFacts, WorkFacts, cacheable_tokens
from planner.boundqueues import Queue
from planner.workload import Workload

__all__ = [
    "STATISTICS",
    "WorkBounds",
    "WorkFacts",
    "cacheable_tokens",
    "metric_bounds",
    "work_bounds",
]

FloatArray = npt.NDArray[np.float64]

#: Mean end-to-end times at which the energy of the trade-off is worked out, over the least.
_STRETCH = np.array([1.0, 1.02, 1.05, 1.1, 1.17, 1.26, 1.4, 1.6, 1.9, 2.4, 3.2, 5.0, 10.0, 30.0])

#: Share of the workers' time from the first arrival to the last that work takes where it may queue.
_BUSY = 0.8


@dataclass(slots=True, eq=False)
class WorkBounds:
    """Least work of a workload on one worker shape and its batching limits.

    `statistics`: {"ttft_s.mean": s, "e2e_s.p95": s, ...}; `step_s` the cheapest decode step (0
    when nobody decodes); `chain_s` from the first arrival to the latest end, however many
    workers; `work_s` all work at one worker's best rate; `dynamic_j` its energy above idle.
    `queued` says what load makes of some of the statistics, by the number of workers.
    """

    statistics: dict[str, float]
    step_s: float
    output_tokens: float
    chain_s: float
    work_s: float
    dynamic_j: float
    queued: Callable[[int], Mapping[str, float]] = field(default=lambda replicas: {})
    _trade: Callable[[float], FloatArray] | None = None

    def trade(self, least_s: float) -> FloatArray:
        """[k, 2] of (mean end-to-end s, energy above idle J): every outcome is nowhere better than one row.

        `least_s` is a bound on the mean that is known already: rows begin there.
        """
        return np.array([[least_s, self.dynamic_j]]) if self._trade is None else self._trade(least_s)


def work_bounds(
    workload: Workload | WorkFacts,
    tables: StepTables,
    *,
    prefix_caching: bool,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    preemption: bool = True,
) -> WorkBounds:
    """Bounds for every plan of this shape and these limits, with any number of replicas.

    `preemption` False promises that the KV cache holds every sequence that can run at once. Of many
    calls for one workload, `WorkFacts` saves the most of each.
    """
    facts = workload if isinstance(workload, WorkFacts) else WorkFacts(workload)
    shape = facts.shape(tables)
    stages, ranks = shape.stages, shape.ranks
    slots = float(stages * ranks)
    # A sequence beyond the cap shares its slot with at most the cap's sequences.
    seqs = min(max_num_seqs, len(shape.decode))
    budget = min(max_num_batched_tokens, len(shape.mixed))
    per_token, per_decode = float(shape.mixed_each[budget - 1]), float(shape.decode_each[seqs - 1])
    moe_seqs = min(ranks * seqs, len(shape.moe_decode))
    moe_step = float(shape.moe_decode_least[moe_seqs - 1])
    routed = min(shape.moe_each, float(shape.moe_decode_each[moe_seqs - 1]))

    # One output token, from a decode-only step or from one with prefill.
    pair_s = shape.pair_s
    attention = float(shape.attention_least[seqs - 1])
    recomputed = min(attention, pair_s * shape.context / stages) if preemption else attention
    mixed_s = float(shape.mixed_least[budget - 1]) + shape.moe_least + shape.logits
    step = min(float(shape.decode_least[seqs - 1]) + moe_step + attention, mixed_s + recomputed)
    prefix = prefix_caching and facts.cacheable
    own = shape.own(facts, budget, prefix, step, np.inf if preemption else attention)

    # All requests on one worker at its best rate.
    per_context = shape.per_context
    if preemption:
        # One pair per key instead, and without a cache the whole sequence through the dense layers.
        has_cache = prefix_caching and facts.workload.block_tokens > 0
        per_context = min(per_context, pair_s if has_cache else max(pair_s, 0.5 * per_token))
    tokens, pairs, contexts = facts.sums[prefix]
    cap = float(min(seqs * ranks, len(facts.decoded)))
    steps = float(facts.decoded.sum()) / cap
    dense = shape.work_line("dense", budget, seqs, min(per_token, per_decode), steps, tokens / slots)
    experts = shape.work_line("moe", 0, moe_seqs, routed, steps, tokens / stages)
    best, each_step = dense[1] / slots + experts[1] / stages, dense[0] + experts[0]
    prefill_s, attention_s = pairs * pair_s / slots, contexts * per_context / slots
    work_s = steps * each_step + tokens * best + prefill_s + attention_s
    watts = max(0.0, tables.prefill_attention_w) * prefill_s
    if not preemption:
        watts += max(0.0, tables.decode_attention_w) * attention_s
    dynamic = max(0.0, tokens * (shape.joules + shape.moe_joules) + watts)
    queues = partial(
        _queues,
        facts,
        prefix,
        (float(shape.mixed_each[budget - 1]) / slots + shape.moe_each / stages, pair_s / slots),
        (best, per_context / slots, each_step / cap),
    )
    load = partial(shape.load_mean_s, facts, seqs, preemption=preemption)

    return WorkBounds(
        statistics=own.statistics,
        step_s=step if bool((facts.decoded > 0).any()) else 0.0,
        output_tokens=facts.output_tokens,
        chain_s=own.chain_s,
        work_s=work_s,
        dynamic_j=dynamic,
        queued=_Queued(facts, queues, load, work_s),
        _trade=partial(_trade, facts, shape, seqs, budget, prefix, mixed_s, own, dynamic, watts),
    )


def _queues(
    facts: WorkFacts, prefix: bool, of_prompt: tuple[float, float], of_rest: tuple[float, float, float]
) -> Iterator[tuple[str, Queue]]:
    """What one worker does at its best rate until first tokens, and until last ones.

    `of_prompt`: s for a token of a prompt, and for a (query, key) pair. `of_rest`: s for a token of any kind,
    for a cached key, and for a decode step's share.
    """
    arrival_s, pairs = facts.workload.arrival_s, facts.pairs[prefix] * of_prompt[1]
    if not facts.brought:
        yield "ttft_s", Queue(arrival_s, facts.release_s, facts.prompt[prefix] * of_prompt[0] + pairs)
    each = (facts.prompt[prefix] + facts.decoded) * of_rest[0] + pairs
    each += facts.contexts * of_rest[1] + facts.decoded * of_rest[2]
    yield "e2e_s", Queue(arrival_s, facts.release_s, each)


class _Queued:
    """See `WorkBounds.queued`: worked out when it is asked for, once for each number of workers."""

    def __init__(self, facts: WorkFacts, queues: Any, load: Callable[[int], float], work_s: float) -> None:
        self._facts, self._make, self._load, self._work_s = facts, queues, load, work_s
        self._queues: dict[str, Queue] | None = None
        self._known: dict[int, dict[str, float]] = {}

    def __call__(self, workers: int) -> Mapping[str, float]:
        facts = self._facts
        if not facts.open_loop:
            return {}
        if workers not in self._known:
            found: dict[str, float] = {}
            if facts.wants("e2e_s.mean") and not facts.brought:
                found["e2e_s.mean"] = self._load(workers)
            if self._work_s > _BUSY * workers * facts.span_s:
                self._add(found, workers)
            self._known[workers] = found
        return self._known[workers]

    def _add(self, found: dict[str, float], workers: int) -> None:
        """What overload alone makes of all statistics that are asked for."""
        facts = self._facts
        if self._queues is None:
            self._queues = dict(self._make())
        for metric, queue in self._queues.items():
            if queue.work_s.sum() <= _BUSY * workers * facts.span_s:
                continue
            for name in STATISTICS:
                if facts.wants(name) and name.startswith(metric):
                    statistic = name.partition(".")[2]
                    value = (
                        queue.mean_s(workers)
                        if statistic == "mean"
                        else queue.percentile_s(float(statistic[1:]), workers)
                    )
                    found[name] = max(found.get(name, 0.0), value)


def _trade(
    facts: WorkFacts,
    shape: ShapeFacts,
    seqs: int,
    budget: int,
    prefix: bool,
    mixed_s: float,
    own: Own,
    dynamic: float,
    watts: float,
    least_s: float,
) -> FloatArray:
    """[k, 2] (mean end-to-end s, energy above idle J) that no outcome beats all of; see the module."""
    decoded, count = float(facts.decoded.sum()), len(facts.decoded)
    curves = shape.tables.energy_j
    if decoded <= 0 or "decode" not in curves or "mixed" not in curves:
        return np.array([[least_s, dynamic]])
    # A token of a decode-only step whose fullest slot holds n sequences, and of one with prefill of m
    # tokens: joules and seconds.
    seconds, cost = shape.decode_costs(seqs)
    mixed_time, mixed_cost = shape.mixed_costs(budget)
    mixed_time = mixed_time + (mixed_s - float(shape.mixed_least[budget - 1]))
    slope = -np.diff(cost) / np.maximum(np.diff(seconds), 1e-30)
    prices = np.sort(slope[(slope > 0) & np.isfinite(slope)])
    if not len(prices):
        return np.array([[least_s, dynamic]])
    prices = prices[:: max(1, len(prices) // 10)]
    token = np.minimum(
        (cost[None] + prices[:, None] * seconds[None]).min(axis=1),
        (mixed_cost[None] + prices[:, None] * mixed_time[None]).min(axis=1),
    )
    fixed = (facts.sums[prefix][0] - decoded) * (shape.joules + shape.moe_joules) + watts
    means = max(least_s, own.e2e_mean_s) * _STRETCH
    waited = count * (means - own.ttft_mean_s)
    curve = (fixed + decoded * token[:, None] - prices[:, None] * waited[None]).max(axis=0)
    curve = np.maximum(curve, dynamic)
    last = min(int(np.searchsorted(-curve, -dynamic * (1 + 1e-9))), len(curve) - 1)
    # Between two means the energy is no less than at the later one; beyond the last, the plain bound.
    ends = np.append(curve[1 : last + 1], dynamic)
    return np.column_stack((means[: last + 1], ends))


def metric_bounds(
    bounds: WorkBounds, *, replicas: int, devices: int, idle_w: float, usd_per_hour: float
) -> dict[str, float]:
    """Bounds on the scalar metrics of a plan; throughput is an upper bound, the rest lower ones."""
    makespan = max(bounds.chain_s, bounds.work_s / replicas)
    queued = bounds.queued(replicas)
    statistics = {name: max(value, queued.get(name, 0.0)) for name, value in bounds.statistics.items()}
    return {
        "makespan_s": makespan,
        "energy_j": idle_w * devices * makespan + bounds.dynamic_j,
        "output_tokens_per_s": bounds.output_tokens / makespan if makespan > 0 else float("inf"),
        "usd_per_million_output_tokens": usd_per_hour * makespan / 3600.0 / bounds.output_tokens * 1e6,
        "tpot_s": bounds.step_s,
        **statistics,
    }
