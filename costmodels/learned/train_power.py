"""Fitting power, (watts - idle) / (TDP - idle): trees of published rows that are at steady power, Gaussian
processes by utilisation of the rows that our own profiler measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from costmodels.learned.boosting import SETTINGS, Setting, boosted
from costmodels.learned.cards import card_of
from costmodels.learned.data import Problem
from costmodels.learned.groups import dealt
from costmodels.learned.process import fit_process
from costmodels.learned.shapes import (
    TIME_CLASSES,
    Matrix,
    arithmetic_of,
    bound_s,
    closed_form,
    make_batch,
    rates_of,
    work_of,
)
from costmodels.learned.store import POWER
from costmodels.learned.train_few import mape
from costmodels.learned.trees import Trees, joined, nothing, pack, scaled
from costmodels.learned.watts import LEAST_SHARE, UTILISATION, power_features, utilisation, watts_of
from costmodels.ops import FloatArray
from costmodels.power import demand_of, power_fit

_FOLDS = 7
#: Trees of the time in an operation's energy, where rows are few; elsewhere the family's own.
_TIMED, _MANY_ROWS = Setting(120, 31, 0.15, 4), 4000


def train_power(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """As `train_one`, for power: trees of (watts - idle) / (TDP - idle), from rows at steady power.

    The card's errors are of watts; `energy_mape` is that of watts times the time that trees fitted on the
    same groups predict.
    """
    assert problem.watts is not None
    if problem.own:
        return _train_utilisation(problem, seed)
    device, family = problem.device, problem.family
    choice = closed_form(family, device, problem.engine, problem.dtype)
    batch = make_batch(family, problem.raw, device, problem.engine, problem.dtype, choice)
    bound = bound_s(family, problem.raw, device, problem.dtype)
    features = power_features(batch, problem.seconds, bound)
    share = (problem.watts - device.idle_w) / (device.tdp_w - device.idle_w)
    fold = dealt(problem.group, _FOLDS)
    timed = family if len(share) >= _MANY_ROWS else _TIMED
    ratio = np.log(problem.seconds / batch.base_s)
    watts, seconds = np.zeros(len(share)), np.zeros(len(share))
    for number in range(_FOLDS):
        out = fold == number
        if out.any() and not out.all():
            guess = fit_power(features[~out], share[~out], family, seed).predict(features[out])
            watts[out] = device.idle_w + np.clip(guess, LEAST_SHARE, 1.0) * (device.tdp_w - device.idle_w)
            trees = boosted(batch.features[~out], ratio[~out], timed, seed)
            seconds[out] = batch.base_s[out] * np.exp(trees.predict(batch.features[out]))
    card = card_of(problem, batch, choice.fit.fitted_on, seed) | {
        **_judged(problem, watts),
        "data": f"measured power, {problem.engine} {problem.version}",
        "energy_mape": round(mape(np.log(problem.watts * problem.seconds / (watts * seconds))), 4),
    }
    return pack(fit_power(features, share, family, seed), card), card


def _train_utilisation(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """As `train_power`, of rows by our own profiler: a Gaussian process of the log of the share, by MFU and
    MBU. Between the rows it errs less than boosting, of which a few dozen rows are too few."""
    assert problem.watts is not None
    device, family = problem.device, problem.family
    choice = closed_form(family, device, problem.engine, problem.dtype)
    batch = make_batch(family, problem.raw, device, problem.engine, problem.dtype, choice)
    rates = rates_of(device, family, problem.dtype)
    used = utilisation(*work_of(family, problem.raw, problem.dtype), rates, problem.seconds)
    # Two watts above idle are as good as none: a share has a logarithm.
    above = np.maximum(problem.watts - device.idle_w, 2.0)
    target = np.log(above / (device.tdp_w - device.idle_w))
    fold = dealt(problem.group, _FOLDS)
    watts = np.full(len(target), float(np.exp(np.log(problem.watts).mean())))
    for number in range(_FOLDS):
        out = fold == number
        if out.any() and not out.all():
            trees = _by_utilisation(used[~out], target[~out], seed)
            watts[out] = watts_of(trees, _range(used[~out]), used[out], device, problem.dtype)
    card = card_of(problem, batch, choice.fit.fitted_on, seed) | {
        **_judged(problem, watts),
        "of": UTILISATION,
        "used": _range(used),
        "data": f"measured power, own runs, {problem.engine} {problem.version}",
    }
    return pack(_by_utilisation(used, target, seed), card), card


def _by_utilisation(used: Matrix, target: FloatArray, seed: int) -> Trees:
    return replace(nothing(), smooth=(fit_process(used, target, seed),))


def _range(used: Matrix) -> list[list[float]]:
    """Least and most of log2 MFU and log2 MBU that were measured."""
    return [used.min(axis=0).tolist(), used.max(axis=0).tolist()]


def _judged(problem: Problem, watts: FloatArray) -> dict[str, Any]:
    """What a card says of the watts that folds without a row's group predict for it."""
    assert problem.watts is not None
    error = np.log(problem.watts / watts)
    variance = float(np.sum((problem.watts - problem.watts.mean()) ** 2))
    return {
        "family": f"{POWER}{problem.family}",
        "split": f"whole groups by hash, {_FOLDS} folds; shipped fit on all; windows of a second",
        "mape": round(mape(error), 4),
        "p90": round(float(np.quantile(np.abs(np.expm1(-error)), 0.9)), 4),
        "median": round(float(np.median(np.abs(np.expm1(-error)))), 4),
        "r2": round(1.0 - float(np.sum((problem.watts - watts) ** 2)) / max(variance, 1e-9), 4),
        "closed_form_mape": round(float(np.mean(np.abs(_closed_watts(problem) / problem.watts - 1.0))), 4),
        "coverage": None,
        "interval": [[round(float(np.quantile(error, q)), 4) for q in (0.05, 0.95)]] * len(TIME_CLASSES),
    }


def fit_power(features: Matrix, share: FloatArray, family: str, seed: int) -> Trees:
    """The mean of trees by squared and by absolute errors: readings jump, and a mean follows every jump, a
    median none."""
    size = SETTINGS.get(f"{POWER}{family}", SETTINGS["power"])
    by_mean, by_median = (
        scaled(boosted(features, share, size, seed, absolute=absolute), 0.5) for absolute in (False, True)
    )
    return joined(by_mean, by_median)


def _closed_watts(problem: Problem) -> FloatArray:
    """Watts of `costmodels.power` for rows of a problem."""
    work, moved = work_of(problem.family, problem.raw, problem.dtype)
    rates = rates_of(problem.device, problem.family, problem.dtype)
    form = power_fit(problem.device, arithmetic_of(problem.dtype))
    mfu = np.clip(work / rates.peak / problem.seconds, 0.0, 1.0)
    mbu = np.clip(moved / rates.bandwidth / problem.seconds, 0.0, 1.0)
    device = problem.device
    return np.asarray(
        device.idle_w + (device.tdp_w - device.idle_w) * np.minimum(1.0, demand_of(form, mfu, mbu))
    )
