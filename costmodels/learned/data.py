"""Measured kernels as rows: the tables of `aiconfigurator-core`, cleaned, one problem per predictor.

The package (Apache-2.0) is the extra `train`; nothing here is needed to plan. What is dropped is counted:
duplicates of a key (the median is kept), rows without time, rows faster than the roofline, files that are
copies of another device's, rows bound by the host, and sustained runs (kept apart from bursts).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodels.learned.shapes import FORMATS, bound_s, columns
from costmodels.ops import FloatArray
from hardware import InputError, load_catalog
from hardware.device import Device

if TYPE_CHECKING:
    import pandas as pd

#: Folder of the tables -> device of the catalog.
SYSTEMS = {
    "h100_sxm": "h100-sxm-80gb",
    "h200_sxm": "h200-sxm-141gb",
    "a100_sxm": "a100-sxm-80gb",
    "l40s": "l40s",
    "b200_sxm": "b200-sxm-180gb",
    "b300_sxm": "b300-sxm-288gb",
    "gb200": "gb200-186gb",
    "gb300": "gb300-288gb",
    "rtx_pro_6000_server": "rtx-pro-6000-blackwell",
}
ENGINES = ("vllm", "sglang", "trtllm")
#: Format in the tables -> ours.
_DTYPES = {
    "bfloat16": "bf16",
    "float16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "fp4",
    "int4_wo": "int4_wo",
    "int8_wo": "int8_wo",
    "sq": "int8",
    "w4a16_mxfp4": "fp4_wo",
    "w4a8_mxfp4_mxfp8": "fp4_a8",
}
#: Sustained runs of about a second with power readings: short kernels read faster in them, large ones
#: slower (power limit), than in the bursts of all other files.
_SUSTAINED = {
    ("h200_sxm", "vllm", "0.22.0"),
    ("b200_sxm", "vllm", "0.22.0"),
    ("b200_sxm", "trtllm", "1.3.0rc15"),
    ("gb200", "trtllm", "1.3.0rc17"),
    ("gb200", "vllm", "0.22.0"),
}
_LEAST_ROWS = 400
#: (hidden, intermediate, experts) of models whose experts have two matrices, not three: the tables of
#: TensorRT-LLM name their kernels so ("nongated"), those of other engines only have the shapes.
_UNGATED = {
    (1024, 2688, 512),
    (2048, 5120, 512),
    (2688, 1856, 128),
    (4096, 2688, 512),
    (8192, 5120, 512),
}


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

    @property
    def device(self) -> Device:
        """The catalog's device (looked up: problems travel between processes)."""
        return load_catalog().device(self.device_name)

    @property
    def key(self) -> str:
        """`h100-sxm-80gb/vllm/gemm/bf16`."""
        return f"{self.device_name}/{self.engine}/{self.family}/{self.dtype}"


def find_tables(data_dir: Path | None) -> Path:
    """The folder with one folder of tables per system. Raises InputError when there is none."""
    if data_dir is not None:
        for folder in (data_dir, data_dir / "data", data_dir / "systems" / "data"):
            if any((folder / name).is_dir() for name in (*SYSTEMS, *load_catalog().devices)):
                return folder
        raise InputError(str(data_dir), "holds no kernel tables: no folder such as h100_sxm is in it")
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("--data", "aiconfigurator-core is not installed; pip install 'planfront[train]'")
    return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"


def problems(tables: Path) -> Iterator[Problem]:
    """Every predictor's rows, device by device."""
    catalog = load_catalog()
    seen: dict[str, str] = {}
    folders = {**SYSTEMS, **{name: name for name in catalog.devices}}  # our profiler's go by our names
    for system, name in folders.items():
        root = tables / system
        if not root.is_dir():
            continue
        device = catalog.device(name)
        for engine in ENGINES:
            for family, read in (("gemm", _gemm), ("prefill", _prefill), ("decode", _decode), ("moe", _moe)):
                for dtype, version, raw, seconds, group, dropped in read(root, system, engine):
                    found = _clean(device, family, dtype, raw, seconds, group, dropped)
                    if found is None:
                        continue
                    raw, seconds, group = found
                    mark = hashlib.sha256(np.ascontiguousarray(seconds).tobytes()).hexdigest()
                    if seen.setdefault(mark, name) != name:
                        continue  # a copy of another device's table
                    yield Problem(name, engine, family, dtype, version, raw, seconds, group, dropped)


def _clean(
    device: Device,
    family: str,
    dtype: str,
    raw: FloatArray,
    seconds: FloatArray,
    group: Any,
    dropped: dict[str, int],
) -> tuple[FloatArray, FloatArray, Any] | None:
    if family in ("gemm", "moe"):
        arithmetic = FORMATS[dtype][2]
        if arithmetic not in device.peak_flops_per_s and arithmetic != "bf16":
            return None
    good = np.isfinite(seconds) & (seconds > 0)
    dropped["without time"] = int((~good).sum())
    possible = np.zeros(len(seconds), dtype=bool)
    possible[good] = seconds[good] >= 0.97 * bound_s(family, raw[good], device, dtype)
    if family in ("prefill", "decode", "gemm"):
        # What fits in the cache may beat the memory's roofline; what does not, is a broken row.
        possible = possible | (good & (seconds < 60e-6))
    keep = possible
    if family == "moe":
        # Skewed routing touches fewer experts than the bound assumes. Answers never go below the bound, so
        # these rows teach the bound itself.
        keep, limit = good, np.where(good, bound_s(family, raw, device, dtype), 0.0)
        dropped["held at the roofline"] = int((good & (seconds < limit)).sum())
        seconds = np.maximum(seconds, limit)
    else:
        dropped["faster than the roofline"] = int((good & ~possible).sum())
    if keep.sum() < _LEAST_ROWS:
        return None
    return raw[keep], seconds[keep], np.asarray(group)[keep]


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", path.parent.name))


def _files(root: Path, system: str, engine: str, name: str) -> list[Path]:
    """Tables of an engine, oldest version first, without the sustained ones."""
    found = [
        path
        for path in (root / engine).glob(f"*/{name}.*")
        if (system, engine, path.parent.name) not in _SUSTAINED
    ]
    return sorted(found, key=_version)


def _read(path: Path, dropped: dict[str, int]) -> pd.DataFrame:
    """A table with one row a key: repeats become their median, rival kernels their fastest."""
    import pandas as pd

    frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    skip = (
        "latency", "power", "power_limit", "clock_mhz", "kernel_source", "framework", "version", "device",
        "op_name",
    )  # fmt: skip
    keys = [name for name in frame.columns if name not in skip]
    kernels = [*keys, "kernel_source"] if "kernel_source" in frame else keys
    before = len(frame)
    frame = frame.groupby(kernels, as_index=False, dropna=False, sort=True)["latency"].median()
    dropped["duplicates"] = before - len(frame)
    before = len(frame)
    frame = frame.groupby(keys, as_index=False, dropna=False, sort=True)["latency"].min()
    dropped["slower rival kernels"] = before - len(frame)
    frame["seconds"] = frame["latency"] * 1e-3
    return frame


_Rows = Iterator[tuple[str, str, FloatArray, FloatArray, Any, dict[str, int]]]


def _newest(
    root: Path, system: str, engine: str, name: str, column: str
) -> dict[str, tuple[str, Any, dict[str, int]]]:
    """Format -> (version, rows, what was dropped), each from the newest version that measured it."""
    found: dict[str, tuple[str, Any, dict[str, int]]] = {}
    for path in _files(root, system, engine, name):
        dropped: dict[str, int] = {}
        frame = _read(path, dropped)
        for dtype, part in frame.groupby(column):
            if str(dtype) in _DTYPES and len(part) >= _LEAST_ROWS:
                found[_DTYPES[str(dtype)]] = (path.parent.name, part, dropped)
    return found


def _gemm(root: Path, system: str, engine: str) -> _Rows:
    for dtype, (version, part, dropped) in _newest(
        root / "gemm", system, engine, "gemm_perf", "gemm_dtype"
    ).items():
        if engine == "vllm" and dtype == "fp8_block":
            continue  # launched without a graph: bound by the host
        raw = columns("gemm", m=part["m"], n=part["n"], k=part["k"])
        group = part["n"].astype(str) + "x" + part["k"].astype(str)
        yield dtype, version, raw, part["seconds"].to_numpy(), group.to_numpy(), dict(dropped)


def _heads(part: Any) -> tuple[Any, Any, Any]:
    kv = np.where(part["num_key_value_heads"] > 0, part["num_key_value_heads"], part["num_heads"])
    window = part["window_size"] if "window_size" in part else np.zeros(len(part))
    group = part["num_heads"].astype(str) + "/" + kv.astype(str) + "/" + part["head_dim"].astype(str)
    return kv, window, group.to_numpy()


def _kv_bytes(part: Any) -> Any:
    return np.where(part["kv_cache_dtype"].astype(str).str.contains("fp8"), 1.0, 2.0)


def _prefill(root: Path, system: str, engine: str) -> _Rows:
    files = _files(root / "attention", system, engine, "context_attention_perf")
    if not files:
        return
    dropped: dict[str, int] = {}
    part = _read(files[-1], dropped)
    part = part[~part["attn_dtype"].astype(str).str.contains("fp8")]
    kv, window, group = _heads(part)
    raw = columns(
        "prefill", batch=part["batch_size"], query=part["isl"], heads=part["num_heads"], kv_heads=kv,
        head_dim=part["head_dim"], window=window, kv_bytes=_kv_bytes(part),
    )  # fmt: skip
    yield "any", files[-1].parent.name, raw, part["seconds"].to_numpy(), group, dropped


def _decode(root: Path, system: str, engine: str) -> _Rows:
    files = _files(root / "attention", system, engine, "generation_attention_perf")
    if not files:
        return
    dropped: dict[str, int] = {}
    part = _read(files[-1], dropped)
    kv, window, group = _heads(part)
    raw = columns(
        "decode", sequences=part["batch_size"], context=part["step"] + part["isl"], heads=part["num_heads"],
        kv_heads=kv, head_dim=part["head_dim"], window=window, kv_bytes=_kv_bytes(part),
    )  # fmt: skip
    yield "any", files[-1].parent.name, raw, part["seconds"].to_numpy(), group, dropped


def _moe(root: Path, system: str, engine: str) -> _Rows:
    for dtype, (version, rows, dropped) in _newest(
        root / "moe", system, engine, "moe_perf", "moe_dtype"
    ).items():
        shape = list(zip(rows["hidden_size"], rows["inter_size"], rows["num_experts"], strict=True))
        gated = np.array([item not in _UNGATED for item in shape])
        dropped = {**dropped, "experts without a gate": int((~gated).sum())}
        rows = rows[gated]
        # Routing of served models is skewed; this is the mildest of the measured skews.
        part = rows[rows["distribution"] == "power_law_1.01"]
        if len(part) < _LEAST_ROWS:
            part = rows
        if len(part) < _LEAST_ROWS:
            continue
        experts = part["num_experts"].to_numpy(dtype=np.float64)
        raw = columns(
            "moe", tokens=part["num_tokens"], hidden=part["hidden_size"],
            intermediate=part["inter_size"] / part["moe_tp_size"], experts=experts,
            local_experts=np.maximum(1.0, experts / part["moe_ep_size"]), top_k=part["topk"],
        )  # fmt: skip
        group = part["hidden_size"].astype(str) + "/" + part["inter_size"].astype(str)
        group = group + "/" + part["num_experts"].astype(str)
        yield dtype, version, raw, part["seconds"].to_numpy(), group.to_numpy(), dict(dropped)
