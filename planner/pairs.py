"""Disaggregated plans: prefill workers and decode workers, and the space of such pairs.

A `PairPoint` is a plan with every value of both kinds of workers stated. Both keep the cache in one format:
what one writes the other reads. Decode workers take whole caches over, so their prefix caching is off.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from hardware import Cluster, InputError, Pool
from planner.engines import EngineProfile
from planner.given import PlanProblem, check_plan, resolve_plan, resolve_worker
from planner.handover import Side, handover_problem
from planner.models import Degrees, ModelSpec, check_degrees
from planner.plans import (
    LARGE_POOL,
    Excluded,
    Layout,
    PlanPoint,
    PlanSpace,
    Row,
    Traits,
    check_clock,
    check_formats,
    id_of,
    label_of,
    point_of,
    worker_devices,
)
from planner.request import Plan, SpaceLimits

#: Workers of a kind in large pools: two to each doubling.
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class PairPoint:
    """A disaggregated plan: replicas of a prefill worker and of a decode worker."""

    prefill: PlanPoint
    decode: PlanPoint

    @property
    def devices(self) -> int:
        """Devices of all workers."""
        return self.prefill.devices + self.decode.devices

    @property
    def roles(self) -> tuple[tuple[str, PlanPoint], tuple[str, PlanPoint]]:
        """Both kinds of workers by their names."""
        return ("prefill", self.prefill), ("decode", self.decode)

    def to_dict(self) -> dict[str, Any]:
        """The plan in the contract's form, every field present."""
        return {
            "serving": "disaggregated",
            **{
                role: {"replicas": point.replicas, "worker": point.worker_dict()}
                for role, point in self.roles
            },
        }

    @property
    def id(self) -> str:
        """Twelve hex digits of the plan's own content."""
        return id_of(self.to_dict())

    def label(self) -> str:
        """`TP2 fp8 kv-fp8 b256/8192 prefill + 2x TP1 fp8 kv-fp8 b256/8192 decode`."""
        return label_of(self.to_dict())

    def traits(self) -> Traits:
        """What the plan is made of: both workers'."""
        return Traits(*(a + b for a, b in zip(self.prefill.traits(), self.decode.traits(), strict=True)))


Point: TypeAlias = PlanPoint | PairPoint


def parts_of(point: Point) -> tuple[PlanPoint, ...]:
    """The replicas of one worker, or of both kinds."""
    return (point.prefill, point.decode) if isinstance(point, PairPoint) else (point,)


def resolve(
    plan: Plan, spec: ModelSpec, cluster: Cluster, engine: EngineProfile, path: str = "plan"
) -> Point:
    """A plan of either kind, every value stated. Raises as `resolve_worker`, and for pairs that cannot be."""
    if plan.prefill is None or plan.decode is None:
        return resolve_plan(plan, spec, cluster, engine, path)
    found = {}
    for role, part in (("prefill", plan.prefill), ("decode", plan.decode)):
        worker, where = part.worker, f"{path}.{role}.worker"
        if role == "decode":
            if worker.prefix_caching:
                raise InputError(
                    f"{where}.prefix_caching",
                    "decode workers take whole caches over; prefixes are cached by prefill workers",
                )
            worker = worker.model_copy(update={"prefix_caching": False})
        found[role] = resolve_worker(worker, part.replicas, spec, cluster, engine, where)
    return PairPoint(found["prefill"], found["decode"])


def check(point: Point, spec: ModelSpec, cluster: Cluster, engine: EngineProfile) -> PlanProblem | None:
    """What makes a plan of either kind impossible on the cluster, before any memory is counted; or None."""
    if isinstance(point, PlanPoint):
        return check_plan(point, spec, cluster)
    for role, part in point.roles:
        problem = check_plan(part, spec, cluster)
        if problem is not None:
            return PlanProblem(f"{role}.{problem.field}", f"{role} workers: {problem.reason}")
    return check_pair(point, spec, cluster, engine)


def check_pair(
    point: PairPoint, spec: ModelSpec, cluster: Cluster, engine: EngineProfile
) -> PlanProblem | None:
    """What makes a pair impossible though each kind of worker is not."""
    first, second = point.prefill, point.decode
    sides = []
    for part in (first, second):
        device = cluster.pool(part.pool).device
        sides.append(
            Side(device.name, device.vendor, part.tensor, part.pipeline, part.kv_cache, part.prefix_caching)
        )
    problem = handover_problem(engine.engine, spec, *sides)
    if problem is not None:
        return problem
    if first.pool == second.pool:
        pool = cluster.pool(first.pool)
        if point.devices > pool.devices:
            return PlanProblem(
                "decode.replicas",
                f"the plan takes {point.devices} devices, pool {pool.name!r} has {pool.devices}",
            )
    return None


class PairLayout(NamedTuple):
    """How both kinds of workers are cut, where they stand, how many there are, and at which core clocks."""

    prefill: Layout
    decode: Layout


class PairSpace:
    """All disaggregated plans of a request, in a fixed order; of the shape of a `PlanSpace`.

    Both kinds of workers take the request's limits. Prefill workers differ in their token budget (and prefix
    caching), decode workers in their sequence cap; of everything else they have the engine's default.
    Pipelines are cut only where `space.pipeline` asks for it: they make a prompt's way longer, and
    decode workers have no prompts to fill them with.
    """

    def __init__(self, spec: ModelSpec, cluster: Cluster, engine: EngineProfile, limits: SpaceLimits) -> None:
        self.cluster = cluster
        self._one = PlanSpace(spec, cluster, engine, limits.model_copy(update={"replicas": None}))
        self.limits = limits
        self.groups: list[tuple[PairLayout, tuple[str, str, str]]] = []
        self._excluded: dict[str, Excluded] = {}
        self._size = 0
        pools = self._one.pools()
        for first in pools:
            for second in pools:
                self._add(spec, first, second)

    @property
    def excluded(self) -> list[Excluded]:
        """What is left out: for each reason one example, and how many plans it holds."""
        return list(self._excluded.values())

    def _add(self, spec: ModelSpec, first: Pool, second: Pool) -> None:
        shared = self._one.formats(second.device)
        formats = [
            (names, check_formats(first.device, *names) or check_formats(second.device, *names))
            for names in self._one.formats(first.device)
            if names in shared
        ]
        asked = self.limits.gpu_clock_hz or (None,)
        clocks = [
            ((one, two), check_clock(first.device, one) or check_clock(second.device, two))
            for one, two in itertools.product(asked, asked)
        ]
        cuts = [
            [
                (degrees, check_degrees(spec, degrees))
                for degrees in self._one.degrees(pool, pool.devices)
                if degrees.pipeline == 1 or self.limits.pipeline
            ]
            for pool in (first, second)
        ]
        for (here, unfit), (there, other) in itertools.product(*cuts):
            rows = len(self._prefills(first, here)) * len(self._decodes(second, there))
            for counts in self._counts(first, second, worker_devices(here), worker_devices(there)):
                for ((one, two), clash), (names, lacking) in itertools.product(clocks, formats):
                    layout = PairLayout(
                        Layout(first.name, counts[0], here, one), Layout(second.name, counts[1], there, two)
                    )
                    self._size += rows
                    reason = unfit or other or lacking or clash
                    if reason:
                        self._exclude(Excluded(layout, names, reason, rows))
                    else:
                        self.groups.append((layout, names))

    def _exclude(self, item: Excluded) -> None:
        known = self._excluded.get(item.reason)
        self._excluded[item.reason] = replace(known, plans=known.plans + item.plans) if known else item

    def _counts(self, first: Pool, second: Pool, here: int, there: int) -> Iterator[tuple[int, int]]:
        """Replicas of both kinds that the pools have devices for."""
        asked = self.limits.replicas
        for one in self._numbers(first, here, asked):
            room = second.devices - (one * here if first.name == second.name else 0)
            for two in self._numbers(second, there, asked):
                if two * there <= room:
                    yield one, two

    @staticmethod
    def _numbers(pool: Pool, worker: int, asked: tuple[int, ...] | None) -> list[int]:
        most = pool.devices // worker
        every = range(1, most + 1) if pool.devices < LARGE_POOL else _COUNTS
        return [count for count in (asked or every) if count <= most]

    def _prefills(self, pool: Pool, degrees: Degrees) -> list[Row]:
        """Batching of prefill workers: of equal budgets the engine's own sequence cap."""
        found: dict[Any, Row] = {}
        for row in self._one.batching(pool, degrees):
            found.setdefault(row[1:], row)
        return list(found.values())

    def _decodes(self, pool: Pool, degrees: Degrees) -> list[Row]:
        """Batching of decode workers: of equal sequence caps the first token budget, no prefix caching."""
        found: dict[Any, Row] = {}
        for seqs, tokens, chunked, graphs, fraction, _ in self._one.batching(pool, degrees):
            found.setdefault((seqs, graphs), (seqs, tokens, chunked, graphs, fraction, False))
        return list(found.values())

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[PairPoint]:
        for layout, formats in self.groups:
            yield from self.points(layout, formats)

    def batchings(self, layout: PairLayout) -> tuple[list[Row], list[Row]]:
        """How prefill workers and decode workers of a layout may batch."""
        first, second = layout
        return (
            self._prefills(self.cluster.pool(first.pool), first.degrees),
            self._decodes(self.cluster.pool(second.pool), second.degrees),
        )

    def halves(
        self, layout: PairLayout, formats: tuple[str, str, str]
    ) -> tuple[list[PlanPoint], list[PlanPoint]]:
        """Prefill workers and decode workers of a layout and its formats; its plans are their product."""
        firsts, seconds = self.batchings(layout)
        return (
            [point_of(layout.prefill, formats, row) for row in firsts],
            [point_of(layout.decode, formats, row) for row in seconds],
        )

    def points(self, layout: PairLayout, formats: tuple[str, str, str]) -> Iterator[PairPoint]:
        """The plans of one layout and its formats."""
        for first, second in itertools.product(*self.halves(layout, formats)):
            yield PairPoint(first, second)


def pair_sizes(space: PairSpace) -> tuple[int, int]:
    """(tokens, sequences) that tables shared by a whole space must reach."""
    tokens = seqs = 1
    for layout in {layout for layout, _ in space.groups}:
        for rows in space.batchings(layout):
            seqs = max(seqs, *(row[0] for row in rows))
            tokens = max(tokens, *(row[1] for row in rows))
    return tokens, seqs
