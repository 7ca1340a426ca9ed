"""The simulator's rules in plain Python, one step at a time: slow, readable, the standard of truth.

The rules are stated in `core`; here they are written for reading. Free KV blocks are single blocks
in one list, decode steps are taken one by one, attention is looked up for every step. Property
tests hold the compiled core equal to this on random workloads.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from costmodels.table import StepTables
from planner.simulator.config import SchedulerConfig
from planner.simulator.simulate import (
    LEAST_OUTSTANDING,
    MIXED,
    RESERVE,
    WITH_FIRST_TOKEN,
    WITHOUT_LAST_TOKEN,
    assign,
    cache_entries,
    check,
    entry_shape,
    uses_prefixes,
)
from planner.workload.workload import Workload


@dataclass(eq=False)
class Request:
    """A request and its state."""

    row: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    entries: list[int]
    first_s: float = 0.0
    finish_s: float = 0.0
    lag_s: float = 0.0
    generated: int = 0
    computed: int = 0  # tokens with KV
    target: int = 0  # tokens to compute before the next output token
    last_token_s: float = 0.0
    blocks: list[int] = field(default_factory=list)
    entry_blocks: list[list[int]] = field(default_factory=list)  # of entries it shares, in order
    seen: int = 0  # entries looked at so far: shared or found to be somebody else's
    shared: list[int] = field(default_factory=list)


@dataclass
class ReferenceResult:
    """What the core must reproduce."""

    arrival_s: list[float]
    first_s: list[float]
    finish_s: list[float]
    replica: list[int]
    gaps_s: list[float]
    preemptions: int
    cached_tokens: int
    peak_blocks: int
    prefill_tokens: int
    busy_s: float
    attention_decode_s: float
    attention_prefill_s: float


class BlockPool:
    """KV blocks one by one: a list of free ones, and which entry each still holds."""

    def __init__(self, blocks: int) -> None:
        self.free: list[int] = list(range(blocks))
        self.entry_of: dict[int, int] = {}  # free or used block -> entry whose content it holds
        self.blocks_of: dict[int, list[int]] = {}  # entry -> its blocks, while findable
        self.references: dict[int, int] = {}
        self.total, self.peak = blocks, 0

    def allocate(self, count: int) -> list[int]:
        """Take blocks from the head; an entry that loses a block is forgotten."""
        taken, self.free = self.free[:count], self.free[count:]
        for block in taken:
            entry = self.entry_of.get(block)
            if entry is not None:
                for other in self.blocks_of.pop(entry):
                    del self.entry_of[other]
        self.peak = max(self.peak, self.total - len(self.free))
        return taken

    def share(self, entry: int) -> list[int]:
        """Use a findable entry's blocks."""
        if self.references.get(entry, 0) == 0:
            for block in self.blocks_of[entry]:
                self.free.remove(block)
        self.references[entry] = self.references.get(entry, 0) + 1
        return self.blocks_of[entry]


class Replica:
    """One worker."""

    def __init__(self, tables: StepTables, config: SchedulerConfig, prefix: bool, entry_tokens: int) -> None:
        self.t, self.c = tables, config
        self.prefix, self.entry_tokens = prefix, entry_tokens
        self.pool = BlockPool(config.kv_blocks)
        self.watermark = int(config.watermark * config.kv_blocks)
        self.clock = 0.0
        self.pending: list[tuple[float, int, int]] = []  # (time, order among ties, row)
        self.requests: dict[int, Request] = {}
        self.waiting: list[Request] = []
        self.partial: list[Request] = []
        self.running: list[Request] = []
        self.active: list[Request] = []  # in order of admission
        self.gaps: list[float] = []
        self.preemptions = self.cached_tokens = self.prefill_tokens = self.done = self.arrived = 0
        self.late = 0
        self.busy = self.attention_decode = self.attention_prefill = 0.0
        self.finished: list[Request] = []

    # --- memory ---------------------------------------------------------------------------

    def register(self, request: Request, tokens: int) -> None:
        """Make the full entries of the first `tokens` tokens findable."""
        if not self.prefix:
            return
        size = self.entry_tokens // self.c.block_tokens
        for index in range(request.seen, min(tokens // self.entry_tokens, len(request.entries))):
            entry = request.entries[index]
            if entry not in self.pool.blocks_of:
                # Its blocks are any of the request's own; which ones does not matter.
                mine, request.blocks = request.blocks[:size], request.blocks[size:]
                self.pool.blocks_of[entry] = mine
                for block in mine:
                    self.pool.entry_of[block] = entry
                self.pool.references[entry] = 1
                request.shared.append(entry)
            request.seen = index + 1

    def release(self, request: Request, tokens: int) -> None:
        """Give all blocks back, the known ones staying findable."""
        self.register(request, tokens)
        self.pool.free += request.blocks
        for entry in reversed(request.shared):
            self.pool.references[entry] -= 1
            if self.pool.references[entry] == 0:
                self.pool.free += self.pool.blocks_of[entry]
        request.blocks, request.shared, request.seen = [], [], 0

    def held(self, request: Request) -> int:
        """Blocks the request holds, shared ones included."""
        return len(request.blocks) + len(request.shared) * (self.entry_tokens // self.c.block_tokens)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return ceil(tokens / self.c.block_tokens)

    def preempt(self) -> Request:
        """Send the most recently admitted request back to the front of the queue."""
        victim = self.active.pop()
        if victim in self.running:
            self.running.remove(victim)
            victim.last_token_s += victim.lag_s
        else:
            self.partial.remove(victim)
        self.release(victim, victim.computed)
        victim.computed = 0
        self.waiting.insert(0, victim)
        self.preemptions += 1
        return victim

    # --- one step ---------------------------------------------------------------------------

    def grow(self) -> bool:
        """A block for every decode that starts one; True when somebody was preempted."""
        if self.c.admission == RESERVE:
            return False
        preempted = False
        while True:
            short = [r for r in self.running if r.computed % self.c.block_tokens == 0]
            if len(short) <= len(self.pool.free):
                break
            self.preempt()
            preempted = True
        for request in short:
            request.blocks += self.pool.allocate(1)
        return preempted

    def take_in(self) -> list[Request]:
        """Let prompts that others computed join the decodes; returns those whose first token is to come."""
        c, fresh = self.c, []
        mixed = c.policy == MIXED
        while self.waiting and len(self.active) < c.max_num_seqs * c.attention_data:
            request = self.waiting[0]
            slots = c.pipeline * c.attention_data
            if request.generated > 0 or (mixed and len(self.running) >= slots * c.max_num_batched_tokens):
                break
            computed = request.input_tokens - (c.brought == WITHOUT_LAST_TOKEN)
            tokens = computed + mixed
            if c.admission == RESERVE:
                tokens = request.input_tokens + request.output_tokens - 1
            spare = len(self.pool.free) - self.blocks_for(tokens)
            if spare < 0 or (spare < self.watermark and self.active):
                break
            request.blocks += self.pool.allocate(self.blocks_for(tokens))
            request.computed = computed
            if c.brought == WITH_FIRST_TOKEN:
                request.generated = 1
                request.first_s = request.last_token_s = self.clock
            else:
                fresh.append(request)
            self.waiting.pop(0)
            self.active.append(request)
            self.running.append(request)
        return fresh

    def chunk_of(self, left: int, room: int, remaining: int) -> int:
        """Tokens of a prompt's next chunk, 0 when it has to wait."""
        tokens = min(remaining, left, room)
        if tokens < remaining and not self.c.chunked_prefill and remaining <= self.c.max_num_batched_tokens:
            return 0
        return max(tokens, 0)

    def schedule(self, decoding: int, admit: bool) -> tuple[list[tuple[Request, int]], bool, int]:
        """Prompt chunks of this step, whether somebody was preempted, tokens of room per slot."""
        c = self.c
        slots = c.pipeline * c.attention_data
        room = c.max_num_batched_tokens - ceil(decoding / slots)
        left = slots * room
        chunks: list[tuple[Request, int]] = []
        preempted = False
        for request in list(self.partial):
            if left <= 0 or request not in self.partial:
                continue
            tokens = self.chunk_of(left, room, request.target - request.computed)
            if tokens == 0:
                break
            if c.admission != RESERVE:
                need = self.blocks_for(request.computed + tokens) - self.held(request)
                while need > len(self.pool.free):
                    preempted = True
                    if self.preempt() is request:
                        break
                if request not in self.partial:
                    break
                request.blocks += self.pool.allocate(max(need, 0))
            self.register(request, request.computed + tokens)
            chunks.append((request, tokens))
            left -= tokens
        while admit and not preempted and self.waiting and left > 0:
            if len(self.active) >= c.max_num_seqs * c.attention_data:
                break
            request = self.waiting[0]
            target = request.input_tokens + request.generated
            matched: list[int] = []
            if self.prefix:
                for entry in request.entries[: (target - 1) // self.entry_tokens]:
                    if entry not in self.pool.blocks_of:
                        break
                    matched.append(entry)
            start = len(matched) * self.entry_tokens
            tokens = self.chunk_of(left, room, target - start)
            if tokens == 0:
                break
            upto = (
                request.input_tokens + request.output_tokens - 1 if c.admission == RESERVE else start + tokens
            )
            size = self.entry_tokens // c.block_tokens if self.prefix else 0
            need = self.blocks_for(upto) - len(matched) * size
            queued = sum(size for entry in matched if self.pool.references[entry] == 0)
            spare = len(self.pool.free) - need - queued
            if spare < 0 or (spare < self.watermark and self.active):
                break
            for entry in matched:
                self.pool.share(entry)
                request.shared.append(entry)
            request.seen = len(matched)
            if request.generated == 0:
                self.cached_tokens += start
            request.blocks += self.pool.allocate(need)
            request.computed, request.target = start, target
            self.register(request, start + tokens)
            self.waiting.pop(0)
            self.partial.append(request)
            self.active.append(request)
            chunks.append((request, tokens))
            left -= tokens
        return chunks, preempted, room

    def step(self) -> None:
        """One engine step from the clock on."""
        c = self.c
        self.late = 0
        mixed = c.policy == MIXED
        preempted = self.grow() if mixed and self.running else False
        fresh = self.take_in() if c.brought and not preempted and not self.partial else []
        chunks, lost, room = self.schedule(len(self.running) if mixed else 0, admit=not preempted)
        preempted = preempted or lost
        if not mixed and not chunks and self.running:
            self.grow()
        decodes = list(self.running) if mixed or not chunks else []
        if not decodes and not chunks:
            return
        took, lag = self.duration(decodes, chunks, room)
        self.clock += took
        for request in sorted(decodes, key=lambda r: r.row):
            if request in fresh:
                request.first_s = self.clock
            else:
                self.gaps.append(self.clock - request.last_token_s)
            request.last_token_s = self.clock
            request.computed += 1
            request.generated += 1
            if request.generated == request.output_tokens:
                self.running.remove(request)
                self.finish(request)
        for request, tokens in chunks:
            request.computed += tokens
            request.lag_s += lag
            self.prefill_tokens += tokens
            if request.computed < request.target:
                continue
            self.partial.remove(request)
            if request.generated == 0:
                request.first_s = self.clock + request.lag_s
            else:
                self.gaps.append(self.clock + request.lag_s - request.last_token_s)
            request.generated += 1
            request.last_token_s = self.clock
            if request.generated == request.output_tokens:
                self.finish(request)
            else:
                self.running.append(request)

    def finish(self, request: Request) -> None:
        """The last token is out."""
        self.active.remove(request)
        self.release(request, request.input_tokens + request.output_tokens - 1)
        request.finish_s = self.clock + request.lag_s
        self.done += 1
        self.late += 1
        self.finished.append(request)

    # --- time -------------------------------------------------------------------------------

    def duration(
        self, decodes: list[Request], chunks: list[tuple[Request, int]], room: int
    ) -> tuple[float, float]:
        """(seconds of the step, lag of its prompts)."""
        c, t = self.c, self.t
        stages, ranks = c.pipeline, c.attention_data
        slots = stages * ranks
        n = len(decodes)
        n_slot, mb = ceil(n / slots), ceil(n / stages)
        decode_attention = 0.0
        if n:
            keys = [r.computed + 1 for r in decodes]
            decode_attention = decode_attention_s(t, n_slot, sum(keys) / n, t.decode_full_s)
            if t.cap_tokens:
                inside = sum(min(k, t.cap_tokens) for k in keys) / n
                decode_attention += decode_attention_s(t, n_slot, inside, t.decode_capped_s)
        share = min(stages, ceil(n / ranks)) / stages
        self.attention_decode += decode_attention * share
        flight = min(stages, ceil(n / ranks) + len(chunks))
        full = flight >= stages
        if not chunks:
            if full:
                took = t.decode_cycle_s[n_slot] + t.moe_decode_cycle_s[mb]
                took += t.attention_cycle_factor * decode_attention
            else:
                took = t.decode_latency_s[n_slot] + t.moe_decode_latency_s[mb] + decode_attention
            self.busy += took
            return float(took), 0.0
        p = sum(tokens for _, tokens in chunks)
        costs = [prefill_attention_s(t, tokens, r.computed) for r, tokens in chunks]
        self.attention_prefill += sum(costs) / slots
        prefill_attention = max(max(costs), sum(costs) / ranks)
        finishing = sum(1 for r, tokens in chunks if r.computed + tokens == r.target)
        per_rank = max(max(tokens for _, tokens in chunks), ceil(p / ranks))
        loads = [min(room, per_rank - at) for at in range(0, per_rank, room)]  # micro-batches
        moe = mb + ceil(p / len(loads))
        logits = t.logits_s[ceil((n + finishing) / slots)]
        latency = t.mixed_latency_s[n_slot + loads[0]] + t.moe_mixed_latency_s[moe] + logits
        latency += decode_attention + prefill_attention * loads[0] / per_rank
        if not full:
            self.busy += float(latency)
            return float(latency), 0.0
        took = sum(t.mixed_cycle_s[n_slot + load] + t.moe_mixed_cycle_s[moe] for load in loads)
        took += (stages - len(loads)) * (t.decode_cycle_s[n_slot] + t.moe_decode_cycle_s[mb])
        took = took / stages + len(loads) * logits
        took += t.attention_cycle_factor * (decode_attention + prefill_attention / stages)
        self.busy += float(took)
        return float(took), max(0.0, float(latency - took)) if stages > 1 else 0.0


def decode_attention_s(t: StepTables, n: int, context: float, table: np.ndarray) -> float:
    """Bilinear in sequences and context, the last context segment extended."""
    i = int(np.clip(np.searchsorted(t.decode_seq_knots, n, side="right") - 1, 0, len(t.decode_seq_knots) - 2))
    j = int(
        np.clip(
            np.searchsorted(t.decode_ctx_knots, context, side="right") - 1, 0, len(t.decode_ctx_knots) - 2
        )
    )
    x = (n - t.decode_seq_knots[i]) / (t.decode_seq_knots[i + 1] - t.decode_seq_knots[i])
    y = (context - t.decode_ctx_knots[j]) / (t.decode_ctx_knots[j + 1] - t.decode_ctx_knots[j])
    low = table[i, j] * (1 - x) + table[i + 1, j] * x
    high = table[i, j + 1] * (1 - x) + table[i + 1, j + 1] * x
    return float(low * (1 - y) + high * y)


def prefill_attention_s(t: StepTables, tokens: int, before: int) -> float:
    """Seconds of a chunk of `tokens` after `before` cached ones."""
    axes = []
    for value, knots in (
        (np.log2(tokens), t.prefill_len_knots_log2),
        (np.log2(before + 1), t.prefill_ctx_knots_log2),
    ):
        value = min(max(value, knots[0]), knots[-1])
        i = int(np.clip(np.searchsorted(knots, value, side="right") - 1, 0, len(knots) - 2))
        axes.append((i, (value - knots[i]) / (knots[i + 1] - knots[i])))
    (i, x), (j, y) = axes

    def at(table: np.ndarray) -> float:
        low = table[i, j] * (1 - y) + table[i, j + 1] * y
        high = table[i + 1, j] * (1 - y) + table[i + 1, j + 1] * y
        return float(low * (1 - x) + high * x)

    pairs = sum(before + k for k in range(1, tokens + 1))
    seconds = pairs * at(t.prefill_full_s_per_pair)
    if t.cap_tokens:
        capped = sum(min(before + k, t.cap_tokens) for k in range(1, tokens + 1))
        seconds += capped * at(t.prefill_capped_s_per_pair)
    return seconds


def simulate_reference(workload: Workload, tables: StepTables, config: SchedulerConfig) -> ReferenceResult:
    """The whole workload, step by step."""
    check(workload, tables, config)
    prefix = uses_prefixes(workload, config)
    entry_tokens, _, _ = entry_shape(workload.block_tokens, config.block_tokens) if prefix else (1, 1, 1)
    offset, ids = np.zeros(len(workload) + 1, np.int64), np.zeros(0, np.int64)
    if prefix:
        offset, ids = cache_entries(workload, config)
    lead_s = config.lead_s(workload.input_tokens)
    requests = [
        Request(
            row=row,
            arrival_s=float(workload.arrival_s[row] + lead_s[row]),
            input_tokens=int(workload.input_tokens[row]),
            output_tokens=int(workload.output_tokens[row]),
            entries=[int(i) for i in ids[offset[row] : offset[row + 1]]],
        )
        for row in range(len(workload))
    ]
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(workload.parent):
        if parent >= 0:
            children.setdefault(int(parent), []).append(row)
    roots, replica_of = assign(workload, config)
    replica_of = [int(r) for r in replica_of]
    replicas = [Replica(tables, config, prefix, entry_tokens) for _ in range(config.replicas)]
    queues = [[int(row) for row in rows] for rows in roots]
    dynamic = config.router == LEAST_OUTSTANDING and config.replicas > 1 and not workload.concurrency
    if workload.concurrency:
        for index, replica in enumerate(replicas):
            clients = workload.concurrency // config.replicas
            clients += 1 if index < workload.concurrency % config.replicas else 0
            for row in queues[index][:clients]:
                requests[row].arrival_s = float(lead_s[row])
                heapq.heappush(replica.pending, (requests[row].arrival_s, 1, row))
            queues[index] = queues[index][clients:]
    elif not dynamic:
        for replica, rows in zip(replicas, queues, strict=True):
            for row in rows:
                heapq.heappush(replica.pending, (requests[row].arrival_s, 0, row))

    def advance(index: int, until: float) -> None:
        replica = replicas[index]
        while True:
            while replica.pending and (
                replica.pending[0][0] <= replica.clock
                or (not replica.active and not replica.waiting and replica.pending[0][0] < until)
            ):
                at, triggered, row = heapq.heappop(replica.pending)
                replica.clock = max(replica.clock, at)
                replica.waiting.append(requests[row])
                replica.arrived += triggered  # roots count from when they are sent
            if not (replica.active or replica.waiting) or replica.clock >= until:
                return
            replica.step()
            for request in replica.finished:
                later = children.get(request.row, [])
                for row in later:
                    requests[row].arrival_s = request.finish_s + float(workload.delay_s[row] + lead_s[row])
                    heapq.heappush(replica.pending, (requests[row].arrival_s, 1, row))
                if workload.concurrency and not later and queues[index]:
                    row = queues[index].pop(0)
                    requests[row].arrival_s = request.finish_s + float(lead_s[row])
                    heapq.heappush(replica.pending, (requests[row].arrival_s, 1, row))
            replica.finished = []

    if dynamic:
        placed: dict[int, int] = {}
        routed = [0] * config.replicas
        sent = sorted(
            map(int, np.flatnonzero(workload.parent < 0)), key=lambda row: (requests[row].arrival_s, row)
        )
        for row in sent:
            session, now = int(workload.session[row]), requests[row].arrival_s
            if session not in placed:
                for index in range(config.replicas):
                    advance(index, now)
                # Roots that were sent, triggered rows that came, less what is done by now.
                still = [
                    routed[index] + r.arrived - r.done + (r.late if r.clock > now else 0)
                    for index, r in enumerate(replicas)
                ]
                placed[session] = still.index(min(still))
            best = placed[session]
            heapq.heappush(replicas[best].pending, (now, 0, row))
            routed[best] += 1
        replica_of = [placed[int(s)] for s in workload.session]
    for index in range(config.replicas):
        advance(index, float("inf"))
    arrival_s = [r.arrival_s - float(lead) for r, lead in zip(requests, lead_s, strict=True)]
    return result_of(arrival_s, requests, replicas, replica_of)


def result_of(
    arrival_s: list[float], requests: list[Request], replicas: list[Replica], replica_of: list[int]
) -> ReferenceResult:
    """What requests [N] that replicas have served came to; `replica_of` [N] may be left empty."""
    return ReferenceResult(
        arrival_s=arrival_s,
        first_s=[r.first_s for r in requests],
        finish_s=[r.finish_s for r in requests],
        replica=replica_of,
        gaps_s=[gap for replica in replicas for gap in replica.gaps],
        preemptions=sum(r.preemptions for r in replicas),
        cached_tokens=sum(r.cached_tokens for r in replicas),
        peak_blocks=max(r.pool.peak for r in replicas),
        prefill_tokens=sum(r.prefill_tokens for r in replicas),
        busy_s=sum(r.busy for r in replicas),
        attention_decode_s=sum(r.attention_decode for r in replicas),
        attention_prefill_s=sum(r.attention_prefill for r in replicas),
    )
