"""Groups of rows that are held out together: matrices, head layouts, expert shapes. By hash, so that a group
lies in the same fold whatever else a table holds."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

#: Groups whose hash is at least this are judged by `benchmarks/predictors.py`: no choice was made on them.
JUDGED_FROM = 85


def hashed(groups: Any) -> npt.NDArray[np.int64]:
    """A stable number in 0..99 per group name."""
    names, inverse = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    numbers = np.array([zlib.crc32(str(name).encode()) % 100 for name in names], dtype=np.int64)
    return np.asarray(numbers[inverse], dtype=np.int64)


def dealt(groups: Any, folds: int) -> npt.NDArray[np.int64]:
    """The fold of each row: whole groups, dealt out in the order of their hash."""
    names, inverse = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    order = sorted(range(len(names)), key=lambda i: zlib.crc32(str(names[i]).encode()))
    place = np.empty(len(names), dtype=np.int64)
    place[order] = np.arange(len(names)) % folds
    return np.asarray(place[inverse], dtype=np.int64)
