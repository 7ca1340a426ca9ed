"""Fit the coefficients of `costmodels/kernels.py` on measured kernels, and judge them held out.

    python benchmarks/roofline_fit.py [SYSTEMS_DIR] [--only FAMILY] [--device NAME] [--write]

SYSTEMS_DIR is the `systems` folder of the Apache-2.0 package aiconfigurator-core (default: the
installed one, extra `train`). Whole groups are held out: unseen (N, K) of a GEMM, unseen (heads, KV heads,
head size) of attention, unseen models of MoE. `--write` replaces `costmodels/coefficients.toml`.
Left out: rows faster than memory could deliver their weights or cache (they ran out of L2, which the
layers of a whole model do not), vLLM fp8_block GEMMs (host-bound: collected without CUDA graphs), rows
of zero latency, repeated keys, GB300 (its tables are partly copies of another system's).
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from costmodels.kernels import Rates, decode_time, gemm_time, moe_time, prefill_time
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

#: Sets with a larger held-out mean error than this are printed, but not written.
WORST_SHIPPED = 0.45

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

START: dict[str, dict[str, float]] = {
    "gemm": {
        "fixed_s": 2.5e-6,
        "compute": 0.8,
        "memory": 0.85,
        "overlap": 4.0,
        "reuse": 0.5,
        "wave_s": 0.5e-6,
        "fill": 0.7,
        "split_s": 1e-6,
        "tail": 0.4,
        "odd": 0.2,
    },
    "prefill": {
        "fixed_s": 8e-6,
        "compute": 0.7,
        "memory": 0.5,
        "overlap": 2.0,
        "softmax": 60.0,
        "wave_s": 0.3e-6,
        "tail": 0.5,
    },
    "decode": {
        "fixed_s": 8e-6,
        "compute": 0.4,
        "memory": 0.85,
        "overlap": 2.0,
        "softmax": 60.0,
        "block_s": 1e-6,
        "chunk": 2.0,
        "tile_s": 0.4e-6,
        "combine_s": 1.5e-6,
        "unpacked": 0.1,
    },
    "moe": {
        "fixed_s": 2e-5,
        "compute": 0.6,
        "memory": 0.7,
        "overlap": 2.0,
        "reuse": 0.5,
        "expert_s": 2e-8,
        "wave_s": 1e-6,
        "pad": 0.5,
        "idle": 0.5,
        "shuffle": 0.6,
    },
}
START["mla_prefill"], START["mla_decode"] = START["prefill"], START["decode"]

#: Formats of GEMMs whose tables hold the scaling of their activations.
NARROWED = ("fp8", "fp8_block", "fp4", "int8")

#: Share of the error that a further coefficient must leave at the most.
WORTH = 0.92

#: Coefficients that are shares of something stay physical.
UPPER = {
    "compute": 0.97,
    "memory": 0.97,
    "fill": 4.0,
    "tail": 1.0,
    "overlap": 12.0,
    "shuffle": 2.0,
    "idle": 1.0,
    "pad": 1.5,
    "reuse": 6.0,
    "routed": 6.0,
    "softmax": 400.0,
    "chunk": 64.0,
    "odd": 8.0,
    "unpacked": 1.0,
}
LOWER = {"routed": 1e-4, "overlap": 1.0, "compute": 0.03, "memory": 0.05, "shuffle": 0.05, "softmax": 1.0}


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


def version_key(name: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", name))


def newest(
    root: Path, engine: str, name: str, skip: Callable[[str], bool] = lambda version: False
) -> Path | None:
    found = [p for p in (root / engine).glob(f"*/{name}") if not skip(p.parent.name)]
    return max(found, key=lambda p: version_key(p.parent.name)) if found else None


def read(path: Path) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    frame = frame[frame["latency"] > 0]
    keys = [c for c in frame.columns if c not in ("latency", "power", "power_limit")]
    frame = frame.groupby(keys, as_index=False, dropna=False)["latency"].median()
    frame["seconds"] = frame["latency"] * 1e-3
    return frame


def held_out(labels: pd.Series) -> np.ndarray:
    """A stable hash in 0..99 per group."""
    return np.array([zlib.crc32(str(x).encode()) % 100 for x in labels])


def problems(base: Path) -> Iterator[Problem]:
    catalog = load_catalog()
    for system, device in SYSTEMS.items():
        root = base / "data" / system
        entry = catalog.device(device)
        architecture, peaks = entry.architecture, entry.peak_flops_per_s

        def rates(kind: str, entry: Device = entry) -> Rates:
            peak = float(entry.peak_flops_per_s[kind])
            return Rates(peak, entry.memory_bandwidth_bytes_per_s, float(entry.sm_count))

        for engine in ("vllm", "trtllm", "sglang"):
            path = newest(root / "gemm", engine, "gemm_perf.parquet")
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
            path = newest(root / "attention", engine, "context_attention_perf.parquet")
            if path:
                frame = read(path)
                frame["kv"] = np.where(frame["kv_cache_dtype"].astype(str).str.contains("fp8"), "fp8", "bf16")
                frame = frame[~frame["attn_dtype"].astype(str).str.contains("fp8")]
                for kv, part in frame.groupby("kv"):
                    yield prefill_problem(
                        device, architecture, engine, str(kv), part, rates("bf16"), source(path)
                    )
            path = newest(root / "attention", engine, "generation_attention_perf.parquet")
            if path:
                frame = read(path)
                frame["kv"] = np.where(frame["kv_cache_dtype"].astype(str).str.contains("fp8"), "fp8", "bf16")
                for kv, part in frame.groupby("kv"):
                    yield decode_problem(
                        device, architecture, engine, str(kv), part, rates("bf16"), source(path)
                    )
            for phase in ("context", "generation"):
                path = newest(root / "mla", engine, f"{phase}_mla_perf.parquet")
                if path:
                    frame = read(path)
                    frame["kv"] = np.where(
                        frame["kv_cache_dtype"].astype(str).str.contains("fp8"), "fp8", "bf16"
                    )
                    for kv, part in frame.groupby("kv"):
                        yield mla_problem(
                            device, architecture, engine, phase, str(kv), part, rates("bf16"), source(path)
                        )
            for dtype, (path, part) in newest_experts(root / "moe", engine).items():
                known = DTYPES.get(dtype)
                if known and known[3] in peaks and len(part) > 150:
                    yield moe_problem(
                        device, architecture, engine, known, part, rates(known[3]), source(path)
                    )


def newest_experts(root: Path, engine: str) -> dict[str, tuple[Path, pd.DataFrame]]:
    """Rows of routed experts by format, each from the newest version that measured it.

    A release often measures only what changed, so the newest folder alone lacks most formats. Marlin
    stands in for experts of other activations in the mxfp4 rows; where the engine's own kernel was
    measured too, its rows are the ones that a server runs.
    """
    found: dict[str, tuple[Path, pd.DataFrame]] = {}
    for path in sorted((root / engine).glob("*/moe_perf.parquet"), key=lambda p: version_key(p.parent.name)):
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
        held_out(part["n"].astype(str) + "x" + part["k"].astype(str)),
    )


def prefill_problem(
    device: str, arch: str, engine: str, kv: str, part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = part[(part["isl"] >= 16) & (part["head_dim"] <= 256)].copy()
    part["kv_heads"] = np.where(
        part["num_key_value_heads"] > 0, part["num_key_value_heads"], part["num_heads"]
    )
    if "window_size" not in part:
        part["window_size"] = 0

    def predict(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        dims = 2 * x["head_dim"].to_numpy()
        return prefill_time(
            c,
            x["isl"].to_numpy(),
            0,
            x["batch_size"].to_numpy(),
            x["num_heads"].to_numpy(),
            x["kv_heads"].to_numpy(),
            dims,
            x["window_size"].to_numpy(),
            dims * BYTES_PER_ELEMENT[kv],
            rates,
        )

    return Problem(device, arch, engine, "prefill", kv, src, predict, part, heads_group(part))


def heads_group(part: pd.DataFrame) -> np.ndarray:
    return held_out(
        part["num_heads"].astype(str)
        + "/"
        + part["kv_heads"].astype(str)
        + "/"
        + part["head_dim"].astype(str)
    )


def decode_problem(
    device: str, arch: str, engine: str, kv: str, part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = part[(part["head_dim"] <= 256) & (part["batch_size"] <= 1024)].copy()
    part["kv_heads"] = np.where(
        part["num_key_value_heads"] > 0, part["num_key_value_heads"], part["num_heads"]
    )
    if "window_size" not in part:
        part["window_size"] = 0
    seen = part["step"] + part["isl"]
    seen = np.where(part["window_size"] > 0, np.minimum(seen, part["window_size"]), seen)
    cache = part["batch_size"] * seen * part["kv_heads"] * 2 * part["head_dim"] * BYTES_PER_ELEMENT[kv]
    # No served model has more than 32 queries per KV head; kernels fall off a cliff beyond.
    part = part[(part["seconds"] > cache / rates.bandwidth) & (part["num_heads"] <= 32 * part["kv_heads"])]

    def predict(c: dict[str, float], x: pd.DataFrame) -> np.ndarray:
        dims = 2 * x["head_dim"].to_numpy()
        return decode_time(
            c,
            x["batch_size"].to_numpy(),
            x["step"].to_numpy() + x["isl"].to_numpy(),
            x["num_heads"].to_numpy(),
            x["kv_heads"].to_numpy(),
            dims,
            x["window_size"].to_numpy(),
            dims * BYTES_PER_ELEMENT[kv],
            rates,
        )

    return Problem(device, arch, engine, "decode", kv, src, predict, part, heads_group(part))


def mla_problem(
    device: str, arch: str, engine: str, phase: str, kv: str, part: pd.DataFrame, rates: Rates, src: str
) -> Problem:
    part = part.copy()
    group = held_out(part["num_heads"].astype(str) + "/" + part["batch_size"].astype(str))

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
    return Problem(device, arch, engine, "moe", known[0], src, predict, part, held_out(label))


def fit(problem: Problem, rows: int = 1500) -> tuple[dict[str, float], np.ndarray, int]:
    """Coefficients fitted on the groups with hash < 75, and log residuals of the others."""
    start, more = dict(START[problem.family]), {}
    if problem.family == "moe":
        more = {"routed": 0.3}
    elif problem.family == "gemm" and problem.dtype in NARROWED:
        start["prepare"] = 5.0
        more = {"row_s": 1e-9}  # vLLM's own kernel for fp8
    plain = fit_from(problem, start, rows)
    if not more:
        return plain
    found = fit_from(problem, start | more, rows)
    return found if mean_error(found[1]) < WORTH * mean_error(plain[1]) else plain


def mean_error(log_error: np.ndarray) -> float:
    return float(np.abs(np.exp(-log_error) - 1).mean())


def fit_from(
    problem: Problem, start: dict[str, float], rows: int
) -> tuple[dict[str, float], np.ndarray, int]:
    """As `fit`, from these coefficients on."""
    names = list(start)
    rng = np.random.default_rng(0)
    train = np.flatnonzero(problem.group < 75)
    test = np.flatnonzero(problem.group >= 75)
    if len(test) < 30 or len(train) < 50:
        order = rng.permutation(len(problem.rows))
        train, test = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
    train = rng.choice(train, min(rows, len(train)), replace=False)
    test = rng.choice(test, min(3000, len(test)), replace=False)
    seen, unseen = problem.rows.iloc[train], problem.rows.iloc[test]
    target = np.log(seen["seconds"].to_numpy())

    def unpack(x: np.ndarray) -> dict[str, float]:
        return dict(zip(names, np.exp(x), strict=True))

    def residual(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(problem.predict(unpack(x), seen)) - target)

    centre = np.log([start[name] for name in names])
    low = np.array([np.log(LOWER.get(n, start[n] / 100)) for n in names])
    high = np.array([np.log(UPPER.get(n, start[n] * 50)) for n in names])
    found = least_squares(
        residual,
        np.clip(centre, low + 1e-3, high - 1e-3),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.15,
        max_nfev=40,
        diff_step=1e-3,
    )
    values = unpack(found.x)
    errors = np.log(unseen["seconds"].to_numpy()) - np.log(problem.predict(values, unseen))
    return values, errors, len(problem.rows)


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def render(results: list[dict[str, Any]]) -> str:
    lines = [
        "# Coefficients of the closed forms in kernels.py, written by benchmarks/roofline_fit.py --write.",
        "# Fitted on measured kernels of the package aiconfigurator-core 0.12 (Apache-2.0). mape: mean",
        "# absolute error; low, high: 5 % and 95 % quantiles of measured / predicted, on held-out groups.",
        "",
    ]
    for row in results:
        lines.append("[[fit]]")
        lines += [
            f'{k} = "{row[k]}"' for k in ("device", "architecture", "engine", "family", "dtype", "fitted_on")
        ]
        lines.append(f"rows = {row['rows']}")
        lines += [f"{k} = {row[k]:.3f}" for k in ("mape", "low", "high")]
        inner = ", ".join(f"{k} = {significant(v)!r}" for k, v in row["values"].items())
        lines.append(f"values = {{ {inner} }}")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fit kernel coefficients and print their held-out error.")
    parser.add_argument("systems", nargs="?", help="the systems folder of aiconfigurator-core")
    parser.add_argument("--only", help="one family")
    parser.add_argument("--device", help="one catalog device")
    parser.add_argument("--rows", type=int, default=1500, help="rows to fit on, per set")
    parser.add_argument("--write", type=Path, help="write the table here")
    options = parser.parse_args()
    if options.systems:
        base = Path(options.systems)
    else:
        spec = importlib.util.find_spec("aiconfigurator_core")
        if spec is None or not spec.submodule_search_locations:
            print(
                "aiconfigurator-core is not installed; name its systems folder",
                file=sys.stderr,
            )
            return 2
        base = Path(next(iter(spec.submodule_search_locations))) / "systems"
    results: list[dict[str, Any]] = []
    print("device                  engine  family       format     rows   MAPE  median   P90   5%..95%")
    for problem in problems(base):
        if (options.only and problem.family != options.only) or (
            options.device and problem.device != options.device
        ):
            continue
        if len(problem.rows) < 60:
            continue
        values, errors, rows = fit(problem, options.rows)
        shift = float(np.median(errors))
        ape = np.abs(np.exp(-errors) - 1)
        low, high = np.exp(np.quantile(errors, [0.05, 0.95]))
        print(
            f"{problem.device:23s} {problem.engine:7s} {problem.family:12s} {problem.dtype:9s} {rows:6d} "
            f"{100 * ape.mean():6.1f} {100 * np.median(ape):6.1f} {100 * np.quantile(ape, 0.9):6.1f}   "
            f"{low:.2f}..{high:.2f} bias {shift:+.2f}  "
            + " ".join(f"{k}={v:.3g}" for k, v in values.items()),
            flush=True,
        )
        results.append(
            {
                "device": problem.device,
                "architecture": problem.architecture,
                "engine": problem.engine,
                "family": problem.family,
                "dtype": problem.dtype,
                "fitted_on": problem.source,
                "rows": rows,
                "mape": float(ape.mean()),
                "low": float(min(1.0, low)),
                "high": float(max(1.0, high)),
                "values": values,
            }
        )
        if ape.mean() > WORST_SHIPPED:
            results.pop()  # several kernels in one table: a relative's set is the better guess
        if options.write:
            options.write.write_text(render(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
