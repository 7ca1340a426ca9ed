"""A small neural network as flat arrays: what varies smoothly with a kernel's sizes.

Two hidden layers of rectified units over the standardised features, held inside the range they were fitted
on, so that nothing runs away beyond it. Trees then correct what is left: steps of tiles and of kernels'
choices. Weights are stored in 16 bits; sums run in 64, so an answer does not hang on the size of the batch.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from costmodels.learned.packed import joined_planes, planes, short

Matrix = npt.NDArray[np.float32]
#: Passes over so many rows at the first learning rate; half and a quarter of them follow at lower ones. A
#: high first rate errs least: at a tenth of it networks stop where prompts of unseen heads err by half more.
_ROWS = 28_000
_RATES = ((2e-2, 1.0), (4e-3, 0.5), (5e-4, 0.25))
_FEWEST, _MOST = 4, 160
#: Rows of a step.
_BATCH = 512
#: Bits of ten that weights' fractions are short of: what that moves (a thousandth) the trees upon a network
#: put right, and files of attention are a tenth smaller.
_DROPPED = 5


class Layers(NamedTuple):
    """Units of both hidden layers, and passes over `_ROWS` rows."""

    units: int
    passes: int


LARGE, SMALL = Layers(64, 40), Layers(32, 10)


@dataclass(frozen=True, slots=True, eq=False)
class Net:
    """mean, scale, low, high [f] of the features (the range is of standardised ones); weights [in, out] and
    biases [out] of three layers; `unit`: what the last layer's answer is multiplied by."""

    mean: Matrix
    scale: Matrix
    low: Matrix
    high: Matrix
    weights: tuple[npt.NDArray[np.float16], ...]
    biases: tuple[npt.NDArray[np.float16], ...]
    unit: float

    def predict(self, features: Matrix) -> npt.NDArray[np.float64]:
        """[n] predictions of features [n, f]."""
        found = np.clip((features - self.mean) / self.scale, self.low, self.high).astype(np.float64)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            found = found @ weight.astype(np.float64) + bias
            if layer < last:
                found = np.maximum(found, 0.0)
        return np.asarray(found[:, 0] * self.unit)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays that `from_arrays` takes."""
        flat = [part.reshape(-1) for pair in zip(self.weights, self.biases, strict=True) for part in pair]
        return {
            "sizes": np.array([w.shape[0] for w in self.weights], np.int64),
            "range": np.stack([self.mean, self.scale, self.low, self.high]).astype(np.float32),
            "weights": planes(np.concatenate(flat)),
            "unit": np.array([self.unit]),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Net:
        """The network that `arrays` describes."""
        sizes = [*arrays["sizes"].tolist(), 1]
        flat, weights, biases, at = joined_planes(arrays["weights"], np.float16), [], [], 0
        for rows, cols in itertools.pairwise(sizes):
            weights.append(flat[at : at + rows * cols].reshape(rows, cols))
            at += rows * cols
            biases.append(flat[at : at + cols])
            at += cols
        mean, scale, low, high = arrays["range"]
        return cls(mean, scale, low, high, tuple(weights), tuple(biases), float(arrays["unit"][0]))


def fit_net(
    features: Matrix,
    target: npt.NDArray[np.float64],
    seed: int,
    layers: Layers = LARGE,
    *,
    brief: bool = False,
) -> Net:
    """A network fitted by scikit-learn's Adam at falling learning rates; equal rows and seed, equal net.

    `brief`: a third of the passes, to see how far off it is.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor
    from threadpoolctl import threadpool_limits

    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1.0).astype(np.float32)
    rows = ((features - mean) / scale).astype(np.float32)
    unit = float(np.std(target)) or 1.0
    passes = min(_MOST, max(_FEWEST, layers.passes * _ROWS // max(1, len(target)))) // (3 if brief else 1)
    model = MLPRegressor(
        hidden_layer_sizes=(layers.units, layers.units), alpha=1e-6, batch_size=min(_BATCH, len(target)),
        random_state=seed, tol=0.0, n_iter_no_change=10_000, warm_start=True,
    )  # fmt: skip
    # It is stopped after so many passes on purpose. One thread: sums in another order are another network.
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        for rate, share in _RATES:
            model.set_params(learning_rate_init=rate, max_iter=max(1, int(passes * share)))
            model.fit(rows, (target / unit).astype(np.float32))
    return Net(
        mean.astype(np.float32),
        scale,
        rows.min(axis=0),
        rows.max(axis=0),
        tuple(short(weight.astype(np.float16), _DROPPED) for weight in model.coefs_),
        tuple(short(bias.astype(np.float16), _DROPPED) for bias in model.intercepts_),
        unit,
    )
