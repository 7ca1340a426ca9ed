"""Power of a kernel learned from runs of a second and more, where there are such; the closed form elsewhere.

Trees answer the share of (TDP - idle) that a kernel draws, from its family's features and how far its time is
above the roofline. Short kernels were never measured at steady power (their windows are mostly idle), so
towards them the answer goes over into `costmodels.power`. A device without measurements takes the shares of
its architecture's: shares of its own TDP.
"""

from __future__ import annotations

import numpy as np

from costmodels.learned.shapes import Batch, Matrix
from costmodels.learned.store import POWER, Artifact, find
from costmodels.ops import FloatArray
from hardware.device import Device

#: Measured device that speaks for an architecture.
SPEAKERS = {"hopper": "h200-sxm-141gb", "blackwell": "b200-sxm-180gb"}
#: Seconds of a kernel from which its window reached a second, by family (iterations are capped at 3,000).
STEADY_S = {"gemm": 55e-6, "prefill": 333e-6, "decode": 333e-6, "moe": 333e-6}
_FADE = 3.0


def power_features(batch: Batch, seconds: FloatArray, bound_s: FloatArray) -> Matrix:
    """A family's features, the time and how far it is above the roofline."""
    above = np.log2(np.maximum(seconds, 1e-9) / np.maximum(bound_s, 1e-12))
    return np.column_stack([batch.features, above, np.log2(np.maximum(seconds, 1e-9))]).astype(np.float32)


def speaker(device: Device, family: str, dtype: str) -> Artifact | None:
    """The power predictor for a device's kernels, its own or its architecture's."""
    for name in (device.name, device.kernels_like, SPEAKERS.get(device.architecture, "")):
        found = find(f"{name}/any/{POWER}{family}/{dtype}", device, twin=True) if name else None
        if found is not None:
            return found
    return None


def learned_power(
    artifact: Artifact,
    family: str,
    features: Matrix,
    seconds: FloatArray,
    device: Device,
    closed_w: FloatArray,
) -> FloatArray:
    """[n] watts: the trees' for kernels long enough, `closed_w` for short ones, a blend between."""
    share = np.clip(artifact.trees.predict(features), 0.02, 1.0)
    watts = device.idle_w + share * max(0.0, device.tdp_w - device.idle_w)
    steady = STEADY_S[family]
    weight = np.clip(np.log(np.maximum(seconds, 1e-9) * _FADE / steady) / np.log(_FADE), 0.0, 1.0)
    return np.asarray(weight * watts + (1.0 - weight) * closed_w)
