"""Fronts and hypervolumes, by identities and by second algorithms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planner.pareto import _wfg, dominates, hypervolume, knee, non_dominated, normalise

points = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 12), st.integers(1, 4)),
    elements=st.integers(0, 6).map(float),
)


@given(points)
def test_front_is_what_pairwise_comparison_finds(values: np.ndarray) -> None:
    front = set(non_dominated(values).tolist())
    for index, point in enumerate(values):
        beaten = any(dominates(other, point) for other in values)
        twin_before = any(np.array_equal(values[k], point) for k in range(index))
        assert (index in front) == (not beaten and not twin_before)


@given(points, st.randoms(use_true_random=False))
def test_front_does_not_change_under_shuffling(values: np.ndarray, random: object) -> None:
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    first = {tuple(row) for row in values[non_dominated(values)]}
    second = {tuple(row) for row in values[order][non_dominated(values[order])]}
    assert first == second


@given(points)
def test_hypervolume_equals_the_count_of_unit_cells(values: np.ndarray) -> None:
    # Integer points: the dominated volume is a count of unit cells, found without any recursion.
    reference = np.full(values.shape[1], 7.0)
    cells = np.stack(np.meshgrid(*[np.arange(7)] * values.shape[1], indexing="ij"), axis=-1)
    cells = cells.reshape(-1, values.shape[1])
    covered = np.zeros(len(cells), dtype=bool)
    for point in values:
        covered |= np.all(cells >= point, axis=1)
    assert hypervolume(values, reference) == pytest.approx(covered.sum())


@given(points)
def test_hypervolume_is_that_of_the_front(values: np.ndarray) -> None:
    reference = np.full(values.shape[1], 8.0)
    front = values[non_dominated(values)]
    assert hypervolume(front, reference) == pytest.approx(hypervolume(values, reference))


def test_hypervolume_of_nothing_better_than_the_reference() -> None:
    assert hypervolume(np.array([[2.0, 2.0]]), np.array([1.0, 3.0])) == 0.0


def test_knee_is_the_balanced_plan() -> None:
    assert knee(np.array([[0.0, 10.0], [2.0, 2.0], [10.0, 0.0]])) == 1


def test_normalise_keeps_a_constant_column_finite() -> None:
    scaled = normalise(np.array([[1.0, 5.0], [3.0, 5.0]]))
    assert scaled.tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_large_fronts_of_many_objectives_are_estimated_near_the_exact_volume() -> None:
    # Points on a sphere's corner are mutually non-dominated; half of them are summed exactly.
    directions = np.abs(np.random.default_rng(1).normal(size=(120, 5)))
    values = 1.0 - directions / np.linalg.norm(directions, axis=1)[:, None]
    reference = np.full(5, 1.1)
    exact, estimate = _wfg(values[np.argsort(-values[:, 0])], reference), hypervolume(values, reference)
    assert estimate == pytest.approx(exact, abs=0.015 * float(np.prod(reference - values.min(axis=0))))
    assert hypervolume(values, reference) == estimate
