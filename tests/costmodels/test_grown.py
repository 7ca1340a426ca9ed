"""Trees that libraries have grown answer as the libraries do, from flat arrays and from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.learned import boosting
from costmodels.learned.boosting import Setting, boosted
from costmodels.learned.grown import from_boosting, from_forest, from_lightgbm
from costmodels.learned.slopes import LEAF
from costmodels.learned.trees import Trees, flat, joined, pack, unpack


def lightgbm() -> Any:
    module = boosting._lightgbm()
    if module is None:
        pytest.skip("LightGBM cannot load here: its wheels need the system's libgomp")
    return module


def rows(count: int = 800) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, 5)).astype(np.float32)
    return x, x[:, 0] * 2 + np.sin(3 * x[:, 1]) + (x[:, 2] > 0.3)


def survives(trees: Trees, x: Any, path: Path) -> None:
    path.write_bytes(pack(trees, {"name": "toy"}))
    again, none, card = unpack(path)
    assert none is None
    assert card["name"] == "toy"
    np.testing.assert_array_equal(again.right, trees.right)
    np.testing.assert_allclose(again.predict(x), trees.predict(x), atol=1e-6)


def test_boosted_trees_equal_scikit_learns(tmp_path: Path) -> None:
    from sklearn.ensemble import HistGradientBoostingRegressor

    x, y = rows()
    model = HistGradientBoostingRegressor(max_iter=40, max_leaf_nodes=15, random_state=0).fit(x, y)
    trees = from_boosting(model)
    # Leaves are rounded to 64 steps of a tree's range, half a step each way: 40 trees with ranges below 1.
    np.testing.assert_allclose(trees.predict(x), model.predict(x), atol=5e-2)
    survives(trees, x, tmp_path / "t.zip")


@pytest.mark.parametrize("leaves", [2, 15])
def test_boosted_trees_equal_lightgbms(leaves: int, tmp_path: Path) -> None:
    x, y = rows()
    settings = {"num_leaves": leaves, "verbose": -1, "num_threads": 1}
    model = lightgbm().train(settings, lightgbm().Dataset(x, y), 40)
    trees = from_lightgbm(model)
    np.testing.assert_allclose(trees.predict(x), model.predict(x), atol=5e-2)
    survives(trees, x, tmp_path / "t.zip")


def test_trees_that_never_split_are_a_number() -> None:
    x, y = rows()
    settings = {"min_data_in_leaf": len(y), "verbose": -1, "num_threads": 1}
    trees = from_lightgbm(lightgbm().train(settings, lightgbm().Dataset(x, y), 3))
    np.testing.assert_allclose(trees.predict(x), y.mean(), atol=1e-6)


def test_a_forest_is_its_trees_mean_and_adds_to_others() -> None:
    from sklearn.ensemble import ExtraTreesRegressor

    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 4)).astype(np.float32)
    y = x[:, 0] + np.sin(4 * x[:, 1])
    model = ExtraTreesRegressor(50, min_samples_leaf=2, random_state=0).fit(x, y)
    trees = from_forest(model)
    np.testing.assert_allclose(trees.predict(x), model.predict(x), atol=3e-2)
    twice = joined(trees, trees)
    np.testing.assert_allclose(twice.predict(x), 2 * trees.predict(x), atol=1e-6)


def grower(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = lightgbm() if name == "LightGBM" else None
    monkeypatch.setattr(boosting, "_lightgbm", lambda: module)
    assert boosting.library() == name


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", ["LightGBM", "scikit-learn"])
def test_either_library_fits_what_it_is_asked_for(
    name: str, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    grower(name, monkeypatch)
    x, y = rows(4000)
    y[::4] += 5.0  # a mean follows these, a median does not
    size = Setting(80, 15, 0.15, 8, 0.8)
    trees = boosted(x[:3000], y[:3000], size, 0, absolute=absolute)
    again = boosted(x[:3000], y[:3000], size, 0, absolute=absolute)
    assert pack(again, {}) == pack(trees, {})
    assert len(trees.roots) == 80
    assert (abs(np.median(y[3000:] - trees.predict(x[3000:]))) < 0.15) == absolute
    assert len(boosted(x, y, size, 0, brief=True).roots) == 40


def test_both_libraries_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(4000)
    found = []
    for name in ("LightGBM", "scikit-learn"):
        grower(name, monkeypatch)
        found.append(boosted(x[:3000], y[:3000], "bmm", 0).predict(x[3000:]))
    errors = [np.abs(answer - y[3000:]).mean() for answer in found]
    assert max(errors) < 0.15
    assert np.abs(found[0] - found[1]).mean() < max(errors)


def test_scikit_learn_fits_where_lightgbm_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "lightgbm":
            raise OSError("libgomp.so.1: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(boosting.importlib, "import_module", missing)
    boosting._lightgbm.cache_clear()
    try:
        assert boosting.library() == "scikit-learn"
        x, y = rows()
        trees = boosted(x, y, "bmm", 0)
    finally:
        boosting._lightgbm.cache_clear()
    assert np.abs(trees.predict(x) - y).mean() < 0.1


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=40), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_leaves_once_rounded_stay_what_they_are(values: list[float], size: float) -> None:
    # One tree: a spine of nodes that ask for the same feature.
    count = len(values)
    feature = np.array([0, LEAF] * (count - 1) + [LEAF], np.uint8)
    threshold = np.array([-1.0, 0.0] * (count - 1) + [0.0], np.float32)
    leaf = np.zeros(len(feature))
    leaf[feature == LEAF] = np.array(values) * size
    trees = flat(feature, threshold, leaf, 0.25)
    again = flat(feature, threshold, trees.value, trees.base)
    np.testing.assert_array_equal(again.value, trees.value)
    assert again.base == pytest.approx(trees.base, abs=1e-12)
    # Half a step, twice (leaves and scale), and what a short step is off by; all leaves together: nothing.
    step = (max(values) - min(values)) * size / 63
    off = trees.value[feature == LEAF].astype(float) + trees.base - 0.25 - leaf[feature == LEAF]
    assert np.abs(off).max() <= step + 63 * step / 256 + 1e-4 * size
    assert abs(off.mean()) <= 1e-6 * max(size, 1.0)


def test_a_scale_moves_no_answer() -> None:
    x, y = rows()
    settings = {"num_leaves": 15, "verbose": -1, "num_threads": 1}
    model = lightgbm().train(settings, lightgbm().Dataset(x, y), 100)
    assert abs(float(np.mean(from_lightgbm(model).predict(x) - model.predict(x)))) < 2e-3
