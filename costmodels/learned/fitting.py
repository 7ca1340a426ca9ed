"""Fitting one predictor of time: measured rows to trees, and what stands beside them.

Target: log(measured / closed form). Attention over prompts is first fitted by a small network, as it varies
smoothly with sizes; trees fit the rest, and everything else. A GEMM's answer is the mean of two: trees on
physics alone, and trees that also see what was measured around it.

This and its neighbours `boosting`, `train_*`, `net` and `process` are the only door to scikit-learn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from costmodels.learned.boosting import SETTINGS, Setting, boosted
from costmodels.learned.data import Problem
from costmodels.learned.neighbours import measured_around
from costmodels.learned.net import fit_net
from costmodels.learned.shapes import Batch, Matrix, closed_form, make_batch
from costmodels.learned.transposed import transposed
from costmodels.learned.trees import Beside, Trees, scaled
from costmodels.ops import FloatArray

#: Families whose trees correct a network.
SMOOTH = ("prefill", "mla_prefill")
#: Where half of the answer knows what was measured near by, each half with this share of the family's trees.
#: GEMMs of 16 bits gain 5 %; those of narrow formats 2 %, which is not worth a table in every file.
GRIDDED, _HALF = (("gemm", "bf16"),), 0.45
#: Residuals beyond this (a factor of 12) are broken rows, not kernels.
_WILD = 2.5
#: Trees that say what lies beyond the measured tokens without having seen it.
_GUESS = Setting(60, 31, 0.3, 8, 0.4)


def fit(problem: Problem, batch: Batch, seed: int, rows: Any = None, *, brief: bool = False) -> Trees:
    """Trees on (some) rows of a problem, whose features `batch` holds.

    `brief`: fewer and coarser ones, to see how far off they are.
    """
    family, seconds = problem.family, problem.seconds
    chosen = np.ones(len(seconds), dtype=bool) if rows is None else rows
    features, target = batch.features[chosen], np.log(seconds[chosen] / batch.base_s[chosen])
    sound = np.abs(target - np.median(target)) < _WILD
    features, target = features[sound], target[sound]
    net = fit_net(features, target, seed, brief=brief) if family in SMOOTH else None
    if net is not None:
        target = target - net.predict(features)
    near = measured_around(features, target) if problem.kind in GRIDDED else None
    if family == "gemm" and not brief:
        features, target = _and_beyond(problem, batch, chosen, features, target, seed)
    if near is None:
        return boosted(features, target, family, seed, net, brief=brief)
    size = SETTINGS[family]
    half = size._replace(trees=int(size.trees * _HALF))
    rows_near = np.column_stack([features, near.columns(features)])
    plain, more = (boosted(part, target, half, seed, brief=brief) for part in (features, rows_near))
    return replace(scaled(plain, 0.5), smooth=(Beside(near, scaled(more, 0.5)),))


def _and_beyond(
    problem: Problem, batch: Batch, chosen: Any, features: Matrix, target: FloatArray, seed: int
) -> tuple[Matrix, FloatArray]:
    """Rows and targets, and beside them GEMMs of more tokens than were measured (`transposed`)."""
    raw, seconds = transposed(problem, batch.raw[chosen], problem.seconds[chosen], seed)
    if not len(raw):
        return features, target
    choice = closed_form(problem.family, problem.device, problem.engine, problem.dtype)
    far = make_batch(problem.family, raw, problem.device, problem.engine, problem.dtype, choice)
    # Half way to what trees say that never saw them: each alone errs to its own side.
    without = boosted(features, target, _GUESS, seed).predict(far.features)
    middle = (np.log(seconds / far.base_s) + without) / 2.0
    return np.concatenate([features, far.features]), np.concatenate([target, middle])
