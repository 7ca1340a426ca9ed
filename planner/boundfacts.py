"""What bounds read of a workload and of a shape's step tables, worked out once for all batching limits.

The arguments stand in `planner.bounds`; here are the sums, running minima and lines that they use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodels.table import Sampled, StepTables
from planner.workload import Workload

FloatArray = npt.NDArray[np.float64]

_PERCENTS = (50, 90, 95, 99)
#: Slopes of the lines below a micro-batch's curve, as shares of its least time per token.
_SLOPES = np.array([0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.96, 1.0])
_WORK_SLOPES = np.array([0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.98, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0])
#: Statistics that bounds know; `WorkFacts.wanted` limits them to what a request asks for.
STATISTICS = tuple(
    f"{name}.{stat}" for name in ("ttft_s", "e2e_s") for stat in ("mean", *(f"p{p}" for p in _PERCENTS))
)


class WorkFacts:
    """What bounds read of a workload, worked out once: work of each request with and without a cache.

    `brought`: prompts are computed elsewhere, and come no earlier than the requests.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        wanted: frozenset[str] | None = None,
        request_s: float = 0.0,
        request_per_token_s: float = 0.0,
        brought: bool = False,
    ) -> None:
        self.workload, self.wanted, self.brought = workload, wanted, brought
        self.inputs = workload.input_tokens.astype(np.float64)
        self.outputs = workload.output_tokens.astype(np.float64)
        self.decoded = self.outputs - 1.0
        self.lead_s = request_s + request_per_token_s * self.inputs
        if brought:
            self.lead_s = np.zeros_like(self.inputs)
        #: Keys that the decode steps of each request attend to.
        self.contexts = self.decoded * self.inputs + self.decoded * (self.decoded + 1.0) / 2.0
        self.cached = {False: np.zeros_like(self.inputs)}
        self.cached[True] = cacheable_tokens(workload).astype(np.float64)
        computed = np.zeros_like(self.inputs) if brought else self.inputs
        self.prompt = {flag: np.maximum(0.0, computed - cached) for flag, cached in self.cached.items()}
        whole = computed * (computed + 1.0) / 2.0
        self.pairs = {flag: np.maximum(0.0, whole - c * (c + 1.0) / 2.0) for flag, c in self.cached.items()}
        #: [tokens, pairs, contexts] in sum.
        self.sums = {
            flag: (
                float(prompt.sum() + self.decoded.sum()),
                float(self.pairs[flag].sum()),
                float(self.contexts.sum()),
            )
            for flag, prompt in self.prompt.items()
        }
        self.cacheable = bool(self.cached[True].any())
        #: Decode tokens by the longest answers, and what the others hold when the K longest are left, for a
        #: few K (`left_at`).
        self.longest = np.sort(self.decoded)[::-1].copy()
        self.left_at = np.unique(np.linspace(0, len(self.longest), 129).astype(np.int64))
        self.left = np.concatenate(([0.0], np.cumsum(self.longest)))
        self.left = (self.left[-1] - self.left)[self.left_at]
        self.output_tokens = float(self.outputs.sum())
        self.release_s = workload.arrival_s + self.lead_s
        self.span_s = float(workload.arrival_s.max() - workload.arrival_s.min())
        if bool((np.diff(self.release_s) < 0).any()):
            # A long prompt waits longer at the door; releasing in order of arrival is no later.
            self.release_s = np.minimum.accumulate(self.release_s[::-1])[::-1].copy()
        self.open_loop = workload.by_themselves
        self.shapes: dict[int, ShapeFacts] = {}

    def shape(self, tables: StepTables) -> ShapeFacts:
        """The facts of a shape; the last few are kept."""
        found = self.shapes.get(id(tables))
        if found is None or found.tables is not tables:
            if len(self.shapes) > 8:
                self.shapes.pop(next(iter(self.shapes)))
            found = self.shapes[id(tables)] = ShapeFacts(tables, self.inputs)
        return found

    def wants(self, name: str) -> bool:
        """Whether a statistic is asked for."""
        return self.wanted is None or name in self.wanted


class ShapeFacts:
    """What bounds read of step tables: running minima, so that any batching limit is a lookup."""

    def __init__(self, tables: StepTables, inputs: FloatArray) -> None:
        self.tables = tables
        self.stages, self.ranks = tables.pipeline, tables.attention_data
        self.mixed = _faster(tables.mixed_latency_s, tables.mixed_cycle_s)[1:]
        self.decode = _faster(tables.decode_latency_s, tables.decode_cycle_s)[1:]
        self.moe_mixed = _faster(tables.moe_mixed_latency_s, tables.moe_mixed_cycle_s)[1:]
        self.moe_decode = _faster(tables.moe_decode_latency_s, tables.moe_decode_cycle_s)[1:]
        self.mixed_least = np.minimum.accumulate(self.mixed)
        self.mixed_each = np.minimum.accumulate(self.mixed / _counts(self.mixed))
        self.decode_least = np.minimum.accumulate(self.decode)
        self.decode_each = np.minimum.accumulate(self.decode / _counts(self.decode))
        self.moe_each = _least_each(self.moe_mixed)
        self.moe_least = _least(self.moe_mixed)
        self.moe_lines = _lines(self.moe_mixed)
        self.moe_decode_least = np.minimum.accumulate(self.moe_decode)
        self.moe_decode_each = np.minimum.accumulate(self.moe_decode / _counts(self.moe_decode))
        self.logits = _least(tables.logits_s[1:])
        every = np.arange(1, min(len(inputs), len(self.moe_mixed), len(self.mixed)) + 1)
        self.mixed_from = least_from(self.mixed, every)
        self.moe_mixed_from = np.zeros(len(every))
        if self.moe_each > 0.0:
            self.moe_mixed_from = least_from(self.moe_mixed, every)
        self.pair_s = max(0.0, float(tables.prefill_full_s_per_pair.min()))
        self.per_context = _per_context(tables)
        context = float(inputs.min()) + 1.0
        self.context = context
        #: [seqs] least decode attention of a step whose fullest slot holds so many.
        self.attention = _attention_by_sequences(tables, tables.decode_full_s, context, len(self.decode))
        if tables.cap_tokens:
            seen = min(context, float(tables.cap_tokens))
            self.attention = self.attention + _attention_by_sequences(
                tables, tables.decode_capped_s, seen, len(self.decode)
            )
        self.attention_least = np.minimum.accumulate(self.attention)
        self.joules = _least_joules(tables, "mixed", "decode") / self.ranks
        self.moe_joules = 0.0
        if 1 in (self.stages, self.ranks):
            # Otherwise a partly filled pipeline counts fewer steps than its tokens fill.
            self.moe_joules = _least_joules(tables, "moe_mixed", "moe_decode")
        self._lines: dict[int, FloatArray] = {}
        self._ttft: dict[tuple[int, bool], FloatArray] = {}
        self._own: dict[tuple[int, bool, float, float], Own] = {}
        self._rates: dict[tuple[int, bool], tuple[FloatArray, FloatArray]] = {}
        self._below: dict[tuple[str, int], FloatArray] = {}
        self._loads: dict[tuple[int, int, bool], float] = {}
        self._decode_costs: dict[int, tuple[FloatArray, FloatArray]] = {}
        self._mixed_costs: dict[int, tuple[FloatArray, FloatArray]] = {}

    def mixed_lines(self, budget: int) -> FloatArray:
        """[k, 2] lines a + b x tokens below a micro-batch of up to `budget` tokens."""
        if budget not in self._lines:
            self._lines[budget] = _lines(self.mixed[:budget])
        return self._lines[budget]

    def ttft(self, facts: WorkFacts, budget: int, prefix: bool) -> FloatArray:
        """[N] least time to the first token."""
        key = (budget, prefix)
        if key not in self._ttft:
            prompt = facts.prompt[prefix]
            # With P > 1 tokens of a step are spread over its micro-batches, which halves a chunk's share
            # at most.
            share = 1.0 if self.stages == 1 else 0.5
            found = _highest(self.mixed_lines(budget), prompt)
            if self.moe_each > 0.0:
                found = found + _highest(self.moe_lines, prompt * share)
            found = found + facts.pairs[prefix] * (self.pair_s / self.stages)
            self._ttft[key] = found + (self.logits + facts.lead_s)
        return self._ttft[key]

    def rates(self, seqs: int, requests: int, preemption: bool) -> tuple[FloatArray, FloatArray]:
        """([j] a, [j] m): with n requests in a worker it makes at most a + m x n tokens per second."""
        key = (seqs, preemption)
        if key not in self._rates:
            n = np.arange(1, min(seqs * self.ranks, requests) + 1)
            slot = -(-n // (self.stages * self.ranks))
            batch = -(-n // self.stages)
            attention = least_from(self.attention[:seqs], slot)
            step = least_from(self.decode[:seqs], slot) + attention
            step += least_from(self.moe_decode[: self.ranks * seqs], batch)
            # A step with prefill holds those tokens too; a recomputed prompt gives one without attention.
            mixed = self.mixed_from[slot - 1] + self.moe_mixed_from[batch - 1] + self.logits
            step = np.minimum(step, mixed if preemption else mixed + attention)
            step = np.maximum.accumulate(np.minimum.accumulate(step[::-1])[::-1])
            rate = n / step
            # Slopes of chords between sizes that double.
            at = np.unique(np.minimum(np.round(2.0 ** (np.arange(0, 2 * np.log2(len(n)) + 1.5) / 2)), len(n)))
            marks = at.astype(np.int64)
            chords = np.diff(rate[marks - 1]) / np.diff(marks) if len(marks) > 1 else np.zeros(0)
            slopes = np.unique(np.append(chords[chords > 0], rate[0]))
            above = np.maximum(0.0, (rate[None] - slopes[:, None] * n[None]).max(axis=1))
            self._rates[key] = above, slopes
        return self._rates[key]

    def load_mean_s(self, facts: WorkFacts, seqs: int, replicas: int, *, preemption: bool) -> float:
        """Least mean time in the system that the load leaves possible (see the module)."""
        key = (seqs, replicas, preemption)
        if key not in self._loads:
            above, slopes = self.rates(seqs, len(facts.decoded), preemption)
            longest, left = facts.longest, facts.left
            ranks = np.arange(1, len(longest) + 1)
            most = (replicas * above[:, None] + slopes[:, None] * ranks[None]).min(axis=0)
            tail = np.concatenate(([0.0], np.cumsum(longest * ranks / most)))
            done = (left[:, None] - (replicas * facts.span_s) * above[None]) / slopes[None]
            before = np.maximum(0.0, done.max(axis=1))
            # Between two numbers K: no less work done before than for the larger, no less tail than
            # for the smaller.
            grid = facts.left_at
            ends = np.append(before[1:], 0.0)
            self._loads[key] = float((ends + tail[grid]).min()) / len(longest)
        return self._loads[key]

    def work_line(
        self, part: str, budget: int, seqs: int, best: float, steps: float, tokens: float
    ) -> tuple[float, float]:
        """(a, b) of the line below all steps that makes the most of so many steps and tokens.

        `part` is "dense" (by tokens of the fullest slot: with prefill up to the budget, without up to `seqs`)
        or "moe" (by tokens of a micro-batch); `best` is the least time per token, a line with a = 0.
        """
        prefill = self._intercepts(part + "-mixed", self.mixed[:budget] if budget else self.moe_mixed)
        decode = self._intercepts(
            part + "-decode", self.decode[:seqs] if part == "dense" else self.moe_decode[:seqs]
        )
        lowest = np.minimum(prefill, decode)
        slopes = self._slopes(part)
        worth = np.where(lowest >= 0.0, lowest * steps + slopes * tokens, 0.0)
        index = int(worth.argmax())
        if worth[index] <= best * tokens:
            return 0.0, best
        return float(lowest[index]), float(slopes[index])

    def _slopes(self, part: str) -> FloatArray:
        steepest = min(float(self.mixed_each[-1]), float(self.decode_each[-1]))
        if part == "moe":
            steepest = min(self.moe_each, float(self.moe_decode_each[-1]))
        return max(0.0, steepest) * _WORK_SLOPES

    def _intercepts(self, part: str, values: FloatArray) -> FloatArray:
        """[slopes] least of values - slope x tokens."""
        key = (part, len(values))
        if key not in self._below:
            counts = _counts(values)
            if len(values) > 4096:
                values, counts = _thinned(values)
            slopes = self._slopes(part.split("-")[0])
            self._below[key] = (values[None] - slopes[:, None] * counts[None]).min(axis=1)
        return self._below[key]

    def own(self, facts: WorkFacts, budget: int, prefix: bool, step: float, attention: float) -> Own:
        """What every request needs for itself; `attention` of a step is known when nobody is preempted."""
        key = (budget, prefix, step, attention)
        if key not in self._own:
            ttft = np.zeros_like(facts.inputs) if facts.brought else self.ttft(facts, budget, prefix)
            later = facts.decoded * step
            if np.isfinite(attention):
                per_key = self.per_context / (self.stages * self.ranks)
                later += np.maximum(0.0, facts.contexts * per_key - facts.decoded * attention)
            e2e = ttft + later
            statistics = {}
            for name, values in (("ttft_s", ttft), ("e2e_s", e2e)):
                if facts.wants(f"{name}.mean"):
                    statistics[f"{name}.mean"] = float(values.mean())
                percents = [percent for percent in _PERCENTS if facts.wants(f"{name}.p{percent}")]
                if percents:
                    for percent, value in zip(percents, np.percentile(values, percents), strict=True):
                        statistics[f"{name}.p{percent}"] = float(value)
            chain = _chain_s(facts.workload, e2e)
            self._own[key] = Own(statistics, float(ttft.mean()), float(e2e.mean()), chain)
        return self._own[key]

    def decode_costs(self, seqs: int) -> tuple[FloatArray, FloatArray]:
        """Seconds of steps and joules per token of a few batch sizes, each valid up to the next size.

        Batches between two sizes take no less time than any from the first on, and no fewer joules per
        token than the best up to the second.
        """
        if seqs not in self._decode_costs:
            sizes = _geometric(seqs)
            seconds = least_from(self.decode[:seqs], sizes) + least_from(self.attention[:seqs], sizes)
            # A micro-batch of a fullest slot of n sequences holds more than n - 1 of each rank.
            at = np.minimum((sizes - 1) * self.ranks + 1, len(self.moe_decode))
            seconds = seconds + least_from(self.moe_decode[: self.ranks * seqs], at)
            joules = _joules_from(self.tables.energy_j["decode"], sizes, seqs) / self.ranks
            experts = self.tables.energy_j.get("moe_decode")
            if self.moe_joules > 0.0 and experts is not None:
                joules += np.maximum(self.moe_joules, _joules_from(experts, at, self.ranks * seqs))
            self._decode_costs[seqs] = seconds, joules
        return self._decode_costs[seqs]

    def mixed_costs(self, budget: int) -> tuple[FloatArray, FloatArray]:
        """The same of steps with prefill by the tokens of the fullest slot, dense work only."""
        if budget not in self._mixed_costs:
            sizes = _geometric(budget)
            joules = _joules_from(self.tables.energy_j["mixed"], sizes, budget) / self.ranks
            self._mixed_costs[budget] = least_from(self.mixed[:budget], sizes), joules + self.moe_joules
        return self._mixed_costs[budget]


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """Least times of single requests, without any competition."""

    statistics: dict[str, float]
    ttft_mean_s: float
    e2e_mean_s: float
    chain_s: float


def _geometric(largest: int) -> npt.NDArray[np.int64]:
    return np.unique(np.geomspace(1, largest, 24).astype(np.int64))


def least_from(values: FloatArray, sizes: npt.NDArray[np.int64]) -> FloatArray:
    """Least of values (index 0 is size 1) from each size on."""
    return np.asarray(np.minimum.accumulate(values[::-1])[::-1][sizes - 1], dtype=np.float64)


def _joules_from(curve: FloatArray, sizes: npt.NDArray[np.int64], largest: int | None = None) -> FloatArray:
    """Least joules per token of batches from each size up to before the next one."""
    end = (int(sizes[-1]) if largest is None else largest) + 1
    index = np.arange(1, end)
    each = np.maximum(np.asarray(curve[1:end]), 0.0) / index
    return np.asarray(np.minimum.reduceat(each, sizes - 1), dtype=np.float64)


def _faster(latency: FloatArray, cycle: FloatArray) -> FloatArray:
    return latency if latency is cycle else np.minimum(latency, cycle)


def _counts(values: FloatArray) -> FloatArray:
    return np.arange(1, len(values) + 1, dtype=np.float64)


def _lines(values: FloatArray) -> FloatArray:
    """[k, 2] of (a, b): a + b x tokens is nowhere above values[tokens - 1], a and b are not negative."""
    if not len(values):
        return np.zeros((1, 2))
    counts = _counts(values)
    steepest = max(0.0, float((values / counts).min()))
    if len(values) > 4096:
        values, counts = _thinned(values)
    slopes = steepest * _SLOPES
    above = (values[None] - slopes[:, None] * counts[None]).min(axis=1)
    found = np.column_stack((np.maximum(above, 0.0), slopes))
    return np.asarray(found[above >= 0.0] if bool((above >= 0).any()) else [[0.0, 0.0]], dtype=np.float64)


def _thinned(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(values, sizes) that bound the same lines: of each run of sizes its last and its least value."""
    starts = np.unique(np.concatenate((np.arange(1024), np.arange(1024, len(values), 64))))
    ends = np.append(starts[1:], len(values))
    return np.minimum.reduceat(values, starts), ends.astype(np.float64)


def _highest(lines: FloatArray, tokens: FloatArray) -> FloatArray:
    return np.asarray((lines[:, :1] + lines[:, 1:] * tokens[None]).max(axis=0), dtype=np.float64)


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


def _least(values: FloatArray) -> float:
    return max(0.0, float(values.min())) if len(values) else 0.0


def _least_each(values: FloatArray) -> float:
    """Least of values[i] / (i + 1): the best time (or energy) per token of a curve from 1 on."""
    return max(0.0, float((values / _counts(values)).min())) if len(values) else 0.0


def _least_joules(tables: StepTables, *names: str) -> float:
    """Least energy per token of the fullest slot over the named tables; 0 when one is missing."""
    found = []
    for name in names:
        curve = tables.energy_j.get(name)
        if curve is None:
            return 0.0
        each = curve.least_each() if isinstance(curve, Sampled) else None
        found.append(_least_each(np.asarray(curve[1:])) if each is None else max(0.0, each))
    return min(found)


def _attention_by_sequences(
    tables: StepTables, values: FloatArray, context: float, sequences: int
) -> FloatArray:
    """[sequences] least decode attention time of a step by the sequences of its fullest slot, their mean
    context at least `context`.

    The table is linear between knots, so its least value over contexts lies on a knot or at the given
    one; between two numbers of sequences it is no less than the line between their least values.
    """
    seqs, knots = tables.decode_seq_knots, tables.decode_ctx_knots
    at = int(np.clip(np.searchsorted(knots, context, side="right") - 1, 0, len(knots) - 2))
    y = (context - knots[at]) / (knots[at + 1] - knots[at])
    least = values[:, at] + (values[:, at + 1] - values[:, at]) * y
    if bool((values[:, -1] < values[:, -2]).any()):
        return np.zeros(sequences)  # extrapolated with a falling slope, it has no least value
    beyond = values[:, knots > context]
    if beyond.size:
        least = np.minimum(least, beyond.min(axis=1))
    wanted = np.arange(1, sequences + 1, dtype=np.float64)
    low = np.clip(np.searchsorted(seqs, wanted, side="right") - 1, 0, len(seqs) - 2)
    x = (wanted - seqs[low]) / (seqs[low + 1] - seqs[low])
    found = least[low] + (least[low + 1] - least[low]) * x
    # Beyond the last knot the line goes on, and falls where the last segment does.
    return np.asarray(np.maximum(found, 0.0), dtype=np.float64)


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
