"""Power of a kernel learned from runs of a second and more, where there are such; the closed form elsewhere.

What is learned is the share of (TDP - idle) that a kernel draws. Where our own profiler measured, windows are
steady whatever the kernel's length, and the share follows from the utilisation alone: how much of the peak
arithmetic (MFU) and of the memory's bandwidth (MBU) the kernel uses (held out, its seconds add nothing).
Elsewhere trees answer from the family's features and how far the time is above the roofline; published tables
hold no short kernels at steady power (their windows are mostly idle), so towards them the answer goes over
into `costmodels.power`. A device without measurements takes the shares of its architecture's: shares of its
own TDP.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from costmodels.kernels import Rates
from costmodels.learned.shapes import FORMATS, Batch, Matrix, arithmetic_of
from costmodels.learned.store import POWER, Artifact, find
from costmodels.learned.trees import Trees
from costmodels.ops import FloatArray
from costmodels.power import demand_of, power_fit
from hardware.device import Device

#: Measured devices that speak for an architecture, first to last.
SPEAKERS = {"hopper": ("h200-sxm-141gb", "h100-sxm-80gb"), "blackwell": ("b200-sxm-180gb",)}
#: Seconds of a kernel from which its window reached a second, by family (iterations are capped at 3,000).
STEADY_S = {"gemm": 55e-6, "prefill": 333e-6, "decode": 333e-6, "moe": 333e-6}
_FADE = 3.0
#: What a card says under `of` when its predictor answers from the utilisation.
UTILISATION = "utilisation"
#: Utilisation below which nothing changes, and least share of (TDP - idle) while a kernel runs.
_LEAST_USED, LEAST_SHARE = 1e-4, 0.02
#: Format whose rows speak for one that was never measured. Kernels that scale by blocks do so in the cores,
#: and draw as those of 16 bits at equal utilisation (six rows of an H200: 13 %, by fp8's 19 %).
_ALIKE = {"fp8_block": "bf16", "int8": "fp8"}


def utilisation(work: FloatArray, moved: FloatArray, rates: Rates, seconds: FloatArray) -> Matrix:
    """[n, 2] log2 of MFU and MBU of calls with so many FLOPs and bytes."""
    seconds = np.maximum(seconds, 1e-9)
    used = np.column_stack([work / rates.peak / seconds, moved / rates.bandwidth / seconds])
    return np.log2(np.maximum(used, _LEAST_USED)).astype(np.float32)


def watts_of(
    trees: Trees, measured: Sequence[Sequence[float]], used: Matrix, device: Device, dtype: str
) -> FloatArray:
    """Watts at a utilisation, of a predictor of the log of the share of (TDP - idle).

    Beyond what was `measured` (its least and most) the share changes as by the closed form: kernels of a
    microsecond keep less busy than any that a second's run was made of.
    """
    near = np.clip(used, *np.asarray(measured, dtype=np.float32))
    fit = power_fit(device, arithmetic_of(dtype))
    asked, there = (
        np.minimum(1.0, demand_of(fit, *np.exp2(np.minimum(at, 0.0).astype(np.float64)).T))
        for at in (used, near)
    )
    share = np.clip(np.exp(trees.predict(near)) * asked / there, LEAST_SHARE, 1.0)
    return np.asarray(device.idle_w + share * max(0.0, device.tdp_w - device.idle_w))


def by_utilisation(artifact: Artifact) -> bool:
    """Whether a predictor asks for `utilisation` alone."""
    return bool(artifact.card.get("of") == UTILISATION)


def power_features(batch: Batch, seconds: FloatArray, bound_s: FloatArray) -> Matrix:
    """A family's features, the time and how far it is above the roofline."""
    above = np.log2(np.maximum(seconds, 1e-9) / np.maximum(bound_s, 1e-12))
    return np.column_stack([batch.features, above, np.log2(np.maximum(seconds, 1e-9))]).astype(np.float32)


def speaker(device: Device, family: str, dtype: str) -> Artifact | None:
    """The power predictor for a device's kernels, its own or its architecture's.

    One by utilisation also speaks for other formats of its arithmetic: the shares are relative to its peak.
    """
    kin = _ALIKE.get(dtype, FORMATS[dtype][2] if dtype in FORMATS else dtype)
    for name in (device.name, device.kernels_like, *SPEAKERS.get(device.architecture, ())):
        for kind in dict.fromkeys((dtype, kin)) if name else ():
            found = find(f"{name}/any/{POWER}{family}/{kind}", device, twin=True)
            if found is not None and (kind == dtype or (family == "gemm" and by_utilisation(found))):
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
    share = np.clip(artifact.trees.predict(features), LEAST_SHARE, 1.0)
    watts = device.idle_w + share * max(0.0, device.tdp_w - device.idle_w)
    steady = STEADY_S[family]
    weight = np.clip(np.log(np.maximum(seconds, 1e-9) * _FADE / steady) / np.log(_FADE), 0.0, 1.0)
    return np.asarray(weight * watts + (1.0 - weight) * closed_w)
