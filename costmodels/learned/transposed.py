"""Many tokens seen through wide matrices: a GEMM's cost is nearly the same with M and N swapped.

X W^T and W X^T are one product, stored by rows or by columns: the same tiles, the same operands read. So a
matrix of 51,200 columns by 4,096 tokens, which was measured, tells of one of 4,096 columns by 51,200 tokens,
which was not. Not quite the same: what narrowing the activations takes hangs on M and K alone and is moved
over by its closed form, and the rest of the difference is learned where both were measured. A format whose
narrowing costs a thread block a row says too little of the product, and tells nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from costmodels.kernels import narrowing_time
from costmodels.learned.boosting import Setting, boosted
from costmodels.learned.data import Problem
from costmodels.learned.shapes import closed_form, rates_of
from costmodels.ops import FloatArray

#: Trees of the difference: small, as they are asked beyond what they saw.
_SETTING = Setting(50, 8, 0.1, 30)
#: Rows measured both ways that it takes to learn the difference; the least share of a time that is product.
_LEAST_PAIRS, _LEAST_SHARE = 100, 0.15


def transposed(
    problem: Problem, raw: FloatArray, seconds: FloatArray, seed: int
) -> tuple[FloatArray, FloatArray]:
    """GEMMs [k, 3] of more tokens than any of `raw` [n, 3], and what they should take, seconds [k].

    Both are empty where swapping M and N tells nothing.
    """
    device = problem.device
    values = closed_form(problem.family, device, problem.engine, problem.dtype).fit.values
    swapped = raw[:, [1, 0, 2]]
    nothing = swapped[:0], seconds[:0]
    far = swapped[:, 0] > raw[:, 0].max(initial=0.0)
    if values.get("row_s", 0.0) > 0.0 or not far.any():
        return nothing
    rates = rates_of(device, problem.family, problem.dtype)
    own, other = (narrowing_time(values, part[:, 0], part[:, 2], rates) for part in (raw, swapped))
    guess = np.maximum(seconds - own, _LEAST_SHARE * seconds) + other
    columns = np.column_stack([
        other / guess,
        own / seconds,
        np.log2(swapped[:, 0] * swapped[:, 2] / device.l2_bytes),
        np.log2(swapped[:, 0] / swapped[:, 1]),
    ]).astype(np.float32)  # fmt: skip
    twin = _places(raw, swapped)
    both = (twin >= 0) & (swapped[:, 0] > swapped[:, 1])
    if both.sum() < _LEAST_PAIRS:
        return nothing
    difference = boosted(columns[both], np.log(seconds[twin[both]] / guess[both]), _SETTING, seed)
    return swapped[far], np.asarray(guess[far] * np.exp(difference.predict(columns[far])))


def _places(raw: FloatArray, wanted: FloatArray) -> npt.NDArray[np.int64]:
    """For each row of `wanted`, which row of `raw` it is; -1: none."""
    _, number = np.unique(np.vstack([raw, wanted]), axis=0, return_inverse=True)
    number = number.reshape(-1)
    place = np.full(int(number.max(initial=0)) + 1, -1, dtype=np.int64)
    place[number[: len(raw)]] = np.arange(len(raw))
    return place[number[len(raw) :]]
