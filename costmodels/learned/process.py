"""A Gaussian process on a few hundred rows, as flat arrays: what a user's own measurements teach.

Matern kernel of order 3/2 with a length for every feature (Rasmussen and Williams, 2006, 4.2.1 and 5.1). Its
answer is a weighted sum over the rows that it was fitted on; features are standardised and held inside the
fitted range, as nothing is known beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from costmodels.learned.packed import short
from costmodels.ops import FloatArray

Matrix = npt.NDArray[np.float32]
#: Rows answered at once.
_CHUNK = 2048
#: Least and most of the kernel's height, the noise, and the lengths, in units of the rows' spread.
_HEIGHTS, _NOISES, _LENGTHS = (1e-5, 1e5), (1e-4, 1.0), (0.3, 1e3)


class Search(NamedTuple):
    """How the lengths are searched: on so many of the rows, in so many steps."""

    rows: int
    steps: int


#: For a user's few rows, where each counts (vLLM's prompt attention on B200 from 500 points of a new version:
#: 6.8 % by the quick one, 5.2); tables of a thousand err as much by the quick one, in a fifth of the time.
THOROUGH, QUICK = Search(500, 30), Search(200, 15)


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

    def predict(self, features: Matrix) -> FloatArray:
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
            found[start : start + _CHUNK] = (matern(apart)[0] * self.weights).sum(axis=1)
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


def fit_process(features: Matrix, target: FloatArray, seed: int, search: Search = THOROUGH) -> Process:
    """A process whose lengths are the likeliest for some rows, with weights by all of them."""
    from scipy.linalg import cho_factor, cho_solve
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0)
    # 13 bits of fraction, before anything is fitted on them: files are half the size.
    rows = short(((features - mean) / scale).astype(np.float32), 10)
    # What is alike stands together, column by column: so they pack best.
    order = np.lexsort(rows.T)
    rows, target = rows[order].astype(np.float64), target[order]
    base, unit = float(target.mean()), float(target.std()) or 1.0
    told = (target - base) / unit
    some = np.random.default_rng(seed).permutation(len(rows))[: search.rows]
    start = np.log([1.0, 1e-2, *np.full(rows.shape[1], 5.0)])
    bounds = np.log([_HEIGHTS, _NOISES, *[_LENGTHS] * rows.shape[1]])
    # One thread: sums in another order are other lengths.
    with threadpool_limits(1, "blas"):
        found = minimize(
            unlikelihood, start, (rows[some], told[some]), jac=True, bounds=bounds, method="L-BFGS-B",
            options={"maxiter": search.steps},
        )  # fmt: skip
        height, noise, *length = np.exp(found.x)
        kernel, _ = matern(_apart(rows / length))
        kernel = height * kernel + noise * np.eye(len(rows))
        weights = cho_solve(cho_factor(kernel, lower=True), told) * height * unit
    return Process(
        mean.astype(np.float32),
        scale.astype(np.float32),
        rows.min(axis=0).astype(np.float32),
        rows.max(axis=0).astype(np.float32),
        np.array(length, np.float32),
        rows.astype(np.float32),
        weights.astype(np.float32),
        base,
    )


def unlikelihood(at: FloatArray, rows: FloatArray, told: FloatArray) -> tuple[float, FloatArray]:
    """Minus the log of the marginal likelihood of `told` [n] at `rows` [n, f], and its slope, where `at`
    holds the logs of the kernel's height, the noise and the lengths (Rasmussen and Williams, 2006, 5.4.1).

    Libraries hold the slope of every pair by every length; a sum over pairs is all that is asked for, and
    takes a product of matrices: a twentieth of the time.
    """
    from scipy.linalg import cho_factor, cho_solve

    height, noise, *length = np.exp(at)
    count, near = len(rows), rows / length
    shape, fall = matern(_apart(near))
    try:
        factor = cho_factor(height * shape + noise * np.eye(count), lower=True)
    except np.linalg.LinAlgError:
        return 1e25, np.zeros(len(at))
    weights = cho_solve(factor, told)
    value = 0.5 * (told @ weights) + np.log(np.diag(factor[0])).sum() + 0.5 * count * np.log(2.0 * np.pi)
    pull = cho_solve(factor, np.eye(count)) - np.outer(weights, weights)
    # d kernel / d log length = 3 height exp(-far) (a - b)^2 for scaled rows a and b.
    pairs = 3.0 * height * pull * fall
    by_length = pairs.sum(axis=1) @ near**2 - (near * (pairs @ near)).sum(axis=0)
    by_height, by_noise = 0.5 * height * (pull * shape).sum(), 0.5 * noise * np.trace(pull)
    return float(value), np.array([by_height, by_noise, *by_length])


def _apart(rows: FloatArray) -> FloatArray:
    """[n, n] squared distances between rows."""
    squared = (rows**2).sum(axis=1)
    return np.asarray(squared[:, None] + squared - 2.0 * (rows @ rows.T))


def matern(apart: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The kernel at squared distances of rows scaled by their lengths, and exp(-distance) in its unit."""
    far = np.sqrt(3.0 * np.maximum(apart, 0.0))
    fall = np.exp(-far)
    return (1.0 + far) * fall, fall
