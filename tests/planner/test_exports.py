"""Exports: options by engine and version, manifests that parse, refusals by path."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml

from hardware import InputError
from planner.exports import TARGETS, export_plan, export_result


def plan(**changes: Any) -> dict[str, Any]:
    worker = {
        "pool": "main",
        "parallelism": {"tensor": 4, "pipeline": 1, "expert": 1, "attention_data": 1, "context": 1},
        "quantization": {"weights": "fp8", "activations": "fp8", "kv_cache": "fp8"},
        "batching": {
            "policy": "continuous", "max_num_seqs": 64, "max_num_batched_tokens": 8192,
            "chunked_prefill": True, "cuda_graphs": True,
        },
        "memory_fraction": 0.9,
        "prefix_caching": False,
        "speculative": None,
        "kv_offload": None,
    }  # fmt: skip
    for key, value in changes.items():
        worker[key] = {**worker[key], **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    return {"serving": "aggregated", "replicas": 2, "worker": worker}


def request(engine: str, version: str | None = None, model: str = "llama-3.1-70b") -> dict[str, Any]:
    return {
        "model": model,
        "engine": {"name": engine, **({"version": version} if version else {})},
        "cluster": {"pools": [{"name": "main", "device": "h100-sxm-80gb", "devices_per_node": 8}]},
    }


def words(text: str) -> list[str]:
    """The command's words, comments left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return shlex.split(" ".join(line.rstrip("\\") for line in lines))


def options(text: str) -> dict[str, str]:
    found, given = {}, words(text)
    for at, word in enumerate(given):
        if word.startswith("--"):
            following = given[at + 1] if at + 1 < len(given) else ""
            found[word] = "" if following.startswith("--") else following
    return found


def test_vllm() -> None:
    artifact = export_plan(plan(), request("vllm"), "vllm")
    text = artifact.files["run.sh"]
    assert words(text)[:3] == ["vllm", "serve", "meta-llama/Llama-3.1-70B"]
    assert options(text) == {
        "--tensor-parallel-size": "4",
        "--quantization": "fp8",
        "--kv-cache-dtype": "fp8",
        "--gpu-memory-utilization": "0.9",
        "--max-num-seqs": "64",
        "--max-num-batched-tokens": "8192",
        "--enable-chunked-prefill": "",
        "--no-enable-prefix-caching": "",
    }
    assert "#   --max-num-seqs" in text
    assert any("Start 2 of these" in note for note in artifact.notes)


def test_sglang_counts_all_devices_of_a_stage_and_renamed_an_option() -> None:
    mixture = plan(parallelism={"tensor": 2, "attention_data": 4, "expert": 8}, batching={"max_num_seqs": 32})
    old = options(export_plan(mixture, request("sglang", "0.5.14", "deepseek-v3"), "sglang").files["run.sh"])
    assert old["--tp-size"] == "8"
    assert old["--dp-size"] == "4"
    assert "--enable-dp-attention" in old
    assert old["--max-running-requests"] == "128"
    assert old["--kv-cache-dtype"] == "fp8_e4m3"
    new = options(export_plan(mixture, request("sglang", "0.5.23", "deepseek-v3"), "sglang").files["run.sh"])
    assert new["--attn-dp-size"] == "4"
    assert "--enable-dp-attention" not in new
    # DeepSeek's own checkpoint is fp8: nothing has to be quantized.
    assert "--quantization" not in new


def test_trtllm_keeps_its_cache_settings_in_yaml() -> None:
    artifact = export_plan(plan(prefix_caching=True), request("trtllm"), "trtllm")
    config = yaml.safe_load(artifact.files["config.yaml"])
    assert config["kv_cache_config"] == {
        "free_gpu_memory_fraction": 0.9,
        "enable_block_reuse": True,
        "dtype": "fp8",
    }
    assert config["enable_chunked_prefill"] is True
    assert options(artifact.files["run.sh"])["--config"] == "config.yaml"


def test_without_graphs_and_chunks() -> None:
    bare = plan(batching={"cuda_graphs": False, "chunked_prefill": False}, prefix_caching=True)
    found = options(export_plan(bare, request("vllm"), "vllm").files["run.sh"])
    assert {"--enforce-eager", "--no-enable-chunked-prefill", "--enable-prefix-caching"} <= set(found)
    found = options(export_plan(bare, request("sglang"), "sglang").files["run.sh"])
    assert found["--chunked-prefill-size"] == "-1"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_kubernetes(engine: str) -> None:
    artifact = export_plan(plan(), request(engine), "kubernetes")
    documents = list(yaml.safe_load_all(artifact.files["deployment.yaml"]))
    kinds = {document["kind"]: document for document in documents}
    assert {"Deployment", "Service"} <= set(kinds)
    deployment = kinds["Deployment"]["spec"]
    assert deployment["replicas"] == 2
    container = deployment["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert kinds["Service"]["spec"]["selector"] == deployment["selector"]["matchLabels"]
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "hugging-face"
    if engine == "trtllm":
        assert "ConfigMap" in kinds


def test_rayserve_and_dynamo_parse() -> None:
    serve = yaml.safe_load(export_plan(plan(), request("vllm"), "rayserve").files["serve.yaml"])
    keywords = serve["applications"][0]["args"]["llm_configs"][0]["engine_kwargs"]
    assert keywords["tensor_parallel_size"] == 4
    assert keywords["enable_prefix_caching"] is False
    graph = yaml.safe_load(export_plan(plan(), request("sglang"), "dynamo").files["graph.yaml"])
    worker = graph["spec"]["components"][1]
    assert worker["replicas"] == 2
    assert worker["podTemplate"]["spec"]["containers"][0]["args"][:2] == [
        "--model-path",
        "meta-llama/Llama-3.1-70B",
    ]


@pytest.mark.parametrize(
    ("change", "engine", "target", "message"),
    [
        ({}, "vllm", "podman", r"^--target: must be one of"),
        ({}, "vllm", "sglang", r"^--target: the plan was made for vllm"),
        ({}, "sglang", "rayserve", r"^--target: Ray Serve runs vLLM"),
        ({"parallelism": {"expert": 2}}, "vllm", "vllm", r"^plan\.worker\.parallelism\.expert: "),
        ({"parallelism": {"tensor": 8, "pipeline": 2}}, "vllm", "vllm", r"^plan\.worker\.parallelism: "),
    ],
)
def test_what_a_target_cannot_express_is_refused(
    change: dict[str, Any], engine: str, target: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_plan(plan(**change), request(engine), target)


def test_an_unknown_engine_version_is_never_guessed() -> None:
    with pytest.raises(InputError, match=r"^engine\.version: option names of vllm 0\.99"):
        export_plan(plan(), request("vllm", "0.99.0"), "vllm")


def test_a_plan_of_a_result_is_found_by_id() -> None:
    result = {
        "request": request("vllm"),
        "front": ["abc"],
        "recommended": {"plan_id": "abc"},
        "plans": [{"id": "abc", "plan": plan()}],
    }
    assert export_result(result, "recommended", "vllm").files == export_result(result, "abc", "vllm").files
    with pytest.raises(InputError, match=r"^--plan: the result has no plan 'xyz'"):
        export_result(result, "xyz", "vllm")
    assert set(TARGETS) >= {"vllm", "sglang", "trtllm", "kubernetes", "dynamo", "rayserve"}


def test_text_holds_every_file() -> None:
    text = export_plan(plan(), request("trtllm"), "trtllm").text()
    assert "--- config.yaml" in text
    assert "trtllm-serve" in text


def test_a_script_as_text_starts_with_its_interpreter() -> None:
    from planner.exports.artifact import Artifact

    text = Artifact("vllm", {"run.sh": "#!/usr/bin/env bash\nvllm serve x\n"}, ("Mind this.",)).text()
    assert text == "#!/usr/bin/env bash\n# Mind this.\nvllm serve x\n"
    several = Artifact("k", {"a.sh": "#!/bin/sh\na\n", "b.yaml": "b: 1\n"}, ()).text()
    assert several.splitlines()[:2] == ["# --- a.sh", "#!/bin/sh"]
