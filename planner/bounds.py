"""Optimistic bounds: what no simulation of a plan can beat, for many plans at once.

Every bound is *admissible*: smaller (or equal) than the simulated value of what is minimised,
whatever the load does. The argument, for one engine step of m tokens in its fullest slot with
time t(m) from the plan's `StepTables`:

* A prompt of q tokens is computed in chunks whose slots hold at least as many tokens, so its
  prefill takes at least q * min over m of t(m) / m, and at least one step (min t).
* Every output token but the first takes a step of its own, at least the cheapest step that
  holds a sequence, plus attention over no more than the workload's shortest context.
* A request's TTFT and end-to-end time are no less than its own work at zero load; percentiles
  and means are monotone in each request, so they are bounded by those of the bounds.
* The makespan is no less than the latest (arrival + bound), and no less than all tokens at the
  best tokens per second the worker can reach.
* Energy is idle power over that makespan plus every token at its best joules per token.

A test draws random plans and workloads and checks that no simulation beats its bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from costmodels.table import StepTables
from planner.workload import Workload

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class WorkBounds:
    """Least times of a workload on one worker shape and token budget, at zero load.

    `ttft_s`, `e2e_s` per request [N]; `step_s` the cheapest decode step;
    `tokens` all tokens that must be computed, `output_tokens` those that are answered;
    `seconds_per_token` the best a worker can do; `joules_per_token` dynamic energy alike.
    """

    ttft_s: FloatArray
    e2e_s: FloatArray
    step_s: float
    tokens: float
    output_tokens: float
    seconds_per_token: float
    joules_per_token: float
    makespan_s: float  # of the longest chain of dependent requests, one worker or many


def work_bounds(workload: Workload, tables: StepTables, *, prefix_caching: bool) -> WorkBounds:
    """Bounds for every plan that uses `tables` (any batching limits, any number of replicas)."""
    inputs = workload.input_tokens.astype(np.float64)
    outputs = workload.output_tokens.astype(np.float64)
    cached = prefix_caching and workload.block_tokens > 0
    prompt = np.ones_like(inputs) if cached else inputs
    ranks = float(tables.attention_data)

    def least(latency: FloatArray, cycle: FloatArray) -> FloatArray:
        return np.minimum(latency, cycle)

    mixed = least(tables.mixed_latency_s, tables.mixed_cycle_s)
    size = np.arange(1, len(mixed))
    # Beyond its last entry a table is extended with the last slope, so the ratio there is the slope.
    slope = mixed[-1] - mixed[-2] if len(mixed) > 2 else mixed[-1]
    per_token = max(0.0, min(float((mixed[1:] / size).min()), float(slope) if slope > 0 else np.inf))
    smallest = float(mixed[1:].min())
    pairs = prompt * (prompt + 1.0) / 2.0
    attention = np.zeros_like(prompt)
    if not cached:
        attention = pairs * float(tables.prefill_full_s_per_pair.min()) / ranks
    ttft = np.maximum(prompt * per_token, smallest) + attention

    decode = least(tables.decode_latency_s, tables.decode_cycle_s)[1:]
    moe = least(tables.moe_decode_latency_s, tables.moe_decode_cycle_s)[1:]
    # A decoding sequence may also share steps with prefill, whose cheapest step counts too.
    step = min(float(decode.min()) + float(moe.min()), smallest)
    context = float(inputs.min()) + 1.0
    knots = tables.decode_ctx_knots
    column = int(np.clip(np.searchsorted(knots, context, side="right") - 1, 0, len(knots) - 1))
    step += min(float(tables.decode_full_s[:, column:].min()), float(tables.decode_full_s.max()))
    e2e = ttft + (outputs - 1.0) * step

    roots = workload.parent < 0
    if workload.concurrency:
        # Clients of a closed loop wait for each answer: the mean client is busy for its share.
        makespan = float(e2e.sum()) / workload.concurrency
    else:
        arrivals = np.where(roots, workload.arrival_s, 0.0)
        first = float(workload.arrival_s[roots].min())
        makespan = float(((arrivals + e2e)[roots] - first).max())

    decode_tokens = np.arange(1, len(decode) + 1)
    slots = float(tables.pipeline) * ranks
    # Per worker: a step serves up to `slots` slots of m tokens each.
    seconds_per_token = min(float(((decode + moe.min()) / decode_tokens).min()), per_token) / slots
    energy_mixed = tables.energy_j.get("mixed")
    energy_decode = tables.energy_j.get("decode")
    joules = np.inf
    if energy_mixed is not None and energy_decode is not None:
        joules = (
            min(
                float((energy_mixed[1:] / np.arange(1, len(energy_mixed))).min()),
                float((energy_decode[1:] / np.arange(1, len(energy_decode))).min()),
            )
            / slots
        )
    return WorkBounds(
        ttft_s=ttft,
        e2e_s=e2e,
        step_s=step,
        tokens=float(prompt.sum() + (outputs - 1.0).sum()),
        output_tokens=float(outputs.sum()),
        seconds_per_token=seconds_per_token,
        joules_per_token=joules if np.isfinite(joules) else 0.0,
        makespan_s=makespan,
    )


def metric_bounds(
    bounds: WorkBounds, *, replicas: int, devices: int, idle_w: float, usd_per_hour: float
) -> dict[str, float]:
    """Bounds on the scalar metrics of a plan; throughput is an upper bound, the rest lower ones."""
    makespan = max(bounds.makespan_s, bounds.tokens * bounds.seconds_per_token / replicas)
    energy = idle_w * devices * makespan + bounds.tokens * bounds.joules_per_token
    result = {
        "makespan_s": makespan,
        "energy_j": energy,
        "output_tokens_per_s": bounds.output_tokens / makespan if makespan > 0 else float("inf"),
        "usd_per_million_output_tokens": usd_per_hour * makespan / 3600.0 / bounds.output_tokens * 1e6,
        "tpot_s": bounds.step_s,
    }
    for name, values in (("ttft_s", bounds.ttft_s), ("e2e_s", bounds.e2e_s)):
        result[f"{name}.mean"] = float(values.mean())
        for percent in (50, 90, 95, 99):
            result[f"{name}.p{percent}"] = float(np.percentile(values, percent, method="lower"))
    return result
