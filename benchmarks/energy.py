"""Predicted power and energy against measured serving: the ML.ENERGY leaderboard v3 (vLLM 0.11, H100, B200).

    python benchmarks/energy.py energy_mlenergy_v3.csv

A row is a server kept full: replayed as a closed loop of as many clients as ran on average, outputs of the
mean length, inputs of 400 tokens (not stated there; chat prompts). Nothing was fitted on these rows: power of
kernels comes from H200, B200 and GB200 kernel runs. Power is that of the GPUs alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from hardware import InputError
from planner.pipeline import Planner

DEVICES = {"H100": "h100-sxm-80gb", "B200": "b200-sxm-180gb"}
INPUT_TOKENS = {"lm-arena-chat": 400, "gpqa": 300, "sourcegraph-fim": 1500}


def question(row: Any) -> dict[str, Any]:
    """The run as a request with a plan."""
    clients = max(1, round(row.avg_running_requests))
    copies = max(1, int(row.data_parallel))
    tensor = int(row.tensor_parallel)
    formats = {"bfloat16": "bf16", "fp8": "fp8"}.get(row.weight_precision, "fp4")
    hot = {"fp4": "fp8" if row.gpu_model == "B200" else "bf16"}.get(formats, formats)
    # Experts over all devices: attention runs data parallel on those that no tensor group takes.
    ranks = max(1, int(row.num_gpus) // tensor) if row.expert_parallel > 1 else 1
    return {
        "model": row.model_id,
        "engine": {"name": "vllm"},
        "cluster": {
            "pools": [
                {
                    "name": "main", "device": DEVICES[row.gpu_model], "nodes": -(-int(row.num_gpus) // 8),
                    "devices_per_node": 8,
                }
            ]
        },
        "workload": {
            "synthetic": {
                "arrivals": {"process": "closed", "concurrency": clients},
                "requests": max(64, 4 * clients),
                "input_tokens": {"distribution": "constant", "value": INPUT_TOKENS.get(row.task, 400)},
                "output_tokens": {"distribution": "lognormal", "mean": float(row.osl_mean), "cv": 0.6},
                "seed": 0,
            }
        },
        "plan": {
            "replicas": copies if ranks == 1 else 1,
            "worker": {
                "parallelism": {
                    "tensor": tensor, "attention_data": ranks,
                    "expert": int(row.expert_parallel) if row.expert_parallel > 1 else 1,
                },
                "quantization": {"weights": formats, "activations": hot},
                "batching": {"max_num_seqs": int(row.max_num_seqs)},
            },
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--sample", type=int, default=0, help="at most this many rows of a model and device")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs = pd.read_csv(given.runs)
    if given.sample:
        order = runs.sample(frac=1.0, random_state=0)
        runs = order[order.groupby(["model_id", "gpu_model"]).cumcount() < given.sample]
    planner, rows = Planner(), []
    for row in runs.itertuples():
        try:
            answer = planner.evaluate(question(row))
        except InputError as error:
            rows.append({"problem": str(error)[:90]})
            continue
        if answer["status"] != "ok":
            rows.append({"problem": answer["rejected"][0]["reason"][:90]})
            continue
        metrics = answer["plans"][0]["metrics"]
        rows.append(
            {
                "power_error": metrics["power_w_per_device"] / row.power_per_gpu_w - 1,
                "itl_error": metrics["itl_s"]["p50"] * 1e3 / row.itl_p50_ms - 1,
                "energy_error": metrics["energy_j_per_output_token"] / row.energy_per_output_token_j - 1,
            }
        )
    table = pd.concat([runs.reset_index(drop=True), pd.DataFrame(rows)], axis=1)
    if given.out:
        table.to_csv(given.out)
    print("| device | model | runs | power: mean error (bias) | ITL p50 | J per output token |")
    print("| --- | --- | --- | --- | --- | --- |")
    known = table[table.power_error.notna()]
    groups = [*known.groupby(["gpu_model", "architecture"]), (("all", "all"), known)]
    for (device, kind), part in groups:
        cells = [
            f"{100 * part[name].abs().mean():.0f} % ({100 * part[name].median():+.0f})"
            for name in ("power_error", "itl_error", "energy_error")
        ]
        print(f"| {device} | {kind} | {len(part)} | {' | '.join(cells)} |")
    if "problem" in table:
        print(table.problem.dropna().value_counts().head(8).to_string())


if __name__ == "__main__":
    main()
