"""What the simulator must know of an engine's scheduler: a plan's batching, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from costmodels.ops import FloatArray
from costmodels.table import IntArray


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """One worker's scheduler, and how many such workers share the load.

    policy       "mixed" (vLLM V1, TensorRT-LLM: decodes and prefill chunks share a step) or
                 "prefill_first" (SGLang, vLLM V0: waiting prompts pause the decodes)
    admission    "on_demand" (blocks as tokens come; preempts by recompute) or
                 "reserve_output" (TensorRT-LLM GUARANTEED_NO_EVICT: a request enters only when
                 its whole output fits, so it is never preempted)
    max_num_seqs, max_num_batched_tokens  per attention-data rank; the token budget is per
                 micro-batch
    kv_blocks    of one whole worker (sum over attention-data ranks)
    block_tokens tokens of one KV block
    watermark    share of blocks that admission of a new request must leave free
    replicas, router  data-parallel copies; "round_robin" or "least_outstanding"; later turns
                 of a session and clients of a closed loop stay on their replica
    request_s, request_per_token_s  what the front end adds to every request before the scheduler
                 sees it (HTTP, chat template, tokens of the prompt) and after its tokens leave;
                 it delays a request and occupies no device
    brought      "" for a worker that computes its prompts; of one that only decodes, how the prompts of
                 others come: "with_first_token", or "without_last_token" (the KV cache of the prompt's
                 last token is missing: the first decode step computes it and gives the first token)
    hands_over   whether the worker hands its requests to another after their prompt
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int
    block_tokens: int = 16
    policy: str = "mixed"
    chunked_prefill: bool = True
    admission: str = "on_demand"
    watermark: float = 0.0
    prefix_caching: bool = False
    pipeline: int = 1
    attention_data: int = 1
    replicas: int = 1
    router: str = "round_robin"
    request_s: float = 0.0
    request_per_token_s: float = 0.0
    brought: str = ""
    hands_over: bool = False

    def lead_s(self, input_tokens: FloatArray | IntArray) -> FloatArray:
        """Seconds between a request's arrival and the scheduler's queue, one per request."""
        return self.request_s + self.request_per_token_s * np.asarray(input_tokens, np.float64)
