"""Predictions against measured runs of disaggregated servers: mean TTFT and TPOT of closed-loop benchmarks.

    python benchmarks/measured_pairs.py RUNS.csv.gz

RUNS has one run a row in the columns that `measured_runs.py` reads; those of mode `disagg` are taken that say
how many workers of each kind there were, how these were cut and how many clients asked. Nothing was
fitted on any of them. What a row does not say is set as `measured_runs.py` sets it for aggregated runs: room
for the clients, no prefix reuse, a cache in the engine's default format.
Runs whose checkpoint or server is known to have speculated are left out; others may have without saying so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from measured_runs import DEVICES, coverage, engine_of, formats, lengths, report, version_key

from hardware import InputError
from planner.pipeline import Planner

KNOWN = ["concurrency", "prefill_num_workers", "decode_num_workers", "prefill_tp_size", "decode_tp_size"]


def worker(row: Any, role: str) -> tuple[int, dict[str, Any]]:
    """(replicas, worker) of one kind; 0 and nothing both mean that a degree was not used."""

    def degree(name: str) -> int:
        return max(1, int(np.nan_to_num(getattr(row, f"{role}_{name}"))))

    replicas, tensor, ranks = degree("num_workers"), degree("tp_size"), degree("attention_dp_size")
    expert, concurrency = degree("moe_ep_size"), int(row.concurrency)
    if ranks > 1 and tensor % ranks == 0:
        tensor //= ranks  # counted over all ranks
    seqs = max(8, -(-concurrency // (replicas * ranks)))
    batching: dict[str, Any] = {"max_num_seqs": seqs}
    if role == "prefill" or row.backend == "trtllm":
        batching["max_num_batched_tokens"] = max(8192, int(row.isl_nominal) + seqs + 64)
    return replicas, {
        "pool": "main",
        "parallelism": {
            "tensor": tensor,
            "pipeline": degree("pp_size"),
            "expert": expert if (tensor * ranks) % expert == 0 else 1,
            "attention_data": ranks,
        },
        "quantization": formats(row),
        "batching": batching,
        "prefix_caching": False,
    }


def served_by(row: Any) -> dict[str, str]:
    """A run's engine; versions of TensorRT-LLM that never were are those of Dynamo, which served it."""
    version = version_key(row.backend_version)
    dynamo = row.backend == "trtllm" and version is not None and version < (0, 18)
    return {"name": row.backend} if dynamo else engine_of(row)


def question(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(request, plan) of one run."""
    parts = {role: worker(row, role) for role in ("prefill", "decode")}
    devices = sum(
        count * int(np.prod([one["parallelism"][name] for name in ("tensor", "pipeline", "attention_data")]))
        for count, one in parts.values()
    )
    per_node = 4 if row.system.startswith("gb") else 8
    concurrency = int(row.concurrency)
    request = {
        "model": row.model_path,
        "engine": served_by(row),
        "cluster": {
            "pools": [
                {
                    "name": "main",
                    "device": DEVICES[row.system],
                    "nodes": -(-devices // per_node),
                    "devices_per_node": per_node,
                }
            ]
        },
        "workload": {
            "synthetic": {
                "arrivals": {"process": "closed", "concurrency": concurrency},
                "requests": max(64, 6 * concurrency),
                "input_tokens": lengths(row, row.isl_nominal),
                "output_tokens": lengths(row, row.osl_nominal),
                "seed": 0,
            }
        },
    }
    roles = {role: {"replicas": count, "worker": one} for role, (count, one) in parts.items()}
    return request, {"serving": "disaggregated", **roles}


def predict(planner: Planner, row: Any) -> dict[str, Any]:
    """Prediction of one run, or why there is none."""
    try:
        answer = planner.evaluate(*question(row))
    except InputError as error:
        return {"problem": str(error)}
    if answer["status"] != "ok":
        return {"problem": answer["rejected"][0]["reason"]}
    entry = answer["plans"][0]
    found = {}
    for name in ("ttft", "tpot"):
        value = entry["metrics"][f"{name}_s"]["mean"] or float("nan")
        low, high = entry["interval"][f"{name}_s"].get("mean", (float("nan"), float("nan")))
        found |= {f"{name}_ms": value * 1e3, f"{name}_low_ms": low * 1e3, f"{name}_high_ms": high * 1e3}
    return found


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--most", type=int, default=16384, help="leave runs of more clients out")
    parser.add_argument("--out", type=Path, help="write the rows with predictions as CSV")
    given = parser.parse_args()
    runs = pd.read_csv(given.runs)
    runs = runs[(runs["mode"] == "disagg") & runs[KNOWN].notna().all(axis=1)]
    speculates = runs.spec_decode_from_fixture.eq("mtp")
    print(f"{len(runs)} runs say how they were served; {speculates.sum()} speculated")
    runs = runs[~speculates & (runs.concurrency <= given.most)]
    planner = Planner()
    found = pd.DataFrame([predict(planner, row) for row in runs.itertuples()], index=runs.index)
    table = pd.concat([runs, found], axis=1)
    for name in ("ttft", "tpot"):
        table[f"{name}_error"] = table[f"{name}_ms"] / table[f"{name}_mean_ms"] - 1.0
    print(coverage(table))
    print(report(table, ["model_path", "system", "backend"]))
    if "problem" in table:
        print(json.dumps(table.problem.dropna().value_counts().head(12).to_dict(), indent=1))
    if given.out:
        table.to_csv(given.out)


if __name__ == "__main__":
    main()
