"""Exports: options by engine and version, manifests that parse, refusals by path."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
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


def request(
    engine: str, version: str | None = None, model: str = "llama-3.1-70b", device: str = "h100-sxm-80gb"
) -> dict[str, Any]:
    return {
        "model": model,
        "engine": {"name": engine, **({"version": version} if version else {})},
        "cluster": {"pools": [{"name": "main", "device": device, "devices_per_node": 8}]},
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


@pytest.mark.parametrize("version", ["0.5.14", "0.5.23"])
def test_sglang_divides_the_chunk_among_ranks_so_it_is_given_for_all(version: str) -> None:
    mixture = plan(parallelism={"tensor": 2, "attention_data": 4, "expert": 8})
    text = export_plan(mixture, request("sglang", version, "deepseek-v3"), "sglang").files["run.sh"]
    found = options(text)
    assert found["--chunked-prefill-size"] == str(4 * 8192)
    assert found["--max-prefill-tokens"] == "8192"


@pytest.mark.parametrize(
    ("engine", "version", "image"),
    [
        ("vllm", "0.24", "vllm/vllm-openai:v0.24.0"),
        ("vllm", "v0.24", "vllm/vllm-openai:v0.24.0"),
        ("vllm", "0.8", "vllm/vllm-openai:v0.8.0"),
        ("sglang", "0.4", "lmsysorg/sglang:v0.4.0"),
        ("sglang", "0.5.9.post1", "lmsysorg/sglang:v0.5.9.post1"),
        ("trtllm", "1.3.0rc20", "nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc20"),
    ],
)
def test_versions_are_read_as_the_planner_reads_them(engine: str, version: str, image: str) -> None:
    text = export_plan(plan(), request(engine, version), "kubernetes").files["deployment.yaml"]
    deployment = next(d for d in yaml.safe_load_all(text) if d["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == image


@pytest.mark.parametrize(
    ("asked", "loaded", "note"),
    [
        ("Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B-Instruct", "quantized when"),
        ("meta-llama/llama-3.1-70b-instruct", "meta-llama/Llama-3.1-70B-Instruct", "quantized when"),
        ("someone/Llama-3.1-70B", "someone/Llama-3.1-70B", "quantized when"),
        ("nvidia/Llama-3.1-70B-Instruct-FP8", "nvidia/Llama-3.1-70B-Instruct-FP8", ""),
        # A variant's name without its organisation names no checkpoint: the catalog's is quantized.
        ("llama-3.1-70b-fp8", "meta-llama/Llama-3.1-70B", "quantized when"),
    ],
)
def test_the_checkpoint_is_the_one_asked_for(asked: str, loaded: str, note: str) -> None:
    artifact = export_plan(plan(), request("vllm", model=asked), "vllm")
    assert words(artifact.files["run.sh"])[2] == loaded
    assert ("--quantization" in options(artifact.files["run.sh"])) == bool(note)
    assert any(note in text for text in artifact.notes)


def test_another_format_than_the_checkpoints_is_told() -> None:
    wide = plan(quantization={"weights": "bf16", "activations": "bf16", "kv_cache": "bf16"})
    notes = export_plan(wide, request("vllm", model="deepseek-v3"), "vllm").notes
    assert any("name a checkpoint of deepseek-ai/DeepSeek-V3 in bf16" in note for note in notes)
    narrow = plan(quantization={"weights": "int4", "activations": "bf16", "kv_cache": "bf16"})
    notes = export_plan(narrow, request("vllm", model="llama-3.1-70b-awq"), "vllm").notes
    assert any("in int4" in note for note in notes)


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


@pytest.mark.parametrize("target", ["vllm", "kubernetes", "dynamo", "rayserve"])
def test_a_locked_clock_is_told_to_whoever_starts_it(target: str) -> None:
    text = export_plan(plan(gpu_clock_hz=1.41e9), request("vllm"), target).text()
    assert "# The plan locks core clocks." in text
    assert "nvidia-smi --lock-gpu-clocks=1410,1410 " in text
    assert "clocks" not in export_plan(plan(gpu_clock_hz=None), request("vllm"), target).text()


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


@pytest.mark.parametrize(
    ("device", "resource"),
    [("mi300x-192gb", "amd.com/gpu"), ("gaudi3-128gb", "habana.ai/gaudi"), ("tpu-v6e", "google.com/tpu")],
)
def test_kubernetes_asks_for_the_vendors_devices(device: str, resource: str) -> None:
    artifact = export_plan(plan(), request("vllm", device=device), "kubernetes")
    deployment = next(yaml.safe_load_all(artifact.files["deployment.yaml"]))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {resource: 4}
    assert any("image" in note for note in artifact.notes)


@pytest.mark.parametrize(
    "model", ["someone/70B_model", "someone/" + "long-" * 20, "someone/模型-llama-3.1-70b", "llama-3.1-70b"]
)
def test_names_and_annotations_are_what_kubernetes_takes(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner import models

    found = models.load_model("llama-3.1-70b")
    monkeypatch.setattr(models, "load_model", lambda *_: found)
    bare = plan(batching={"cuda_graphs": False})
    text = export_plan(bare, request("sglang", model=model), "kubernetes").files["deployment.yaml"]
    for document in yaml.safe_load_all(text):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
        if document["kind"] == "Deployment":
            for key in document["spec"]["template"]["metadata"]["annotations"]:
                assert re.fullmatch(r"planfront/[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", key)


def test_dynamo_starts_trtllm_by_options_of_its_own() -> None:
    mixture = plan(parallelism={"tensor": 1, "attention_data": 8, "expert": 8})
    artifact = export_plan(mixture, request("trtllm", model="deepseek-v3"), "dynamo")
    (text,) = artifact.files.values()
    container = yaml.safe_load(text)["spec"]["components"][1]["podTemplate"]["spec"]["containers"][0]
    given = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    settings = json.loads(given.pop("--override-engine-args"))
    assert given == {
        "--model": "deepseek-ai/DeepSeek-V3",
        "--tensor-parallel-size": "8",
        "--expert-parallel-size": "8",
        "--max-batch-size": "64",
        "--max-num-tokens": "8192",
    }
    assert settings["enable_attention_dp"] is True
    assert settings["kv_cache_config"]["dtype"] == "fp8"


def started(script: str, **environment: str) -> list[str]:
    """The words that a shell starts the engine with."""
    stubs = "".join(
        f'{name}() {{ printf "%s\\n" {name} "$@"; }}\nexport -f {name}\n' for name in ("vllm", "python")
    )
    found = subprocess.run(
        ["bash", "-ec", stubs + script.replace("exec ", "")],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.splitlines()


@pytest.mark.parametrize(
    ("engine", "degrees", "options"),
    [
        (
            "vllm",
            {"tensor": 8, "pipeline": 2},
            "--nnodes 2 --node-rank 1 --master-addr h --headless",
        ),
        (
            "vllm",
            {"tensor": 1, "attention_data": 16, "expert": 16},
            "--data-parallel-size-local 8 --data-parallel-start-rank 8 --data-parallel-address h "
            "--data-parallel-rpc-port 13345 --headless",
        ),
        (
            "sglang",
            {"tensor": 2, "attention_data": 8, "expert": 16},
            "--nnodes 2 --node-rank 1 --dist-init-addr h:20000",
        ),
    ],
)
def test_a_worker_on_several_nodes(engine: str, degrees: dict[str, int], options: str) -> None:
    wide, asked = plan(parallelism=degrees), request(engine, model="deepseek-v3")
    script = export_plan(wide, asked, engine).files["run.sh"]
    assert " ".join(started(script, NODE_RANK="1", HEAD_ADDRESS="h")).endswith(f" {options}")
    assert "--headless" not in started(script, NODE_RANK="0", HEAD_ADDRESS="h")
    with pytest.raises(subprocess.CalledProcessError):
        started(script)

    usual = {**asked, "cluster": {"pools": [{"device": "h100-sxm-80gb", "nodes": 2}]}}
    assert export_plan(wide, usual, engine).files["run.sh"] == script

    text = export_plan(wide, asked, "kubernetes").files["deployment.yaml"]
    group, service = yaml.safe_load_all(text)
    assert (group["kind"], group["spec"]["replicas"]) == ("LeaderWorkerSet", 2)
    # The set's own headless service, by which leaders are found, has the set's name.
    assert group["metadata"]["name"] != service["metadata"]["name"]
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    leader, follower = template["leaderTemplate"], template["workerTemplate"]
    for pod in (leader, follower):
        container = pod["spec"]["containers"][0]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        assert container["command"] == ["bash"]
        given = started(container["args"][1], LWS_WORKER_INDEX="1", LWS_LEADER_ADDRESS="h")
        assert " ".join(given).endswith(f" {options}")
    # Requests go to leaders alone.
    assert service["spec"]["selector"] == leader["metadata"]["labels"]
    assert "labels" not in follower["metadata"]
    assert "readinessProbe" not in follower["spec"]["containers"][0]


def test_an_engine_before_its_options_for_nodes_is_refused() -> None:
    wide = plan(parallelism={"tensor": 8, "pipeline": 2})
    with pytest.raises(InputError, match=r"^plan\.worker\.parallelism: .* how vllm 0\.10\.0 is started on"):
        export_plan(wide, request("vllm", "0.10.0"), "vllm")


def test_of_several_pools_the_plan_s_own_is_noted() -> None:
    asked = request("vllm")
    assert not any("pool" in note for note in export_plan(plan(), asked, "kubernetes").notes)
    other = {"name": "other", "device": "l40s", "nodes": 1, "devices_per_node": 8}
    asked["cluster"] = {"pools": [other, *asked["cluster"]["pools"]]}
    notes = export_plan(plan(), asked, "kubernetes").notes
    assert any(
        re.match(r"The plan is for pool 'main': run it on its h100-sxm-80gb only", one) for one in notes
    )


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
        (
            {"parallelism": {"tensor": 2, "attention_data": 4, "expert": 8}},
            "trtllm",
            "trtllm",
            r"^plan\.worker\.parallelism\.attention_data: .* all 8 devices of a stage, not 4 groups of 2",
        ),
        ({"parallelism": {"pipeline": 3}}, "vllm", "kubernetes", r"^plan\.worker\.parallelism: .* unevenly"),
        ({"parallelism": {"pipeline": 4}}, "trtllm", "trtllm", r"^plan\.worker\.parallelism: .* not known"),
        ({"parallelism": {"pipeline": 4}}, "vllm", "dynamo", r"^plan\.worker\.parallelism: "),
        *(
            (
                {"quantization": {"kv_cache": "int4"}},
                engine,
                engine,
                r"^plan\.worker\.quantization\.kv_cache: no",
            )
            for engine in ("vllm", "sglang", "trtllm")
        ),
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
    # Its settings had other names then.
    with pytest.raises(InputError, match=r"^engine\.version: option names of trtllm 0\.20"):
        export_plan(plan(), request("trtllm", "0.20.0"), "trtllm")


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
