"""The integer programme against brute force, packings against first principles, prices against bounds."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.search.assignment import Assignment, Column, Stock, assign, relaxation, undominated

sizes = st.sampled_from([1, 2, 3, 4, 8])
columns = st.lists(
    st.builds(
        Column,
        st.integers(0, 1),
        st.sampled_from(["a", "b"]),
        sizes,
        st.integers(1, 12).map(float),
        st.integers(1, 9).map(float),
    ),
    min_size=1,
    max_size=4,
)
stocks = st.fixed_dictionaries(
    {
        "a": st.builds(Stock, st.integers(0, 2), st.sampled_from([2, 4])),
        "b": st.builds(Stock, st.integers(0, 1), st.sampled_from([3, 4])),
    }
)
demands = st.tuples(st.integers(0, 20).map(float), st.integers(0, 12).map(float))


def packs(replicas: list[int], nodes: list[int], whole: int) -> bool:
    """Whether replicas (sizes) can be placed: within nodes, or on whole empty ones."""
    if not replicas:
        return True
    size, *rest = sorted(replicas, reverse=True)
    if size > whole:
        empty = [i for i, room in enumerate(nodes) if room == whole][: -(-size // whole)]
        if len(empty) * whole < size:
            return False
        return packs(rest, [0 if i in empty else room for i, room in enumerate(nodes)], whole)
    for i in range(len(nodes)):
        if nodes[i] >= size and packs(rest, [r - size * (j == i) for j, r in enumerate(nodes)], whole):
            return True
    return False


def brute(items: list[Column], demand: tuple[float, float], stock: dict[str, Stock]) -> float | None:
    """The least cost by trying everything."""
    best = None
    limits = []
    for item in items:
        own = stock[item.pool]
        limits.append(own.nodes * own.devices_per_node // item.devices)
    for counts in product(*(range(limit + 1) for limit in limits)):
        served = [0.0, 0.0]
        for item, count in zip(items, counts, strict=True):
            served[item.model] += item.rate_rps * count
        if served[0] < demand[0] or served[1] < demand[1]:
            continue
        cost = sum(item.cost * count for item, count in zip(items, counts, strict=True))
        if best is not None and cost >= best:
            continue
        if all(
            packs(
                [
                    item.devices
                    for item, count in zip(items, counts, strict=True)
                    if item.pool == name
                    for _ in range(count)
                ],
                [own.devices_per_node] * own.nodes,
                own.devices_per_node,
            )
            for name, own in stock.items()
        ):
            best = cost
    return best


@settings(max_examples=150)
@given(columns, demands, stocks)
def test_the_cheapest_assignment_is_that_of_brute_force(
    items: list[Column], demand: tuple[float, float], stock: dict[str, Stock]
) -> None:
    found, truth = assign(items, demand, stock), brute(items, demand, stock)
    if truth is None:
        assert found is None
        return
    assert found is not None
    assert found.certified
    assert found.cost == pytest.approx(truth)
    assert found.bound == pytest.approx(truth)
    relaxed = relaxation(items, demand, stock)
    assert relaxed is not None
    assert relaxed.cost <= found.cost + 1e-6
    # Reduced-cost fixing: a column that is used never costs more than the gap.
    for count, reduced in zip(found.counts, relaxed.reduced, strict=True):
        assert count == 0 or reduced <= found.cost - relaxed.cost + 1e-6


@settings(max_examples=60)
@given(columns, demands, stocks)
def test_with_a_node_lost_demand_is_still_met(
    items: list[Column], demand: tuple[float, float], stock: dict[str, Stock]
) -> None:
    found = assign(items, demand, stock, failure=True)
    if found is None:
        return
    plain = assign(items, demand, stock)
    assert plain is not None
    assert found.cost >= plain.cost - 1e-9
    for model, need in enumerate(demand):
        served = sum(i.rate_rps * n for i, n in zip(items, found.counts, strict=True) if i.model == model)
        for item, count in zip(items, found.counts, strict=True):
            if item.model == model and count:
                on_one = max(1, stock[item.pool].devices_per_node // item.devices)
                assert served - item.rate_rps * min(count, on_one) >= need - 1e-6


@given(columns)
def test_what_is_left_out_has_a_replacement(items: list[Column]) -> None:
    kept = undominated(items)
    for index, own in enumerate(items):
        assert index in kept or any(
            items[i].model == own.model
            and items[i].pool == own.pool
            and items[i].devices <= own.devices
            and items[i].rate_rps >= own.rate_rps
            and items[i].cost <= own.cost
            for i in kept
        )


def test_replicas_do_not_straddle_nodes() -> None:
    """Three replicas of three devices have room on 12 devices, but only two nodes of four hold one each."""
    items = [Column(0, "a", 3, 1.0, 1.0)]
    assert assign(items, [3.0], {"a": Stock(3, 4)}) is not None
    assert assign(items, [3.0], {"a": Stock(2, 6)}) is not None
    assert assign(items, [3.0], {"a": Stock(2, 5)}) is None


def test_large_replicas_take_whole_nodes() -> None:
    items = [Column(0, "a", 6, 1.0, 1.0), Column(0, "a", 1, 0.1, 0.5)]
    found = assign(items, [1.1], {"a": Stock(3, 4)})
    assert isinstance(found, Assignment)
    assert found.counts == (1, 1)
    assert found.nodes == {"a": 3}
    assert assign(items, [1.1], {"a": Stock(2, 4)}) is None


def test_ties_go_to_fewer_devices() -> None:
    items = [Column(0, "a", 4, 2.0, 1.0), Column(0, "b", 2, 2.0, 1.0)]
    found = assign(items, [2.0], {"a": Stock(1, 4), "b": Stock(1, 4)})
    assert found is not None
    assert found.counts == (0, 1)
