"""What was measured around a GEMM: against plain loops, never the matrix itself, off the grid, in a file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels.learned import fitting
from costmodels.learned.data import Problem
from costmodels.learned.fitting import fit
from costmodels.learned.groups import dealt
from costmodels.learned.grown import from_boosting
from costmodels.learned.neighbours import Neighbours, measured_around
from costmodels.learned.shapes import columns, make_batch
from costmodels.learned.trees import Beside, pack, shortened, unpack
from tests.costmodels.devices import H100

M, N, K = (1, 16, 17, 256), tuple(128 << i for i in range(9)), tuple(96 << i for i in range(8))


def _grid(seed: int = 0, share: float = 0.93) -> tuple[Any, Any]:
    """(features [n, 4], errors [n]) of a grid with holes: some matrices are missing, and a few rows."""
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in itertools.product(N, K) if rng.random() < share]
    rows = np.array([(m, *pair) for pair in pairs for m in M if rng.random() < 0.97], dtype=np.float64)
    features = np.column_stack([np.log2(rows), rng.normal(size=len(rows))]).astype(np.float32)
    return features, rng.normal(scale=0.3, size=len(rows))


def _table(features: Any, error: Any) -> Neighbours:
    found = measured_around(features, error)
    assert found is not None
    return found


def _plain(
    features: Any, error: Any, row: Any, width_n: float, width_k: float, side: tuple[int, int]
) -> float:
    """A weighted mean over other matrices at the row's M, by a loop."""
    total = weight = 0.0
    for other, value in zip(features, np.round(error / 0.02) * 0.02, strict=True):
        by_n, by_k = (float(row[i]) - float(other[i]) for i in (1, 2))
        if other[0] != row[0] or (abs(by_n) < 1e-4 and abs(by_k) < 1e-4):
            continue
        if (side[0] and not -side[0] * by_n > 1e-4) or (side[1] and not -side[1] * by_k > 1e-4):
            continue
        w = math.exp(-min(by_n**2 / (2 * width_n**2), 300.0)) * math.exp(
            -min(by_k**2 / (2 * width_k**2), 300.0)
        )
        total, weight = total + w * value, weight + w
    return total / weight if weight else math.nan


@pytest.mark.parametrize(
    ("column", "width_n", "width_k", "side"),
    [
        (0, 0.3, 0.02, (0, 0)), (1, 0.02, 0.3, (0, 0)), (2, 0.3, 0.3, (0, 0)), (3, 0.15, 5.0, (0, 0)),
        (4, 5.0, 0.15, (0, 0)), (5, 0.2, 0.02, (-1, 0)), (6, 0.02, 0.2, (0, -1)), (7, 0.2, 0.02, (1, 0)),
        (8, 0.02, 0.2, (0, 1)),
    ],
)  # fmt: skip
def test_columns_are_weighted_means_of_other_matrices(
    column: int, width_n: float, width_k: float, side: tuple[int, int]
) -> None:
    features, error = _grid()
    found = _table(features, error).columns(features)
    assert found.shape == (len(features), 9)
    assert np.isfinite(found).all()
    compared = 0
    for at in range(0, len(features), 7):
        truth = _plain(features, error, features[at], width_n, width_k, side)
        if not math.isnan(truth):
            assert found[at, column] == pytest.approx(truth, abs=1e-5)
            compared += 1
    assert compared > 20


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_no_row_sees_its_own_matrix(seed: int) -> None:
    features, error = _grid(seed % 17)
    one = np.random.default_rng(seed).integers(len(features))
    own = (features[:, 1:3] == features[one, 1:3]).all(axis=1)
    changed = np.where(own, error + 0.5, error)
    before, after = (_table(features, e).columns(features) for e in (error, changed))
    np.testing.assert_array_equal(before[own], after[own])
    assert (before[~own] != after[~own]).any()
    # Held out, it is seen as it is when it teaches.
    without = _table(features[~own], error[~own]).columns(features[own])
    np.testing.assert_allclose(without, before[own], atol=1e-6)


def test_sizes_between_and_beyond_the_measured_ones_have_answers_within_what_was_measured() -> None:
    features, error = _grid()
    rng = np.random.default_rng(2)
    asked = np.column_stack(
        [rng.uniform(-1, 12, 300), rng.uniform(5, 19, 300), rng.uniform(4, 18, 300), np.zeros(300)]
    ).astype(np.float32)
    near = _table(features, error)
    found = near.columns(asked)
    assert np.isfinite(found).all()
    assert found.min() >= error.min() - 0.011
    assert found.max() <= error.max() + 0.011
    # One row or many: the same.
    np.testing.assert_allclose(near.columns(asked[5:6])[0], found[5], atol=1e-6)
    # Half way between two measured M lies their mean.
    pair = np.array([[4.0, 12.0, 10.0], [np.log2(17), 12.0, 10.0]], np.float32)
    middle = pair.mean(axis=0, keepdims=True).astype(np.float32)
    np.testing.assert_allclose(near.columns(middle)[0], near.columns(pair).mean(axis=0), atol=1e-4)


def test_rows_that_are_no_grid_have_no_table() -> None:
    rng = np.random.default_rng(0)
    scattered = rng.uniform(0, 14, size=(900, 3)).astype(np.float32)
    assert measured_around(scattered, np.zeros(900)) is None
    few = np.array(list(itertools.product((0.0, 4.0), (8.0, 9.0), (8.0, 9.0))), np.float32)
    assert measured_around(few, np.zeros(len(few))) is None


def test_a_gemm_measured_on_a_grid_is_predicted_from_both_and_survives_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "FEW_ROWS", 0)
    rows = np.array(list(itertools.product(M, (*N, 384, 1536, 6144), K)), dtype=np.float64)
    raw = columns("gemm", m=rows[:, 0], n=rows[:, 1], k=rows[:, 2])
    batch = make_batch("gemm", raw, H100, "vllm", "bf16")
    # What no size tells: each K has a kernel of its own for every M, good or bad.
    luck = np.random.default_rng(1).normal(scale=0.2, size=(300, 400))
    seconds = batch.base_s * np.exp(luck[raw[:, 0].astype(int), np.searchsorted(K, raw[:, 2])])
    names = np.array([f"{n}x{k}" for n, k in raw[:, 1:]])
    problem = Problem("h100-sxm-80gb", "vllm", "gemm", "bf16", "0", raw, seconds, names)
    out = dealt(names, 4) == 0
    trees = fit(problem, batch, 0, ~out)
    (beside,) = trees.smooth
    assert isinstance(beside, Beside)
    error = np.log(seconds / batch.base_s)[out] - trees.predict(batch.features[out])
    assert np.abs(error).mean() < 0.05
    path = tmp_path / "t.zip"
    path.write_bytes(pack(trees, {}))
    again, _, _ = unpack(path)
    np.testing.assert_allclose(again.predict(batch.features), trees.predict(batch.features), atol=1e-6)
    assert pack(fit(problem, batch, 0, ~out), {}) == path.read_bytes()


def test_short_thresholds_answer_alike_and_pack_better() -> None:
    from sklearn.ensemble import HistGradientBoostingRegressor

    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=3000), np.log2(rng.integers(1, 5000, 3000))]).astype(np.float32)
    y = np.sin(2 * x[:, 0]) + x[:, 1] / 7
    trees = from_boosting(HistGradientBoostingRegressor(max_iter=60, random_state=0).fit(x, y))
    short = shortened(trees, x)
    np.testing.assert_array_equal(short.predict(x), trees.predict(x))
    assert len(pack(short, {})) < len(pack(trees, {}))
    # Between the values that were seen they stand near the middle, as before.
    assert np.abs(short.threshold - trees.threshold).max() < 0.2
