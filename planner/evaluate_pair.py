"""One disaggregated plan, judged: both kinds of workers, and the way of the KV cache between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from costmodels import AtClock, Collective
from costmodels.ops import FloatArray
from hardware import InputError
from planner.evaluate import Evaluation, Evaluator
from planner.memory import MemoryPlan, kv_footprint
from planner.objectives import bound_vector
from planner.pairs import PairPoint, Point, check
from planner.plans import PlanPoint
from planner.simulator import PairResult, Stage, prompts_of, simulate_pair


class Handover(NamedTuple):
    """Seconds [N] that each request's KV cache takes from a prefill worker to a decode worker, with what the
    decode worker's front end adds to that; `source` of the time of a transfer."""

    seconds: FloatArray
    source: Mapping[str, str]


class PairEvaluator:
    """Judges disaggregated plans of one request. Not thread-safe while it builds tables.

    `decode` judges decode workers on the whole requests, `prefill` prefill workers on requests with one
    output token each; both share their tables.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.decode = evaluator
        self.prefill = Evaluator(
            evaluator.spec,
            evaluator.cluster,
            prompts_of(evaluator.workload),
            evaluator.engine,
            evaluator.model,
            slo={},
            prices=evaluator.prices,
            site=evaluator.site,
            table_tokens=evaluator.table_tokens,
            table_seqs=evaluator.table_seqs,
            tables=evaluator.all_tables,
        )
        self.workload, self.slo, self.engine = evaluator.workload, evaluator.slo, evaluator.engine
        self._handovers: dict[tuple[Any, ...], Handover] = {}

    def parts(self, point: PairPoint) -> tuple[tuple[Evaluator, PlanPoint], tuple[Evaluator, PlanPoint]]:
        """Who judges which workers."""
        return (self.prefill, point.prefill), (self.decode, point.decode)

    # --- gates ------------------------------------------------------------------------------

    def reject(self, point: PairPoint) -> str | None:
        """Why the plan cannot serve this workload at all, or None."""
        problem = check(point, self.decode.spec, self.decode.cluster, self.engine)
        if problem is not None:
            return problem.reason
        reason = self.prefill.reject(point.prefill)
        if reason:
            return f"prefill workers: {reason}"
        # What a decode worker must compute again after a preemption goes in chunks, however long it is.
        reason = self.decode.reject(replace(point.decode, chunked_prefill=True))
        return f"decode workers: {reason}" if reason else None

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
        key = (first.pool, first.tensor, first.pipeline, second.pool, second.tensor, second.pipeline,
               first.kv_cache, first.gpu_clock_hz, last)  # fmt: skip
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
            group = cluster.point_to_point(first.pool, 0, second.pool, last)
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
            self._handovers[key] = Handover(seconds, source)
        return self._handovers[key]

    # --- judging ----------------------------------------------------------------------------

    def price(self, point: PairPoint) -> float:
        """USD per hour of all devices of the plan."""
        return sum(part.price(own) for part, own in self.parts(point))

    def run(
        self, point: PairPoint, *, time_factors: tuple[float, float] = (1.0, 1.0)
    ) -> tuple[PairResult, tuple[MemoryPlan, MemoryPlan]]:
        """Simulate the whole workload on a plan that `reject` lets pass."""
        memory = self.memory(point)
        stages = []
        for (part, own), held, factor in zip(self.parts(point), memory, time_factors, strict=True):
            if held.shortfall:
                raise InputError("plan", held.shortfall)
            tables = part.tables(own)
            if factor != 1.0:
                tables = tables.scaled(factor)
            config = part.scheduler(own, held)
            if part is self.decode:
                config = replace(config, brought=self.engine.brought)
            stages.append(Stage(tables, config, **part.machines(own)))
        seconds = self.handover(point).seconds
        return simulate_pair(self.workload, stages[0], stages[1], seconds, slo=self.slo), memory

    def evaluate(self, point: PairPoint, *, interval: bool = True) -> Evaluation:
        """Metrics, memory and 90 % interval of a plan that `reject` lets pass."""
        result, memory = self.run(point)
        metrics = self.decode.at_the_meter(result.metrics())
        peaks = (result.prefill.peak_kv_blocks, result.decode.peak_kv_blocks)
        metrics["memory_bytes"] = sum(
            part.used_bytes(own, held, peak)
            for (part, own), held, peak in zip(self.parts(point), memory, peaks, strict=True)
        )
        breakdown = metrics.pop("breakdown_s")
        found = Evaluation(point, metrics, memory[1], breakdown, {}, memory[0])
        return self.with_interval(found) if interval else found

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

    # --- bounds -----------------------------------------------------------------------------

    def bounds(self, point: PairPoint, wanted: frozenset[str] | None = None) -> dict[str, float]:
        """Admissible bounds on the plan's metrics.

        Prompts: what bounds say of prefill workers alone (see `planner.bounds`), and the least hand-over.
        Every token after the first takes a decode step, the cheapest there is. Energy is idle power over the
        makespan, and the prompts' work; that of decoding is not counted.
        """
        first = self.prefill.bounds(point.prefill, wanted)
        step_s = self.decode.bounds(point.decode, frozenset())["tpot_s"]
        tokens = self.workload.output_tokens
        seconds = self.handover(point).seconds
        # An answer of one token may end where its prompt was computed.
        moved = np.where(tokens > 1, seconds, 0.0)
        later = (tokens - 1) * step_s
        found = {"tpot_s": step_s}
        for name, value in first.items():
            if name.startswith("ttft_s."):
                found[name] = value + float(moved.mean() if name.endswith("mean") else moved.min())
            if name.startswith("e2e_s."):
                rest = moved + later
                found[name] = value + float(rest.mean() if name.endswith("mean") else rest.min())
        makespan = first["makespan_s"] + float((moved + later).min())
        idle_w = sum(
            (own.cluster.pool(part.pool).device.idle_w + own.site.host_w_per_device) * part.devices
            for own, part in self.parts(point)
        )
        energy_j = idle_w * makespan + self.prefill.dynamic_bound_j(point.prefill, wanted)
        outputs = float(tokens.sum())
        return found | {
            "makespan_s": makespan,
            "energy_j": energy_j * self.decode.site.pue,
            "output_tokens_per_s": outputs / makespan if makespan > 0 else float("inf"),
            "usd_per_million_output_tokens": self.price(point) * makespan / 3600.0 / outputs * 1e6,
        }

    def wanted(self, objectives: tuple[str, ...]) -> frozenset[str]:
        """The statistics that these objectives and the SLO read."""
        return self.decode.wanted(objectives)

    def bound_vector(self, point: PairPoint, objectives: tuple[str, ...], bounds: Mapping[str, float]) -> Any:
        """[m] optimistic objective values of a plan."""
        least = sum(part.least_bytes(own) for part, own in self.parts(point))
        return bound_vector(objectives, bounds, float(self.workload.output_tokens.sum()), least)

    def bound_pieces(self, point: PairPoint, objectives: tuple[str, ...], vector: Any) -> Any:
        """[1, m] the bound itself: latency and energy are not traded."""
        return vector[None]


def both_workers(point: Point) -> PairPoint:
    """A plan known to be disaggregated."""
    if not isinstance(point, PairPoint):
        raise TypeError("an aggregated plan is judged by planner.evaluate")
    return point
