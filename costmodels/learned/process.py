"""A Gaussian process on a few hundred rows, as flat arrays: what a user's own measurements teach.

Matern kernel of order 3/2 with a length for every feature (Rasmussen and Williams, 2006, 4.2.1 and 5.1). Its
answer is a weighted sum over the rows that it was fitted on; features are standardised and held inside the
fitted range, as nothing is known beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
#: Rows that the lengths are searched on, steps of that search, and rows answered at once.
_SEARCHED, _STEPS, _CHUNK = 200, 15, 2048
_LENGTHS = (0.3, 1e3)


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """mean, scale, low, high, length [f] of the features; anchors [n, f], standardised; weights [n];
    prediction is base + kernel @ weights."""

    mean: Matrix
    scale: Matrix
    low: Matrix
    high: Matrix
    length: Matrix
    anchors: Matrix
    weights: npt.NDArray[np.float32]
    base: float

    def predict(self, features: Matrix) -> npt.NDArray[np.float64]:
        """[n] predictions of features [n, f]."""
        rows = np.clip((features - self.mean) / self.scale, self.low, self.high).astype(np.float64)
        rows = rows / self.length
        anchors = self.anchors.astype(np.float64) / self.length
        squared = (anchors**2).sum(axis=1)
        found = np.empty(len(rows))
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            # Large weights cancel, so that BLAS, which adds up in another order for other sizes of a batch,
            # would make an answer hang on what it was asked with.
            products = np.einsum("nf,af->na", part, anchors)
            apart = (part**2).sum(axis=1)[:, None] + squared - 2.0 * products
            far = np.sqrt(3.0 * np.maximum(apart, 0.0))
            found[start : start + _CHUNK] = ((1.0 + far) * np.exp(-far) * self.weights).sum(axis=1)
        return np.asarray(found + self.base)

    def scaled(self, factor: float) -> Process:
        """The same, `factor` times as large."""
        return replace(self, weights=(self.weights * np.float32(factor)), base=self.base * factor)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays that `from_arrays` takes."""
        columns = np.stack([self.mean, self.scale, self.low, self.high, self.length]).astype(np.float32)
        return {
            "columns": columns, "anchors": np.ascontiguousarray(self.anchors.T), "weights": self.weights,
            "base": np.array([self.base]),
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Process:
        """The process that `arrays` describes."""
        mean, scale, low, high, length = arrays["columns"]
        base = float(arrays["base"][0])
        return cls(mean, scale, low, high, length, arrays["anchors"].T, arrays["weights"], base)


def _short(rows: Matrix) -> Matrix:
    """Rounded to 13 bits of fraction, before anything is fitted on them: files are half the size."""
    return np.asarray(((rows.view(np.int32) + 0x200) & ~0x3FF).view(np.float32))


def fit_process(features: Matrix, target: npt.NDArray[np.float64], seed: int) -> Process:
    """A process fitted by scikit-learn: lengths by the likelihood of some rows, weights by all of them."""
    import warnings

    from scipy.optimize import minimize
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    from threadpoolctl import threadpool_limits

    def search(objective: Any, start: Any, bounds: Any) -> tuple[Any, float]:
        found = minimize(
            objective, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": _STEPS}
        )
        return found.x, float(found.fun)

    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    rows = _short(((features - mean) / scale).astype(np.float32))
    # What is alike stands together, column by column: so they pack best.
    order = np.lexsort(rows.T)
    rows, target = rows[order].astype(np.float64), target[order]
    kernel = ConstantKernel(1.0) * Matern(
        np.full(rows.shape[1], 5.0), length_scale_bounds=_LENGTHS, nu=1.5
    ) + WhiteKernel(1e-2, (1e-4, 1.0))
    some = np.random.default_rng(seed).permutation(len(rows))[:_SEARCHED]
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        # A feature that does not matter has its length at the upper bound: that is the point of lengths.
        warnings.simplefilter("ignore", ConvergenceWarning)
        tried = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=search)
        tried.fit(rows[some], target[some])
        model = GaussianProcessRegressor(tried.kernel_, normalize_y=True, optimizer=None).fit(rows, target)
    parts = model.kernel_.get_params()
    length = np.asarray(parts["k1__k2__length_scale"])
    weights = np.ravel(model.alpha_) * parts["k1__k1__constant_value"] * float(model._y_train_std)
    return Process(
        mean.astype(np.float32),
        scale.astype(np.float32),
        rows.min(axis=0).astype(np.float32),
        rows.max(axis=0).astype(np.float32),
        length.astype(np.float32),
        rows.astype(np.float32),
        weights.astype(np.float32),
        float(model._y_train_mean),
    )
