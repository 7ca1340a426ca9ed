"""One disaggregated plan, judged: both kinds of workers, and the way of the KV cache between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from costmodels import AtClock, Collective
from costmodels.ops import FloatArray
from hardware import CommGroup
from planner.evaluate import Evaluation, Evaluator
from planner.given import PlanProblem
from planner.memory import MemoryPlan, kv_footprint
from planner.objectives import bound_vector
from planner.pairs import PairPoint, Point, check
from planner.plans import PlanPoint
from planner.reuse import Runs
from planner.simulator import (
    PairResult,
    Prompts,
    Stage,
    prompts_of,
    simulate_pair,
    simulate_prompts,
)
from planner.workload import Workload

#: First stages that are remembered: so many times of requests in all, but no fewer of them than this.
_KEPT_TIMES, _LEAST_KEPT = 2_000_000, 8


class Handover(NamedTuple):
    """Seconds [N] that each request's KV cache takes from a prefill worker to a decode worker, with what the
    decode worker's front end adds to that; `source` of the time of a transfer.

    `moved_s` [N], `mean_s` and `min_s`: the same of requests that have to go there, 0 for the others.
    `number` tells the ways of one evaluator apart.
    """

    number: int
    seconds: FloatArray
    source: Mapping[str, str]
    moved_s: FloatArray
    mean_s: float
    min_s: float


class PairEvaluator:
    """Judges disaggregated plans of one request. Not thread-safe while it builds tables.

    `decode` judges decode workers on the whole requests, `prefill` prefill workers on requests with one
    output token each; bounds of decode workers count what comes after the prompts. All share their tables.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.decode = evaluator
        self.prefill = _like(evaluator, prompts_of(evaluator.workload))
        self._decoding = _like(evaluator, evaluator.workload, brought=True)
        self.workload, self.slo, self.engine = evaluator.workload, evaluator.slo, evaluator.engine
        self._links: dict[tuple[str, str, int], CommGroup] = {}
        self._handovers: dict[tuple[Any, ...], Handover] = {}
        # Of a pair's two halves each is that of many pairs.
        self._unfit: dict[tuple[Any, ...], PlanProblem | None] = {}
        self._reasons: dict[tuple[int, PlanPoint], str | None] = {}
        self._halves: dict[tuple[int, PlanPoint, frozenset[str] | None], dict[str, float]] = {}
        self._least: dict[tuple[int, PlanPoint], float] = {}
        self._ways: dict[tuple[int, float], tuple[float, float]] = {}
        self._outputs = float(self.workload.output_tokens.sum())
        self._prompts: dict[tuple[Any, ...], Prompts] = {}
        self._runs = Runs(self.workload)

    def parts(self, point: PairPoint) -> tuple[tuple[Evaluator, PlanPoint], tuple[Evaluator, PlanPoint]]:
        """Who judges which workers."""
        return (self.prefill, point.prefill), (self.decode, point.decode)

    # --- gates ------------------------------------------------------------------------------

    def reject(self, point: PairPoint) -> str | None:
        """Why the plan cannot serve this workload at all, or None."""
        problem = self._problem(point)
        if problem is not None:
            return problem.reason
        return self._refused(0, point.prefill) or self._refused(1, point.decode)

    def sift(
        self, firsts: Sequence[PlanPoint], seconds: Sequence[PlanPoint]
    ) -> tuple[list[PairPoint], list[tuple[PairPoint, str, int]]]:
        """What `reject` lets pass of all pairs of one layout's halves, and of the others an example for each
        reason with their number: most pairs of a large space are refused for one of their halves."""
        passed: list[PairPoint] = []
        refused: dict[str, tuple[PairPoint, int]] = {}
        problems: dict[bool, str | None] = {}
        for first in firsts:
            cached = first.prefix_caching
            if cached not in problems:
                problem = self._problem(PairPoint(first, seconds[0]))
                problems[cached] = problem.reason if problem else None
            whole = problems[cached] or self._refused(0, first)
            for second in seconds:
                reason = whole or self._refused(1, second)
                if reason is None:
                    passed.append(PairPoint(first, second))
                elif reason in refused:
                    refused[reason] = refused[reason][0], refused[reason][1] + 1
                else:
                    refused[reason] = PairPoint(first, second), 1
        return passed, [(point, reason, count) for reason, (point, count) in refused.items()]

    def _refused(self, which: int, own: PlanPoint) -> str | None:
        """Why workers of one kind cannot serve, or None."""
        key = (which, own)
        if key not in self._reasons:
            if which == 0:
                reason = self.prefill.reject(own)
            else:
                # What it must compute again after a preemption goes in chunks, however long it is.
                reason = self.decode.reject(replace(own, chunked_prefill=True))
            self._reasons[key] = f"{('prefill', 'decode')[which]} workers: {reason}" if reason else None
        return self._reasons[key]

    def _problem(self, point: PairPoint) -> PlanProblem | None:
        """`check`, once for all plans that differ in their batching alone."""
        key = tuple(
            (
                part.pool, part.replicas, part.tensor, part.pipeline, part.expert, part.attention_data,
                part.weights, part.activations, part.kv_cache, part.prefix_caching, part.gpu_clock_hz,
            )
            for part in (point.prefill, point.decode)
        )  # fmt: skip
        if key not in self._unfit:
            self._unfit[key] = check(point, self.decode.spec, self.decode.cluster, self.engine)
        return self._unfit[key]

    def memory(self, point: PairPoint) -> tuple[MemoryPlan, MemoryPlan]:
        """Memory of one prefill worker and of one decode worker."""
        return self.prefill.memory(point.prefill), self.decode.memory(point.decode)

    # --- costs ------------------------------------------------------------------------------

    def handover(self, point: PairPoint) -> Handover:
        """How long each request's KV cache is on its way (see the module `planner.simulator.pair`).

        Ranks of both workers exchange their parts at the same time, so the end with more bytes on one device
        decides; the way is that between the plan's first and its last device.
        """
        first, second = point.prefill, point.decode
        spec, cluster = self.decode.spec, self.decode.cluster
        last = (first.devices if first.pool == second.pool else 0) + second.devices - 1
        ends = (first.pool, second.pool, last)
        group = self._links.get(ends)
        if group is None:
            group = self._links[ends] = cluster.point_to_point(first.pool, 0, second.pool, last)
        key = (first.pool, first.tensor, first.pipeline, second.pool, second.tensor, second.pipeline,
               first.kv_cache, first.gpu_clock_hz, group)  # fmt: skip
        if key not in self._handovers:
            tokens = self.workload.input_tokens.astype(np.float64)
            most = np.zeros(len(tokens))
            for part in (first, second):
                held = kv_footprint(spec, part.kv_cache, part.degrees)
                own = held.full_bytes_per_token * tokens + held.state_bytes_per_sequence
                own += held.windowed_bytes_per_token * np.minimum(tokens, held.window_tokens)
                most = np.maximum(most, own)
            device = cluster.pool(first.pool).device
            model = self.decode.model
            if first.gpu_clock_hz is not None:
                model = AtClock(model, first.gpu_clock_hz)
            found = model.predict(Collective("point_to_point", most, group), device)
            seconds = np.array(found.time_s, dtype=np.float64)
            if self.engine.handed_over == "after":
                seconds += self.engine.request_s + self.engine.request_per_token_s * tokens
            source = {
                "operator": "kv_transfer",
                "device": device.name,
                "kind": found.kind,
                "source": found.source,
            }
            # An answer of one token may end where its prompt was computed.
            moved = np.where(self.workload.output_tokens > 1, seconds, 0.0)
            way = Handover(
                len(self._handovers), seconds, source, moved, float(moved.mean()), float(moved.min())
            )
            self._handovers[key] = way
        return self._handovers[key]

    # --- judging ----------------------------------------------------------------------------

    def price(self, point: PairPoint) -> float:
        """USD per hour of all devices of the plan."""
        return sum(part.price(own) for part, own in self.parts(point))

    def stages(self, point: PairPoint, time_factors: tuple[float, float] = (1.0, 1.0)) -> tuple[Stage, Stage]:
        """Both kinds of workers as the simulator takes them, their steps slower by factors."""
        first = self.prefill.stage(point.prefill, time_factors[0])
        second = self.decode.stage(point.decode, time_factors[1])
        return first, replace(second, config=replace(second.config, brought=self.engine.brought))

    def run(
        self, point: PairPoint, *, time_factors: tuple[float, float] = (1.0, 1.0)
    ) -> tuple[PairResult, tuple[MemoryPlan, MemoryPlan]]:
        """Simulate the whole workload on a plan that `reject` lets pass."""
        seconds = self.handover(point).seconds
        result = simulate_pair(self.workload, *self.stages(point, time_factors), seconds, slo=self.slo)
        return result, self.memory(point)

    def evaluate(self, point: PairPoint, *, interval: bool = True) -> Evaluation:
        """Metrics, memory and 90 % interval of a plan that `reject` lets pass."""
        memory = self.memory(point)
        found, peaks = self._simulated(point)
        metrics = self.decode.at_the_meter(found)
        metrics["memory_bytes"] = sum(
            part.used_bytes(own, held, peak)
            for (part, own), held, peak in zip(self.parts(point), memory, peaks, strict=True)
        )
        breakdown = metrics.pop("breakdown_s")
        evaluation = Evaluation(point, metrics, memory[1], breakdown, {}, memory[0])
        return self.with_interval(evaluation) if interval else evaluation

    def _simulated(self, point: PairPoint) -> tuple[dict[str, Any], tuple[int, int]]:
        """(metrics, most KV blocks in use of a worker of each kind) of a plan.

        Where requests come by themselves, prefill workers run once for all pairs that have them, and decode
        workers behind equal ones once for all limits that do not bind.
        """
        stages = self.stages(point)
        way = self.handover(point)
        if not self.workload.by_themselves:
            result = simulate_pair(self.workload, *stages, way.seconds, slo=self.slo)
            return result.metrics(), (result.prefill.peak_kv_blocks, result.decode.peak_kv_blocks)
        key = (self.prefill.shape_key(point.prefill), stages[0].config)
        prompts = self._prompts.get(key)
        if prompts is None:
            prompts = simulate_prompts(self.workload, stages[0])
            prompts.result.forget_batches()
            while len(self._prompts) >= max(_LEAST_KEPT, _KEPT_TIMES // len(self.workload)):
                del self._prompts[next(iter(self._prompts))]
            self._prompts[key] = prompts
        peak = prompts.result.peak_kv_blocks
        shape = (key, way.number, self.decode.shape_key(point.decode))
        known = self._runs.find(shape, stages[1].config)
        if known is not None:
            return dict(known[0]), (peak, known[1])
        result = simulate_pair(self.workload, *stages, way.seconds, slo=self.slo, prompts=prompts)
        metrics = result.metrics()
        self._runs.add(shape, stages[1].config, result.decode, metrics)
        return dict(metrics), (peak, result.decode.peak_kv_blocks)

    def with_interval(self, evaluation: Evaluation) -> Evaluation:
        """The same evaluation with its 90 % interval (see `Evaluator.interval`)."""
        point = both_workers(evaluation.point)
        factors = zip(*(part.tables(own).interval_factor for part, own in self.parts(point)), strict=True)
        ends = [
            self.decode.at_the_meter(self.run(point, time_factors=(one, two))[0].metrics())
            for one, two in factors
        ]
        return replace(evaluation, interval=self.decode.interval(evaluation.metrics, ends))

    def recalled(self, point: Point, metrics: dict[str, Any], breakdown_s: dict[str, float]) -> Evaluation:
        """What `evaluate` gave for a plan before, without interval."""
        memory = self.memory(both_workers(point))
        return Evaluation(point, metrics, memory[1], breakdown_s, {}, memory[0])

    def provenance(self, point: Point) -> Sequence[Mapping[str, str]]:
        """Where the costs of a plan's operators, and of its transfers, come from."""
        pair = both_workers(point)
        rows = [row for part, own in self.parts(pair) for row in part.tables(own).provenance]
        return [*rows, self.handover(pair).source]

    @property
    def reused(self) -> int:
        """Plans whose decode workers were not simulated, as their limits do not bind."""
        return self._runs.reused

    # --- bounds -----------------------------------------------------------------------------

    def bounds(self, point: PairPoint, wanted: frozenset[str] | None = None) -> dict[str, float]:
        """Admissible bounds on the plan's metrics.

        Prompts: what bounds say of prefill workers alone (see `planner.bounds`), and the least hand-over.
        Every token after the first takes a decode step, the cheapest there is; all of them together take the
        decode workers at their best rate, from the first arrival on. Energy is idle power over the makespan,
        and the least work of both kinds of workers.
        """
        first, second = self._half(point, 0, wanted), self._half(point, 1, wanted)
        step_s, way = second["tpot_s"], self.handover(point)
        rest_mean_s, rest_min_s = self._after_prompts(way, step_s)
        found = {"tpot_s": step_s}
        for name, value in first.items():
            mean = name.endswith("mean")
            if name.startswith("ttft_s."):
                found[name] = value + (way.mean_s if mean else way.min_s)
            if name.startswith("e2e_s."):
                found[name] = max(value + (rest_mean_s if mean else rest_min_s), second[name])
        makespan = max(first["makespan_s"] + rest_min_s, second["makespan_s"])
        energy_j = (first["idle_w"] + second["idle_w"]) * makespan + first["dynamic_j"] + second["dynamic_j"]
        outputs = self._outputs
        return found | {
            "makespan_s": makespan,
            "energy_j": energy_j * self.decode.site.pue,
            "output_tokens_per_s": outputs / makespan if makespan > 0 else float("inf"),
            "usd_per_million_output_tokens": (first["usd_per_hour"] + second["usd_per_hour"])
            * (makespan / 3600.0 / outputs * 1e6),
        }

    def _half(self, point: PairPoint, which: int, wanted: frozenset[str] | None) -> dict[str, float]:
        """Bounds of one kind of workers, and what it draws idle, needs above that, and costs."""
        judge, own = ((self.prefill, point.prefill), (self._decoding, point.decode))[which]
        key = (which, own, wanted)
        found = self._halves.get(key)
        if found is None:
            idle_w = judge.cluster.pool(own.pool).device.idle_w + judge.site.host_w_per_device
            found = self._halves[key] = judge.bounds(own, wanted) | {
                "idle_w": idle_w * own.devices,
                "dynamic_j": judge.dynamic_bound_j(own, wanted),
                "usd_per_hour": judge.price(own),
            }
        return found

    def _after_prompts(self, way: Handover, step_s: float) -> tuple[float, float]:
        """(mean, least) s of requests from their prompt's end to their last token, a step a token."""
        key = (way.number, step_s)
        if key not in self._ways:
            rest = way.moved_s + (self.workload.output_tokens - 1) * step_s
            self._ways[key] = float(rest.mean()), float(rest.min())
        return self._ways[key]

    def wanted(self, objectives: tuple[str, ...]) -> frozenset[str]:
        """The statistics that these objectives and the SLO read."""
        return self.decode.wanted(objectives)

    def bound_vector(self, point: PairPoint, objectives: tuple[str, ...], bounds: Mapping[str, float]) -> Any:
        """[m] optimistic objective values of a plan."""
        least = 0.0
        for which, (part, own) in enumerate(self.parts(point)):
            key = (which, own)
            if key not in self._least:
                self._least[key] = part.least_bytes(own)
            least += self._least[key]
        return bound_vector(objectives, bounds, self._outputs, least)

    def bound_pieces(self, point: PairPoint, objectives: tuple[str, ...], vector: Any) -> Any:
        """[1, m] the bound itself: latency and energy are not traded."""
        return vector[None]


def _like(evaluator: Evaluator, workload: Workload, *, brought: bool = False) -> Evaluator:
    """The same judge of other requests, on the same tables, without SLO."""
    return Evaluator(
        evaluator.spec,
        evaluator.cluster,
        workload,
        evaluator.engine,
        evaluator.model,
        slo={},
        prices=evaluator.prices,
        site=evaluator.site,
        table_tokens=evaluator.table_tokens,
        table_seqs=evaluator.table_seqs,
        tables=evaluator.all_tables,
        brought=brought,
    )


def both_workers(point: Point) -> PairPoint:
    """A plan known to be disaggregated."""
    if not isinstance(point, PairPoint):
        raise TypeError("an aggregated plan is judged by planner.evaluate")
    return point
