"""Who holds what: layers over pipeline stages, weights and KV cache over devices.

A stage has tensor x attention_data devices. Attention, dense feed-forwards, shared experts, the
embedding and the head are cut over `tensor` and copied over `attention_data`; routed experts are
spread over `expert` of the stage's devices, each expert cut over the rest (1: every expert cut over
all of them). KV heads are copied when `tensor` exceeds them; MLA's latent cache and its down
projections are copied over `tensor`. Quantization covers attention and feed-forward matrices; the
embedding, head, norms, biases and router stay in 16 bits, as engines keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from costmodels.ops import BYTES_PER_ELEMENT
from planner.models.parameters import ffn_params, latent_attention, matrices
from planner.models.spec import AttentionSpec, LayerGroup, ModelSpec

HALF_BYTES = 2.0
#: Element sizes of a KV cache (no scales: one per tensor or head).
KV_BYTES = {
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "fp4": 0.5625,
    "int2": 0.25,
}
#: DeepSeek V3.2's index cache: 128 fp8 values and an fp32 scale per token and layer.
INDEX_SCALE_BYTES = 4.0
#: Recurrent states are kept in fp32 (vLLM mamba_ssm_cache_dtype of these models), convolutions in 16 bits.
STATE_BYTES = 4.0


@dataclass(frozen=True, slots=True)
class Degrees:
    """Parallelism of one worker: it takes tensor x pipeline x attention_data x context devices."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    attention_data: int = 1
    context: int = 1

    @property
    def stage_devices(self) -> int:
        """Devices of one pipeline stage."""
        return self.tensor * self.attention_data


@dataclass(frozen=True, slots=True)
class KvFootprint:
    """Cache of one sequence on one device of the fullest stage.

    Full layers keep every token, windowed ones the last `window_tokens`; recurrent layers keep a
    state of fixed size.
    """

    full_bytes_per_token: float
    windowed_bytes_per_token: float
    window_tokens: int
    state_bytes_per_sequence: float


def has_experts(spec: ModelSpec) -> bool:
    """Whether any layer routes to experts."""
    return any(g.ffn is not None and g.ffn.experts for g in spec.layers)


def check_degrees(spec: ModelSpec, degrees: Degrees) -> str | None:
    """Why the model cannot be cut this way, in words, or None."""
    d = degrees
    for name in ("tensor", "pipeline", "expert", "attention_data", "context"):
        if getattr(d, name) < 1:
            return f"{name} must be at least 1, not {getattr(d, name)}"
    if d.pipeline > spec.num_layers:
        return f"pipeline {d.pipeline} exceeds the {spec.num_layers} layers of {spec.name}"
    if d.expert > 1 and not has_experts(spec):
        return f"expert {d.expert} needs routed experts; {spec.name} has none"
    if d.stage_devices % d.expert:
        return f"expert {d.expert} does not divide tensor x attention_data = {d.stage_devices}"
    if d.attention_data > 1 and not has_experts(spec):
        return f"attention_data {d.attention_data} needs routed experts; use replicas for {spec.name}"
    for group in spec.layers:
        reason = _check_attention(group.attention, d.tensor) or _check_ffn(group, d)
        if reason:
            return reason
    return None


def _check_attention(a: AttentionSpec | None, tensor: int) -> str | None:
    if a is None:
        return None
    if a.heads and a.heads % tensor:
        return f"tensor {tensor} does not divide {a.heads} attention heads"
    if a.kind == "gqa" and a.kv_heads % tensor and tensor % a.kv_heads:
        return f"tensor {tensor} neither divides nor is a multiple of {a.kv_heads} KV heads"
    if a.state_value_heads and a.state_value_heads % tensor:
        return f"tensor {tensor} does not divide {a.state_value_heads} state heads"
    if a.state_key_heads and a.state_key_heads % tensor and tensor % a.state_key_heads:
        return f"tensor {tensor} does not divide {a.state_key_heads} state key heads"
    return None


def _check_ffn(group: LayerGroup, d: Degrees) -> str | None:
    f = group.ffn
    if f is None:
        return None
    if not f.experts:
        if f.intermediate % d.tensor:
            return f"tensor {d.tensor} does not divide the intermediate size {f.intermediate}"
        return None
    if f.shared_intermediate % d.tensor:
        return f"tensor {d.tensor} does not divide the shared experts' size {f.shared_intermediate}"
    if f.experts % d.expert:
        return f"expert {d.expert} does not divide {f.experts} experts"
    inner = d.stage_devices // d.expert if d.stage_devices % d.expert == 0 else 1
    if f.intermediate % inner:
        return f"{inner} devices an expert do not divide its intermediate size {f.intermediate}"
    return None


@lru_cache(maxsize=1024)
def stage_layers(spec: ModelSpec, pipeline: int) -> tuple[tuple[int, ...], ...]:
    """Layer numbers of each stage: even, the remainder one each to the stages before the last, from
    the last but one backwards (vLLM get_pp_indices), since the last has the head as well."""
    count = spec.num_layers
    sizes = [count // pipeline] * pipeline
    for i in range(count % pipeline):
        sizes[-(i + 2) if pipeline > 1 else -1] += 1
    found, start = [], 0
    for size in sizes:
        found.append(tuple(range(start, start + size)))
        start += size
    return tuple(found)


def stage_counts(spec: ModelSpec, pipeline: int) -> tuple[tuple[int, ...], ...]:
    """[layer groups][stages] how many layers of each group a stage has."""
    stages = stage_layers(spec, pipeline)
    return tuple(
        tuple(sum(1 for i in stage if spec.layer_order[i] == index) for stage in stages)
        for index in range(len(spec.layers))
    )


def stored_format(spec: ModelSpec, weights: str) -> str:
    """The operator format of a plan's weights.

    fp8 checkpoints with block scales stay so. A mixture of experts whose own checkpoint says nothing
    about fp8 is taken to be published with block scales too, as DeepSeek V3, Qwen3, GLM-5, MiniMax M2
    and Kimi K2 are.
    """
    if weights != "fp8":
        return weights
    method = spec.quantization.method
    mixture = any(group.ffn is not None and group.ffn.experts for group in spec.layers)
    block = method == "fp8_block" or (mixture and spec.quantization.weights != "fp8")
    return "fp8_block" if block else "fp8"


def half(dtype: str, device_half: str = "bf16") -> str:
    """The 16-bit format beside a plan's activations: that of the device, unless they have one themselves."""
    return dtype if dtype in ("bf16", "fp16") else device_half


def matrix_bytes(spec: ModelSpec, weights: str, *, expert: bool) -> float:
    """Bytes of one weight of a matrix, scales included."""
    if spec.quantization.experts_only and not expert and weights not in ("bf16", "fp16", "fp32"):
        return HALF_BYTES
    return BYTES_PER_ELEMENT[stored_format(spec, weights)]


def kv_heads_per_device(a: AttentionSpec, tensor: int) -> int:
    """KV heads that one device holds: at least one."""
    return max(1, ceil(a.kv_heads / tensor))


def attention_bytes(spec: ModelSpec, a: AttentionSpec | None, tensor: int, element: float) -> float:
    """Bytes of one layer's token mixing on one device."""
    if a is None or a.kind == "none":
        return 0.0
    hidden = spec.hidden
    if a.kind == "mla":
        parts = latent_attention(a, hidden)
        copied = parts["kv_a"] + parts.get("q_a", 0)
        index = sum(parts.get(name, 0) for name in ("index_q", "index_k", "index_weights"))
        cut = sum(parts.values()) - copied - index
        norms = a.kv_lora_rank + a.q_lora_rank + 2 * a.index_dim
        return (copied + index + cut / tensor) * element + norms * HALF_BYTES
    if a.kind == "linear":
        keys, values = a.state_key_heads * a.state_key_dim, a.state_value_heads * a.state_value_dim
        big = hidden * (2 * keys + 2 * values) + values * hidden
        small = hidden * 2 * a.state_value_heads + (2 * keys + values) * a.conv_width
        return big / tensor * element + (small + 2 * a.state_value_heads) / tensor * HALF_BYTES
    if a.kind == "ssm":
        inner = a.state_value_heads * a.state_value_dim
        mixed = inner + 2 * a.state_groups * a.state_key_dim
        big = hidden * (inner + mixed + a.state_value_heads) + inner * hidden
        return big / tensor * element + (mixed * (a.conv_width + 1) + inner) / tensor * HALF_BYTES
    queries = a.heads * a.head_dim * (2 if a.output_gate else 1) // tensor
    kv = kv_heads_per_device(a, tensor)
    keys = kv * (a.head_dim + a.v_head_dim)
    big = hidden * (queries + keys) + a.heads * a.v_head_dim // tensor * hidden
    biases = ((queries + keys) if a.qkv_bias else 0) + (hidden if a.o_bias else 0)
    return big * element + (biases + (2 * a.head_dim if a.qk_norm else 0)) * HALF_BYTES


@lru_cache(maxsize=65_536)
def _shard(spec: ModelSpec, degrees: Degrees, weights: str, stage: int) -> tuple[tuple[str, float], ...]:
    tensor, hidden = degrees.tensor, spec.hidden
    out = dict.fromkeys(
        ("embeddings", "lm_head", "attention", "dense_ffn", "experts", "shared_experts", "router", "norms"),
        0.0,
    )
    element = matrix_bytes(spec, weights, expert=False)
    for group, counts in zip(spec.layers, stage_counts(spec, degrees.pipeline), strict=True):
        count = counts[stage]
        if not count:
            continue
        out["attention"] += count * attention_bytes(spec, group.attention, tensor, element)
        out["norms"] += count * spec.norm_params_per_layer * HALF_BYTES
        f = group.ffn
        if f is None:
            continue
        sizes = ffn_params(f, hidden)
        biases = ((matrices(f) - 1) * f.intermediate + hidden) if f.bias else 0
        if not f.experts:
            big = matrices(f) * hidden * f.intermediate / tensor
            out["dense_ffn"] += count * (big * element + biases * HALF_BYTES)
            continue
        # The fullest device has the rounded-up share of experts.
        local = ceil(f.experts / degrees.expert)
        inner = degrees.stage_devices // degrees.expert
        one = matrices(f) * hidden * f.intermediate / inner * matrix_bytes(spec, weights, expert=True)
        out["experts"] += count * local * (one + biases * HALF_BYTES)
        out["shared_experts"] += count * (
            matrices(f) * hidden * f.shared_intermediate / tensor * element
            + (hidden * HALF_BYTES if f.shared_gate else 0.0)
        )
        out["router"] += count * sizes["router"] * HALF_BYTES
    table = ceil(spec.vocab / tensor) * hidden * HALF_BYTES
    last = degrees.pipeline - 1
    if stage == 0:
        out["embeddings"] = table
    if stage == last:
        # A tied head is the embedding itself, unless they are in different stages.
        out["lm_head"] = 0.0 if spec.tied_embeddings and stage == 0 else table
        if spec.lm_head_bias:
            out["lm_head"] += ceil(spec.vocab / tensor) * HALF_BYTES
    if stage in (0, last):
        out["norms"] += spec.extra_params * HALF_BYTES
    return tuple(out.items())


def shard_weights(spec: ModelSpec, degrees: Degrees, weights: str, stage: int = 0) -> dict[str, float]:
    """Bytes on the fullest device of a stage by component: embeddings, lm_head, attention, dense_ffn,
    experts, shared_experts, router, norms."""
    return dict(_shard(spec, degrees, weights, stage))


def state_bytes(a: AttentionSpec, tensor: int) -> float:
    """Recurrent state of one sequence in one layer on one device."""
    if a.kind == "linear":
        keys, values = a.state_key_heads * a.state_key_dim, a.state_value_heads * a.state_value_dim
        state = a.state_value_heads * a.state_key_dim * a.state_value_dim * STATE_BYTES
        return (state + (2 * keys + values) * (a.conv_width - 1) * HALF_BYTES) / tensor
    if a.kind == "ssm":
        inner = a.state_value_heads * a.state_value_dim
        mixed = inner + 2 * a.state_groups * a.state_key_dim
        return (inner * a.state_key_dim * STATE_BYTES + mixed * (a.conv_width - 1) * HALF_BYTES) / tensor
    return 0.0


@lru_cache(maxsize=16_384)
def kv_bytes_per_token(
    spec: ModelSpec, kv_cache: str = "bf16", *, tensor: int = 1, pipeline: int = 1
) -> KvFootprint:
    """KV cache on one device of the fullest stage, in bytes per token of a sequence."""
    element = KV_BYTES[kv_cache]
    best: KvFootprint | None = None
    counts = stage_counts(spec, pipeline)
    for stage in range(pipeline):
        full = windowed = state = 0.0
        window = 0
        for group, per_stage in zip(spec.layers, counts, strict=True):
            a, count = group.attention, per_stage[stage]
            if a is None or not count:
                continue
            if a.kind == "mla":
                full += count * (a.kv_lora_rank + a.qk_rope_dim) * element
                if a.index_heads:
                    full += count * (a.index_dim + INDEX_SCALE_BYTES)
            elif a.kind == "gqa":
                size = count * kv_heads_per_device(a, tensor) * (a.head_dim + a.v_head_dim) * element
                if a.window:
                    windowed += size
                    window = max(window, a.window)
                else:
                    full += size
            state += count * state_bytes(a, tensor)
        found = KvFootprint(full, windowed, window, state)
        if best is None or full + windowed + state * 1e-3 > (
            best.full_bytes_per_token + best.windowed_bytes_per_token + best.state_bytes_per_sequence * 1e-3
        ):
            best = found
    assert best is not None
    return best
