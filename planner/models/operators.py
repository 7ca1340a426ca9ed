"""What one layer runs, as operators: one description, read as a graph or as terms of a step.

`layer_operators` lists a layer's operators in order with what each needs; `layer_graph` makes it a
networkx graph, `step_terms` groups it over layers and pipeline stages for the table compiler. Shapes
are per device. Engines fuse what they can: q, k and v are one GEMM, gate and up another; norms take
the residual with them.

Exchange of routed experts: with one attention rank all devices of a stage hold the same tokens, so an
all-reduce after the experts adds up (one with the shared experts). With several ranks each token's
vector is sent to its experts' devices and back: all-to-all over the stage, of what one rank sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from costmodels.ops import (
    BYTES_PER_ELEMENT,
    Collective,
    DecodeAttention,
    Elementwise,
    Gemm,
    GroupedGemm,
    Operator,
    PrefillAttention,
    Size,
)
from costmodels.table import Term
from hardware.device import CommGroup
from planner.models.sharding import (
    HALF_BYTES,
    KV_BYTES,
    Degrees,
    half,
    kv_heads_per_device,
    stage_counts,
    state_bytes,
    stored_format,
)
from planner.models.spec import AttentionSpec, FfnSpec, LayerGroup, ModelSpec

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, slots=True)
class LayerOperator:
    """One operator of a layer: `after` names what must be done before; see `Term` for the rest."""

    name: str
    category: str
    size: str
    operator: Callable[..., Operator]
    after: tuple[str, ...]
    capped: bool = False
    launches: int = 1


@dataclass(frozen=True, slots=True)
class _Context:
    spec: ModelSpec
    degrees: Degrees
    weights: str
    activations: str
    kv_cache: str
    tp_group: CommGroup
    ep_group: CommGroup
    half: str

    def formats(self, *, expert: bool = False) -> tuple[str, str]:
        """(weights, activations) of a matrix: only experts are quantized in some checkpoints."""
        quantized = self.weights not in ("bf16", "fp16", "fp32")
        if self.spec.quantization.experts_only and not expert and quantized:
            return self.half, self.half
        stored = stored_format(self.spec, self.weights)
        moving = self.activations
        if moving == "fp8" and stored == "fp8_block":
            moving = "fp8_block"
        return stored, moving

    def gemm(self, n: int, k: int, *, plain: bool = False, batch: int = 1) -> Callable[[Size], Operator]:
        weights, activations = (self.half, self.half) if plain else self.formats()
        return lambda m: Gemm(m, n, k, weights, activations, batch)


def _elementwise(bytes_per_token: float, launches: int = 1, flops: float = 0.0) -> Callable[[Size], Operator]:
    return lambda m: Elementwise(m * bytes_per_token, m * flops, launches)


def _all_reduce(width: float, group: CommGroup) -> Callable[[Size], Operator]:
    return lambda m: Collective("all_reduce", m * width, group)


class _Layer:
    """Collects a layer's operators in order."""

    def __init__(self) -> None:
        self.found: list[LayerOperator] = []
        self.last: tuple[str, ...] = ()

    def add(
        self,
        name: str,
        category: str,
        operator: Callable[..., Operator],
        *,
        size: str = "tokens",
        after: tuple[str, ...] | None = None,
        capped: bool = False,
        launches: int = 1,
        follow: bool = True,
    ) -> str:
        self.found.append(
            LayerOperator(
                name, category, size, operator, self.last if after is None else after, capped, launches
            )
        )
        if follow:
            self.last = (name,)
        return name


def _attention(layer: _Layer, c: _Context, a: AttentionSpec) -> None:
    if a.kind == "gqa":
        _grouped(layer, c, a)
    elif a.kind == "mla":
        _latent(layer, c, a)
    else:
        _recurrent(layer, c, a)


def _finish(layer: _Layer, c: _Context, n: int, k: int, name: str) -> None:
    """Output projection and what adds it up over tensor ranks."""
    layer.add(name, "gemm", c.gemm(n, k))
    if c.degrees.tensor > 1:
        layer.add(f"{name}_all_reduce", "communication", _all_reduce(n * HALF_BYTES, c.tp_group))


def _grouped(layer: _Layer, c: _Context, a: AttentionSpec) -> None:
    hidden, tensor = c.spec.hidden, c.degrees.tensor
    heads, kv = a.heads // tensor, kv_heads_per_device(a, tensor)
    queries = heads * a.head_dim * (2 if a.output_gate else 1)
    keys = kv * (a.head_dim + a.v_head_dim)
    layer.add("qkv_proj", "gemm", c.gemm(queries + keys, hidden))
    # Rotary reads and writes queries and keys; the cache write reads keys and values once more.
    element = KV_BYTES[c.kv_cache]
    moved = 2 * (queries + kv * a.head_dim) * HALF_BYTES + keys * (HALF_BYTES + element)
    if a.qk_norm:
        moved += 2 * (queries + kv * a.head_dim) * HALF_BYTES
    launches = 2 + int(a.qk_norm)
    layer.add("rotary_and_cache", "gemm", _elementwise(moved, launches), launches=launches)
    _core(layer, c, a, heads, kv, a.head_dim, a.v_head_dim)
    if a.output_gate:
        layer.add("output_gate", "gemm", _elementwise(3 * heads * a.v_head_dim * HALF_BYTES))
    _finish(layer, c, hidden, heads * a.v_head_dim, "o_proj")


def _core(layer: _Layer, c: _Context, a: AttentionSpec, heads: int, kv: int, qk: int, v: int) -> None:
    """The attention kernels of prefill and decode, side by side."""
    capped = a.window > 0
    kind = c.kv_cache
    before = layer.last
    prefill = layer.add(
        "attention_prefill", "attention",
        lambda q, p: PrefillAttention(q, p, heads, kv, qk, v, kind, a.window),
        size="prefill", capped=capped, after=before, follow=False,
    )  # fmt: skip
    decode = layer.add(
        "attention_decode", "attention",
        # The context of a capped class is already min(context, window).
        lambda n, ctx: DecodeAttention(n, ctx, heads, kv, qk, v, kind, 0),
        size="decode", capped=capped, after=before, follow=False,
    )  # fmt: skip
    layer.last = (prefill, decode)


def _latent(layer: _Layer, c: _Context, a: AttentionSpec) -> None:
    """Latent attention: prefill with full heads, decode in the latent space (absorbed projections).

    The per-head up-projections run on every token in 16 bits: prefill expands keys and values, decode
    maps queries into the latent space and results out of it; both have the same work per token.
    """
    hidden, tensor, kind = c.spec.hidden, c.degrees.tensor, c.kv_cache
    heads = a.heads // tensor
    down = a.q_lora_rank + a.kv_lora_rank + a.qk_rope_dim
    if a.q_lora_rank:
        layer.add("qkv_down_proj", "gemm", c.gemm(down, hidden))
        layer.add("latent_norms", "gemm", _elementwise(2 * down * HALF_BYTES, 2), launches=2)
        layer.add("q_up_proj", "gemm", c.gemm(heads * a.head_dim, a.q_lora_rank))
    else:
        layer.add("qkv_down_proj", "gemm", c.gemm(heads * a.head_dim + down, hidden))
        layer.add("latent_norms", "gemm", _elementwise(2 * down * HALF_BYTES, 2), launches=2)
    latent = a.kv_lora_rank + a.qk_rope_dim
    moved = 2 * (heads + 1) * a.qk_rope_dim * HALF_BYTES + latent * (HALF_BYTES + KV_BYTES[kind])
    layer.add("rotary_and_cache", "gemm", _elementwise(moved, 2), launches=2)
    layer.add("k_up_proj", "gemm", c.gemm(a.kv_lora_rank, a.qk_nope_dim, plain=True, batch=heads))
    before = layer.last
    reach = a.sparse_top_k
    if reach:
        index = a.index_heads * a.index_dim
        layer.add("index_q_proj", "gemm", c.gemm(index, a.q_lora_rank))
        layer.add("index_k_proj", "gemm", c.gemm(a.index_dim + a.index_heads, hidden))
        # The indexer scores every cached token with small fp8 heads: attention without values.
        layer.add(
            "indexer_prefill", "attention",
            lambda q, p: PrefillAttention(q, p, a.index_heads, 1, a.index_dim, 0, "fp8"),
            size="prefill", follow=False,
        )  # fmt: skip
        layer.add(
            "indexer_decode", "attention",
            lambda n, ctx: DecodeAttention(n, ctx, a.index_heads, 1, a.index_dim, 0, "fp8"),
            size="decode", follow=False,
        )  # fmt: skip
        before = ("indexer_prefill", "indexer_decode", *before)
    prefill = layer.add(
        "attention_prefill", "attention",
        lambda q, p: PrefillAttention(q, p, heads, heads, a.head_dim, a.v_head_dim, c.half, reach),
        size="prefill", capped=reach > 0, after=before, follow=False,
    )  # fmt: skip
    decode = layer.add(
        "attention_decode", "attention",
        lambda n, ctx: DecodeAttention(n, ctx, heads, 1, latent, a.kv_lora_rank, kind, 0, True),
        size="decode", capped=reach > 0, after=before, follow=False,
    )  # fmt: skip
    layer.last = (prefill, decode)
    layer.add("v_up_proj", "gemm", c.gemm(a.v_head_dim, a.kv_lora_rank, plain=True, batch=heads))
    _finish(layer, c, hidden, heads * a.v_head_dim, "o_proj")


def _recurrent(layer: _Layer, c: _Context, a: AttentionSpec) -> None:
    """Gated delta nets and Mamba-2: projections, a short convolution, a scan over the state."""
    hidden, tensor = c.spec.hidden, c.degrees.tensor
    if a.kind == "linear":
        keys, values = a.state_key_heads * a.state_key_dim, a.state_value_heads * a.state_value_dim
        mixed, wide = 2 * keys + values, 2 * keys + 2 * values + 2 * a.state_value_heads
    else:
        values = a.state_value_heads * a.state_value_dim
        mixed = values + 2 * a.state_groups * a.state_key_dim
        wide = values + mixed + a.state_value_heads
    layer.add("in_proj", "gemm", c.gemm(ceil(wide / tensor), hidden))
    layer.add("convolution", "gemm", _elementwise(2 * mixed / tensor * HALF_BYTES))
    # Each token reads its inputs and updates the state: decode moves the whole state in and out, a
    # prefill chunk keeps it on chip (chunked scan), so a token of prefill moves a 64th of it.
    state = state_bytes(a, tensor)
    size = a.state_value_heads * a.state_value_dim * max(1, a.state_key_dim) / tensor
    moved = (mixed + 2 * values) / tensor * HALF_BYTES
    before = layer.last
    prefill = layer.add(
        "scan_prefill", "attention",
        lambda q, p: Elementwise(q * (moved + 2 * state / 64) + 0.0 * p, q * 6.0 * size + 0.0 * p, 3),
        size="prefill", after=before, follow=False, launches=3,
    )  # fmt: skip
    decode = layer.add(
        "scan_decode", "attention",
        lambda n, ctx: Elementwise(n * (moved + 2 * state) + 0.0 * ctx, n * 6.0 * size + 0.0 * ctx, 2),
        size="decode", after=before, follow=False, launches=2,
    )  # fmt: skip
    layer.last = (prefill, decode)
    layer.add("gated_norm", "gemm", _elementwise(3 * values / tensor * HALF_BYTES))
    _finish(layer, c, hidden, values // tensor, "out_proj")


def _dense(layer: _Layer, c: _Context, width: int, gated: bool, names: tuple[str, str]) -> None:
    hidden, tensor = c.spec.hidden, c.degrees.tensor
    cut = width // tensor
    layer.add(names[0], "gemm", c.gemm((2 if gated else 1) * cut, hidden))
    layer.add(f"{names[0]}_activation", "gemm", _elementwise((3 if gated else 2) * cut * HALF_BYTES))
    layer.add(names[1], "gemm", c.gemm(hidden, cut))


def _routed(layer: _Layer, c: _Context, f: FfnSpec) -> None:
    spec, d = c.spec, c.degrees
    hidden = spec.hidden
    layer.add("router", "gemm", c.gemm(f.experts, hidden, plain=True))
    layer.add("top_k", "gemm", _elementwise(f.experts * 4.0 + f.top_k * 8.0, 2), launches=2)
    weights, activations = c.formats(expert=True)
    start = layer.last
    ranks = d.attention_data
    element = BYTES_PER_ELEMENT[activations]
    if ranks > 1:
        # A token goes once to each device that holds one of its experts, at most top_k of them.
        targets = min(f.top_k, d.expert) if d.expert > 1 else d.stage_devices
        sent = targets * hidden / d.tensor
        group = c.ep_group
        layer.add(
            "dispatch", "communication",
            lambda m: Collective("all_to_all", m / ranks * sent * element, group), size="micro_batch",
        )  # fmt: skip
    local = ceil(f.experts / d.expert)
    inner = f.intermediate // (d.stage_devices // d.expert)
    layer.add(
        "experts", "moe",
        lambda m: GroupedGemm(m, hidden, inner, f.experts, local, f.top_k, weights, activations, f.gated),
        size="micro_batch", launches=4,
    )  # fmt: skip
    if ranks > 1:
        layer.add(
            "combine", "communication",
            lambda m: Collective("all_to_all", m / ranks * sent * HALF_BYTES, group), size="micro_batch",
        )  # fmt: skip
    routed_end = layer.last
    if f.shared_intermediate:
        layer.last = start
        _dense(layer, c, f.shared_intermediate, f.gated, ("shared_gate_up", "shared_down"))
        layer.add(
            "add_shared", "gemm", _elementwise(3 * hidden * HALF_BYTES), after=(*routed_end, *layer.last)
        )
    if ranks == 1 and d.stage_devices > 1:
        layer.add("experts_all_reduce", "communication", _all_reduce(hidden * HALF_BYTES, c.ep_group))
    elif ranks > 1 and f.shared_intermediate and d.tensor > 1:
        layer.add("shared_all_reduce", "communication", _all_reduce(hidden * HALF_BYTES, c.tp_group))


def layer_operators(
    spec: ModelSpec,
    group: LayerGroup,
    degrees: Degrees,
    *,
    weights: str,
    activations: str,
    kv_cache: str,
    tp_group: CommGroup,
    ep_group: CommGroup,
    device_half: str = "bf16",
) -> tuple[LayerOperator, ...]:
    """The operators of one layer on one device, in order; `device_half` is the device's 16-bit format."""
    plain = half(activations, device_half)
    c = _Context(spec, degrees, weights, activations, kv_cache, tp_group, ep_group, plain)
    layer = _Layer()
    norm = 4 * spec.hidden * HALF_BYTES  # reads input and residual, writes both
    per_block = max(1, round(spec.norm_params_per_layer / spec.hidden / 2))
    if group.attention is not None and group.attention.kind != "none":
        layer.add("attention_norm", "gemm", _elementwise(norm * per_block, per_block), launches=per_block)
        _attention(layer, c, group.attention)
    f = group.ffn
    if f is not None:
        layer.add("ffn_norm", "gemm", _elementwise(norm * per_block, per_block), launches=per_block)
        if f.experts:
            _routed(layer, c, f)
        else:
            _dense(layer, c, f.intermediate, f.gated, ("gate_up_proj" if f.gated else "up_proj", "down_proj"))
            if degrees.tensor > 1:
                layer.add(
                    "down_proj_all_reduce", "communication", _all_reduce(spec.hidden * HALF_BYTES, tp_group)
                )
    return tuple(layer.found)


def layer_graph(
    spec: ModelSpec,
    layer_index: int,
    degrees: Degrees,
    *,
    weights: str = "bf16",
    activations: str = "bf16",
    kv_cache: str = "bf16",
    tp_group: CommGroup | None = None,
    ep_group: CommGroup | None = None,
) -> nx.DiGraph:
    """One layer as a graph of operators: nodes carry `category`, `size` and `operator`, edges are data."""
    import networkx as nx

    alone = CommGroup(1, 1, "none", 1.0, 0.0)
    tp = tp_group or replace(alone, size=degrees.tensor, per_node=degrees.tensor)
    ep = ep_group or replace(alone, size=degrees.stage_devices, per_node=degrees.stage_devices)
    group = spec.layers[spec.layer_order[layer_index]]
    graph = nx.DiGraph(layer=layer_index)
    graph.add_node("input", category="data", size="tokens", operator=None)
    end: Iterable[str] = ("input",)
    for item in layer_operators(
        spec, group, degrees, weights=weights, activations=activations, kv_cache=kv_cache,
        tp_group=tp, ep_group=ep,
    ):  # fmt: skip
        graph.add_node(item.name, category=item.category, size=item.size, operator=item.operator)
        for before in item.after or ("input",):
            graph.add_edge(before, item.name)
    end = [name for name in graph if graph.out_degree(name) == 0]
    graph.add_node("output", category="data", size="tokens", operator=None)
    graph.add_edges_from((name, "output") for name in end)
    # Residual path around the block.
    graph.add_edge("input", "output")
    return graph


def step_terms(
    spec: ModelSpec,
    degrees: Degrees,
    *,
    weights: str,
    activations: str,
    kv_cache: str,
    tp_group: CommGroup,
    ep_group: CommGroup,
    pp_group: CommGroup | None,
    device_half: str = "bf16",
) -> tuple[Term, ...]:
    """Every operator of a step with how often it runs in each stage, for the table compiler.

    `device_half` is the device's 16-bit format: what is not quantized runs in it.
    """
    stages = degrees.pipeline
    hidden = spec.hidden
    terms: list[Term] = []
    for group, counts in zip(spec.layers, stage_counts(spec, stages), strict=True):
        items = layer_operators(
            spec, group, degrees, weights=weights, activations=activations, kv_cache=kv_cache,
            tp_group=tp_group, ep_group=ep_group, device_half=device_half,
        )  # fmt: skip
        terms += [
            Term(item.name, item.category, item.size, item.operator, counts, item.capped, item.launches)
            for item in items
        ]

    def only(stage: int) -> tuple[int, ...]:
        return tuple(int(i == stage) for i in range(stages))

    first, last = only(0), only(stages - 1)
    terms.append(Term("embedding", "gemm", "tokens", _elementwise(2 * hidden * HALF_BYTES), first))
    if degrees.tensor > 1:
        terms.append(
            Term(
                "embedding_all_reduce",
                "communication",
                "tokens",
                _all_reduce(hidden * HALF_BYTES, tp_group),
                first,
            )
        )
    terms.append(Term("final_norm", "gemm", "tokens", _elementwise(4 * hidden * HALF_BYTES), last))
    wide = ceil(spec.vocab / degrees.tensor)
    plain = half(activations, device_half)
    terms.append(Term("lm_head", "gemm", "logits", lambda m: Gemm(m, wide, hidden, plain, plain), last))
    if degrees.tensor > 1:
        gather = tp_group
        terms.append(
            Term(
                "logits_all_gather", "communication", "logits",
                lambda m: Collective("all_gather", m * spec.vocab * HALF_BYTES, gather), last,
            )
        )  # fmt: skip
    # Sampling reads the logits of all the vocabulary in fp32 a few times (softmax, top-k, draw).
    terms.append(Term("sampling", "gemm", "logits", _elementwise(spec.vocab * 4.0 * 4, 4), last, launches=4))
    if pp_group is not None and stages > 1:
        pair = pp_group
        width = hidden * HALF_BYTES / degrees.tensor
        counts = tuple(int(i < stages - 1) for i in range(stages))
        terms.append(
            Term(
                "stage_send", "communication", "tokens",
                lambda m: Collective("point_to_point", m * width, pair), counts,
            )
        )  # fmt: skip
    return tuple(terms)


def attention_cap_tokens(spec: ModelSpec) -> int:
    """The window of the model's capped attention classes, 0 when none: the widest, as all share one."""
    windows = [0]
    for group in spec.layers:
        a: Any = group.attention
        if a is not None:
            windows += [a.window, a.sparse_top_k]
    return max(windows)
