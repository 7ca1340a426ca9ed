"""How long, how many bytes and how much energy one operator takes on one device."""

from __future__ import annotations

from functools import lru_cache

from costmodels.analytic import RooflineModel, utilisation
from costmodels.base import CostModel, Prediction
from costmodels.clocks import AtClock, clock_problem
from costmodels.collectives import collective_time
from costmodels.compile import compile_tables, lookup_decode_attention, lookup_prefill_attention
from costmodels.learned import LearnedModel, artifact_rows
from costmodels.ops import (
    BYTES_PER_ELEMENT,
    Collective,
    DecodeAttention,
    Elementwise,
    Gemm,
    GroupedGemm,
    Operator,
    PrefillAttention,
)
from costmodels.roofline import (
    active_experts,
    arithmetic_intensity,
    bytes_moved,
    causal_pairs,
    compute_format,
    flops,
    roofline_bound,
    supports,
)
from costmodels.table import HostOverhead, StepTables, Term

__all__ = [
    "BYTES_PER_ELEMENT",
    "AtClock",
    "Collective",
    "CostModel",
    "DecodeAttention",
    "Elementwise",
    "Gemm",
    "GroupedGemm",
    "HostOverhead",
    "LearnedModel",
    "Operator",
    "Prediction",
    "PrefillAttention",
    "RooflineModel",
    "StepTables",
    "Term",
    "active_experts",
    "arithmetic_intensity",
    "artifact_rows",
    "bytes_moved",
    "causal_pairs",
    "clock_problem",
    "collective_time",
    "compile_tables",
    "compute_format",
    "default_cost_model",
    "flops",
    "lookup_decode_attention",
    "lookup_prefill_attention",
    "roofline_bound",
    "supports",
    "utilisation",
]


@lru_cache(maxsize=8)
def default_cost_model(engine: str = "vllm") -> CostModel:
    """The best predictor shipped for an engine's kernels (vllm, sglang, trtllm)."""
    return LearnedModel(engine)
