"""What traffic looks like: arrivals over time, lengths of inputs and outputs, as small charts and numbers."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from api.runs import Runs
from api.settings import Settings
from hardware import InputError
from planner.workload import Workload, load_workload
from web import charts
from web.format import count, number, percent, quantity

#: Requests that a preview draws; more would change no bar.
MOST_REQUESTS = 5_000
_BINS = 24
_MOST_TOKENS = 50_000_000


async def preview(data: Any, settings: Settings, runs: Runs | None) -> dict[str, Any] | None:
    """The preview of a request's workload, or None when there is nothing to draw."""
    workload = data.get("workload") if isinstance(data, Mapping) else None
    if not isinstance(workload, Mapping):
        return None
    trace = workload.get("trace")
    try:
        if isinstance(trace, Mapping):
            return await _of_trace(trace, runs)
        synthetic = dict(workload.get("synthetic") or {})
        asked = synthetic.get("requests")
        most = min(MOST_REQUESTS, settings.max_workload_requests)
        if not isinstance(asked, int) or asked > most:
            synthetic["requests"] = most
        if _too_long(synthetic):
            return None
        found, summary, _ = await asyncio.to_thread(load_workload, {"synthetic": synthetic})
        return _view(found, summary.shared_prefix_share, "")
    except (InputError, ValueError, TypeError, OverflowError, KeyError):
        return None  # what is wrong is told beside its field


def _too_long(synthetic: Mapping[str, Any]) -> bool:
    """Conversations make several requests of each: a preview must stay small."""
    turns = synthetic.get("turns")
    mean = turns.get("mean", 1) if isinstance(turns, Mapping) else 1
    return not isinstance(mean, (int, float)) or mean * int(synthetic.get("requests") or 0) > 500_000


async def _of_trace(trace: Mapping[str, Any], runs: Runs | None) -> dict[str, Any] | None:
    path = str(trace.get("path", ""))
    if runs is None or not path.startswith("upload:"):
        return None
    upload_id = path.removeprefix("upload:")
    record = await runs.read(runs.store.upload, upload_id)
    if record is None:
        return None

    def read() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="planfront-") as folder:
            file = Path(folder) / "trace"
            with file.open("wb") as target:
                for piece in runs.store.upload_content(upload_id):
                    target.write(piece)
            options = {key: trace[key] for key in ("rate_scale", "limit") if trace.get(key) is not None}
            options.setdefault("limit", 100_000)
            skipped = json.loads(record.facts)["skipped"]
            on_bad_row = "skip" if skipped else str(trace.get("on_bad_row", "refuse"))
            spec = {"path": str(file), "on_bad_row": on_bad_row, **options}
            found, summary, report = load_workload({"trace": spec})
            note = f"{record.name}, read as {report.format}" if report is not None else record.name
            if skipped:
                note += f"; {count(skipped)} unreadable rows skipped"
            return _view(found, summary.shared_prefix_share, note)

    return await asyncio.to_thread(read)


def _view(workload: Workload, shared: float, note: str) -> dict[str, Any]:
    inputs = np.asarray(workload.input_tokens, dtype=np.float64)
    outputs = np.asarray(workload.output_tokens, dtype=np.float64)
    times = np.asarray(workload.arrival_s[workload.parent < 0], dtype=np.float64)
    span_s = float(times[-1] - times[0]) if len(times) > 1 and not workload.concurrency else 0.0
    rate = (len(times) - 1) / span_s if span_s > 0 else 0.0
    panels = []
    if span_s > 0:
        counts, edges = np.histogram(times - times[0], bins=40)
        width_s = float(edges[1] - edges[0])
        panels.append(
            _panel(
                "Arrivals",
                f"{number(rate)} requests/s for {quantity(span_s, 's')}",
                counts / width_s,
                (0.0, span_s),
                "s",
                f"Requests per second over time, at most {number(float(counts.max() / width_s))}.",
                "arrivals",
            )
        )
    for words, values, ident in (("Input tokens", inputs, "inputs"), ("Output tokens", outputs, "outputs")):
        low, high = float(values.min()), float(np.percentile(values, 99.5))
        counts, edges = np.histogram(np.clip(values, low, high), bins=_BINS, range=(low, max(high, low + 1)))
        told = f"mean {count(values.mean())}, p95 {count(np.percentile(values, 95))}"
        panels.append(
            _panel(
                words,
                told,
                counts.astype(np.float64),
                (float(edges[0]), float(edges[-1])),
                "",
                f"{words} of a request: p50 {count(np.percentile(values, 50))}, {told}, "
                f"longest {count(values.max())}.",
                ident,
            )
        )
    total = float(inputs.sum())
    facts = [
        ("Requests", count(len(workload))),
        ("Output tokens per second", number(float(outputs.sum()) / span_s) if span_s > 0 else "closed loop"),
        ("Input to output", f"{number(total / max(1.0, float(outputs.sum())))} to 1"),
    ]
    if workload.concurrency:
        facts.insert(1, ("In flight", count(workload.concurrency)))
    if shared > 0:
        facts.append(("Input that a cache could share", percent(shared)))
    return {"panels": panels, "facts": facts, "note": note}


def _panel(
    title: str,
    words: str,
    heights: npt.NDArray[np.float64],
    span: tuple[float, float],
    unit: str,
    description: str,
    ident: str,
) -> dict[str, Any]:
    svg = charts.histogram(
        [float(value) for value in heights],
        low=span[0],
        high=span[1],
        unit=unit,
        title=title,
        description=description,
        ident=f"preview-{ident}",
    )
    return {"title": title, "words": words, "chart": Markup(svg)}
