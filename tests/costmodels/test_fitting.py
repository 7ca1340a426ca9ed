"""What predictors are made of, fitted: trees, networks, processes, few rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from costmodels.learned import fitting
from costmodels.learned.data import Problem
from costmodels.learned.fitting import fit, like_its_neighbours
from costmodels.learned.groups import dealt
from costmodels.learned.net import SMALL, fit_net
from costmodels.learned.process import fit_process, unlikelihood
from costmodels.learned.shapes import Batch, bound_s, closed_form, columns, make_batch, rates_of
from costmodels.learned.train import few_of, train_one
from costmodels.learned.train_few import (
    FEW_ROWS,
    WAYS,
    Few,
    Way,
    choose_few,
    fit_few,
    forest,
    shares_of,
)
from costmodels.learned.train_power import fit_power
from costmodels.learned.transposed import transposed
from costmodels.learned.trees import Hedged, nothing, pack, unpack
from hardware import load_catalog
from tests.costmodels.devices import H100
from tests.costmodels.shapes import some_gemms


def _smooth(rows: int, seed: int = 4) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(rows, 4)).astype(np.float32)
    return x, np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]


def test_a_network_follows_what_is_smooth_and_does_not_run_away() -> None:
    x, y = _smooth(700)
    net = fit_net(x, y, 0)
    fresh, truth = _smooth(500, 5)
    assert np.abs(net.predict(fresh) - truth).mean() < 0.08
    assert np.abs(net.predict(100.0 * fresh)).max() < 2.0 * np.abs(y).max()
    np.testing.assert_array_equal(net.predict(fresh), fit_net(x, y, 0).predict(fresh))
    np.testing.assert_allclose(net.predict(fresh)[:1], net.predict(fresh[:1]), rtol=1e-12)


def test_a_process_is_as_likely_as_scikit_learn_says() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    x, y = _smooth(80)
    lengths = [0.7, 2.0, 3.0, 40.0]
    kernel = ConstantKernel(1.3) * Matern(lengths, nu=1.5) + WhiteKernel(0.02)
    theirs = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None).fit(x, y)
    value, slope = theirs.log_marginal_likelihood(theirs.kernel_.theta, eval_gradient=True)
    ours, slopes = unlikelihood(np.log([1.3, 0.02, *lengths]), x.astype(float), y)
    assert ours == pytest.approx(-value, rel=1e-9)
    np.testing.assert_allclose(slopes[[0, 2, 3, 4, 5, 1]], -slope, rtol=1e-6)
    # Where the kernel cannot be inverted, no step is taken.
    assert unlikelihood(np.log([1.0, 1e-300, *lengths]), np.zeros((5, 4)), y[:5])[0] == 1e25


def test_a_process_answers_as_scikit_learns_does() -> None:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    x, y = _smooth(300)
    kernel = ConstantKernel(1.0) * Matern([5.0] * 4, (0.3, 1e3), nu=1.5) + WhiteKernel(1e-2, (1e-4, 1.0))
    with pytest.warns(ConvergenceWarning):  # one feature does not matter: its length is at the upper bound
        theirs = GaussianProcessRegressor(kernel, normalize_y=True).fit(x, y)
    fresh, _ = _smooth(500, 5)
    apart = fit_process(x, y, 0).predict(fresh) - theirs.predict(fresh)
    assert np.abs(apart).mean() < 1e-3


def test_a_process_beats_a_forest_on_few_smooth_rows() -> None:
    x, y = _smooth(300)
    process = fit_process(x, y, 0)
    fresh, truth = _smooth(500, 5)
    assert np.abs(process.predict(fresh) - truth).mean() < 0.02
    assert np.abs(forest(x, y, 0).predict(fresh) - truth).mean() > 0.05
    np.testing.assert_allclose(process.scaled(0.5).predict(fresh), 0.5 * process.predict(fresh), atol=1e-5)


def _halves(on: str) -> tuple[float, ...]:
    return tuple(0.5 * (way.on == on) for way in WAYS)


def test_smooth_parts_and_a_spread_survive_a_file(tmp_path: Path) -> None:
    x, y = _smooth(300)
    batch = Batch(x.astype(float), np.ones(300), x)
    net = replace(nothing(), smooth=(fit_net(x, y, 0),))
    trees = fit_few(batch, np.exp(y), 0, Few(net, _halves("added")))
    assert len(trees.smooth) == 2
    path = tmp_path / "t.zip"
    path.write_bytes(pack(trees, {}, forest(x, np.abs(y), 0)))
    again, spread, _ = unpack(path)
    np.testing.assert_allclose(again.predict(x), trees.predict(x), atol=1e-5)
    assert spread is not None
    np.testing.assert_allclose(spread.predict(x), forest(x, np.abs(y), 0).predict(x), atol=1e-5)


def test_a_second_opinion_counts_half_and_only_so_far(tmp_path: Path) -> None:
    rows = np.zeros((3, 2), np.float32)
    for second, answer in ((1.2, 1.1), (0.9, 0.95), (7.0, 1.15), (-7.0, 0.85)):
        mean = Hedged(replace(nothing(), base=1.0), replace(nothing(), base=second), 0.3, 0.0, 0.5)
        np.testing.assert_allclose(mean.predict(rows), answer)
        np.testing.assert_allclose(mean.predict(rows + 1.0), 1.0)
    x, y = _smooth(300)
    net = fit_net(x, y, 0, SMALL)
    trees = replace(nothing(), smooth=(Hedged(nothing(), replace(nothing(), smooth=(net,)), 0.3, 0.5, 0.5),))
    path = tmp_path / "t.zip"
    path.write_bytes(pack(trees, {}))
    again = unpack(path)[0].predict(x)
    np.testing.assert_allclose(again, trees.predict(x), atol=1e-6)
    np.testing.assert_allclose(
        again, np.where(x[:, 0] <= 0.5, 0.5 * np.clip(net.predict(x), -0.3, 0.3), 0.0), atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["fp8", "fp8_block"])
def test_trees_and_others_err_apart(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "FEW_ROWS", 0)
    problem = _grid(dtype, 4096)
    batch = make_batch("gemm", problem.raw, H100, "trtllm", dtype)
    out = dealt(problem.group, 4) == 0
    truth = np.log(problem.seconds / batch.base_s)[out]

    def error() -> float:
        found = fit(problem, batch, 0, ~out, brief=True).predict(batch.features[out])
        return float(np.abs(truth - found).mean())

    together = error()
    monkeypatch.setattr(fitting, "_hedged", lambda first, *rest, **more: first)
    assert together < 0.9 * error()


def test_few_rows_see_what_they_refine(tmp_path: Path) -> None:
    """Where the older kernel was slow the newer one is not: that hangs on its time, which they see."""
    rng = np.random.default_rng(9)
    features = rng.uniform(-1, 1, size=(2000, 6)).astype(np.float32)
    old = np.sin(5 * features[:, 0]) * np.cos(4 * features[:, 1])
    seconds = np.exp(np.minimum(old, 0.2))
    batch = Batch(features.astype(float), np.ones(2000), features)
    knows = replace(nothing(), smooth=(fit_process(features[:700], old[:700], 0),))
    some, rest = np.arange(2000) < 250, np.arange(2000) >= 250
    error = {
        sees: np.abs(
            np.log(seconds[rest])
            - fit_few(batch, seconds, 0, Few(knows, _halves("seen" if sees else "added")), some).predict(
                features[rest]
            )
        ).mean()
        for sees in (False, True)
    }
    assert error[True] < 0.6 * error[False]
    trees = fit_few(batch, seconds, 0, Few(knows, _halves("seen")), some)
    path = tmp_path / "t.zip"
    path.write_bytes(pack(trees, {}))
    np.testing.assert_allclose(unpack(path)[0].predict(features), trees.predict(features), atol=1e-5)


def test_few_rows_are_fitted_by_what_errs_least() -> None:
    x, y = _smooth(300)
    batch = Batch(x.astype(float), np.ones(300), x)
    alone = dict(zip(WAYS, choose_few(batch, np.exp(y), 0, None).shares, strict=True))
    assert alone[Way("alone", "process")] > 0.9
    assert sum(alone.values()) == pytest.approx(1.0)
    assert all(not share for way, share in alone.items() if way.on != "alone")
    knows = replace(nothing(), smooth=(fit_process(x, y, 0),))
    leant = choose_few(batch, np.exp(y + 0.01 * np.sign(x[:, 3])), 0, knows)
    assert leant.prior is knows
    assert sum(leant.shares[:2]) < 0.5


def test_ways_that_err_apart_share_the_answer() -> None:
    """Two that err alike and apart share it half and half, a third that errs more gets little, noise nothing;
    a broken row has no say."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=800)
    noise = rng.normal(size=(800, 4)) * (0.1, 0.1, 0.3, 2.0)
    guess = truth[:, None] + noise
    guess[5] = truth[5] + 30.0
    share = shares_of(guess, truth)
    np.testing.assert_allclose(share[:3], [0.47, 0.47, 0.06], atol=0.06)
    assert share[3] == 0.0
    assert share.sum() == pytest.approx(1.0)
    assert np.abs(noise @ share).mean() < 0.8 * np.abs(noise[:, 0]).mean()


def test_a_small_table_is_the_mean_of_trees_and_a_process() -> None:
    """Which errs least within what was measured; beyond it the trees hold what they saw last."""
    problem = some_gemms(2, 700)
    batch = make_batch("gemm", problem.raw, H100, "vllm", "bf16")
    assert few_of(problem, batch, 0) is None
    found = fit(problem, batch, 0)
    (mean,) = found.smooth
    assert isinstance(mean, Hedged)
    truth = np.log(problem.seconds / batch.base_s)
    assert np.abs(truth - found.predict(batch.features)).mean() < 0.02
    far = batch.features.copy()
    far[:, 0] += 30.0
    np.testing.assert_array_equal(found.predict(far), mean.first.predict(far))
    # A user's own few rows are fitted by what errs least on them.
    few = some_gemms(2, 200)
    assert few_of(replace(few, own=True), make_batch("gemm", few.raw, H100, "vllm", "bf16"), 0) is not None
    assert few_of(replace(some_gemms(2, FEW_ROWS), own=True), batch, 0) is None


def test_a_cliff_is_a_kernel_and_a_lone_reading_is_broken() -> None:
    """Of some shapes a kernel takes forty times what its closed form says: they are answered so. A row as far
    off among rows that are not was disturbed."""
    rng = np.random.default_rng(2)
    heads = rng.choice([8.0, 16, 32, 64, 128], 3000, p=[0.24, 0.24, 0.24, 0.24, 0.04])
    raw = columns(
        "decode", sequences=2.0 ** rng.integers(0, 9, 3000), context=2.0 ** rng.integers(4, 13, 3000),
        heads=heads, kv_heads=1, head_dim=128, window=0, kv_bytes=2,
    )  # fmt: skip
    batch = make_batch("decode", raw, H100, "trtllm", "any", closed_form("decode", H100, "trtllm", "any"))
    lone = np.flatnonzero(heads == 16)[::30]
    times = np.where(heads == 128, 40.0, 1.0)
    times[lone] = 60.0
    seconds = batch.base_s * times * np.exp(rng.normal(0, 0.02, 3000))
    target = np.log(seconds / batch.base_s)
    sound = like_its_neighbours(raw, target)
    assert sound[heads == 128].mean() > 0.95
    assert not sound[lone].any()
    assert sound.sum() > 3000 - 2 * len(lone)
    # One size, measured again and again.
    assert like_its_neighbours(np.ones((5, 3)), np.array([0.0, 0, 0, 0, 9])).tolist() == [True] * 4 + [False]
    problem = Problem(H100.name, "trtllm", "decode", "any", "0", raw, seconds, raw[:, 2])
    error = target - fit(problem, batch, 0).predict(batch.features)
    assert np.abs(error[heads == 128]).mean() < 0.1
    assert np.abs(np.delete(error, lone)).mean() < 0.05


def test_equal_data_and_seed_make_equal_bytes() -> None:
    first, card = train_one(some_gemms(), 0)
    second, _ = train_one(some_gemms(), 0)
    assert first == second
    assert card["mape"] < 0.05 < card["closed_form_mape"]


def _grid(dtype: str, most: float, engine: str = "trtllm") -> Problem:
    """GEMMs of up to `most` tokens; their true time is no closed form's: efficiency falls with M N, and
    narrow activations [M, K] are read once more."""
    n = 2.0 ** np.arange(8, 17)
    m, n, k = (x.ravel() for x in np.meshgrid(n[n <= most], n, 2.0 ** np.arange(5, 17), indexing="ij"))
    return _timed(dtype, columns("gemm", m=m, n=n, k=k), engine)


def _timed(dtype: str, raw: Any, engine: str) -> Problem:
    m, n, k = raw.T
    rates = rates_of(load_catalog().device("h100-sxm-80gb"), "gemm", dtype)
    product = 2.0 * m * n * k / rates.peak * (1.3 + 0.02 * np.log2(m * n / 2.0**16)) + 4e-6
    seconds = np.maximum(product, bound_s("gemm", raw, H100, dtype))
    if dtype == "fp8":
        seconds = seconds + 12.0 * m * k / rates.bandwidth
    groups = np.array([f"{a:g}x{b:g}" for a, b in raw[:, 1:]])
    return Problem("h100-sxm-80gb", engine, "gemm", dtype, "0", raw, seconds, groups)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_wide_matrices_tell_of_many_tokens(dtype: str) -> None:
    problem = _grid(dtype, 4096)
    raw, seconds = transposed(problem, problem.raw, problem.seconds, 0)
    assert len(raw)
    assert raw[:, 0].min() > 4096
    assert raw[:, 1].max() <= 4096
    error = np.log(seconds / _timed(dtype, raw, "trtllm").seconds)
    assert np.abs(error).mean() < 0.05
    # Nothing of it within what was measured.
    assert not {tuple(row) for row in raw.tolist()} & {tuple(row) for row in problem.raw.tolist()}


def test_what_lies_beyond_the_measured_tokens_is_learned_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "FEW_ROWS", 0)
    problem = _grid("bf16", 4096)
    batch = make_batch("gemm", problem.raw, H100, "trtllm", "bf16")
    beyond = _timed("bf16", _grid("bf16", 65536).raw, "trtllm")
    far = beyond.raw[:, 0] > 8192
    asked = make_batch("gemm", beyond.raw[far], H100, "trtllm", "bf16")
    truth = np.log(beyond.seconds[far] / asked.base_s)
    found = np.abs(truth - fit(problem, batch, 0).predict(asked.features)).mean()
    monkeypatch.setattr(fitting, "transposed", lambda problem, raw, seconds, seed: (raw[:0], seconds[:0]))
    without = np.abs(truth - fit(problem, batch, 0).predict(asked.features)).mean()
    assert found < 0.8 * without


def test_a_format_scaled_row_by_row_tells_nothing_of_the_swapped_product() -> None:
    vllm = _grid("fp8", 4096, "vllm")
    assert closed_form("gemm", H100, "vllm", "fp8").fit.values["row_s"] > 0
    assert not len(transposed(vllm, vllm.raw, vllm.seconds, 0)[0])
    # Nor do a handful of rows, or rows of as many tokens as there are columns.
    few = _grid("bf16", 4096)
    assert not len(transposed(few, few.raw[:50], few.seconds[:50], 0)[0])
    square = _grid("bf16", 65536)
    assert not len(transposed(square, square.raw, square.seconds, 0)[0])


def test_power_is_a_mean_and_a_median() -> None:
    """One reading in five jumps: the answer lies between the median, which no jump moves, and the mean."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 3)).astype(np.float32)
    share = np.where(rng.random(2000) < 0.2, 0.4, 0.9)
    found = fit_power(features, share, "gemm", 0).predict(features)
    assert abs(found.mean() - (0.9 + share.mean()) / 2.0) < 0.02
