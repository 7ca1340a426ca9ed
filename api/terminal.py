"""Results for a terminal: a table of the front, a plot in characters, the reason, what the search did."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.words import WORTH, above_slo, instead, plan_words, several_pools, told_apart
from hardware.units import format_bytes, format_rate, format_seconds
from planner.explain import nearest_ways
from planner.objectives import OBJECTIVES
from planner.search.base import Progress
from planner.search.gap import gap_words

PLOT_COLUMNS, PLOT_ROWS = 64, 14
MAX_ROWS, MAX_REASONS, MAX_NEAREST = 24, 3, 5


def _share(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def console() -> Console:
    """Standard output; wide enough for the table when it is not a terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=132)


# --- progress ------------------------------------------------------------------------------------


class ProgressLine:
    """Where the search stands, on standard error: one line that changes on a terminal, else a line
    every few seconds."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.live = enabled and sys.stderr.isatty()
        self.shown_at = time.monotonic()
        self.width = 0

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live and self.width:
            sys.stderr.write("\r" + " " * self.width + "\r")
            sys.stderr.flush()

    def __call__(self, progress: Progress) -> None:
        """Show the state of a search."""
        now = time.monotonic()
        if not self.enabled or now - self.shown_at < (0.1 if self.live else 5.0):
            return
        self.shown_at = now
        text = (
            f"{progress.phase}: {progress.considered:,} of {progress.space_size:,} plans, "
            f"{progress.simulated:,} simulated, front {progress.front}, {progress.elapsed_s:.1f} s"
        )
        if self.live:
            sys.stderr.write("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


# --- tables of plans -----------------------------------------------------------------------------


def _cells(entry: Mapping[str, Any]) -> list[str]:
    m = entry["metrics"]
    tpot = m["tpot_s"]["p95"]
    return [
        str(m["devices"]),
        format_seconds(m["e2e_s"]["mean"]),
        format_seconds(m["ttft_s"]["p95"]),
        "-" if tpot is None else format_seconds(tpot),
        f"{m['output_tokens_per_s']:,.0f}",
        f"{m['energy_j_per_output_token']:.2f}",
        format_bytes(m["memory_bytes"]),
        f"{m['usd_per_million_output_tokens']:.2f}",
    ]


_COLUMNS = ("GPUs", "e2e mean", "TTFT p95", "TPOT p95", "tok/s", "J/tok", "memory", "$/Mtok")


def _table(
    entries: Sequence[Mapping[str, Any]], best: str | None, *, pool: bool, misses: bool = False
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("plan", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    if misses:
        table.add_column("above the SLO", no_wrap=True)
    for entry in entries:
        chosen = entry["id"] == best
        table.add_row(
            "*" if chosen else "",
            plan_words(entry["plan"], pool=pool, short=True),
            *_cells(entry),
            *([above_slo(entry)] if misses else []),
            style="bold" if chosen else "",
        )
    return table


def _legend(out: Console, plans: Sequence[Mapping[str, Any]]) -> None:
    """What the short names of disaggregated plans mean, where a table has some."""
    if any(plan.get("serving") == "disaggregated" for plan in plans):
        out.print(Text("A > B: workers A compute prompts (prefill), workers B decode"), style="dim")


# --- a plot in characters ------------------------------------------------------------------------


def _value(name: str, metrics: Mapping[str, Any]) -> float | None:
    info = OBJECTIVES[name]
    value = metrics[info.metric]
    value = value[info.statistic] if info.statistic else value
    return None if value is None else float(value)


def _axis(values: Sequence[float]) -> tuple[float, float, bool]:
    """(low, high, logarithmic): logarithmic when the spread is above ten."""
    low, high = min(values), max(values)
    log = low > 0 and high > 10 * low
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    return low, high, log


def _place(value: float, low: float, high: float, log: bool, cells: int) -> int:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(cells - 1, max(0, round((value - low) / (high - low) * (cells - 1))))


def _tick(value: float, unit: str) -> str:
    if unit == "B":
        return format_bytes(value)
    if unit == "s":
        return format_seconds(value)
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def plot(result: Mapping[str, Any], objectives: Sequence[str]) -> str:
    """Front, other plans and the recommended one over the first two objectives, as text."""
    names = list(objectives[:2])
    if len(names) < 2:
        return ""
    front, chosen = set(result["front"]), (result["recommended"] or {}).get("plan_id")
    points = []
    for entry in result["plans"]:
        pair = [_value(name, entry["metrics"]) for name in names]
        if None not in pair:
            mark = "*" if entry["id"] == chosen else "o" if entry["id"] in front else "."
            points.append((pair[0], pair[1], mark))
    if len(points) < 2:
        return ""
    x = _axis([p[0] for p in points])  # type: ignore[misc]
    y = _axis([p[1] for p in points])  # type: ignore[misc]
    grid = [[" "] * PLOT_COLUMNS for _ in range(PLOT_ROWS)]
    order = {".": 0, "o": 1, "*": 2}
    for a, b, mark in sorted(points, key=lambda p: order[p[2]]):
        row = PLOT_ROWS - 1 - _place(b, *y, PLOT_ROWS)  # type: ignore[arg-type]
        grid[row][_place(a, *x, PLOT_COLUMNS)] = mark  # type: ignore[arg-type]
    info = [OBJECTIVES[name] for name in names]
    top, bottom = _tick(y[1], info[1].unit), _tick(y[0], info[1].unit)
    margin = max(len(top), len(bottom))
    lines = [f"{info[1].words} [{info[1].unit}]{', log' if y[2] else ''}"]
    for i, cells in enumerate(grid):
        label = top if i == 0 else bottom if i == PLOT_ROWS - 1 else ""
        lines.append(f"{label:>{margin}} |{''.join(cells).rstrip()}")
    left, right = _tick(x[0], info[0].unit), _tick(x[1], info[0].unit)
    lines.append(" " * margin + " +" + "-" * PLOT_COLUMNS)
    lines.append(" " * (margin + 2) + left + right.rjust(PLOT_COLUMNS - len(left)))
    lines.append(
        f"{'':>{margin}}  {info[0].words} [{info[0].unit}]{', log' if x[2] else ''}   "
        "o front  * recommended  . dominated"
    )
    return "\n".join(lines)


# --- whole answers -------------------------------------------------------------------------------


def show_result(result: Mapping[str, Any], out: Console | None = None) -> None:
    """The front, or the nearest misses, with the search in a line."""
    out = out or console()
    by_id = {entry["id"]: entry for entry in result["plans"]}
    search, workload = result["search"], result.get("workload") or {}
    request, pool = result["request"], several_pools(result)
    rate = workload.get("rate_rps") or 0.0
    traffic = f"{workload.get('requests', 0):,} requests"
    if not rate:
        traffic += f", {workload.get('concurrency', 0)} at a time"
    elif workload.get("turns_mean", 1) > 1 and rate * workload["duration_s"] + 1.5 < workload["requests"]:
        # Follow-ups come after answers: only the beginnings of conversations have a rate of their own.
        traffic += f" in conversations that begin at {rate:.2f}/s"
    else:
        traffic += f" at {rate:.2f}/s"
    lengths = "{:,.0f} in, {:,.0f} out".format(
        workload.get("input_tokens", {}).get("mean", 0), workload.get("output_tokens", {}).get("mean", 0)
    )
    out.print(
        Text(f"{request['model']} on {_cluster(request)}; {traffic}, {lengths} tokens on average"),
        style="dim",
    )
    out.print()
    best = (result["recommended"] or {}).get("plan_id")
    if result["status"] == "ok":
        front = [by_id[ident] for ident in result["front"]]
        apart = told_apart(front, request["objectives"], best)
        shown = apart[:MAX_ROWS]
        if best and best not in {entry["id"] for entry in shown}:
            shown = [*shown[:-1], by_id[best]]
        out.print(_table(shown, best, pool=pool))
        _legend(out, [entry["plan"] for entry in shown])
        more = [
            f"{number} {words}"
            for number, words in (
                (len(front) - len(apart), f"within {100 * WORTH:g} % of one of these"),
                (len(apart) - len(shown), "more"),
            )
            if number
        ]
        if more:
            out.print(Text(f"... and on the front {' and '.join(more)} (--json lists all)"), style="dim")
        drawn = plot(result, request["objectives"])
        if drawn:
            out.print()
            out.print(Text(drawn))
    elif result["plans"]:
        out.print(Text("No plan meets the SLO. The nearest, each with its best batching:"), style="bold")
        nearest = nearest_ways(result["plans"], MAX_NEAREST)
        out.print(_table(nearest, None, pool=pool, misses=True))
        _legend(out, [entry["plan"] for entry in nearest])
    else:
        out.print(Text("No plan can serve this."), style="bold")
    if result["recommended"]:
        out.print()
        chosen = by_id.get(best or "")
        words = plan_words(chosen["plan"], pool=pool) if chosen else str(best)
        title = "Recommended" if result["status"] == "ok" else "Nearest"
        out.print(Text.assemble((title, "bold"), f" {words}: {result['recommended']['reason']}."))
        rivals = Table(box=None, pad_edge=False, show_header=False)
        rivals.add_column(overflow="fold")
        rivals.add_column(overflow="fold", style="dim")
        for words, changed in instead(result):
            rivals.add_row("or " + words, changed)
        if rivals.row_count:
            out.print(rivals)
    out.print()
    front_words = "the front is certified" if search["certified"] else "the front is not certified"
    why = f" ({search['reason']})" if search.get("reason") else ""
    out.print(
        Text(
            f"{search['space_size']:,} plans: {search['rejected']:,} cannot run, "
            f"{search['bounded']:,} bounded away, "
            f"{search['simulated']:,} simulated in {search['wall_s']:.1f} s; {front_words}{why}."
        )
    )
    gap = search.get("gap") or {}
    if gap.get("open"):
        out.print(Text(gap_words(gap) + ".", style="dim"))
    reasons: Counter[str] = Counter()
    for row in result["rejected"]:
        reasons[row["reason"]] += row.get("plans", 1)
    common = reasons.most_common(MAX_REASONS)
    for reason, count in common:
        out.print(Text(f"  cannot run ({count:,}): {reason}"), style="dim")
    if len(reasons) > len(common):
        others = reasons.total() - sum(count for _, count in common)
        out.print(Text(f"  cannot run ({others:,}): {len(reasons) - len(common)} other reasons"), style="dim")
    if result.get("changes"):
        out.print()
        out.print(Text("What would have to change", style="bold"))
        for row in result["changes"]:
            plan = row.get("plan") or by_id.get(row.get("plan_id"), {}).get("plan")
            words = plan_words(plan, pool=pool) if plan else row.get("label", "")
            out.print(Text(f"  {row['words']}: {words}"))


def _cluster(request: Mapping[str, Any]) -> str:
    parts = []
    for pool in request["cluster"]["pools"]:
        if pool.get("topology"):
            parts.append(str(pool["topology"]))
        else:
            each = pool.get("devices_per_node")
            count = f"{pool.get('nodes', 1)} x {each}" if each else f"{pool.get('nodes', 1)} node(s) of"
            parts.append(f"{count} {pool['device']}")
    return " and ".join(parts)


def show_evaluation(answer: Mapping[str, Any], out: Console | None = None) -> None:
    """One judged plan: metrics with their 90 % intervals, time and memory by part."""
    out = out or console()
    if answer["status"] != "ok":
        out.print(Text("This plan cannot run: " + answer["rejected"][0]["reason"]), style="bold")
        return
    entry = answer["plans"][0]
    m = entry["metrics"]
    out.print(Text(plan_words(entry["plan"])), style="bold")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "mean", "p50", "p90", "p95", "p99", "90 % interval of the mean"):
        table.add_column(name, justify="left" if not name else "right")
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "end to end")):
        row = [m[key][s] for s in ("mean", "p50", "p90", "p95", "p99")]
        low_high = entry["interval"].get(key, {}).get("mean")
        between = f"{format_seconds(low_high[0])} to {format_seconds(low_high[1])}" if low_high else ""
        table.add_row(name, *("-" if v is None else format_seconds(v) for v in row), between)
    out.print(table)
    out.print(
        Text(
            f"{m['output_tokens_per_s']:,.0f} output tokens/s, {m['requests_per_s']:.2f} requests/s "
            f"({m['goodput_rps']:.2f} within the SLO), {m['energy_j_per_output_token']:.2f} J/token, "
            f"{m['power_w']:,.0f} W, {m['usd_per_million_output_tokens']:.2f} USD per million tokens, "
            f"MFU {100 * m['mfu']:.1f} %, MBU {100 * m['mbu']:.1f} %"
        )
    )
    spent = entry["breakdown_s"]
    total = sum(spent.values()) or 1.0
    out.print(Text("time: " + ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in spent.items())))
    kinds = [("memory per device", entry["memory_bytes_per_device"])]
    if entry.get("prefill_memory_bytes_per_device"):
        kinds = [
            ("memory per device, prefill workers", entry["prefill_memory_bytes_per_device"]),
            ("memory per device, decode workers", entry["memory_bytes_per_device"]),
        ]
    for title, memory in kinds:
        held = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items())
        out.print(Text(f"{title}: {held}"))
    for miss in entry["slo_misses"]:
        out.print(
            Text(f"misses {miss['metric']} {miss['statistic']}: {format_seconds(miss['value_s'])} above "
                 f"{format_seconds(miss['bound_s'])}"),
            style="bold",
        )  # fmt: skip


def show_catalog(what: str, rows: Sequence[Mapping[str, Any]], out: Console | None = None) -> None:
    """A catalog as a table with its sources below."""
    out = out or console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns: list[tuple[str, Any]]
    if what == "devices":
        columns = [
            ("device", lambda r: r["name"]),
            ("memory", lambda r: format_bytes(r["memory_bytes"])),
            ("bandwidth", lambda r: format_rate(r["memory_bandwidth_bytes_per_s"])),
            (
                "16-bit",
                lambda r: format_rate(
                    r["peak_flops_per_s"].get("bf16", r["peak_flops_per_s"].get("fp16", 0)), "FLOP/s", 0
                ),
            ),
            (
                "fp8",
                lambda r: (
                    format_rate(r["peak_flops_per_s"]["fp8"], "FLOP/s", 0)
                    if "fp8" in r["peak_flops_per_s"]
                    else "-"
                ),
            ),
            ("link", lambda r: r["scale_up_link"]),
            ("TDP", lambda r: f"{r['tdp_w']:.0f} W"),
            ("USD/h", lambda r: f"{r['usd_per_hour']:.2f}"),
            ("source", lambda r: r["sources"]["memory_bandwidth_bytes_per_s"]["title"]),
        ]
    elif what == "costmodels":
        columns = [
            ("predictor", lambda r: r["name"]),
            ("rows", lambda r: f"{r['rows']:,}"),
            ("held-out error", lambda r: f"{100 * r['mape']:.1f} %"),
            ("closed form", lambda r: _share(r["closed_form_mape"], 1)),
            ("90 % covers", lambda r: _share(r["coverage"], 0)),
            ("data", lambda r: r["data"]),
        ]
    elif what == "models":
        columns = [
            ("model", lambda r: r["name"]),
            ("family", lambda r: r["family"]),
            ("parameters", lambda r: f"{r['parameters'] / 1e9:,.2f} B"),
            ("active", lambda r: f"{r['active_parameters'] / 1e9:,.2f} B"),
            ("layers", lambda r: str(r["layers"])),
            ("context", lambda r: f"{r['max_context_tokens']:,}"),
            ("weights", lambda r: r["weights"]),
            ("source", lambda r: r["source"]),
        ]
    elif what == "engines":
        columns = [
            ("profile", lambda r: r["name"]),
            ("policy", lambda r: r["policy"]),
            ("admission", lambda r: r["admission"]),
            ("block", lambda r: str(r["block_tokens"])),
            ("prefix cache", lambda r: "yes" if r["prefix_caching"] else "no"),
            ("source", lambda r: r["source"]),
        ]
    else:
        columns = [
            ("preset", lambda r: r["name"]),
            ("what", lambda r: r["words"]),
            ("arrivals", lambda r: r["arrivals"]["process"]),
            ("input", lambda r: _length_words(r["input_tokens"])),
            ("output", lambda r: _length_words(r["output_tokens"])),
            ("source", lambda r: r["source"]),
        ]
    for name, _ in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(str(read(row)) for _, read in columns))
    out.print(table)


def _length_words(row: Mapping[str, Any]) -> str:
    if row["distribution"] == "lognormal":
        return f"mean {row['mean']:,}"
    if row["distribution"] == "uniform":
        return f"{row['low']:,} to {row['high']:,}"
    return str(row.get("value", row["distribution"]))


# --- fleets and sweeps ---------------------------------------------------------------------------


def show_fleet(answer: Mapping[str, Any], out: Console | None = None) -> None:
    """One table per level of demand: which replicas where, what they carry and cost."""
    out = out or console()
    for period in sorted(answer["periods"], key=lambda row: -row["demand"]):
        level = "" if len(answer["periods"]) == 1 else f" at {period['demand']:g} of the demand"
        if period["status"] != "ok":
            out.print(f"No fleet of this inventory carries the demand{level}.", style="bold")
            continue
        table = Table(box=None, pad_edge=False)
        for name in ("model", "pool", "replicas", "plan", "requests/s each", "devices", "USD/h"):
            table.add_column(name, justify="left" if name in ("model", "pool", "plan") else "right")
        for row in period["assignments"]:
            table.add_row(
                row["model"], row["pool"], str(row["replicas"]), plan_words({**row["plan"], "replicas": 1}),
                f"{row['rate_rps_per_replica']:.2f}", str(row["devices"]), f"{row['usd_per_hour']:.2f}",
            )  # fmt: skip
        cost = f"{period['usd_per_hour']:,.2f} USD/h, {period['power_w'] / 1e3:,.1f} kW at full load"
        out.print(f"Cheapest by {answer['objective']}{level}: {cost}", style="bold")
        out.print(table)
        used = ", ".join(
            f"{row['devices_used']} of {row['devices']} {row['name']}" for row in period["pools"]
        )
        sure = "optimal" if period["certified"] else f"at most {_gap(period):.1f} % from optimal"
        out.print(f"{used} in use; {sure}.\n")
    search = answer["search"]
    out.print(
        f"{search['columns']:,} ways to serve a replica, {search['simulated']:,} simulated "
        f"in {search['wall_s']:.1f} s."
    )
    for row in answer["rejected"][:6]:
        out.print(f"  {row['model']}: {row['plans']} ways cannot serve: {row['reason']}", style="dim")


def _gap(period: Mapping[str, Any]) -> float:
    value, bound = period["objective_value"], period["objective_bound"]
    return 100.0 * (value - bound) / value if value else 0.0


def show_sweep(answer: Mapping[str, Any], out: Console | None = None) -> None:
    """The recommendation at each value; a mark where it changes."""
    out = out or console()
    table = Table(box=None, pad_edge=False)
    names = ("", answer["vary"], "plan", "devices", "e2e mean", "TTFT p95", "TPOT p95", "J/tok", "$/Mtok")
    for name in names:
        table.add_column(name, justify="left" if name in ("", "plan") else "right")
    last, pool = None, several_pools(answer)
    for point in answer["points"]:
        mark = "" if last is None or point["plan_id"] == last else ">"
        last = point["plan_id"]
        if point["plan_id"] is None:
            table.add_row(mark, f"{point['value']:g}", point["reason"])
            continue
        metrics = point["metrics"]
        tpot = metrics["tpot_s"]["p95"]
        missed = "" if point["status"] == "ok" else "  (misses the SLO)"
        table.add_row(
            mark, f"{point['value']:g}",
            plan_words(point["plan"], pool=pool, short=True) + missed, str(metrics["devices"]),
            format_seconds(metrics["e2e_s"]["mean"]), format_seconds(metrics["ttft_s"]["p95"]),
            format_seconds(tpot) if tpot is not None else "-",
            f"{metrics['energy_j_per_output_token']:.3g}", f"{metrics['usd_per_million_output_tokens']:.3g}",
        )  # fmt: skip
    out.print(table)
    _legend(out, [point["plan"] for point in answer["points"] if point.get("plan")])
    count = len(answer["changes"])
    times = "once" if count == 1 else f"{count} times"
    out.print(
        f"The recommendation changes {times}." if count else "The recommendation stays the same throughout."
    )


def show_comparison(answer: Mapping[str, Any]) -> None:
    """Stored runs side by side: what was asked differently, and what came of it."""
    out = console()
    runs = answer["runs"]
    asked = Table("field of the request", *(row["run"]["id"] for row in runs), box=None)
    for row in answer["differences"]:
        asked.add_row(row["path"], *("" if value is None else str(value)[:60] for value in row["values"]))
    out.print(asked)
    out.print()
    found = Table("recommended plan", *(row["run"]["id"] for row in runs), box=None)
    found.add_row("plan", *(row["plan_id"] or "none" for row in runs))
    found.add_row("meets the SLO", *({True: "yes", False: "no"}.get(row["meets_slo"], "") for row in runs))
    for name in runs[0]["metrics"]:
        cells = []
        for row in runs:
            value, ratio = row["metrics"].get(name), row["ratio_to_first"].get(name)
            times = f" (x {ratio:.2f})" if ratio is not None and row is not runs[0] else ""
            cells.append("" if value is None else f"{value:.4g}{times}")
        found.add_row(name, *cells)
    out.print(found)
