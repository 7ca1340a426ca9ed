"""Boosted trees, their sizes by family, and the only calls of the libraries that fit them.

LightGBM (extra `train`) takes half the time of scikit-learn and errs as much (decision 0020). Where it is not
installed, or cannot load (its wheels need the system's libgomp), scikit-learn fits: cards say which one did.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from costmodels.learned.grown import from_boosting, from_lightgbm, from_lightgbm_slopes
from costmodels.learned.trees import Trees, nothing, shortened
from costmodels.ops import FloatArray


class Setting(NamedTuple):
    """Size of a family's boosted trees. `share`: of the features that a tree may choose from
    (a split, by scikit-learn)."""

    trees: int
    leaves: int
    rate: float
    least: int  # rows in a leaf
    share: float = 1.0


#: By family: what fits the budget of a file. Kernels of decode attention switch often: large trees.
SETTINGS: dict[str, Setting] = {
    "gemm": Setting(264, 63, 0.115, 8, 0.6),
    "prefill": Setting(300, 31, 0.08, 8, 0.6),
    "decode": Setting(145, 95, 0.2, 8),
    "moe": Setting(188, 31, 0.1, 12),
    "mla_prefill": Setting(150, 15, 0.08, 8, 0.5),
    "mla_decode": Setting(300, 15, 0.1, 8),
    "bmm": Setting(200, 15, 0.1, 6),
    "power": Setting(160, 31, 0.11, 6),
    "power-prefill": Setting(100, 63, 0.14, 6, 0.7),
    "power-decode": Setting(80, 15, 0.15, 6, 0.7),
    "power-moe": Setting(80, 15, 0.15, 6),
    "spread": Setting(60, 15, 0.1, 30),
}
#: Thresholds a feature: more err no less, and the files are a fifth smaller than with 255.
_BINS = 64
_RIDGE = 0.3
#: What holds planes level.
_LEVEL = 1.0
#: A fit that only shows how far off it is has so many times fewer trees, each going so much further: of
#: half of them the error is 1 to 4 % larger (of a third 3 to 10 %).
_BRIEF = 2.0


@cache
def _lightgbm() -> ModuleType | None:
    try:
        return importlib.import_module("lightgbm")
    except (ImportError, OSError):
        return None


def library() -> str:
    """What grows boosted trees here."""
    return "scikit-learn" if _lightgbm() is None else "LightGBM"


def boosted(
    features: Any,
    target: FloatArray,
    family: str | Setting,
    seed: int,
    *,
    brief: bool = False,
    absolute: bool = False,
) -> Trees:
    """Trees of a family's size (or one that is given); `absolute`: of least absolute, not squared, errors."""
    size = _sized(family, brief)
    fit = _by_sklearn if _lightgbm() is None else _by_lightgbm
    return shortened(fit(features, np.asarray(target, np.float64), size, seed, absolute), features)


def sloping(features: Any, target: FloatArray, size: Setting, seed: int, *, brief: bool = False) -> Trees:
    """Trees whose leaves are planes over the features that their paths ask about (scikit-learn has none:
    there they are as flat as others)."""
    if _lightgbm() is None:
        return boosted(features, target, size, seed, brief=brief)
    size, target = _sized(size, brief), np.asarray(target, np.float64)
    base = float(np.mean(target))
    booster = _boosted(features, target - base, size, seed, {"linear_tree": True, "linear_lambda": _LEVEL})
    return replace(nothing(), smooth=(from_lightgbm_slopes(booster, base, features),))


def _sized(family: str | Setting, brief: bool) -> Setting:
    size = SETTINGS[family] if isinstance(family, str) else family
    cut = _BRIEF if brief else 1.0
    return size._replace(trees=int(size.trees / cut), rate=size.rate * cut)


def _by_lightgbm(features: Any, target: FloatArray, size: Setting, seed: int, absolute: bool) -> Trees:
    base = float(np.median(target) if absolute else np.mean(target))
    more = {"objective": "l1"} if absolute else {}
    return from_lightgbm(_boosted(features, target - base, size, seed, more), base)


def _boosted(features: Any, target: FloatArray, size: Setting, seed: int, more: dict[str, Any]) -> Any:
    """LightGBM's booster."""
    import lightgbm

    settings = {
        "objective": "l2", "num_leaves": size.leaves, "learning_rate": size.rate,
        "min_data_in_leaf": size.least, "min_sum_hessian_in_leaf": 0.0, "lambda_l2": _RIDGE,
        "feature_fraction": size.share, "max_bin": _BINS, "min_data_in_bin": 1, "seed": seed,
        # Processes share the work; threads of one fit would only wait for each other.
        "num_threads": 1, "deterministic": True, "force_row_wise": True, "boost_from_average": False,
        "verbose": -1, **more,
    }  # fmt: skip
    rows = lightgbm.Dataset(features, target, params=settings)
    return lightgbm.train(settings, rows, num_boost_round=size.trees)


def _by_sklearn(features: Any, target: FloatArray, size: Setting, seed: int, absolute: bool) -> Trees:
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    model = HistGradientBoostingRegressor(
        loss="absolute_error" if absolute else "squared_error", max_iter=size.trees,
        max_leaf_nodes=size.leaves, learning_rate=size.rate, min_samples_leaf=size.least,
        max_features=size.share, l2_regularization=_RIDGE, max_bins=_BINS, early_stopping=False,
        random_state=seed,
    )  # fmt: skip
    with threadpool_limits(1, "openmp"):
        model.fit(features, target)
    return from_boosting(model)
