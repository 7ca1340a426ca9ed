"""Tables in APEX's format: CSV files of GEMMs and of collectives, times in whole microseconds.

GEMM: `gpu,dtype,m,k,n,time(us)` for (m x k) @ (k x n), where n varies as tokens do and m is the output's
width. Collectives: `comm/GPU/KIND.csv` with `gpu,num_nodes,num_gpus_per_node,dtype,size(kb),time(us)`. Read
are all-reduce and point to point inside one node, whose message needs no convention; the size of a gathered
or scattered message is not said to be one rank's or all ranks'.
Source: github.com/microsoft/apex_plus (MIT), read 2026-11.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.learned.data import Problem, clean
from costmodels.learned.shapes import columns
from costmodels.ops import FloatArray
from hardware import InputError, load_catalog

#: GPU in the tables -> device of the catalog.
GPUS = {
    "V100-PCIE-16GB": "v100-pcie-16gb",
    "H100-SXM-80GB": "h100-sxm-80gb",
    "H200-SXM-141GB": "h200-sxm-141gb",
}
#: Engine in the keys of its GEMMs: the library itself was called.
LIBRARY = "cublas"
_GEMM = ("gpu", "dtype", "m", "k", "n", "time(us)")
_COMM = ("gpu", "num_nodes", "num_gpus_per_node", "dtype", "size(kb)", "time(us)")
_KINDS = {"all_reduce": "all_reduce", "sendrecv": "point_to_point"}
_LEAST_ROWS, _LEAST_SIZES = 400, 8
#: Below this the rounding to whole microseconds is more than 5 % of the time.
_LEAST_S = 10e-6


def apex_problems(folder: Path) -> Iterator[Problem]:
    """GEMM rows, one problem per GPU. InputError: no such folder, or no table of this format in it."""
    catalog = load_catalog()
    for path in _tables(folder, "*gemm*.csv*"):
        frame = _read(path, _GEMM)
        for gpu, part in frame[frame["dtype"].isin(["half", "float16", "bfloat16"])].groupby("gpu"):
            if str(gpu) not in GPUS:
                continue
            device = catalog.device(GPUS[str(gpu)])
            before = len(part)
            part = part.groupby(["m", "k", "n"], as_index=False, sort=True)["time(us)"].median()
            dropped = {"duplicates": before - len(part)}
            seconds = part["time(us)"].to_numpy(dtype=np.float64) * 1e-6
            exact = seconds >= _LEAST_S
            dropped["rounded by more than 5 %"] = int((~exact).sum())
            part, seconds = part[exact], seconds[exact]
            raw = columns("gemm", m=part["n"], n=part["m"], k=part["k"])
            group = (part["m"].astype(str) + "x" + part["k"].astype(str)).to_numpy()
            found = clean(device, "gemm", "bf16", raw, seconds, group, dropped, _LEAST_ROWS)
            if found is not None:
                yield Problem(device.name, LIBRARY, "gemm", "bf16", "", *found, dropped, source="apex")


def apex_collectives(folder: Path) -> Iterator[tuple[str, str, FloatArray, FloatArray, str]]:
    """As `collective_tables`: (key, device, bytes, seconds, what it is) of every curve."""
    for path in _tables(folder, "comm/*/*.csv*"):
        kind, name = _KINDS.get(path.name.split(".")[0]), GPUS.get(path.parent.name)
        if kind is None or name is None:
            continue
        frame = _read(path, _COMM)
        frame = frame[(frame["num_nodes"] == 1) & (frame["size(kb)"] > 0) & (frame["num_gpus_per_node"] > 1)]
        times = frame.groupby(["num_gpus_per_node", "size(kb)"], sort=True)["time(us)"].median()
        for devices, curve in times.groupby(level=0):
            if len(curve) < _LEAST_SIZES:
                continue
            size = curve.index.get_level_values(1).to_numpy(dtype=np.float64) * 1024.0
            key = f"{name}/nccl/{kind}/{devices}"
            yield key, name, size, curve.to_numpy(dtype=np.float64) * 1e-6, "APEX tables, NCCL"


def _tables(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(f"**/{pattern}")) if folder.is_dir() else []
    if not found and not any(folder.glob("**/*.csv*")):
        raise InputError(str(folder), "holds no tables in APEX's format: no CSV file is in it")
    return found


def _read(path: Path, expected: tuple[str, ...]) -> Any:
    import pandas as pd

    frame = pd.read_csv(path)
    missing = [name for name in expected if name not in frame.columns]
    if missing:
        raise InputError(str(path), f"is no table in APEX's format: no column {missing[0]}")
    return frame
