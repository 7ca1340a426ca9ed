"""Uneven pipeline stages on unlike devices, exact.

A pipeline over groups of devices that differ (8 H100 and 8 L40S, say) is as fast as its slowest stage, so the
faster group should hold more layers, as far as its memory goes. Which group holds which run of successive
layers, and in which order, is one path through the layers: an edge (group, from, to) is a stage, every layer
lies on exactly one edge, every group gives at most one. CP-SAT finds the path with the least cycle (the
slowest stage: throughput) or the least latency (all stages and the transfers between them); of equal ones
that with the less of the other.

The simulator knows even stages on like devices only, so this is an answer of its own, beside the plans: times
are those of a decode step at one batch and context, from the same cost models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from costmodels import lookup_decode_attention
from hardware import InputError
from planner.evaluate import Evaluator
from planner.plans import PlanPoint, check_formats, default_formats

#: Times become integers: parts of the longest time there can be.
_PARTS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that hold one stage: the time of each layer on them, s, and the bytes there are for layers."""

    name: str
    layer_s: tuple[float, ...]
    room_bytes: float
    #: Beside its layers, when it is the last stage (LM head) or any stage (a host's share of a step).
    last_s: float = 0.0
    fixed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """Stages in order as (group number, first layer, layer after the last); cycle and latency in s."""

    stages: tuple[tuple[int, int, int], ...]
    cycle_s: float
    latency_s: float
    certified: bool


def stage_s(group: Group, first: int, end: int, layers: int) -> float:
    """Time of a stage."""
    return sum(group.layer_s[first:end]) + group.fixed_s + (group.last_s if end == layers else 0.0)


def split_layers(
    groups: Sequence[Group],
    layer_bytes: Sequence[float],
    *,
    objective: str = "cycle",
    transfer_s: float = 0.0,
    all_groups: bool = False,
    budget_s: float = 30.0,
    seed: int = 0,
) -> Split | None:
    """The best split of successive layers over the groups, or None when the layers do not fit at all.

    `objective` is "cycle" or "latency"; `all_groups` asks every group to hold a stage. `certified` is False
    when the time ran out before the proof.
    """
    if objective not in ("cycle", "latency"):
        raise InputError("objective", f"{objective!r} is not known, use cycle or latency")
    from ortools.sat.python import cp_model

    layers = len(layer_bytes)
    size = np.concatenate(([0.0], np.cumsum(layer_bytes)))
    longest = (
        max((sum(group.layer_s) + group.fixed_s + group.last_s for group in groups), default=0.0) + transfer_s
    )
    if not groups or not layers or longest <= 0:
        return None
    model = cp_model.CpModel()
    edges: list[tuple[int, int, int, Any, int]] = []
    leaving: list[list[Any]] = [[] for _ in range(layers + 1)]
    entering: list[list[Any]] = [[] for _ in range(layers + 1)]
    for number, group in enumerate(groups):
        done = np.concatenate(([0.0], np.cumsum(group.layer_s)))
        own = []
        for first in range(layers):
            # Sizes ascend, so the last layer that still fits is found at once.
            limit = int(np.searchsorted(size, size[first] + group.room_bytes * (1 + 1e-12), side="right")) - 1
            for end in range(first + 1, min(limit, layers) + 1):
                seconds = done[end] - done[first] + group.fixed_s + (group.last_s if end == layers else 0.0)
                literal = model.new_bool_var(f"g{number}_{first}_{end}")
                edges.append((number, first, end, literal, round(float(seconds) / longest * _PARTS)))
                leaving[first].append(literal)
                entering[end].append(literal)
                own.append(literal)
        if all_groups:
            model.add_exactly_one(own) if own else model.add_bool_or([])
        elif own:
            model.add_at_most_one(own)
    if not leaving[0] or not entering[layers]:
        return None
    model.add_exactly_one(leaving[0])
    model.add_exactly_one(entering[layers])
    for at in range(1, layers):
        model.add(sum(leaving[at]) == sum(entering[at]))
    most = max(cost for *_, cost in edges)
    cycle = model.new_int_var(0, most, "cycle")
    for number in range(len(groups)):
        # A group gives one stage at the most, so its sum is that stage's time.
        model.add(cycle >= sum(cost * literal for own, _, _, literal, cost in edges if own == number))
    step = round(transfer_s / longest * _PARTS)
    latency = sum((cost + step) * literal for *_, literal, cost in edges) - step
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.max_time_in_seconds = budget_s
    certified = True
    # One objective after the other: their product would leave the range of integers.
    for goal in (cycle, latency) if objective == "cycle" else (latency, cycle):
        model.minimize(goal)
        status = solver.solve(model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        certified = certified and status == cp_model.OPTIMAL
        # What the rounding of stages and transfers may set apart is equal.
        model.add(goal <= round(solver.objective_value) + (2 * len(groups) if goal is latency else 1))
    chosen = sorted(
        (first, end, number) for number, first, end, literal, _ in edges if solver.boolean_value(literal)
    )
    times = [stage_s(groups[number], first, end, layers) for first, end, number in chosen]
    return Split(
        tuple((number, first, end) for first, end, number in chosen),
        max(times),
        sum(times) + transfer_s * (len(times) - 1),
        certified,
    )


def plan_stages(
    evaluator: Evaluator,
    parts: Sequence[tuple[str, int]],
    *,
    sequences: int,
    context_tokens: int,
    objective: str = "cycle",
    budget_s: float = 30.0,
) -> dict[str, Any]:
    """How to split a model over groups of (pool, tensor degree), decoding `sequences` at a mean context.

    Layers count alike (a model's time and weights over its number of layers). Every group keeps room for the
    KV cache of the sequences over its layers. Plain values: `stages`, `cycle_s`, `latency_s`,
    `tokens_per_s`, the same of the best even split (`even`), and whether it is proven. Raises InputError
    when the model does not fit.
    """
    spec, engine = evaluator.spec, evaluator.engine
    layers = spec.num_layers
    groups: list[Group] = []
    per_layer = 0.0
    for number, (pool_name, tensor) in enumerate(parts):
        device = evaluator.cluster.pool(pool_name).device
        formats = default_formats(spec, device)
        problem = check_formats(device, *formats)
        if problem:
            raise InputError(f"parts[{number}]", problem)
        point = PlanPoint(
            pool_name, 1, tensor, 1, 1, 1, *formats, sequences, max(2048, sequences), True,
            engine.cuda_graphs, 0.9, False,
        )  # fmt: skip
        memory = evaluator.memory(point)
        tables = evaluator.tables(point)
        batch = min(sequences, len(tables.decode_latency_s) - 1)
        head_s = float(tables.logits_s[batch])
        body_s = float(tables.decode_latency_s[batch] + tables.moe_decode_latency_s[batch]) - head_s
        body_s += lookup_decode_attention(tables, batch, context_tokens)
        kv_bytes = memory.kv_bytes_per_token * sequences * context_tokens
        # What one layer takes on one device of the group; groups are compared by their share of it.
        own = (memory.weights_bytes + kv_bytes) / layers
        usable = 0.9 * memory.capacity_bytes - memory.activations_bytes - memory.runtime_bytes
        groups.append(
            Group(f"{pool_name} TP{tensor}", (body_s / layers,) * layers, max(0.0, usable) / own, head_s)
        )
        per_layer = max(per_layer, own)
    found = split_layers(groups, [1.0] * layers, objective=objective, budget_s=budget_s)
    if found is None:
        raise InputError("parts", f"{layers} layers do not fit into these groups")
    even = None
    if layers % len(groups) == 0:
        share = layers // len(groups)
        if all(group.room_bytes >= share for group in groups):
            times = [stage_s(group, at * share, (at + 1) * share, layers) for at, group in enumerate(groups)]
            even = {"cycle_s": max(times), "latency_s": sum(times)}
    return {
        "stages": [
            {
                "group": groups[number].name,
                "layers": [first, end],
                "time_s": stage_s(groups[number], first, end, layers),
            }
            for number, first, end in found.stages
        ],
        "cycle_s": found.cycle_s,
        "latency_s": found.latency_s,
        # With a batch for every stage in flight, one batch leaves the pipe each cycle.
        "tokens_per_s": sequences / found.cycle_s,
        "even": even,
        "certified": found.certified,
    }
