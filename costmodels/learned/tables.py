"""The tables of `aiconfigurator-core`, and those of our profiler beside them: files, columns, what a row is.

The package (Apache-2.0) is the extra `train`; nothing here is needed to plan.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from costmodels.learned.shapes import MLA_LATENT, columns
from costmodels.ops import FloatArray
from costmodels.profile import SUSTAINED
from hardware import InputError, load_catalog

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
DTYPES = {
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
#: Rows that a predictor needs; of small families.
_LEAST_ROWS = 400
_LEAST_SMALL = 150
#: (hidden, intermediate, experts) of models whose experts have two matrices, not three: the tables of
#: TensorRT-LLM name their kernels so ("nongated"), those of other engines only have the shapes.
_UNGATED = {
    (1024, 2688, 512),
    (2048, 5120, 512),
    (2688, 1856, 128),
    (4096, 2688, 512),
    (8192, 5120, 512),
}


def find_tables(data_dir: Path | None) -> Path:
    """The folder with one folder of tables per system. Raises InputError when there is none."""
    if data_dir is not None:
        for folder in (data_dir, data_dir / "data", data_dir / "systems" / "data"):
            if any((folder / name).is_dir() for name in systems()):
                return folder
        raise InputError(str(data_dir), "holds no kernel tables: no folder such as h100_sxm is in it")
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("--data", "aiconfigurator-core is not installed; pip install 'planfront[train]'")
    return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"


def license_of(*folders: Path) -> str:
    """The licence of a user's own tables: the first line of the file LICENSE beside them, or "the user's"."""
    for folder in folders:
        path = (folder.parent if folder.name == SUSTAINED else folder) / "LICENSE"
        if path.is_file():
            return path.read_text(encoding="utf-8").partition("\n")[0].strip()
    return "the user's"


def _version(path: Path) -> tuple[int, ...]:
    """The engine version whose folder a table lies in, for sorting."""
    return tuple(int(part) for part in re.findall(r"\d+", path.parent.name))


def files_of(root: Path, system: str, engine: str, name: str, *, sustained: bool = False) -> list[Path]:
    """Tables of an engine, oldest version first: bursts, or the sustained runs."""
    found = [
        path
        for path in (root / engine).glob(f"*/{name}.*")
        if sustained or (system, engine, path.parent.name) not in _SUSTAINED
    ]
    return sorted(found, key=_version)


def systems() -> dict[str, str]:
    """Folder of tables -> device: the package's, and our profiler's, which go by our names."""
    return {**SYSTEMS, **{name: name for name in load_catalog().devices}}


def read_frame(path: Path, only: list[str] | None = None) -> pd.DataFrame:
    """A table as it is, or some of its columns."""
    import pandas as pd

    return pd.read_csv(path, usecols=only) if path.suffix == ".csv" else pd.read_parquet(path, columns=only)


def read_table(path: Path, dropped: dict[str, int]) -> pd.DataFrame:
    """A table with one row a key: repeats become their median, rival kernels their fastest."""
    frame = read_frame(path)
    skip = (
        "latency", "power", "power_limit", "clock_mhz", "kernel_source", "framework", "version", "device",
        "op_name",
    )  # fmt: skip
    keys = [name for name in frame.columns if name not in skip]
    if "mla_bmm" in path.name:
        keys.append("op_name")
    frame["watts"] = frame.get("power", np.nan)
    source = ["kernel_source"] if "kernel_source" in frame else []
    before = len(frame)
    if frame.duplicated([*keys, *source]).any():
        repeats = frame.groupby([*keys, *source], as_index=False, dropna=False, sort=True)
        frame = repeats[["latency", "watts"]].median()
    dropped["duplicates"] = before - len(frame)
    before = len(frame)
    frame = frame.sort_values([*keys, "latency", *source], ignore_index=True)
    frame = frame.drop_duplicates(keys, ignore_index=True)
    dropped["slower rival kernels"] = before - len(frame)
    frame["seconds"] = frame["latency"] * 1e-3
    return frame


def newest(
    root: Path, system: str, engine: str, table: Table, *, sustained: bool = False, least: int = 0
) -> dict[str, tuple[str, Any, dict[str, int]]]:
    """Format -> (version, rows, what was dropped), each from the newest version that measured it."""
    found: dict[str, tuple[str, Any, dict[str, int]]] = {}
    files = files_of(root / table.folder, system, engine, table.name, sustained=sustained)
    for path in reversed(files if table.dtype else files[-1:]):
        if table.dtype is not None and not _formats(path, table.dtype) - set(found):
            continue  # a newer version measured all that this one did
        dropped: dict[str, int] = {}
        frame = read_table(path, dropped)
        if table.dtype is None:
            return {"any": (path.parent.name, frame, dropped)}
        for name, part in frame.groupby(table.dtype):
            dtype = DTYPES.get(str(name))
            if dtype is not None and dtype not in found and len(part) >= (least or table.least):
                found[dtype] = (path.parent.name, part, dropped)
    return dict(sorted(found.items()))


def _formats(path: Path, column: str) -> set[str]:
    """The formats, by our names, that a table has rows of."""
    names = read_frame(path, [column])[column].unique()
    return {DTYPES[name] for name in map(str, names) if name in DTYPES}


@dataclass(frozen=True, slots=True)
class Table:
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
    if "step" in part:
        part = part[part["step"] == 0]  # after cached tokens it is another problem
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


TABLES = (
    Table("gemm", "gemm", "gemm_perf", "gemm_dtype", _gemm),
    Table("prefill", "attention", "context_attention_perf", None, _prefill),
    Table("decode", "attention", "generation_attention_perf", None, _decode),
    Table("moe", "moe", "moe_perf", "moe_dtype", _moe),
    Table("mla_prefill", "mla", "context_mla_perf", None, _mla_prefill, _LEAST_SMALL),
    Table("mla_decode", "mla", "generation_mla_perf", None, _mla_decode, _LEAST_SMALL),
    Table("bmm", "mla_bmm", "mla_bmm_perf", "bmm_dtype", _bmm, _LEAST_SMALL),
)
