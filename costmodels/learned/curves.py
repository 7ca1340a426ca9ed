"""Collectives inside a node, and memory-bound kernels: a measured curve's closed form and its correction.

    log time = log(alpha + b w + c sqrt(w)) + s(log2 w),   w the bytes

with alpha, b, c >= 0 fitted to relative errors and s the mean of a Gaussian process (`process.matern`) kept
as a linear spline with a knot for every doubling. Beyond the measured sizes s keeps its last value. Engines
switch algorithms and protocols with size, which no closed form follows; sizes left out are met to 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from costmodels.learned.process import matern
from costmodels.learned.store import collective_curves, memory_curves
from costmodels.ops import Collective, Elementwise, FloatArray
from hardware.device import CommGroup, Device

# Doublings over which what the closed form misses is alike, and the share of it that is of one reading alone:
# where a size left out is met best. Ridges, cubic splines and curves fitted together come to 5.1 to 5.7 %.
_REACH = 2.0
_NOISE = 0.1


def _alike(one: FloatArray, other: FloatArray) -> FloatArray:
    """[n, m] covariance of what two sizes [log2 bytes] miss, of unit variance."""
    return matern(((one[:, None] - other[None, :]) / _REACH) ** 2)[0]


def _form(terms: FloatArray, size_bytes: FloatArray) -> FloatArray:
    return np.asarray(terms[0] + terms[1] * size_bytes + terms[2] * np.sqrt(size_bytes))


def fit_curve(size_bytes: FloatArray, seconds: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(alpha, b, c), knots (log2 bytes) and the correction at each."""
    from scipy.optimize import nnls

    shape = np.column_stack([np.ones_like(size_bytes), size_bytes, np.sqrt(size_bytes)]) / seconds[:, None]
    scale = shape.max(axis=0)
    terms = nnls(shape / scale, np.ones(len(seconds)))[0] / scale
    left = np.log(seconds) - np.log(_form(terms, size_bytes))
    at = np.log2(size_bytes)
    knots = np.arange(at[0], at[-1] + 0.5)
    correction = _alike(knots, at) @ np.linalg.solve(_alike(at, at) + _NOISE * np.eye(len(at)), left)
    return terms, knots, correction


def curve_time(curve: dict[str, Any], size_bytes: FloatArray) -> FloatArray:
    """Seconds of a fitted curve."""
    correction = np.array(curve["correction"])
    knots = curve["first_log2_bytes"] + np.arange(len(correction))
    at = np.log2(np.maximum(size_bytes, 1.0))
    terms = np.array([curve["alpha_s"], curve["s_per_byte"], curve["s_per_sqrt_byte"]])
    return np.asarray(_form(terms, size_bytes) * np.exp(np.interp(at, knots, correction)))


def describe(size_bytes: FloatArray, seconds: FloatArray) -> dict[str, Any]:
    """A curve as plain values, with its error on sizes left out one at a time (ends excepted)."""
    order = np.argsort(size_bytes)
    size_bytes, seconds = size_bytes[order], seconds[order]
    terms, knots, correction = fit_curve(size_bytes, seconds)
    found = {
        "alpha_s": float(f"{terms[0]:.4g}"),
        "s_per_byte": float(f"{terms[1]:.4g}"),
        "s_per_sqrt_byte": float(f"{terms[2]:.4g}"),
        "first_log2_bytes": round(float(knots[0]), 4),
        "correction": [round(float(value), 3) for value in correction],
        "rows": len(seconds),
    }
    left = []
    for out in range(1, len(seconds) - 1):
        rest = np.arange(len(seconds)) != out
        some = fit_curve(size_bytes[rest], seconds[rest])
        guess = np.log(_form(some[0], size_bytes[out]))
        guess += np.interp(np.log2(size_bytes[out]), some[1], some[2])
        left.append(float(np.log(seconds[out]) - guess))
    errors = np.array(left)
    found["mape"] = round(float(np.mean(np.abs(np.expm1(-errors)))), 4)
    found["p90"] = round(float(np.quantile(np.abs(np.expm1(-errors)), 0.9)), 4)
    found["interval"] = [round(float(np.quantile(errors, q)), 4) for q in (0.04, 0.96)]
    return found


def learned_memory(op: Elementwise, device: Device, engine: str) -> tuple[FloatArray, str, str] | None:
    """(seconds, kind, source) of memory-bound kernels, or None where none was measured.

    What was measured is one kind of kernel (scaling activations to 8 bits); norms, rotary embeddings and
    activations move bytes alike.
    """
    curves = memory_curves()
    engines = [engine, *(name for name in ("vllm", "trtllm", "sglang") if name != engine)]
    for name in filter(None, (device.name, device.kernels_like)):
        for number, other in enumerate(engines):
            curve = curves.get(f"{name}/{other}/elementwise")
            if curve is None:
                continue
            each = np.asarray(op.bytes_moved, dtype=np.float64) / max(1, op.launches)
            kind = "learned" if name == device.name and number == 0 else "transferred"
            source = f"{name}/{other}/elementwise on {curve['data']}, one kind of kernel for all"
            return op.launches * curve_time(curve, each), kind, source
    return None


def scale_time(device: Device, engine: str, m: FloatArray, k: float) -> FloatArray | None:
    """Seconds that the search for the scale of activations [m, k] takes; None where it was not measured."""
    curves = memory_curves()
    for name in filter(None, (device.name, device.kernels_like)):
        curve = curves.get(f"{name}/{engine}/scale")
        if curve is not None:
            return np.where(m > 0, curve_time(curve, 2.0 * np.maximum(m, 1.0) * k), 0.0)
    return None


def collective_keys(op: Collective, device: Device, engine: str) -> Iterator[tuple[str, bool]]:
    """(key, whether it is this very device's) of the curves that may stand for a collective, best first."""
    names = [(device.name, True)] + ([(device.kernels_like, False)] if device.kernels_like else [])
    for name, own in names:
        if op.kind == "all_reduce" and engine:
            yield f"{name}/{engine}/all_reduce/{op.group.size}", own
        # A pair is a pair, however many devices the node has.
        size = 2 if op.kind == "point_to_point" else op.group.size
        yield f"{name}/nccl/{op.kind}/{size}", own


def learned_collective(
    op: Collective, device: Device, engine: str
) -> tuple[FloatArray, float, float, str, str] | None:
    """(seconds, factors of the interval's ends, kind, source), or None where no curve was measured.

    A curve stands for groups inside one node whose link has the measured bandwidth.
    """
    group = op.group
    if not isinstance(group, CommGroup) or group.nodes > 1 or group.size < 2:
        return None
    curves = collective_curves()
    for key, own in collective_keys(op, device, engine):
        curve = curves.get(key)
        if curve is None:
            continue
        if abs(group.intra_bandwidth_bytes_per_s / curve["link_bytes_per_s"] - 1.0) > 0.05:
            continue
        size = np.asarray(op.message_bytes, dtype=np.float64)
        low, high = (np.exp(value) for value in curve["interval"])
        wider = 1.0 if own else 1.1
        source = f"{key} on {curve['data']}, left-out error {100 * curve['mape']:.1f} %"
        seconds = np.where(size > 0, curve_time(curve, size), 0.0)
        return (
            seconds,
            min(1.0, low / wider),
            max(1.0, high * wider),
            "learned" if own else "transferred",
            source,
        )
    return None
