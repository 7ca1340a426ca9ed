"""Exact counts of weights, by part of the model."""

from __future__ import annotations

from dataclasses import dataclass

from planner.models.spec import AttentionSpec, FfnSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of weights. `total` leaves multi-token-prediction modules and vision towers out;
    `active` counts what one token uses: its embedding row's table not, its routed experts only."""

    total: int
    active: int
    embedding: int
    lm_head: int
    attention: int
    dense_ffn: int
    experts: int
    shared_experts: int
    router: int
    norms: int


def latent_attention(a: AttentionSpec, hidden: int) -> dict[str, int]:
    """Weights of MLA's projections (DeepSeek-V2 report, section 2.1), indexer included."""
    heads = a.heads
    out = {
        "kv_a": hidden * (a.kv_lora_rank + a.qk_rope_dim),
        "kv_b": a.kv_lora_rank * heads * (a.qk_nope_dim + a.v_head_dim),
        "o": heads * a.v_head_dim * hidden,
    }
    if a.q_lora_rank:
        out["q_a"] = hidden * a.q_lora_rank
        out["q_b"] = a.q_lora_rank * heads * a.head_dim
    else:
        out["q"] = hidden * heads * a.head_dim
    if a.index_heads:
        out["index_q"] = a.q_lora_rank * a.index_heads * a.index_dim
        out["index_k"] = hidden * a.index_dim
        out["index_weights"] = hidden * a.index_heads
    return out


def attention_params(a: AttentionSpec | None, hidden: int) -> int:
    """Weights of one layer's token mixing, biases and inner norms included."""
    if a is None or a.kind == "none":
        return 0
    if a.kind == "mla":
        norms = a.kv_lora_rank + a.q_lora_rank + 2 * a.index_dim
        return sum(latent_attention(a, hidden).values()) + norms
    if a.kind == "linear":
        keys, values = a.state_key_heads * a.state_key_dim, a.state_value_heads * a.state_value_dim
        projections = hidden * (2 * keys + 2 * values + 2 * a.state_value_heads) + values * hidden
        return projections + (2 * keys + values) * a.conv_width + 2 * a.state_value_heads + a.state_value_dim
    if a.kind == "ssm":
        inner = a.state_value_heads * a.state_value_dim
        mixed = inner + 2 * a.state_groups * a.state_key_dim
        projections = hidden * (inner + mixed + a.state_value_heads) + inner * hidden
        return projections + mixed * (a.conv_width + 1) + 3 * a.state_value_heads + inner
    queries = a.heads * a.head_dim * (2 if a.output_gate else 1)
    keys, values = a.kv_heads * a.head_dim, a.kv_heads * a.v_head_dim
    total = hidden * (queries + keys + values) + a.heads * a.v_head_dim * hidden
    total += (queries + keys + values) if a.qkv_bias else 0
    total += hidden if a.o_bias else 0
    return total + (2 * a.head_dim if a.qk_norm else 0)


def matrices(f: FfnSpec) -> int:
    """Weight matrices of a feed-forward: gate, up, down, or up and down."""
    return 3 if f.gated else 2


def ffn_params(f: FfnSpec | None, hidden: int) -> dict[str, int]:
    """Weights of one layer's channel mixing: dense_ffn, or experts, shared_experts and router."""
    if f is None:
        return {}
    biases = ((matrices(f) - 1) * f.intermediate + hidden) if f.bias else 0
    one = matrices(f) * hidden * f.intermediate + biases
    if not f.experts:
        return {"dense_ffn": one}
    router = hidden * f.experts + (f.experts if f.router_bias else 0)
    shared = matrices(f) * hidden * f.shared_intermediate + (hidden if f.shared_gate else 0)
    return {"experts": f.experts * one, "shared_experts": shared, "router": router}


def count_parameters(spec: ModelSpec) -> Parameters:
    """All weights of the model, and those that one token meets."""
    totals = dict.fromkeys(("attention", "dense_ffn", "experts", "shared_experts", "router"), 0)
    active_experts = 0
    for group in spec.layers:
        totals["attention"] += group.count * attention_params(group.attention, spec.hidden)
        for name, count in ffn_params(group.ffn, spec.hidden).items():
            totals[name] += group.count * count
            if name == "experts" and group.ffn is not None:
                active_experts += group.count * count * group.ffn.top_k // group.ffn.experts
    embedding = spec.vocab * spec.hidden
    lm_head = (0 if spec.tied_embeddings else embedding) + (spec.vocab if spec.lm_head_bias else 0)
    norms = spec.norm_params_per_layer * spec.num_layers + spec.extra_params
    total = sum(totals.values()) + embedding + lm_head + norms
    return Parameters(
        total=total,
        active=total - totals["experts"] + active_experts,
        embedding=embedding,
        lm_head=lm_head,
        norms=norms,
        **totals,
    )
