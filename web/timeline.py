"""A plan over time: requests running and waiting, and the KV cache, simulated again when somebody looks."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from api.runs import Runs
from hardware import InputError
from planner.given import resolve_plan
from planner.request import parse_plan
from planner.simulator.simulate import simulate
from web import charts
from web.format import count, percent, quantity
from web.labels import DISAGGREGATED, serving_of

_POINTS = 120
_NO_PAIRS = (
    "Queues over time are drawn for aggregated plans only so far. Everything else on this plan’s page counts "
    "both its prefill workers and its decode workers."
)
_own = threading.local()


def _planner() -> Any:
    """One planner for each thread: they keep tables and are not to be shared."""
    if not hasattr(_own, "planner"):
        from api.solver import make_planner

        _own.planner = make_planner()
    return _own.planner


def why_no_timeline(plan: Mapping[str, Any]) -> str:
    """Why a plan cannot be drawn over time, as a sentence for people; "" for one that can."""
    return _NO_PAIRS if serving_of(plan) == DISAGGREGATED else ""


def timeline(request: Mapping[str, Any], plan: Mapping[str, Any], runs: Runs) -> dict[str, Any]:
    """Charts of a plan of a request over time, with the same as a small table. Blocks: for a thread.

    A plan that cannot be drawn has `why` in place of charts. Raises InputError for a plan that cannot be
    simulated any more (its trace was deleted).
    """
    from api.kinds import UPLOAD_PREFIX

    if why := why_no_timeline(plan):
        return {"charts": [], "rows": [], "why": why}
    planner = _planner()
    planner.uploads = {}
    with ExitStack() as stack:
        path = ((request.get("workload") or {}).get("trace") or {}).get("path", "")
        if path.startswith(UPLOAD_PREFIX):
            upload_id = path.removeprefix(UPLOAD_PREFIX)
            if runs.store.upload(upload_id) is None:
                raise InputError("", "the trace of this run has been deleted")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="planfront-")))
            with (folder / "trace").open("wb") as target:
                for piece in runs.store.upload_content(upload_id):
                    target.write(piece)
            planner.uploads = {upload_id: str(folder / "trace")}
        question = planner.load(request)
    evaluator = question.evaluator()
    point = resolve_plan(parse_plan(plan), question.spec, question.cluster, question.engine)
    reason = evaluator.reject(point)
    if reason:
        raise InputError("", reason)
    memory = evaluator.memory(point)
    config = evaluator.scheduler(point, memory)
    device = question.cluster.pool(point.pool).device
    found = simulate(
        evaluator.workload,
        evaluator.tables(point),
        config,
        devices=point.devices,
        idle_w_per_device=device.idle_w,
        peak_flops_per_s=max(device.peak_flops_per_s.values()),
        memory_bandwidth_bytes_per_s=device.memory_bandwidth_bytes_per_s,
        usd_per_hour=0.0,
        slo=evaluator.slo,
        timeline=True,
    )
    return _view(np.asarray(found.timeline), max(1, config.kv_blocks) * point.replicas)


def _view(rows: np.ndarray[Any, np.dtype[np.float64]], kv_blocks: int) -> dict[str, Any]:
    if len(rows) < 2:
        return {"charts": [], "rows": [], "why": "The simulation is too short to draw."}
    end = float(rows[:, 1].max())
    grid = np.linspace(0.0, end, _POINTS)
    running, waiting, blocks = np.zeros(_POINTS), np.zeros(_POINTS), np.zeros(_POINTS)
    for replica in np.unique(rows[:, 0]):
        mine = rows[rows[:, 0] == replica]
        mine = mine[np.argsort(mine[:, 1], kind="stable")]
        # The last sample at or before each time: a queue is a step function.
        at = np.clip(np.searchsorted(mine[:, 1], grid, side="right") - 1, 0, None)
        running += mine[at, 2]
        waiting += mine[at, 3]
        blocks += mine[at, 4]
    share = blocks / kv_blocks
    drawn, table = [], []
    for words, values, shown, ident in (
        ("Requests decoding", running, count, "running"),
        ("Requests waiting", waiting, count, "waiting"),
        ("KV cache in use", share, percent, "kv"),
    ):
        facts = f"mean {shown(float(values.mean()))}, at most {shown(float(values.max()))}"
        svg = charts.area(
            [float(value) for value in values],
            end=end,
            unit="s",
            top=1.0 if ident == "kv" else max(1.0, float(values.max())),
            title=words,
            description=f"{words} over {quantity(end, 's')}: {facts}.",
            ident=f"time-{ident}",
        )
        drawn.append({"title": words, "words": facts, "chart": Markup(svg)})
        quarters = [float(part.mean()) for part in np.array_split(values, 4)]
        table.append({"words": words, "cells": [shown(value) for value in quarters]})
    return {"charts": drawn, "rows": table, "why": ""}
