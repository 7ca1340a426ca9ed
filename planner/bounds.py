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
* Overload. At its best rate a worker is a machine that serves work; of all orders, the shortest
  remaining one first has the least sum of completion times (Schrage, "A proof of the optimality of the
  shortest remaining processing time discipline", 1968), R workers no less than one machine R times as fast.
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

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
from numba import njit

from costmodels.table import StepTables
from planner.boundfacts import STATISTICS, Own, ShapeFacts, WorkFacts, cacheable_tokens
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


@dataclass(slots=True, eq=False)
class WorkBounds:
    """Least work of a workload on one worker shape and its batching limits.

    `statistics`: {"ttft_s.mean": s, "e2e_s.p95": s, ...}; `step_s` the cheapest decode step (0
    when nobody decodes); `chain_s` from the first arrival to the latest end, however many
    workers; `work_s` all work at one worker's best rate; `dynamic_j` its energy above idle.
    `queue_mean_s` is what overload makes of the mean end-to-end time, by the number of workers.
    """

    statistics: dict[str, float]
    step_s: float
    output_tokens: float
    chain_s: float
    work_s: float
    dynamic_j: float
    queue_mean_s: Callable[[int], float] = field(default=lambda replicas: 0.0)
    _trade: Callable[[float], FloatArray] | None = None

    def trade(self, least_s: float) -> FloatArray:
        """[k, 2] of (mean end-to-end s, energy above idle J): every outcome is nowhere better than one row.

        `least_s` is a bound on the mean that is known already: rows begin there.
        """
        return np.array([[least_s, self.dynamic_j]]) if self._trade is None else self._trade(least_s)


@njit(cache=True, nogil=True)
def _shortest_first(release_s, work_s):  # type: ignore[no-untyped-def]
    """Sum of completion times, the shortest remaining work first; releases ascend."""
    count = len(release_s)
    heap = np.empty(count)
    size, now, total = 0, 0.0, 0.0
    for index in range(count):
        if size == 0:
            now = max(now, release_s[index])
        at = size  # push
        size += 1
        while at > 0 and heap[(at - 1) >> 1] > work_s[index]:
            heap[at] = heap[(at - 1) >> 1]
            at = (at - 1) >> 1
        heap[at] = work_s[index]
        until = release_s[index + 1] if index + 1 < count else np.inf
        while size > 0 and now < until:
            if now + heap[0] > until:
                heap[0] -= until - now  # still the least, so the heap stays one
                now = until
                break
            now += heap[0]
            total += now
            size -= 1
            item, at = heap[size], 0
            while 2 * at + 1 < size:
                low = 2 * at + 1
                if low + 1 < size and heap[low + 1] < heap[low]:
                    low += 1
                if item <= heap[low]:
                    break
                heap[at] = heap[low]
                at = low
            heap[at] = item
    return total


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
    known: dict[int, float] = {}

    def queue_mean_s(replicas: int) -> float:
        """What the load makes of the mean time in the system."""
        if not facts.open_loop:
            return 0.0
        loaded = shape.load_mean_s(facts, seqs, replicas, preemption)
        if work_s <= 0.8 * replicas * facts.span_s:
            return loaded
        if replicas not in known:
            each = (facts.prompt[prefix] + facts.decoded) * best + facts.pairs[prefix] * (pair_s / slots)
            each += facts.contexts * (per_context / slots) + facts.decoded * (each_step / cap)
            ends = _shortest_first(facts.release_s, each / replicas)
            known[replicas] = (ends - float(facts.workload.arrival_s.sum())) / len(each)
        return max(loaded, known[replicas])

    return WorkBounds(
        statistics=own.statistics,
        step_s=step if bool((facts.decoded > 0).any()) else 0.0,
        output_tokens=facts.output_tokens,
        chain_s=own.chain_s,
        work_s=work_s,
        dynamic_j=dynamic,
        queue_mean_s=queue_mean_s,
        _trade=partial(_trade, facts, shape, seqs, budget, prefix, mixed_s, own, dynamic, watts),
    )


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
    statistics = bounds.statistics
    if "e2e_s.mean" in statistics:
        mean = bounds.queue_mean_s(replicas)
        if mean > statistics["e2e_s.mean"]:
            statistics = {**statistics, "e2e_s.mean": mean}
    return {
        "makespan_s": makespan,
        "energy_j": idle_w * devices * makespan + bounds.dynamic_j,
        "output_tokens_per_s": bounds.output_tokens / makespan if makespan > 0 else float("inf"),
        "usd_per_million_output_tokens": usd_per_hour * makespan / 3600.0 / bounds.output_tokens * 1e6,
        "tpot_s": bounds.step_s,
        **statistics,
    }
