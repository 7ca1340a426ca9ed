"""What no prediction may break, over every catalog model on every device that holds it on one node.

`python -m tests.planner.physics_sweep` runs all pairs; the suite runs a sample of them.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

from costmodels import StepTables, default_cost_model
from hardware import Cluster, build_cluster, load_catalog
from planner.engines import load_profile
from planner.evaluate import Evaluator
from planner.models import load_model, model_rows
from planner.plans import PlanPoint, PlanSpace
from planner.request import SpaceLimits
from planner.workload import Workload

#: Sums of floats in another order.
SLACK = 1.0 + 1e-9
_ENGINES = ("vllm", "sglang", "trtllm")


def traffic(count: int = 24) -> Workload:
    """A short, busy open loop: prompts of 64 to 900 tokens, answers of 2 to 48."""
    rng = np.random.default_rng(4)
    return Workload(
        arrival_s=np.sort(rng.uniform(0.0, 2.0, count)),
        input_tokens=rng.integers(64, 900, count),
        output_tokens=rng.integers(2, 48, count),
        parent=np.full(count, -1, np.int64),
        delay_s=np.zeros(count),
        session=np.arange(count, dtype=np.int64),
        concurrency=0,
        block_tokens=0,
        prefix_offset=np.zeros(count + 1, np.int64),
        prefix_ids=np.zeros(0, np.int64),
        prefix_unique=0,
    )


def pairs() -> list[tuple[str, str]]:
    """Every catalog model with every catalog device; of models that differ in name only, the first."""
    devices = sorted(load_catalog().devices)
    own = {}
    for row in model_rows():
        spec = load_model(row["name"])
        own.setdefault(
            repr(replace(spec, name="", family="", source="", hugging_face_ids=(), max_context_tokens=None)),
            row["name"],
        )
    return [(model, device) for model in own.values() for device in devices]


def half(parity: int) -> list[tuple[str, str]]:
    """Half of the pairs, as the fields of one colour of a chequerboard."""
    models: dict[str, int] = {}
    devices: dict[str, int] = {}
    found = []
    for model, device in pairs():
        at = models.setdefault(model, len(models)) + devices.setdefault(device, len(devices))
        if at % 2 == parity:
            found.append((model, device))
    return found


def smallest_plan(evaluator: Evaluator, cluster: Cluster) -> PlanPoint | None:
    """The plan on the fewest devices of one node that can run, or None."""
    limits = SpaceLimits(pipeline=(1,), replicas=(1,), max_num_seqs=(32,), max_num_batched_tokens=(1024,))
    space = PlanSpace(evaluator.spec, cluster, evaluator.engine, limits)
    for point in sorted(space, key=lambda point: point.devices):
        if evaluator.reject(point) is None:
            return point
    return None


def _curves(tables: StepTables, peak: float, bandwidth: float, devices: int) -> list[str]:
    """Steps that are faster than their roofline: all devices at their peaks."""
    times = {
        "mixed": np.minimum(tables.mixed_latency_s, tables.mixed_cycle_s),
        "decode": np.minimum(tables.decode_latency_s, tables.decode_cycle_s),
        "moe_mixed": np.minimum(tables.moe_mixed_latency_s, tables.moe_mixed_cycle_s),
        "moe_decode": np.minimum(tables.moe_decode_latency_s, tables.moe_decode_cycle_s),
        "logits": tables.logits_s,
    }
    wrong = []
    for name, seconds in times.items():
        for kind, work, rate in (("flops", tables.flops, peak), ("bytes", tables.bytes_moved, bandwidth)):
            if name not in work:
                continue
            least = np.asarray(work[name]) / (rate * devices)
            bad = np.flatnonzero(seconds * SLACK < least)
            if len(bad):
                at = int(bad[np.argmax(least[bad] - seconds[bad])])
                wrong.append(f"{name}[{at}] takes {seconds[at]:.3e} s, its {kind} alone {least[at]:.3e} s")
        if not bool(np.isfinite(seconds).all()) or bool((seconds < 0).any()):
            wrong.append(f"{name} has a time that is negative or not finite")
    return wrong


def violations(model: str, device: str, engine: str) -> list[str] | None:
    """Sentences about what a prediction breaks; None when the model does not fit on one node."""
    cluster = build_cluster([{"name": "main", "device": device, "nodes": 1}], None, load_catalog())
    evaluator = Evaluator(
        load_model(model), cluster, traffic(), load_profile(engine), default_cost_model(engine)
    )
    point = smallest_plan(evaluator, cluster)
    if point is None:
        return None
    card = cluster.pool("main").device
    peak = card.peak_flops_per_s.get(point.activations, max(card.peak_flops_per_s.values()))
    tables = evaluator.tables(point)
    wrong = _curves(tables, peak, card.memory_bandwidth_bytes_per_s, point.devices)
    metrics: dict[str, Any] = evaluator.evaluate(point, interval=False).metrics
    makespan = metrics["makespan_s"]
    for name in ("mfu", "mbu"):
        if not 0 < metrics[name] <= 1:
            wrong.append(f"{name} is {metrics[name]:.3g}")
    if metrics["energy_j"] < card.idle_w * point.devices * makespan / SLACK:
        wrong.append(f"energy {metrics['energy_j']:.4g} J is below idle")
    if metrics["power_w_per_device"] > card.tdp_w * SLACK:
        wrong.append(f"{metrics['power_w_per_device']:.0f} W per device, the limit is {card.tdp_w:.0f} W")
    return wrong


def main() -> int:
    """Check every pair with one engine each (they take turns); returns the number of broken pairs."""
    start, fitting, broken = time.monotonic(), 0, 0
    everything = pairs()
    for index, (model, device) in enumerate(everything):
        found = violations(model, device, _ENGINES[index % len(_ENGINES)])
        fitting += found is not None
        if found:
            broken += 1
            sys.stdout.write(f"{model} on {device}: {'; '.join(found)}\n")
    seconds = time.monotonic() - start
    sys.stdout.write(f"{len(everything)} pairs, {fitting} fit on a node, {broken} broken, {seconds:.0f} s\n")
    return broken


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
