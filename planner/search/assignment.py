"""How many replicas of which kind: the integer programme of a fleet, solved exactly with CP-SAT.

A *column* is one replica of one model on one pool: its devices, the rate it can take within the SLO, and
what it costs. The programme chooses whole numbers of columns:

    minimise   sum_c cost_c n_c                        (ties: fewer devices, then fewer nodes)
    such that  sum_{c of model m} rate_c n_c >= demand_m          for every model m
               the replicas of every pool fit on its nodes

Replicas no larger than a node stay within one (their group shares the node's scale-up links); larger ones
take whole nodes. Packing is exact: by a sum where sizes divide each other and the node (then any such
replicas can be packed), else by counting nodes of each pattern of sizes (Gilmore and Gomory, 1961).

`failure=True` asks that demand is still met when any one node is lost: a model then loses no more than the
most of its replicas that one node of that pool can hold.

`relaxation` is the same without whole numbers, with its dual prices; what a column could save at best is
its reduced cost, so columns whose reduced cost exceeds the gap can be left out of an exact answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, floor
from typing import Any

#: Rates and costs become integers: parts of the largest demand and of the largest cost.
_RATE_PARTS, _COST_PARTS = 1_000_000_000, 1_000_000
#: Share of a demand that rounding may leave unmet: thrice a third must be a whole.
_ROUNDING = 1e-6
_MOST_PATTERNS = 4_000


@dataclass(frozen=True, slots=True)
class Column:
    """One replica: of model number `model`, on `pool`, with what it takes, gives and costs."""

    model: int
    pool: str
    devices: int
    rate_rps: float
    cost: float


@dataclass(frozen=True, slots=True)
class Stock:
    """A pool's nodes that may be used."""

    nodes: int
    devices_per_node: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """Replicas of each column, their cost, and the least cost that any assignment can have."""

    counts: tuple[int, ...]
    cost: float
    bound: float
    certified: bool
    nodes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Relaxation:
    """The best with fractions of replicas: a lower bound, the fractions, what each column would cost beyond
    what it saves (0 for those in use), and what one request per second of each model is worth."""

    cost: float
    counts: tuple[float, ...]
    reduced: tuple[float, ...]
    worth: tuple[float, ...]


def assign(
    columns: Sequence[Column],
    demand_rps: Sequence[float],
    stocks: Mapping[str, Stock],
    *,
    failure: bool = False,
    budget_s: float = 30.0,
    seed: int = 0,
    workers: int = 1,
) -> Assignment | None:
    """The cheapest assignment, or None when the stocks cannot meet the demand (or none was found in time)."""
    kept = undominated(columns, same_size=failure)
    if len(kept) < len(columns):
        found = assign(
            [columns[index] for index in kept], demand_rps, stocks,
            failure=failure, budget_s=budget_s, seed=seed, workers=workers,
        )  # fmt: skip
        if found is None:
            return None
        chosen = dict(zip(kept, found.counts, strict=True))
        return replace(found, counts=tuple(chosen.get(index, 0) for index in range(len(columns))))
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    top_rate = max(demand_rps) or 1.0
    top_cost = max([column.cost for column in columns] + [1e-12])
    rates = [floor(min(column.rate_rps / top_rate, 1.0) * _RATE_PARTS) for column in columns]
    needs = [ceil(rate / top_rate * _RATE_PARTS * (1.0 - _ROUNDING)) for rate in demand_rps]
    costs = [round(column.cost / top_cost * _COST_PARTS) for column in columns]
    counts = [
        model.new_int_var(0, _most(column, rate, needs[column.model], stocks, failure), f"n{index}")
        for index, (column, rate) in enumerate(zip(columns, rates, strict=True))
    ]
    for number, need in enumerate(needs):
        own = [i for i, column in enumerate(columns) if column.model == number]
        served = sum(rates[i] * counts[i] for i in own)
        model.add(served >= need)
        for name, stock in stocks.items() if failure else ():
            here = [i for i in own if columns[i].pool == name]
            lost = []
            for i in here:
                on_one = max(1, stock.devices_per_node // columns[i].devices)
                gone = model.new_int_var(0, on_one, f"lost{i}")
                model.add_min_equality(gone, [counts[i], on_one])
                lost.append(rates[i] * gone)
            if lost:
                model.add(served - sum(lost) >= need)
    nodes = {
        name: _pack(model, name, stock, columns, counts)
        for name, stock in stocks.items()
        if any(column.pool == name for column in columns)
    }
    devices = sum(column.devices * count for column, count in zip(columns, counts, strict=True))
    # Cost first, then devices, then nodes.
    most_nodes = sum(stock.nodes for stock in stocks.values()) + 1
    scale = (sum(stock.nodes * stock.devices_per_node for stock in stocks.values()) + 1) * most_nodes
    total = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    model.minimize(scale * total + most_nodes * devices + sum(nodes.values()))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = budget_s
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    picked = tuple(int(solver.value(count)) for count in counts)
    bound = solver.best_objective_bound / scale / _COST_PARTS * top_cost
    cost = sum(column.cost * count for column, count in zip(columns, picked, strict=True))
    certified = status == cp_model.OPTIMAL
    return Assignment(
        picked,
        cost,
        cost if certified else min(cost, bound),
        certified,
        {name: int(solver.value(used)) for name, used in nodes.items()},
    )


def undominated(columns: Sequence[Column], *, same_size: bool = False) -> list[int]:
    """Columns that no other of their model and pool replaces one for one: fewer or as many devices, as high
    a rate, as low a cost. `same_size` compares only those of equal size (what one node can hold matters)."""
    parts: dict[tuple[Any, ...], list[int]] = {}
    for index, column in enumerate(columns):
        size = column.devices if same_size else 0
        parts.setdefault((column.model, column.pool, size), []).append(index)
    kept = []
    for part in parts.values():
        front: list[int] = []
        for index in sorted(
            part, key=lambda i: (columns[i].devices, columns[i].cost, -columns[i].rate_rps, i)
        ):
            own = columns[index]
            if not any(columns[i].cost <= own.cost and columns[i].rate_rps >= own.rate_rps for i in front):
                front.append(index)
        kept += front
    return sorted(kept)


def _most(column: Column, rate: int, need: int, stocks: Mapping[str, Stock], failure: bool) -> int:
    """Replicas of a column that can ever be of use."""
    stock = stocks[column.pool]
    if rate <= 0:
        return 0
    if column.devices > stock.devices_per_node:
        room = stock.nodes // ceil(column.devices / stock.devices_per_node)
        on_one = 1
    else:
        on_one = stock.devices_per_node // column.devices
        room = stock.nodes * on_one
    return min(room, ceil(need / rate) + (on_one if failure else 0))


def _pack(model: Any, name: str, stock: Stock, columns: Sequence[Column], counts: Sequence[Any]) -> Any:
    """Constrain the replicas of a pool to its nodes; returns the number of nodes in use."""
    here = [
        (column.devices, count) for column, count in zip(columns, counts, strict=True) if column.pool == name
    ]
    small = [(size, count) for size, count in here if size <= stock.devices_per_node]
    used = model.new_int_var(0, stock.nodes, f"nodes-{name}")
    shared = model.new_int_var(0, stock.nodes, f"shared-{name}")
    large = sum(
        ceil(size / stock.devices_per_node) * count for size, count in here if size > stock.devices_per_node
    )
    model.add(used == shared + large)
    sizes = sorted({size for size, _ in small})
    if _divide_each_other(sizes, stock.devices_per_node):
        model.add(sum(size * count for size, count in small) <= stock.devices_per_node * shared)
        return used
    patterns = _patterns(sizes, stock.devices_per_node)
    times = [model.new_int_var(0, stock.nodes, f"pattern-{name}-{index}") for index in range(len(patterns))]
    model.add(sum(times) == shared)
    for at, size in enumerate(sizes):
        need = sum(count for own, count in small if own == size)
        model.add(sum(row[at] * time for row, time in zip(patterns, times, strict=True)) >= need)
    return used


def _divide_each_other(sizes: Sequence[int], node: int) -> bool:
    """Whether every size divides the next and the largest the node: then a sum decides what fits."""
    chain = [*sizes, node]
    return all(later % size == 0 for size, later in pairwise(chain))


def _patterns(sizes: Sequence[int], node: int) -> list[tuple[int, ...]]:
    """All fullest ways to fill one node with replicas of these sizes."""
    found: list[tuple[int, ...]] = []

    def fill(at: int, room: int, taken: tuple[int, ...]) -> None:
        if len(found) > _MOST_PATTERNS:
            raise ValueError(f"more than {_MOST_PATTERNS} ways to fill a node of {node} devices")
        if at < 0:
            if not sizes or room < sizes[0]:
                found.append(taken)
            return
        for count in range(room // sizes[at], -1, -1):
            fill(at - 1, room - count * sizes[at], (count, *taken))

    fill(len(sizes) - 1, node, ())
    return found


def relaxation(
    columns: Sequence[Column], demand_rps: Sequence[float], stocks: Mapping[str, Stock]
) -> Relaxation | None:
    """The linear relaxation (devices of a pool in sum, fractions allowed), or None when it has no answer."""
    from ortools.linear_solver import pywraplp

    solver = pywraplp.Solver.CreateSolver("GLOP")
    counts = [solver.NumVar(0, solver.infinity(), f"n{index}") for index in range(len(columns))]
    rows = []
    for number, demand in enumerate(demand_rps):
        row = solver.Constraint(demand, solver.infinity())
        for column, count in zip(columns, counts, strict=True):
            if column.model == number:
                row.SetCoefficient(count, column.rate_rps)
        rows.append(row)
    for name, stock in stocks.items():
        row = solver.Constraint(-solver.infinity(), stock.nodes * stock.devices_per_node)
        for column, count in zip(columns, counts, strict=True):
            if column.pool == name:
                row.SetCoefficient(count, column.devices)
        rows.append(row)
    goal = solver.Objective()
    for column, count in zip(columns, counts, strict=True):
        goal.SetCoefficient(count, column.cost)
    goal.SetMinimization()
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return None
    return Relaxation(
        goal.Value(),
        tuple(count.solution_value() for count in counts),
        tuple(max(0.0, count.reduced_cost()) for count in counts),
        tuple(max(0.0, row.dual_value()) for row in rows[: len(demand_rps)]),
    )
