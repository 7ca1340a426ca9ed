"""Why a plan is recommended, how sure that is, and what would have to change where no plan will do.

All words come with numbers that the result itself holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from planner.evaluate import Evaluation
from planner.objectives import OBJECTIVES, objective_value
from planner.pareto import knee
from planner.search import Judged
from planner.workload.presets import preset

FloatArray = npt.NDArray[np.float64]

#: Regret within which a recommendation counts as no worse than the most robust plan.
_ROBUST = 0.02
#: Regret up to which a plan is called robust.
_CALM = 0.1


def recommend(
    front: Sequence[Judged], objectives: Sequence[str], *, certified: bool = True
) -> tuple[Judged, str]:
    """The plan to take and why: the knee of the front, or the nearest miss of the SLO.

    `certified` says whether the search looked at every plan; the words promise no more.

    The knee is the plan nearest to the ideal point when every objective is scaled to [0, 1]
    over the front. Raises ValueError for an empty front.
    """
    if not front:
        raise ValueError("an empty front has no recommendation")
    if not front[0].meets_slo:
        best = front[0]
        missed = "; ".join(miss.words() for miss in best.misses)
        none = "no plan meets" if certified else "the search ended before a plan was found that meets"
        return best, f"{none} the SLO; this one is nearest: {missed}"
    values = np.array([item.objectives for item in front])
    index = knee(values)
    chosen = front[index]
    if len(front) == 1:
        words = "none is better in any objective" if certified else "no simulated plan is better"
        return chosen, f"it is the only plan on the front: {words}"
    parts = []
    for column, name in enumerate(objectives):
        best = values[:, column].min()
        own = values[index, column]
        words = OBJECTIVES[name].words
        if own == best:
            parts.append(f"the best {words}")
        else:
            gap = abs(own - best) / max(abs(best), 1e-300)
            side = "below" if OBJECTIVES[name].maximise else "above"
            parts.append(
                f"{words} within 1 % of the best"
                if gap < 0.01
                else f"{words} {100 * gap:.0f} % {side} the best"
            )
    return chosen, f"the knee of a front of {len(front)}: it has " + ", ".join(parts)


def nearest_ways(entries: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Of simulated plans (entries of a result) that all miss the SLO, those that come nearest, nearest first.

    Of each way of cutting and storing the model only the one with the best batching: else its others would
    fill the list.
    """
    by_way: dict[str, Mapping[str, Any]] = {}
    for entry in sorted(entries, key=miss_distance):
        by_way.setdefault(json.dumps(_unbatched(entry["plan"]), sort_keys=True), entry)
    return list(by_way.values())[:most]


def miss_distance(entry: Mapping[str, Any]) -> float:
    """How far the bound that a plan misses most lies behind it, as a share of the bound; 0: it meets all."""
    return max((float(miss["distance"]) for miss in entry.get("slo_misses") or ()), default=0.0)


def _unbatched(plan: Any) -> Any:
    if not isinstance(plan, Mapping):
        return plan
    return {name: _unbatched(value) for name, value in plan.items() if name != "batching"}


# --- the knee --------------------------------------------------------------------------------------


def trade_offs(front: Sequence[Judged], objectives: Sequence[str], chosen: Judged) -> list[dict[str, Any]]:
    """For every objective that the chosen plan is not best in: the plan that is, and what it takes.

    `gain` and `price` are shares of the chosen plan's own value: so much better in `objective`, so much worse
    in the others.
    """
    rows = []
    for column, name in enumerate(objectives):
        best = min(front, key=lambda item: item.objectives[column])
        own, other = chosen.objectives[column], best.objectives[column]
        if best.point == chosen.point or own == other:
            continue
        price = {
            objectives[at]: _share(best.objectives[at], chosen.objectives[at])
            for at in range(len(objectives))
            if best.objectives[at] > chosen.objectives[at]
        }
        rows.append(
            {"objective": name, "plan_id": best.point.id, "gain": _share(own, other, own), "price": price}
        )
    return rows


def _share(worse: float, better: float, of: float | None = None) -> float:
    base = better if of is None else of
    return float(abs(worse - better) / max(abs(base), 1e-300))


# --- robustness ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Robustness:
    """How much a plan can turn out behind another when predictions are wrong within their 90 % interval.

    `regret` of each plan of the front, as a share of the way from the best to the worst of the front (0:
    never behind); `risks` are SLO bounds that a plan misses at the slow end of its interval.
    """

    regret: tuple[float, ...]
    risks: tuple[tuple[str, ...], ...]

    def words(self, index: int, labels: Sequence[str]) -> str:
        """What to say of the plan that is recommended."""
        own, least = self.regret[index], int(np.argmin(self.regret))
        risk = ""
        if self.risks[index]:
            risk = f"; at the slow end of its 90 % interval it misses {', '.join(self.risks[index])}"
        if len(self.regret) == 1:
            return risk.removeprefix("; ")
        if self.regret[least] > 1.0:
            # A share of so narrow a front says nothing but this.
            return (
                "the plans of the front differ by less than their 90 % intervals, so any of them may turn "
                f"out best{risk}"
            )
        if own <= self.regret[least] + _ROBUST:
            behind = f"at most {100 * own:.0f} % of the front's spread behind"
            name = "robust" if own <= _CALM else "no plan is more robust"
            return f"{name}: within the 90 % intervals it is {behind}{risk}"
        share = f"{100 * own:.0f} % of" if own <= 1.0 else "more than"
        return (
            f"within the 90 % intervals it may be {share} the front's spread behind, "
            f"{labels[least]} at most {100 * self.regret[least]:.0f} %{risk}"
        )


def robustness(
    front: Sequence[Judged],
    evaluations: Sequence[Evaluation],
    objectives: Sequence[str],
    slo: Mapping[str, Mapping[str, float]],
    plan_error: Mapping[str, tuple[float, float]] | None = None,
) -> Robustness:
    """Regret of every plan of a front whose `evaluations` have intervals.

    Scenarios: all machines as predicted, all at their fast end, all at their slow end, and, since errors
    differ between shapes, each plan alone at its slow end while the others are as predicted; alone it errs
    by no more than `plan_error`, as the rest of its interval is what all plans share. A plan's distance is
    that of the knee: to the ideal point of the scenario's front, objectives scaled alike.
    """
    ends = [_ends(item, objectives) for item in evaluations]
    low, mid, high = (np.array([row[at] for row in ends]) for at in range(3))
    base = mid.min(axis=0)
    span = np.where(mid.max(axis=0) > base, mid.max(axis=0) - base, np.maximum(np.abs(base), 1e-300))

    def distance(values: FloatArray) -> FloatArray:
        scaled = (values - values.min(axis=0)) / span
        return np.asarray(np.sqrt((scaled**2).mean(axis=1)), dtype=np.float64)

    # Behind the plan that is nearest when everything is as predicted, or all fast, or all slow.
    regret = np.zeros(len(front))
    for values in (low, mid, high):
        found = distance(values)
        regret = np.maximum(regret, found - found.min())
    slow = high
    if plan_error is not None:
        most = np.array([plan_error[_kind(OBJECTIVES[name].metric)][1] for name in objectives])
        slow = np.minimum(high, mid + np.abs(mid) * (most - 1.0))
    for index in range(len(front)):
        alone = mid.copy()
        alone[index] = slow[index]
        found = distance(alone)
        regret[index] = max(regret[index], float(found[index] - found.min()))
    return Robustness(
        tuple(float(value) for value in regret), tuple(_risks(item, slo) for item in evaluations)
    )


def too_close(plan_error: Mapping[str, tuple[float, float]], metric: str, one: float, two: float) -> bool:
    """Whether predictions of two plans for one model and its machines do not tell which has more of a metric.

    Each plan errs by itself within `plan_error` (90 %); their ratio, by both errors together.
    """
    if not (one > 0 and two > 0):
        return one == two
    low, high = plan_error[_kind(metric)]
    return abs(math.log(one / two)) <= math.hypot(math.log(low), math.log(high))


def _kind(metric: str) -> str:
    """Whose error a metric's is: first tokens are predicted worse than all that hangs on steps."""
    return "ttft" if metric == "ttft_s" else "tpot"


def _ends(evaluation: Evaluation, objectives: Sequence[str]) -> tuple[list[float], list[float], list[float]]:
    """(fast, predicted, slow) objective values, all to minimise."""
    rows: tuple[list[float], list[float], list[float]] = ([], [], [])
    for name in objectives:
        info, metrics = OBJECTIVES[name], evaluation.metrics
        own = objective_value(name, metrics)
        low = high = own
        if info.statistic and metrics[info.metric].get(info.statistic) is not None:
            low, high = evaluation.interval.get(info.metric, {}).get(info.statistic, (own, own))
        elif name in ("throughput", "cost", "energy"):
            source = "energy_j" if name == "energy" else "output_tokens_per_s"
            pair = evaluation.interval.get(source, {}).get("value")
            middle = metrics[source]
            if pair is not None and middle > 0 and min(pair) > 0:
                ratios = [value / middle for value in pair]
                if name == "cost":
                    ratios = [1.0 / value for value in ratios]
                low, high = min(own * r for r in ratios), max(own * r for r in ratios)
        for row, value in zip(rows, (low, own, high), strict=True):
            row.append(float(value))
    return rows


def _risks(evaluation: Evaluation, slo: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    found = []
    for metric, bounds in slo.items():
        for statistic, bound in bounds.items():
            pair = evaluation.interval.get(metric, {}).get(statistic)
            if pair is not None and pair[1] > bound:
                found.append(f"{metric} {statistic} ({pair[1]:.3g} s of {bound:g} s)")
    return tuple(found)


# --- what would have to change ----------------------------------------------------------------------

#: Formats that are tried where no plan will do, with fewer bytes first among equals in quality.
_FORMATS = ("fp8", "int8", "int4", "fp4")
_MOST_DEVICES = 8


def relaxed_slos(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """For every bound that is missed: how far it would have to be relaxed, alone, and all together.

    From simulated plans: `to` is what the best plan of those that miss nothing else reaches.
    """
    rows: list[dict[str, Any]] = []
    alone: dict[tuple[str, str], Judged] = {}
    for item in judged:
        if len(item.misses) == 1:
            key = (item.misses[0].metric, item.misses[0].statistic)
            if key not in alone or item.distance < alone[key].distance:
                alone[key] = item
    for (metric, statistic), item in sorted(alone.items(), key=lambda pair: pair[1].distance):
        miss = item.misses[0]
        limit = _up(miss.value_s)
        rows.append(
            {
                "kind": "slo",
                "change": {f"slo.{metric}.{statistic}": [miss.bound_s, limit]},
                "words": f"allow {limit:.3g} s for {metric} {statistic} in place of {miss.bound_s:g} s",
                "plan_id": item.point.id,
                "label": item.point.label(),
            }
        )
    missing = [item for item in judged if item.misses]
    if not rows and missing:
        item = min(missing, key=lambda one: (one.distance, one.objectives))
        change = {f"slo.{m.metric}.{m.statistic}": [m.bound_s, _up(m.value_s)] for m in item.misses}
        words = " and ".join(f"{_up(m.value_s):.3g} s for {m.metric} {m.statistic}" for m in item.misses)
        rows.append(
            {
                "kind": "slo",
                "change": change,
                "words": f"allow {words}",
                "plan_id": item.point.id,
                "label": item.point.label(),
            }
        )
    return rows


def _up(value: float) -> float:
    """Three digits, rounded up, so that the plan it comes from meets it."""
    rounded = float(f"{value:.3g}")
    return rounded if rounded >= value else float(f"{value * 1.005:.3g}")


class Variation(NamedTuple):
    """A request with one thing changed: that in `field`; of a `series` only the first that helps is told."""

    kind: str
    words: str
    request: dict[str, Any]
    field: str
    series: str


def variations(request: Mapping[str, Any], tried_weights: Sequence[str]) -> list[Variation]:
    """What might help beside a weaker SLO: formats, machines, less traffic."""
    rows: list[Variation] = []
    for name in _FORMATS:
        if name in tried_weights:
            continue
        other = deepcopy(dict(request))
        other["space"] = {**other.get("space", {}), "weights": [name]}
        other["space"].pop("activations", None)
        rows.append(Variation("quantization", f"{name} weights", other, "space", name))
    pools = request["cluster"]["pools"]
    for index, pool in enumerate(pools):
        nodes, each = pool.get("nodes"), pool.get("devices_per_node")
        if not nodes or not each:
            continue
        factor = 2
        while factor <= _MOST_DEVICES:
            other = deepcopy(dict(request))
            other["cluster"]["pools"][index]["nodes"] = nodes * factor
            if nodes * factor > 1 and not other["cluster"].get("inter_node"):
                other["cluster"]["inter_node"] = {"kind": "infiniband-400g"}
            words = f"{nodes * factor * each} devices of pool {pool['name']!r} in place of {nodes * each}"
            rows.append(Variation("devices", words, other, "cluster", f"pool {pool['name']}"))
            factor *= 2
    return rows + _less_traffic(request)


def _less_traffic(request: Mapping[str, Any]) -> list[Variation]:
    """Half of the traffic, a quarter and an eighth; none where arrivals have no rate to lower."""
    rows = []
    for share, words in ((0.5, "half"), (0.25, "a quarter"), (0.125, "an eighth")):
        other = deepcopy(dict(request))
        workload = other.get("workload") or {}
        trace, synthetic = workload.get("trace"), workload.get("synthetic")
        if trace is not None:
            trace["rate_scale"] = share * trace.get("rate_scale", 1.0)
        elif synthetic is not None:
            named = synthetic.get("preset")
            usual = preset(named, "workload.synthetic.preset") if named else {}
            arrivals = synthetic.get("arrivals") or usual.get("arrivals") or {}
            if not arrivals.get("rate_rps"):
                return []
            synthetic["arrivals"] = {**arrivals, "rate_rps": share * arrivals["rate_rps"]}
        else:
            return []
        rows.append(Variation("traffic", f"{words} of the traffic", other, "workload", "traffic"))
    return rows


def what_would_help(
    request: Mapping[str, Any],
    judged: Sequence[Judged],
    tried_weights: Sequence[str],
    plan: Callable[[dict[str, Any]], Any],
    enough: Callable[[], bool],
) -> list[dict[str, Any]]:
    """What would have to change so that a plan meets the SLO, each with the plan that then does.

    `plan` answers a changed request (a result, or None where it cannot be asked); `enough` ends the tries.
    Of more devices only the fewest that help are told, of less traffic the most.
    """
    rows = relaxed_slos(judged)
    done: set[str] = set()
    for kind, words, other, field, series in variations(request, tried_weights):
        if series in done:
            continue
        if enough():
            break
        result = plan(other)
        if result is None or result.status != "ok" or result.recommended is None:
            continue
        done.add(series)
        entry = result.plan(result.recommended.plan_id)
        rows.append(
            {
                "kind": kind,
                "change": {field: other[field]},
                "words": words,
                "plan": entry.plan,
                "metrics": entry.metrics,
            }
        )
    return rows
