"""A plan space and its judge made of numbers: what a searcher sees, without models or machines.

Objective values and bounds are drawn per plan from a seed; bounds are admissible by construction.
Few distinct values are drawn, so that ties and equal plans are common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner.evaluate import Evaluation
from planner.memory import MemoryPlan
from planner.models import Degrees
from planner.objectives import bound_vector, objective_vector
from planner.plans import Excluded, Layout, PlanPoint

MEMORY = MemoryPlan(
    weights_bytes=1e9,
    activations_bytes=1e9,
    runtime_bytes=1e9,
    kv_cache_bytes=1e9,
    capacity_bytes=8e9,
    kv_bytes_per_token=1e3,
    kv_tokens=1_000_000,
    memory_fraction=0.9,
    weights_by_component={"attention": 1e9},
)
_FORMATS = ("bf16", "bf16", "bf16")
_OUTPUT_TOKENS = 100.0


class FakeSpace:
    """`groups` layouts of `each` plans; the first `excluded` ones cannot be built at all."""

    def __init__(self, groups: int, each: int, excluded: int = 0) -> None:
        self.each = each
        layouts = [Layout("main", index + 1, Degrees(1, 1, 1, 1, 1)) for index in range(groups)]
        self.groups = [(layout, _FORMATS) for layout in layouts[excluded:]]
        self.excluded = [
            Excluded(layout, _FORMATS, "tensor 3 does not divide 64 heads", each)
            for layout in layouts[:excluded]
        ]
        self._size = groups * each

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[PlanPoint]:
        for layout, formats in self.groups:
            yield from self.points(layout, formats)

    def points(self, layout: Layout, formats: tuple[str, str, str]) -> Iterator[PlanPoint]:
        """The plans of a layout: they differ in their sequence cap."""
        for index in range(self.each):
            yield PlanPoint(
                layout.pool, layout.replicas, 1, 1, 1, 1, *formats, index + 1, 8192, True, True, 0.9, False
            )


@dataclass
class FakeEvaluator:
    """Draws every plan's metrics; `slack` is how far bounds lie below them, `calls` who was simulated."""

    seed: int
    levels: int = 6
    slack: float = 0.5
    misfits: float = 0.2
    slo: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calls: list[PlanPoint] = field(default_factory=list)

    def _rng(self, point: PlanPoint) -> np.random.Generator:
        return np.random.default_rng((self.seed, point.replicas, point.max_num_seqs))

    def metrics(self, point: PlanPoint) -> dict[str, Any]:
        """Every metric that an objective or an SLO reads."""
        rng = self._rng(point)
        value = rng.integers(1, self.levels + 1, 7).astype(float)
        names = ("mean", "p50", "p90", "p95", "p99")
        return {
            "ttft_s": dict.fromkeys(names, value[0]),
            "tpot_s": dict.fromkeys(names, value[1]),
            "itl_s": dict.fromkeys(names, value[1]),
            "e2e_s": dict.fromkeys(names, value[2]),
            "output_tokens_per_s": value[3],
            "energy_j_per_output_token": value[4],
            "memory_bytes": value[5] * 1e9,
            "usd_per_million_output_tokens": value[6],
        }

    def reject(self, point: PlanPoint) -> str | None:
        """Some plans do not fit."""
        return "weights need 2.0 GB of 1.0 GB usable per device" if self._misfit(point) else None

    def _misfit(self, point: PlanPoint) -> bool:
        return bool(self._rng(point).spawn(1)[0].random() < self.misfits)

    def memory(self, point: PlanPoint) -> MemoryPlan:
        """The same for all."""
        return MEMORY

    def recalled(self, point: Any, metrics: dict[str, Any], breakdown_s: dict[str, float]) -> Evaluation:
        """As an evaluator gives it back."""
        return Evaluation(point, metrics, self.memory(point), breakdown_s, {})

    def wanted(self, objectives: tuple[str, ...]) -> None:
        """All statistics."""

    def bound_pieces(self, point: PlanPoint, objectives: tuple[str, ...], vector: Any) -> Any:
        """The corner, or points between it and the truth of which one at least is no worse than the plan."""
        rng = self._rng(point).spawn(3)[2]
        if rng.random() < 0.5:
            return vector[None]
        truth = objective_vector(objectives, self.metrics(point))
        pieces = np.repeat(vector[None], 3, axis=0)
        pieces += rng.random(pieces.shape) * np.maximum(0.0, truth * 2 - vector)
        pieces[1] = np.minimum(pieces[1], truth)
        return pieces

    def bounds(self, point: PlanPoint, wanted: Any = None) -> dict[str, float]:
        """Metrics times a factor of at most one (throughput: at least one)."""
        metrics = self.metrics(point)
        factor = 1.0 - self.slack * self._rng(point).spawn(2)[1].random()
        return {
            "ttft_s.p95": metrics["ttft_s"]["p95"] * factor,
            "e2e_s.mean": metrics["e2e_s"]["mean"] * factor,
            "tpot_s": metrics["tpot_s"]["mean"] * factor,
            "output_tokens_per_s": metrics["output_tokens_per_s"] / factor,
            "energy_j": metrics["energy_j_per_output_token"] * _OUTPUT_TOKENS * factor,
            "memory_bytes": metrics["memory_bytes"] * factor,
            "usd_per_million_output_tokens": metrics["usd_per_million_output_tokens"] * factor,
        }

    def bound_vector(self, point: PlanPoint, objectives: tuple[str, ...], bounds: Mapping[str, float]) -> Any:
        """[m] optimistic objective values."""
        return bound_vector(objectives, bounds, _OUTPUT_TOKENS, bounds["memory_bytes"])

    def evaluate(self, point: PlanPoint, *, interval: bool = True) -> Evaluation:
        """The drawn metrics."""
        assert not self._misfit(point), "a plan that does not fit was simulated"
        self.calls.append(point)
        return Evaluation(point, self.metrics(point), MEMORY, {}, {})


class StepClock:
    """A clock that moves by `step_s` each time it is read."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now
