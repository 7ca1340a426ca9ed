"""Workloads and step tables made by hand for the simulator's tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from costmodels.table import StepTables
from planner.workload.workload import Workload


def tables(
    *,
    pipeline: int = 1,
    ranks: int = 1,
    tokens: int = 64,
    sequences: int = 16,
    cap: int = 0,
    moe: bool = False,
    attention: bool = True,
    base_s: float = 1e-3,
    token_s: float = 1e-5,
    seed: int = 0,
    bumpy: bool = True,
) -> StepTables:
    """Step tables with the shape of real ones; `bumpy` adds staircase-like irregularities."""
    rng = np.random.default_rng(seed)

    def curve(length: int, base: float, each: float) -> Any:
        size = np.arange(length + 1, dtype=np.float64)
        values = base + each * size
        if bumpy:
            values *= rng.uniform(0.9, 1.1, length + 1)
        values[0] = 0.0
        return values

    def pair(length: int, base: float, each: float) -> tuple[Any, Any]:
        latency = curve(length, base, each)
        return latency, latency * (rng.uniform(1.0, 1.2) if pipeline > 1 else 1.0)

    mixed, mixed_c = pair(tokens, base_s, token_s)
    decode, decode_c = pair(sequences, 0.9 * base_s, token_s)
    m, n = ranks * tokens, ranks * sequences
    moe_mixed, moe_mixed_c = pair(m, 0.5 * base_s, token_s) if moe else (np.zeros(m + 1),) * 2
    moe_decode, moe_decode_c = pair(n, 0.4 * base_s, token_s) if moe else (np.zeros(n + 1),) * 2
    logits = curve(sequences, 0.1 * base_s, 0.01 * base_s)
    scale = token_s / 100 if attention else 0.0
    seq = np.array([0.0, 1, 2, 4, 8, 16, 32, 64])
    ctx = np.array([0.0, 7, 16, 30, 64, 128, 256])
    full = scale * np.outer(seq, ctx + 5.0) * rng.uniform(0.8, 1.2, (len(seq), len(ctx)))
    full[0] = 0.0
    capped = full * 0.3 if cap else np.zeros_like(full)
    q = np.array([0.0, 2.0, 4.0, 6.0])
    p = np.array([0.0, 3.0, 6.0])
    per_pair = scale * rng.uniform(0.5, 1.5, (len(q), len(p)))
    half = {"gemm": 0.5, "host": 0.25, "communication": 0.25}
    names = {"mixed": mixed_c, "decode": decode_c, "logits": logits}
    breakdown = {name: {k: v * share / pipeline for k, v in names.items()} for name, share in half.items()}
    breakdown["moe"] = {"moe_mixed": moe_mixed_c / pipeline, "moe_decode": moe_decode_c / pipeline}
    work = {
        "mixed": mixed_c,
        "decode": decode_c,
        "logits": logits,
        "moe_mixed": moe_mixed_c,
        "moe_decode": moe_decode_c,
    }
    return StepTables(
        pipeline=pipeline,
        attention_data=ranks,
        mixed_latency_s=mixed,
        mixed_cycle_s=mixed_c,
        decode_latency_s=decode,
        decode_cycle_s=decode_c,
        moe_mixed_latency_s=moe_mixed,
        moe_mixed_cycle_s=moe_mixed_c,
        moe_decode_latency_s=moe_decode,
        moe_decode_cycle_s=moe_decode_c,
        logits_s=logits,
        attention_cycle_factor=1.1 if pipeline > 1 else 1.0,
        cap_tokens=cap,
        decode_seq_knots=seq,
        decode_ctx_knots=ctx,
        decode_full_s=full,
        decode_capped_s=capped,
        prefill_len_knots_log2=q,
        prefill_ctx_knots_log2=p,
        prefill_full_s_per_pair=per_pair,
        prefill_capped_s_per_pair=per_pair * (0.5 if cap else 0.0),
        breakdown_s=breakdown,
        energy_j={k: 400.0 * v for k, v in work.items()},
        decode_attention_w=300.0,
        prefill_attention_w=500.0,
        flops={k: 1e9 * np.arange(len(v), dtype=np.float64) for k, v in work.items()},
        bytes_moved={k: np.where(v > 0, 1e6, 0.0) for k, v in work.items()},
        flops_per_pair=10.0,
        bytes_per_context_token=100.0,
    )


def workload(
    arrival: Any,
    inputs: Any,
    outputs: Any,
    *,
    parent: Any = None,
    delay: Any = None,
    session: Any = None,
    concurrency: int = 0,
    block_tokens: int = 0,
    prefixes: list[list[int]] | None = None,
) -> Workload:
    """A workload from plain lists."""
    n = len(inputs)
    lists = prefixes if prefixes is not None else [[] for _ in range(n)]
    ids = np.array([i for row in lists for i in row], dtype=np.int64)
    return Workload(
        arrival_s=np.asarray(arrival, np.float64),
        input_tokens=np.asarray(inputs, np.int64),
        output_tokens=np.asarray(outputs, np.int64),
        parent=np.full(n, -1, np.int64) if parent is None else np.asarray(parent, np.int64),
        delay_s=np.zeros(n) if delay is None else np.asarray(delay, np.float64),
        session=np.arange(n, dtype=np.int64) if session is None else np.asarray(session, np.int64),
        concurrency=concurrency,
        block_tokens=block_tokens,
        prefix_offset=np.concatenate(([0], np.cumsum([len(row) for row in lists]))).astype(np.int64),
        prefix_ids=ids,
        prefix_unique=int(ids.max()) + 1 if len(ids) else 0,
    )


MACHINE: dict[str, Any] = {
    "devices": 1,
    "idle_w_per_device": 100.0,
    "peak_flops_per_s": 1e15,
    "memory_bandwidth_bytes_per_s": 3e12,
}
