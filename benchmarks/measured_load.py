"""Predictions against measured runs that nothing was fitted on: open loops, saturation, whole batches.

    python benchmarks/measured_load.py [--stages RUNS STAGES] [--requests RUNS REQUESTS]
                                       [--online RUNS] [--throughput RUNS]

stages: a server asked at constant rates (BLIS's validation runs: vLLM 0.15 on H100). Its client repeats
`resolved_num_groups` x `resolved_prompts_per_group` prompts, so that nearly all of a prompt is cached; the
replay asks each of them once before the clock starts. Overloaded stages (failed requests) are left out.
requests: one overloaded run, request by request (LLMServingSim's: vLLM 0.19 on an RTX 4090).
online: `sglang.bench_serving` results at Poisson rates, lengths uniform up to the stated ones.
throughput: vendors' tables of output tokens per second at full batches (TensorRT-LLM's performance overview).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from planner.pipeline import Planner

MODELS = {
    "Llama 3.3 70B": "meta-llama/Llama-3.3-70B-Instruct",
    "Llama 3.1 8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama 3.1 405B": "meta-llama/Llama-3.1-405B-Instruct",
    "Qwen3-235B-A22B": "Qwen/Qwen3-235B-A22B",
    "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
    "GPT-OSS 120B": "openai/gpt-oss-120b",
    "DeepSeek R1 0528": "deepseek-ai/DeepSeek-R1",
}
DEVICES = {
    "H100 SXM 80GB": "h100-sxm-80gb",
    "H200 SXM 141GB": "h200-sxm-141gb",
    "B200 180GB": "b200-sxm-180gb",
    "GB200 192GB": "gb200-186gb",
}
BLOCK = 16
#: Requests of a stage that are replayed at the most.
MOST = 3000


def metrics_of(
    planner: Planner, model: str, engine: tuple[str, str], device: str, workload: Any, worker: Any
) -> Any:
    """Metrics of one plan, or the reason why there are none."""
    per_node = 4 if device.startswith("gb") else 8
    answer = planner.evaluate(
        {
            "model": model,
            "engine": dict(zip(("name", "version"), engine, strict=True)),
            "cluster": {
                "pools": [{"name": "main", "device": device, "nodes": 2, "devices_per_node": per_node}]
            },
            "workload": workload,
        },
        {"serving": "aggregated", "replicas": 1, "worker": {"pool": "main", **worker}},
    )
    return answer["plans"][0]["metrics"] if answer["plans"] else answer["rejected"][0]["reason"]


def replayed(rows: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """A workload of these requests, as a trace."""
    path = Path(folder) / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"trace": {"path": str(path)}}


def stage_rows(run: Any, prompt: int, rate: float, count: int) -> list[dict[str, Any]]:
    """Exponential gaps rescaled to the exact rate, as the client draws them; every prompt asked before."""
    rng = np.random.default_rng(0)
    groups, each = int(run.resolved_num_groups), int(run.resolved_prompts_per_group)
    at = np.cumsum(rng.exponential(size=count))
    at *= count / rate / at[-1]
    shared = int(run.system_prompt_len) // BLOCK

    def row(number: int, when: float, answer: int) -> dict[str, Any]:
        asked = number % (groups * each)
        ids = [
            f"{'group' if block < shared else 'prompt'}{asked // each if block < shared else asked}-{block}"
            for block in range(prompt // BLOCK)
        ]
        return {
            "arrival_s": when, "input_tokens": prompt, "output_tokens": answer,
            "prefix_hashes": ids, "block_tokens": BLOCK,
        }  # fmt: skip

    warm = groups * each
    return [row(number, number * 0.5, 1) for number in range(warm)] + [
        row(number, warm * 0.5 + 10.0 + float(when), int(run.output_len)) for number, when in enumerate(at)
    ]


def stages(planner: Planner, runs: pd.DataFrame, stages: pd.DataFrame) -> None:
    print("| run | rate | TTFT ms measured | predicted | TPOT ms measured | predicted | E2E s | predicted |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    errors: dict[str, list[float]] = {"TTFT": [], "TPOT": [], "E2E": []}
    for run in runs.itertuples():
        rates = [float(rate) for rate in re.findall(r"([\d.]+)rps", run.stages)]
        for stage, rate in zip(stages[stages.run == run.run].itertuples(), rates, strict=False):
            if stage.n_fail:
                continue
            prompt, count = round(stage.prompt_len_mean), min(MOST, int(stage.n_success))
            rows = stage_rows(run, prompt, rate, count)
            with tempfile.TemporaryDirectory() as folder:
                found = metrics_of(
                    planner, run.model, ("vllm", "0.15.0"), "h100-sxm-80gb", replayed(rows, folder),
                    {
                        "parallelism": {"tensor": int(run.tp)},
                        "quantization": {"weights": "bf16", "activations": "bf16"},
                        "batching": {
                            "max_num_seqs": int(run.max_num_seqs),
                            "max_num_batched_tokens": int(run.max_num_batched_tokens),
                        },
                        "prefix_caching": True,
                    },
                )  # fmt: skip
            # Warming requests are one in thirty, alone in the engine: medians do not see them.
            ttft, e2e = found["ttft_s"]["p50"], found["e2e_s"]["p50"]
            steps = int(run.output_len) - 1
            true_ttft, true_e2e = stage.ttft_median_s, stage.e2e_median_s
            tpot, true_tpot = (e2e - ttft) / steps, (true_e2e - true_ttft) / steps
            for name, ours, true in (
                ("TTFT", ttft, true_ttft), ("TPOT", tpot, true_tpot), ("E2E", e2e, true_e2e)
            ):  # fmt: skip
                errors[name].append(ours / true - 1.0)
            print(
                f"| {run.run[16:]} | {rate:g}/s | {1e3 * true_ttft:.1f} | {1e3 * ttft:.1f} | "
                f"{1e3 * true_tpot:.2f} | {1e3 * tpot:.2f} | {true_e2e:.2f} | {e2e:.2f} |",
                flush=True,
            )
    print(summary(errors))


def summary(errors: dict[str, list[float]]) -> str:
    """Mean absolute and median signed errors in words."""
    return "; ".join(
        f"{name}: mean error {100 * np.mean(np.abs(found)):.0f} %, bias {100 * np.median(found):+.0f} %"
        for name, found in errors.items()
    )


def requests(planner: Planner, runs: pd.DataFrame, rows: pd.DataFrame) -> None:
    print("\n| run | what | measured | predicted |\n| --- | --- | --- | --- |")
    for run in runs.itertuples():
        own = rows[rows.run == run.run]
        trace = [
            {
                "arrival_s": float(r.arrival_s),
                "input_tokens": int(r.input_toks),
                "output_tokens": int(r.output_toks),
            }
            for r in own.sort_values("arrival_s").itertuples()
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            found = metrics_of(
                planner, run.model, ("vllm", run.vllm_version), "rtx-4090", replayed(trace, folder),
                {
                    "parallelism": {"tensor": int(run.tp)},
                    "quantization": {"weights": "bf16", "activations": "bf16"},
                    "batching": {
                        "max_num_seqs": int(run.max_num_seqs),
                        "max_num_batched_tokens": int(run.max_num_batched_tokens),
                    },
                    "memory_fraction": float(run.gpu_memory_utilization),
                },
            )  # fmt: skip
        for name, true, ours in (
            ("TTFT mean, s", run.ttft_mean_ms / 1e3, found["ttft_s"]["mean"]),
            ("TTFT p50, s", run.ttft_p50_ms / 1e3, found["ttft_s"]["p50"]),
            ("TTFT p99, s", run.ttft_p99_ms / 1e3, found["ttft_s"]["p99"]),
            ("TPOT mean, ms", run.tpot_mean_ms, 1e3 * found["tpot_s"]["mean"]),
            ("makespan, s", run.makespan_s, found["makespan_s"]),
            ("output tokens/s", run.out_tok_per_s, found["output_tokens_per_s"]),
        ):
            print(f"| {run.run} | {name} | {true:.1f} | {ours:.1f} |", flush=True)


def uniform(most: float) -> dict[str, Any]:
    """Lengths drawn evenly up to `most`."""
    return {"distribution": "uniform", "low": 1, "high": int(most)}


def online(planner: Planner, runs: pd.DataFrame) -> None:
    print(
        "\n| model | rate | TTFT p50 ms measured | predicted | E2E mean s | predicted | output tokens/s "
        "| predicted |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    errors: dict[str, list[float]] = {"TTFT": [], "E2E": [], "throughput": []}
    for run in runs[(runs.dataset_name == "random") & (runs.random_range_ratio == 0)].itertuples():
        count = int(run.completed)
        forever = not math.isfinite(run.request_rate)
        found = metrics_of(
            planner, run.model, ("sglang", "0.4.0"), "h200-sxm-141gb",
            {
                "synthetic": {
                    "arrivals": {"process": "poisson", "rate_rps": 1e4 if forever else run.request_rate},
                    "requests": count,
                    "input_tokens": uniform(run.random_input_len),
                    "output_tokens": uniform(run.random_output_len),
                    "seed": 0,
                }
            },
            {
                "parallelism": {"tensor": int(run.tp)},
                "quantization": {"weights": run.precision, "activations": run.precision},
                "prefix_caching": False,
            },
        )  # fmt: skip
        pairs = (
            ("TTFT", 1e-3 * run.median_ttft_ms, found["ttft_s"]["p50"]),
            ("E2E", 1e-3 * run.mean_e2e_latency_ms, found["e2e_s"]["mean"]),
            ("throughput", run.output_throughput, found["output_tokens_per_s"]),
        )
        for name, true, ours in pairs:
            errors[name].append(ours / true - 1.0)
        (_, ttft, our_ttft), (_, e2e, our_e2e), (_, rate, our_rate) = pairs
        print(
            f"| {run.model.split('/')[-1]} {run.random_input_len}/{run.random_output_len} | "
            f"{'all at once' if forever else f'{run.request_rate:g}/s'} | "
            f"{1e3 * ttft:.0f} | {1e3 * our_ttft:.0f} | {e2e:.1f} | {our_e2e:.1f} | "
            f"{rate:.0f} | {our_rate:.0f} |",
            flush=True,
        )  # fmt: skip
    print(summary(errors))


def throughput(planner: Planner, runs: pd.DataFrame) -> None:
    rows = []
    known = runs[
        (runs.load == "offline_max_throughput") & runs.model.isin(MODELS) & runs.system.isin(DEVICES)
    ]
    for run in known.itertuples():
        device, ranks = DEVICES[run.system], int(np.nan_to_num(run.dep))
        clients = int(min(1024 * max(1, ranks), run.num_requests))
        formats = {"weights": run.precision.lower(), "activations": run.precision.lower(), "kv_cache": "fp8"}
        if run.model.startswith("GPT-OSS"):
            formats |= {"weights": "fp4", "activations": "bf16" if device.startswith("h") else "fp8"}
        version = "1.0.0" if run.source_version == "v1.0" else "1.2.0"
        cut = {"attention_data": ranks, "expert": ranks} if ranks > 1 else {"tensor": int(run.tp)}
        found = metrics_of(
            planner, MODELS[run.model], ("trtllm", version), device,
            {
                "synthetic": {
                    "arrivals": {"process": "closed", "concurrency": clients},
                    "requests": 4 * clients,
                    "input_tokens": {"distribution": "constant", "value": int(run.isl)},
                    "output_tokens": {"distribution": "constant", "value": int(run.osl)},
                    "seed": 0,
                }
            },
            {
                "parallelism": cut,
                "quantization": formats,
                "batching": {
                    "max_num_seqs": -(-clients // max(1, ranks)),
                    "max_num_batched_tokens": max(8192, int(run.isl) + 64),
                },
                "prefix_caching": False,
            },
        )  # fmt: skip
        ratio = (
            float("nan") if isinstance(found, str) else found["output_tokens_per_s"] / run.output_tput_tok_s
        )
        rows.append((run.source_version, run.model, device, ratio))
    table = pd.DataFrame(rows, columns=["version", "model", "device", "ratio"])
    print("\n| model | device | version | rows | predicted / measured: median | quartiles |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (model, device, version), part in table.groupby(["model", "device", "version"]).ratio:
        low, middle, high = part.quantile([0.25, 0.5, 0.75])
        print(f"| {model} | {device} | {version} | {len(part)} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    print(f"median error of all {len(table)}: {100 * (table.ratio - 1.0).abs().median():.0f} %")


def main() -> None:
    """Print the comparisons asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs=2, type=Path, metavar=("RUNS", "STAGES"))
    parser.add_argument("--requests", nargs=2, type=Path, metavar=("RUNS", "REQUESTS"))
    parser.add_argument("--online", type=Path, metavar="RUNS")
    parser.add_argument("--throughput", type=Path, metavar="RUNS")
    given = parser.parse_args()
    planner = Planner()
    if given.stages:
        stages(planner, *(pd.read_csv(path) for path in given.stages))
    if given.requests:
        requests(planner, *(pd.read_csv(path) for path in given.requests))
    if given.online:
        online(planner, pd.read_csv(given.online))
    if given.throughput:
        throughput(planner, pd.read_csv(given.throughput))


if __name__ == "__main__":
    main()
