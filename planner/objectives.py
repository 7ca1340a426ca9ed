"""What "better" means: objectives as numbers to minimise, and SLOs as distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ObjectiveInfo:
    """One objective: the metric it reads, its percentile, its direction and how it is shown."""

    name: str
    metric: str
    statistic: str  # "" for plain numbers
    maximise: bool
    unit: str
    words: str


OBJECTIVES: dict[str, ObjectiveInfo] = {
    item.name: item
    for item in (
        ObjectiveInfo("latency", "e2e_s", "mean", False, "s", "mean end-to-end latency"),
        ObjectiveInfo("ttft", "ttft_s", "p95", False, "s", "P95 time to first token"),
        ObjectiveInfo("tpot", "tpot_s", "p95", False, "s", "P95 time per output token"),
        ObjectiveInfo("throughput", "output_tokens_per_s", "", True, "tok/s", "output throughput"),
        ObjectiveInfo("energy", "energy_j_per_output_token", "", False, "J/tok", "energy per output token"),
        ObjectiveInfo("memory", "memory_bytes", "", False, "B", "device memory in use at peak, all devices"),
        ObjectiveInfo(
            "cost", "usd_per_million_output_tokens", "", False, "USD/Mtok", "cost per output token"
        ),
    )
}


def objective_value(name: str, metrics: Mapping[str, Any]) -> float:
    """The objective of a plan as a number to minimise (throughput negated).

    A statistic that does not exist (TPOT when every answer is one token) is 0 for every plan alike.
    """
    info = OBJECTIVES[name]
    value = metrics[info.metric]
    if info.statistic:
        value = value[info.statistic]
    number = 0.0 if value is None else float(value)
    return -number if info.maximise else number


def objective_vector(objectives: Sequence[str], metrics: Mapping[str, Any]) -> FloatArray:
    """[m] values to minimise, in the order of the request's objectives."""
    return np.array([objective_value(name, metrics) for name in objectives], dtype=np.float64)


def bound_vector(
    objectives: Sequence[str], bounds: Mapping[str, float], output_tokens: float, memory_bytes: float
) -> FloatArray:
    """[m] optimistic values of the same objectives, from `bounds.metric_bounds`."""
    values = {
        "latency": bounds.get("e2e_s.mean", 0.0),
        "ttft": bounds.get("ttft_s.p95", 0.0),
        "tpot": bounds["tpot_s"],
        "throughput": -bounds["output_tokens_per_s"],
        "energy": bounds["energy_j"] / output_tokens,
        "memory": memory_bytes,
        "cost": bounds["usd_per_million_output_tokens"],
    }
    return np.array([values[name] for name in objectives], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class SloMiss:
    """One SLO that a plan misses: by how much, as value / bound - 1."""

    metric: str
    statistic: str
    bound_s: float
    value_s: float

    @property
    def distance(self) -> float:
        """value / bound - 1."""
        return self.value_s / self.bound_s - 1.0

    def words(self) -> str:
        """`ttft_s p95 1.42 s, 42 % above 1 s`."""
        return (
            f"{self.metric} {self.statistic} {self.value_s:.3g} s, "
            f"{100 * self.distance:.0f} % above {self.bound_s:g} s"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the result."""
        return {
            "metric": self.metric,
            "statistic": self.statistic,
            "bound_s": self.bound_s,
            "value_s": self.value_s,
            "distance": self.distance,
        }


def slo_misses(slo: Mapping[str, Mapping[str, float]], metrics: Mapping[str, Any]) -> list[SloMiss]:
    """Every bound that the metrics exceed, worst first."""
    misses = []
    for metric, bounds in slo.items():
        for statistic, bound in bounds.items():
            value = metrics[metric].get(statistic)
            if value is not None and value > bound:
                misses.append(SloMiss(metric, statistic, bound, float(value)))
    return sorted(misses, key=lambda miss: -miss.distance)


def slo_distance_bound(slo: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]) -> float:
    """The least worst-case SLO distance a plan can have, by its bounds; <= 0 when all may hold."""
    worst = -1.0
    for metric, limits in slo.items():
        for statistic, bound in limits.items():
            least = bounds["tpot_s"] if metric == "tpot_s" else bounds.get(f"{metric}.{statistic}", 0.0)
            worst = max(worst, least / bound - 1.0)
    return worst
