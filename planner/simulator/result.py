"""What a simulation measured: per-request times, counters, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.table import StepTables
from planner.simulator import core
from planner.simulator.config import SchedulerConfig
from planner.workload.workload import Workload

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
PERCENTILES = (50, 90, 95, 99)
CATEGORIES = ("gemm", "attention", "moe", "communication", "host")
_TABLES = ("mixed", "decode", "moe_mixed", "moe_decode", "logits")


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Sums over all replicas.

    `batches[table]` how many micro-batches had each size; attention seconds are per device; tokens,
    pairs and contexts as computed.
    """

    batches: Mapping[str, FloatArray]
    attention_decode_s: float
    attention_prefill_s: float
    mixed_tokens: int  # prefill and decode tokens of steps with prefill
    prefill_tokens: int
    decode_tokens: int  # of decode-only steps
    logits_rows: float  # of steps with prefill
    prefill_pairs: float
    prefill_capped_pairs: float
    context_tokens: float  # summed over decode tokens: keys attended to
    capped_tokens: float
    itl_count: float
    itl_sum_s: float
    itl_histogram: FloatArray
    preemptions: int
    cached_tokens: int
    peak_blocks: int
    events: int
    engine_steps: int


@dataclass(eq=False)
class SimulationResult:
    """One simulated plan. Times in s, indexed by the workload's rows.

    `arrival_s`, `first_s` (first token), `finish_s` (last token) per request, `replica` where it
    ran; `timeline` [points, 5] of (replica, time, decoding, waiting, KV blocks in use).
    """

    arrival_s: FloatArray
    first_s: FloatArray
    finish_s: FloatArray
    replica: IntArray
    input_tokens: IntArray
    output_tokens: IntArray
    work: Work
    tables: StepTables
    replicas: int
    devices: int
    idle_w_per_device: float
    peak_flops_per_s: float
    memory_bandwidth_bytes_per_s: float
    usd_per_hour: float
    slo: Mapping[str, Mapping[str, float]]
    timeline: FloatArray = field(default_factory=lambda: np.zeros((0, 5)))

    @property
    def peak_kv_blocks(self) -> int:
        """Most KV blocks that one worker held at once."""
        return self.work.peak_blocks

    @property
    def preemptions(self) -> int:
        """Sequences that lost their blocks and had to recompute."""
        return self.work.preemptions

    @cached_property
    def makespan_s(self) -> float:
        """First arrival to last token."""
        return float(self.finish_s.max() - self.arrival_s.min())

    @cached_property
    def _sizes_run(self) -> dict[str, tuple[npt.NDArray[np.intp], FloatArray]]:
        """Batch sizes that occurred and how often: a few hundred of tens of thousands."""
        used = {name: np.flatnonzero(counts) for name, counts in self.work.batches.items()}
        return {name: (index, self.work.batches[name][index]) for name, index in used.items()}

    def _over_batches(self, name: str, values: FloatArray) -> float:
        """Sum of a table over all batches that ran.

        Not a matrix product: a threaded BLAS waits for busy cores, here a hundred times the work.
        """
        index, counts = self._sizes_run[name]
        return float((values[index] * counts).sum())

    def forget_batches(self) -> None:
        """Keep what sums over batches came to, not their counts: a result to be kept shrinks to its times."""
        for _ in (self.busy_s, self.work_j, self.flops, self.bytes_moved):
            pass
        self.work = replace(self.work, batches={}, itl_histogram=np.zeros(0))
        self.__dict__.pop("_sizes_run", None)

    @cached_property
    def breakdown_s(self) -> dict[str, float]:
        """Seconds of the makespan by what a device does, averaged over devices; sums to it."""
        spent = dict(self.busy_s)
        spent["idle"] = self.makespan_s - sum(spent.values())
        return spent

    @cached_property
    def busy_s(self) -> dict[str, float]:
        """The same without what is left of the makespan."""
        work = self.work
        spent = dict.fromkeys(CATEGORIES, 0.0)
        for category, rows in self.tables.breakdown_s.items():
            spent[category] += sum(self._over_batches(name, values) for name, values in rows.items())
        spent["attention"] += work.attention_decode_s + work.attention_prefill_s
        return {name: seconds / self.replicas for name, seconds in spent.items()}

    @cached_property
    def energy_j(self) -> float:
        """Integral of power over the makespan: idle of all devices, and the work above it."""
        return self.work_j + self.idle_w_per_device * self.devices * self.makespan_s

    @cached_property
    def work_j(self) -> float:
        """Energy of the work above idle."""
        work, tables = self.work, self.tables
        dynamic = sum(self._over_batches(name, values) for name, values in tables.energy_j.items())
        # Attention draws its power in one stage at a time; its seconds are averaged over stages.
        joules = work.attention_decode_s * tables.decode_attention_w
        joules += work.attention_prefill_s * tables.prefill_attention_w
        return dynamic + joules * tables.pipeline

    @cached_property
    def flops(self) -> float:
        """Operations the requests needed (padding and duplicated work not counted)."""
        work, tables = self.work, self.tables
        ranks = tables.attention_data

        def each(name: str, slots: int) -> float:
            values = tables.flops.get(name)
            if values is None or len(values) < 2:
                return 0.0
            return float(values[-1]) / ((len(values) - 1) * slots)

        # Tables of steps with prefill have no padding, so they give the work of a token.
        total = (work.mixed_tokens + work.decode_tokens) * (each("mixed", ranks) + each("moe_mixed", 1))
        total += (work.logits_rows + work.decode_tokens) * each("logits", ranks)
        total += (work.prefill_pairs + work.context_tokens) * tables.flops_per_pair
        total += (work.prefill_capped_pairs + work.capped_tokens) * tables.flops_per_capped_pair
        return total

    @cached_property
    def bytes_moved(self) -> float:
        """Device memory traffic of all devices: weights per micro-batch, KV per decode token."""
        work, tables = self.work, self.tables
        total = sum(self._over_batches(name, values) for name, values in tables.bytes_moved.items())
        total += work.context_tokens * tables.bytes_per_context_token
        return total + work.capped_tokens * tables.bytes_per_capped_token

    def itl_percentiles(self, percents: Sequence[float]) -> list[float]:
        """Gaps between tokens (s) from a histogram with bins of at most 0.39 %."""
        counts = self.work.itl_histogram
        total = float(counts.sum())
        if total == 0:
            return [float("nan")] * len(percents)
        reached = np.cumsum(counts)
        found = np.searchsorted(reached, np.asarray(percents) / 100.0 * total, side="left")
        found = np.minimum(found, len(counts) - 1)
        low = bin_edges(found)
        return [float(v) for v in 0.5 * (low + bin_edges(found + 1))]

    def goodput_requests(self) -> int:
        """Requests that meet every bound of the SLO on their own (the tightest per metric)."""
        good = np.ones(len(self.arrival_s), dtype=bool)
        several = self.output_tokens > 1
        for metric, bounds in self.slo.items():
            if not bounds or metric not in ("ttft_s", "tpot_s", "e2e_s"):
                continue
            limit = min(bounds.values())
            if metric == "ttft_s":
                good &= self.first_s - self.arrival_s <= limit
            elif metric == "e2e_s":
                good &= self.finish_s - self.arrival_s <= limit
            else:
                good &= ~several | ((self.finish_s - self.first_s) <= limit * (self.output_tokens - 1))
        return int(good.sum())

    @property
    def mfu(self) -> float:
        """Share of what the devices could compute in the makespan."""
        most = self.peak_flops_per_s * self.devices * self.makespan_s
        return self.flops / most if most > 0 else 0.0

    @property
    def mbu(self) -> float:
        """Share of what the devices' memory could move in the makespan."""
        most = self.memory_bandwidth_bytes_per_s * self.devices * self.makespan_s
        return self.bytes_moved / most if most > 0 else 0.0

    def metrics(self) -> dict[str, Any]:
        """Every metric of a result, in the published names; undefined statistics are None."""
        return self.metrics_with(
            devices=self.devices,
            energy_j=self.energy_j,
            usd_per_hour=self.usd_per_hour,
            mfu=self.mfu,
            mbu=self.mbu,
            preemptions=self.work.preemptions,
            cached_tokens=self.work.cached_tokens,
            breakdown_s=self.breakdown_s,
        )

    def metrics_with(
        self,
        *,
        devices: int,
        energy_j: float,
        usd_per_hour: float,
        mfu: float,
        mbu: float,
        preemptions: int,
        cached_tokens: int,
        breakdown_s: Mapping[str, float],
    ) -> dict[str, Any]:
        """The same, of these requests' times, when more machines than these had a part in them."""
        requests = len(self.arrival_s)
        makespan = self.makespan_s
        outputs = float(self.output_tokens.sum())
        several = self.output_tokens > 1
        first, finish = self.first_s, self.finish_s
        if several.all():
            tpot = (finish - first) / (self.output_tokens - 1)
        else:
            tpot = (finish - first)[several] / (self.output_tokens[several] - 1)
        itl_mean = self.work.itl_sum_s / self.work.itl_count if self.work.itl_count else float("nan")
        itl = dict(zip(("p50", "p90", "p95", "p99"), self.itl_percentiles(PERCENTILES), strict=True))
        rate = 1.0 / makespan if makespan > 0 else 0.0
        good = requests if not any(self.slo.values()) else self.goodput_requests()
        return {
            "ttft_s": statistics(first - self.arrival_s),
            "tpot_s": statistics(tpot),
            "itl_s": {
                name: None if np.isnan(value) else value for name, value in {"mean": itl_mean, **itl}.items()
            },
            "e2e_s": statistics(finish - self.arrival_s),
            "makespan_s": makespan,
            "output_tokens_per_s": outputs * rate,
            "output_tokens_per_s_per_device": outputs * rate / devices,
            "requests_per_s": requests * rate,
            "goodput_rps": good * rate,
            "energy_j": energy_j,
            "energy_j_per_output_token": energy_j / outputs,
            "power_w": energy_j * rate,
            "devices": devices,
            "power_w_per_device": energy_j * rate / devices,
            "usd_per_hour": usd_per_hour,
            "usd_per_million_output_tokens": usd_per_hour * makespan / 3600.0 / outputs * 1e6,
            "mfu": mfu,
            "mbu": mbu,
            "preemptions": preemptions,
            "prefix_hit_rate": cached_tokens / float(self.input_tokens.sum()),
            "breakdown_s": dict(breakdown_s),
        }


def bin_edges(index: Any) -> Any:
    """Lower edges (s) of bins of the histogram of gaps."""
    raised = (np.asarray(index, np.int64) + core.ITL_LOWEST) << (52 - core.ITL_BITS)
    return raised.view(np.float64)


def statistics(values: FloatArray) -> dict[str, float | None]:
    """mean, p50, p90, p95, p99 over every value (linear between neighbours)."""
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p95", "p99"))
    levels = np.percentile(values, PERCENTILES)
    return {
        "mean": float(values.mean()),
        **{f"p{p}": float(v) for p, v in zip(PERCENTILES, levels, strict=True)},
    }


def collect(
    workload: Workload,
    tables: StepTables,
    config: SchedulerConfig,
    stores: Sequence[core.Store],
    *,
    arrive_s: FloatArray,
    first_s: FloatArray,
    finish_s: FloatArray,
    replica: IntArray,
    devices: int,
    idle_w_per_device: float,
    peak_flops_per_s: float,
    memory_bandwidth_bytes_per_s: float,
    usd_per_hour: float,
    slo: Mapping[str, Mapping[str, float]],
    expected: int | None = None,
) -> SimulationResult:
    """Merge the replicas' stores into one result; `expected` requests ended there, all by default."""

    def integer(name: int) -> int:
        return int(sum(int(store.ints[:, name].sum()) for store in stores))

    def number(name: int) -> float:
        return float(sum(float(store.floats[:, name].sum()) for store in stores))

    def histogram(name: str) -> FloatArray:
        return np.asarray(np.sum([getattr(store, name).sum(axis=0) for store in stores], axis=0))

    expected = len(workload) if expected is None else expected
    if integer(core.DONE) != expected:
        raise RuntimeError(f"simulation ended with {integer(core.DONE)} of {expected} requests done")
    work = Work(
        batches={name: histogram(f"w_{name}") for name in _TABLES},
        attention_decode_s=number(core.ATT_DECODE),
        attention_prefill_s=number(core.ATT_PREFILL),
        mixed_tokens=integer(core.TOK_MIXED),
        prefill_tokens=integer(core.TOK_PREFILL),
        decode_tokens=integer(core.TOK_DECODE),
        logits_rows=number(core.ROWS),
        prefill_pairs=number(core.PAIRS),
        prefill_capped_pairs=number(core.CPAIRS),
        context_tokens=number(core.CTX),
        capped_tokens=number(core.CCTX),
        itl_count=number(core.ITL_COUNT),
        itl_sum_s=number(core.ITL_SUM),
        itl_histogram=histogram("itl"),
        preemptions=integer(core.PREEMPT),
        cached_tokens=integer(core.HIT),
        peak_blocks=max(int(store.ints[:, core.PEAK].max()) for store in stores),
        events=integer(core.EVENTS),
        engine_steps=integer(core.STEPS),
    )
    sampled = [(store, r) for store in stores for r in range(len(store.ints))]
    points = []
    for index, (store, r) in enumerate(sampled):
        rows = store.sample[r, : store.ints[r, core.SAMPLES]]
        points.append(np.column_stack((np.full(len(rows), float(index)), rows)))
    return SimulationResult(
        arrival_s=arrive_s,
        first_s=first_s,
        finish_s=finish_s,
        replica=replica,
        input_tokens=workload.input_tokens,
        output_tokens=workload.output_tokens,
        work=work,
        tables=tables,
        replicas=config.replicas,
        devices=devices,
        idle_w_per_device=idle_w_per_device,
        peak_flops_per_s=peak_flops_per_s,
        memory_bandwidth_bytes_per_s=memory_bandwidth_bytes_per_s,
        usd_per_hour=usd_per_hour,
        slo=slo,
        timeline=np.concatenate(points) if points else np.zeros((0, 5)),
    )
