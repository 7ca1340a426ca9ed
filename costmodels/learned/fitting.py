"""Fitting one predictor of time: measured rows to trees, and what stands beside them.

Target: log(measured / closed form). Attention over prompts is first fitted by a small network, as it varies
smoothly with sizes; trees fit the rest. The answer for a GEMM and for experts is the mean of two: trees on
physics alone, and trees that correct a network, or in 16 bits also see what was measured around a GEMM; in
fp8 it is the mean of three, the last of them trees whose leaves slope. That for decode attention is the mean
of trees with flat leaves and of trees with sloping ones, on features that its table chooses (`views`); that
for a table of few rows the mean of trees and a Gaussian process.

This and its neighbours `boosting`, `train_*`, `net` and `process` are the only door to scikit-learn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.learned.boosting import SETTINGS, Setting, boosted, sloping
from costmodels.learned.data import Problem
from costmodels.learned.neighbours import measured_around
from costmodels.learned.net import LARGE, SMALL, Layers, fit_net
from costmodels.learned.process import QUICK, fit_process
from costmodels.learned.shapes import Batch, Matrix, closed_form, make_batch
from costmodels.learned.train_few import FEW_ROWS
from costmodels.learned.transposed import transposed
from costmodels.learned.trees import Beside, Hedged, Trees, nothing, scaled
from costmodels.learned.views import chosen_view
from costmodels.ops import FloatArray

#: Families whose trees correct a network.
SMOOTH = ("prefill", "mla_prefill")
#: Where half of the answer knows what was measured near by, each half with this share of the family's trees.
#: GEMMs of 16 bits gain 5 %; those of narrow formats 2 %, which is not worth a table in every file.
GRIDDED, _HALF = (("gemm", "bf16"),), 0.45
#: Families whose other predictors are the mean of two: trees alone, and trees that correct a small network.
#: They err apart: GEMMs of narrow formats gain 2 to 30 %, experts of models never seen 10.
HEDGED = ("gemm", "moe")
#: Decode attention is a mean of flat trees and of trees whose leaves slope (decision 0023), with the weight
#: of these. Time rises with every size there, which flat leaves can only follow in stairs.
_SLOPES, _SLOPING = Setting(100, 95, 0.2, 12), 0.7
#: Of GEMMs in fp8: the sizes of the flat trees, alone and upon a network, and of sloping ones. Other formats
#: gain nothing by three parts.
_IN_FP8, _SLOPES_FP8 = Setting(80, 63, 0.15, 8, 0.6), Setting(60, 63, 0.25, 50)
#: Few rows are told apart by few others: small leaves. Trees hold what they saw at an edge, where a process
#: falls back to its mean: it errs less within what was measured, and by half more beyond.
_FEW, _FEW_APART = Setting(120, 15, 0.15, 3, 0.5), 0.2
#: Log units that the one with the network may lie off the other one: of two dozen expert tables, the four
#: whose networks ran wild on models never seen then lose little.
_APART = 0.3
#: A row so many log units (a factor of 12) off the median is a broken reading unless two of the six rows
#: nearest to it in size lie within a factor of e of it: kernels that fall off a cliff do so together.
_WILD, _NEAR, _AGREE, _WITHIN = 2.5, 6, 2, 1.0
#: Trees that say what lies beyond the measured tokens without having seen it.
_GUESS = Setting(120, 31, 0.15, 8, 0.4)


def fit(problem: Problem, batch: Batch, seed: int, rows: Any = None, *, brief: bool = False) -> Trees:
    """Trees on (some) rows of a problem, whose features `batch` holds.

    `brief`: fewer and coarser ones, to see how far off they are.
    """
    family, seconds = problem.family, problem.seconds
    chosen = np.ones(len(seconds), dtype=bool) if rows is None else rows
    features, target = batch.features[chosen], np.log(seconds[chosen] / batch.base_s[chosen])
    sound = like_its_neighbours(batch.raw[chosen], target)
    features, target = features[sound], target[sound]
    if len(seconds) < FEW_ROWS:
        process = replace(nothing(), smooth=(fit_process(features, target, seed, QUICK),))
        trees = boosted(features, target, _FEW, seed)
        return _hedged(trees, process, _FEW_APART, features)
    if family in SMOOTH:
        return _upon_net(features, target, family, LARGE, seed, brief)
    near = measured_around(features, target) if problem.kind in GRIDDED else None
    measured = features, target
    if family == "gemm" and not brief:
        features, target = _and_beyond(problem, batch, chosen, features, target, seed)
    size = SETTINGS[family]
    half = size._replace(trees=int(size.trees * _HALF))
    if family == "decode":
        shown = chosen_view(features, target, np.asarray(problem.group)[chosen][sound], family, seed)
        first = boosted(shown, target, size, seed, brief=brief)
        second = sloping(shown, target, _SLOPES, seed, brief=brief)
        return _hedged(first, second, _APART, features, share=_SLOPING)
    if problem.kind == ("gemm", "fp8"):
        first = boosted(features, target, _IN_FP8, seed, brief=brief)
        upon_net = _upon_net(*measured, _IN_FP8, SMALL, seed, brief)
        second = _hedged(upon_net, sloping(*measured, _SLOPES_FP8, seed, brief=brief), _APART, measured[0])
        return _hedged(first, second, _APART, measured[0], share=2 / 3)
    if near is None and family in HEDGED:
        first = boosted(features, target, half, seed, brief=brief)
        second = _upon_net(*measured, half, SMALL, seed, brief)
        return _hedged(first, second, _APART, measured[0])
    if near is None:
        return boosted(features, target, size, seed, brief=brief)
    rows_near = np.column_stack([features, near.columns(features)])
    plain, more = (boosted(part, target, half, seed, brief=brief) for part in (features, rows_near))
    return replace(scaled(plain, 0.5), smooth=(Beside(near, scaled(more, 0.5)),))


def like_its_neighbours(raw: FloatArray, target: FloatArray) -> npt.NDArray[np.bool_]:
    """[n] whether rows are readings of a kernel: near the median, or as far off it as rows of like size."""
    sound = np.ones(len(target), dtype=bool)
    far = np.flatnonzero(np.abs(target - np.median(target)) > _WILD)
    if not len(far):
        return sound
    from scipy.spatial import cKDTree

    sizes = np.log2(np.maximum(raw, 0.5))
    spread = sizes.std(axis=0)
    sizes = sizes / np.where(spread > 0.0, spread, 1.0)
    _, near = cKDTree(sizes).query(sizes[far], min(_NEAR + 1, len(target)))
    agree = (np.abs(target[near] - target[far, None]) < _WITHIN).sum(axis=1) - 1  # a row agrees with itself
    sound[far] = agree >= _AGREE
    return sound


def _hedged(first: Trees, second: Trees, apart: float, measured: Matrix, share: float = 0.5) -> Trees:
    """Between both within the measured tokens (the first feature); the second knows nothing beyond."""
    return replace(nothing(), smooth=(Hedged(first, second, apart, float(measured[:, 0].max()), share),))


def _upon_net(
    features: Matrix, target: FloatArray, size: str | Setting, layers: Layers, seed: int, brief: bool
) -> Trees:
    """A network, and trees that correct it."""
    net = fit_net(features, target, seed, layers, brief=brief)
    trees = boosted(features, target - net.predict(features), size, seed, brief=brief)
    return replace(trees, smooth=(net,))


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
