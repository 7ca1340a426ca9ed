"""Disaggregated serving: workers that compute prompts, workers that decode, and what goes between them.

A request goes to a prefill worker, which computes its prompt and the first token; its KV cache then takes
`transfer_s` to a decode worker, which takes it in (see *Brought prompts* in `core`). Workers of a session are
the same for all its prompts, so that their prefix caches serve it; hand-overs go round. Two stages influence
each other both ways only where requests wait for others' ends (turns of a session, clients of a closed loop):
then the workers advance in turn, each no further than the earliest time at which another could reach it.

What is left out: a prefill worker gives its blocks back when it hands over, not when they have been read, and
transfers do not slow one another. Cached prefixes of decode workers are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit

from costmodels.table import StepTables
from planner.simulator import core
from planner.simulator.config import SchedulerConfig
from planner.simulator.core import _pop, _push
from planner.simulator.core import view as _one
from planner.simulator.result import FloatArray, IntArray, SimulationResult, collect
from planner.simulator.simulate import (
    WITH_FIRST_TOKEN,
    check,
    compiled_tables,
    empty_store,
    queue_order,
    request_rows,
    session_index,
)
from planner.workload.workload import Workload


@dataclass(frozen=True, slots=True)
class Stage:
    """One kind of worker: its step tables and scheduler, and what its devices draw, cost and could do."""

    tables: StepTables
    config: SchedulerConfig
    devices: int
    idle_w_per_device: float
    peak_flops_per_s: float
    memory_bandwidth_bytes_per_s: float
    usd_per_hour: float = 0.0

    def collect(self, workload: Workload, store: core.Store, **times: Any) -> SimulationResult:
        """What its workers did."""
        return collect(
            workload,
            self.tables,
            self.config,
            [store],
            devices=self.devices,
            idle_w_per_device=self.idle_w_per_device,
            peak_flops_per_s=self.peak_flops_per_s,
            memory_bandwidth_bytes_per_s=self.memory_bandwidth_bytes_per_s,
            usd_per_hour=self.usd_per_hour,
            **times,
        )


@dataclass(eq=False)
class PairResult:
    """One simulated disaggregated plan: what prefill workers did, and decode workers with all times."""

    prefill: SimulationResult
    decode: SimulationResult

    @property
    def makespan_s(self) -> float:
        """First arrival to last token."""
        return self.decode.makespan_s

    @property
    def energy_j(self) -> float:
        """Of all devices over the whole makespan."""
        stages = (self.prefill, self.decode)
        idle_w = sum(stage.idle_w_per_device * stage.devices for stage in stages)
        return sum(stage.work_j for stage in stages) + idle_w * self.makespan_s

    def breakdown_s(self) -> dict[str, float]:
        """Seconds of the makespan by what a device does, averaged over all devices; sums to it."""
        stages = (self.prefill, self.decode)
        devices = sum(stage.devices for stage in stages)
        spent = {
            name: sum(stage.busy_s[name] * stage.devices for stage in stages) / devices
            for name in self.decode.busy_s
        }
        spent["idle"] = self.makespan_s - sum(spent.values())
        return spent

    def metrics(self) -> dict[str, Any]:
        """Every metric of a result (see `SimulationResult.metrics`)."""
        stages = (self.prefill, self.decode)
        flops_per_s = sum(stage.peak_flops_per_s * stage.devices for stage in stages)
        bytes_per_s = sum(stage.memory_bandwidth_bytes_per_s * stage.devices for stage in stages)
        makespan = max(self.makespan_s, 1e-300)
        return self.decode.metrics_with(
            devices=sum(stage.devices for stage in stages),
            energy_j=self.energy_j,
            usd_per_hour=sum(stage.usd_per_hour for stage in stages),
            mfu=sum(stage.flops for stage in stages) / (flops_per_s * makespan),
            mbu=sum(stage.bytes_moved for stage in stages) / (bytes_per_s * makespan),
            preemptions=sum(stage.preemptions for stage in stages),
            cached_tokens=self.prefill.work.cached_tokens,
            breakdown_s=self.breakdown_s(),
        )


def prompts_of(workload: Workload) -> Workload:
    """The same requests with one output token each: what prefill workers see of them."""
    return replace(workload, output_tokens=np.ones_like(workload.output_tokens))


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """What prefill workers did: arrivals and first tokens [N], which is when they hand over, in s."""

    result: SimulationResult
    arrival_s: FloatArray
    handed_s: FloatArray


def simulate_prompts(workload: Workload, prefill: Stage) -> Prompts:
    """Run the prefill workers of requests that come by themselves, whatever decode workers follow."""
    if not workload.by_themselves:
        raise ValueError("requests that wait for the ends of others need both stages")
    first = _First(workload, prefill)
    first.arrive(np.arange(len(workload)), heaped=False)
    _run_out(compiled_tables(prefill.tables), first.rows, first.store)
    return first.collect(workload, prefill)


class _First:
    """Prefill workers of a workload before they have begun."""

    def __init__(self, workload: Workload, prefill: Stage) -> None:
        self.prompts, self.config = prompts_of(workload), replace(prefill.config, hands_over=True)
        check(self.prompts, prefill.tables, self.config)
        rows = request_rows(self.prompts, self.config)
        # Whose end starts whom: the stages' own rows trigger nothing by themselves.
        self.child, self.sibling = rows.child, rows.sibling
        alone = np.full(len(workload), -1, np.int64)
        self.rows = rows._replace(child=alone, sibling=alone)
        self.lead_s = self.config.lead_s(workload.input_tokens)
        sessions, _ = session_index(workload)
        clients, replicas = min(workload.concurrency, len(workload)), self.config.replicas
        self.worker = sessions % (min(replicas, clients) if clients else replicas)
        roots = int((workload.parent < 0).sum())
        self.store = empty_store(
            self.prompts, prefill.tables, self.config, self.rows, replicas, roots, pending=len(workload)
        )
        _handed_out(self.store)

    def arrive(self, wanted: IntArray, *, heaped: bool) -> None:
        """See `_arrive`."""
        _arrive(wanted, self.rows, self.store, self.worker, heaped=heaped)

    def collect(self, workload: Workload, prefill: Stage) -> Prompts:
        """What the workers did."""
        arrival_s = self.rows.floats[:, core.ARRIVE] - self.lead_s
        handed_s = self.rows.floats[:, core.FINISH]
        result = prefill.collect(
            self.prompts, self.store, arrive_s=arrival_s, first_s=handed_s.copy(), finish_s=handed_s.copy(),
            replica=self.worker, slo={},
        )  # fmt: skip
        return Prompts(result, arrival_s, handed_s)


def _handed_out(store: core.Store, logged: int = 1) -> None:
    """Its requests come from outside, and their ends are told."""
    store.ints[:, core.CLOSED], store.ints[:, core.TRIGGERED] = 0, 1
    store.ints[:, core.LOGGED] = logged


def simulate_pair(
    workload: Workload,
    prefill: Stage,
    decode: Stage,
    transfer_s: FloatArray,
    *,
    slo: Mapping[str, Mapping[str, float]] | None = None,
    prompts: Prompts | None = None,
) -> PairResult:
    """Run a whole workload on prefill workers and decode workers.

    `transfer_s` [N] is the time of each request's KV cache on its way. `prompts`: what `simulate_prompts`
    gave for the same workload and prefill workers: these need not run again. Raises as `simulate` does.
    """
    second = decode.config
    if not second.brought or prefill.config.brought:
        raise ValueError("prompts are computed by the first stage and brought to the second")
    check(workload, decode.tables, second)
    transfer_s = np.asarray(transfer_s, np.float64)
    rows = request_rows(workload, second)
    alone = np.full(len(workload), -1, np.int64)
    rows = rows._replace(child=alone, sibling=alone)
    store = empty_store(workload, decode.tables, second, rows, second.replicas, 1, pending=len(workload))
    worker = np.arange(len(workload)) % second.replicas
    ends_early = (workload.output_tokens == 1) & (second.brought == WITH_FIRST_TOKEN)
    if workload.by_themselves:
        prompts = simulate_prompts(workload, prefill) if prompts is None else prompts
        _handed_out(store)
        rows.floats[:, core.ARRIVE] = prompts.handed_s + transfer_s
        _arrive(np.flatnonzero(~ends_early), rows, store, worker, heaped=True)
        _run_out(compiled_tables(decode.tables), rows, store)
    else:
        first = _First(workload, prefill)
        for part in (first.store, store):
            _handed_out(part, core.STOPS)
        roots, clients = np.flatnonzero(workload.parent < 0), min(workload.concurrency, len(workload))
        if workload.concurrency:
            first.rows.floats[:, core.ARRIVE] = first.lead_s
        first.arrive(roots[:clients] if clients else roots, heaped=clients > 0)
        child, sibling = (
            part if len(part) == len(workload) else alone for part in (first.child, first.sibling)
        )
        _tandem(
            compiled_tables(prefill.tables), first.rows, first.store,
            compiled_tables(decode.tables), rows, store,
            np.stack([first.worker, worker]), transfer_s, ends_early,
            child, sibling, roots[clients:] if clients else roots[:0],
        )  # fmt: skip
        prompts = first.collect(workload, prefill)
    handed_s = prompts.handed_s
    own = {name: rows.floats[:, column] for name, column in (("first", core.FIRST), ("end", core.FINISH))}
    first_s, finish_s = (np.where(ends_early, handed_s, own[name]) for name in ("first", "end"))
    return PairResult(
        prompts.result,
        decode.collect(
            workload, store, arrive_s=prompts.arrival_s, first_s=first_s, finish_s=finish_s, replica=worker,
            slo=slo or {}, expected=int((~ends_early).sum()),
        ),
    )  # fmt: skip


def _arrive(wanted: IntArray, rows: core.Rows, store: core.Store, worker: IntArray, *, heaped: bool) -> None:
    """Put requests whose arrivals are known into the rows of their workers, or where others' ends start more
    of their kind, into the heaps."""
    for index in range(len(store.ints)):
        mine = queue_order(wanted[worker[wanted] == index], rows)
        if heaped:  # ascending, so it is a heap
            store.aheap[index, : len(mine), 0] = rows.floats[mine, core.ARRIVE]
            store.aheap[index, : len(mine), 1] = mine
            store.ints[index, core.AHEAP] = len(mine)
        else:
            store.order[index, : len(mine)] = mine
            store.ints[index, core.REND] = len(mine)


@njit(cache=True, nogil=True, error_model="numpy")
def _acts_at(w, g, r):  # type: ignore[no-untyped-def]
    """When a replica next begins something; never: infinity."""
    s = g.ints[r]
    if s[core.ACTIVE] > 0 or s[core.WAITING] > 0:
        return g.floats[r, core.CLOCK]
    at = np.inf
    if s[core.RPTR] < s[core.REND]:
        at = w.floats[g.order[r, s[core.RPTR]], core.ARRIVE]
    if s[core.AHEAP] > 0 and g.aheap[r, 0, 0] < at:
        at = g.aheap[r, 0, 0]
    # An arrival that came while the replica was busy is seen at its clock.
    return max(at, g.floats[r, core.CLOCK]) if at < np.inf else at


@njit(cache=True, nogil=True, error_model="numpy")
def _send(w, g, r, i, at):  # type: ignore[no-untyped-def]
    """A request comes to a replica at a time."""
    w.floats[i, core.ARRIVE] = at
    g.ints[r, core.AHEAP] = _push(g.aheap[r], g.ints[r, core.AHEAP], at, float(i))


@njit(cache=True, nogil=True, error_model="numpy")
def _run_out(t, w, g):  # type: ignore[no-untyped-def]
    """Let every replica do all that it has been handed."""
    for r in range(g.ints.shape[0]):
        core.advance(t, w, _one(g, r), np.inf)


@njit(cache=True, nogil=True, error_model="numpy")
def _tandem(tp, wp, gp, td, wd, gd, worker, transfer, early, child, sibling, roots):  # type: ignore[no-untyped-def]
    """Advance both stages until nothing is left to do.

    Ends that others wait for are taken in order of time, each once nobody can end before it any more: every
    step takes time, so what begins at a time ends later.
    """
    first, second = gp.ints.shape[0], gd.ints.shape[0]
    seen = np.zeros(first + second, np.int64)
    ends = np.zeros((len(transfer) + 1, 2))
    waiting = 0  # ends in the heap
    begun = 0  # of the closed loop's sessions that wait for a client
    while True:
        # Who begins something first, and when anybody else does: until then nothing can reach the one.
        who, now, others = 0, np.inf, np.inf
        for r in range(first + second):
            at = _acts_at(wp, gp, r) if r < first else _acts_at(wd, gd, r - first)
            if at < now:
                who, now, others = r, at, now
            elif at < others:
                others = at
        if waiting > 0 and ends[0, 0] <= now:
            end, i = ends[0, 0], int(ends[0, 1])
            waiting = _pop(ends, waiting)
            begun = _follow(wp, gp, worker, child, sibling, roots, begun, i, end)
            continue
        if now == np.inf:
            return
        if waiting > 0:
            others = min(others, ends[0, 0])
        until = max(others, np.nextafter(now, np.inf))
        if who < first:
            core.advance(tp, wp, _one(gp, who), until)
            for e in range(seen[who], gp.ints[who, core.DONE]):
                i = gp.ended[who, e]
                end = wp.floats[i, core.FINISH]
                if early[i]:
                    waiting = _push(ends, waiting, end, float(i))
                else:
                    _send(wd, gd, worker[1, i], i, end + transfer[i])
            seen[who] = gp.ints[who, core.DONE]
        else:
            r = who - first
            core.advance(td, wd, _one(gd, r), until)
            for e in range(seen[who], gd.ints[r, core.DONE]):
                i = gd.ended[r, e]
                waiting = _push(ends, waiting, wd.floats[i, core.FINISH], float(i))
            seen[who] = gd.ints[r, core.DONE]


@njit(cache=True, nogil=True, error_model="numpy")
def _follow(w, g, worker, child, sibling, roots, begun, i, now):  # type: ignore[no-untyped-def]
    """Start what waited for a request's last token: its children, or its client's next session."""
    at = child[i]
    if at < 0 and begun < roots.shape[0]:
        root = roots[begun]
        _send(w, g, worker[0, root], root, now + w.floats[root, core.DELAY])
        return begun + 1
    while at >= 0:
        _send(w, g, worker[0, at], at, now + w.floats[at, core.DELAY])
        at = sibling[at]
    return begun
