"""Templates and what they need: one environment for pages and reports, and the catalogs as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from planner.pipeline import version
from web.assets import plotly_address, static_address
from web.format import billions, count, number, percent, quantity

HERE = Path(__file__).resolve().parent
#: Where a page stands in the navigation: key -> (address, words).
NAVIGATION = (
    ("plan", "/", "Plan"),
    ("runs", "/runs", "Runs"),
    ("compare", "/compare", "Compare"),
    ("sweep", "/sweep", "Sweep"),
    ("fleet", "/fleet", "Fleet"),
    ("traces", "/traces", "Traces"),
    ("catalog", "/catalog/devices", "Catalog"),
)


@lru_cache(maxsize=1)
def environment() -> Environment:
    """The templates; every value is escaped, and a name that does not exist is an error."""
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(
        version=version(),
        static=static_address,
        plotly=plotly_address(),
        here="",
        stored=False,
        csrf="",
        who="",
        navigation=NAVIGATION,
    )
    return found


def render(template: str, **values: Any) -> str:
    """A template as text."""
    return environment().get_template(template).render(**values)


def login_page(target: str, problem: str = "") -> str:
    """The page that takes an API key."""
    return render("login.html", target=target, problem=problem)


# --- catalogs ------------------------------------------------------------------------------------

_WORDS = {
    "devices": "Accelerators with their datasheet figures. Peaks are dense, never the sparse ones; memory is "
    "what the runtime reports.",
    "models": "Models known by name. Any Hugging Face config.json of a supported architecture works "
    "too, here and on the command line.",
    "engines": "Engine profiles: what a version does by default, and what its host side costs.",
    "workloads": "Kinds of traffic, with lengths as they were published.",
    "costmodels": "Predictors of kernel times, learned from published measurements. The error is that on "
    "data which was held out; the closed form is what they correct.",
}
CATALOG_KINDS = tuple(_WORDS)
_TITLES = {"costmodels": "Cost models"}


def catalog_page(kind: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page of a catalog shows (`kind` one of `CATALOG_KINDS`)."""
    columns, cells = {
        "devices": _devices,
        "models": _models,
        "engines": _engines,
        "workloads": _workloads,
        "costmodels": _costmodels,
    }[kind](rows)
    return {
        "here": "catalog",
        "kind": kind,
        "kinds": [(name, _TITLES.get(name, name.capitalize())) for name in CATALOG_KINDS],
        "words": _WORDS[kind],
        "columns": [{"title": title.removeprefix("#"), "number": title.startswith("#")} for title in columns],
        "rows": [{"id": str(row["name"]), "cells": line} for row, line in zip(rows, cells, strict=True)],
    }


_Table = tuple[list[str], list[list[str]]]


def _source(row: Mapping[str, Any]) -> str:
    """Where the figures come from: each title once, with its date."""
    sources = row.get("sources") or {}
    titles = {
        f"{s.get('title', '')} ({s['date']})" if s.get("date") else s.get("title", "")
        for s in sources.values()
    }
    return "; ".join(sorted(title for title in titles if title))


def _devices(rows: Sequence[Mapping[str, Any]]) -> _Table:
    columns = [
        "Device", "Architecture", "#Memory", "#Bandwidth", "#bf16 / fp16", "#fp8", "#fp4", "#Power limit",
        "#Idle", "#Price", "Scale-up link", "Sources",
    ]  # fmt: skip
    lines = []
    for row in rows:
        peaks = row["peak_flops_per_s"]
        lines.append(
            [
                row["name"],
                f"{row['vendor']} {row['architecture']}",
                quantity(row["memory_bytes"], "B"),
                quantity(row["memory_bandwidth_bytes_per_s"], "B/s"),
                quantity(peaks.get("bf16", peaks.get("fp16")), "FLOP/s"),
                quantity(peaks.get("fp8"), "FLOP/s"),
                quantity(peaks.get("fp4"), "FLOP/s"),
                quantity(row["tdp_w"], "W"),
                quantity(row["idle_w"], "W"),
                f"{number(row['usd_per_hour'])}\u00a0USD/h",
                f"{row['scale_up_link']} of {row['scale_up_domain']}",
                _source(row),
            ]
        )
    return columns, lines


def _models(rows: Sequence[Mapping[str, Any]]) -> _Table:
    columns = [
        "Model",
        "Hugging Face id",
        "#Parameters",
        "#Active",
        "#Layers",
        "#Hidden",
        "#Context",
        "Weights",
        "Source",
    ]
    lines = [
        [
            row["name"],
            ", ".join(row["hugging_face_ids"][:1]),
            billions(row["parameters"]),
            billions(row["active_parameters"]),
            count(row["layers"]),
            count(row["hidden"]),
            count(row["max_context_tokens"]),
            row["weights"],
            row["source"],
        ]
        for row in rows
    ]
    return columns, lines


def _engines(rows: Sequence[Mapping[str, Any]]) -> _Table:
    columns = [
        "Profile",
        "Scheduler",
        "Admission",
        "#KV block",
        "Prefix caching",
        "Chunked prefill",
        "Memory rule",
        "#Fraction",
        "Source",
    ]
    lines = [
        [
            row["name"],
            row["policy"].replace("_", " "),
            row["admission"].replace("_", " "),
            f"{row['block_tokens']} tokens",
            "on" if row["prefix_caching"] else "off",
            "on" if row["chunked_prefill"] else "off",
            row["memory_rule"].replace("_", " "),
            percent(row["memory_fraction"]) if row["memory_fraction"] else "by device",
            row["source"],
        ]
        for row in rows
    ]
    return columns, lines


def _workloads(rows: Sequence[Mapping[str, Any]]) -> _Table:
    columns = ["Preset", "What", "Arrivals", "Input tokens", "Output tokens", "Source"]
    lines = [
        [
            row["name"],
            row["words"],
            " ".join(str(value) for value in row["arrivals"].values()),
            _lengths(row["input_tokens"]),
            _lengths(row["output_tokens"]),
            row["source"],
        ]
        for row in rows
    ]
    return columns, lines


def _lengths(row: Mapping[str, Any]) -> str:
    kind = row["distribution"]
    if kind == "constant":
        return f"{count(row['value'])}"
    if kind == "uniform":
        return f"{count(row['low'])} to {count(row['high'])}"
    return f"{kind}, mean {count(row.get('mean'))}"


def _costmodels(rows: Sequence[Mapping[str, Any]]) -> _Table:
    columns = [
        "Predictor",
        "#Measurements",
        "#Error",
        "#P90 error",
        "#Closed form alone",
        "#Coverage",
        "Source",
    ]
    lines = [
        [
            row["name"],
            count(row.get("rows")),
            percent(row.get("mape")),
            percent(row.get("p90")),
            percent(row.get("closed_form_mape")),
            percent(row.get("coverage")),
            row.get("source", ""),
        ]
        for row in rows
    ]
    return columns, lines
