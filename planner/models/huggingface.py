"""A Hugging Face `config.json` as a ModelSpec.

A config is read by its `model_type`; multimodal configs give their text part. What a family's
modelling code fixes (biases, norms, gating, which layers slide) is written here; numbers come from
the config. Sources are the families' modelling files in huggingface/transformers and vLLM.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hardware.errors import InputError
from planner.models.spec import AttentionSpec, FfnSpec, LayerGroup, ModelSpec, QuantizationDefault

Layer = tuple[AttentionSpec | None, FfnSpec | None]
_MAX_LAYERS = 1024
_MAX_NUMBER = 10**9


class Fields:
    """Typed reading of a config: wrong values are refused with their path."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data, self.path = data, path

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The first of `keys` that is given, a whole number of at least `least`."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"{self.path}.{key}", f"must be a whole number, not {value!r}"[:160])
            if value != int(value) or not least <= value <= _MAX_NUMBER:
                raise InputError(
                    f"{self.path}.{key}", f"must be a whole number of at least {least}, not {value}"
                )
            return int(value)
        if default is None:
            raise InputError(f"{self.path}.{keys[0]}", "this field is required")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InputError(f"{self.path}.{key}", f"must be true or false, not {value!r}"[:160])
        return value

    def words(self, key: str) -> list[str]:
        """A list of texts, empty when not given."""
        value = self.data.get(key)
        if value is None:
            return []
        if (
            not isinstance(value, Sequence)
            or isinstance(value, str)
            or not all(isinstance(x, str) for x in value)
        ):
            raise InputError(f"{self.path}.{key}", "must be a list of texts")
        return list(value)

    def indices(self, key: str) -> set[int]:
        """A list of layer numbers, empty when not given."""
        value = self.data.get(key)
        if value is None:
            return set()
        if not isinstance(value, Sequence) or not all(type(x) is int for x in value):
            raise InputError(f"{self.path}.{key}", "must be a list of layer numbers")
        return set(value)

    @property
    def layers(self) -> int:
        """Number of layers."""
        count = self.whole("num_hidden_layers", "n_layer", "n_layers")
        if count > _MAX_LAYERS:
            raise InputError(f"{self.path}.num_hidden_layers", f"must be at most {_MAX_LAYERS}, not {count}")
        return count

    @property
    def hidden(self) -> int:
        """Hidden size."""
        return self.whole("hidden_size", "n_embd")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.whole("num_attention_heads", "n_head")

    @property
    def head_dim(self) -> int:
        """Size of a head: given, else hidden size over heads."""
        heads, hidden = self.heads, self.hidden
        if self.data.get("head_dim") is None and hidden % heads:
            raise InputError(
                f"{self.path}.num_attention_heads", f"{heads} does not divide hidden_size {hidden}"
            )
        return self.whole("head_dim", default=hidden // heads)

    def grouped(self, **more: Any) -> AttentionSpec:
        """Grouped-query attention from the usual fields."""
        heads = self.heads
        kv = self.whole("num_key_value_heads", default=heads)
        if heads % kv:
            raise InputError(
                f"{self.path}.num_key_value_heads", f"{kv} does not divide {heads} attention heads"
            )
        dim = self.head_dim
        return AttentionSpec("gqa", heads, kv, dim, dim, **more)


# --- families ------------------------------------------------------------------------------------


def _windows(r: Fields, window: int, usual: Callable[[int], bool]) -> list[int]:
    """Window per layer: `layer_types` where given, else the family's pattern."""
    types = r.words("layer_types")
    count = r.layers
    if types and len(types) != count:
        raise InputError(f"{r.path}.layer_types", f"names {len(types)} layers of {count}")
    if types:
        return [window if kind in ("sliding_attention", "chunked_attention") else 0 for kind in types]
    return [window if usual(i) else 0 for i in range(count)]


def _dense(
    r: Fields,
    *,
    windows: list[int] | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: bool = False,
    mlp_bias: bool = False,
) -> list[Layer]:
    ffn = FfnSpec(r.whole("intermediate_size"), bias=mlp_bias)
    plain = windows or [0] * r.layers
    kinds = {
        window: r.grouped(window=window, qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=qk_norm)
        for window in set(plain)
    }
    return [(kinds[window], ffn) for window in plain]


def _llama(r: Fields) -> list[Layer]:
    bias = r.flag("attention_bias")
    return _dense(r, qkv_bias=bias, o_bias=bias, mlp_bias=r.flag("mlp_bias"))


def _mistral(r: Fields) -> list[Layer]:
    window = r.whole("sliding_window", default=0, least=0)
    return _dense(r, windows=_windows(r, window, lambda _: True))


def _qwen2(r: Fields) -> list[Layer]:
    window = r.whole("sliding_window", default=0, least=0) if r.flag("use_sliding_window") else 0
    first = r.whole("max_window_layers", default=0, least=0)
    return _dense(r, windows=_windows(r, window, lambda i: i >= first), qkv_bias=True)


def _qwen3(r: Fields) -> list[Layer]:
    bias = r.flag("attention_bias")
    return _dense(r, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _gemma(r: Fields) -> list[Layer]:
    return _dense(r)


def _gemma2(r: Fields) -> list[Layer]:
    window = r.whole("sliding_window", default=4096)
    return _dense(r, windows=_windows(r, window, lambda i: i % 2 == 0))


def _gemma3(r: Fields) -> list[Layer]:
    window = r.whole("sliding_window", default=1024)
    every = r.whole("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return _dense(r, windows=_windows(r, window, lambda i: (i + 1) % every != 0), qk_norm=True)


def _phi3(r: Fields) -> list[Layer]:
    window = r.whole("sliding_window", default=0, least=0)
    # A window as long as the context is none.
    if window + 1 >= r.whole("max_position_embeddings", default=window + 2):
        window = 0
    return _dense(r, windows=[window] * r.layers)


def _plain_mlp(r: Fields, ffn_keys: tuple[str, ...], *, qkv_bias: bool, o_bias: bool) -> list[Layer]:
    """Older families: two-matrix feed-forward with biases."""
    width = r.whole(*ffn_keys, default=4 * r.hidden)
    return [(r.grouped(qkv_bias=qkv_bias, o_bias=o_bias), FfnSpec(width, gated=False, bias=True))] * r.layers


def _phi(r: Fields) -> list[Layer]:
    return _plain_mlp(r, ("intermediate_size",), qkv_bias=True, o_bias=True)


def _opt(r: Fields) -> list[Layer]:
    return _plain_mlp(r, ("ffn_dim",), qkv_bias=True, o_bias=True)


def _bloom(r: Fields) -> list[Layer]:
    return _plain_mlp(r, ("n_inner",), qkv_bias=True, o_bias=True)


def _gptj(r: Fields) -> list[Layer]:
    return _plain_mlp(r, ("n_inner",), qkv_bias=False, o_bias=False)


def _experts(r: Fields, *, width: tuple[str, ...], count: tuple[str, ...], **more: Any) -> FfnSpec:
    experts = r.whole(*count)
    top_k = r.whole("num_experts_per_tok", "top_k_experts")
    if top_k > experts:
        raise InputError(f"{r.path}.num_experts_per_tok", f"must be at most {experts} experts, not {top_k}")
    return FfnSpec(r.whole(*width), experts=experts, top_k=top_k, **more)


def _mixtral(r: Fields) -> list[Layer]:
    window = r.whole("sliding_window", default=0, least=0)
    ffn = _experts(r, width=("intermediate_size",), count=("num_local_experts",))
    return [(r.grouped(window=window), ffn)] * r.layers


def _qwen_moe(r: Fields, attention: Callable[[int], AttentionSpec]) -> list[Layer]:
    shared = r.whole("shared_expert_intermediate_size", default=0, least=0)
    routed = _experts(
        r, width=("moe_intermediate_size",), count=("num_experts", "num_local_experts"),
        shared_intermediate=shared, shared_gate=shared > 0,
    )  # fmt: skip
    step = r.whole("decoder_sparse_step", default=1)
    dense_only = r.indices("mlp_only_layers")
    dense = FfnSpec(r.whole("intermediate_size", default=routed.intermediate))
    return [(attention(i), dense if i in dense_only or (i + 1) % step else routed) for i in range(r.layers)]


def _qwen2_moe(r: Fields) -> list[Layer]:
    attention = r.grouped(qkv_bias=True)
    return _qwen_moe(r, lambda _: attention)


def _qwen3_moe(r: Fields) -> list[Layer]:
    attention = r.grouped(qk_norm=True, qkv_bias=r.flag("attention_bias"), o_bias=r.flag("attention_bias"))
    return _qwen_moe(r, lambda _: attention)


def _delta_net(r: Fields) -> AttentionSpec:
    return AttentionSpec(
        "linear",
        state_key_heads=r.whole("linear_num_key_heads"),
        state_value_heads=r.whole("linear_num_value_heads"),
        state_key_dim=r.whole("linear_key_head_dim"),
        state_value_dim=r.whole("linear_value_head_dim"),
        conv_width=r.whole("linear_conv_kernel_dim", default=4),
    )


def _qwen_hybrid(r: Fields) -> list[Layer]:
    """Qwen3-Next and Qwen3.5: gated delta nets, gated full attention every fourth layer."""
    full = r.grouped(qk_norm=True, output_gate=True)
    linear = _delta_net(r)
    every = r.whole("full_attention_interval", default=4)
    types = r.words("layer_types")
    if types and len(types) != r.layers:
        raise InputError(f"{r.path}.layer_types", f"names {len(types)} layers of {r.layers}")

    def attention(i: int) -> AttentionSpec:
        is_full = types[i] == "full_attention" if types else (i + 1) % every == 0
        return full if is_full else linear

    if r.data.get("num_experts") or r.data.get("num_local_experts"):
        return _qwen_moe(r, attention)
    ffn = FfnSpec(r.whole("intermediate_size"))
    return [(attention(i), ffn) for i in range(r.layers)]


def _gpt_oss(r: Fields) -> list[Layer]:
    window = r.whole("sliding_window", default=128)
    ffn = _experts(r, width=("intermediate_size",), count=("num_local_experts",), bias=True, router_bias=True)
    windows = _windows(r, window, lambda i: i % 2 == 0)
    kinds = {w: r.grouped(window=w, qkv_bias=True, o_bias=True) for w in set(windows)}
    return [(kinds[w], ffn) for w in windows]


def _latent(r: Fields) -> AttentionSpec:
    nope, rope = r.whole("qk_nope_head_dim"), r.whole("qk_rope_head_dim")
    return AttentionSpec(
        "mla",
        heads=r.heads,
        kv_heads=r.heads,
        head_dim=nope + rope,
        v_head_dim=r.whole("v_head_dim"),
        q_lora_rank=r.whole("q_lora_rank", default=0, least=0),
        kv_lora_rank=r.whole("kv_lora_rank"),
        qk_nope_dim=nope,
        qk_rope_dim=rope,
        sparse_top_k=r.whole("index_topk", default=0, least=0),
        index_heads=r.whole("index_n_heads", default=0, least=0),
        index_dim=r.whole("index_head_dim", default=0, least=0),
    )


def _deepseek_ffn(r: Fields, attention: AttentionSpec) -> list[Layer]:
    width = r.whole("moe_intermediate_size")
    routed = _experts(
        r, width=("moe_intermediate_size",), count=("n_routed_experts", "num_experts"),
        shared_intermediate=width * r.whole("n_shared_experts", "num_shared_experts", default=0, least=0),
    )  # fmt: skip
    dense = FfnSpec(r.whole("intermediate_size"))
    first = r.whole("first_k_dense_replace", default=0, least=0)
    step = r.whole("moe_layer_freq", default=1)
    return [(attention, routed if i >= first and i % step == 0 else dense) for i in range(r.layers)]


def _deepseek(r: Fields) -> list[Layer]:
    return _deepseek_ffn(r, _latent(r))


def _glm4(r: Fields) -> list[Layer]:
    return _dense(r, qkv_bias=r.flag("attention_bias"))


def _glm4_moe(r: Fields) -> list[Layer]:
    return _deepseek_ffn(r, r.grouped(qkv_bias=r.flag("attention_bias"), qk_norm=r.flag("use_qk_norm")))


def _minimax(r: Fields) -> list[Layer]:
    ffn = _experts(r, width=("intermediate_size",), count=("num_local_experts",), router_bias=True)
    return [(r.grouped(qk_norm=r.flag("use_qk_norm")), ffn)] * r.layers


def _llama4(r: Fields) -> list[Layer]:
    width = r.whole("intermediate_size")
    routed = _experts(
        r, width=("intermediate_size",), count=("num_local_experts",), shared_intermediate=width
    )
    dense = FfnSpec(r.whole("intermediate_size_mlp"))
    step = r.whole("interleave_moe_layer_step", default=1)
    chunk = r.whole("attention_chunk_size", default=8192)
    moe = r.indices("moe_layers") or {i for i in range(r.layers) if (i + 1) % step == 0}
    windows = _windows(r, chunk, lambda i: (i + 1) % 4 != 0)
    kinds = {w: r.grouped(window=w) for w in set(windows)}
    return [(kinds[w], routed if i in moe else dense) for i, w in enumerate(windows)]


def _nemotron_h(r: Fields) -> list[Layer]:
    pattern = r.data.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) > _MAX_LAYERS or set(pattern) - set("M*-E"):
        raise InputError(f"{r.path}.hybrid_override_pattern", "must be a text of M, *, - and E, one a layer")
    mamba = AttentionSpec(
        "ssm",
        state_value_heads=r.whole("mamba_num_heads"),
        state_value_dim=r.whole("mamba_head_dim"),
        state_key_dim=r.whole("ssm_state_size"),
        state_groups=r.whole("n_groups", default=1),
        conv_width=r.whole("conv_kernel", default=4),
    )
    layers: list[Layer] = []
    for kind in pattern:
        if kind == "M":
            layers.append((mamba, None))
        elif kind == "*":
            layers.append((r.grouped(), None))
        elif kind == "-":
            layers.append((None, FfnSpec(r.whole("intermediate_size"), gated=False)))
        else:
            shared = r.whole("moe_shared_expert_intermediate_size", default=0, least=0)
            layers.append(
                (None, _experts(r, width=("moe_intermediate_size",), count=("n_routed_experts",),
                                gated=False, shared_intermediate=shared))
            )  # fmt: skip
    return layers


# model_type: (layers, norm weights per layer in hidden sizes, tied unless the config says so)
_FAMILIES: Mapping[str, tuple[Callable[[Fields], list[Layer]], int, bool]] = {
    "llama": (_llama, 2, False),
    "mistral": (_mistral, 2, False),
    "qwen2": (_qwen2, 2, False),
    "qwen3": (_qwen3, 2, False),
    "gemma": (_gemma, 2, True),
    "gemma2": (_gemma2, 4, True),
    "gemma3": (_gemma3, 4, True),
    "phi": (_phi, 2, False),
    "phi3": (_phi3, 2, False),
    "opt": (_opt, 4, True),
    "bloom": (_bloom, 4, True),
    "gptj": (_gptj, 2, False),
    "mixtral": (_mixtral, 2, False),
    "qwen2_moe": (_qwen2_moe, 2, False),
    "qwen3_moe": (_qwen3_moe, 2, False),
    "qwen3_next": (_qwen_hybrid, 2, False),
    "qwen3_5": (_qwen_hybrid, 2, False),
    "qwen3_5_moe": (_qwen_hybrid, 2, False),
    "gpt_oss": (_gpt_oss, 2, False),
    "deepseek_v2": (_deepseek, 2, False),
    "deepseek_v3": (_deepseek, 2, False),
    "deepseek_v32": (_deepseek, 2, False),
    "kimi_k2": (_deepseek, 2, False),
    "glm4": (_glm4, 4, False),
    "glm4_moe": (_glm4_moe, 2, False),
    "glm_moe_dsa": (_deepseek, 2, False),
    "minimax_m2": (_minimax, 2, False),
    "llama4": (_llama4, 2, False),
    "nemotron_h": (_nemotron_h, 1, False),
}
#: Other spellings of the same architectures.
_ALIASES = {
    "yi": "llama",
    "codellama": "llama",
    "mistral3": "mistral",
    "ministral": "mistral",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen2_5_vl": "qwen2",
    "gemma3_text": "gemma3",
    "llama4_text": "llama4",
    "kimi_k25": "kimi_k2",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "nemotron_h_moe": "nemotron_h",
}


def families() -> tuple[str, ...]:
    """The `model_type` names that can be read."""
    return tuple(sorted((*_FAMILIES, *_ALIASES)))


def from_config(config: Mapping[str, Any], path: str = "model.config", name: str = "") -> ModelSpec:
    """The architecture that a `config.json` describes; multimodal ones give their text part.

    Raises InputError for an unknown architecture (with the nearest known), or the path of a field
    that is missing or wrong.
    """
    if not isinstance(config, Mapping):
        raise InputError(path, f"must be a mapping, not {type(config).__name__}")
    outer: Mapping[str, Any] = config
    for key in ("text_config", "llm_config", "language_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping) and ("hidden_size" in inner or "num_hidden_layers" in inner):
            config, path = {**inner, "architectures": outer.get("architectures")}, f"{path}.{key}"
            break
    kind = _family(config, outer, path)
    build, norms, tied = _FAMILIES[kind]
    r = Fields(config, path)
    hidden, vocab = r.hidden, r.whole("vocab_size")
    layers = build(r)
    extra, head_bias = _extra(kind, r)
    groups: dict[Layer, int] = {}
    order = [groups.setdefault(layer, len(groups)) for layer in layers]
    tie = outer.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return ModelSpec(
        name=name or str(outer.get("_name_or_path") or kind)[:120],
        family=kind,
        hidden=hidden,
        vocab=vocab,
        layers=tuple(LayerGroup(order.count(index), *layer) for index, layer in enumerate(groups)),
        layer_order=tuple(order),
        tied_embeddings=tied if not isinstance(tie, bool) else tie,
        max_context_tokens=r.whole(
            "max_position_embeddings", "n_positions", "seq_length", default=0, least=0
        ),
        norm_params_per_layer=norms * hidden,
        extra_params=extra,
        lm_head_bias=head_bias,
        mtp_layers=r.whole("num_nextn_predict_layers", "num_mtp_modules", default=0, least=0),
        quantization=quantization(
            outer.get("quantization_config") or config.get("quantization_config"), kind, path
        ),
    )


def _family(config: Mapping[str, Any], outer: Mapping[str, Any], path: str) -> str:
    for source in (config, outer):
        kind = source.get("model_type")
        if isinstance(kind, str):
            kind = kind.lower().replace("-", "_")
            kind = _ALIASES.get(kind, kind)
            if kind in _FAMILIES:
                return kind
    wanted = config.get("model_type") or outer.get("model_type") or outer.get("architectures")
    if wanted is None:
        raise InputError(f"{path}.model_type", "this field is required")
    if isinstance(wanted, (list, tuple)):
        wanted = wanted[0] if wanted else ""
    text = str(wanted)[:80]
    close = difflib.get_close_matches(text.lower(), families(), n=1, cutoff=0.0)
    raise InputError(f"{path}.model_type", f"unknown architecture '{text}'", f"nearest supported: {close[0]}")


def _extra(kind: str, r: Fields) -> tuple[int, bool]:
    """(weights outside layers, embeddings and head; whether the head has a bias)."""
    hidden = r.hidden
    if kind == "opt":
        # Learned positions, two more than the context, and a final norm with bias.
        return (r.whole("max_position_embeddings") + 2) * hidden + 2 * hidden, False
    if kind == "bloom":
        return 4 * hidden, False  # norm of the embeddings and final norm, with biases
    if kind in ("gptj", "phi"):
        return 2 * hidden, True
    return hidden, False


# --- quantization ----------------------------------------------------------------------------------


def quantization(value: Any, kind: str, path: str) -> QuantizationDefault:
    """What a `quantization_config` (or ModelOpt's `hf_quant_config.json`) says of the formats."""
    if value is None:
        return QuantizationDefault()
    where = f"{path}.quantization_config"
    if not isinstance(value, Mapping):
        raise InputError(where, f"must be a mapping, not {type(value).__name__}")
    method = str(value.get("quant_method") or value.get("quant_algo") or "").lower()
    inner = value.get("quantization")
    if isinstance(inner, Mapping):
        method = str(inner.get("quant_algo") or "").lower()
        value = inner
    kv = (
        "fp8"
        if "fp8" in str(value.get("kv_cache_quant_algo") or value.get("kv_cache_scheme") or "").lower()
        else "bf16"
    )
    if method == "modelopt":
        method = str(value.get("quant_algo") or "nvfp4").lower()
    if method == "fp8" or method.startswith("fp8"):
        block = value.get("weight_block_size")
        return QuantizationDefault("fp8", "fp8", kv, "fp8_block" if block else "fp8")
    if method in ("nvfp4", "w4a16_nvfp4") or "nvfp4" in method:
        return QuantizationDefault("fp4", "bf16" if "a16" in method else "fp4", kv, "nvfp4")
    if method == "mxfp4":
        return QuantizationDefault("fp4", "bf16", kv, "mxfp4", experts_only=kind == "gpt_oss")
    if method in ("awq", "gptq", "auto-round", "awq_marlin", "gptq_marlin"):
        bits = value.get("bits") or value.get("w_bit") or 4
        if bits not in (4, 8):
            raise InputError(f"{where}.bits", f"must be 4 or 8, not {bits!r}"[:120])
        return QuantizationDefault("int4" if bits == 4 else "int8", "bf16", kv, method)
    if method in ("compressed-tensors", "compressed_tensors"):
        return _compressed(value, kv, where)
    if method in ("bitsandbytes", "bnb"):
        four = bool(value.get("load_in_4bit") or value.get("_load_in_4bit"))
        return QuantizationDefault("int4" if four else "int8", "bf16", kv, "bitsandbytes")
    raise InputError(
        f"{where}.quant_method", f"unknown method '{method[:60]}'",
        "known: fp8, nvfp4, mxfp4, modelopt, awq, gptq, compressed-tensors, bitsandbytes",
    )  # fmt: skip


def _compressed(value: Mapping[str, Any], kv: str, where: str) -> QuantizationDefault:
    """llm-compressor's groups: the first one's weights and input activations."""
    groups = value.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    if not isinstance(first, Mapping) or not isinstance(first.get("weights"), Mapping):
        raise InputError(f"{where}.config_groups", "names no group with weights")

    def form(part: Any) -> str:
        if not isinstance(part, Mapping):
            return "bf16"
        bits, kind = part.get("num_bits") or 0, str(part.get("type", "int"))
        known = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4", (4, "float"): "fp4"}
        if (bits, kind) not in known:
            raise InputError(f"{where}.config_groups", f"{bits!r}-bit {kind!r} is not supported"[:160])
        return known[bits, kind]

    weights = first["weights"]
    block = form(weights) == "fp8" and weights.get("strategy") == "block"
    return QuantizationDefault(
        form(weights),
        form(first.get("input_activations")),
        kv,
        "fp8_block" if block else "compressed-tensors",
    )
