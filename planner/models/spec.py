"""A model's architecture, reduced to what costs time or memory. Frozen; counts are exact."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Token mixing of one layer.

    kind: "gqa" (multi-head and multi-query are special cases), "mla" (latent), "linear"
    (gated delta net and other linear attention), "ssm" (Mamba), "none".
    `window` 0: full; else a sliding window (or chunk) of that many tokens.
    """

    kind: str
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0  # of queries and keys
    v_head_dim: int = 0
    window: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    output_gate: bool = False  # q projection twice as wide (Qwen3.5)
    # latent attention (DeepSeek): ranks and dims; q_lora_rank 0 = direct q projection
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    # sparse selection over latent attention (DeepSeek V3.2, GLM-5)
    sparse_top_k: int = 0
    index_heads: int = 0
    index_dim: int = 0
    # recurrent mixing: width of the state and of the convolution
    state_key_heads: int = 0
    state_value_heads: int = 0
    state_key_dim: int = 0
    state_value_dim: int = 0
    conv_width: int = 0
    state_groups: int = 0


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """Channel mixing of one layer: dense (experts 0) or routed with optional shared experts."""

    intermediate: int  # dense size, or that of one routed expert
    gated: bool = True
    bias: bool = False
    experts: int = 0
    top_k: int = 0
    shared_intermediate: int = 0  # sum over shared experts
    shared_gate: bool = False  # a sigmoid gate vector on the shared expert
    router_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """`count` layers of one kind. `attention` or `ffn` may be None in hybrid models."""

    count: int
    attention: AttentionSpec | None
    ffn: FfnSpec | None


@dataclass(frozen=True, slots=True)
class QuantizationDefault:
    """What the checkpoint's own config says: formats of weights, activations, KV cache."""

    weights: str = "bf16"
    activations: str = "bf16"
    kv_cache: str = "bf16"
    method: str = ""  # fp8, awq, gptq, mxfp4, nvfp4, compressed-tensors, ...
    experts_only: bool = False  # gpt-oss: only routed experts are quantized


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model.

    `layers` holds the groups in the order they first appear; interleaving within the model is
    not kept (it costs nothing), except that `layer_order` names, per layer, the index of its
    group, so that pipeline stages can be cut.
    """

    name: str
    family: str
    hidden: int
    vocab: int
    layers: tuple[LayerGroup, ...]
    layer_order: tuple[int, ...]
    tied_embeddings: bool = False
    max_context_tokens: int = 0
    norm_params_per_layer: int = 0  # all norm weights (and biases) of one layer besides qk norms
    extra_params: int = 0  # positional tables, final norm, embedding norms, vision tower excluded
    lm_head_bias: bool = False
    mtp_layers: int = 0  # multi-token-prediction modules in the checkpoint (not served by default)
    quantization: QuantizationDefault = field(default_factory=QuantizationDefault)
    hugging_face_ids: tuple[str, ...] = ()
    source: str = ""

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return len(self.layer_order)
