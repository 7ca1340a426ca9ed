"""Terms of a Llama-70B-like model under tensor parallelism, and GEMMs that teach, written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from costmodels import Collective, DecodeAttention, Elementwise, Gemm, PrefillAttention, Term
from costmodels.learned.data import Problem
from costmodels.learned.shapes import columns, make_batch
from tests.costmodels.devices import H100, nvlink


def llama_70b(
    tensor: int = 4, pipeline: int = 1, weights: str = "bf16", activations: str = "bf16", kv: str = "bf16"
) -> list[Term]:
    hidden, inter, heads, kv_heads, layers, vocab = 8192, 28672, 64 // tensor, max(1, 8 // tensor), 80, 128256
    per = tuple([layers // pipeline] * pipeline)
    last = (*([0] * (pipeline - 1)), 1)

    def gemm(n: int, k: int) -> Any:
        return lambda m: Gemm(m, n, k, weights, activations)

    terms = [
        Term("qkv", "gemm", "tokens", gemm((heads + 2 * kv_heads) * 128, hidden), per),
        Term("o", "gemm", "tokens", gemm(hidden, heads * 128), per),
        Term("gate_up", "gemm", "tokens", gemm(2 * inter // tensor, hidden), per),
        Term("down", "gemm", "tokens", gemm(hidden, inter // tensor), per),
        Term(
            "norms",
            "gemm",
            "tokens",
            lambda m: Elementwise(m * hidden * 2 * 4.0, launches=2),
            per,
            launches=2,
        ),
        Term("head", "gemm", "logits", lambda m: Gemm(m, vocab // tensor, hidden), last),
        Term(
            "prefill",
            "attention",
            "prefill",
            lambda q, p: PrefillAttention(q, p, heads, kv_heads, 128, 128, kv),
            per,
        ),
        Term(
            "decode",
            "attention",
            "decode",
            lambda n, c: DecodeAttention(n, c, heads, kv_heads, 128, 128, kv),
            per,
        ),
    ]
    if tensor > 1:
        group = nvlink(tensor)
        reduce = tuple(2 * x for x in per)
        terms.append(
            Term(
                "all_reduce",
                "communication",
                "tokens",
                lambda m: Collective("all_reduce", m * hidden * 2.0, group),
                reduce,
            )
        )
    return terms


def some_gemms(seed: int = 0, rows: int = 600) -> Problem:
    """GEMMs that take a fifth longer where tokens are no multiple of 16: what trees learn at once."""
    rng = np.random.default_rng(seed)
    raw = columns(
        "gemm",
        m=np.floor(2.0 ** rng.uniform(0, 12, rows)),
        n=rng.choice([512.0, 1024, 4096, 8192], rows),
        k=rng.choice([512.0, 2048, 4096], rows),
    )
    base = make_batch("gemm", raw, H100, "vllm", "bf16").base_s
    seconds = base * np.where(raw[:, 0] % 16 == 0, 1.0, 1.2)
    return Problem(H100.name, "vllm", "gemm", "bf16", "0", raw, seconds, raw[:, 1] * 1e6 + raw[:, 2])
