"""How far off predictors are said to be: folds of whole groups, and intervals that hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from costmodels.learned.data import Problem
from costmodels.learned.groups import dealt, hashed
from costmodels.learned.judging import interval, judge
from costmodels.learned.shapes import (
    columns,
    make_batch,
)
from costmodels.learned.store import (
    interval_of,
)
from tests.costmodels.devices import H100


@given(st.lists(st.integers(0, 400), min_size=30, max_size=400), st.integers(2, 5))
def test_groups_are_never_torn(groups: list[int], folds: int) -> None:
    fold = dealt(np.array(groups), folds)
    assert set(fold) <= set(range(folds))
    for number in range(folds):
        inside = {g for g, f in zip(groups, fold, strict=True) if f == number}
        outside = {g for g, f in zip(groups, fold, strict=True) if f != number}
        assert not inside & outside
    sizes = [len({g for g, f in zip(groups, fold, strict=True) if f == number}) for number in range(folds)]
    assert max(sizes) - min(sizes) <= 1


def test_intervals_are_wide_where_errors_are() -> None:
    """Half of the rows are noisy, which a feature tells: intervals follow, and still hold nine in ten."""
    rng, rows = np.random.default_rng(5), 3000
    n, k = np.meshgrid(2.0 ** np.arange(8, 17), 2.0 ** np.arange(8, 17))
    shape = rng.integers(0, n.size, rows)
    raw = columns("gemm", m=np.floor(2.0 ** rng.uniform(0, 12, rows)), n=n.ravel()[shape], k=k.ravel()[shape])
    batch = make_batch("gemm", raw, H100, "vllm", "bf16")
    noise = np.where(raw[:, 0] > 64, 0.10, 0.01)
    seconds = batch.base_s * np.exp(noise * rng.normal(size=rows))
    problem = Problem(H100.name, "vllm", "gemm", "bf16", "0", raw, seconds, raw[:, 1] * 1e6 + raw[:, 2])
    found = judge(batch, problem, 0)
    assert found.spread is not None
    assert 0.86 < found.inside.mean() < 0.95
    low, high = interval_of(np.array(found.bounds), found.spread, batch.features, batch.base_s)
    wide, narrow = (high - low)[raw[:, 0] > 128].mean(), (high - low)[raw[:, 0] < 32].mean()
    assert wide > 4 * narrow
    assert 0.85 < found.inside[raw[:, 0] > 128].mean() < 0.95


def test_an_interval_of_few_groups_is_no_wider_than_it_needs_to_be() -> None:
    """A dozen groups: the finite-sample correction alone would ask for nearly the widest error there was."""
    rng, rows = np.random.default_rng(6), 2400
    hidden = 1024.0 * np.arange(1, 13)
    raw = columns(
        "moe", tokens=np.floor(2.0 ** rng.uniform(0, 13, rows)), hidden=rng.choice(hidden, rows),
        intermediate=1024.0, experts=64.0, local_experts=64.0, top_k=8.0,
    )  # fmt: skip
    batch = make_batch("moe", raw, H100, "vllm", "bf16")
    seconds = batch.base_s * np.exp(0.05 * rng.standard_t(4, size=rows))
    found = judge(batch, Problem(H100.name, "vllm", "moe", "bf16", "0", raw, seconds, raw[:, 1]), 0)
    assert found.spread is None
    assert 0.89 < found.inside.mean() < 0.93
    low, high = interval_of(np.array(found.bounds), None, batch.features, batch.base_s)
    assert np.all(high - low < np.quantile(found.error, 0.985) - np.quantile(found.error, 0.015))


def test_hashes_do_not_depend_on_the_order() -> None:
    names = np.array(["b", "a", "c", "a"])
    assert hashed(names)[1] == hashed(names)[3] == hashed(names[::-1])[0]


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    error, base = rng.normal(0, 0.05, 40_000), 10.0 ** rng.uniform(-6, -2, 40_000)
    bounds = interval(error[:20_000], base[:20_000], np.arange(20_000) % 200)
    from costmodels.learned.shapes import time_class

    low, high = np.array(bounds)[time_class(base[20_000:])].T
    inside = (error[20_000:] >= low) & (error[20_000:] <= high)
    assert 0.885 < inside.mean() < 0.92
