"""The planning form: what was typed, kept as typed, and the request that it means.

Fields are text until here, so that a page can give back exactly what it was given. A request that cannot
be used comes back as sentences beside the fields they are about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import yaml

from hardware import InputError
from planner.request import Objective
from planner.workload import PRESETS
from web.view import request_yaml

OBJECTIVE_NAMES: tuple[str, ...] = Objective.__args__  # type: ignore[attr-defined]
ENGINES = ("vllm", "sglang", "trtllm")
MAX_FIELDS = 100
#: A request has a few hundred nodes; this is room for long lists and still no load.
MAX_YAML_NODES = 50_000

#: What a first click plans: a model, machines and traffic that fit each other.
DEFAULTS: dict[str, str] = {
    "model": "llama-3.1-8b",
    "engine": "vllm",
    "device": "h100-sxm-80gb",
    "nodes": "1",
    "devices_per_node": "4",
    "preset": "chat",
    "rate": "8",
    "requests": "500",
    "ttft_ms": "500",
    "tpot_ms": "25",
    "budget_s": "20",
}
DEFAULT_OBJECTIVES = ("latency", "energy", "cost")

#: Start of a problem's path -> the field beside which it is told; the first that fits.
_FIELD_OF: tuple[tuple[str, str], ...] = (
    ("model", "model"),
    ("engine", "engine"),
    ("cluster.pools[0].nodes", "nodes"),
    ("cluster.pools[0].devices_per_node", "devices_per_node"),
    ("cluster.pools[0]", "device"),
    ("cluster", "nodes"),
    ("workload.synthetic.arrivals", "rate"),
    ("workload.synthetic.requests", "requests"),
    ("workload", "preset"),
    ("slo.ttft_s", "ttft_ms"),
    ("slo.tpot_s", "tpot_ms"),
    ("objectives", "objectives"),
    ("search.budget_s", "budget_s"),
)


@dataclass(slots=True)
class Form:
    """What stands in the form, and what is wrong with it."""

    values: dict[str, str] = field(default_factory=lambda: dict(DEFAULTS))
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    mode: str = "form"  # form | yaml: which of the two was sent
    text: str = ""  # the YAML
    errors: dict[str, list[str]] = field(default_factory=dict)  # by field
    general: list[str] = field(default_factory=list)  # about no field of the form
    example: str = ""

    @property
    def failed(self) -> bool:
        """Something is wrong."""
        return bool(self.errors or self.general)

    def add(self, path: str, message: str) -> None:
        """Put a problem beside its field; without a field of its own it is told at the top."""
        if self.mode == "yaml":
            self.errors.setdefault("yaml", []).append(f"{path}: {message}" if path else message)
            return
        name = self.field_of(path)
        if not name:
            self.general.append(f"{path}: {message}" if path else message)
        elif message not in self.errors.setdefault(name, []):
            self.errors[name].append(message)

    def field_of(self, path: str) -> str:
        """The form's field that a problem's path is about; "" for none of them."""
        for start, name in _FIELD_OF:
            if path == start or path.startswith((f"{start}.", f"{start}[")):
                return name
        return ""


def blank(query: Mapping[str, str] | None = None) -> Form:
    """The form with its defaults, and what the address names of it (`/?model=...&device=...`)."""
    form = Form()
    for name, value in (query or {}).items():
        if name in DEFAULTS:
            form.values[name] = value[:200]
    form.text = _example(form)
    return form


def _example(form: Form) -> str:
    probe = Form(values=dict(form.values), objectives=form.objectives)
    return request_yaml(request_of(probe))


def read_form(body: bytes) -> Form:
    """The form as it was sent (`application/x-www-form-urlencoded`). Raises InputError when it cannot be."""
    try:
        pairs = parse_qsl(
            body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"
        )
    except ValueError:  # not UTF-8, or more fields than the form has
        raise InputError("", "the form cannot be read") from None
    sent = dict(pairs)
    form = Form(values={name: sent.get(name, "").strip() for name in DEFAULTS})
    form.objectives = tuple(value for name, value in pairs if name == "objectives")
    form.mode = "yaml" if sent.get("mode") == "yaml" else "form"
    # Browsers send line ends as CR LF.
    form.text = sent.get("yaml", "").replace("\r\n", "\n")
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
    preset = PRESETS.get(values["preset"])
    synthetic: dict[str, Any] = {"preset": values["preset"]}
    if preset is not None and values["rate"]:
        rate = _number(form, "rate")
        if preset["arrivals"]["process"] == "closed":
            form.errors.setdefault("rate", []).append(
                f"the preset {values['preset']!r} keeps {preset['arrivals']['concurrency']} requests in "
                "flight and has no rate; leave this empty"
            )
        elif rate is not None:
            synthetic["arrivals"] = {**preset["arrivals"], "rate_rps": rate}
    _put(synthetic, "requests", _whole(form, "requests"))
    pool: dict[str, Any] = {"name": "main", "device": values["device"]}
    _put(pool, "nodes", _whole(form, "nodes"))
    _put(pool, "devices_per_node", _whole(form, "devices_per_node"))
    slo = {}
    for metric, name in (("ttft_s", "ttft_ms"), ("tpot_s", "tpot_ms")):
        milliseconds = _number(form, name)
        if milliseconds is not None:
            slo[metric] = {"p95": milliseconds / 1000}
    request: dict[str, Any] = {
        "schema_version": "1",
        "model": values["model"],
        "engine": {"name": values["engine"]},
        "cluster": {"pools": [pool]},
        "workload": {"synthetic": synthetic},
    }
    if slo:
        request["slo"] = slo
    request["objectives"] = list(form.objectives)
    search: dict[str, Any] = {"method": "auto"}
    _put(search, "budget_s", _number(form, "budget_s"))
    return {**request, "search": search}


def _put(mapping: dict[str, Any], key: str, value: Any) -> None:
    if value is not None:
        mapping[key] = value


def _number(form: Form, name: str) -> float | None:
    text = form.values[name]
    if not text:
        return None
    # float() would also take `nan`, `1_000` and digits of other scripts.
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", text, re.ASCII):
        form.errors.setdefault(name, []).append(f"must be a number such as 2 or 0.5, not {text[:40]!r}")
        return None
    value = float(text)
    if value <= 0:
        form.errors.setdefault(name, []).append(f"must be more than 0, not {text[:40]}")
        return None
    return value


def _whole(form: Form, name: str) -> int | None:
    text = form.values[name]
    if not text:
        return None
    if not re.fullmatch(r"\d{1,12}", text, re.ASCII) or int(text) < 1:
        form.errors.setdefault(name, []).append(f"must be a whole number from 1, not {text[:40]!r}")
        return None
    return int(text)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain data only; a name that stands twice in one mapping is an error, as in JSON bodies."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{str(key.value)[:60]!r} stands twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """One YAML document of plain data. Raises InputError with the line.

    Anchors are refused: a request needs none, and a few lines of them expand to gigabytes.
    """
    if not text.strip():
        raise InputError("", "the YAML is empty")
    try:
        for nodes, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise InputError(f"line {event.start_mark.line + 1}", "anchors and aliases are not read here")
            if nodes > MAX_YAML_NODES:
                raise InputError(f"line {event.start_mark.line + 1}", "the document has too many parts")
        return yaml.load(text, Loader=_Loader)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(line, f"this is not YAML: {error.problem or error.context}"[:300]) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError("", "this is not YAML that can be read") from None
