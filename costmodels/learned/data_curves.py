"""Measured curves of one size: bytes and seconds of collectives and of memory-bound kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from costmodels.learned.shapes import PUBLISHED, STATIC_SCALES
from costmodels.learned.tables import ENGINES, SYSTEMS, files_of, read_frame, systems
from costmodels.ops import FloatArray
from hardware import load_catalog

_LEAST_SIZES = 8


def memory_tables(tables: Path) -> Iterator[tuple[str, str, FloatArray, FloatArray, str]]:
    """(`device/engine/elementwise`, device, bytes moved, seconds, what it is) of memory-bound kernels.

    Engines' scaling of activations to 8 bits (3 bytes an element), and the profiler's copies, which come
    first. Times are medians of an eighth of an octave. An engine that scales by several slow kernels in a
    row tells nothing of one: what moves large tensors at less than half of the memory's rate is left out.
    """
    catalog = load_catalog()
    for system, name in systems().items():
        root, device = tables / system, catalog.device(name)
        for engine in ENGINES:
            scaled = files_of(root / "quantize", system, engine, "scale_matrix_perf", sustained=True)
            copied = files_of(root / "memory", system, engine, "memory_perf", sustained=True)
            if not (scaled or copied):
                continue
            path = (copied or scaled)[-1]
            frame = read_frame(path)
            frame = frame[frame["latency"] > 0]
            moved = 2.0 * frame["size_bytes"] if copied else 3.0 * frame["m"] * frame["k"]
            size, seconds = _binned(moved, frame["latency"])
            if len(size) < _LEAST_SIZES:
                continue
            rate = size[-3:].sum() / seconds[-3:].sum()
            if size[-1] > 4 * device.l2_bytes and rate < 0.5 * device.memory_bandwidth_bytes_per_s:
                continue
            source = "own measurements" if copied else PUBLISHED
            label = f"{source}, {engine} {path.parent.name}"
            yield f"{name}/{engine}/elementwise", name, size, seconds, label


def scale_tables(tables: Path) -> Iterator[tuple[str, str, FloatArray, FloatArray, str]]:
    """(`device/engine/scale`, device, bytes read, seconds, what it is) of the search for a tensor's scale.

    An engine whose checkpoints bring the scales of their activations leaves it out; its GEMM tables hold it.
    """
    for system, name in SYSTEMS.items():
        for engine in STATIC_SCALES:
            root = tables / system / "quantize"
            found = files_of(root, system, engine, "computescale_perf", sustained=True)
            if not found:
                continue
            frame = read_frame(found[-1])
            frame = frame[frame["latency"] > 0]
            size, seconds = _binned(2.0 * frame["m"] * frame["k"], frame["latency"])
            if len(size) >= _LEAST_SIZES:
                label = f"{PUBLISHED}, {engine} {found[-1].parent.name}"
                yield f"{name}/{engine}/scale", name, size, seconds, label


def _binned(moved: Any, milliseconds: Any) -> tuple[FloatArray, FloatArray]:
    """(bytes, seconds): medians of an eighth of an octave of bytes."""
    bins = np.round(8.0 * np.log2(moved))
    return moved.groupby(bins).median().to_numpy(), milliseconds.groupby(bins).median().to_numpy() * 1e-3


def collective_tables(tables: Path) -> Iterator[tuple[str, str, FloatArray, FloatArray, str]]:
    """(`device/engine/kind/devices`, device, bytes, seconds, what it is) of every measured collective.

    Half precision; messages are counted in elements there. Engines' own all-reduces: rows of CUDA graphs.
    """
    for system, name in systems().items():
        comm = tables / system / "comm"
        for engine in ("nccl", *ENGINES):
            table = "nccl_perf" if engine == "nccl" else "custom_allreduce_perf"
            files = files_of(comm, system, engine, table, sustained=True)
            if not files:
                continue
            path = files[-1]
            frame = read_frame(path)
            if "nccl_dtype" in frame:
                frame = frame[frame["nccl_dtype"] == "half"]
            frame = frame[~frame["kernel_source"].astype(str).str.contains("eager") & (frame["latency"] > 0)]
            grouped = frame.groupby(["op_name", "num_gpus", "message_size"], sort=True)["latency"].median()
            for (kind, devices), curve in grouped.groupby(level=[0, 1]):
                size = curve.index.get_level_values(2).to_numpy(dtype=np.float64) * 2.0
                if len(size) < _LEAST_SIZES:
                    continue
                spelled = {"alltoall": "all_to_all"}.get(str(kind), str(kind))
                key = f"{name}/{engine}/{spelled}/{devices}"
                source = PUBLISHED if system in SYSTEMS else "own measurements"
                label = f"{source}, {engine} {path.parent.name}"
                yield key, name, size, curve.to_numpy() * 1e-3, label
