"""The measured kernels that closed forms are fitted on (`roofline_fit.py`), table by table.

Left out: rows faster than memory could deliver their weights or cache (they ran out of L2, which the
layers of a whole model do not), vLLM fp8_block GEMMs (host-bound: collected without CUDA graphs), rows
of zero latency, repeated keys, GB300 (its tables are partly copies of another system's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from costmodels.kernels import Rates, decode_time, gemm_time, moe_time, prefill_time
from costmodels.learned.groups import hashed
from costmodels.learned.tables import files_of
from costmodels.ops import BYTES_PER_ELEMENT
from hardware import Device, load_catalog

#: System folder -> catalog device; efficiencies are relative to the rates of that entry.
SYSTEMS = {
    "h100_sxm": "h100-sxm-80gb",
    "h200_sxm": "h200-sxm-141gb",
    "a100_sxm": "a100-sxm-80gb",
    "b200_sxm": "b200-sxm-180gb",
    "b300_sxm": "b300-sxm-288gb",
    "gb200": "gb200-186gb",
    "l40s": "l40s",
    "rtx_pro_6000_server": "rtx-pro-6000-blackwell",
}

DTYPES = {
    "bfloat16": (
        "bf16",
        "bf16",
        "bf16",
        "bf16",
    ),  # dtype in the table -> key, weights, activations, arithmetic
    "fp8": ("fp8", "fp8", "fp8", "fp8"),
    "fp8_block": ("fp8_block", "fp8_block", "fp8", "fp8"),
    "nvfp4": ("fp4", "fp4", "fp4", "fp4"),
    "int4_wo": ("int4_wo", "int4", "bf16", "bf16"),
    "int8_wo": ("int8_wo", "int8", "bf16", "bf16"),
    "sq": ("int8", "int8", "int8", "int8"),
    "w4a16_mxfp4": ("fp4_wo", "fp4", "bf16", "bf16"),
    "w4a8_mxfp4_mxfp8": ("fp4_a8", "fp4", "fp8", "fp8"),
}


@dataclass(frozen=True)
class Problem:
    device: str
    architecture: str
    engine: str
    family: str
    dtype: str
    source: str
    predict: Callable[[dict[str, float], pd.DataFrame], np.ndarray]
    rows: pd.DataFrame
    group: np.ndarray  # which group a row is held out with


def read(path: Path) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    frame = frame[frame["latency"] > 0]
    keys = [c for c in frame.columns if c not in ("latency", "power", "power_limit")]
    frame = frame.groupby(keys, as_index=False, dropna=False)["latency"].median()
    frame["seconds"] = frame["latency"] * 1e-3
    return frame


def newest(root: Path, system: str, engine: str, name: str) -> Path | None:
    """The table of the newest version, if there is any."""
    return next(reversed(files_of(root, system, engine, name, sustained=True)), None)


def problems(tables: Path) -> Iterator[Problem]:
    """What is fitted: every table of every device, by format."""
    catalog = load_catalog()
    for system, device in SYSTEMS.items():
        root = tables / system
        entry = catalog.device(device)
        architecture, peaks = entry.architecture, entry.peak_flops_per_s

        def rates(kind: str, entry: Device = entry) -> Rates:
            peak = float(entry.peak_flops_per_s[kind])
            return Rates(peak, entry.memory_bandwidth_bytes_per_s, float(entry.sm_count))

        for engine in ("vllm", "trtllm", "sglang"):
            path = newest(root / "gemm", system, engine, "gemm_perf")
            if path:
                frame = read(path)
                for dtype, part in frame.groupby("gemm_dtype"):
                    known = DTYPES.get(str(dtype))
                    if not known or known[3] not in peaks:
                        continue
                    if engine == "vllm" and dtype == "fp8_block":
                        continue
                    yield gemm_problem(
                        device, architecture, engine, known, part, rates(known[3]), source(path)
                    )
            path = newest(root / "attention", system, engine, "context_attention_perf")
            if path:
                frame = read(path)
                frame["kv"] = np.where(frame["kv_cache_dtype"].astype(str).str.contains("fp8"), "fp8", "bf16")
                frame = frame[~frame["attn_dtype"].astype(str).str.contains("fp8")]
                for kv, part in frame.groupby("kv"):
                    yield prefill_problem(
                        device, architecture, engine, str(kv), part, rates("bf16"), source(path)
                    )
            path = newest(root / "attention", system, engine, "generation_attention_perf")
            if path:
                frame = read(path)
                frame["kv"] = np.where(frame["kv_cache_dtype"].astype(str).str.contains("fp8"), "fp8", "bf16")
                for kv, part in frame.groupby("kv"):
                    yield decode_problem(
                        device, architecture, engine, str(kv), part, rates("bf16"), source(path)
                    )
            for phase in ("context", "generation"):
                path = newest(root / "mla", system, engine, f"{phase}_mla_perf")
                if path:
                    frame = read(path)
                    frame["kv"] = np.where(
                        frame["kv_cache_dtype"].astype(str).str.contains("fp8"), "fp8", "bf16"
                    )
                    for kv, part in frame.groupby("kv"):
                        yield mla_problem(
                            device, architecture, engine, phase, str(kv), part, rates("bf16"), source(path)
                        )
            for dtype, (path, part) in newest_experts(root / "moe", system, engine).items():
                known = DTYPES.get(dtype)
                if known and known[3] in peaks and len(part) > 150:
                    yield moe_problem(
                        device, architecture, engine, known, part, rates(known[3]), source(path)
                    )


def newest_experts(root: Path, system: str, engine: str) -> dict[str, tuple[Path, pd.DataFrame]]:
    """Rows of routed experts by format, each from the newest version that measured it.

    A release often measures only what changed, so the newest folder alone lacks most formats. Marlin
    stands in for experts of other activations in the mxfp4 rows; where the engine's own kernel was
    measured too, its rows are the ones that a server runs.
    """
    found: dict[str, tuple[Path, pd.DataFrame]] = {}
    for path in files_of(root, system, engine, "moe_perf", sustained=True):
        frame = read(path)
        frame = frame[frame["distribution"] == "power_law_1.01"]
        for dtype, part in frame.groupby("moe_dtype"):
            own = part[~part["kernel_source"].str.contains("marlin")]
            if "mxfp4" in str(dtype) and len(own):
                part = own
            if len(part) > 150:
                found[str(dtype)] = (path, part)
    return found


def source(path: Path) -> str:
    return f"aiconfigurator-core {path.parts[-5]} {path.parts[-4]} {path.parts[-3]} {path.parts[-2]}"


def gemm_problem(
    device: str, arch: str, engine: str, known: tuple[str, ...], part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = part[(part["n"] >= 256) & (part["k"] >= 128) & (part["m"] <= 16384)]
    wb, ab = BYTES_PER_ELEMENT[known[1]], BYTES_PER_ELEMENT[known[2]]
    part = part[part["seconds"] > part["n"] * part["k"] * wb / rates.bandwidth]

    def predict(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        return gemm_time(c, x["m"].to_numpy(), x["n"].to_numpy(), x["k"].to_numpy(), 1, wb, ab, rates)

    return Problem(
        device,
        arch,
        engine,
        "gemm",
        known[0],
        src,
        predict,
        part,
        hashed(part["n"].astype(str) + "x" + part["k"].astype(str)),
    )


def with_layout(part: pd.DataFrame) -> pd.DataFrame:
    """The rows with the KV heads that attend, and a window."""
    part = part.copy()
    part["kv_heads"] = np.where(
        part["num_key_value_heads"] > 0, part["num_key_value_heads"], part["num_heads"]
    )
    if "window_size" not in part:
        part["window_size"] = 0
    return part


def layout_of(x: pd.DataFrame, kv: str) -> tuple[np.ndarray, ...]:
    """Heads, KV heads, dims of a key and its value, window, and bytes of these, as closed forms take them."""
    dims = 2 * x["head_dim"].to_numpy()
    heads, kv_heads, window = (x[name].to_numpy() for name in ("num_heads", "kv_heads", "window_size"))
    return heads, kv_heads, dims, window, dims * BYTES_PER_ELEMENT[kv]


def prefill_problem(
    device: str, arch: str, engine: str, kv: str, part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = with_layout(part[(part["isl"] >= 16) & (part["head_dim"] <= 256)])

    def predict(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        return prefill_time(c, x["isl"].to_numpy(), 0, x["batch_size"].to_numpy(), *layout_of(x, kv), rates)

    return Problem(device, arch, engine, "prefill", kv, src, predict, part, heads_group(part))


def heads_group(part: pd.DataFrame) -> np.ndarray:
    return hashed(
        part["num_heads"].astype(str)
        + "/"
        + part["kv_heads"].astype(str)
        + "/"
        + part["head_dim"].astype(str)
    )


def decode_problem(
    device: str, arch: str, engine: str, kv: str, part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = with_layout(part[(part["head_dim"] <= 256) & (part["batch_size"] <= 1024)])
    seen = part["step"] + part["isl"]
    seen = np.where(part["window_size"] > 0, np.minimum(seen, part["window_size"]), seen)
    cache = part["batch_size"] * seen * part["kv_heads"] * 2 * part["head_dim"] * BYTES_PER_ELEMENT[kv]
    # No served model has more than 32 queries per KV head; kernels fall off a cliff beyond.
    part = part[(part["seconds"] > cache / rates.bandwidth) & (part["num_heads"] <= 32 * part["kv_heads"])]

    def predict(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        context = x["step"].to_numpy() + x["isl"].to_numpy()
        return decode_time(c, x["batch_size"].to_numpy(), context, *layout_of(x, kv), rates)

    return Problem(device, arch, engine, "decode", kv, src, predict, part, heads_group(part))


def mla_problem(
    device: str, arch: str, engine: str, phase: str, kv: str, part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = part.copy()
    group = hashed(part["num_heads"].astype(str) + "/" + part["batch_size"].astype(str))

    def generation(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        context = x["step"].to_numpy() + x["isl"].to_numpy()
        return decode_time(
            c,
            x["batch_size"].to_numpy(),
            context,
            x["num_heads"].to_numpy(),
            1,
            576 + 512,
            0,
            576 * BYTES_PER_ELEMENT[kv],
            rates,
        )

    def context(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        return prefill_time(
            c,
            x["isl"].to_numpy(),
            0,
            x["batch_size"].to_numpy(),
            x["num_heads"].to_numpy(),
            x["num_heads"].to_numpy(),
            192 + 128,
            0,
            (192 + 128) * BYTES_PER_ELEMENT[kv],
            rates,
        )

    family, predict = ("mla_decode", generation) if phase == "generation" else ("mla_prefill", context)
    return Problem(device, arch, engine, family, kv, src, predict, part, group)


def moe_problem(
    device: str, arch: str, engine: str, known: tuple[str, ...], part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = part.copy()
    wb, ab = BYTES_PER_ELEMENT[known[1]], BYTES_PER_ELEMENT[known[2]]

    def predict(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        experts = x["num_experts"].to_numpy()
        return moe_time(
            c,
            x["num_tokens"].to_numpy(),
            x["hidden_size"].to_numpy(),
            x["inter_size"].to_numpy() / x["moe_tp_size"].to_numpy(),
            experts,
            np.maximum(1, experts / x["moe_ep_size"].to_numpy()),
            x["topk"].to_numpy(),
            3,
            wb,
            ab,
            rates,
        )

    label = (
        part["hidden_size"].astype(str)
        + "/"
        + part["inter_size"].astype(str)
        + "/"
        + part["num_experts"].astype(str)
    )
    return Problem(device, arch, engine, "moe", known[0], src, predict, part, hashed(label))
