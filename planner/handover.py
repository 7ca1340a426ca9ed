"""What an engine can hand over from a prefill worker to a decode worker: for planning and for exports.

Of vLLM the NixlConnector (0.33), of SGLang NIXL (0.5), of TensorRT-LLM its cache transceiver (1.3).
"""

from __future__ import annotations

from typing import NamedTuple

from planner.given import PlanProblem
from planner.models import ModelSpec

#: Vendors of whose devices an engine's hand-over by NIXL is known without a buffer on the host.
_VENDORS = ("nvidia", "amd")
#: Kinds of token mixing that keep a state in the place of a cache.
RECURRENT = ("linear", "ssm")
#: Families whose layers with windows SGLang keeps in a pool of their own (is_hybrid_swa_model): NIXL does not
#: cut that.
_WINDOWS_APART = ("gpt_oss", "llama4")


class Side(NamedTuple):
    """What the hand-over hangs on of one kind of workers."""

    device: str
    vendor: str
    tensor: int
    pipeline: int
    kv_cache: str
    prefix_caching: bool


def recurrent(spec: ModelSpec) -> bool:
    """Whether some layers keep a state."""
    return any(group.attention is not None and group.attention.kind in RECURRENT for group in spec.layers)


def handover_problem(engine: str, spec: ModelSpec, prefill: Side, decode: Side) -> PlanProblem | None:
    """Why the engine cannot hand this model's cache over between these workers, or None."""
    if prefill.kv_cache != decode.kv_cache:
        return PlanProblem(
            "decode.worker.quantization.kv_cache",
            f"both kinds of workers must keep the cache in one format, not prefill workers in "
            f"{prefill.kv_cache} and decode workers in {decode.kv_cache}",
        )
    for role, side in (("prefill", prefill), ("decode", decode)):
        if side.vendor not in _VENDORS:
            return PlanProblem(
                f"{role}.worker.pool",
                f"handing caches over is known for GPUs of {' and '.join(_VENDORS)}, not for {side.device}",
            )
    if prefill.vendor != decode.vendor:
        return PlanProblem(
            "decode.worker.pool",
            f"{engine} is not known to hand caches over from {prefill.device} to {decode.device}",
        )
    return {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}[engine](spec, prefill, decode)


def _vllm(spec: ModelSpec, prefill: Side, decode: Side) -> PlanProblem | None:
    for role, side in (("prefill", prefill), ("decode", decode)):
        if side.pipeline > 1:
            # nixl/base_worker.py of 0.33: only the connector that pushes knows stages, and only of one side.
            return PlanProblem(
                f"{role}.worker.parallelism.pipeline",
                "vLLM's NixlConnector hands no caches over between workers with pipeline stages",
            )
    # Compatibility matrix, note 5.
    return _tensor("vLLM", prefill, decode, equal=recurrent(spec), what="the state of recurrent layers")


def _sglang(spec: ModelSpec, prefill: Side, decode: Side) -> PlanProblem | None:
    # disaggregation/common/conn.py, `_resolve_rank_mapping`.
    if decode.pipeline not in (1, prefill.pipeline):
        return PlanProblem(
            "decode.worker.parallelism.pipeline",
            f"SGLang's decode workers have one stage, or as many as prefill workers, {prefill.pipeline}; not "
            f"{decode.pipeline}",
        )
    for role, side in (("prefill", prefill), ("decode", decode)):
        if side.kv_cache == "fp4":
            # arg_groups/kv_cache_hook.py: the scales' layout is not known to the transfer.
            return PlanProblem(
                f"{role}.worker.quantization.kv_cache", "SGLang hands no cache in fp4 over between workers"
            )
    if decode.prefix_caching:
        # pd_disaggregation_hook.py turns them off, but for an option that it calls experimental.
        return PlanProblem(
            "decode.worker.prefix_caching", "SGLang's decode workers keep no prefixes; prefill workers do"
        )
    apart = spec.family in _WINDOWS_APART
    return _tensor("SGLang", prefill, decode, equal=apart, what="the cache of layers with windows")


def _trtllm(spec: ModelSpec, prefill: Side, decode: Side) -> PlanProblem | None:
    mixings = [group.attention for group in spec.layers if group.attention is not None]
    if len({(one.kind, one.kv_heads, one.head_dim) for one in mixings}) > 1:
        # disagg-serving.md, "What are the limitations".
        return PlanProblem(
            "serving",
            f"TensorRT-LLM hands over caches that are alike in all layers, those of {spec.name} are not",
        )
    return None


def _tensor(engine: str, prefill: Side, decode: Side, *, equal: bool, what: str) -> PlanProblem | None:
    """Heads are cut evenly on both sides; where they must be `equal`, into as many parts."""
    one, two = prefill.tensor, decode.tensor
    words = "" if not equal or one == two else f"{what} over between workers of equal tensor parallelism"
    if not words and max(one, two) % min(one, two):
        words = "caches over where one tensor parallelism divides the other"
    if not words:
        return None
    return PlanProblem("decode.worker.parallelism.tensor", f"{engine} hands {words}, not from {one} to {two}")
