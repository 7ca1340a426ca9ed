"""The cheapest mix of replicas over an inventory, for several models and their traffic.

    plan_fleet(request) -> answer

Every way of serving one replica of a model on one pool is a column of an integer programme
(`planner.search.assignment`). What a column can serve is found by simulation: the highest rate at which the
whole workload, run faster or slower, still meets the SLO. Most columns are never simulated: an admissible
bound on their rate and the prices of the linear relaxation show that they cannot be part of a better answer
(reduced-cost fixing), so the answer is the optimum over all columns, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator

from hardware import InputError
from planner.evaluate import Evaluator, table_sizes
from planner.objectives import slo_distance_bound, slo_misses
from planner.pipeline import Planner, version
from planner.plans import PlanPoint, PlanSpace
from planner.request import (
    AmountOrZero,
    ClusterRequest,
    Engine,
    ModelConfig,
    PlanningRequest,
    SearchRequest,
    Slo,
    SpaceLimits,
    StrictModel,
    WorkloadRequest,
    input_error,
)
from planner.search import Cancelled, Support
from planner.search.assignment import Assignment, Column, Stock, assign, relaxation

#: A rate is known when the interval around it is this narrow.
_RATE_TOLERANCE = 0.02
#: Batching limits that a column tries unless the request says which.
_BUDGETS, _SEQUENCES = (8192, 2048), (256, 64)

Multiplier = Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False, strict=True)]


class FleetModel(StrictModel):
    """One model of the fleet. Its demand is the workload's own rate, or `rate_rps`."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    model: Annotated[str, Field(min_length=1, max_length=4096)]
    config: ModelConfig | None = None
    engine: Engine = Engine()
    workload: WorkloadRequest
    slo: Slo
    rate_rps: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False, strict=True)] | None = None
    space: SpaceLimits = SpaceLimits()

    @field_validator("slo")
    @classmethod
    def _some_slo(cls, value: Slo) -> Slo:
        if not value.bounds():
            raise ValueError("set at least one bound: it decides how much traffic a replica can take")
        return value


class Reserve(StrictModel):
    """What is kept back: whole nodes of every pool, a share of every rate, room to lose a node."""

    spare_nodes: Annotated[int, Field(ge=0, le=1_000_000, strict=True)] = 0
    headroom: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False, strict=True)] = 0.0
    survive_node_failure: Annotated[bool, Field(strict=True)] = False


class FleetRequest(StrictModel):
    """Several models with their traffic and targets, and the machines there are."""

    schema_version: Literal["1"] = "1"
    models: Annotated[tuple[FleetModel, ...], Field(min_length=1, max_length=64)]
    cluster: ClusterRequest
    objective: Literal["cost", "energy", "devices"] = "cost"
    reserve: Reserve = Reserve()
    #: Demand over the day as multiples of the rates, e.g. 24 values; one value: always the same.
    demand: Annotated[tuple[Multiplier, ...], Field(min_length=1, max_length=1000)] = (1.0,)
    search: SearchRequest = SearchRequest()
    prices: dict[str, AmountOrZero] = Field(default_factory=dict)

    @field_validator("models")
    @classmethod
    def _names_differ(cls, value: tuple[FleetModel, ...]) -> tuple[FleetModel, ...]:
        names = [item.name for item in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names must differ, {twice[0]!r} stands twice")
        return value


def parse_fleet(data: Any) -> FleetRequest:
    """A validated fleet request. Raises InputError."""
    if isinstance(data, FleetRequest):
        return data
    if not isinstance(data, Mapping):
        raise InputError("", "a fleet request is a mapping of fields")
    try:
        fleet = FleetRequest.model_validate(dict(data))
    except ValidationError as error:
        raise input_error(error, FleetRequest) from None
    for index, member in enumerate(fleet.models):
        path, space = f"models[{index}].space", member.space
        if space.replicas not in (None, (1,)):
            raise InputError(f"{path}.replicas", "a fleet chooses its replicas itself, leave this out")
        if "disaggregated" in (space.serving or ()):
            words = "a fleet is made of aggregated replicas; plan a model alone for others"
            raise InputError(f"{path}.serving", words)
    return fleet


@dataclass(slots=True, eq=False)
class _Choice:
    """One way to serve a replica. `most_rps` bounds what it can take; `rate_rps` is known once simulated."""

    model: int
    point: PlanPoint
    most_rps: float
    cost: float
    rate_rps: float | None = None
    metrics: dict[str, Any] | None = None

    def column(self) -> Column:
        rate = self.most_rps if self.rate_rps is None else self.rate_rps
        return Column(self.model, self.point.pool, self.point.devices, rate, self.cost)


class _Known:
    """Simulations by (model, plan, rate): those of an earlier run, and what is handed to the checkpoint."""

    def __init__(self, support: Support, clock: Callable[[], float]) -> None:
        self._support, self._clock = support, clock
        self._rows: dict[tuple[int, str, float], dict[str, Any] | None] = {}
        for part in support.resume:
            if part.get("kind") != "fleet":
                raise InputError("resume", f"it belongs to a {part.get('kind', 'search')}, not to a fleet")
            for row in part["rates"]:
                self._rows[(row["model"], row["id"], row["rate_rps"])] = row["metrics"]
        self._fresh: list[dict[str, Any]] = []
        self._saved_at = clock()

    def __contains__(self, key: tuple[int, str, float]) -> bool:
        return key in self._rows

    def __getitem__(self, key: tuple[int, str, float]) -> dict[str, Any] | None:
        return self._rows[key]

    def add(self, key: tuple[int, str, float], metrics: dict[str, Any] | None) -> None:
        self._rows[key] = metrics
        if self._support.checkpoint is None:
            return
        model, plan_id, rate_rps = key
        self._fresh.append({"model": model, "id": plan_id, "rate_rps": rate_rps, "metrics": metrics})
        if self._clock() - self._saved_at > self._support.every_s:
            self.save()

    def save(self) -> None:
        if self._support.checkpoint is not None and self._fresh:
            rates, self._fresh = self._fresh, []
            self._saved_at = self._clock()
            self._support.checkpoint({"schema_version": "1", "kind": "fleet", "rates": rates})


class _Member:
    """A model of the fleet with everything loaded."""

    def __init__(
        self, planner: Planner, request: FleetRequest, index: int, known: _Known | None = None
    ) -> None:
        self.index, self.known = index, known or _Known(Support(), time.monotonic)
        asked = request.models[index]
        path = f"models[{index}]"
        limits = asked.space.model_dump(exclude_none=True)
        limits.setdefault("max_num_batched_tokens", _BUDGETS)
        limits.setdefault("max_num_seqs", _SEQUENCES)
        limits["replicas"] = (1,)
        try:
            question = planner.load(
                PlanningRequest(
                    model=asked.model,
                    config=asked.config,
                    engine=asked.engine,
                    cluster=request.cluster,
                    workload=asked.workload,
                    slo=asked.slo,
                    space=SpaceLimits(**limits),
                    prices=request.prices,
                )
            )
        except InputError as error:
            shared = error.path.startswith(("cluster", "prices"))
            where = error.path if shared or not error.path else f"{path}.{error.path}"
            raise InputError(where, error.message, error.hint) from None
        self.name, self.slo = asked.name, asked.slo.bounds()
        self.workload = question.workload
        if self.workload.concurrency:
            raise InputError(f"{path}.workload", "a fleet needs traffic with a rate; a closed loop has none")
        self.span_s = float(self.workload.arrival_s.max() - self.workload.arrival_s.min())
        own = (len(self.workload) - 1) / self.span_s if self.span_s > 0 else 0.0
        self.rate_rps = asked.rate_rps or own
        if self.rate_rps <= 0 or own <= 0:
            raise InputError(f"{path}.workload", "its requests come all at once, so it has no rate")
        self.own_rps = own
        space = PlanSpace(question.spec, question.cluster, question.engine, question.request.space)
        tokens, sequences = table_sizes(space) if space.groups else (1, 1)
        self.evaluator = question.evaluator(table_tokens=tokens, table_seqs=sequences, tables=planner._tables)
        self.space, self.cluster, self.refused = space, question.cluster, dict[str, int]()

    def choices(self, index: int, objective: str) -> list[_Choice]:
        """All ways to serve a replica that may meet the SLO, cheapest form of each first."""
        found = []
        for item in self.space.excluded:
            self.refused[item.reason] = self.refused.get(item.reason, 0) + item.plans
        for point in self.space:
            reason = self.evaluator.reject(point)
            bounds = {} if reason else self.evaluator.bounds(point)
            if not reason and slo_distance_bound(self.slo, bounds) > 1e-9:
                reason = "misses the SLO even with a single request"
            if reason:
                self.refused[reason] = self.refused.get(reason, 0) + 1
                continue
            most = len(self.workload) / self.evaluator.work_bound_s(point)
            found.append(_Choice(index, point, most, self.cost(point, objective)))
        return found

    def cost(self, point: PlanPoint, objective: str) -> float:
        """Of one replica: USD an hour, watts (an upper bound: its devices at their limit), or devices."""
        if objective == "cost":
            return self.evaluator.price(point)
        if objective == "energy":
            return self.cluster.pool(point.pool).device.tdp_w * point.devices
        return float(point.devices)

    def measure(self, choice: _Choice, least_rps: float = 0.0) -> None:
        """The highest rate at which the workload meets the SLO on one replica; 0 when it never does.

        A column that only matters above `least_rps` is tried there first; when it fails, that is all that
        is found out: its bound comes down.
        """
        high = choice.most_rps
        trickle = min(high, self.rate_rps) / 64.0
        low = min(high, max(trickle, least_rps * (1.0 - 1e-9)))
        best = self._run(choice.point, low)
        if best is None:
            choice.most_rps = low
            if low <= trickle:
                choice.rate_rps = 0.0  # most that ever fail, fail at a trickle
            return
        while high / low > 1.0 + _RATE_TOLERANCE:
            rate = (low * high) ** 0.5
            metrics = self._run(choice.point, rate)
            if metrics is None:
                high = rate
            else:
                low, best = rate, metrics
        choice.rate_rps, choice.metrics = low, best

    def _run(self, point: PlanPoint, rate_rps: float) -> dict[str, Any] | None:
        """Metrics at a rate, or None when the SLO is missed or the replica falls behind."""
        key = (self.index, point.id, rate_rps)
        if key not in self.known:
            self.known.add(key, self._simulate(point, rate_rps))
        return self.known[key]

    def _simulate(self, point: PlanPoint, rate_rps: float) -> dict[str, Any] | None:
        factor = self.own_rps / rate_rps
        faster: Evaluator = copy(self.evaluator)
        faster.workload = replace(self.workload, arrival_s=self.workload.arrival_s * factor)
        result, _ = faster.run(point)
        metrics = result.metrics()
        # A backlog that only grows is hidden by a short trace: what is left at its end must be a tail.
        behind = metrics["makespan_s"] - self.span_s * factor
        if behind > 0.1 * self.span_s * factor + 2.0 * metrics["e2e_s"]["p99"]:
            return None
        return None if slo_misses(self.slo, metrics) else metrics


def plan_fleet(
    data: Any,
    *,
    planner: Planner | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    workers: int = 1,
    support: Support | None = None,
) -> dict[str, Any]:
    """The cheapest fleet for a request, as plain values. Raises InputError for input that cannot be used.

    `support` takes checkpoints and resumes from them. A fleet that is `cancelled` is the best of what was
    simulated by then, not certified; Cancelled is raised when that is none.

    `status` is `ok`, or `infeasible` with the reasons when the inventory cannot carry the demand. With
    demand over the day there is one assignment for each distinct multiple; `certified` says that each is
    optimal over all ways to serve, not only over those that were simulated.
    """
    request = parse_fleet(data)
    planner = planner or Planner()
    start = clock()
    known = _Known(support or Support(), clock)
    members = []
    for index in range(len(request.models)):
        _look(cancelled)
        members.append(_Member(planner, request, index, known))
    pools = members[0].cluster.pools
    stocks = {
        pool.name: Stock(max(0, pool.nodes - request.reserve.spare_nodes), pool.devices_per_node)
        for pool in pools
    }
    choices: list[_Choice] = []
    for index, member in enumerate(members):
        _look(cancelled)
        choices += member.choices(index, request.objective)
        if progress:
            progress(f"{member.name}: {sum(c.model == index for c in choices)} ways to serve a replica")
    deadline = start + request.search.budget_s
    periods: list[tuple[float, list[float], Assignment | None]] = []
    for multiple in sorted(set(request.demand), reverse=True):
        demand = [member.rate_rps * multiple * (1.0 + request.reserve.headroom) for member in members]
        solution = _solve(
            members, choices, demand, stocks, request, clock, deadline, progress, cancelled, workers
        )
        periods.append((multiple, demand, solution))
    known.save()
    answers = [
        _period(members, choices, stocks, pools, multiple, demand, solution)
        for multiple, demand, solution in periods
    ]
    feasible = all(solution is not None for _, _, solution in periods)
    certified = all(solution is None or solution.certified for _, _, solution in periods)
    return {
        "schema_version": "1",
        "request": request.model_dump(mode="json", exclude_none=True),
        "status": "ok" if feasible else "infeasible",
        "objective": request.objective,
        "periods": answers,
        "usd_per_day": _per_day(request.demand, answers, "usd_per_hour") if feasible else None,
        "rejected": [
            {"model": member.name, "reason": reason, "plans": plans}
            for member in members
            for reason, plans in sorted(member.refused.items(), key=lambda pair: -pair[1])[:5]
        ],
        "search": {
            "method": "cp-sat",
            "columns": len(choices),
            "simulated": sum(c.rate_rps is not None for c in choices),
            "certified": certified,
            "wall_s": clock() - start,
            "seed": request.search.seed,
        },
        "provenance": {"planfront": version(), "catalog": planner.catalog.version},
    }


def _look(cancelled: Callable[[], bool] | None) -> None:
    """Raises Cancelled when nobody waits for the answer any more."""
    if cancelled is not None and cancelled():
        raise Cancelled


def _solve(
    members: list[_Member],
    choices: list[_Choice],
    demand: list[float],
    stocks: Mapping[str, Stock],
    request: FleetRequest,
    clock: Callable[[], float],
    deadline: float,
    progress: Callable[[str], None] | None,
    cancelled: Callable[[], bool] | None,
    workers: int,
) -> Assignment | None:
    """Price, simulate, add: until no column that was not simulated could be part of a better answer."""
    while True:
        relaxed = relaxation([choice.column() for choice in choices], demand, stocks)
        if relaxed is None:
            return None  # not even with what every column could do at best
        best: Assignment | None = None
        open_ = [index for index, choice in enumerate(choices) if choice.rate_rps is None]
        wanted = [index for index in open_ if relaxed.counts[index] > 1e-9]
        if not wanted:
            # The relaxation stands on simulated columns alone, so its prices hold.
            best = _assign_known(choices, demand, stocks, request, max(1.0, deadline - clock()), workers)
            gap = float("inf") if best is None else best.cost - relaxed.cost + 1e-9 * abs(best.cost)
            wanted = sorted(
                (index for index in open_ if relaxed.reduced[index] <= gap),
                key=lambda index: (relaxed.reduced[index], index),
            )
            if progress and best is not None:
                progress(
                    f"{best.cost:.6g} found, {relaxed.cost:.6g} is the least possible, "
                    f"{len(wanted)} columns could still improve it"
                )
            if not wanted:
                return best
            # A share at a time: a better answer closes the gap for the rest.
            wanted = wanted[: max(8, len(wanted) // 4)]
        for index in wanted:
            stopped = cancelled is not None and cancelled()
            if stopped or clock() > deadline:
                found = best or _assign_known(choices, demand, stocks, request, 1.0, workers)
                if found is not None:
                    return replace(found, certified=False, bound=min(found.cost, relaxed.cost))
                if stopped:
                    raise Cancelled
                raise InputError(
                    "search.budget_s",
                    f"{request.search.budget_s:g} s were not enough to find any fleet, allow more",
                )
            choice = choices[index]
            least = 0.0
            if best is not None and relaxed.worth[choice.model] > 0:
                # Below this rate its reduced cost is above the gap.
                spare = best.cost - relaxed.cost + 1e-9 * abs(best.cost) - relaxed.reduced[index]
                least = choice.most_rps - spare / relaxed.worth[choice.model]
            members[choice.model].measure(choice, max(0.0, least))


def _assign_known(
    choices: list[_Choice],
    demand: list[float],
    stocks: Mapping[str, Stock],
    request: FleetRequest,
    budget_s: float,
    workers: int,
) -> Assignment | None:
    """The integer programme over the columns that were simulated; counts for all columns."""
    known = [index for index, choice in enumerate(choices) if choice.rate_rps]
    found = assign(
        [choices[index].column() for index in known],
        demand,
        stocks,
        failure=request.reserve.survive_node_failure,
        budget_s=budget_s,
        seed=request.search.seed,
        workers=workers,
    )
    if found is None:
        return None
    counts = [0] * len(choices)
    for index, count in zip(known, found.counts, strict=True):
        counts[index] = count
    return replace(found, counts=tuple(counts))


def _period(
    members: list[_Member],
    choices: list[_Choice],
    stocks: Mapping[str, Stock],
    pools: Any,
    multiple: float,
    demand: list[float],
    solution: Assignment | None,
) -> dict[str, Any]:
    """One assignment in plain values."""
    rows: list[dict[str, Any]] = []
    for choice, count in zip(choices, solution.counts if solution else (), strict=False):
        if not count:
            continue
        member, metrics = members[choice.model], choice.metrics or {}
        plan = replace(choice.point, replicas=count)
        rows.append(
            {
                "model": member.name,
                "pool": choice.point.pool,
                "replicas": count,
                "devices": plan.devices,
                "rate_rps_per_replica": choice.rate_rps,
                "plan_id": plan.id,
                "plan": plan.to_dict(),
                "usd_per_hour": member.evaluator.price(plan),
                "power_w": metrics.get("power_w", 0.0) * count,
                "metrics_at_rate": {
                    name: metrics.get(name) for name in ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")
                },
            }
        )
    served = [
        {
            "model": member.name,
            "demand_rps": need,
            "capacity_rps": sum(
                r["replicas"] * r["rate_rps_per_replica"] for r in rows if r["model"] == member.name
            ),
        }
        for member, need in zip(members, demand, strict=True)
    ]
    return {
        "demand": multiple,
        "status": "ok" if solution else "infeasible",
        "assignments": rows,
        "models": served,
        "pools": [
            {
                "name": pool.name,
                "device": pool.device.name,
                "devices": pool.devices,
                "devices_used": sum(r["devices"] for r in rows if r["pool"] == pool.name),
                "nodes": pool.nodes,
                "nodes_used": solution.nodes.get(pool.name, 0) if solution else 0,
                "nodes_usable": stocks[pool.name].nodes,
            }
            for pool in pools
        ],
        "usd_per_hour": float(sum(r["usd_per_hour"] for r in rows)) if solution else None,
        "power_w": float(sum(r["power_w"] for r in rows)) if solution else None,
        "objective_value": solution.cost if solution else None,
        "objective_bound": solution.bound if solution else None,
        "certified": bool(solution and solution.certified),
    }


def _per_day(demand: tuple[float, ...], answers: list[dict[str, Any]], name: str) -> float:
    """A rate per hour over a day whose periods are equally long."""
    by_multiple = {answer["demand"]: answer[name] for answer in answers}
    return float(np.mean([by_multiple[multiple] for multiple in demand]) * 24.0)
