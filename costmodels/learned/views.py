"""Which features a predictor learns from: those that say how much work there is, or also who asks for it.

Kernels of decode attention deal out (sequence, KV head) pairs: 8 sequences of a layout with 4 KV heads are to
many of them what 4 sequences of one with 8 are. Trees that see sequences and heads apart learn of each
layout by itself; trees that see their product alone have met a new layout's work in others. Other kernels do
look at the sequences (how they cut a context), and some at the heads. Which holds for a table, its own rows
say: quick fits hold out whole layouts, and rows of layouts that they know, as both are asked for later. The
view that errs least on both is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from costmodels.learned.boosting import Setting, boosted
from costmodels.learned.groups import dealt
from costmodels.learned.shapes import Matrix
from costmodels.ops import FloatArray

#: Places of features that tell layouts of equal work apart: sequences, and how often two divides them, and
#: sequences times context; heads; KV heads (see `shapes`).
_SEQUENCES, _HEADS, _KV_HEADS = (0, 10, 12), (3,), (4,)
#: By family: features that are left out, from none on.
VIEWS: Mapping[str, Sequence[tuple[int, ...]]] = {
    "decode": (
        (),
        (*_SEQUENCES, *_HEADS, *_KV_HEADS),
        (*_SEQUENCES[1:], *_HEADS, *_KV_HEADS),
        (*_SEQUENCES[1:], *_HEADS),
    ),
}
_QUICK = Setting(60, 63, 0.3, 8)
#: Folds of groups, each held out once, and of rows, one of which is.
_FOLDS = 3


def chosen_view(features: Matrix, target: FloatArray, groups: Any, family: str, seed: int) -> Matrix:
    """The same features [n, f], those that this table is better predicted without set to zero."""
    views = VIEWS.get(family, ((),))
    if len(views) == 1:
        return features
    fold = dealt(groups, _FOLDS)
    unseen = [fold == number for number in range(_FOLDS)]
    if any(out.all() or not out.any() for out in unseen):
        return features
    seen = [np.random.default_rng(seed).permutation(len(target)) % _FOLDS == 0]
    names, own = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    shown = [without(features, hidden) for hidden in views]
    errors = np.zeros((len(views), len(names)))
    for outs in (unseen, seen):
        missed = np.array([_missed(part, target, outs, own, seed) for part in shown])
        errors += missed / missed[0].mean()
    best = int(np.argmin(errors.mean(axis=1)))
    gain = errors[0] - errors[best]
    # By less than its standard error nothing is gained (the rule of Breiman et al., 1984).
    return shown[best] if gain.mean() > gain.std() / np.sqrt(len(names)) else features


def _missed(features: Matrix, target: FloatArray, outs: Any, own: Any, seed: int) -> FloatArray:
    """[groups] mean size of the errors of quick fits on rows that they left out: a group's rows err alike."""
    total, count = np.zeros(own.max() + 1), np.zeros(own.max() + 1)
    for out in outs:
        trees = boosted(features[~out], target[~out], _QUICK, seed)
        error = np.abs(target[out] - trees.predict(features[out]))
        total += np.bincount(own[out], error, len(total))
        count += np.bincount(own[out], minlength=len(count))
    return np.asarray(total / np.maximum(count, 1.0), np.float64)


def without(features: Matrix, hidden: Sequence[int]) -> Matrix:
    """The same features, some set to zero: no tree asks about what never differs."""
    shown = features.copy()
    shown[:, list(hidden)] = 0.0
    return shown
