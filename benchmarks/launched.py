"""How the servers of public benchmark runs were launched: what their result files leave out.

InferenceX (formerly InferenceMAX, SemiAnalysis, Apache-2.0) publishes the scripts that started its servers,
`benchmarks/**/MODEL_PRECISION_DEVICE[_trt].sh`, read 2026-11. Typed in here is what decides latency and
memory: format of the KV cache, token budget, most running requests, memory fraction, largest captured graph,
and how long a server lets requests wait on purpose. Runs of other sources say nothing of it and get none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Launched(NamedTuple):
    """Settings of one server; None where the script leaves the engine's default."""

    kv_cache: str | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    memory_fraction: float | None = None
    graph_max: int | None = None
    #: SGLang --scheduler-recv-interval: decode steps between two looks at the queue.
    polled_steps: int = 1
    #: TensorRT-LLM batch_wait_timeout_iters, or attention_dp_config.timeout_iters: steps that a prompt waits
    #: for others at the most, and how many prompts end that wait.
    waited_steps: int = 0
    waited_prompts: float = 1.0


def launched(row: Any) -> Launched:
    """The settings of a run in the columns of `silicon_sample.csv`."""
    if not str(row.source_kind).startswith(("inferencex", "gap_analysis")):
        return Launched()
    family = next((name for part, name in _FAMILIES.items() if part in row.model_path), "")
    settings = _SETTINGS.get((row.backend, family))
    return settings(row) if settings is not None else Launched()


_FAMILIES = {
    "Llama-3.1-70B": "llama",
    "DeepSeek": "deepseek",
    "gpt-oss": "gpt-oss",
    "MiniMax": "minimax",
    "Qwen3.5": "qwen",
    "GLM-5": "glm",
    "Kimi": "kimi",
}


def _blackwell(row: Any) -> bool:
    return bool(row.system.startswith(("b", "gb")))


def _short(row: Any) -> bool:
    """Prompts and answers of about a thousand tokens."""
    return int(row.isl_nominal) == int(row.osl_nominal) == 1024


def _version(row: Any) -> tuple[int, ...]:
    """(major, minor) of the engine; development builds count as the newest."""
    parts = str(row.backend_version).split(".")
    return tuple(int(part) for part in parts[:2]) if parts[0].isdigit() and len(parts) > 1 else (99,)


def _llama_vllm(row: Any) -> Launched:
    return Launched("fp8", 8192, 512 if _blackwell(row) else int(row.concurrency), 0.9)


def _llama_trtllm(row: Any) -> Launched:
    length = max(2048 if _short(row) else 0, int(row.isl_nominal) + int(row.osl_nominal)) + 200
    fp8_on_b200 = row.precision == "fp8" and row.system == "b200_sxm"
    budget = 16384 if fp8_on_b200 else length
    found = Launched("fp8", budget, graph_max=1024)
    if _short(row) and int(row.tp_size_corrected) < 8:
        return found._replace(waited_steps=20, waited_prompts=0.9 * budget / row.isl_nominal)
    return found


def _gpt_oss_vllm(row: Any) -> Launched:
    if _blackwell(row):
        return Launched("fp8", 8192, 512, 0.9, 2048)
    return Launched(None, 8192, int(row.concurrency), 0.9, 2048)


def _gpt_oss_trtllm(row: Any) -> Launched:
    most = 512 if _blackwell(row) else int(row.concurrency)
    found = Launched("fp8" if _blackwell(row) else None, 20000, most, 0.85, int(row.concurrency))
    return _balanced(found, row, 50)  # the engine's default


def _balanced(found: Launched, row: Any, most_steps: int) -> Launched:
    """Ranks of data-parallel attention wait until each of them has a prompt."""
    ranks = int(np.nan_to_num(row.attention_dp_size))
    return found._replace(waited_steps=most_steps, waited_prompts=ranks) if ranks > 1 else found


def _minimax_vllm(row: Any) -> Launched:
    concurrency = int(row.concurrency)
    if row.system == "h100_sxm":
        return Launched(None, 8192, 256, 0.9)
    if _version(row) < (0, 18):
        return Launched(memory_fraction=0.95)
    if row.system == "h200_sxm":
        return Launched("fp8", 16384 if concurrency <= 32 else 32768, 512, 0.95)
    return Launched("fp8", 2 * int(row.isl_nominal), None, 0.9, 2048)


def _kimi_vllm(row: Any) -> Launched:
    if row.precision == "int4":
        return Launched(None, None, int(row.concurrency), 0.95)
    if _version(row) < (0, 19):
        return Launched(None, None, int(row.concurrency), 0.9)
    return Launched("fp8", 2 * int(row.isl_nominal), int(row.concurrency), 0.9, 2048)


def _polled(row: Any) -> int:
    return 30 if int(row.concurrency) >= 16 else 10


def _deepseek_sglang(row: Any) -> Launched:
    if row.system == "h200_sxm":
        return Launched(None, 32768, 512 if _short(row) else 256, 0.82, 512 if _short(row) else 256)
    if row.precision == "fp4":
        return Launched("fp8", 16384, 256, 0.85, 256, _polled(row))
    if int(row.tp_size_corrected) == 4:
        return Launched("fp8", 8192, 32, 0.95, 32, 10)
    return Launched("fp8", 32768, max(128, int(row.concurrency)), 0.82, 128, _polled(row))


def _deepseek_trtllm(row: Any) -> Launched:
    concurrency = int(row.concurrency)
    budget = max(8192, (concurrency + int(row.isl_nominal) + 127) // 64 * 64)
    fraction = 0.75 if row.system == "h200_sxm" else 0.8
    graph_max = 128 if row.system == "h200_sxm" else 512 if row.precision == "fp4" else concurrency
    found = Launched("fp8", budget, None, fraction, graph_max)
    if row.system == "b200_sxm" and row.precision == "fp8" and _short(row) and 64 <= concurrency < 256:
        found = found._replace(waited_steps=40, waited_prompts=0.8 * budget / row.isl_nominal)
    return _balanced(found, row, 60)


def _qwen_sglang(row: Any) -> Launched:
    concurrency = int(row.concurrency)
    most = max(128, concurrency)
    if row.precision == "bf16":
        return Launched(None, 32768, most, 0.82, concurrency, _polled(row))
    if row.precision == "fp4":
        if row.system == "b200_sxm":
            return Launched("fp8", 32768, most, 0.85, concurrency, 30)
        return Launched("fp8", 32768, most, 0.8, concurrency, _polled(row))
    if row.system == "h200_sxm":
        return Launched("fp8", 16384, most, 0.8, concurrency)
    if row.system == "b300_sxm":
        return Launched("fp8", 16384, concurrency, 0.8, concurrency, 10)
    return Launched("fp8", 32768, most, 0.82, concurrency, _polled(row))


def _glm_sglang(row: Any) -> Launched:
    if row.system == "h200_sxm":
        return Launched(memory_fraction=0.85)
    if row.precision == "fp4":
        return Launched("fp8", 32768, None, 0.9, 256, 10)
    return Launched("fp8", 32768, int(row.concurrency), 0.85, int(row.concurrency))


_SETTINGS = {
    ("vllm", "llama"): _llama_vllm,
    ("trtllm", "llama"): _llama_trtllm,
    ("vllm", "gpt-oss"): _gpt_oss_vllm,
    ("trtllm", "gpt-oss"): _gpt_oss_trtllm,
    ("vllm", "minimax"): _minimax_vllm,
    ("vllm", "kimi"): _kimi_vllm,
    ("sglang", "deepseek"): _deepseek_sglang,
    ("trtllm", "deepseek"): _deepseek_trtllm,
    ("sglang", "qwen"): _qwen_sglang,
    ("sglang", "glm"): _glm_sglang,
}


def waiting_steps(settings: Launched, concurrency: float, output_tokens: float) -> float:
    """Decode steps that a request waits on purpose, on average.

    A queue looked at every `polled_steps` steps costs half of that. A prompt that opens a batch waits for
    others, and those wait half as long: in a closed loop, `concurrency` requests come every `output_tokens`
    steps.
    """
    polled = (settings.polled_steps - 1) / 2.0
    rate = concurrency / output_tokens
    waited = min(float(settings.waited_steps), max(0.0, settings.waited_prompts - 1.0) / rate)
    others = rate * waited
    return polled + waited * (1.0 + others / 2.0) / (1.0 + others)
