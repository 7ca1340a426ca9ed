"""Predictions against measured end-to-end runs: mean TTFT and TPOT of closed-loop benchmarks.

    python benchmarks/measured_runs.py RUNS.csv.gz --use judge

RUNS has one aggregated run a row in the columns of aiconfigurator's `silicon_sample.csv` with
corrections (`tp_size_corrected`, mean lengths, a `use` column that splits calibrate from judge).
The host terms of the engine profiles were fitted on `--use calibrate` only (`--fit` prints such a
fit); the `judge` rows report and never tune. A row is replayed as it was run: a closed loop of
`concurrency` clients with its lengths, ten requests a client (at least 64), no prefix reuse.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from launched import Launched, launched, waiting_steps
from scipy import stats

from hardware import InputError
from planner.engines import EngineProfile, load_profile
from planner.given import check_plan, resolve_plan
from planner.pipeline import Planner
from planner.request import parse_plan

DEVICES = {
    "h100_sxm": "h100-sxm-80gb",
    "h200_sxm": "h200-sxm-141gb",
    "b200_sxm": "b200-sxm-180gb",
    "b300_sxm": "b300-sxm-288gb",
    "gb200": "gb200-186gb",
    "gb300": "gb300-288gb",
}


def version_key(version: Any) -> tuple[int, ...] | None:
    """(major, minor) of an engine version; None for development builds, which are named freely."""
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return (int(found.group(1)), int(found.group(2))) if found else None


def formats(row: Any) -> dict[str, str]:
    """Weights and activations of a run, from its checkpoint's precision."""
    precision = row.precision if isinstance(row.precision, str) else "bf16"
    if "FP8" in row.model_path:
        precision = "fp8"
    if row.model_path.startswith("openai/gpt-oss"):
        # mxfp4 by mxfp8 where the tensor cores can, else weight-only.
        return {"weights": "fp4", "activations": "bf16" if row.system.startswith("h") else "fp8"}
    if precision == "int4":
        return {"weights": "int4", "activations": "bf16"}
    if precision == "fp4" and row.system.startswith("h"):
        return {"weights": "fp4", "activations": "bf16"}
    return {"weights": precision, "activations": precision}


def batching(row: Any, ranks: int, settings: Launched) -> dict[str, Any]:
    """The limits a benchmark sets: as its server was launched, else room for its clients; TensorRT-LLM
    without chunked prefill also needs a token budget that holds a prompt beside them."""
    concurrency = int(row.concurrency)
    most = min(concurrency, settings.max_num_seqs or concurrency)
    found: dict[str, Any] = {"max_num_seqs": max(8, -(-most // ranks))}
    if row.backend == "trtllm":
        found["max_num_batched_tokens"] = max(8192, int(row.isl_nominal) + concurrency + 64)
    if settings.max_num_batched_tokens:
        found["max_num_batched_tokens"] = settings.max_num_batched_tokens
    return found


def lengths(row: Any, nominal: float) -> dict[str, Any]:
    """Lengths of a run around a nominal one."""
    if "uniform" in row.length_dist:
        return {"distribution": "uniform", "low": int(0.8 * nominal), "high": int(nominal)}
    return {"distribution": "constant", "value": int(nominal)}


def engine_of(row: Any) -> dict[str, str]:
    """A run's engine; the newest profile stands for development builds, which are named freely."""
    numbered = isinstance(row.backend_version, str) and re.match(r"\d+(\.\d+)+", row.backend_version)
    return {"name": row.backend, **({"version": numbered.group()} if numbered else {})}


def question(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(request, plan) of one run."""
    tensor = int(row.tp_size_corrected)
    ranks, expert, pipeline = (  # 0 and nothing both mean that it was not used
        max(1, int(np.nan_to_num(value))) for value in (row.attention_dp_size, row.moe_ep_size, row.pp_size)
    )
    per_rank = max(1, tensor // ranks) if ranks > 1 else tensor
    stage = per_rank * ranks
    concurrency = int(row.concurrency)
    per_node = 4 if row.system.startswith("gb") else 8
    settings = launched(row)
    request = {
        "model": row.model_path,
        "engine": engine_of(row),
        "cluster": {
            "pools": [
                {
                    "name": "main",
                    "device": DEVICES[row.system],
                    "nodes": -(-stage * pipeline // per_node),
                    "devices_per_node": per_node,
                }
            ]
        },
        "workload": {
            "synthetic": {
                "arrivals": {"process": "closed", "concurrency": concurrency},
                "requests": max(64, 10 * concurrency),
                "input_tokens": lengths(row, row.isl_nominal),
                "output_tokens": lengths(row, row.osl_nominal),
                "seed": 0,
            }
        },
    }
    plan = {
        "serving": "aggregated",
        "replicas": 1,
        "worker": {
            "pool": "main",
            "parallelism": {
                "tensor": per_rank,
                "pipeline": pipeline,
                "expert": expert if stage % max(1, expert) == 0 else 1,
                "attention_data": ranks,
            },
            "quantization": formats(row) | ({"kv_cache": settings.kv_cache} if settings.kv_cache else {}),
            "batching": batching(row, ranks, settings),
            "prefix_caching": False,
            **({"memory_fraction": settings.memory_fraction} if settings.memory_fraction else {}),
        },
    }
    return request, plan


def predict(
    planner: Planner,
    row: Any,
    host: dict[str, float] | None = None,
    intervals: bool = False,
    run_error: dict[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """Prediction of one run, or why there is none; `host` and `run_error` replace those of the profile."""
    try:
        request, plan = question(row)
        asked = planner.load(request)
        settings = launched(row)
        if settings.graph_max:
            tiers = tuple(
                replace(tier, graph_max=settings.graph_max, graph_max_small_tensor=0)
                for tier in asked.engine.tiers
            )
            asked = replace(asked, engine=replace(asked.engine, tiers=tiers))
        if host is not None:
            asked = replace(asked, engine=with_host(asked.engine, host))
        if run_error is not None:
            asked = replace(asked, engine=replace(asked.engine, run_error=run_error))
        evaluator = asked.evaluator(tables=planner._tables)
        point = resolve_plan(parse_plan(plan), asked.spec, asked.cluster, asked.engine)
        problem = check_plan(point, asked.spec, asked.cluster)
        reason = problem.reason if problem else evaluator.reject(point)
        if reason:
            return {"problem": reason}
        found = evaluator.evaluate(point, interval=intervals)
    except InputError as error:
        return {"problem": str(error)}
    metrics = found.metrics
    tpot_s = metrics["tpot_s"]["mean"] or float("nan")
    # The simulator's engines look at their queue at every step; some of these were told not to.
    wait_s = tpot_s * waiting_steps(settings, row.concurrency, row.osl_nominal)
    more = {"ttft": wait_s, "tpot": 0.0}
    spread = {}
    for name in ("ttft", "tpot") if intervals else ():
        low, high = found.interval[f"{name}_s"].get("mean", (float("nan"), float("nan")))
        spread |= {f"{name}_low_ms": (low + more[name]) * 1e3, f"{name}_high_ms": (high + more[name]) * 1e3}
    return spread | {
        "ttft_ms": (metrics["ttft_s"]["mean"] + wait_s) * 1e3,
        "tpot_ms": tpot_s * 1e3,
    }


def with_host(engine: EngineProfile, host: dict[str, float]) -> EngineProfile:
    """The profile with other host terms."""
    own = {name: value for name, value in host.items() if name in FRONT_END}
    step = {name: value for name, value in host.items() if name not in FRONT_END}
    return replace(engine, host=replace(engine.host, **step), **own)


def compare(
    runs: pd.DataFrame,
    planner: Planner,
    host: dict[str, float] | None = None,
    intervals: bool = False,
    run_error: dict[str, tuple[float, float]] | None = None,
) -> pd.DataFrame:
    """The runs with predictions and relative errors beside them."""
    rows = [predict(planner, row, host, intervals, run_error) for row in runs.itertuples()]
    found = pd.DataFrame(rows, index=runs.index)
    table = pd.concat([runs, found], axis=1)
    for name in ("ttft", "tpot"):
        if f"{name}_ms" in table:
            table[f"{name}_error"] = table[f"{name}_ms"] / table[f"{name}_mean_ms"] - 1.0
    return table


#: Terms of a profile outside its step overhead.
FRONT_END = ("request_s", "request_per_token_s")
#: What a fit may change, in the order in which it does.
FITTED = {  # first step of the search, most it may be
    # Limits are what the engines' own designs leave plausible: SGLang and vLLM overlap scheduling with the
    # device (SGLang v0.4, "zero-overhead batch scheduler"), and a front end is a few processes.
    "request_s": (10e-3, 40e-3),
    "request_per_token_s": (4e-6, 40e-6),
    "overlap_s": (1e-6, 4e-6),
    "decode_step_s": (0.4e-3, 1e-3),
    "decode_per_sequence_s": (4e-6, 40e-6),
    "mixed_per_token_s": (1e-6, 10e-6),
    "mixed_launch_s": (2e-6, 10e-6),
    "mixed_experts_share": (0.4, 2.0),
    "collective_s": (2e-6, 6e-6),
}


def loss(table: pd.DataFrame) -> float:
    """Mean absolute log error of TPOT and, at half its weight, TTFT; one wild run counts at most 0.6."""
    found = 0.0
    for name, weight in (("tpot", 1.0), ("ttft", 0.5)):
        ratio = np.log(table[f"{name}_ms"] / table[f"{name}_mean_ms"]).abs().dropna()
        found += weight * float(np.minimum(ratio, 0.6).mean())
    return found


def fit(runs: pd.DataFrame, engine: str, rounds: int = 4) -> dict[str, float]:
    """Host terms of one engine by coordinate search with halving steps, from its profile's values."""
    runs = runs[runs.backend == engine]
    profile = load_profile(engine)
    terms = {name: float(getattr(profile if name in FRONT_END else profile.host, name)) for name in FITTED}
    best = loss(compare(runs, Planner(), terms))
    print(f"{engine}: {len(runs)} runs, loss {best:.4f}", flush=True)
    for turn in range(rounds):
        for name, (first, most) in FITTED.items():
            step = first / 2**turn
            for direction in (1.0, -1.0):
                while True:
                    tried = {**terms, name: min(most, max(0.0, terms[name] + direction * step))}
                    if tried[name] == terms[name]:
                        break
                    found = loss(compare(runs, Planner(), tried))
                    if found > best - 1e-5:
                        break
                    best, terms = found, tried
        print(f"  round {turn + 1}: loss {best:.4f} {terms}", flush=True)
    return terms


def report(table: pd.DataFrame, by: list[str]) -> str:
    """Errors by group: mean absolute and median signed, in per cent."""
    lines = [f"{'group':<62}{'runs':>5}{'none':>5}{'TPOT MAPE':>11}{'bias':>7}{'TTFT MAPE':>11}{'bias':>7}"]

    def line(label: str, part: pd.DataFrame) -> str:
        known = part[part.tpot_error.notna()]
        return (
            f"{label:<62}{len(part):>5}{len(part) - len(known):>5}"
            f"{100 * known.tpot_error.abs().mean():>10.1f}%{100 * known.tpot_error.median():>6.0f}%"
            f"{100 * known.ttft_error.abs().mean():>10.1f}%{100 * known.ttft_error.median():>6.0f}%"
        )

    for key, part in table.groupby(by):
        lines.append(line(" ".join(str(k) for k in key), part))
    lines.append(line("all", table))
    return "\n".join(lines)


def coverage(table: pd.DataFrame) -> str:
    """Share of runs inside their 90 % interval, and its median width, by engine; and the spread of whole runs
    (5th and 95th percentile of measured / predicted) that an engine's profile states."""
    lines = []
    for engine, part in [*table.groupby("backend"), ("all", table)]:
        text = f"{engine:<8}"
        for name in ("tpot", "ttft"):
            known = part[part[f"{name}_error"].notna()]
            true = known[f"{name}_mean_ms"]
            inside = (true >= known[f"{name}_low_ms"]) & (true <= known[f"{name}_high_ms"])
            wide = (known[f"{name}_high_ms"] / known[f"{name}_low_ms"]).median()
            low, high = (true / known[f"{name}_ms"]).quantile([0.05, 0.95])
            text += f"  {name.upper()} {100 * inside.mean():.0f} % inside, high/low {wide:.2f}"
            text += f", measured/predicted {low:.2f} to {high:.2f}"
        lines.append(text)
    return "\n".join(lines)


#: Groups of fewer runs say little of their own.
_LEAST_RUNS = 5


def run_errors(table: pd.DataFrame) -> str:
    """What an engine's profile states of whole runs: (low, high) of measured / predicted, by engine.

    A run to come is of another model or device, so runs of one model on one device count together (random
    effects): the spread between such groups and the spread within them, at the 90 % level of Student's t for
    as few groups as there are. What kernels' own intervals explain of it (in the median) is taken off,
    as both are added up again in a prediction.
    """
    lines = []
    for engine, part in table.groupby("backend"):
        text = f"{engine:<8}"
        for name in ("tpot", "ttft"):
            known = part[part[f"{name}_error"].notna()]
            error = np.log(known[f"{name}_mean_ms"] / known[f"{name}_ms"])
            label = [known.model_path, known.system]
            middle, count = error.groupby(label).median(), error.groupby(label).size()
            middle = middle[count >= _LEAST_RUNS]
            inner = (error - error.groupby(label).transform("median")).quantile([0.05, 0.95])
            within = float(inner.iloc[1] - inner.iloc[0]) / (2.0 * stats.norm.ppf(0.95))
            between = float(middle.std(ddof=1)) * math.sqrt(1.0 + 1.0 / len(middle))
            reach = float(stats.t.ppf(0.95, len(middle) - 1)) * math.hypot(between, within)
            ends = []
            for end, side in ((float(middle.mean()) - reach, "low"), (float(middle.mean()) + reach, "high")):
                kernels = float(np.log(known[f"{name}_{side}_ms"] / known[f"{name}_ms"]).median())
                rest = math.sqrt(max(0.0, end * end - kernels * kernels)) if end * kernels > 0 else abs(end)
                ends.append(math.exp(math.copysign(rest, end)))
            text += f"  {name}_error = [{min(1.0, ends[0]):.2f}, {max(1.0, ends[1]):.2f}]"
            text += f"  {name}_within = [{math.exp(inner.iloc[0]):.2f}, {math.exp(inner.iloc[1]):.2f}]"
        lines.append(text)
    return "\n".join(lines)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--use", choices=("calibrate", "judge"), default="judge")
    parser.add_argument("--since", default="", help="only runs of this engine version or newer (or unnamed)")
    parser.add_argument("--sample", type=int, default=0, help="at most this many rows per group")
    parser.add_argument("--backend", default="", help="only this engine")
    parser.add_argument("--fit", action="store_true", help="fit host terms of --backend on these rows")
    parser.add_argument("--intervals", action="store_true", help="how often 90 %% intervals hold")
    parser.add_argument(
        "--run-errors", action="store_true", help="what profiles state of whole runs, from these"
    )
    parser.add_argument("--out", type=Path, help="write the rows with predictions as CSV")
    given = parser.parse_args()
    runs = pd.read_csv(given.runs)
    # A run that does not say how many clients or devices it had cannot be replayed.
    runs = runs[
        (runs.use == given.use)
        & (runs["mode"] == "agg")
        & runs[["concurrency", "tp_size_corrected"]].notna().all(axis=1)
    ]
    if given.backend:
        runs = runs[runs.backend == given.backend]
    if given.since:
        least = version_key(given.since)
        runs = runs[[version_key(v) is None or version_key(v) >= least for v in runs.backend_version]]
    if given.sample:
        order = runs.sample(frac=1.0, random_state=0)
        runs = order[order.groupby(["model_path", "system", "backend"]).cumcount() < given.sample]
    if given.fit:
        for engine in [given.backend] if given.backend else ("vllm", "sglang", "trtllm"):
            fit(runs[runs.use == "calibrate"], engine)
        return
    kernels_only = {"tpot": (1.0, 1.0), "ttft": (1.0, 1.0)} if given.run_errors else None
    table = compare(runs, Planner(), None, given.intervals or given.run_errors, kernels_only)
    if given.run_errors:
        print(run_errors(table))
    if given.intervals:
        print(coverage(table))
    print(report(table, ["model_path", "system", "backend"]))
    if "problem" in table:
        reasons = table.problem.dropna().value_counts().head(12)
        print(json.dumps(reasons.to_dict(), indent=1))
    if given.out:
        table.to_csv(given.out)
    np.seterr(all="warn")


if __name__ == "__main__":
    main()
