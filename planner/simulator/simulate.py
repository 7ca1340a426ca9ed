"""The simulator's front door: check the input, lay out the arrays, run, collect the result."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

import numpy as np

from costmodels.table import StepTables
from hardware.errors import InputError
from planner.simulator import core
from planner.simulator.config import SchedulerConfig
from planner.simulator.result import SimulationResult, collect
from planner.workload.workload import Workload

MIXED, PREFILL_FIRST = "mixed", "prefill_first"
ON_DEMAND, RESERVE = "on_demand", "reserve_output"
ROUND_ROBIN, LEAST_OUTSTANDING = "round_robin", "least_outstanding"
WITH_FIRST_TOKEN, WITHOUT_LAST_TOKEN = "with_first_token", "without_last_token"
_BROUGHT = {
    "": 0,
    WITH_FIRST_TOKEN: core.WITH_FIRST_TOKEN,
    WITHOUT_LAST_TOKEN: core.WITHOUT_LAST_TOKEN,
}
_TIMELINE_POINTS = 2000


def simulate(
    workload: Workload,
    tables: StepTables,
    config: SchedulerConfig,
    *,
    devices: int,
    idle_w_per_device: float,
    peak_flops_per_s: float,
    memory_bandwidth_bytes_per_s: float,
    usd_per_hour: float = 0.0,
    slo: Mapping[str, Mapping[str, float]] | None = None,
    timeline: bool = False,
) -> SimulationResult:
    """Run a whole workload on `config.replicas` copies of one worker.

    `devices`, `usd_per_hour` are those of all replicas together; `peak_flops_per_s` and
    `memory_bandwidth_bytes_per_s` those of one device. `slo` bounds (s) are applied to single
    requests for goodput. With `timeline` the queue is sampled over time.
    Raises InputError when a request can never be served (longer than the KV cache of one rank),
    ValueError when the tables do not reach the scheduler's limits.
    """
    check(workload, tables, config)
    rows, replica = assign(workload, config)
    tab, req = compiled_tables(tables), request_rows(workload, config)
    lead_s = config.lead_s(workload.input_tokens)
    stores: list[core.Store] = []
    if config.router == LEAST_OUTSTANDING and config.replicas > 1 and not workload.concurrency:
        roots = queue_order(np.flatnonzero(workload.parent < 0), req)
        store = empty_store(workload, tables, config, req, config.replicas, len(roots), timeline=timeline)
        sessions, count = session_index(workload)
        replica_of = np.full(count, -1, np.int64)
        core.route(tab, req, store, roots, sessions, replica_of)
        replica = replica_of[sessions]
        stores.append(store)
    else:
        for index, mine in enumerate(rows):
            if not len(mine):
                continue
            store = empty_store(workload, tables, config, req, 1, len(mine), timeline=timeline)
            store.order[0] = mine if workload.concurrency else queue_order(mine, req)
            store.ints[0, core.REND] = len(mine)
            if workload.concurrency:
                started = min(_clients(workload.concurrency, config.replicas, index), len(mine))
                req.floats[mine, core.ARRIVE] = lead_s[mine]
                store.ints[0, core.RPTR] = store.ints[0, core.AHEAP] = started
                first = queue_order(mine[:started], req)  # ascending, so it is a heap
                store.aheap[0, :started, 0] = lead_s[first]
                store.aheap[0, :started, 1] = first
            core.advance(tab, req, core.Store(*(array[0] for array in store)), np.inf)
            stores.append(store)
    return collect(
        workload,
        tables,
        config,
        stores,
        arrive_s=req.floats[:, core.ARRIVE] - lead_s,
        first_s=req.floats[:, core.FIRST].copy(),
        finish_s=req.floats[:, core.FINISH].copy(),
        replica=replica,
        devices=devices,
        idle_w_per_device=idle_w_per_device,
        peak_flops_per_s=peak_flops_per_s,
        memory_bandwidth_bytes_per_s=memory_bandwidth_bytes_per_s,
        usd_per_hour=usd_per_hour,
        slo=slo or {},
    )


def check(workload: Workload, tables: StepTables, config: SchedulerConfig) -> None:
    """Refuse what could never finish."""
    if not len(workload):
        raise InputError("workload", "it has no requests")
    if tables.pipeline != config.pipeline or tables.attention_data != config.attention_data:
        raise ValueError("step tables and scheduler are for different parallelism")
    if config.policy not in (MIXED, PREFILL_FIRST) or config.admission not in (ON_DEMAND, RESERVE):
        raise ValueError(f"unknown scheduler {config.policy}/{config.admission}")
    if config.router not in (ROUND_ROBIN, LEAST_OUTSTANDING):
        raise ValueError(f"unknown router {config.router}")
    if config.brought not in _BROUGHT or (config.brought == WITHOUT_LAST_TOKEN and config.policy != MIXED):
        raise ValueError(f"prompts cannot come {config.brought!r} to a {config.policy} scheduler")
    if min(config.max_num_seqs, config.max_num_batched_tokens, config.replicas, config.block_tokens) < 1:
        raise ValueError("scheduler limits must be positive")
    sequences = min(config.max_num_seqs, len(workload))
    if (
        len(tables.decode_latency_s) <= sequences
        or len(tables.mixed_latency_s) <= config.max_num_batched_tokens
    ):
        raise ValueError("step tables do not reach the scheduler's limits")
    need = workload.input_tokens + workload.output_tokens - 1
    longest = int(np.argmax(need))
    capacity = config.kv_blocks // config.attention_data * config.block_tokens
    if need[longest] > capacity:
        raise InputError(
            "workload",
            f"request {longest} needs {int(need[longest])} tokens of KV cache, "
            f"one rank of a worker holds {capacity}",
        )


def assign(workload: Workload, config: SchedulerConfig) -> tuple[list[Any], Any]:
    """Root rows per replica (round robin over sessions) and the replica of every row [N]."""
    roots = np.flatnonzero(workload.parent < 0)
    if config.replicas == 1:
        return [roots], np.zeros(len(workload), np.int64)
    sessions, _ = session_index(workload)
    # Fewer clients than replicas: the rest stay idle.
    replica = sessions % min(config.replicas, workload.concurrency or config.replicas)
    return [roots[replica[roots] == r] for r in range(config.replicas)], replica


def queue_order(rows: Any, req: core.Rows) -> Any:
    """Rows in the order in which the scheduler sees them; of two at once the lower row first."""
    return rows[np.argsort(req.floats[rows, core.ARRIVE], kind="stable")]


def session_index(workload: Workload) -> tuple[Any, int]:
    """[N] sessions numbered in order of first appearance among the rows, and how many."""
    session = workload.session
    ids, first, inverse = np.unique(session, return_index=True, return_inverse=True)
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(ids))
    return rank[inverse], len(ids)


def _clients(concurrency: int, replicas: int, replica: int) -> int:
    """Clients of a closed loop that one replica serves."""
    return concurrency // replicas + (1 if replica < concurrency % replicas else 0)


def entry_shape(block_tokens: int, kv_block_tokens: int) -> tuple[int, int, int]:
    """(tokens per cache entry, KV blocks per entry, prefix blocks per entry): whole numbers of both."""
    tokens = lcm(block_tokens, kv_block_tokens)
    return tokens, tokens // kv_block_tokens, tokens // block_tokens


def cache_entries(workload: Workload, config: SchedulerConfig) -> tuple[Any, Any]:
    """(offset [N+1], ids): prefix blocks joined to entries that are whole KV blocks.

    An id stands for everything up to its block, so the last of a group stands for the group.
    """
    _, _, group = entry_shape(workload.block_tokens, config.block_tokens)
    if group == 1:
        return workload.prefix_offset, workload.prefix_ids
    counts = np.diff(workload.prefix_offset) // group
    offset = np.concatenate(([0], np.cumsum(counts)))
    within = np.arange(offset[-1]) - np.repeat(offset[:-1], counts)
    at = np.repeat(workload.prefix_offset[:-1], counts) + within * group + group - 1
    return offset, workload.prefix_ids[at]


def uses_prefixes(workload: Workload, config: SchedulerConfig) -> bool:
    """Whether the prefix cache can matter at all."""
    known = workload.block_tokens > 0 and len(workload.prefix_ids) > 0
    return config.prefix_caching and known and not config.brought


def compiled_tables(tables: StepTables) -> core.Tables:
    """The tables' arrays as the compiled core takes them."""
    sequences = np.arange(len(tables.decode_latency_s), dtype=np.float64)
    knots = tables.decode_seq_knots
    low = np.clip(np.searchsorted(knots, sequences, side="right") - 1, 0, len(knots) - 2)
    fraction = (sequences - knots[low]) / (knots[low + 1] - knots[low])

    def floats(array: Any) -> Any:
        return np.ascontiguousarray(array, dtype=np.float64)

    return core.Tables(
        floats(tables.mixed_latency_s),
        floats(tables.mixed_cycle_s),
        floats(tables.decode_latency_s),
        floats(tables.decode_cycle_s),
        floats(tables.moe_mixed_latency_s),
        floats(tables.moe_mixed_cycle_s),
        floats(tables.moe_decode_latency_s),
        floats(tables.moe_decode_cycle_s),
        floats(tables.logits_s),
        float(tables.attention_cycle_factor),
        low.astype(np.int64),
        fraction,
        floats(tables.decode_ctx_knots),
        floats(tables.decode_full_s),
        floats(tables.decode_capped_s),
        floats(tables.prefill_len_knots_log2),
        floats(tables.prefill_ctx_knots_log2),
        floats(tables.prefill_full_s_per_pair),
        floats(tables.prefill_capped_s_per_pair),
    )


def request_rows(workload: Workload, config: SchedulerConfig) -> core.Rows:
    """Requests with their state, in columns."""
    n = len(workload)
    ints = np.zeros((n, core.ROW_INTS), np.int64)
    ints[:, core.INPUT] = workload.input_tokens
    ints[:, core.OUTPUT] = workload.output_tokens
    floats = np.zeros((n, core.ROW_FLOATS))
    lead_s = config.lead_s(workload.input_tokens)
    floats[:, core.ARRIVE] = workload.arrival_s + lead_s
    floats[:, core.DELAY] = workload.delay_s + lead_s
    later = np.flatnonzero(workload.parent >= 0)
    links = n if len(later) or workload.concurrency else 1
    child, sibling = np.full(links, -1, np.int64), np.full(links, -1, np.int64)
    if len(later):
        # From the last row on, each put in front, so that siblings come in order of their rows.
        core.link_children(workload.parent, later[::-1].copy(), child, sibling)
    offset = ids = np.zeros(1, np.int64)
    own = np.zeros(1, np.int8)
    if uses_prefixes(workload, config):
        offset, ids = cache_entries(workload, config)
        own = np.zeros(len(ids), np.int8)
    return core.Rows(
        ints,
        floats,
        child,
        sibling,
        np.ascontiguousarray(offset, np.int64),
        np.ascontiguousarray(ids, np.int64),
        own,
    )


def empty_store(
    workload: Workload,
    tables: StepTables,
    config: SchedulerConfig,
    req: core.Rows,
    replicas: int,
    roots: int,
    *,
    timeline: bool = False,
    pending: int = 0,
) -> core.Store:
    """Empty state of replicas that run together, with room for `roots` roots each and for the arrivals that
    others trigger, or for `pending` of them."""
    n = len(workload)
    prefix = uses_prefixes(workload, config)
    triggered = (
        len(req.child) == n and n > 0 and (workload.concurrency > 0 or bool((workload.parent >= 0).any()))
    )
    span = 0.0 if workload.concurrency else float(workload.arrival_s.max())
    tokens, blocks, _ = entry_shape(workload.block_tokens, config.block_tokens) if prefix else (1, 1, 1)
    ints = np.zeros((replicas, core.INTS), np.int64)
    floats = np.zeros((replicas, core.FLOATS))
    floats[:, core.SAMPLE_S] = max(span / _TIMELINE_POINTS, 1e-3) if timeline else 0.0
    for name, value in (
        (core.PIPELINE, config.pipeline),
        (core.RANKS, config.attention_data),
        (core.MAX_SEQS, config.max_num_seqs * config.attention_data),
        (core.BUDGET, config.max_num_batched_tokens),
        (core.BLOCKS, config.kv_blocks),
        (core.FREE, config.kv_blocks),
        (core.BLOCK_TOKENS, config.block_tokens),
        (core.WATERMARK, int(config.watermark * config.kv_blocks)),
        (core.MIXED, config.policy == MIXED),
        (core.CHUNKED, config.chunked_prefill),
        (core.RESERVE, config.admission == RESERVE),
        (core.PREFIX, prefix),
        (core.ENTRY_TOKENS, tokens),
        (core.ENTRY_BLOCKS, blocks),
        (core.CLOSED, workload.concurrency > 0),
        (core.TRIGGERED, triggered),
        (core.CAP, tables.cap_tokens),
        (core.WHEAD, -1),
        (core.WTAIL, -1),
        (core.PHEAD, -1),
        (core.PTAIL, -1),
        (core.OTAIL, -1),
        (core.BROUGHT, _BROUGHT[config.brought]),
        (core.LOGGED, bool(config.brought) or config.hands_over),
    ):
        ints[:, name] = int(value)
    entries = int(req.ids.max()) + 1 if prefix and len(req.ids) else 0
    ints[:, core.ENTRIES] = entries
    nodes = np.full((replicas, entries + config.kv_blocks + 2 if prefix else 1, 4), -1, np.int64)
    if prefix:
        nodes[:, :, core.REF] = nodes[:, :, core.CACHED] = 0
        # One run of all blocks is free; the other run nodes wait in a list of their own.
        ints[:, core.QHEAD] = ints[:, core.QTAIL] = entries
        nodes[:, entries, core.REF] = config.kv_blocks
        ints[:, core.RUNFREE] = entries + 1
        nodes[:, entries + 1 : -1, core.QNEXT] = np.arange(entries + 2, nodes.shape[1])
    active = min(config.max_num_seqs * config.attention_data, n)
    heap = 2 * active + 16
    if not pending:
        pending = int((workload.parent >= 0).sum()) + min(workload.concurrency, n) + 1 if triggered else 1

    def counts(*shape: int) -> Any:
        return np.zeros((replicas, *shape))

    logged = n if config.brought or config.hands_over else 1
    bits = counts(1)
    return core.Store(
        ints=ints,
        floats=floats,
        fheap=counts(heap, 2),
        cheap=counts(heap if tables.cap_tokens else 1, 2),
        aheap=counts(pending, 2),
        order=np.zeros((replicas, max(1, roots)), np.int64),
        residue=np.zeros((replicas, config.block_tokens), np.int64),
        group=counts(2, active + 2),
        chunk=np.zeros((replicas, 2, active + 2), np.int64),
        itl=counts(core.ITL_BINS),
        w_mixed=counts(len(tables.mixed_latency_s)),
        w_decode=counts(len(tables.decode_latency_s)),
        w_moe_mixed=counts(len(tables.moe_mixed_latency_s)),
        w_moe_decode=counts(len(tables.moe_decode_latency_s)),
        w_logits=counts(len(tables.logits_s)),
        nodes=nodes,
        sample=counts(_TIMELINE_POINTS if timeline else 1, 4),
        ended=np.zeros((replicas, logged), np.int64),
        fresh=np.zeros((replicas, active + 1 if config.brought else 1), np.int64),
        bits_f=bits,
        bits_i=bits.view(np.int64),
    )
