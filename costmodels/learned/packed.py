"""Numbers as files keep them: with fewer bits, and bytes of a kind side by side. Both pack better."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_F = TypeVar("_F", np.float16, np.float32)


def short(values: npt.NDArray[_F], dropped: int) -> npt.NDArray[_F]:
    """The nearest numbers whose last `dropped` bits of fraction are zero."""
    bits = values.view(f"u{values.itemsize}").astype(np.uint64) + (1 << (dropped - 1))
    kept = (bits >> dropped) << dropped
    return np.asarray(kept.astype(f"u{values.itemsize}").view(values.dtype))


def planes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """[size n] all first bytes, all second ones, ...: neighbours of a plane are alike."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T).reshape(-1)


def joined_planes(parts: npt.NDArray[np.uint8], kind: type[Any]) -> npt.NDArray[Any]:
    """[n] numbers of a kind, of their `planes`."""
    return np.ascontiguousarray(parts.reshape(np.dtype(kind).itemsize, -1).T).reshape(-1).view(kind)
