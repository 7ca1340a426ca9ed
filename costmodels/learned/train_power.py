"""Fitting power: trees of (watts - idle) / (TDP - idle), from rows at steady power."""

from __future__ import annotations

from typing import Any

import numpy as np

from costmodels.learned.boosting import SETTINGS, Setting, boosted
from costmodels.learned.cards import card_of
from costmodels.learned.data import Problem
from costmodels.learned.judging import dealt
from costmodels.learned.shapes import (
    FORMATS,
    TIME_CLASSES,
    Matrix,
    bound_s,
    closed_form,
    make_batch,
    rates_of,
    work_of,
)
from costmodels.learned.store import POWER
from costmodels.learned.train_few import mape
from costmodels.learned.trees import Trees, joined, pack, scaled
from costmodels.learned.watts import power_features
from costmodels.ops import FloatArray
from costmodels.power import POWER_FITS

_FOLDS = 7
#: Trees of the time in an operation's energy, where rows are few; elsewhere the family's own.
_TIMED, _MANY_ROWS = Setting(120, 31, 0.15, 4), 4000


def train_power(problem: Problem, seed: int) -> tuple[bytes, dict[str, Any]]:
    """As `train_one`, for power: trees of (watts - idle) / (TDP - idle), from rows at steady power.

    The card's errors are of watts; `energy_mape` is that of watts times the time that trees fitted on the
    same groups predict.
    """
    assert problem.watts is not None
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
            watts[out] = device.idle_w + np.clip(guess, 0.02, 1.0) * (device.tdp_w - device.idle_w)
            trees = boosted(batch.features[~out], ratio[~out], timed, seed)
            seconds[out] = batch.base_s[out] * np.exp(trees.predict(batch.features[out]))
    error = np.log(problem.watts / watts)
    variance = float(np.sum((problem.watts - problem.watts.mean()) ** 2))
    card = card_of(problem, batch, choice.fit.fitted_on, seed) | {
        "family": f"{POWER}{family}",
        "split": f"whole groups by hash, {_FOLDS} folds; shipped fit on all; windows of a second",
        "data": f"measured power, {problem.engine} {problem.version}",
        "mape": round(mape(error), 4),
        "p90": round(float(np.quantile(np.abs(np.expm1(-error)), 0.9)), 4),
        "median": round(float(np.median(np.abs(np.expm1(-error)))), 4),
        "r2": round(1.0 - float(np.sum((problem.watts - watts) ** 2)) / max(variance, 1e-9), 4),
        "energy_mape": round(mape(np.log(problem.watts * problem.seconds / (watts * seconds))), 4),
        "closed_form_mape": round(float(np.mean(np.abs(_closed_watts(problem) / problem.watts - 1.0))), 4),
        "coverage": None,
        "interval": [[round(float(np.quantile(error, q)), 4) for q in (0.05, 0.95)]] * len(TIME_CLASSES),
    }
    return pack(fit_power(features, share, family, seed), card), card


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
    form = POWER_FITS.get(FORMATS[problem.dtype][2] if problem.dtype != "any" else "bf16", POWER_FITS["bf16"])
    mfu = np.clip(work / rates.peak / problem.seconds, 0.0, 1.0)
    mbu = np.clip(moved / rates.bandwidth / problem.seconds, 0.0, 1.0)
    demand = form.live + form.compute * np.sqrt(mfu) + form.memory * np.sqrt(mbu)
    device = problem.device
    return np.asarray(device.idle_w + (device.tdp_w - device.idle_w) * np.minimum(1.0, demand))
