"""Fitting a user's few rows: a forest, a Gaussian process or the mean of both, on the closed form or on
another predictor of the same kernels, whichever errs least on rows left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from costmodels.learned.process import fit_process
from costmodels.learned.shapes import Batch
from costmodels.learned.trees import Trees, Upon, from_forest, joined, nothing
from costmodels.ops import FloatArray

#: Below this many rows a forest or a Gaussian process errs less than boosting.
FEW_ROWS = 1500
_FOLDS = 3


def mape(log_error: FloatArray) -> float:
    """Mean |predicted / measured - 1| of log(measured / predicted)."""
    return float(np.mean(np.abs(np.exp(-log_error) - 1.0))) if len(log_error) else float("nan")


class Few(NamedTuple):
    """How a user's few rows are fitted: what they refine (None: the closed form), the forest's share of the
    answer, the rest a Gaussian process's, and whether both see what is refined or only add to it."""

    prior: Trees | None
    forest: float
    sees: bool = False


def fit_few(batch: Batch, seconds: FloatArray, seed: int, few: Few, rows: Any = None) -> Trees:
    """Of some hundred rows a forest or a Gaussian process errs least, or the mean of both."""
    chosen = np.ones(len(seconds), dtype=bool) if rows is None else rows
    features, target = batch.features[chosen], np.log(seconds[chosen] / batch.base_s[chosen])
    upon = None
    if few.prior is not None:
        target = target - few.prior.predict(features)
        if few.sees:
            base = np.abs(batch.features - np.log2(batch.base_s)[:, None]).sum(axis=0).argmin()
            upon = Upon(few.prior, nothing(), int(base))
            features = upon.columns(features)
    found = nothing()
    if few.forest > 0.0:
        found = joined(found, forest(features, target, seed, few.forest))
    if few.forest < 1.0:
        smooth = fit_process(features, target, seed).scaled(1.0 - few.forest)
        found = joined(found, replace(nothing(), smooth=(smooth,)))
    if upon is not None:
        return replace(nothing(), smooth=(replace(upon, more=found),))
    return found if few.prior is None else joined(few.prior, found)


def forest(features: Any, target: FloatArray, seed: int, weight: float = 1.0) -> Trees:
    """Extremely randomised trees (Geurts et al., 2006), times `weight`."""
    from sklearn.ensemble import ExtraTreesRegressor

    model = ExtraTreesRegressor(
        200, min_samples_leaf=2, max_features=0.5, random_state=seed, n_jobs=1
    )  # fmt: skip
    model.fit(features, target)
    return from_forest(model, weight)


def choose_few(batch: Batch, seconds: FloatArray, seed: int, prior: Trees | None) -> Few:
    """How to fit a user's few rows: whether `prior` helps, another predictor of the same kernels (an older
    engine version's, say), and what stands on it; by the error on rows left out in turn."""
    ratio = np.log(seconds / batch.base_s)
    fold = np.random.default_rng(seed).permutation(len(ratio)) % _FOLDS
    missed: dict[Few, float] = {}
    starts = [(None, False)] if prior is None else [(None, False), (prior, False), (prior, True)]
    for start, sees in starts:
        by_forest, by_process = np.zeros(len(ratio)), np.zeros(len(ratio))
        for number in range(_FOLDS):
            out = fold == number
            for share, guess in ((1.0, by_forest), (0.0, by_process)):
                trees = fit_few(batch, seconds, seed, Few(start, share, sees), ~out)
                guess[out] = trees.predict(batch.features[out])
        for share in (1.0, 0.5, 0.0):
            guess = share * by_forest + (1.0 - share) * by_process
            missed[Few(start, share, sees)] = mape(ratio - guess)
    return min(missed, key=lambda few: missed[few])
