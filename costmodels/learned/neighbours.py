"""What was measured around a GEMM: smooth averages of the closed form's error over matrices near by.

A table holds log(measured / closed form) of every measured (M, N, K). Columns are averages over other (N, K)
at the same M with Gaussian weights in octaves, along N, along K and over both: from below, from above, from
either side. Never the matrix itself, so that a row that teaches and a matrix never measured see the same.
Between measured M lies a straight line in log M. Trees take the columns beside the physics features: how much
to believe a neighbour, they learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from costmodels.ops import FloatArray

Matrix = npt.NDArray[np.float32]
#: Log units of a step of the table; its value for what was not measured.
_STEP, _NONE = 0.02, -128
#: Widths of the weights, octaves: of the next matrix on one side, of those around, of a whole row or column,
#: and across (next to nothing: the same N or K, or where there is none, the nearest).
_NEXT, _AROUND, _ROW, _ALONG, _SAME = 0.2, 0.3, 0.15, 5.0, 0.02
#: Sizes closer than this (octaves) are the same.
_ALIKE = 1e-4
#: Weights fall no lower: their products stay above the least number there is.
_FAINT = 300.0
#: A table is kept where this share of its cells was measured, of at most so many, with this many matrices.
_LEAST_FILLED, _MOST_CELLS, _LEAST_MATRICES = 0.2, 100_000, 60


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """m [M], n [N], k [K]: measured sizes, ascending, log2, as the features hold them; steps [M, N, K]: error
    of the closed form in steps of 2 % (-128: not measured)."""

    m: Matrix
    n: Matrix
    k: Matrix
    steps: npt.NDArray[np.int8]

    def columns(self, features: Matrix) -> Matrix:
        """[rows, 9] of features [rows, f], the first three of which are log2 of M, N and K."""
        pairs, back = np.unique(features[:, 1:3], axis=0, return_inverse=True)
        known = self.steps != _NONE
        cells = len(self.n) * len(self.k)
        # [2 M, N K]: sums of what was measured, and how much was; one matrix product answers for all pairs.
        measured = np.concatenate([np.where(known, self.steps * _STEP, 0.0), known]).reshape(-1, cells)
        across = pairs[:, :1].astype(np.float64) - self.n, pairs[:, 1:].astype(np.float64) - self.k

        def average(*weights: tuple[FloatArray, FloatArray]) -> FloatArray:
            """[M, pairs] weighted means; NaN where nothing was measured."""
            weight: Any = sum(by_n[:, :, None] * by_k[:, None, :] for by_n, by_k in weights)
            total, there = np.split(measured @ weight.reshape(-1, cells).T, 2)
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(np.where(there > 0.0, total / there, np.nan))

        def gauss(axis: int, width: float, side: int = 0) -> FloatArray:
            """[pairs, sizes]; side: only smaller sizes (-1), only larger ones (1)."""
            away = across[axis]
            found = np.exp(-np.minimum(away**2 / (2.0 * width**2), _FAINT))
            return found if side == 0 else np.where(-side * away > _ALIKE, found, 0.0)

        def others(wide_n: float, wide_k: float) -> FloatArray:
            """Mean over all matrices but the very one: another N, or this N and another K."""
            by_n, by_k = gauss(0, wide_n), gauss(1, wide_k)
            same_n, same_k = (np.abs(away) <= _ALIKE for away in across)
            return average(
                (np.where(same_n, 0.0, by_n), by_k),
                (np.where(same_n, by_n, 0.0), np.where(same_k, 0.0, by_k)),
            )

        along_n, along_k, around = others(_AROUND, _SAME), others(_SAME, _AROUND), others(_AROUND, _AROUND)
        around = np.where(np.isnan(around), 0.0, around)
        along_n, along_k = (np.where(np.isnan(x), around, x) for x in (along_n, along_k))
        found = [along_n, along_k, around, others(_ROW, _ALONG), others(_ALONG, _ROW)]
        for side in (-1, 1):
            found.append(average((gauss(0, _NEXT, side), gauss(1, _SAME))))
            found.append(average((gauss(0, _SAME), gauss(1, _NEXT, side))))
        # At an edge of the table one side is empty: then the other one, or whatever is around, stands for it.
        spare = (along_n, along_k, around, around, around, along_n, along_k, along_n, along_k)
        table = np.stack(
            [np.where(np.isnan(x), other, x) for x, other in zip(found, spare, strict=True)], axis=-1
        )
        place = np.clip(np.searchsorted(self.m, features[:, 0], side="right") - 1, 0, len(self.m) - 2)
        share = (features[:, 0] - self.m[place]) / (self.m[place + 1] - self.m[place])
        share = np.clip(share, 0.0, 1.0)[:, None]
        pair = back.reshape(-1)
        return np.asarray((1.0 - share) * table[place, pair] + share * table[place + 1, pair], np.float32)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays that `from_arrays` takes; differences along M pack best."""
        moved = np.diff(self.steps, axis=0, prepend=np.int8(0)).astype(np.int8)
        sizes = np.array([len(self.m), len(self.n), len(self.k)], np.int64)
        return {
            "sizes": sizes, "logs": np.concatenate([self.m, self.n, self.k]),
            "steps": np.ascontiguousarray(moved.reshape(len(self.m), -1).T).reshape(-1),
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> Neighbours:
        """The table that `arrays` describes."""
        rows, cols, deep = arrays["sizes"].tolist()
        m, n, k = np.split(arrays["logs"], [rows, rows + cols])
        moved = arrays["steps"].reshape(-1, rows).T.reshape(rows, cols, deep)
        return cls(m, n, k, np.cumsum(moved, axis=0, dtype=np.int8))


def measured_around(features: Matrix, error: FloatArray) -> Neighbours | None:
    """The table of rows [n]; None where they are no grid: too few of its cells, or of matrices."""
    sizes, places = zip(*(np.unique(features[:, i], return_inverse=True) for i in range(3)), strict=True)
    shape = tuple(len(axis) for axis in sizes)
    cells = int(np.prod(shape, dtype=np.int64))
    if min(shape) < 2 or cells > _MOST_CELLS or len(error) < _LEAST_FILLED * cells:
        return None
    steps = np.full(shape, _NONE, np.int8)
    steps[places] = np.clip(np.rint(error / _STEP), _NONE + 1, -_NONE - 1).astype(np.int8)
    if (steps != _NONE).any(axis=0).sum() < _LEAST_MATRICES:
        return None
    m, n, k = (axis.astype(np.float32) for axis in sizes)
    return Neighbours(m, n, k, steps)
