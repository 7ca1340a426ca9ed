"""One plan, judged: memory gate, step tables, simulation, metrics.

An `Evaluator` holds what all plans of a request share (model, machines, workload, engine, cost
model) and the caches: step tables by layer shape, work bounds by shape. Plans that differ in
batching limits or replicas only share their tables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from costmodels import AtClock, CostModel, StepTables, compile_tables
from hardware import Cluster, InputError
from planner.bounds import STATISTICS, WorkBounds, WorkFacts, metric_bounds, work_bounds
from planner.engines import EngineProfile
from planner.given import check_plan
from planner.memory import MemoryPlan, plan_memory
from planner.models import ModelSpec, attention_cap_tokens, step_terms
from planner.objectives import OBJECTIVES, bound_vector
from planner.pairs import Point
from planner.plans import PlanPoint, PlanSpace, check_engine, half_format
from planner.request import Site
from planner.reuse import Runs
from planner.simulator import SchedulerConfig, SimulationResult, Stage, simulate
from planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A simulated plan: metrics in the contract's names, memory, interval, provenance."""

    point: Point
    metrics: dict[str, Any]
    memory: MemoryPlan
    breakdown_s: dict[str, float]
    interval: dict[str, dict[str, tuple[float, float]]]
    prefill_memory: MemoryPlan | None = None  # of a disaggregated plan; `memory` is its decode workers'

    def entry(self, meets_slo: bool, misses: list[dict[str, Any]]) -> dict[str, Any]:
        """One element of `plans` in the result."""
        found = {
            "id": self.point.id,
            "plan": self.point.to_dict(),
            "meets_slo": meets_slo,
            "slo_misses": misses,
            "metrics": self.metrics,
            "memory_bytes_per_device": self.memory.as_dict(),
            "interval": {
                metric: {name: list(pair) for name, pair in rows.items()}
                for metric, rows in self.interval.items()
            },
            "breakdown_s": self.breakdown_s,
        }
        if self.prefill_memory is not None:
            found["prefill_memory_bytes_per_device"] = self.prefill_memory.as_dict()
        return found


class Evaluator:
    """Judges plans of one request. Not thread-safe while it builds tables.

    `brought`: bounds leave the prompts out, which other workers compute.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        engine: EngineProfile,
        model: CostModel,
        *,
        slo: Mapping[str, Mapping[str, float]] | None = None,
        prices: Mapping[str, float] | None = None,
        site: Site | None = None,
        table_tokens: int = 0,
        table_seqs: int = 0,
        tables: dict[tuple[Any, ...], StepTables] | None = None,
        brought: bool = False,
    ) -> None:
        self.spec, self.cluster, self.workload = spec, cluster, workload
        self._brought = brought
        self.engine, self.model = engine, model
        self.slo = dict(slo or {})
        self.prices = dict(prices or {})
        self.site = site or Site()
        self.table_tokens, self.table_seqs = table_tokens, table_seqs
        self.all_tables: dict[tuple[Any, ...], StepTables] = {} if tables is None else tables
        self._bounds: dict[tuple[Any, ...], WorkBounds] = {}
        self._last_memory: tuple[PlanPoint, MemoryPlan] | None = None
        self._runs = Runs(workload)
        self._problems: dict[tuple[Any, ...], str | None] = {}
        self._facts: dict[frozenset[str] | None, WorkFacts] = {}
        self._memory: dict[tuple[Any, ...], MemoryPlan] = {}
        self._identity = {pool.name: self._digest(pool.name) for pool in cluster.pools}

    # --- what every plan shares -----------------------------------------------------------

    @cached_property
    def mean_sequence_tokens(self) -> float:
        """Mean KV length of a running request: its input and half of its output."""
        work = self.workload
        return float(np.mean(work.input_tokens + 0.5 * work.output_tokens))

    @cached_property
    def longest_sequence_tokens(self) -> int:
        """Input and output of the longest request."""
        return int((self.workload.input_tokens + self.workload.output_tokens).max())

    @cached_property
    def longest_input_tokens(self) -> int:
        """The longest prompt."""
        return int(self.workload.input_tokens.max())

    def _digest(self, pool: str) -> str:
        """What the tables of a pool depend on besides the plan, as one short key.

        Content, not names: two configs of one name, or a device that a user's catalog changes,
        must not share tables.
        """
        facts = (self.spec, self.engine, self.cluster.pool(pool), self.cluster.inter_node, self.model.name)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    # --- gates ------------------------------------------------------------------------------

    def memory(self, point: PlanPoint) -> MemoryPlan:
        """Memory of one worker of the plan, worked out once for plans that differ in nothing it reads."""
        last = self._last_memory
        if last is not None and last[0] is point:
            return last[1]
        key = (
            point.pool, point.tensor, point.pipeline, point.expert, point.attention_data, point.weights,
            point.kv_cache, point.max_num_seqs, point.max_num_batched_tokens, point.cuda_graphs,
            point.memory_fraction,
        )  # fmt: skip
        found = self._memory.get(key)
        if found is None:
            found = self._memory[key] = self._plan_memory(point)
        self._last_memory = point, found
        return found

    def _plan_memory(self, point: PlanPoint) -> MemoryPlan:
        return plan_memory(
            self.spec,
            self.cluster.pool(point.pool).device,
            self.engine,
            point.degrees,
            weights=point.weights,
            kv_cache=point.kv_cache,
            max_num_seqs=point.max_num_seqs,
            max_num_batched_tokens=point.max_num_batched_tokens,
            cuda_graphs=point.cuda_graphs,
            memory_fraction=point.memory_fraction,
            mean_sequence_tokens=self.mean_sequence_tokens,
            longest_sequence_tokens=self.longest_sequence_tokens,
        )

    def reject(self, point: PlanPoint) -> str | None:
        """Why the plan cannot serve this workload at all, or None."""
        built = (
            point.pool, point.replicas, point.tensor, point.pipeline, point.expert, point.attention_data,
            point.weights, point.activations, point.kv_cache, point.gpu_clock_hz,
        )  # fmt: skip
        if built not in self._problems:
            problem = check_plan(point, self.spec, self.cluster)
            self._problems[built] = problem.reason if problem else None
        if self._problems[built]:
            return self._problems[built]
        device = self.cluster.pool(point.pool).device
        unfit = check_engine(self.engine.engine, device, point.degrees)
        if unfit:
            return unfit
        limit = self.spec.max_context_tokens
        if limit and self.longest_sequence_tokens > limit:
            return (
                f"the longest request needs {self.longest_sequence_tokens} tokens of context, "
                f"{self.spec.name} holds {limit}"
            )
        if self.engine.policy == "mixed" and point.max_num_batched_tokens < point.max_num_seqs:
            return (
                f"max_num_batched_tokens {point.max_num_batched_tokens} is below max_num_seqs "
                f"{point.max_num_seqs}: a step could not hold one token of every sequence"
            )
        if not point.chunked_prefill and self.longest_input_tokens > point.max_num_batched_tokens:
            return (
                f"without chunked prefill the longest prompt ({self.longest_input_tokens} tokens) does "
                f"not fit in max_num_batched_tokens {point.max_num_batched_tokens}"
            )
        return self.memory(point).shortfall or None

    # --- costs ------------------------------------------------------------------------------

    def shape_key(self, point: PlanPoint) -> tuple[Any, ...]:
        """What the step tables of a plan depend on."""
        return (
            self._identity[point.pool], point.tensor, point.pipeline, point.expert, point.attention_data,
            point.weights, point.activations, point.kv_cache, point.gpu_clock_hz,
            point.cuda_graphs, self._sizes(point), _round_up(self.longest_sequence_tokens),
        )  # fmt: skip

    def _sizes(self, point: PlanPoint) -> tuple[int, int]:
        """(tokens, sequences) the tables of a plan must reach."""
        tokens = max(self.table_tokens, point.max_num_batched_tokens)
        sequences = max(self.table_seqs, point.max_num_seqs)
        return _round_up(tokens), max(1, min(sequences, _round_up(len(self.workload))))

    def tables(self, point: PlanPoint) -> StepTables:
        """Step tables of the plan's shape, compiled once."""
        key = self.shape_key(point)
        found = self.all_tables.get(key)
        if found is not None:
            return found
        pool = self.cluster.pool(point.pool)
        degrees = point.degrees
        stage = degrees.tensor * degrees.attention_data
        terms = step_terms(
            self.spec,
            degrees,
            weights=point.weights,
            activations=point.activations,
            kv_cache=point.kv_cache,
            tp_group=self.cluster.group(pool.name, degrees.tensor),
            ep_group=self.cluster.group(pool.name, stage),
            pp_group=self.cluster.group(pool.name, 2, stride=stage) if degrees.pipeline > 1 else None,
            device_half=half_format(pool.device),
        )
        tokens, sequences = self._sizes(point)
        host = self.engine.host_overhead(
            pool.device,
            degrees.tensor,
            max(self.table_seqs, point.max_num_seqs),
            cuda_graphs=point.cuda_graphs,
        )
        compiled = compile_tables(
            terms,
            pool.device,
            self.model if point.gpu_clock_hz is None else AtClock(self.model, point.gpu_clock_hz),
            pipeline=degrees.pipeline,
            attention_data=degrees.attention_data,
            max_slot_tokens=tokens,
            max_slot_sequences=sequences,
            max_context_tokens=_round_up(self.longest_sequence_tokens),
            cap_tokens=attention_cap_tokens(self.spec),
            host=host,
            devices_per_worker=point.worker_devices,
        )
        self.all_tables[key] = compiled
        return compiled

    # --- judging ----------------------------------------------------------------------------

    def price(self, point: PlanPoint) -> float:
        """USD per hour of all devices of the plan."""
        device = self.cluster.pool(point.pool).device
        return self.prices.get(device.name, device.usd_per_hour) * point.devices

    def scheduler(self, point: PlanPoint, memory: MemoryPlan) -> SchedulerConfig:
        """The plan's batching as the simulator takes it."""
        block = self.engine.block_tokens
        return SchedulerConfig(
            max_num_seqs=point.max_num_seqs,
            max_num_batched_tokens=point.max_num_batched_tokens,
            kv_blocks=memory.kv_tokens // block,
            block_tokens=block,
            policy=self.engine.policy,
            chunked_prefill=point.chunked_prefill,
            admission=self.engine.admission,
            watermark=self.engine.watermark,
            prefix_caching=point.prefix_caching,
            pipeline=point.pipeline,
            attention_data=point.attention_data,
            replicas=point.replicas,
            request_s=self.engine.request_s,
            request_per_token_s=self.engine.request_per_token_s,
        )

    def run(self, point: PlanPoint, *, time_factor: float = 1.0) -> tuple[SimulationResult, MemoryPlan]:
        """Simulate the whole workload on a plan that `reject` lets pass."""
        stage = self.stage(point, time_factor)
        result = simulate(self.workload, stage.tables, stage.config, **self.machines(point), slo=self.slo)
        return result, self.memory(point)

    def stage(self, point: PlanPoint, time_factor: float = 1.0) -> Stage:
        """The plan's workers as the simulator takes them, every step slower by a factor."""
        memory = self.memory(point)
        if memory.shortfall:
            raise InputError("plan", memory.shortfall)
        tables = self.tables(point)
        if time_factor != 1.0:
            tables = tables.scaled(time_factor)
        return Stage(tables, self.scheduler(point, memory), **self.machines(point))

    def machines(self, point: PlanPoint) -> dict[str, Any]:
        """What the simulator must know of a plan's devices beside their step tables."""
        device = self.cluster.pool(point.pool).device
        peak_format = point.activations
        if peak_format not in device.peak_flops_per_s:
            peak_format = half_format(device)
        return {
            "devices": point.devices,
            "idle_w_per_device": device.idle_w,
            "peak_flops_per_s": device.peak_flops_per_s[peak_format],
            "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s,
            "usd_per_hour": self.price(point),
        }

    def evaluate(self, point: PlanPoint, *, interval: bool = True) -> Evaluation:
        """Metrics, memory and 90 % interval of a plan that `reject` lets pass."""
        memory = self.memory(point)
        known = None
        if not memory.shortfall:
            shape, config = self.shape_key(point), self.scheduler(point, memory)
            known = self._runs.find(shape, config)
        if known is None:
            result, memory = self.run(point)
            metrics, peak_blocks = result.metrics(), result.peak_kv_blocks
            self._runs.add(shape, config, result)
        else:
            metrics, peak_blocks = dict(known[0]), known[1]
        metrics = self.at_the_meter(metrics)
        metrics["memory_bytes"] = self.used_bytes(point, memory, peak_blocks)
        breakdown = metrics.pop("breakdown_s")
        found = Evaluation(point, metrics, memory, breakdown, {})
        return self.with_interval(found) if interval else found

    def at_the_meter(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics with energy and power of the hosts and of the site's cooling added."""
        if self.site == Site():
            return metrics
        before = metrics["energy_j"]
        host_j = self.site.host_w_per_device * metrics["devices"] * metrics["makespan_s"]
        factor = self.site.pue * (before + host_j) / before if before > 0 else 1.0
        names = ("energy_j", "energy_j_per_output_token", "power_w", "power_w_per_device")
        return metrics | {name: metrics[name] * factor for name in names}

    def used_bytes(self, point: PlanPoint, memory: MemoryPlan, peak_blocks: int) -> float:
        """Device memory in use at the peak, all devices, when a worker held so many KV blocks at once."""
        kv_used = peak_blocks * self.engine.block_tokens / max(1, point.attention_data)
        used = memory.weights_bytes + memory.activations_bytes + memory.runtime_bytes
        return (used + min(memory.kv_cache_bytes, kv_used * memory.kv_bytes_per_token)) * point.devices

    def with_interval(self, evaluation: Evaluation) -> Evaluation:
        """The same evaluation with its 90 % interval."""
        point = one_worker(evaluation.point)
        ends = [
            self.at_the_meter(self.run(point, time_factor=factor)[0].metrics())
            for factor in self.tables(point).interval_factor
        ]
        return replace(evaluation, interval=self.interval(evaluation.metrics, ends))

    def interval(
        self, metrics: Mapping[str, Any], ends: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, tuple[float, float]]]:
        """The 90 % interval of a plan's metrics from those on a faster and on a slower machine.

        Kernels' errors go through the simulation (the plan on a faster and on a slower machine, all operators
        off together: a device's kernels err alike). What whole runs were still off by, engine by engine, is
        independent of them: both spreads add as squares of logarithms.
        """
        tpot, ttft = self.engine.run_error["tpot"], self.engine.run_error["ttft"]
        rows: dict[str, dict[str, tuple[float, float]]] = {}
        for metric, error in (("ttft_s", ttft), ("tpot_s", tpot), ("itl_s", tpot), ("e2e_s", tpot)):
            rows[metric] = {
                name: _spread(value, ends[0][metric][name], ends[1][metric][name], error)
                for name, value in metrics[metric].items()
                if value is not None
            }
        slower = (1.0 / tpot[1], 1.0 / tpot[0])
        for metric, error in (("output_tokens_per_s", slower), ("energy_j", tpot)):
            found = _spread(metrics[metric], ends[0][metric], ends[1][metric], error)
            rows[metric] = {"value": found}
        if metrics["output_tokens_per_s"] > 0 and self._offered():
            # A server that keeps up puts out what is asked of it, however fast it is.
            rates = [end["output_tokens_per_s"] for end in ends]
            rows["output_tokens_per_s"] = {"value": _ordered(metrics["output_tokens_per_s"], *rates)}
        return rows

    def recalled(self, point: Point, metrics: dict[str, Any], breakdown_s: dict[str, float]) -> Evaluation:
        """What `evaluate` gave for a plan before, without interval."""
        return Evaluation(point, metrics, self.memory(one_worker(point)), breakdown_s, {})

    def provenance(self, point: Point) -> Sequence[Mapping[str, str]]:
        """Where the costs of a plan's operators come from."""
        return self.tables(one_worker(point)).provenance

    def _offered(self) -> bool:
        """Whether requests arrive on their own, not when others have ended."""
        return self.workload.concurrency == 0

    # --- bounds -----------------------------------------------------------------------------

    def bounds(self, point: PlanPoint, wanted: frozenset[str] | None = None) -> dict[str, float]:
        """Admissible bounds on the plan's metrics (see `planner.bounds`); `wanted` limits the statistics."""
        device = self.cluster.pool(point.pool).device
        found = metric_bounds(
            self._work(point, wanted),
            replicas=point.replicas,
            devices=point.devices,
            idle_w=device.idle_w + self.site.host_w_per_device,
            usd_per_hour=self.price(point),
        )
        found["energy_j"] *= self.site.pue
        return found

    def dynamic_bound_j(self, point: PlanPoint, wanted: frozenset[str] | None = None) -> float:
        """Joules above idle that the devices need at the least for all requests."""
        return self._work(point, wanted).dynamic_j

    def work_bound_s(self, point: PlanPoint) -> float:
        """Seconds that one worker needs at the least for all requests: no rate is above requests / this."""
        return max(self._work(point, None).work_s, 1e-12)

    def _work(self, point: PlanPoint, wanted: frozenset[str] | None) -> WorkBounds:
        memory = self.memory(point)
        at_once = min(point.max_num_seqs * point.attention_data, len(self.workload))
        room = at_once * (self.longest_sequence_tokens + self.engine.block_tokens)
        preemption = self.engine.admission == "on_demand" and memory.kv_tokens < room
        key = (
            *self.shape_key(point), point.prefix_caching, point.max_num_seqs, point.max_num_batched_tokens,
            preemption, wanted,
        )  # fmt: skip
        work = self._bounds.get(key)
        if work is None:
            facts = self._facts.get(wanted)
            if facts is None:
                facts = self._facts[wanted] = WorkFacts(
                    self.workload,
                    wanted=wanted,
                    request_s=self.engine.request_s,
                    request_per_token_s=self.engine.request_per_token_s,
                    brought=self._brought,
                )
            work = self._bounds[key] = work_bounds(
                facts,
                self.tables(point),
                prefix_caching=point.prefix_caching,
                max_num_seqs=point.max_num_seqs,
                max_num_batched_tokens=point.max_num_batched_tokens,
                preemption=preemption,
            )
        return work

    def wanted(self, objectives: tuple[str, ...]) -> frozenset[str]:
        """The statistics that these objectives and the SLO read; what else bounds know is left out."""
        names = {f"{metric}.{statistic}" for metric, rows in self.slo.items() for statistic in rows}
        names |= {f"{OBJECTIVES[name].metric}.{OBJECTIVES[name].statistic}" for name in objectives}
        return frozenset(names & set(STATISTICS))

    def bound_vector(self, point: PlanPoint, objectives: tuple[str, ...], bounds: Mapping[str, float]) -> Any:
        """[m] optimistic objective values of a plan."""
        return bound_vector(
            objectives, bounds, float(self.workload.output_tokens.sum()), self.least_bytes(point)
        )

    def least_bytes(self, point: PlanPoint) -> float:
        """Device memory in use at the peak, all devices, at the least."""
        memory = self.memory(point)
        least = memory.weights_bytes + memory.activations_bytes + memory.runtime_bytes
        # The longest request alone holds so many blocks at its end.
        block = self.engine.block_tokens
        held = (self.longest_sequence_tokens - 2) // block * block / max(1, point.attention_data)
        least += min(memory.kv_cache_bytes, max(0.0, held) * memory.kv_bytes_per_token)
        return least * point.devices

    def bound_pieces(self, point: PlanPoint, objectives: tuple[str, ...], vector: Any) -> Any:
        """[k, m] points of which one at least is no worse than the plan; `vector` is their best corner.

        Where latency and energy are both asked for, they are traded (see `planner.bounds`).
        """
        if not {"latency", "energy"} <= set(objectives):
            return vector[None]
        latency, energy = objectives.index("latency"), objectives.index("energy")
        trade = self._work(point, self.wanted(objectives)).trade(float(vector[latency]))
        if len(trade) < 2:
            return vector[None]
        pieces = np.repeat(vector[None], len(trade), axis=0)
        above = (trade[:, 1] - trade[:, 1].min()) * self.site.pue / float(self.workload.output_tokens.sum())
        pieces[:, latency] = np.maximum(vector[latency], trade[:, 0])
        pieces[:, energy] = vector[energy] + above
        # Of rows at the same latency (overload raises it) the last has the least energy.
        last = np.append(pieces[1:, latency] > pieces[:-1, latency], True)
        return pieces[last]


def one_worker(point: Point) -> PlanPoint:
    """A plan known to be aggregated."""
    if not isinstance(point, PlanPoint):
        raise TypeError("a disaggregated plan is judged by planner.evaluate_pair")
    return point


def table_sizes(space: PlanSpace) -> tuple[int, int]:
    """(tokens, sequences) that tables shared by a whole space must reach."""
    tokens = seqs = 1
    for layout, _ in space.groups:
        for row in space.batching(space.cluster.pool(layout.pool), layout.degrees):
            seqs, tokens = max(seqs, row[0]), max(tokens, row[1])
    return tokens, seqs


def _spread(value: float, fast: float, slow: float, error: tuple[float, float]) -> tuple[float, float]:
    """(low, high) of a value from its two simulated ends and an independent error of the whole."""
    if not value > 0:
        return _ordered(value, fast, slow)
    ends = [max(end, 1e-12) for end in (min(value, fast, slow), max(value, fast, slow))]
    low = math.hypot(math.log(value / ends[0]), math.log(error[0]))
    high = math.hypot(math.log(ends[1] / value), math.log(error[1]))
    return value * math.exp(-low), value * math.exp(high)


def _ordered(value: float, *others: float) -> tuple[float, float]:
    """(low, high) of a value and its two ends; a faster machine may queue differently."""
    return min(value, *others), max(value, *others)


@lru_cache(maxsize=4096)
def _round_up(value: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, ... : few distinct table sizes, little waste."""
    power = 1
    while power < value:
        if power * 3 // 2 >= value and power >= 2:
            return power * 3 // 2
        power *= 2
    return power
