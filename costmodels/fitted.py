"""The fitted coefficients of `kernels.py`, and which set stands for which device.

`coefficients.toml` holds one set per (device, engine, family, format), with the data it was fitted
on, its held-out error and the quantiles of its held-out residuals. A device or format without a set
of its own borrows the nearest relative's: efficiencies are relative to each device's own peaks, so
they carry over, but the answer says so (`transferred`) and its interval is wider.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

from hardware import load_catalog
from hardware.device import Device


@dataclass(frozen=True, slots=True)
class CoefficientSet:
    """One fitted set. `low`/`high`: 5 % and 95 % quantiles of measured / predicted time, held out."""

    device: str
    architecture: str
    engine: str
    family: str
    dtype: str
    fitted_on: str
    rows: int
    mape: float
    low: float
    high: float
    values: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Choice:
    """A set and how it came to stand for what was asked."""

    fit: CoefficientSet
    kind: str  # roofline: fitted on this very device and format; transferred: a relative's
    low: float
    high: float
    reason: str


#: Nearest measured relatives, nearest first, by architecture. Why: the same tensor-core generation
#: first, then the same memory technology and kernel library. Nothing of these is measured here.
_RELATIVES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hopper": ("hopper", "blackwell"),
        "ampere": ("ampere", "ada"),
        "ada": ("ada", "ampere"),
        "blackwell": ("blackwell", "hopper"),
        "blackwell-rtx": ("blackwell-rtx", "ada"),
        "volta": ("ampere",),
        "turing": ("ada", "ampere"),
        "cdna2": ("ampere",),
        "cdna3": ("hopper",),
        "cdna4": ("hopper", "blackwell"),
        "gaudi3": ("hopper",),
        "tpu": ("ampere",),
    }
)
#: How much wider the interval of a borrowed set is, each way. Zero-shot transfer between data-centre
#: GPUs of different generations misses by 12-26 % on average (held-out-device study of the same
#: tables); another vendor's kernels are further away than any pair measured.
_WIDEN_SAME_ARCHITECTURE = 1.12
_WIDEN_OTHER_ARCHITECTURE = 1.35
_WIDEN_OTHER_VENDOR = 1.6
#: Attention kernels differ more than GEMMs: on devices left out in turn, three sets of four needed no more
#: than this beyond the above to hold nine rows in ten (GEMMs nothing).
_WIDEN_ATTENTION = 1.2
#: Latent attention, and what counts against borrowing SGLang's on Hopper, more than another engine does: it
#: turns an fp8 cache into 16 bits before each call, which others need not (decision 0024).
LATENT, _WORKAROUND = ("mla_prefill", "mla_decode"), 3.0
_WIDEN_OTHER_FORMAT = 1.15
_WIDEN_OTHER_ENGINE = 1.10
#: Share of the datasheet's peak that a large GEMM reaches where nothing else holds it back.
_REACHED = 0.9
#: Kernels of other vendors reach less of their datasheet peak than cuBLAS or FlashAttention do:
#: MI300X GEMM 45-70 % of peak against 70-80 % on H100 (SemiAnalysis, "MI300X vs H100 vs H200", 2024-12-22).
_VENDOR_EFFICIENCY: Mapping[str, float] = MappingProxyType(
    {"nvidia": 1.0, "amd": 0.8, "intel": 0.8, "google": 0.85}
)

#: Formats that stand in for one another when a format has no set, nearest first.
_FORMAT_KIN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bf16": ("bf16",),
        "fp8": ("fp8", "bf16"),
        "fp8_block": ("fp8_block", "fp8", "bf16"),
        "int8": ("int8", "fp8", "bf16"),
        "fp4": ("fp4", "fp8", "bf16"),
        "int4_wo": ("int4_wo", "bf16"),
        "int8_wo": ("int8_wo", "bf16"),
        "fp4_wo": ("fp4_wo", "int4_wo", "bf16"),
        "w4a8": ("fp8", "bf16"),
        "fp4_a8": ("fp4_a8", "fp4", "fp8", "bf16"),
    }
)


@lru_cache(maxsize=1)
def coefficient_sets() -> tuple[CoefficientSet, ...]:
    """All sets of the shipped table, in file order."""
    text = resources.files("costmodels").joinpath("coefficients.toml").read_text(encoding="utf-8")
    found = []
    for row in tomllib.loads(text)["fit"]:
        values = MappingProxyType({name: float(value) for name, value in row.pop("values").items()})
        found.append(CoefficientSet(values=values, **row))
    return tuple(found)


@lru_cache(maxsize=1)
def _index() -> dict[tuple[str, str], list[CoefficientSet]]:
    index: dict[tuple[str, str], list[CoefficientSet]] = {}
    for item in coefficient_sets():
        index.setdefault((item.family, item.dtype), []).append(item)
    return index


def kinship(architecture: str) -> str:
    """The architecture's key among relatives ("gaudi2" -> "gaudi3", "tpu-v5e" -> "tpu")."""
    if architecture in _RELATIVES:
        return architecture
    for prefix, key in (("gaudi", "gaudi3"), ("tpu", "tpu"), ("cdna", "cdna3"), ("blackwell", "blackwell")):
        if architecture.startswith(prefix):
            return key
    return "hopper"


@lru_cache(maxsize=4096)
def _choose(
    device: str, like: str, architecture: str, vendor: str, engine: str, family: str, dtype: str
) -> Choice:
    candidates: list[tuple[float, Choice]] = []
    for format_rank, name in enumerate(_FORMAT_KIN.get(dtype, (dtype, "bf16"))):
        for item in _index().get((family, name), []):
            widen, penalty, reasons = 1.0, 0.0, []
            if item.device not in (device, like):
                relatives = _RELATIVES[kinship(architecture)]
                if item.architecture not in relatives:
                    continue
                if item.architecture == architecture:
                    widen, penalty = _WIDEN_SAME_ARCHITECTURE, 10.0
                elif vendor == "nvidia":
                    widen, penalty = _WIDEN_OTHER_ARCHITECTURE, 20.0
                else:
                    widen, penalty = _WIDEN_OTHER_VENDOR, 20.0
                penalty += relatives.index(item.architecture)
                if family in ("prefill", "decode"):
                    widen *= _WIDEN_ATTENTION
                if family in LATENT and (item.engine, item.architecture) == ("sglang", "hopper"):
                    penalty += _WORKAROUND
                reasons.append(f"no kernels measured on {device}; efficiencies of {item.device}")
            elif item.device != device:
                reasons.append(f"same die as {item.device}")
                penalty = 0.1
            if format_rank:
                widen *= _WIDEN_OTHER_FORMAT
                penalty += 4.0 * format_rank
                reasons.append(f"no {dtype} kernels measured; efficiencies of {name}")
            if item.engine != engine:
                widen *= _WIDEN_OTHER_ENGINE
                penalty += 1.0 + item.mape  # among other engines the best understood one
                if engine:
                    reasons.append(f"kernels of {item.engine}")
            kind = "roofline" if widen == 1.0 else "transferred"
            choice = Choice(item, kind, item.low / widen, item.high * widen, "; ".join(reasons))
            candidates.append((penalty, choice))
    if not candidates:
        raise KeyError(f"no coefficients for {family} in {dtype} on {architecture}")
    return min(candidates, key=lambda pair: pair[0])[1]


def choose(device: Device, engine: str, family: str, dtype: str) -> Choice:
    """The set that stands for `family` kernels in `dtype` on `device` under `engine`.

    KeyError when not even a relative has one.
    """
    return _choose(
        device.name,
        device.kernels_like or device.name,
        device.architecture,
        device.vendor,
        engine,
        family,
        dtype,
    )


def power_headroom(device: Device, choice: Choice) -> float:
    """At least 1: how much more of its peak a device computes than the relative whose efficiency it borrows.

    What holds back large kernels of a card such as the L40S is its power limit (350 W for 362 TFLOP/s), and
    its efficiencies hold that. A relative with more power for each FLOP/s keeps its clock: up to the square
    root of that power's ratio (near the limit power grows about with the square of the rate), and up to
    `_REACHED` of the peak. Only between devices of one vendor. Checked on one measured run (RTX 4090, Llama
    3.1 8B, LLMServingSim): 1,066 output tokens per second measured, 838 predicted without it, 885 with it.
    """
    if choice.fit.device == device.name:
        return 1.0
    relative = _catalog().get(choice.fit.device)
    if relative is None or relative.vendor != device.vendor:
        return 1.0
    share = choice.fit.values.get("compute", 1.0)
    room = math.sqrt(_watts_per_flops(device) / _watts_per_flops(relative))
    return max(1.0, min(room, _REACHED / share))


def _watts_per_flops(device: Device) -> float:
    peaks = device.peak_flops_per_s
    return device.tdp_w / peaks.get("bf16", peaks.get("fp16", math.inf))


@lru_cache(maxsize=1)
def _catalog() -> Mapping[str, Device]:
    return load_catalog().devices


def vendor_efficiency(device: Device) -> float:
    """Share of a relative's efficiency that another vendor's kernels reach."""
    return _VENDOR_EFFICIENCY.get(device.vendor, 0.8)
