"""Boosted trees, their sizes by family, and the only call of scikit-learn that fits them."""

from __future__ import annotations

from typing import Any, NamedTuple

from costmodels.learned.net import Net
from costmodels.learned.trees import Trees, from_boosting, shortened
from costmodels.ops import FloatArray


class Setting(NamedTuple):
    """Size of a family's boosted trees. `share`: of the features that a split may choose from."""

    trees: int
    leaves: int
    rate: float
    least: int  # rows in a leaf
    share: float = 1.0


#: By family: what fits the budget of a file. Kernels of decode attention switch often: large trees.
SETTINGS: dict[str, Setting] = {
    "gemm": Setting(272, 63, 0.115, 8, 0.4),
    "prefill": Setting(300, 31, 0.08, 8, 0.3),
    "decode": Setting(300, 95, 0.12, 8),
    "moe": Setting(200, 31, 0.1, 12),
    "mla_prefill": Setting(150, 15, 0.08, 8, 0.3),
    "mla_decode": Setting(300, 15, 0.1, 8),
    "bmm": Setting(200, 15, 0.1, 6),
    "power": Setting(160, 31, 0.11, 6, 0.3),
    "power-prefill": Setting(100, 63, 0.14, 6, 0.3),
    "power-decode": Setting(80, 15, 0.15, 6, 0.3),
    "power-moe": Setting(80, 15, 0.15, 6, 0.3),
    "spread": Setting(60, 15, 0.1, 30),
}
#: Thresholds a feature: more err no less, and the files are a fifth smaller than with 255.
_BINS = 64
#: A fit that only shows how far off it is has so many times fewer trees, each going so much further: of
#: half of them the error is 1 to 4 % larger (of a third 3 to 10 %).
_BRIEF = 2.0


def boosted(
    features: Any,
    target: FloatArray,
    family: str | Setting,
    seed: int,
    net: Net | None = None,
    *,
    brief: bool = False,
    loss: str = "squared_error",
) -> Trees:
    """Trees of a family's size (or one that is given), by scikit-learn."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    size = SETTINGS[family] if isinstance(family, str) else family
    cut = _BRIEF if brief else 1.0
    model = HistGradientBoostingRegressor(
        loss=loss, max_iter=int(size.trees / cut), max_leaf_nodes=size.leaves, learning_rate=size.rate * cut,
        min_samples_leaf=size.least, max_features=size.share, l2_regularization=0.3, max_bins=_BINS,
        early_stopping=False, random_state=seed,
    )  # fmt: skip
    # Processes share the work; threads of one fit would only wait for each other.
    with threadpool_limits(1, "openmp"):
        model.fit(features, target)
    return shortened(from_boosting(model, (net,) if net is not None else ()), features)
