"""Fitting a user's few rows: forests and Gaussian processes, on the closed form and on another predictor of
the same kernels, added up with the shares that err least on rows left out (stacking: Breiman, 1996)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from costmodels.learned.grown import from_forest
from costmodels.learned.process import fit_process
from costmodels.learned.shapes import Batch, Matrix
from costmodels.learned.trees import Trees, Upon, joined, nothing
from costmodels.ops import FloatArray

#: Below this many rows a forest or a Gaussian process errs less than boosting.
FEW_ROWS = 1500
_FOLDS = 3
#: Rows whose error by every way is beyond this (a factor of three) have no say in the shares.
_WILD = 1.1


class Way(NamedTuple):
    """One way to fit few rows: a forest or a Gaussian process (`kind`), of the closed form's error (`alone`),
    of another predictor's error (`added`), or of that and with its answer as a feature (`seen`)."""

    on: str
    kind: str


WAYS = tuple(Way(on, kind) for on in ("alone", "added", "seen") for kind in ("forest", "process"))
#: Shares below this are left out: they add more to the file than to the answer.
_LEAST_SHARE = 0.03


class Few(NamedTuple):
    """How few rows are fitted: what they refine (None: the closed form alone), and the share of each of
    `WAYS` in the answer."""

    prior: Trees | None
    shares: tuple[float, ...]


def only(way: Way, prior: Trees | None = None) -> Few:
    """One way alone."""
    return Few(prior, tuple(float(way == other) for other in WAYS))


def mape(log_error: FloatArray) -> float:
    """Mean |predicted / measured - 1| of log(measured / predicted)."""
    return float(np.mean(np.abs(np.exp(-log_error) - 1.0))) if len(log_error) else float("nan")


def fit_few(batch: Batch, seconds: FloatArray, seed: int, few: Few, rows: Any = None) -> Trees:
    """The ways that have a share, each fitted on (some) rows, added up."""
    chosen = np.ones(len(seconds), dtype=bool) if rows is None else rows
    features, target = batch.features[chosen], np.log(seconds[chosen] / batch.base_s[chosen])
    upon, known, left = None, features, target
    if few.prior is not None:
        base = np.abs(batch.features - np.log2(batch.base_s)[:, None]).sum(axis=0).argmin()
        upon = Upon(few.prior, nothing(), int(base))
        known = upon.columns(features)
        left = target - known[:, -2]
    found, seen, leant = nothing(), nothing(), 0.0
    for way, share in zip(WAYS, few.shares, strict=True):
        if share <= 0.0:
            continue
        if way.on == "seen":
            seen = joined(seen, _fit_way(way.kind, known, left, seed, share))
        else:
            found = joined(
                found, _fit_way(way.kind, features, left if way.on == "added" else target, seed, share)
            )
        leant += share * (way.on != "alone")
    if upon is None or leant <= 0.0:
        return found
    return replace(found, smooth=(*found.smooth, replace(upon, more=seen, share=leant)))


def _fit_way(kind: str, features: Matrix, target: FloatArray, seed: int, share: float) -> Trees:
    if kind == "forest":
        return forest(features, target, seed, share)
    return replace(nothing(), smooth=(fit_process(features, target, seed).scaled(share),))


def forest(features: Any, target: FloatArray, seed: int, weight: float = 1.0) -> Trees:
    """Extremely randomised trees (Geurts et al., 2006), times `weight`."""
    from sklearn.ensemble import ExtraTreesRegressor

    model = ExtraTreesRegressor(
        200, min_samples_leaf=2, max_features=0.5, random_state=seed, n_jobs=1
    )  # fmt: skip
    model.fit(features, target)
    return from_forest(model, weight)


def choose_few(batch: Batch, seconds: FloatArray, seed: int, prior: Trees | None) -> Few:
    """How to fit few rows: shares of the ways, and whether `prior` helps (another predictor of the same
    kernels, an older engine version's, say), by the error on rows left out, a third at a time."""
    ratio = np.log(seconds / batch.base_s)
    fold = np.random.default_rng(seed).permutation(len(ratio)) % _FOLDS
    ways = [way for way in WAYS if prior is not None or way.on == "alone"]
    guess = np.zeros((len(ratio), len(ways)))
    for number in range(_FOLDS):
        out = fold == number
        for column, way in enumerate(ways):
            trees = fit_few(batch, seconds, seed, only(way, prior), ~out)
            guess[out, column] = trees.predict(batch.features[out])
    found = dict(zip(ways, shares_of(guess, ratio), strict=True))
    return Few(prior, tuple(float(found.get(way, 0.0)) for way in WAYS))


def shares_of(guess: FloatArray, truth: FloatArray) -> npt.NDArray[np.float64]:
    """Shares [w] >= 0 of columns [n, w], one in all, whose sum is nearest to the truth [n]."""
    from scipy.optimize import nnls

    sound = np.abs(guess - truth[:, None]).min(axis=1) < _WILD
    if not sound.any():
        sound[:] = True
    one = 1e3 * np.sqrt(float(sound.sum()))
    rows = np.vstack([guess[sound], np.full((1, guess.shape[1]), one)])
    share = np.asarray(nnls(rows, np.append(truth[sound], one))[0])
    share = np.where(share < _LEAST_SHARE * share.sum(), 0.0, share)
    return np.asarray(share / share.sum())
