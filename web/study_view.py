"""What pages show of the answers of sweeps and fleets, and the same as files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from api.asked import studied_plan
from api.kinds import FLEET, SWEEP
from hardware import InputError
from web import charts
from web.exports import engine_of, export_view
from web.format import count, number, percent, quantity, times
from web.labels import plan_label


def vary_words(path: str) -> str:
    """What a sweep moves, in words where there are some for the path."""
    parts = path.split(".")
    if parts[0] == "slo" and len(parts) == 3:
        return f"{parts[1].removesuffix('_s').upper()} {parts[2]} target"
    if parts[0] == "prices" and len(parts) > 1:
        return f"Price of {path.removeprefix('prices.')}"
    if parts[0] == "cluster" and parts[-1] in ("nodes", "devices_per_node"):
        number = int(found[1]) if (found := re.search(r"\[(\d+)\]", path)) else 0
        return parts[-1].replace("_", " ").capitalize() + (f" of pool {number + 1}" if number else "")
    return "Rate, times the request's own" if path == "rate" else path


def study_view(kind: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page of a sweep or a fleet shows of its answer."""
    return _sweep_view(answer) if kind == SWEEP else _fleet_view(answer)


def study_rows(kind: str, answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The answer as lines of a table, in SI units: the points of a sweep, the replicas of a fleet."""
    if kind == SWEEP:
        for point in answer["points"]:
            yield {answer["vary"]: point["value"], **{k: v for k, v in point.items() if k != "value"}}
    else:
        for period in answer["periods"]:
            for row in period["assignments"]:
                yield {"demand": period["demand"], **row}


def study_command(kind: str, request: Mapping[str, Any]) -> str:
    """The command line that asks the same of a file with the request."""
    if kind == FLEET:
        return "planfront fleet request.yaml"
    values = ",".join(f"{value:g}" for value in request["values"])
    return f"planfront sweep request.yaml --vary {shlex.quote(request['vary'])} --values {values}"


def _deploy(
    kind: str, answer: Mapping[str, Any], plan_id: str, model: str | None = None
) -> dict[str, Any] | None:
    """What starts a plan of the answer; None where the engine version's flags are not known."""
    try:
        plan, request = studied_plan(kind, answer, plan_id, model)
    except (InputError, LookupError):
        return None
    shown = export_view(plan, request, engine_of(request))
    return shown if shown["files"] else None


def _sweep_view(answer: Mapping[str, Any]) -> dict[str, Any]:
    points = answer["points"]
    vary = answer["vary"]
    unit = "s" if vary.startswith("slo.") else "USD/h" if vary.startswith("prices.") else ""
    rows, before = [], None
    for point in points:
        metrics = point.get("metrics") or {}
        rows.append(
            {
                "value": quantity(point["value"], unit) if unit else number(point["value"], 4),
                "ok": point["status"] == "ok",
                "label": plan_label(point["plan"], answer["request"])
                if point.get("plan")
                else "no plan can run",
                "plan_id": point["plan_id"],
                "changed": before is not None and before != point["plan_id"],
                "front": count(point.get("front")),
                "devices": count(metrics.get("devices")),
                "cost": quantity(metrics.get("usd_per_million_output_tokens"), "USD/Mtok"),
                "ttft": quantity((metrics.get("ttft_s") or {}).get("p95"), "s"),
                "tpot": quantity((metrics.get("tpot_s") or {}).get("p95"), "s"),
                "throughput": quantity(metrics.get("output_tokens_per_s"), "tok/s"),
                "reason": point.get("reason", ""),
                "command": _deploy(SWEEP, answer, point["plan_id"])
                if point.get("plan") and before != point["plan_id"]
                else None,
            }
        )
        before = point["plan_id"]
    drawn = []
    for name, words, chart_unit, path in (
        ("cost", "Cost per million output tokens", "USD/Mtok", ("usd_per_million_output_tokens",)),
        ("tpot", "TPOT p95 of the recommended plan", "s", ("tpot_s", "p95")),
        ("ttft", "TTFT p95 of the recommended plan", "s", ("ttft_s", "p95")),
        ("devices", "Devices", "", ("devices",)),
    ):
        series = []
        for point in points:
            value: Any = point.get("metrics") or {}
            for part in path:
                value = (value or {}).get(part)
            series.append({"x": point["value"], "y": value, "ok": point["status"] == "ok",
                           "label": point["plan_id"]})  # fmt: skip
        svg = charts.line(
            series,
            x={"label": vary_words(vary), "unit": unit},
            y={"label": words, "unit": chart_unit},
            title=f"{words} over {vary}",
            description=f"{len(series)} values; the table has the numbers.",
            ident=f"sweep-{name}",
        )
        if svg:
            drawn.append({"title": words, "chart": Markup(svg)})
    return {
        "vary": vary,
        "vary_words": vary_words(vary),
        "rows": rows,
        "charts": drawn,
        "changes": f"changes {times(len(answer['changes']))}" if answer["changes"] else "does not change",
        "wall": quantity(answer["wall_s"], "s"),
        "model": answer["request"]["model"],
        "provenance": answer["provenance"],
    }


def _fleet_view(answer: Mapping[str, Any]) -> dict[str, Any]:
    periods = []
    for index, period in enumerate(answer["periods"]):
        pools: list[dict[str, Any]] = []
        for pool in period["pools"]:
            used, total = pool["devices_used"], pool["devices"]
            svg = charts.stacked_bar(
                [
                    {"label": "Used", "value": used, "css": "seg-0"},
                    {"label": "Free", "value": total - used, "css": "seg-free"},
                ],
                unit="",
                title=f"Pool {pool['name']}",
                description=f"{used} of {total} devices are used.",
                ident=f"pool-{index}-{len(pools)}",
            )
            pools.append(
                {
                    "name": pool["name"],
                    "device": pool["device"],
                    "devices": f"{count(used)} of {count(total)}",
                    "nodes": f"{count(pool['nodes_used'])} of {count(pool['nodes_usable'])}",
                    "share": percent(used / total) if total else "",
                    "chart": Markup(svg),
                }
            )
        periods.append(
            {
                "demand": f"{number(period['demand'])} × the demand",
                "ok": period["status"] == "ok",
                "cost": quantity(period["usd_per_hour"], "USD/h"),
                "power": quantity(period["power_w"], "W"),
                "certified": period["certified"],
                "pools": pools,
                "models": [
                    {
                        "name": row["model"],
                        "demand": quantity(row["demand_rps"], "req/s"),
                        "capacity": quantity(row["capacity_rps"], "req/s"),
                        "use": percent(row["demand_rps"] / row["capacity_rps"])
                        if row["capacity_rps"]
                        else "–",
                    }
                    for row in period["models"]
                ],
                "rows": [
                    {
                        "model": row["model"],
                        "pool": row["pool"],
                        "label": plan_label(row["plan"]),
                        "devices": count(row["devices"]),
                        "rate": quantity(row["rate_rps_per_replica"], "req/s"),
                        "cost": quantity(row["usd_per_hour"], "USD/h"),
                        "ttft": quantity((row["metrics_at_rate"].get("ttft_s") or {}).get("p95"), "s"),
                        "tpot": quantity((row["metrics_at_rate"].get("tpot_s") or {}).get("p95"), "s"),
                        "command": _deploy(FLEET, answer, row["plan_id"], row["model"]),
                    }
                    for row in period["assignments"]
                ],
            }
        )
    search = answer["search"]
    headroom = ((answer.get("request") or {}).get("reserve") or {}).get("headroom")
    return {
        "ok": answer["status"] == "ok",
        "objective": answer["objective"],
        "per_day": quantity(answer["usd_per_day"], "USD/day") if answer["usd_per_day"] is not None else "",
        "periods": periods,
        "headroom": percent(headroom) + " headroom" if headroom else "",
        "certified": search["certified"],
        "columns": count(search["columns"]),
        "simulated": count(search["simulated"]),
        "wall": quantity(search["wall_s"], "s"),
        "rejected": answer["rejected"][:12],
        "provenance": answer["provenance"],
    }
