"""How far off a predictor is, on groups that it never saw, and how far off its next answer may be.

Whole groups (pairs of N and K, head layouts, expert shapes) are held out in turn: the error on them is what a
card reports, and what ships is fitted on all of them.

Interval: conformal (Vovk et al., 2005), across the folds and normalised (Lei et al., 2018). Trees fitted on
the sizes of the left-out errors say how far off a row may be; the quantiles of left-out errors in that unit,
by class of size and corrected for the number of groups, become the interval. Coverage is that of intervals
made without the fold they are judged on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.learned.boosting import boosted
from costmodels.learned.data import Problem
from costmodels.learned.fitting import fit
from costmodels.learned.groups import dealt
from costmodels.learned.shapes import COLUMNS, TIME_CLASSES, Batch, time_class
from costmodels.learned.store import LEAST_SPREAD
from costmodels.learned.train_few import Few, fit_few
from costmodels.learned.trees import Trees
from costmodels.ops import FloatArray

_NOMINAL = 0.90
_LEAST_CLASS = 150
#: Share of the rows that an interval should hold in the worst tenth of the groups; the share of all at which
#: it is wide enough whatever these say; and by how much it is widened in turn.
_WORST_TENTH, _WIDEST = 0.80, 0.93
_WIDER = tuple(1.0 + 0.02 * step for step in range(16))
#: Of few groups the finite-sample correction asks for almost the widest error there was; where rows left out
#: lie inside more often than this, it is narrowed until they do not, to no less than this share.
_OFTEN, _NARROWEST = 0.915, 0.3
_FEW_GROUPS, _FEW_FOLDS, _FOLDS = 60, 5, 3
#: Errors fall with the share of the groups that are fitted on as share^-0.35, and faster where kernels switch
#: often or scale by blocks, and where a final fit gains most from its longer training (measured on GEMM and
#: attention of six devices, on groups that nothing is judged by): folds err by so much more than what ships.
_LEARNING = 0.35
_LEARNING_OF = {
    ("decode", "any"): 0.85, ("gemm", "fp8_block"): 0.55, ("gemm", "fp4"): 0.55,
    ("gemm", "bf16"): 0.5, ("prefill", "any"): 0.5,
}  # fmt: skip
#: A user's few rows teach less of GEMMs (six devices, 133 and 200 rows: by 0.2), of attention as much.
_LEARNING_FEW = {"gemm": 0.2}
_CUTS = ("intermediate", "local_experts", "heads", "kv_heads", "n", "k")


def interval(error: FloatArray, base_s: FloatArray, label: Any) -> list[tuple[float, float]]:
    """(low, high) of errors for each class of size, at the 90 % level.

    Rows of a group err alike, so some groups would hardly be covered: where that is so, the interval is
    wider than the level alone asks for, as far as `_WIDEST` allows.
    """
    names, group = np.unique(label, return_inverse=True)
    groups = len(names)

    def quantiles(values: FloatArray) -> tuple[float, float]:
        # The finite-sample correction of split conformal prediction, on both sides. Rows of a group err
        # alike, so the sample is as large as its groups.
        level = (1.0 + min(1.0, (1.0 + 1.0 / groups) * _NOMINAL)) / 2.0
        return float(np.quantile(values, 1.0 - level)), float(np.quantile(values, level))

    whole = quantiles(error) if len(error) else (-0.5, 0.5)
    classes = time_class(base_s)
    found = []
    for number in range(len(TIME_CLASSES)):
        own = error[classes == number]
        found.append(quantiles(own) if len(own) >= _LEAST_CLASS else whole)
    if groups < _FEW_GROUPS:
        return found
    low, high = np.array(found)[classes].T
    for wider in _WIDER:
        share = (error >= wider * low) & (error <= wider * high)
        by_group = np.sort(np.bincount(group, share) / np.bincount(group))
        if by_group[: max(1, groups // 10)].mean() >= _WORST_TENTH or share.mean() >= _WIDEST:
            break
    return [(wider * a, wider * b) for a, b in found]


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What folds say of a problem's predictor.

    error [n]: log(measured / predicted) by fits that never saw the row's group. inside [n]: whether it lies
    in an interval made without its fold. bounds, spread: the interval of what is fitted on all rows.
    """

    error: FloatArray
    inside: npt.NDArray[np.bool_]
    bounds: list[tuple[float, float]]
    spread: Trees | None
    folds: int


def held_out(problem: Problem) -> tuple[Any, npt.NDArray[np.int64]]:
    """The group and the fold of each row: of few groups (expert shapes of a dozen models) more folds, so that
    enough is left to fit on."""
    label = np.asarray(problem.group).astype(str)
    if len(np.unique(label)) < _FEW_FOLDS:
        # Measured for a model or two: then what is held out are its ways of being cut.
        cuts = problem.raw[:, [i for i, name in enumerate(COLUMNS[problem.family]) if name in _CUTS]]
        label = np.array(["/".join(f"{value:g}" for value in row) for row in cuts])
    return label, dealt(label, _FOLDS if len(np.unique(label)) >= _FEW_GROUPS else _FEW_FOLDS)


def judge(batch: Batch, problem: Problem, seed: int, few: Few | None = None) -> Judged:
    """Hold every group out once, and learn from the errors how far off a prediction may be."""
    base = batch.base_s
    log_ratio = np.log(problem.seconds / base)
    label, fold = held_out(problem)
    names, folds = np.unique(label), max(2, int(fold.max()) + 1)
    parts = [out for out in (fold == number for number in range(folds)) if out.any() and not out.all()]
    error = log_ratio.copy()
    for out in parts:
        trial = (
            fit(problem, batch, seed, ~out, brief=True)
            if few is None
            else fit_few(batch, problem.seconds, seed, few, ~out)
        )
        error[out] = log_ratio[out] - trial.predict(batch.features[out])
    # Of few groups or rows, what is learned of the spread misleads.
    learns = few is None and len(names) >= _FEW_GROUPS
    unit = np.ones(len(error))
    for out in parts if learns else ():
        trees = _fit_spread(batch.features[~out], error[~out], seed, brief=True)
        unit[out] = np.clip(trees.predict(batch.features[out]), LEAST_SPREAD, 1.0)
    reach = np.zeros(len(error))  # of an interval made without the row's fold: 1 at its end
    for out in parts:
        bounds = interval((error / unit)[~out], base[~out], label[~out])
        low, high = np.array(bounds)[time_class(base[out])].T * unit[out]
        reach[out] = error[out] / np.where(error[out] < 0.0, np.minimum(low, -1e-9), np.maximum(high, 1e-9))
    narrow = 1.0
    if len(names) < _FEW_GROUPS:
        narrow = float(np.clip(np.quantile(reach, _OFTEN), _NARROWEST, 1.0))
    inside = reach <= narrow
    learning = _LEARNING_OF.get(problem.kind, _LEARNING)
    if few is not None:
        learning = _LEARNING_FEW.get(problem.family, learning)
    less = narrow * ((folds - 1) / folds) ** learning
    return Judged(
        error,
        inside,
        [(less * low, less * high) for low, high in interval(error / unit, base, label)],
        _fit_spread(batch.features, error, seed) if learns else None,
        folds,
    )


def _fit_spread(features: Any, error: FloatArray, seed: int, *, brief: bool = False) -> Trees:
    """Trees of |error|; broken rows count as no more than what one row in a hundred reaches."""
    size = np.abs(error)
    return boosted(features, np.minimum(size, np.quantile(size, 0.99)), "spread", seed, brief=brief)
