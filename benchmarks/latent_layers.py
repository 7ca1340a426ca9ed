"""Whose latent attention (MLA) rises with the context as vLLM's whole layers do.

    python benchmarks/latent_layers.py [--data DIR]

vLLM's kernels of latent attention were measured only inside a whole layer (`mla_generation_module_perf` of
the package `aiconfigurator-core`, extra `train`). Between two lengths of context all else in a layer stays
the same, so a layer's rise is its attention's. For each device, KV format and engine with kernels measured
by themselves: the median of the kernel's rise over the layer's, its quartiles, and the share of rows where
the kernel alone takes longer than the whole layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from costmodels.learned.data import Problem, problems
from costmodels.learned.tables import SYSTEMS, find_tables

FAMILY, LAYER = "mla_decode", "mla_generation_module_perf.parquet"
#: Rises of less are within what a layer's other kernels vary by.
LEAST_S = 40e-6
Case = tuple[int, int, int, int]  # heads, sequences, context, bytes of a KV element


def layers(folder: Path) -> dict[Case, float]:
    """Seconds of vLLM's whole layers in fp8 blocks of the newest version below a system's folder."""
    import pandas

    found = sorted(folder.glob(f"mla/vllm/*/{LAYER}"))
    if not found:
        return {}
    table = pandas.read_parquet(found[-1])
    table = table[table["gemm_type"] == "fp8_block"]
    size = np.where(table["kv_cache_dtype"] == "fp8", 1, 2)
    context = table["step"] + table["isl"]
    keys = zip(table["num_heads"], table["batch_size"], context, size, strict=True)
    return {tuple(map(int, key)): ms / 1e3 for key, ms in zip(keys, table["latency"], strict=True)}


def kernels(problem: Problem) -> dict[Case, float]:
    """Seconds of an engine's kernels; a table's context is that before or with the new token."""
    return {
        (int(heads), int(n), int(context) + more, int(size)): float(seconds)
        for (n, context, heads, size), seconds in zip(problem.raw, problem.seconds, strict=True)
        for more in (0, 1)
    }


def rises(whole: dict[Case, float], part: dict[Case, float], size: int) -> tuple[list[float], list[bool]]:
    """Of one KV format: the kernel's rise over the layer's, and whether it exceeds the layer."""
    both = sorted(case for case in whole if case in part and case[3] == size)
    over = [part[case] > whole[case] for case in both]
    found = []
    for ends in {case[:2] for case in both}:
        low, *_, high = (case for case in both if case[:2] == ends)
        if (rise := whole[high] - whole[low]) > LEAST_S:
            found.append((part[high] - part[low]) / rise)
    return found, over


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    tables = find_tables(given.data)
    folders = {name: system for system, name in SYSTEMS.items()}
    print("| device | KV | engine | rows | kernel's rise over layer's | quartiles | above the layer |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for problem in problems(tables):
        if problem.family != FAMILY or problem.engine == "vllm":
            continue
        whole = layers(tables / folders[problem.device.name])
        for size, name in ((2, "bf16"), (1, "fp8")):
            ratios, over = rises(whole, kernels(problem), size)
            if ratios:
                low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
                print(
                    f"| {problem.device.name} | {name} | {problem.engine} | {len(over)} | {middle:.2f} "
                    f"| {low:.2f} to {high:.2f} | {100 * np.mean(over):.0f} % |"
                )


if __name__ == "__main__":
    main()
