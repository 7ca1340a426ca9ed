"""Models: counts against published ones, cutting, cache, operators, and configs that are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodels.ops import BYTES_PER_ELEMENT, Gemm, GroupedGemm
from costmodels.roofline import flops
from hardware import CommGroup, InputError
from planner.models import (
    Degrees,
    ModelSpec,
    attention_cap_tokens,
    check_degrees,
    config_at,
    count_parameters,
    families,
    from_config,
    kv_bytes_per_token,
    layer_graph,
    load_model,
    model_rows,
    shard_weights,
    stage_layers,
    step_terms,
)

GIB = 2**30
ROWS = model_rows()
SPECS = [load_model(row["name"]) for row in ROWS]
ONE = CommGroup(1, 1, "none", 1e9, 0.0)


def by_name(specs: list[ModelSpec]) -> Any:
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


# --- counting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_parameters_match_the_published_count(row: dict[str, Any]) -> None:
    # Figures that a model card rounds to whole billions are known to half of the last digit only.
    rounded = "rounded" in row["source"] or row["published_parameters"] % 10**8 == 0
    tolerance = 0.004 if rounded else 0.0002
    assert row["parameters"] == pytest.approx(row["published_parameters"], rel=tolerance)


@pytest.mark.parametrize(
    ("name", "published", "with_table", "half_digit"),
    [
        ("mixtral-8x7b", 12.9e9, True, 0.05e9),  # Mixtral paper
        ("gpt-oss-20b", 3.61e9, False, 0.005e9),  # model card, table 1: without the embedding
        ("gpt-oss-120b", 5.13e9, False, 0.005e9),
        ("qwen3-30b-a3b", 3.3e9, True, 0.06e9),
        ("qwen3-235b-a22b", 22e9, True, 0.5e9),
        ("deepseek-v3", 37e9, False, 0.5e9),
        ("deepseek-v2-lite", 2.4e9, False, 0.06e9),
        ("glm-4.5-air", 12e9, False, 0.9e9),
        ("minimax-m2", 10e9, False, 0.5e9),
        ("kimi-k2", 32e9, False, 0.5e9),
        ("llama-4-scout", 17e9, True, 0.5e9),
    ],
)
def test_active_parameters(name: str, published: float, with_table: bool, half_digit: float) -> None:
    """Publishers count the input embedding among the active weights or not; both are checked as stated."""
    found = count_parameters(load_model(name))
    active = found.active if with_table else found.active - found.embedding
    assert active == pytest.approx(published, abs=half_digit)


def test_catalog_is_large_and_every_name_resolves() -> None:
    assert len(ROWS) >= 45
    for row in ROWS:
        for ident in row["hugging_face_ids"]:
            assert load_model(ident.upper()).layer_order == load_model(row["name"]).layer_order


@pytest.mark.parametrize(
    ("ident", "name", "weights", "method"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", "bf16", ""),
        ("nvidia/DeepSeek-R1-NVFP4", "deepseek-r1", "fp4", "nvfp4"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1", "fp8", "fp8_block"),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b-a22b", "bf16", ""),
        ("Qwen/Qwen3-235B-A22B-FP8", "qwen3-235b-a22b", "fp8", "fp8_block"),
        ("nvidia/Llama-3.1-70B-Instruct-FP8", "llama-3.1-70b", "fp8", "fp8"),
        ("Qwen/Qwen2.5-72B-Instruct-AWQ", "qwen2.5-72b", "int4", "awq"),
        ("openai/gpt-oss-120b", "gpt-oss-120b", "fp4", "mxfp4"),
        ("moonshotai/Kimi-K2.5", "kimi-k2.5", "int4", "compressed-tensors"),
        ("moonshotai/Kimi-K2-Thinking", "kimi-k2", "int4", "compressed-tensors"),
        ("amd/Llama-3.1-70B-Instruct-FP8-KV", "llama-3.1-70b", "fp8", "fp8"),
        ("nvidia/DeepSeek-R1-0528-FP4-v2", "deepseek-r1", "fp4", "nvfp4"),
        ("deepseek-ai/DeepSeek-V2", "deepseek-v2", "bf16", ""),
        ("unsloth/Llama-3.3-70B-Instruct-bnb-4bit", "llama-3.3-70b", "int4", "bitsandbytes"),
        ("Qwen/Qwen2.5-Coder-32B-Instruct", "qwen2.5-32b", "bf16", ""),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3.3-70b", "bf16", ""),
    ],
)
def test_variants_share_an_architecture_and_bring_their_formats(
    ident: str, name: str, weights: str, method: str
) -> None:
    spec = load_model(ident)
    assert (spec.name, spec.quantization.weights, spec.quantization.method) == (name, weights, method)


def test_a_variant_whose_config_says_so_has_its_cache_in_fp8() -> None:
    assert load_model("amd/Llama-3.1-70B-Instruct-FP8-KV").quantization.kv_cache == "fp8"
    assert load_model("nvidia/Llama-3.1-70B-Instruct-FP8").quantization.kv_cache == "bf16"


@pytest.mark.parametrize(
    ("ident", "tokens"),
    [
        ("Qwen/Qwen3-30B-A3B", 40_960),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 262_144),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8", 262_144),
        ("microsoft/Phi-3-mini-4k-instruct", 4_096),
        ("microsoft/Phi-3-mini-128k-instruct", 131_072),
    ],
)
def test_variants_hold_the_tokens_of_their_own_config(ident: str, tokens: int) -> None:
    assert load_model(ident).max_context_tokens == tokens


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("qwen3-coder-30b-a3b", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("mistral-large-123b", "mistralai/Mistral-Large-Instruct-2407"),
        ("kimi-k2", "moonshotai/Kimi-K2-Instruct"),
    ],
)
def test_models_without_a_base_checkpoint_name_one_that_is_published(name: str, first: str) -> None:
    # The first id is what an exported command loads.
    assert load_model(name).hugging_face_ids[0] == first


# --- cutting ---------------------------------------------------------------------------------------


def test_llama_3_70b_by_hand() -> None:
    """fp16 over two devices: 63.75 GiB of sharded layers (80 x 855,638,016 matrix weights x 2 B / 2),
    the figure that APEX gives; the engine adds half the embedding, half the head and the norms."""
    spec = load_model("llama-3-70b")
    shard = shard_weights(spec, Degrees(tensor=2), "fp16", 0)
    assert shard["attention"] + shard["dense_ffn"] == 63.75 * GIB
    table = 128256 * 8192 * 2 / 2
    assert shard["embeddings"] == shard["lm_head"] == table
    assert shard["norms"] == (80 * 2 + 1) * 8192 * 2
    assert sum(shard.values()) == 63.75 * GIB + 2 * table + 161 * 8192 * 2


@by_name(SPECS)
def test_one_device_holds_every_weight(spec: ModelSpec) -> None:
    held = sum(shard_weights(spec, Degrees(), "bf16").values())
    counted = 2 * count_parameters(spec).total
    # Biases of projections and recurrent scalars are all that the two count differently.
    assert held == pytest.approx(counted, rel=2e-4)


@by_name([spec for spec in SPECS if check_degrees(spec, Degrees(tensor=2, pipeline=2)) is None])
def test_shards_add_up_to_the_model_and_shrink(spec: ModelSpec) -> None:
    whole = sum(shard_weights(spec, Degrees(), "bf16").values())
    cut = [sum(shard_weights(spec, Degrees(tensor=2, pipeline=2), "bf16", s).values()) for s in range(2)]
    assert whole <= 2 * sum(cut) * 1.0001  # what is copied makes it more, never less
    assert max(cut) < whole
    assert sum(shard_weights(spec, Degrees(), "fp8").values()) < whole


def test_experts_are_spread_or_sharded() -> None:
    spec = load_model("deepseek-v3")
    sharded = shard_weights(spec, Degrees(tensor=8), "fp8")["experts"]
    spread = shard_weights(spec, Degrees(tensor=8, expert=8), "fp8")["experts"]
    ranks = shard_weights(spec, Degrees(attention_data=8, expert=8), "fp8")
    assert sharded == spread == ranks["experts"]
    assert ranks["attention"] > shard_weights(spec, Degrees(tensor=8), "fp8")["attention"]
    assert BYTES_PER_ELEMENT["fp8_block"] * 58 * 256 * 3 * 7168 * 2048 / 8 == spread


@pytest.mark.parametrize(
    ("name", "degrees", "reason"),
    [
        ("llama-3.1-70b", Degrees(tensor=3), "tensor 3 does not divide 64 attention heads"),
        (
            "llama-3.1-70b",
            Degrees(expert=2, tensor=2),
            "expert 2 needs routed experts; llama-3.1-70b has none",
        ),
        ("llama-3.1-70b", Degrees(pipeline=81), "pipeline 81 exceeds the 80 layers of llama-3.1-70b"),
        ("llama-3.1-8b", Degrees(attention_data=2), "attention_data 2 needs routed experts"),
        (
            "qwen3-30b-a3b",
            Degrees(tensor=4, expert=3),
            "expert 3 does not divide tensor x attention_data = 4",
        ),
        ("mixtral-8x7b", Degrees(tensor=16, expert=16), "expert 16 does not divide 8 experts"),
        ("llama-3.1-8b", Degrees(tensor=0), "tensor must be at least 1, not 0"),
        ("qwen2.5-7b", Degrees(tensor=8), "tensor 8 does not divide 28 attention heads"),
    ],
)
def test_impossible_cuts_say_why(name: str, degrees: Degrees, reason: str) -> None:
    assert reason in str(check_degrees(load_model(name), degrees))


def test_stages_follow_the_engine() -> None:
    # vLLM gives the remainder to the stages before the last.
    assert [len(stage) for stage in stage_layers(load_model("deepseek-v3"), 4)] == [15, 15, 16, 15]
    assert [len(stage) for stage in stage_layers(load_model("llama-3.1-70b"), 3)] == [27, 27, 26]
    assert [len(stage) for stage in stage_layers(load_model("llama-3.1-8b"), 1)] == [32]


# --- KV cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-3-8b", 2 * 32 * 8 * 128 * 2),
        ("yi-34b", 2 * 60 * 8 * 128 * 2),
        ("llama-2-7b", 2 * 32 * 32 * 128 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("deepseek-v3.2", 61 * ((512 + 64) * 2 + 132)),
    ],
)
def test_kv_bytes_per_token_by_hand(name: str, expected: int) -> None:
    assert kv_bytes_per_token(load_model(name)).full_bytes_per_token == expected


def test_the_figures_themselves() -> None:
    assert kv_bytes_per_token(load_model("llama-3-8b")).full_bytes_per_token == 131_072
    assert kv_bytes_per_token(load_model("yi-34b")).full_bytes_per_token == 245_760
    assert kv_bytes_per_token(load_model("deepseek-v3")).full_bytes_per_token == 70_272


def test_heads_are_copied_when_tensor_exceeds_them_and_latents_always() -> None:
    spec = load_model("llama-3.1-70b")
    one = kv_bytes_per_token(spec).full_bytes_per_token
    assert kv_bytes_per_token(spec, tensor=8).full_bytes_per_token == one / 8
    assert kv_bytes_per_token(spec, tensor=16).full_bytes_per_token == one / 8
    latent = load_model("deepseek-r1")
    assert kv_bytes_per_token(latent, tensor=8) == kv_bytes_per_token(latent)
    assert kv_bytes_per_token(spec, "fp8").full_bytes_per_token == one / 2


def test_windows_and_states() -> None:
    oss = kv_bytes_per_token(load_model("gpt-oss-120b"))
    assert oss.full_bytes_per_token == oss.windowed_bytes_per_token == 18 * 2 * 8 * 64 * 2
    assert oss.window_tokens == attention_cap_tokens(load_model("gpt-oss-120b")) == 128
    gemma = kv_bytes_per_token(load_model("gemma-3-27b"))
    assert gemma.windowed_bytes_per_token / gemma.full_bytes_per_token == 52 / 10
    hybrid = kv_bytes_per_token(load_model("qwen3.5-397b-a17b"))
    assert hybrid.full_bytes_per_token == 15 * 2 * 2 * 256 * 2
    assert hybrid.state_bytes_per_sequence > 45 * 64 * 128 * 128 * 4


# --- operators ---------------------------------------------------------------------------------------


def _terms(spec: ModelSpec, degrees: Degrees = Degrees()) -> Any:  # noqa: B008 -- frozen
    group = CommGroup(degrees.tensor, degrees.tensor, "none", 1e9, 0.0)
    stage = CommGroup(degrees.stage_devices, degrees.stage_devices, "none", 1e9, 0.0)
    pair = CommGroup(2, 1, "none", 1e9, 0.0) if degrees.pipeline > 1 else None
    return step_terms(
        spec, degrees, weights="bf16", activations="bf16", kv_cache="bf16",
        tp_group=group, ep_group=stage, pp_group=pair,
    )  # fmt: skip


@by_name(SPECS)
def test_matrix_work_is_two_flops_a_weight(spec: ModelSpec) -> None:
    """Second count of the same thing: GEMM work of a token against active weights."""
    total = 0.0
    for term in _terms(spec):
        if term.size in ("tokens", "micro_batch", "logits"):
            op = term.operator(4096.0)
            if isinstance(op, (Gemm, GroupedGemm)):
                total += float(np.asarray(flops(op))) * sum(term.stage_counts) / 4096.0
    counted = count_parameters(spec)
    # The embedding table is looked up, not multiplied; norms, biases, convolutions are no matrices.
    matrices = counted.active - counted.embedding - counted.norms
    if spec.tied_embeddings:
        matrices += counted.embedding
    assert total == pytest.approx(2 * matrices, rel=0.012)


@by_name([load_model(n) for n in ("llama-3.1-70b", "deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b")])
def test_cutting_divides_the_work(spec: ModelSpec) -> None:
    def work(degrees: Degrees) -> float:
        found = 0.0
        for term in _terms(spec, degrees):
            op = term.operator(512.0, 512.0) if term.size in ("decode", "prefill") else term.operator(512.0)
            found += float(np.max(flops(op))) * sum(term.stage_counts)
        return found

    assert work(Degrees(tensor=4)) == pytest.approx(work(Degrees()) / 4, rel=0.12)
    assert work(Degrees(pipeline=4)) == pytest.approx(work(Degrees()))


def test_collectives_appear_with_parallelism_only() -> None:
    spec = load_model("qwen3-30b-a3b")

    def names(degrees: Degrees) -> set[str]:
        return {term.name for term in _terms(spec, degrees) if term.category == "communication"}

    assert names(Degrees()) == set()
    assert {"o_proj_all_reduce", "experts_all_reduce"} <= names(Degrees(tensor=4))
    assert {"dispatch", "combine"} <= names(Degrees(attention_data=4, expert=4))
    assert "stage_send" in names(Degrees(pipeline=2))


@by_name([load_model(n) for n in ("llama-3.1-8b", "deepseek-v3.2", "qwen3.5-397b-a17b", "llama-4-scout")])
def test_layer_graph_is_one_flow_from_input_to_output(spec: ModelSpec) -> None:
    import networkx as nx

    for index in (0, spec.num_layers - 1):
        graph = layer_graph(spec, index, Degrees(tensor=2))
        assert nx.is_directed_acyclic_graph(graph)
        assert set(nx.descendants(graph, "input")) | {"input"} == set(graph)
        assert set(nx.ancestors(graph, "output")) | {"output"} == set(graph)
    assert {"attention_prefill", "attention_decode"} <= set(
        layer_graph(load_model("llama-3.1-8b"), 0, Degrees())
    )


# --- configs -----------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def test_paths_and_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    by_folder, by_file = load_model(str(tmp_path)), load_model(str(tmp_path / "config.json"))
    assert count_parameters(by_folder).total == count_parameters(by_file).total == 8_030_261_248
    assert load_model("config.json", base_dir=tmp_path).num_layers == 32
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert load_model(str(tmp_path)).quantization.weights == "fp4"
    with pytest.raises(InputError, match="command line only"):
        load_model(str(tmp_path), allow_paths=False)


def test_a_config_stands_for_itself(tmp_path: Path) -> None:
    # Its name may be a catalog model's: what is built is what the config says.
    spec = load_model("llama-3.1-8b", {**LLAMA, "num_hidden_layers": 40}, allow_paths=False)
    assert (spec.name, spec.num_layers) == ("llama-3.1-8b", 40)
    with pytest.raises(InputError, match=r"^config\.hidden_size: this field is required"):
        load_model("mine", {**LLAMA, "hidden_size": None})
    # As a file and its neighbour say, so does their content.
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    found = config_at("mine", tmp_path)
    assert found is not None
    assert found[0] == "mine"
    alone, by_path = load_model(*found), load_model("mine", base_dir=tmp_path)
    assert replace(alone, source="") == replace(by_path, source="")
    assert alone.quantization.weights == "fp4"
    assert config_at("llama-3.1-8b", tmp_path) is config_at("nothing", tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, r"model\.config\.hidden_size: this field is required"),
        ({"hidden_size": -1}, r"hidden_size: must be a whole number of at least 1, not -1"),
        ({"hidden_size": float("nan")}, r"hidden_size: must be a whole number"),
        ({"hidden_size": "4096"}, r"hidden_size: must be a whole number, not '4096'"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers: must be at most 1024"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads: 5 does not divide 32 attention heads"),
        ({"hidden_size": 4097}, r"32 does not divide hidden_size 4097"),
        ({"model_type": "lama"}, r"model_type: unknown architecture 'lama' \(nearest supported: llama\)"),
        ({"model_type": None}, r"model_type: this field is required"),
        ({"attention_bias": 3}, r"attention_bias: must be true or false"),
        ({"quantization_config": {"quant_method": "magic"}}, r"quant_method: unknown method 'magic'"),
        ({"quantization_config": 4}, r"quantization_config: must be a mapping"),
    ],
)
def test_wrong_configs_are_refused_with_their_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_config({**LLAMA, **change})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "fp8"}, ("fp8", "fp8", "fp8")),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", "fp8", "fp8_block")),
        ({"quant_method": "awq", "bits": 4}, ("int4", "bf16", "awq")),
        ({"quant_method": "gptq", "bits": 8}, ("int8", "bf16", "gptq")),
        ({"quant_method": "mxfp4"}, ("fp4", "bf16", "mxfp4")),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("fp4", "fp4", "nvfp4")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("int4", "bf16", "bitsandbytes")),
    ],
)
def test_quantization_configs(config: dict[str, Any], expected: tuple[str, str, str]) -> None:
    found = from_config({**LLAMA, "quantization_config": config}).quantization
    assert (found.weights, found.activations, found.method) == expected


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match="cannot be read"):
        load_model(str(tmp_path / "none.json"))
    (tmp_path / "b.json").write_bytes(b"{")
    with pytest.raises(InputError, match="not readable JSON"):
        load_model(str(tmp_path / "b.json"))
    (tmp_path / "l.json").write_bytes(b" " * 10_000_001)
    with pytest.raises(InputError, match="larger than 10 MB"):
        load_model(str(tmp_path / "l.json"))
    with pytest.raises(InputError, match=r"unknown model 'llama-3.1-71b' \(nearest: llama-3.1-70b"):
        load_model("llama-3.1-71b")


_MORE = ("text_config", "head_dim", "layer_types", "sliding_window", "num_experts_per_tok", "kv_lora_rank",
         "num_local_experts", "moe_intermediate_size", "quantization_config")  # fmt: skip
_keys = st.sampled_from([*LLAMA, *_MORE])
_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_values = st.recursive(
    _leaves | st.sampled_from(families()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(_keys, _values), st.booleans())
def test_any_config_is_read_or_refused(change: dict[str, Any], based: bool) -> None:
    config = {**LLAMA, **change} if based else change
    try:
        spec = from_config(config)
    except InputError:
        return
    assert count_parameters(spec).total > 0
