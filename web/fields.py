"""From a request back to the form's fields; what the form has no field for is kept as `rest`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from planner.workload import PRESETS
from web.forms import (
    DEFAULTS,
    FULL_CLOCK,
    MAX_POOLS,
    OBJECTIVE_NAMES,
    POOL_DEFAULTS,
    SLO_FIELDS,
    SPACE,
    STATISTICS,
    Form,
)
from web.labels import SERVING
from web.view import request_yaml

#: Fields that stand ready when traffic is of another kind.
_SHAPE = ("process", "shape_rate", "in_kind", "in_mean", "in_cv", "out_kind", "out_mean", "out_cv")
_LENGTH_FIELDS = {
    "constant": {"value"},
    "uniform": {"low", "high"},
    "lognormal": {"mean", "cv", "max"},
}
_ARRIVAL_FIELDS = {
    "poisson": {"rate_rps": "shape_rate"},
    "constant": {"rate_rps": "shape_rate"},
    "gamma": {"rate_rps": "shape_rate", "cv": "arrivals_cv"},
    "burst": {"rate_rps": "shape_rate", "size": "burst_size"},
    "closed": {"concurrency": "concurrency"},
}


def fields_of(data: Any, label: str = "", notes: str = "") -> Form:
    """A form that says the same as a request (any plain value; never raises)."""
    form = Form(values=dict.fromkeys(DEFAULTS, ""), pools=[], objectives=())
    for name in ("engine", "traffic", "preset", "method", *_SHAPE):
        form.values[name] = DEFAULTS[name]
    for _, stat, _ in SLO_FIELDS.values():
        form.values[stat] = "p95"
    form.values["label"], form.values["notes"] = label, notes
    if not isinstance(data, Mapping):
        return form
    left: dict[str, Any] = copy.deepcopy(dict(data))
    left.pop("schema_version", None)
    form.values["model"] = _taken_text(left, "model")
    _engine(form, left)
    _cluster(form, left)
    _workload(form, left)
    _slo(form, left)
    objectives = left.get("objectives")
    if isinstance(objectives, (list, tuple)) and all(name in OBJECTIVE_NAMES for name in objectives):
        form.objectives = tuple(left.pop("objectives"))
    elif objectives is None:
        form.objectives = ("latency", "energy", "memory")  # the request's own default
    _space(form, left)
    search = left.get("search")
    if isinstance(search, dict):
        for key, name in (("method", "method"), ("budget_s", "budget_s"), ("seed", "search_seed")):
            if _plain(search.get(key)):
                form.values[name] = text(search.pop(key))
    if form.values["search_seed"] == "0":
        form.values["search_seed"] = ""
    rest = _without_empty(left)
    form.values["rest"] = request_yaml(rest) if rest else ""
    return form


def rest_paths(data: Any, path: str = "") -> list[str]:
    """The dotted paths of the leaves of a mapping, a model's config left aside: the form tells of it."""
    if isinstance(data, Mapping) and data:
        return [
            found
            for key, value in data.items()
            if path or key != "config"
            for found in rest_paths(value, f"{path}.{key}" if path else str(key))
        ]
    return [path] if path else []


def text(value: Any) -> str:
    """A plain value as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value)


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _taken_text(mapping: dict[str, Any], key: str) -> str:
    return text(mapping.pop(key)) if _plain(mapping.get(key)) else ""


def _without_empty(value: Any) -> Any:
    if isinstance(value, Mapping):
        found = {key: _without_empty(inner) for key, inner in value.items()}
        return {key: inner for key, inner in found.items() if inner is not None and inner != {}}
    return value


def _engine(form: Form, left: dict[str, Any]) -> None:
    engine = left.get("engine")
    if isinstance(engine, dict):
        form.values["engine"] = _taken_text(engine, "name") or form.values["engine"]
        form.values["engine_version"] = _taken_text(engine, "version")


def _cluster(form: Form, left: dict[str, Any]) -> None:
    cluster = left.get("cluster")
    if not isinstance(cluster, dict):
        return
    pools = cluster.get("pools")
    known = {"name", "device", "nodes", "devices_per_node"}
    if (
        isinstance(pools, (list, tuple))
        and 0 < len(pools) <= MAX_POOLS
        and all(
            isinstance(pool, dict)
            and set(pool) <= known
            and all(_plain(value) for value in pool.values())
            and "device" in pool
            for pool in pools
        )
    ):
        cluster.pop("pools")
        prices = left.get("prices")
        for index, pool in enumerate(pools):
            found = dict.fromkeys(POOL_DEFAULTS, "")
            found["pool"] = text(pool.get("name", "main" if index == 0 else f"pool{index + 1}"))
            for name in ("device", "nodes", "devices_per_node"):
                found[name] = text(pool.get(name, ""))
            if isinstance(prices, dict) and _plain(prices.get(pool["device"])):
                found["price"] = text(prices[pool["device"]])
            form.pools.append(found)
        if isinstance(prices, dict):
            for pool in pools:
                if _plain(prices.get(pool["device"])):
                    prices.pop(pool["device"])
    network = cluster.get("inter_node")
    if isinstance(network, dict):
        form.values["inter_node"] = _taken_text(network, "kind")


def _workload(form: Form, left: dict[str, Any]) -> None:
    workload = left.get("workload")
    if not isinstance(workload, dict):
        return
    trace, synthetic = workload.get("trace"), workload.get("synthetic")
    if isinstance(trace, dict):
        form.values["traffic"] = "trace"
        for key, name in (("path", "trace"), ("rate_scale", "rate_scale"), ("limit", "trace_limit")):
            form.values[name] = _taken_text(trace, key)
        for key, default in (("format", "auto"), ("on_bad_row", "refuse")):
            if trace.get(key) == default:
                trace.pop(key)
        if form.values["rate_scale"] in ("1", "1.0"):
            form.values["rate_scale"] = ""
        return
    if not isinstance(synthetic, dict):
        return
    form.values["requests"] = _taken_text(synthetic, "requests")
    form.values["seed"] = _taken_text(synthetic, "seed")
    if form.values["seed"] == "0":
        form.values["seed"] = ""
    asked = synthetic.get("preset")
    preset = PRESETS.get(asked) if isinstance(asked, str) else None
    if asked is not None and set(synthetic) <= {"preset", "arrivals"} and _only_rate(synthetic, preset):
        form.values["preset"] = text(synthetic.pop("preset"))
        arrivals = synthetic.pop("arrivals", None)
        form.values["rate"] = text(arrivals["rate_rps"]) if arrivals else ""
        return
    form.values["traffic"] = "shape"
    for name in _SHAPE:
        form.values[name] = DEFAULTS[name] if name in ("process", "in_kind", "out_kind") else ""
    if preset is not None:
        # The form shows what the preset stands for, and the request says the same without it.
        synthetic.pop("preset")
        for key, value in preset.items():
            if key not in ("words", "source"):
                synthetic.setdefault(key, copy.deepcopy(value))
    _arrivals(form, synthetic)
    for key, side in (("input_tokens", "in"), ("output_tokens", "out")):
        _lengths(form, synthetic, key, side)
    prefix, turns = synthetic.get("shared_prefix"), synthetic.get("turns")
    if isinstance(prefix, dict):
        form.values["prefix_tokens"] = _taken_text(prefix, "tokens")
        form.values["prefix_groups"] = _taken_text(prefix, "groups")
    if isinstance(turns, dict):
        form.values["turns"] = _taken_text(turns, "mean")
        form.values["think_s"] = _taken_text(turns, "think_time_s")
        if form.values["turns"] in ("1", "1.0") and form.values["think_s"] in ("", "0", "0.0"):
            form.values["turns"] = form.values["think_s"] = ""


def _only_rate(synthetic: Mapping[str, Any], preset: Mapping[str, Any] | None) -> bool:
    """The arrivals are the preset's own, but for their rate."""
    arrivals = synthetic.get("arrivals")
    if arrivals is None:
        return True
    if preset is None or not isinstance(arrivals, dict) or not _plain(arrivals.get("rate_rps")):
        return False
    return {**arrivals, "rate_rps": 0} == {**preset["arrivals"], "rate_rps": 0}


def _arrivals(form: Form, synthetic: dict[str, Any]) -> None:
    arrivals = synthetic.get("arrivals")
    if not isinstance(arrivals, dict):
        return
    names = _ARRIVAL_FIELDS.get(str(arrivals.get("process")))
    if names is None or not set(arrivals) <= {"process", *names}:
        return
    form.values["process"] = arrivals.pop("process")
    for key, name in names.items():
        form.values[name] = _taken_text(arrivals, key)


def _lengths(form: Form, synthetic: dict[str, Any], key: str, side: str) -> None:
    lengths = synthetic.get(key)
    if not isinstance(lengths, dict):
        return
    names = _LENGTH_FIELDS.get(str(lengths.get("distribution")))
    if names is None or not set(lengths) <= {"distribution", *names}:
        return
    form.values[f"{side}_kind"] = lengths.pop("distribution")
    for name in names:
        form.values[f"{side}_{name}"] = _taken_text(lengths, name)


def _slo(form: Form, left: dict[str, Any]) -> None:
    slo = left.get("slo")
    if not isinstance(slo, dict):
        return
    for metric, (name, stat, per_second) in SLO_FIELDS.items():
        bounds = slo.get(metric)
        if not isinstance(bounds, dict):
            continue
        # One bound has a field; others of the same metric stay in the rest.
        chosen = next((key for key in ("p95", *STATISTICS) if key in bounds), None)
        if chosen is not None and isinstance(bounds[chosen], (int, float)):
            form.values[name] = text(float(f"{bounds.pop(chosen) * per_second:.12g}"))
            form.values[stat] = chosen


def _space(form: Form, left: dict[str, Any]) -> None:
    space = left.get("space")
    if not isinstance(space, dict):
        return
    for name, (_, kind) in SPACE.items():
        values = space.get(name)
        if not isinstance(values, (list, tuple)):
            continue
        if kind == "choice" and not all(isinstance(v, str) and v in SERVING for v in values):
            continue  # there is no box to tick for it
        if kind == "clock" and all(v is None or isinstance(v, (int, float)) for v in values):
            # Hertz in a request, megahertz on a page, as the tools that lock clocks have them.
            values = [FULL_CLOCK if v is None else float(f"{v / 1e6:.12g}") for v in values]
        if all(isinstance(v, (str, int, float)) for v in values):
            form.space[name] = ", ".join(text(value) for value in values)
            del space[name]
