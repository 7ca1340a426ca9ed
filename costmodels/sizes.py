"""At which sizes costs are evaluated; between two neighbours a cost is a straight line.

Kernels are measured at whole tiles and one beyond them; between those nothing is known but that the next
step of the staircase comes at the next tile. So predictors answer at these sizes only and draw lines between
them, and the simulator's tables, made of the same sizes, hold exactly what the predictors say.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from costmodels.ops import FloatArray

#: (largest size, step) of the staircase; above the last an octave has 128 steps.
_STEPS = ((64, 1), (1024, 16), (8192, 64), (32768, 256))
_OCTAVE_STEPS = 128


def _step(size: FloatArray) -> FloatArray:
    """Width of the step that a size lies on: steps start just above a multiple of it."""
    octave = np.exp2(np.floor(np.log2(np.maximum(size, 1.0)))) / _OCTAVE_STEPS
    found = octave
    for largest, step in reversed(_STEPS):
        found = np.where(size < largest, float(step), found)
    return found


def around(size: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(nearest evaluated size at or below, at or above, share of the way between) of each size."""
    size = np.asarray(size, dtype=np.float64)
    step = _step(size)
    edge = np.floor(size / step) * step
    low = np.where(size >= edge + 1.0, edge + 1.0, edge)
    high = np.where(size == edge, edge, np.where(size <= edge + 1.0, edge + 1.0, edge + step))
    low = np.where(high == size, size, low)
    return low, high, np.where(high > low, (size - low) / np.maximum(high - low, 1e-12), 0.0)


@lru_cache(maxsize=64)
def sample_sizes(largest: int) -> FloatArray:
    """Evaluated sizes 0..largest, ascending; `largest` itself is always one."""
    points = {0, largest}
    start = 0
    edges: list[tuple[int, int]] = list(_STEPS)
    while edges[-1][0] < largest:
        edges.append((edges[-1][0] * 2, edges[-1][0] // _OCTAVE_STEPS))
    for stop, step in edges:
        for x in range(start, min(stop, largest) + 1, step):
            points |= {y for y in (x, x + 1) if y <= largest}
        start = stop
    return np.array(sorted(points), dtype=np.float64)


def sequence_knots(largest: int) -> FloatArray:
    """Batch sizes at which decode attention is evaluated: 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, ... `largest`."""
    return _capped(_SEQUENCES, largest)


def context_knots(largest: int) -> FloatArray:
    """Context lengths at which attention is evaluated: 0, then 16 growing by 2^(1/4) in whole tiles."""
    return _capped(_CONTEXTS, largest)


def length_knots(largest: int) -> FloatArray:
    """Lengths of prompts' chunks, 1.. `largest`, growing by 2^(1/4); 1 and 2 at least (one is no line)."""
    return _capped(_LENGTHS, max(largest, 2))


def cached_knots(largest: int) -> FloatArray:
    """Tokens cached before a chunk: one less than 1, then growing by 2^(1/2), up to `largest`."""
    return _capped(_CACHED, largest)


def _capped(knots: FloatArray, largest: int) -> FloatArray:
    return np.append(knots[knots < largest], float(largest))


#: Knots reach past what any request asks (2^26 tokens).
_OCTAVES = 26
_SEQUENCES = np.unique(
    [0, 1, *(2**p * quarter // 4 for p in range(1, _OCTAVES) for quarter in (4, 5, 6, 7))]
).astype(np.float64)
_CONTEXTS = np.unique(
    [0.0, *(round(2.0 ** (4 + step / 4) / 16) * 16.0 for step in range(4 * (_OCTAVES - 4)))]
)
_LENGTHS = np.unique(np.round(2.0 ** (np.arange(4 * _OCTAVES) / 4))).astype(np.float64)
_CACHED = np.unique(np.round(2.0 ** (np.arange(2 * _OCTAVES) / 2))).astype(np.float64) - 1.0


def bracket(knots: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(knot at or below, knot at or above, share of the way, linear) of each value."""
    high = np.clip(np.searchsorted(knots, values, side="left"), 0, len(knots) - 1)
    low = np.where(knots[high] > values, np.maximum(high - 1, 0), high)
    span = np.maximum(knots[high] - knots[low], 1e-12)
    return knots[low], knots[high], np.where(high > low, (values - knots[low]) / span, 0.0)


def around_sequences(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """`around` for decode batches."""
    return bracket(_SEQUENCES, values)


def around_contexts(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """`around` for context lengths."""
    return bracket(_CONTEXTS, values)


def around_lengths(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """`around` for chunk lengths; the share is linear in the logarithm."""
    low, high, _ = bracket(_LENGTHS, values)
    return low, high, _log_share(values, low, high)


def around_cached(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """`around` for cached tokens; the share is linear in the logarithm of one more."""
    low, high, _ = bracket(_CACHED, values)
    return low, high, _log_share(values + 1.0, low + 1.0, high + 1.0)


def _log_share(values: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    wide = high > low
    span = np.where(wide, np.log(np.where(wide, high, 2.0) / np.where(wide, low, 1.0)), 1.0)
    return np.where(wide, np.log(np.maximum(values, 1e-12) / low) / span, 0.0)
