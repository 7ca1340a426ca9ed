"""The planning form: what was typed, kept as typed, and the request that it means.

Fields are text until here, so that a page can give back exactly what it was given. A request that cannot
be used comes back as sentences beside the fields they are about. `web.fields` is the way back, from a
request to the fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from hardware import InputError
from planner.request import Objective
from planner.workload import PRESETS
from web.labels import AGGREGATED, SERVING
from web.view import request_yaml
from web.yaml_text import read_yaml

OBJECTIVE_NAMES: tuple[str, ...] = Objective.__args__  # type: ignore[attr-defined]
MAX_FIELDS = 400
MAX_POOLS = 16
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
TRAFFIC = ("preset", "shape", "trace")

#: What a first click plans: a model, machines and traffic that fit each other.
DEFAULTS: dict[str, str] = {
    "model": "llama-3.1-8b",
    "engine": "vllm",
    "engine_version": "",
    "inter_node": "",
    "traffic": "preset",
    "preset": "chat",
    "rate": "8",
    "requests": "500",
    "seed": "",
    "process": "poisson",
    "shape_rate": "4",
    "arrivals_cv": "",
    "burst_size": "",
    "concurrency": "",
    "in_kind": "lognormal",
    "in_mean": "1024",
    "in_cv": "1",
    "in_low": "",
    "in_high": "",
    "in_value": "",
    "in_max": "",
    "out_kind": "lognormal",
    "out_mean": "256",
    "out_cv": "0.8",
    "out_low": "",
    "out_high": "",
    "out_value": "",
    "out_max": "",
    "prefix_tokens": "",
    "prefix_groups": "",
    "turns": "",
    "think_s": "",
    "trace": "",
    "rate_scale": "",
    "trace_limit": "",
    "ttft_ms": "500",
    "ttft_stat": "p95",
    "tpot_ms": "25",
    "tpot_stat": "p95",
    "itl_ms": "",
    "itl_stat": "p95",
    "e2e_s": "",
    "e2e_stat": "p95",
    "method": "auto",
    "budget_s": "20",
    "search_seed": "",
    "label": "",
    "notes": "",
    "rest": "",
}
POOL_DEFAULTS: dict[str, str] = {
    "pool": "main",
    "device": "h100-sxm-80gb",
    "nodes": "1",
    "devices_per_node": "4",
    "price": "",
}
DEFAULT_OBJECTIVES = ("latency", "energy", "cost")
#: What stands for an unlocked clock among megahertz.
FULL_CLOCK = "full"
#: Limits of the plan space: field -> (words, kind of its values).
SPACE: dict[str, tuple[str, str]] = {
    "replicas": ("Replicas", "whole"),
    "tensor": ("Tensor (TP)", "whole"),
    "pipeline": ("Pipeline (PP)", "whole"),
    "expert": ("Expert (EP)", "whole"),
    "attention_data": ("Attention data (ADP)", "whole"),
    "context": ("Context (CP)", "whole"),
    "pools": ("Pools", "text"),
    "weights": ("Weight formats", "text"),
    "activations": ("Activation formats", "text"),
    "kv_cache": ("KV cache formats", "text"),
    "max_num_seqs": ("Sequences at once", "whole"),
    "max_num_batched_tokens": ("Tokens in a batch", "whole"),
    "chunked_prefill": ("Chunked prefill", "flag"),
    "cuda_graphs": ("CUDA graphs", "flag"),
    "prefix_caching": ("Prefix caching", "flag"),
    "memory_fraction": ("Memory fraction", "number"),
    "gpu_clock_hz": ("GPU clocks (MHz)", "clock"),
    "serving": ("Ways to serve", "choice"),
}
#: Sent with the boxes of a choice, to tell none ticked from nothing said.
NO_TICK = "none"
#: SLO metric -> (field of its value, field of its statistic, how many of the field's unit are a second).
SLO_FIELDS = {
    "ttft_s": ("ttft_ms", "ttft_stat", 1000.0),
    "tpot_s": ("tpot_ms", "tpot_stat", 1000.0),
    "itl_s": ("itl_ms", "itl_stat", 1000.0),
    "e2e_s": ("e2e_s", "e2e_stat", 1.0),
}

#: Start of a problem's path -> the field beside which it is told; the first that fits.
_FIELD_OF: tuple[tuple[str, str], ...] = (
    ("model", "model"),
    ("engine.version", "engine_version"),
    ("engine", "engine"),
    ("cluster.inter_node", "inter_node"),
    ("cluster", "device"),
    ("prices", "price"),
    ("workload.trace.rate_scale", "rate_scale"),
    ("workload.trace.limit", "trace_limit"),
    ("workload.trace", "trace"),
    ("workload.synthetic.requests", "requests"),
    ("workload.synthetic.seed", "seed"),
    ("workload.synthetic.preset", "preset"),
    ("workload.synthetic.arrivals", "rate"),
    ("workload.synthetic.input_tokens", "in_kind"),
    ("workload.synthetic.output_tokens", "out_kind"),
    ("workload.synthetic.shared_prefix", "prefix_tokens"),
    ("workload.synthetic.turns", "turns"),
    ("workload", "preset"),
    ("slo.ttft_s", "ttft_ms"),
    ("slo.tpot_s", "tpot_ms"),
    ("slo.itl_s", "itl_ms"),
    ("slo.e2e_s", "e2e_s"),
    ("objectives", "objectives"),
    ("search.budget_s", "budget_s"),
    ("search.seed", "search_seed"),
    ("search", "method"),
    ("run.label", "label"),
    ("run.notes", "notes"),
)
_POOL_PATH = re.compile(r"cluster\.pools\[(\d+)\](?:\.(\w+))?")


@dataclass(slots=True)
class Form:
    """What stands in the form, and what is wrong with it."""

    values: dict[str, str] = field(default_factory=lambda: dict(DEFAULTS))
    pools: list[dict[str, str]] = field(default_factory=lambda: [dict(POOL_DEFAULTS)])
    space: dict[str, str] = field(default_factory=dict)
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    mode: str = "form"  # the button that was pressed: form | yaml | show | read | add-pool | drop-pool-N
    text: str = ""  # the YAML
    errors: dict[str, list[str]] = field(default_factory=dict)  # by field
    general: list[str] = field(default_factory=list)  # about no field of the form
    csrf: str = ""

    @property
    def failed(self) -> bool:
        """Something is wrong."""
        return bool(self.errors or self.general)

    @property
    def servings(self) -> list[str]:
        """The ways to serve that are ticked; the request's own default where nothing was said of them."""
        words = _words(self.space.get("serving", "")) or [AGGREGATED]
        return [name for name in SERVING if name in words]

    @property
    def limited(self) -> bool:
        """Whether a limit of the plan space is set that stands with the search."""
        return any(text for name, text in self.space.items() if name != "serving")

    def error(self, name: str, message: str) -> None:
        """Put a sentence beside a field, once."""
        if message not in self.errors.setdefault(name, []):
            self.errors[name].append(message)

    def add(self, path: str, message: str) -> None:
        """Put a problem beside its field; without a field of its own it is told at the top."""
        if self.mode == "yaml":
            self.error("yaml", f"{path}: {message}" if path else message)
            return
        name = self.field_of(path)
        if name:
            self.error(name, message)
        else:
            self.general.append(f"{path}: {message}" if path else message)

    def field_of(self, path: str) -> str:
        """The form's field that a problem's path is about; "" for none of them."""
        pool = _POOL_PATH.match(path)
        if pool is not None:
            name = {"name": "pool"}.get(pool[2] or "", pool[2] or "device")
            return pool_field(name if name in POOL_DEFAULTS else "device", int(pool[1]))
        if path.startswith("space."):
            name = re.split(r"[.\[]", path.removeprefix("space."))[0]
            return f"space_{name}" if name in SPACE else ""
        for start, name in _FIELD_OF:
            if path == start or path.startswith((f"{start}.", f"{start}[")):
                return self._shown(name)
        return ""

    def _shown(self, name: str) -> str:
        """The field of the shown kind of traffic."""
        kind = self.values["traffic"]
        if name == "rate" and kind == "shape":
            return "shape_rate"
        if name == "preset" and kind != "preset":
            return {"shape": "process", "trace": "trace"}[kind]
        return name


def pool_field(name: str, index: int) -> str:
    """The id of a field of a pool: the first pool's are plain, so that an address can fill them."""
    return name if index == 0 else f"{name}-{index + 1}"


def blank(query: Mapping[str, str] | None = None) -> Form:
    """The form with its defaults, and what the address names of it (`/?model=...&device=...`)."""
    form = Form()
    for name, value in (query or {}).items():
        if name in DEFAULTS:
            form.values[name] = value[:200]
        elif name in POOL_DEFAULTS:
            form.pools[0][name] = value[:200]
    if (query or {}).get("trace"):
        form.values["traffic"] = "trace"
    form.text = text_of(form)
    return form


def text_of(form: Form) -> str:
    """The YAML of what a form says, errors left aside."""
    probe = Form(
        values=dict(form.values),
        pools=[dict(pool) for pool in form.pools],
        space=dict(form.space),
        objectives=form.objectives,
    )
    data = request_of(probe)
    return request_yaml(json.loads(json.dumps(data))) if data is not None else form.text


def read_form(body: bytes) -> Form:
    """The form as it was sent (`application/x-www-form-urlencoded`). Raises InputError when it cannot be."""
    try:
        pairs = parse_qsl(
            body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"
        )
    except ValueError:  # not UTF-8, or more fields than the form has
        raise InputError("", "the form cannot be read") from None
    return form_of_pairs(pairs)


def form_of_pairs(pairs: Sequence[tuple[str, str]]) -> Form:
    """The form from what was sent."""
    sent = dict(pairs)
    form = Form(values={name: sent.get(name, "").strip() for name in DEFAULTS})
    for name in ("traffic", "engine", "method", "process", "in_kind", "out_kind"):
        form.values[name] = form.values[name] or DEFAULTS[name]
    for _, stat, _ in SLO_FIELDS.values():
        form.values[stat] = form.values[stat] or "p95"
    if form.values["traffic"] not in TRAFFIC:
        form.values["traffic"] = "preset"
    # Browsers send line ends as CR LF.
    form.values["notes"] = sent.get("notes", "").replace("\r\n", "\n")
    form.values["rest"] = sent.get("rest", "").replace("\r\n", "\n")
    columns = {name: [value.strip() for key, value in pairs if key == name] for name in POOL_DEFAULTS}
    count = max(len(column) for column in columns.values())
    form.pools = [
        {name: column[index] if index < len(column) else "" for name, column in columns.items()}
        for index in range(min(count, MAX_POOLS))
    ]
    form.space = {name: sent.get(f"space_{name}", "").strip() for name in SPACE}
    # A browser sends the boxes that are ticked, and a word of ours with them: without any, it is alone.
    ticked = [value for name, value in pairs if name == "space_serving"]
    form.space["serving"] = ", ".join([value for value in ticked if value != NO_TICK] or ticked[:1])
    form.objectives = tuple(value for name, value in pairs if name == "objectives")
    form.mode = sent.get("mode") or "form"
    form.text = sent.get("yaml", "").replace("\r\n", "\n")
    form.csrf = sent.get("csrf", "")
    return form


def request_of(form: Form) -> Any:
    """The request that the form means; what cannot be one is added to its errors.

    Numbers that are no numbers are told here, everything else by the request's own rules.
    """
    if form.mode == "yaml":
        try:
            return read_yaml(form.text)
        except InputError as error:
            form.add(error.path, error.message)
            return None
    values = form.values
    engine = {"name": values["engine"]}
    if values["engine_version"]:
        engine["version"] = values["engine_version"]
    request: dict[str, Any] = {"schema_version": "1", "model": values["model"], "engine": engine}
    cluster: dict[str, Any] = {}
    if form.pools:
        cluster["pools"] = [_pool(form, index) for index in range(len(form.pools))]
    if values["inter_node"]:
        cluster["inter_node"] = {"kind": values["inter_node"]}
    request["cluster"] = cluster
    request["workload"] = _workload(form)
    slo = _slo(form)
    if slo:
        request["slo"] = slo
    request["objectives"] = list(form.objectives)
    space = _space(form)
    if space:
        request["space"] = space
    search: dict[str, Any] = {"method": values["method"]}
    _put(search, "budget_s", _number(form, "budget_s"))
    _put(search, "seed", _whole(form, "search_seed", least=0))
    request["search"] = search
    prices = _prices(form)
    if prices:
        request["prices"] = prices
    return _with_rest(form, request)


def options_of(form: Form) -> dict[str, str]:
    """What is kept beside the request: label and notes."""
    return {name: form.values[name] for name in ("label", "notes") if form.values[name]}


def _with_rest(form: Form, request: dict[str, Any]) -> Any:
    """The request with what the form has no fields for."""
    if not form.values["rest"]:
        return request
    try:
        rest = read_yaml(form.values["rest"])
    except InputError as error:
        form.general.append(f"What the form cannot show: {error.message}")
        return request
    return _merged(request, rest) if isinstance(rest, Mapping) else request


def config_of(form: Form) -> Any:
    """The content of the model's config.json, where the request holds one; else None."""
    if not form.values["rest"]:
        return None
    try:
        rest = read_yaml(form.values["rest"])
    except InputError:
        return None
    return rest.get("config") if isinstance(rest, Mapping) else None


def without_config(form: Form) -> None:
    """Let the model be again what its name says."""
    try:
        rest = read_yaml(form.values["rest"]) if form.values["rest"] else {}
    except InputError:
        return
    left = {key: value for key, value in rest.items() if key != "config"} if isinstance(rest, Mapping) else {}
    form.values["rest"] = request_yaml(left) if left else ""


def _merged(base: Any, over: Any) -> Any:
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        found = dict(base)
        for key, value in over.items():
            found[key] = _merged(found[key], value) if key in found else value
        return found
    return over


def _pool(form: Form, index: int) -> dict[str, Any]:
    values = form.pools[index]
    pool: dict[str, Any] = {"name": values["pool"] or ("main" if index == 0 else f"pool{index + 1}")}
    pool["device"] = values["device"]
    for name in ("nodes", "devices_per_node"):
        _put(pool, name, _whole(form, pool_field(name, index), text=values[name]))
    return pool


def _prices(form: Form) -> dict[str, float]:
    prices: dict[str, float] = {}
    for index, pool in enumerate(form.pools):
        name = pool_field("price", index)
        price = _number(form, name, text=pool["price"], zero=True)
        if price is None:
            continue
        if prices.get(pool["device"], price) != price:
            form.error(name, "this device has another price in another pool")
        prices[pool["device"]] = price
    return prices


def _workload(form: Form) -> dict[str, Any]:
    values = form.values
    if values["traffic"] == "trace":
        trace: dict[str, Any] = {"path": values["trace"]}
        if not values["trace"]:
            form.error("trace", "choose a trace, or upload one")
        _put(trace, "rate_scale", _number(form, "rate_scale"))
        _put(trace, "limit", _whole(form, "trace_limit"))
        return {"trace": trace}
    synthetic: dict[str, Any] = {}
    if values["traffic"] == "preset":
        synthetic["preset"] = values["preset"]
        _preset_rate(form, synthetic)
        _put(synthetic, "requests", _whole(form, "requests"))
    else:
        synthetic["arrivals"] = _arrivals(form)
        _put(synthetic, "requests", _whole(form, "requests"))
        synthetic["input_tokens"] = _lengths(form, "in")
        synthetic["output_tokens"] = _lengths(form, "out")
        tokens = _whole(form, "prefix_tokens")
        if tokens is not None:
            synthetic["shared_prefix"] = {"tokens": tokens, "groups": _whole(form, "prefix_groups") or 1}
        turns = _number(form, "turns")
        if turns is not None:
            synthetic["turns"] = {"mean": turns, "think_time_s": _number(form, "think_s", zero=True) or 0.0}
    _put(synthetic, "seed", _whole(form, "seed", least=0))
    return {"synthetic": synthetic}


def _preset_rate(form: Form, synthetic: dict[str, Any]) -> None:
    preset = PRESETS.get(form.values["preset"])
    if preset is None or not form.values["rate"]:
        return
    rate = _number(form, "rate")
    if preset["arrivals"]["process"] == "closed":
        form.error(
            "rate",
            f"the preset {form.values['preset']!r} keeps {preset['arrivals']['concurrency']} requests in "
            "flight and has no rate; leave this empty",
        )
    elif rate is not None:
        synthetic["arrivals"] = {**preset["arrivals"], "rate_rps": rate}


def _arrivals(form: Form) -> dict[str, Any]:
    arrivals: dict[str, Any] = {"process": form.values["process"]}
    if form.values["process"] == "closed":
        _put(arrivals, "concurrency", _whole(form, "concurrency"))
        return arrivals
    _put(arrivals, "rate_rps", _number(form, "shape_rate"))
    if form.values["process"] == "gamma":
        _put(arrivals, "cv", _number(form, "arrivals_cv"))
    if form.values["process"] == "burst":
        _put(arrivals, "size", _whole(form, "burst_size"))
    return arrivals


def _lengths(form: Form, side: str) -> dict[str, Any]:
    kind = form.values[f"{side}_kind"]
    lengths: dict[str, Any] = {"distribution": kind}
    if kind == "constant":
        _put(lengths, "value", _whole(form, f"{side}_value"))
    elif kind == "uniform":
        _put(lengths, "low", _whole(form, f"{side}_low"))
        _put(lengths, "high", _whole(form, f"{side}_high"))
    else:
        _put(lengths, "mean", _number(form, f"{side}_mean"))
        _put(lengths, "cv", _number(form, f"{side}_cv", zero=True))
        _put(lengths, "max", _whole(form, f"{side}_max"))
    return lengths


def _slo(form: Form) -> dict[str, dict[str, float]]:
    slo: dict[str, dict[str, float]] = {}
    for metric, (name, stat, per_second) in SLO_FIELDS.items():
        value = _number(form, name)
        if value is not None:
            slo[metric] = {form.values[stat]: value / per_second}
    return slo


def _space(form: Form) -> dict[str, list[Any]]:
    space: dict[str, list[Any]] = {}
    for name, (_, kind) in SPACE.items():
        words = _words(form.space.get(name, ""))
        if words == [NO_TICK]:
            form.error(f"space_{name}", "tick one at least")
        # Aggregated plans alone are what a request means that says nothing of it.
        elif words and (kind != "choice" or words != [AGGREGATED]):
            space[name] = [_limit(form, f"space_{name}", word, kind) for word in words]
    return space


def _words(text: str) -> list[str]:
    return [part for part in re.split(r"[,\s]+", text) if part]


def _limit(form: Form, name: str, word: str, kind: str) -> Any:
    if kind == "flag":
        flags = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}
        if word.lower() not in flags:
            form.error(name, f"write on, off, or both with a comma between, not {word[:40]!r}")
        return flags.get(word.lower(), True)
    if kind == "whole":
        return _whole(form, name, text=word) or 1
    if kind == "number":
        return _number(form, name, text=word) or 1.0
    if kind == "clock":
        return None if word.lower() == FULL_CLOCK else 1e6 * (_number(form, name, text=word) or 1000.0)
    return word


def _put(mapping: dict[str, Any], key: str, value: Any) -> None:
    if value is not None:
        mapping[key] = value


def _number(form: Form, name: str, *, text: str | None = None, zero: bool = False) -> float | None:
    text = form.values[name] if text is None else text
    if not text:
        return None
    # float() would also take `nan`, `1_000` and digits of other scripts.
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text, re.ASCII):
        form.error(name, f"must be a number such as 2 or 0.5, not {text[:40]!r}")
        return None
    value = float(text)
    if value < 0 or (value == 0 and not zero):
        form.error(name, f"must be {'at least' if zero else 'more than'} 0, not {text[:40]}")
        return None
    return int(value) if value.is_integer() and abs(value) < 1e15 and "e" not in text.lower() else value


def _whole(form: Form, name: str, *, text: str | None = None, least: int = 1) -> int | None:
    text = form.values[name] if text is None else text
    if not text:
        return None
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or int(text) < least:
        form.error(name, f"must be a whole number from {least}, not {text[:40]!r}")
        return None
    return int(text)
