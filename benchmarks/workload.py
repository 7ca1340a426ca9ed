"""Time to read a million rows of every trace format, and to draw a million requests.

Run `python benchmarks/workload.py [--rows N]`; its files are temporary.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from planner.workload import generate, read_trace, summarize


def writers(rows: int) -> Iterator[tuple[str, str, Callable[[int], str], str]]:
    """(name, file name, line of row i, header)."""
    rng = np.random.default_rng(0)
    inputs, outputs = rng.integers(1, 4000, rows), rng.integers(1, 800, rows)
    hashes = [", ".join(map(str, range(i % 50, i % 50 + 8))) for i in range(100)]
    start = np.datetime64("2023-11-16T18:15:46.680590", "us")
    stamps = (start + np.arange(rows) * np.timedelta64(9000, "us")).astype(str)

    yield "planfront jsonl", "p.jsonl", lambda i: (
        f'{{"arrival_s": {i * 0.01:.3f}, "input_tokens": {inputs[i]}, "output_tokens": {outputs[i]}}}'
    ), ""  # fmt: skip
    yield "planfront csv", "p.csv", lambda i: f"{i * 0.01:.3f},{inputs[i]},{outputs[i]}", (
        "arrival_s,input_tokens,output_tokens"
    )  # fmt: skip
    yield "apex", "a.jsonl", lambda i: (
        f'{{"StartTimeOffset": {i * 10_000_000}, "ContextTokens": {inputs[i]}, '
        f'"GeneratedTokens": {outputs[i]}}}'
    ), ""  # fmt: skip
    yield "azure", "z.csv", lambda i: f"{stamps[i].replace('T', ' ')}0,{inputs[i]},{outputs[i]}", (
        "TIMESTAMP,ContextTokens,GeneratedTokens"
    )  # fmt: skip
    yield "burstgpt", "b.csv", lambda i: (
        f"{i // 100},ChatGPT,{inputs[i]},{outputs[i]},{inputs[i] + outputs[i]},Conversation log"
    ), "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"  # fmt: skip
    yield "mooncake", "m.jsonl", lambda i: (
        f'{{"timestamp": {i * 10}, "input_length": {4096 + inputs[i]}, "output_length": {outputs[i]}, '
        f'"hash_ids": [{hashes[i % 100]}]}}'
    ), ""  # fmt: skip


def main() -> None:
    """Print seconds per format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        for name, file, line, header in writers(rows):
            path = Path(folder) / file
            with path.open("w", encoding="utf-8") as out:
                out.writelines([header + "\n"] if header else [])
                out.writelines(line(i) + "\n" for i in range(rows))
            start = time.perf_counter()
            work, _ = read_trace(path)
            took = time.perf_counter() - start
            start = time.perf_counter()
            summarize(work)
            print(f"{name:<18}{took:>7.2f} s  ({path.stat().st_size / took / 1e6:,.0f} MB/s), "
                  f"summary {time.perf_counter() - start:.2f} s")  # fmt: skip
            path.unlink()
    start = time.perf_counter()
    generate({"preset": "chat", "requests": rows})
    print(f"{'synthetic chat':<18}{time.perf_counter() - start:>7.2f} s")


if __name__ == "__main__":
    main()
