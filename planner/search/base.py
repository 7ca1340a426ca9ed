"""The protocol every searcher keeps, and what it works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from planner.evaluate import Evaluation, Evaluator
from planner.objectives import SloMiss
from planner.pairs import Point
from planner.plans import PlanSpace
from planner.search.gap import Gap
from planner.workload import Workload


@dataclass(frozen=True, slots=True)
class Judged:
    """A simulated plan with its objective values (to minimise) and what it misses."""

    evaluation: Evaluation
    objectives: tuple[float, ...]
    misses: tuple[SloMiss, ...]

    @property
    def point(self) -> Point:
        """The plan."""
        return self.evaluation.point

    @property
    def meets_slo(self) -> bool:
        """No SLO is missed."""
        return not self.misses

    @property
    def distance(self) -> float:
        """Worst relative SLO miss; 0 when every bound holds."""
        return self.misses[0].distance if self.misses else 0.0


class Judging(Protocol):
    """Judges plans of one kind (see `Evaluator`, `PairEvaluator`)."""

    workload: Workload
    slo: dict[str, Mapping[str, float]]

    def reject(self, point: Any) -> str | None:
        """Why the plan cannot serve this workload at all, or None."""
        ...

    def wanted(self, objectives: tuple[str, ...]) -> frozenset[str]:
        """The statistics that these objectives and the SLO read."""
        ...

    def bounds(self, point: Any, wanted: frozenset[str] | None = None) -> dict[str, float]:
        """Admissible bounds on the plan's metrics."""
        ...

    def bound_vector(self, point: Any, objectives: tuple[str, ...], bounds: Mapping[str, float]) -> Any:
        """[m] optimistic objective values of a plan."""
        ...

    def bound_pieces(self, point: Any, objectives: tuple[str, ...], vector: Any) -> Any:
        """[k, m] points of which one at least is no worse than the plan."""
        ...

    def evaluate(self, point: Any, *, interval: bool = True) -> Evaluation:
        """Metrics and memory of a plan that `reject` lets pass."""
        ...

    def recalled(self, point: Point, metrics: dict[str, Any], breakdown_s: dict[str, float]) -> Evaluation:
        """What `evaluate` gave for a plan before, without interval."""
        ...


class Space(Protocol):
    """Plans of one kind in groups (see `PlanSpace`, `PairSpace`)."""

    groups: Any

    @property
    def excluded(self) -> Sequence[Any]:
        """What no plan can be, with reasons and counts (see `Excluded`)."""
        ...

    def points(self, layout: Any, formats: tuple[str, str, str]) -> Iterator[Any]:
        """The plans of a group."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Rejected:
    """Plans that were not simulated because they cannot serve the workload."""

    point: Point
    reason: str
    plans: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search stands. Counts are of plans; `phase` is a word for people."""

    phase: str
    space_size: int
    considered: int
    rejected: int
    bounded: int
    simulated: int
    front: int
    elapsed_s: float
    best: tuple[Judged, ...] = ()


class Left(NamedTuple):
    """What a search left open: optimistic points [k, m] of so many plans, and plans without any bound."""

    points: Any
    open_plans: int
    unbounded: int


@dataclass(slots=True)
class Outcome:
    """What a search found. `certified`: no plan of the space can add to the front."""

    method: str
    space_size: int
    judged: list[Judged]
    front: list[Judged]
    rejected: list[Rejected]
    bounded: int
    simulated: int
    certified: bool
    wall_s: float
    reason: str = ""
    #: What plans that were not looked at could still add; closed when certified.
    gap: Gap | None = None
    left: Left | None = None
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Support:
    """What a search may lean on; nothing of it changes what a finished search finds.

    `backend` says who evaluates (see `planner.search.pool`). `checkpoint` is called about every `every_s`
    seconds, and at the end, with what was simulated since the last call, as plain JSON values; a search that
    gets all of them as `resume` goes the same way again without simulating them anew, and on from where it
    was cut off. What came from `resume` is not handed over again.
    `race` orders plans by short runs first where the traffic is long enough (see `planner.search.race`).
    """

    backend: str = "auto"
    checkpoint: Callable[[dict[str, Any]], None] | None = None
    resume: Sequence[Mapping[str, Any]] = ()
    every_s: float = 5.0
    race: bool = True

    def marked(self, name: str, value: Any) -> Support:
        """The same for one search of several that share a checkpoint: its parts bear the mark."""
        save = self.checkpoint
        return replace(
            self,
            checkpoint=None if save is None else lambda part: save({**part, name: value}),
            resume=[part for part in self.resume if part.get(name) == value],
        )


class Cancelled(Exception):
    """The work was cancelled before there was anything to answer."""


ProgressCallback = Callable[[Progress], None]
Clock = Callable[[], float]


@runtime_checkable
class Searcher(Protocol):
    """Finds the Pareto front of a space.

    Contract, tested by `tests/planner/search/conformance.py`: the front holds no dominated
    plan, only plans that meet the SLO when any does, and is the same under the same seed;
    a search that runs out of its budget or is cancelled returns what it has, not certified.
    """

    name: str

    def search(
        self,
        evaluator: Evaluator,
        space: PlanSpace,
        objectives: Sequence[str],
        *,
        budget_s: float,
        seed: int,
        clock: Clock,
        progress: ProgressCallback | None = None,
        cancelled: Callable[[], bool] | None = None,
        workers: int = 1,
        support: Support | None = None,
    ) -> Outcome:
        """Search `space`; never raises for plans that cannot run, they are `rejected`."""
        ...
