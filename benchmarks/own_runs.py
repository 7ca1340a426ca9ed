"""Predictions against what we measured ourselves: kernels and served models on an H100 and an H200.

    python benchmarks/own_runs.py [--kernels] [--served] [--dir benchmarks/measured]

Kernels: tables of `planfront profile` (`--kernels torch` on H100, vLLM's own on H200) against the predictors
that ship, which were fitted on other machines' readings of the same devices. Served: vLLM 0.24.0 with its
defaults on one device, weights of random numbers, in-process (AsyncLLM: no HTTP, no tokenizer), in closed
loops, at Poisson rates, and all at once; a run's requests are replayed as they arrived.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from measured_load import BLOCK, metrics_of
from measured_load import replayed as as_trace

from costmodels import DecodeAttention, Elementwise, Gemm, LearnedModel, PrefillAttention
from costmodels.learned.tables import DTYPES
from hardware import load_catalog
from planner.pipeline import Planner


def kernels(folder: Path) -> None:
    """A line for each kind of kernel: errors, bias, and how often the 90 % interval held."""
    print("| device | kernels | what | rows | mean error | median | bias | 90 % interval held |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for device, path, what, times, guess in kernels_of(folder):
        error = np.asarray(guess.time_s) / times - 1.0
        held = np.mean((times >= guess.low_s) & (times <= guess.high_s))
        print(
            f"| {device} | {path.parent.name} | {what} | {len(times)} | {100 * np.abs(error).mean():.1f} % | "
            f"{100 * np.median(np.abs(error)):.1f} % | {100 * np.median(error):+.1f} % | {100 * held:.0f} % |"
        )


def kernels_of(folder: Path) -> Iterator[tuple[str, Path, str, Any, Any]]:
    """(device, table, what, measured seconds, predictions) of each kind of kernel."""
    catalog, model = load_catalog(), LearnedModel("vllm", sustained=False)
    for root in sorted(path for path in folder.iterdir() if path.name in catalog.devices):
        device = catalog.device(root.name)
        for path in sorted(root.rglob("*_perf.csv")):
            frame = pd.read_csv(path)
            if path.name.startswith("gemm"):
                parts = [(f"GEMM {DTYPES[name]}", part) for name, part in frame.groupby("gemm_dtype")]
            elif path.name.startswith("memory"):
                parts = [(f"memory, {name}", part) for name, part in frame.groupby("op_name")]
            elif path.name.startswith("context"):
                frame = frame[frame["batch_size"] == 1]
                parts = [
                    ("prompts", frame[frame["step"] == 0]),
                    ("prompts after cached tokens", frame[frame["step"] > 0]),
                ]
            else:
                parts = [("decode", frame)]
            for what, part in parts:
                if len(part):
                    guess = _asked(part.reset_index(drop=True), path.name, device, model)
                    yield root.name, path, what, part["latency"].to_numpy() * 1e-3, guess


class _Answers:
    """Predictions of many rows, put together."""

    def __init__(self, rows: int) -> None:
        self.time_s, self.low_s, self.high_s = np.zeros(rows), np.zeros(rows), np.zeros(rows)


def _asked(part: pd.DataFrame, table: str, device: Any, model: LearnedModel) -> _Answers:
    found = _Answers(len(part))
    column = {name: part[name].to_numpy(dtype=np.float64) for name in part.select_dtypes("number")}
    if table.startswith("memory"):
        groups = {(): np.arange(len(part))}
    elif table.startswith("gemm"):
        groups = part.groupby(["n", "k", "gemm_dtype"]).indices
    else:
        groups = part.groupby(["num_heads", "num_key_value_heads", "head_dim"]).indices
    for key, rows in groups.items():
        op: Any
        if table.startswith("memory"):
            op = Elementwise(2.0 * column["size_bytes"][rows])
        elif table.startswith("gemm"):
            n, k, dtype = key
            op = Gemm(column["m"][rows], int(n), int(k), DTYPES[dtype], DTYPES[dtype])
        else:
            heads, kv_heads, dim = (int(value) for value in key)
            kind = PrefillAttention if table.startswith("context") else DecodeAttention
            first = "isl" if table.startswith("context") else "batch_size"
            seen = column["step"][rows] + (0.0 if table.startswith("context") else 1.0)
            op = kind(column[first][rows], seen, heads, kv_heads, dim, dim)
        guess = model.predict(op, device)
        found.time_s[rows], found.low_s[rows], found.high_s[rows] = guess.time_s, guess.low_s, guess.high_s
    return found


def served(folder: Path) -> None:
    """A line for each run: TTFT, TPOT, end to end, makespan and power, measured and predicted."""
    runs = pd.read_csv(folder / "served" / "runs.csv")
    requests = pd.read_csv(folder / "served" / "requests.csv")
    print(
        "\n| run | TTFT ms measured | predicted | TPOT ms | predicted | E2E s | predicted | makespan s "
        "| predicted | W | predicted |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    planner, errors = Planner(), []
    for run in runs.itertuples():
        own = requests[requests.run == run.run].reset_index(drop=True)
        found = replayed(planner, run, own)
        several = own[own.output_tokens > 1]
        tpot = float(((several.e2e_s - several.ttft_s) / (several.output_tokens - 1)).mean())
        pairs = {
            "TTFT": (1e3 * own.ttft_s.mean(), 1e3 * found["ttft_s"]["mean"], ".0f"),
            "TPOT": (1e3 * tpot, 1e3 * found["tpot_s"]["mean"], ".1f"),
            "E2E": (own.e2e_s.mean(), found["e2e_s"]["mean"], ".2f"),
            "makespan": (run.makespan_s, found["makespan_s"], ".1f"),
            "power": (run.mean_power_w, found["power_w_per_device"], ".0f"),
        }
        cells = " | ".join(f"{true:{form}} | {ours:{form}}" for true, ours, form in pairs.values())
        print(f"| {run.model.split('/')[1]} {run.weights} {run.run.split('-')[1]} | {cells} |", flush=True)
        errors.append(
            {"model": run.model.split("/")[1]}
            | {name: ours / true - 1.0 for name, (true, ours, _) in pairs.items()}
        )
    table = pd.DataFrame(errors)
    for model, part in [*table.groupby("model", sort=False), ("all", table)]:
        words = ", ".join(
            f"{name} {100 * part[name].abs().mean():.1f} % ({100 * part[name].median():+.0f})"
            for name in table.columns[1:]
        )
        print(f"{model}: mean error (bias): {words}")


def replayed(planner: Planner, run: Any, own: pd.DataFrame) -> Any:
    """Metrics of the run's plan under the run's requests."""
    with tempfile.TemporaryDirectory() as scratch:
        if pd.notna(run.concurrency):  # a closed loop draws its own arrivals
            workload: dict[str, Any] = {
                "synthetic": {
                    "arrivals": {"process": "closed", "concurrency": int(run.concurrency)},
                    "requests": int(run.requests),
                    "input_tokens": _lengths(run.input_tokens),
                    "output_tokens": _lengths(run.output_tokens),
                    "seed": 0,
                }
            }
        else:
            workload = as_trace(list(_trace(run, own)), scratch)
        return metrics_of(
            planner, run.model, (run.engine, run.version), run.device, workload,
            {
                "parallelism": {"tensor": 1},
                "quantization": {"weights": run.weights, "activations": run.weights},
                "prefix_caching": True,
            },
        )  # fmt: skip


def _lengths(text: Any) -> dict[str, Any]:
    low, _, high = str(text).partition("..")
    if high:
        return {"distribution": "uniform", "low": int(low), "high": int(high)}
    return {"distribution": "constant", "value": int(low)}


def _trace(run: Any, own: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(own.itertuples()):
        found = {
            "arrival_s": float(row.arrival_s),
            "input_tokens": int(row.input_tokens),
            "output_tokens": int(row.output_tokens),
        }
        if run.prefixes:
            group, shared = number % int(run.prefixes), int(run.shared_prefix_tokens) // BLOCK
            found["prefix_hashes"] = [
                f"prefix{group}-{block}" if block < shared else f"own{number}-{block}"
                for block in range(int(row.input_tokens) // BLOCK)
            ]
            found["block_tokens"] = BLOCK
        yield found


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernels", action="store_true", help="kernels alone")
    parser.add_argument("--served", action="store_true", help="served models alone")
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / "measured")
    given = parser.parse_args()
    if given.kernels or not given.served:
        kernels(given.dir)
    if given.served or not given.kernels:
        served(given.dir)


if __name__ == "__main__":
    main()
