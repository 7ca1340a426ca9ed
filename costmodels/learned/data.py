"""Measured kernels as rows: the tables of `aiconfigurator-core`, cleaned, one problem per predictor.

The package (Apache-2.0) is the extra `train`; nothing here is needed to plan. What is dropped is counted:
duplicates of a key (the median is kept), rows without time, rows faster than the roofline, files that are
copies of another device's, rows bound by the host, and sustained runs (kept apart from bursts).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodels.learned.shapes import FORMATS, MLA_LATENT, PUBLISHED, STATIC_SCALES, bound_s, columns
from costmodels.learned.store import POWER
from costmodels.learned.watts import STEADY_S
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
_LEAST_SMALL = 150
#: Of a user's own rows fewer will do: they refine what there is.
_LEAST_OWN = 60
_LEAST_POWER = 250
_LEAST_SIZES = 8
#: Power tables whose neighbours disagree (the GPU was shared or throttled): no use to anyone.
_NOISY_POWER = {("b200_sxm", "vllm"), ("gb200", "vllm")}
#: Weights (bytes) beyond which a table's power is not steady: with matrices of 6.7 GB H200 reads 300 W at one
#: token and 570 W at two thousand, at equal time and traffic, where one of 5.2 GB reads 600 W throughout.
#: NVML's mean of the last second still holds the making of the operands.
_UNSTEADY_WEIGHTS = {("h200_sxm", "vllm"): 6e9}
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
    watts: FloatArray | None = None  # mean power of each row, where that is what is learned
    own: bool = False  # a user's measurements: folders that go by our devices' names
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
            for table in _TABLES:
                own = system not in SYSTEMS
                least = _LEAST_OWN if own else table.least
                newest = _newest(root, system, engine, table, least=least)
                for dtype, (version, rows, dropped) in newest.items():
                    if _host_bound(engine, table, dtype) or (table.family == "bmm" and dtype != "bf16"):
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
                        name, engine, table.family, dtype, version, raw, seconds, group, dropped, own=own
                    )


def _host_bound(engine: str, table: _Table, dtype: str) -> bool:
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


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", path.parent.name))


def _files(root: Path, system: str, engine: str, name: str, *, sustained: bool = False) -> list[Path]:
    """Tables of an engine, oldest version first: bursts, or the sustained runs."""
    found = [
        path
        for path in (root / engine).glob(f"*/{name}.*")
        if sustained or (system, engine, path.parent.name) not in _SUSTAINED
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
    if "mla_bmm" in path.name:
        keys.append("op_name")
    frame["watts"] = frame.get("power", np.nan)
    kernels = [*keys, "kernel_source"] if "kernel_source" in frame else keys
    before = len(frame)
    frame = frame.groupby(kernels, as_index=False, dropna=False, sort=True)[["latency", "watts"]].median()
    dropped["duplicates"] = before - len(frame)
    before = len(frame)
    if before and "kernel_source" in frame:
        frame = frame.sort_values("latency", kind="stable").groupby(keys, dropna=False, sort=True).head(1)
        frame = frame.sort_values(keys, kind="stable").reset_index(drop=True)
    dropped["slower rival kernels"] = before - len(frame)
    frame["seconds"] = frame["latency"] * 1e-3
    return frame


def _newest(
    root: Path, system: str, engine: str, table: _Table, *, sustained: bool = False, least: int = 0
) -> dict[str, tuple[str, Any, dict[str, int]]]:
    """Format -> (version, rows, what was dropped), each from the newest version that measured it."""
    found: dict[str, tuple[str, Any, dict[str, int]]] = {}
    files = _files(root / table.folder, system, engine, table.name, sustained=sustained)
    for path in files if table.dtype else files[-1:]:
        dropped: dict[str, int] = {}
        frame = _read(path, dropped)
        if table.dtype is None:
            found["any"] = (path.parent.name, frame, dropped)
            continue
        for dtype, part in frame.groupby(table.dtype):
            if str(dtype) in _DTYPES and len(part) >= (least or table.least):
                found[_DTYPES[str(dtype)]] = (path.parent.name, part, dropped)
    return found


@dataclass(frozen=True, slots=True)
class _Table:
    """Where a family's rows are: `{folder}/{engine}/{version}/{name}.parquet`; `dtype`: the column of formats
    (without one, one predictor answers all); `least`: rows that a predictor needs."""

    family: str
    folder: str
    name: str
    dtype: str | None
    make: Callable[[Any], tuple[Any, FloatArray, Any]]  # table -> (its rows that count, raw, groups)
    least: int = _LEAST_ROWS


def _gemm(part: Any) -> tuple[Any, FloatArray, Any]:
    raw = columns("gemm", m=part["m"], n=part["n"], k=part["k"])
    return part, raw, (part["n"].astype(str) + "x" + part["k"].astype(str)).to_numpy()


def _kv_bytes(part: Any) -> Any:
    return np.where(part["kv_cache_dtype"].astype(str).str.contains("fp8"), 1.0, 2.0)


def _heads(part: Any) -> tuple[Any, Any, Any]:
    kv = np.where(part["num_key_value_heads"] > 0, part["num_key_value_heads"], part["num_heads"])
    window = part["window_size"] if "window_size" in part else np.zeros(len(part))
    group = part["num_heads"].astype(str) + "/" + kv.astype(str) + "/" + part["head_dim"].astype(str)
    return kv, window, group.to_numpy()


def _prefill(part: Any) -> tuple[Any, FloatArray, Any]:
    part = part[~part["attn_dtype"].astype(str).str.contains("fp8")]
    kv, window, group = _heads(part)
    raw = columns(
        "prefill", batch=part["batch_size"], query=part["isl"], heads=part["num_heads"], kv_heads=kv,
        head_dim=part["head_dim"], window=window, kv_bytes=_kv_bytes(part),
    )  # fmt: skip
    return part, raw, group


def _decode(part: Any) -> tuple[Any, FloatArray, Any]:
    kv, window, group = _heads(part)
    raw = columns(
        "decode", sequences=part["batch_size"], context=part["step"] + part["isl"], heads=part["num_heads"],
        kv_heads=kv, head_dim=part["head_dim"], window=window, kv_bytes=_kv_bytes(part),
    )  # fmt: skip
    return part, raw, group


def _moe(part: Any) -> tuple[Any, FloatArray, Any]:
    shape = list(zip(part["hidden_size"], part["inter_size"], part["num_experts"], strict=True))
    part = part[np.array([item not in _UNGATED for item in shape])]
    # Routing of served models is skewed; this is the mildest of the measured skews.
    skewed = part[part["distribution"] == "power_law_1.01"]
    part = skewed if len(skewed) >= _LEAST_ROWS else part
    experts = part["num_experts"].to_numpy(dtype=np.float64)
    raw = columns(
        "moe", tokens=part["num_tokens"], hidden=part["hidden_size"],
        intermediate=part["inter_size"] / part["moe_tp_size"], experts=experts,
        local_experts=np.maximum(1.0, experts / part["moe_ep_size"]), top_k=part["topk"],
    )  # fmt: skip
    group = part["hidden_size"].astype(str) + "/" + part["inter_size"].astype(str)
    return part, raw, (group + "/" + part["num_experts"].astype(str)).to_numpy()


def _latent(part: Any) -> Any:
    # The same kernel was measured once for every way of arriving at this number of heads.
    keys = ["batch_size", "isl", "step", "num_heads", "kv_cache_dtype"]
    return part.groupby(keys, as_index=False, sort=True)[["seconds", "watts"]].median()


def _by_heads(part: Any) -> Any:
    return (part["num_heads"].astype(str) + "/" + part["batch_size"].astype(str)).to_numpy()


def _mla_prefill(part: Any) -> tuple[Any, FloatArray, Any]:
    part = _latent(part)
    raw = columns(
        "mla_prefill", batch=part["batch_size"], query=part["isl"], heads=part["num_heads"],
        kv_bytes=_kv_bytes(part),
    )  # fmt: skip
    return part, raw, _by_heads(part)


def _mla_decode(part: Any) -> tuple[Any, FloatArray, Any]:
    part = _latent(part)
    raw = columns(
        "mla_decode", sequences=part["batch_size"], context=part["step"] + part["isl"],
        heads=part["num_heads"], kv_bytes=_kv_bytes(part),
    )  # fmt: skip
    return part, raw, _by_heads(part)


def _bmm(part: Any) -> tuple[Any, FloatArray, Any]:
    """Per-head projections into and out of the latent space: pre 128 -> 512, post 512 -> 128."""
    into = (part["op_name"] == "mla_gen_pre").to_numpy()
    raw = columns(
        "bmm", m=part["num_tokens"], n=np.where(into, MLA_LATENT, 128), k=np.where(into, 128, MLA_LATENT),
        batch=part["num_heads"],
    )  # fmt: skip
    return part, raw, (part["num_heads"].astype(str) + "/" + part["op_name"].astype(str)).to_numpy()


_TABLES = (
    _Table("gemm", "gemm", "gemm_perf", "gemm_dtype", _gemm),
    _Table("prefill", "attention", "context_attention_perf", None, _prefill),
    _Table("decode", "attention", "generation_attention_perf", None, _decode),
    _Table("moe", "moe", "moe_perf", "moe_dtype", _moe),
    _Table("mla_prefill", "mla", "context_mla_perf", None, _mla_prefill, _LEAST_SMALL),
    _Table("mla_decode", "mla", "generation_mla_perf", None, _mla_decode, _LEAST_SMALL),
    _Table("bmm", "mla_bmm", "mla_bmm_perf", "bmm_dtype", _bmm, _LEAST_SMALL),
)


def power_problems(tables: Path) -> Iterator[Problem]:
    """Rows with power whose windows were long enough to be steady, as problems with `watts`.

    Newest version of each engine that measured power, host-disturbed files excepted.
    """
    catalog = load_catalog()
    for system, name in {**SYSTEMS, **{name: name for name in catalog.devices}}.items():
        root = tables / system
        if not root.is_dir():
            continue
        for engine in ENGINES:
            if (system, engine) in _NOISY_POWER:
                continue
            for table in _TABLES:
                if table.family not in STEADY_S:
                    continue
                found = _newest(root, system, engine, table, sustained=True)
                for dtype, (version, rows, dropped) in found.items():
                    if _host_bound(engine, table, dtype):
                        continue
                    part, raw, group = table.make(rows)
                    seconds, watts = part["seconds"].to_numpy(), part["watts"].to_numpy()
                    steady = (watts > 0) & (seconds >= STEADY_S[table.family])
                    if table.family == "gemm" and (system, engine) in _UNSTEADY_WEIGHTS:
                        weights = raw[:, 1] * raw[:, 2] * FORMATS[dtype][0]
                        steady &= weights < _UNSTEADY_WEIGHTS[system, engine]
                    device = catalog.device(name)
                    if dtype != "any" and FORMATS[dtype][2] not in device.peak_flops_per_s:
                        continue
                    if steady.sum() < _LEAST_POWER:
                        continue
                    dropped = {**dropped, "not at steady power": int((~steady).sum())}
                    yield Problem(
                        name, engine, table.family, dtype, version, raw[steady], seconds[steady],
                        np.asarray(group)[steady], dropped, watts[steady],
                    )  # fmt: skip


def memory_tables(tables: Path) -> Iterator[tuple[str, str, FloatArray, FloatArray, str]]:
    """(`device/engine/elementwise`, device, bytes moved, seconds, what it is) of memory-bound kernels.

    Engines' scaling of activations to 8 bits (3 bytes an element), and the profiler's copies, which come
    first. Times are medians of an eighth of an octave. An engine that scales by several slow kernels in a
    row tells nothing of one: what moves large tensors at less than half of the memory's rate is left out.
    """
    import pandas as pd

    catalog = load_catalog()
    for system, name in {**SYSTEMS, **{name: name for name in catalog.devices}}.items():
        root, device = tables / system, catalog.device(name)
        for engine in ENGINES:
            scaled = sorted((root / "quantize" / engine).glob("*/scale_matrix_perf.*"), key=_version)
            copied = sorted((root / "memory" / engine).glob("*/memory_perf.*"), key=_version)
            if not (scaled or copied):
                continue
            path = (copied or scaled)[-1]
            frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
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
    import pandas as pd

    for system, name in SYSTEMS.items():
        for engine in STATIC_SCALES:
            found = sorted(
                (tables / system / "quantize" / engine).glob("*/computescale_perf.*"), key=_version
            )
            if not found:
                continue
            frame = pd.read_parquet(found[-1])
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
    import pandas as pd

    for system, name in {**SYSTEMS, **{name: name for name in load_catalog().devices}}.items():
        comm = tables / system / "comm"
        for engine in ("nccl", *ENGINES):
            table = "nccl_perf" if engine == "nccl" else "custom_allreduce_perf"
            files = sorted((comm / engine).glob(f"*/{table}.*"), key=_version)
            if not files:
                continue
            path = files[-1]
            frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
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
