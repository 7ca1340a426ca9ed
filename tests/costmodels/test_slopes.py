"""Trees whose leaves are planes: their boxes, their bytes, and LightGBM's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.learned import boosting, slopes
from costmodels.learned.boosting import Setting, boosted, sloping
from costmodels.learned.grown import from_lightgbm_slopes
from costmodels.learned.slopes import LEAF, boxes, coded, decoded, of_leaf
from costmodels.learned.trees import Sloped, Trees, _preorder, nothing, pack, unpack
from tests.costmodels.test_grown import grower, lightgbm

SIZE = Setting(40, 15, 0.25, 10)


def rows(count: int = 2000, seed: int = 1) -> tuple[Any, Any]:
    """Time-like answers over sizes: planes with a kink."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3.0, 3.0, size=(count, 4)).astype(np.float32)
    return x, 0.6 * np.maximum(x[:, 0] + x[:, 1], 0.0) - 0.3 * x[:, 2] + 0.1 * (x[:, 3] > 1.0)


def fitted(x: Any, y: Any, **settings: Any) -> tuple[Any, Sloped]:
    model = lightgbm().train(
        {"num_leaves": 15, "verbose": -1, "num_threads": 1, "linear_tree": True, "linear_lambda": 1.0,
         "max_bin": 64, **settings},
        lightgbm().Dataset(x, y, params={"linear_tree": True, "max_bin": 64, "verbose": -1}), 40,
    )  # fmt: skip
    return model, from_lightgbm_slopes(model, 0.0, x)


def by_recursion(feature: Any, threshold: Any, low: Any, high: Any) -> list[dict[int, tuple[float, float]]]:
    """Each leaf's box, in preorder, the plain way."""
    found: list[dict[int, tuple[float, float]]] = []

    def visit(at: int, box: dict[int, tuple[float, float]]) -> int:
        if feature[at] == LEAF:
            found.append(box)
            return at + 1
        name = int(feature[at])
        least, most = box.get(name, (low[name], high[name]))
        right = visit(at + 1, {**box, name: (least, min(most, threshold[at]))})
        return visit(right, {**box, name: (max(least, threshold[at]), most)})

    at = 0
    while at < len(feature):
        at = visit(at, {})
    return found


@st.composite
def forests(draw: st.DrawFn) -> tuple[Any, Any]:
    """Nodes of a few random trees in preorder."""
    feature: list[int] = []
    threshold: list[float] = []

    def grow(depth: int) -> None:
        if depth == 5 or draw(st.integers(0, 2)) == 0:
            feature.append(LEAF)
            threshold.append(0.0)
            return
        feature.append(draw(st.integers(0, 5)))
        threshold.append(draw(st.floats(-2.0, 2.0, width=16)))
        grow(depth + 1)
        grow(depth + 1)

    for _ in range(draw(st.integers(1, 4))):
        grow(0)
    return np.array(feature, np.uint8), np.array(threshold, np.float32)


@given(forests())
def test_boxes_are_what_paths_leave_of_the_measured_range(forest: tuple[Any, Any]) -> None:
    feature, threshold = forest
    low, high = np.full(6, -2.5, np.float32), np.full(6, 2.5, np.float32)
    start, leans, middle, half = boxes(feature, threshold, *_preorder(feature), low, high)
    expected = by_recursion(feature, threshold, low, high)
    leaves = np.flatnonzero(feature == LEAF)
    assert [int(start[at + 1] - start[at]) for at in leaves] == [len(box) for box in expected]
    assert start[-1] == len(leans) == sum(len(box) for box in expected)
    for at, box in zip(leaves, expected, strict=True):
        own = slice(start[at], start[at + 1])
        assert leans[own].tolist() == sorted(box)
        for name, centre, wide in zip(leans[own], middle[own], half[own], strict=True):
            least, most = box[int(name)]
            assert centre == pytest.approx((least + most) / 2, abs=1e-6)
            assert wide == pytest.approx(max(most - least, 0.0) / 2, abs=1e-6)


@given(st.lists(st.integers(-32_000, 32_000)))
def test_rises_survive_their_code(steps: list[int]) -> None:
    values = np.array(steps, float) * slopes.STEP
    np.testing.assert_allclose(decoded(coded(values)), values, atol=1e-9)


def test_a_plane_too_steep_for_its_code_is_refused() -> None:
    with pytest.raises(ValueError, match="too steep"):
        coded(np.array([70.0]))


def test_sums_of_leaves_are_over_their_own() -> None:
    np.testing.assert_allclose(of_leaf(np.array([0, 0, 2, 3]), np.array([1.0, 2.0, 5.0])), [0.0, 3.0, 5.0])


@pytest.mark.parametrize("leaves", [2, 15, 63])
def test_planes_equal_lightgbms(leaves: int, tmp_path: Path) -> None:
    x, y = rows()
    model, part = fitted(x, y, num_leaves=leaves)
    fresh, _ = rows(500, seed=2)
    # Half a step at each of 40 leaves and their slopes, which mostly cancel out. A new row may stand between
    # a threshold and its short form.
    np.testing.assert_allclose(part.predict(x), model.predict(x), atol=15 * slopes.STEP)
    assert np.quantile(np.abs(part.predict(fresh) - model.predict(fresh)), 0.95) < 10 * slopes.STEP
    assert abs(np.mean(part.predict(x) - model.predict(x))) < 1e-4
    trees = Trees(*nothing_but(part))
    data = pack(trees, {"name": "toy"})
    (tmp_path / "t.zip").write_bytes(data)
    again, _, _ = unpack(tmp_path / "t.zip")
    np.testing.assert_array_equal(again.predict(fresh), trees.predict(fresh))
    assert pack(again, {"name": "toy"}) == data


def nothing_but(part: Sloped) -> tuple[Any, ...]:
    none = nothing()
    return none.feature, none.threshold, none.right, none.value, none.roots, 0.0, (part,)


def test_finer_steps_come_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows()
    off = []
    for step in (0.008, 0.002, 0.0005):
        monkeypatch.setattr(slopes, "STEP", step)
        model, part = fitted(x, y)
        off.append(float(np.abs(part.predict(x) - model.predict(x)).mean()))
    assert off[0] > 2 * off[1] > 4 * off[2]


def test_a_plane_goes_on_beyond_what_was_measured() -> None:
    x, _ = rows()
    y = 0.5 * x[:, 0].astype(float)
    _, part = fitted(x, y)
    ends = np.zeros((3, 4), np.float32)
    ends[:, 0] = 2.9, 3.9, 4.9
    one, two, three = part.predict(ends)
    assert three - two == pytest.approx(two - one, rel=0.01)
    assert 0.2 < two - one < 0.5  # trees that found their edge level count, too


def test_trees_that_never_split_and_columns_that_never_change() -> None:
    x, y = rows()
    x[:, 2] = 1.0
    _, level = fitted(x, y, min_data_in_leaf=len(y))
    np.testing.assert_allclose(level.predict(x), y.mean(), atol=0.05)
    model, part = fitted(x, y)
    np.testing.assert_allclose(part.predict(x), model.predict(x), atol=15 * slopes.STEP)


def test_sloping_trees_follow_planes_better_than_flat_ones() -> None:
    lightgbm()
    x, y = rows()
    fresh, truth = rows(500, seed=2)
    trees = sloping(x, y, SIZE, 0)
    assert pack(trees, {}) == pack(sloping(x, y, SIZE, 0), {})
    flat_error = np.abs(boosted(x, y, SIZE, 0).predict(fresh) - truth).mean()
    assert np.abs(trees.predict(fresh) - truth).mean() < 0.8 * flat_error
    (part,) = trees.smooth
    assert isinstance(part, Sloped)
    assert len(part.trees.roots) == 40
    (brief,) = sloping(x, y, SIZE, 0, brief=True).smooth
    assert isinstance(brief, Sloped)
    assert len(brief.trees.roots) == 20


def test_scikit_learn_grows_flat_ones_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    grower("scikit-learn", monkeypatch)
    x, y = rows()
    assert pack(sloping(x, y, SIZE, 0), {}) == pack(boosted(x, y, SIZE, 0), {})
    assert boosting.library() == "scikit-learn"
