"""Two stages in plain Python, one step of one worker at a time: what `pair` must reproduce."""

from __future__ import annotations

import heapq

import numpy as np

from planner.simulator.pair import Stage, prompts_of
from planner.simulator.reference import ReferenceResult, Replica, Request, result_of
from planner.simulator.simulate import (
    WITH_FIRST_TOKEN,
    cache_entries,
    check,
    entry_shape,
    session_index,
    uses_prefixes,
)
from planner.workload.workload import Workload


def simulate_pair_reference(
    workload: Workload, prefill: Stage, decode: Stage, transfer_s: np.ndarray
) -> tuple[ReferenceResult, ReferenceResult]:
    """(prefill workers with the hand-overs as ends, decode workers with the requests' own times)."""
    prompts = prompts_of(workload)
    check(prompts, prefill.tables, prefill.config)
    check(workload, decode.tables, decode.config)
    first, second = prefill.config, decode.config
    prefix = uses_prefixes(prompts, first)
    tokens = entry_shape(workload.block_tokens, first.block_tokens)[0] if prefix else 1
    offset, ids = cache_entries(prompts, first) if prefix else (np.zeros(len(workload) + 1, np.int64), [])
    lead_s = first.lead_s(workload.input_tokens)
    rows = range(len(workload))
    asked = [
        Request(row, float(workload.arrival_s[row] + lead_s[row]), int(workload.input_tokens[row]), 1,
                [int(i) for i in ids[offset[row] : offset[row + 1]]])
        for row in rows
    ]  # fmt: skip
    handed = [
        Request(row, 0.0, int(workload.input_tokens[row]), int(workload.output_tokens[row]), [])
        for row in rows
    ]
    sessions, _ = session_index(workload)
    clients = min(workload.concurrency, len(workload))
    places = min(first.replicas, clients) if clients else first.replicas
    here = [Replica(prefill.tables, first, prefix, tokens) for _ in range(first.replicas)]
    there = [Replica(decode.tables, second, False, 1) for _ in range(second.replicas)]
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(workload.parent):
        if parent >= 0:
            children.setdefault(int(parent), []).append(row)
    queue = [int(row) for row in np.flatnonzero(workload.parent < 0)]
    waiting: list[int] = []
    if clients:
        queue, waiting = queue[:clients], queue[clients:]
        for row in rows:
            asked[row].arrival_s = float(lead_s[row])
    for row in queue:
        heapq.heappush(here[sessions[row] % places].pending, (asked[row].arrival_s, int(bool(clients)), row))
    ends: list[tuple[float, int]] = []

    def acts_at(replica: Replica) -> float:
        if replica.active or replica.waiting:
            return replica.clock
        return max(replica.pending[0][0], replica.clock) if replica.pending else float("inf")

    def begin(replica: Replica, requests: list[Request], at: float) -> None:
        replica.clock = max(replica.clock, at)
        while replica.pending and replica.pending[0][0] <= replica.clock:
            replica.waiting.append(requests[heapq.heappop(replica.pending)[2]])
        replica.step()

    while True:
        times = [acts_at(replica) for replica in (*here, *there)]
        now = min(times)
        if ends and ends[0][0] <= now:
            end, row = heapq.heappop(ends)
            later = [(after, float(workload.delay_s[after])) for after in children.get(row, [])]
            if not later and waiting:
                later = [(waiting.pop(0), 0.0)]
            for after, delay in later:
                asked[after].arrival_s = end + (delay + float(lead_s[after]))
                heapq.heappush(here[sessions[after] % places].pending, (asked[after].arrival_s, 1, after))
            continue
        if now == float("inf"):
            break
        who = times.index(now)
        replica = (*here, *there)[who]
        begin(replica, asked if who < len(here) else handed, now)
        for request in replica.finished:
            row = request.row
            if who >= len(here):
                heapq.heappush(ends, (request.finish_s, row))
            elif workload.output_tokens[row] == 1 and second.brought == WITH_FIRST_TOKEN:
                handed[row].first_s = handed[row].finish_s = request.finish_s
                heapq.heappush(ends, (request.finish_s, row))
            else:
                at = request.finish_s + float(transfer_s[row])
                heapq.heappush(there[row % second.replicas].pending, (at, 1, row))
        replica.finished = []

    arrival_s = [asked[row].arrival_s - float(lead_s[row]) for row in rows]
    return result_of(arrival_s, asked, here, []), result_of(arrival_s, handed, there, [])
