"""Measured kernels as rows: tables, cleaned, one problem per predictor.

What is dropped is counted: duplicates of a key (the median is kept), rows without time, rows faster than the
roofline, files that are copies of another device's, rows bound by the host, and sustained runs (kept apart
from bursts).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.learned.shapes import FORMATS, PUBLISHED, bound_s
from costmodels.learned.store import POWER
from costmodels.learned.tables import (
    DTYPES,
    ENGINES,
    SYSTEMS,
    TABLES,
    Table,
    files_of,
    license_of,
    newest,
    read_table,
    systems,
)
from costmodels.learned.watts import STEADY_S
from costmodels.ops import FloatArray
from hardware import load_catalog
from hardware.device import Device

#: Of a user's own rows fewer will do: they refine what there is.
_LEAST_OWN = 60
_LEAST_POWER = 250
#: Of steady runs that a user measured a predictor by utilisation needs no more. By 17 of an H100's prompts it
#: errs by 8 to 10 % on layouts left out, by an H200's 32 by 7 %: of fewer, another device's speak.
_LEAST_OWN_POWER = 18
#: Families whose power is learned from the utilisation alone.
_BY_UTILISATION = ("gemm", "prefill", "decode")
#: Power tables whose neighbours disagree (the GPU was shared or throttled): no use to anyone.
_NOISY_POWER = {("b200_sxm", "vllm"), ("gb200", "vllm")}
#: Weights (bytes) beyond which a table's power is not steady: with matrices of 6.7 GB H200 reads 300 W at one
#: token and 570 W at two thousand, at equal time and traffic, where one of 5.2 GB reads 600 W throughout.
#: NVML's mean of the last second still holds the making of the operands.
_UNSTEADY_WEIGHTS = {("h200_sxm", "vllm"): 6e9}


@dataclass(slots=True, eq=False)
class Problem:
    """Rows of one predictor: raw columns [n, c], measured seconds [n], and the group each row belongs to."""

    device_name: str
    engine: str
    family: str
    dtype: str
    version: str
    raw: FloatArray
    seconds: FloatArray
    group: Any
    dropped: dict[str, int] = field(default_factory=dict)
    watts: FloatArray | None = None  # mean power of each row, where that is what is learned
    own: bool = False  # a user's measurements: folders that go by our devices' names
    license: str = ""  # of a user's measurements
    source: str = PUBLISHED  # whose tables

    @property
    def device(self) -> Device:
        """The catalog's device (looked up: problems travel between processes)."""
        return load_catalog().device(self.device_name)

    @property
    def kind(self) -> tuple[str, str]:
        """(family, format)."""
        return self.family, self.dtype

    @property
    def key(self) -> str:
        """`h100-sxm-80gb/vllm/gemm/bf16`."""
        if self.watts is not None:
            return f"{self.device_name}/any/{POWER}{self.family}/{self.dtype}"
        return f"{self.device_name}/{self.engine}/{self.family}/{self.dtype}"


def problems(tables: Path) -> Iterator[Problem]:
    """Every predictor's rows, device by device."""
    catalog = load_catalog()
    seen: dict[str, str] = {}
    for system, name in systems().items():
        root = tables / system
        if not root.is_dir():
            continue
        device = catalog.device(name)
        for engine in ENGINES:
            for table in TABLES:
                own = system not in SYSTEMS
                least = _LEAST_OWN if own else table.least
                latest = newest(root, system, engine, table, least=least)
                for dtype, (version, rows, dropped) in latest.items():
                    if host_bound(engine, table, dtype) or (table.family == "bmm" and dtype != "bf16"):
                        continue  # engines run the small products of latent attention in 16 bits
                    part, raw, group = table.make(rows)
                    dropped = {**dropped, "of another kind of kernel": len(rows) - len(part)}
                    found = clean(
                        device, table.family, dtype, raw, part["seconds"].to_numpy(), group, dropped, least
                    )
                    if found is None:
                        continue
                    raw, seconds, group = found
                    mark = hashlib.sha256(np.ascontiguousarray(seconds).tobytes()).hexdigest()
                    if seen.setdefault(mark, name) != name:
                        continue  # a copy of another device's table
                    yield Problem(
                        name, engine, table.family, dtype, version, raw, seconds, group, dropped, own=own,
                        license=license_of(tables),
                    )  # fmt: skip


def host_bound(engine: str, table: Table, dtype: str) -> bool:
    """Launched without a graph when measured: the GPU waited for the host."""
    return engine == "vllm" and table.family == "gemm" and dtype == "fp8_block"


def clean(
    device: Device,
    family: str,
    dtype: str,
    raw: FloatArray,
    seconds: FloatArray,
    group: Any,
    dropped: dict[str, int],
    least: int,
) -> tuple[FloatArray, FloatArray, Any] | None:
    """Rows that can be true, with what is dropped counted; None when fewer than `least` are left."""
    if dtype != "any":
        arithmetic = FORMATS[dtype][2]
        if arithmetic not in device.peak_flops_per_s and arithmetic != "bf16":
            return None
    good = np.isfinite(seconds) & (seconds > 0)
    dropped["without time"] = int((~good).sum())
    possible = np.zeros(len(seconds), dtype=bool)
    # What beats the memory's roofline was read from the L2 cache, left there by the call before (of L40S's
    # GEMMs one row in six). A served layer finds other layers' weights and caches there.
    possible[good] = seconds[good] >= 0.97 * bound_s(family, raw[good], device, dtype)
    keep = possible
    if family == "moe":
        # Skewed routing touches fewer experts than the bound assumes. Answers never go below the bound, so
        # these rows teach the bound itself.
        keep, limit = good, np.where(good, bound_s(family, raw, device, dtype), 0.0)
        dropped["held at the roofline"] = int((good & (seconds < limit)).sum())
        seconds = np.maximum(seconds, limit)
    else:
        dropped["faster than the roofline"] = int((good & ~possible).sum())
    if keep.sum() < least:
        return None
    return raw[keep], seconds[keep], np.asarray(group)[keep]


def power_problems(tables: Path | Sequence[Path]) -> Iterator[Problem]:
    """Rows with power at steady state, as problems with `watts`: a user's own first.

    Of published tables those whose windows were long enough, newest version of each engine that measured
    power, host-disturbed files excepted; none of a key that there are own rows of.
    """
    folders = [tables] if isinstance(tables, Path) else list(tables)
    seen = set()
    for name in load_catalog().devices:
        for problem in _own_power([folder / name for folder in folders], name):
            seen.add(problem.key)
            yield problem
    for folder in folders:
        yield from (problem for problem in _published_power(folder) if problem.key not in seen)


def _own_power(roots: Sequence[Path], name: str) -> Iterator[Problem]:
    """A device's rows by our profiler, of all folders, engines and versions together: its windows take a
    second whatever the kernel's length, and each kernel is one more at its utilisation."""
    device = load_catalog().device(name)
    for table in TABLES:
        if table.family not in _BY_UTILISATION:
            continue
        found: dict[str, list[_Watched]] = {}
        for root, engine in itertools.product(roots, ENGINES):
            for path in files_of(root / table.folder, name, engine, table.name, sustained=True):
                dropped: dict[str, int] = {}
                frame = read_table(path, dropped)
                parts = frame.groupby(table.dtype) if table.dtype else [("any", frame)]
                for written, rows in parts:
                    dtype = DTYPES.get(str(written)) if table.dtype else "any"
                    if dtype is not None:
                        found.setdefault(dtype, []).append(_watched(table, engine, path.parent.name, rows))
        for dtype, kept in sorted(found.items()):
            if not _computes(device, dtype):
                continue
            watts = np.concatenate([part.watts for part in kept])
            if len(watts) < _LEAST_OWN_POWER:
                continue
            yield Problem(
                name,
                kept[0].engine,
                table.family,
                dtype,
                " and ".join(sorted({part.version for part in kept})),
                np.concatenate([part.raw for part in kept]),
                np.concatenate([part.seconds for part in kept]),
                np.concatenate([part.group for part in kept]),
                {"without power": sum(part.dropped for part in kept)},
                watts,
                own=True,
                license=license_of(*(root.parent for root in roots)),
            )


def _computes(device: Device, dtype: str) -> bool:
    """Whether a device has the arithmetic of a format."""
    return dtype == "any" or FORMATS[dtype][2] in device.peak_flops_per_s


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """Rows with power of one file and format."""

    engine: str
    version: str
    raw: FloatArray
    seconds: FloatArray
    group: Any
    watts: FloatArray
    dropped: int


def _watched(table: Table, engine: str, version: str, rows: Any) -> _Watched:
    part, raw, group = table.make(rows)
    seconds, watts = part["seconds"].to_numpy(), part["watts"].to_numpy()
    good = (watts > 0) & (seconds > 0)
    return _Watched(
        engine, version, raw[good], seconds[good], np.asarray(group)[good], watts[good], int((~good).sum())
    )


def _published_power(tables: Path) -> Iterator[Problem]:
    """As `power_problems`, of one folder of published tables."""
    catalog = load_catalog()
    for system, name in SYSTEMS.items():
        root = tables / system
        if not root.is_dir():
            continue
        for engine in ENGINES:
            if (system, engine) in _NOISY_POWER:
                continue
            for table in TABLES:
                if table.family not in STEADY_S:
                    continue
                found = newest(root, system, engine, table, sustained=True)
                for dtype, (version, rows, dropped) in found.items():
                    if host_bound(engine, table, dtype):
                        continue
                    part, raw, group = table.make(rows)
                    seconds, watts = part["seconds"].to_numpy(), part["watts"].to_numpy()
                    steady = (watts > 0) & (seconds >= STEADY_S[table.family])
                    if table.family == "gemm" and (system, engine) in _UNSTEADY_WEIGHTS:
                        weights = raw[:, 1] * raw[:, 2] * FORMATS[dtype][0]
                        steady &= weights < _UNSTEADY_WEIGHTS[system, engine]
                    device = catalog.device(name)
                    if not _computes(device, dtype):
                        continue
                    if steady.sum() < _LEAST_POWER:
                        continue
                    dropped = {**dropped, "not at steady power": int((~steady).sum())}
                    yield Problem(
                        name, engine, table.family, dtype, version, raw[steady], seconds[steady],
                        np.asarray(group)[steady], dropped, watts[steady],
                    )  # fmt: skip
