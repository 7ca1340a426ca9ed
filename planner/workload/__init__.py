"""Traffic: recorded traces and synthetic workloads as arrays, and what they look like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardware.errors import InputError
from planner.workload.presets import PRESETS, workload_rows
from planner.workload.summary import Summary, summarize
from planner.workload.synthetic import generate
from planner.workload.traces import TraceReport, read_trace
from planner.workload.workload import Workload

__all__ = [
    "PRESETS",
    "Summary",
    "TraceReport",
    "Workload",
    "generate",
    "load_workload",
    "read_trace",
    "summarize",
    "workload_rows",
]


def load_workload(
    mapping: Mapping[str, Any], base_dir: Path | None = None, field: str = "workload"
) -> tuple[Workload, Summary, TraceReport | None]:
    """The workload of a request's `workload` mapping; relative trace paths start at `base_dir`.

    Raises InputError unless exactly one of `trace` and `synthetic` is given.
    """
    trace, synthetic = mapping.get("trace"), mapping.get("synthetic")
    if (trace is None) == (synthetic is None):
        given = "both are given" if trace is not None else "neither is given"
        raise InputError(field, f"give exactly one of `trace` and `synthetic` ({given})")
    report = None
    if trace is not None:
        if not isinstance(trace, Mapping) or not isinstance(trace.get("path"), (str, Path)):
            raise InputError(f"{field}.trace.path", "this field is required")
        path = Path(trace["path"])
        if not path.is_absolute():
            path = (base_dir or Path.cwd()) / path
        options = {key: value for key, value in trace.items() if key != "path" and value is not None}
        workload, report = read_trace(path, field=f"{field}.trace", **options)
    else:
        if not isinstance(synthetic, Mapping):
            raise InputError(f"{field}.synthetic", "must be a mapping")
        workload = generate(synthetic, f"{field}.synthetic")
    return workload, summarize(workload), report
