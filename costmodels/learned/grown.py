"""Trees that libraries have grown, as flat arrays: LightGBM's and scikit-learn's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.learned.slopes import LEAF
from costmodels.learned.trees import Matrix, Sloped, Trees, flat, sloped

Columns = tuple[npt.NDArray[Any], ...]


def from_lightgbm(booster: Any, base: float = 0.0) -> Trees:
    """A fitted LightGBM booster, read from the text that it saves, upon `base`."""
    return _together([_in_preorder(*_lightgbm_tree(told)) for told in _lightgbm_text(booster)], base)


def from_lightgbm_slopes(booster: Any, base: float, features: Matrix) -> Sloped:
    """A fitted LightGBM booster whose leaves are planes; `features` [n, f]: the rows it was fitted on."""
    trees, leaves = [], []
    for told in _lightgbm_text(booster):
        leaf, children, feature, threshold, value = _lightgbm_tree(told)
        value[leaf] = np.arange(leaf.sum())  # to find each leaf again where it will stand
        trees.append(_in_preorder(leaf, children, feature, threshold, value))
        constant = np.array(told.get("leaf_const", told["leaf_value"]).split(), np.float64)
        counts = np.array(told.get("num_features", "0 " * leaf.sum()).split(), np.int64)
        ends = np.cumsum(counts)
        leans = np.array(told.get("leaf_features", "").split(), np.int64)
        slopes = np.array(told.get("leaf_coeff", "").split(), np.float64)
        names, thresholds, places = trees[-1]
        trees[-1] = names, thresholds, np.zeros(len(places))
        for at in places[names == LEAF].astype(np.int64):
            own = slice(ends[at] - counts[at], ends[at])
            leaves.append((constant[at], leans[own], slopes[own]))
    found = sloped(_together(trees, base), leaves, features)
    # Levels are rounded to whole steps: what is left of that on average the base takes back.
    moved = float(np.mean(found.predict(features) - booster.predict(features))) - base
    return replace(found, trees=replace(found.trees, base=found.trees.base - moved))


def _lightgbm_text(booster: Any) -> Iterator[dict[str, str]]:
    """What the text of each tree tells."""
    for text in booster.model_to_string().split("\nTree=")[1:]:
        yield dict(line.split("=", 1) for line in text.split("\n") if "=" in line)


def _lightgbm_tree(told: dict[str, str]) -> tuple[Any, Any, Any, Any, Any]:
    """leaf, children, feature, threshold and value of a tree's nodes, the root first."""
    values = np.array(told["leaf_value"].split(), np.float64)
    inner = len(values) - 1
    leaf = np.arange(2 * inner + 1) >= inner
    children = np.zeros((len(leaf), 2), np.int64)
    feature, threshold, value = np.full(len(leaf), LEAF), *np.zeros((2, len(leaf)))
    value[leaf] = values
    if inner:
        feature[~leaf] = np.array(told["split_feature"].split(), np.int64)
        threshold[~leaf] = np.array(told["threshold"].split(), np.float64)
        sides = np.array([told[side].split() for side in ("left_child", "right_child")], np.int64).T
        # A leaf is a child below zero, ~0 the first of them: here they stand behind the inner nodes.
        children[~leaf] = np.where(sides < 0, inner + ~sides, sides)
    return leaf, children, feature, threshold, value


def from_boosting(model: Any) -> Trees:
    """A fitted scikit-learn HistGradientBoostingRegressor."""
    trees = []
    for (predictor,) in model._predictors:
        nodes = predictor.nodes
        leaf = nodes["is_leaf"].astype(bool)
        children = np.stack([nodes["left"], nodes["right"]], axis=1).astype(np.int64)
        feature = np.where(leaf, LEAF, nodes["feature_idx"])
        threshold, value = np.where(leaf, 0.0, nodes["num_threshold"]), np.where(leaf, nodes["value"], 0.0)
        trees.append(_in_preorder(leaf, children, feature, threshold, value))
    return _together(trees, float(np.ravel(model._baseline_prediction)[0]))


def from_forest(model: Any, weight: float = 1.0) -> Trees:
    """`weight` times the mean of a fitted scikit-learn forest, as a sum of small leaves."""
    trees = []
    for estimator in model.estimators_:
        tree = estimator.tree_
        leaf = tree.children_left < 0
        children = np.stack([tree.children_left, tree.children_right], axis=1).astype(np.int64)
        value = np.where(leaf, tree.value[:, 0, 0] * weight / len(model.estimators_), 0.0)
        feature, threshold = np.where(leaf, LEAF, tree.feature), np.where(leaf, 0.0, tree.threshold)
        trees.append(_in_preorder(leaf, children, feature, threshold, value))
    return _together(trees, 0.0)


def _in_preorder(
    leaf: npt.NDArray[np.bool_], children: npt.NDArray[np.int64], feature: Any, threshold: Any, value: Any
) -> Columns:
    """feature, threshold and value of a tree's nodes, whose root is node 0, where a node's left child comes
    next and its right one after the left branch."""
    ends, pairs = leaf.tolist(), children.tolist()
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        if not ends[node]:
            left, right = pairs[node]
            stack += [right, left]
    return feature[order], threshold[order], value[order]


def _together(trees: list[Columns], base: float) -> Trees:
    """All trees' nodes one after the other."""
    feature, threshold, value = (np.concatenate(column) for column in zip(*trees, strict=True))
    return flat(feature.astype(np.uint8), threshold.astype(np.float32), value, base)
