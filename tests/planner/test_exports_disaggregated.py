"""Exports of prefill and decode workers: scripts that start, manifests that name each other, refusals."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hardware import InputError
from planner.exports import TARGETS, Artifact, export_plan
from planner.exports.launch import knows, option_table
from planner.exports.roles import Place, pair_of, places_of

ENGINES = ("vllm", "sglang", "trtllm")
ROLES = ("prefill", "decode")
H100, H200 = "h100-sxm-80gb", "h200-sxm-141gb"
TP8, CLOCK = {"parallelism": {"tensor": 8}}, {"gpu_clock_hz": 1.41e9}


def worker(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "pool": "main",
        "parallelism": {"tensor": 4, "pipeline": 1, "expert": 1, "attention_data": 1, "context": 1},
        "quantization": {"weights": "fp8", "activations": "fp8", "kv_cache": "fp8"},
        "batching": {
            "policy": "continuous", "max_num_seqs": 64, "max_num_batched_tokens": 8192,
            "chunked_prefill": True, "cuda_graphs": True,
        },
        "memory_fraction": 0.9,
        "prefix_caching": False,
        "gpu_clock_hz": None,
        "speculative": None,
        "kv_offload": None,
    }  # fmt: skip
    for key, value in changes.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    return found


def plan(
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    counts: tuple[int, int] = (2, 1),
) -> dict[str, Any]:
    return {
        "serving": "disaggregated",
        "prefill": {"replicas": counts[0], "worker": worker(**(prefill or {}))},
        "decode": {"replicas": counts[1], "worker": worker(**(decode or {}))},
    }


def request(
    engine: str, version: str | None = None, model: str = "llama-3.1-70b", devices: tuple[str, ...] = (H100,)
) -> dict[str, Any]:
    names = ("main", "other")
    return {
        "model": model,
        "engine": {"name": engine, **({"version": version} if version else {})},
        "cluster": {
            "pools": [
                {"name": name, "device": device, "devices_per_node": 8, "nodes": 4}
                for name, device in zip(names, devices, strict=False)
            ]
        },
    }


def export(asked: dict[str, Any], *parts: Any, target: str = "") -> Artifact:
    """The files of `plan(*parts)` for the request's engine, or another target."""
    return export_plan(plan(*parts), asked, target or asked["engine"]["name"])


def run(script: str, where: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    """The words that a script starts a program with, and the environment it has then."""
    stubs = "".join(
        f'{name}() {{ printf "%s\\n" "$@"; echo ===; env; }}\n'
        for name in ("vllm", "python", "python3", "trtllm-serve")
    )
    found = subprocess.run(
        ["bash", "-ec", stubs + script],
        env={"PATH": "/usr/bin:/bin", **environment},
        cwd=where,
        capture_output=True,
        text=True,
        check=True,
    )
    words, _, variables = found.stdout.partition("===\n")
    return words.splitlines(), dict(line.split("=", 1) for line in variables.splitlines() if "=" in line)


def options(words: list[str]) -> dict[str, str]:
    found = {}
    for at, word in enumerate(words):
        if word.startswith("--"):
            following = words[at + 1] if at + 1 < len(words) else ""
            found[word] = "" if following.startswith("--") else following
    return found


def documents(engine: str, asked: dict[str, Any], **changes: Any) -> dict[tuple[str, str], dict[str, Any]]:
    text = export_plan(plan(**changes), asked, "kubernetes").files["deployment.yaml"]
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


# --- scripts -------------------------------------------------------------------------------------


def test_vllm_workers_and_their_proxy(tmp_path: Path) -> None:
    artifact = export(request("vllm"), {"prefix_caching": True}, {"batching": {"max_num_seqs": 256}})
    assert list(artifact.files) == ["prefill.sh", "decode.sh", "router.sh"]
    handover = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail"}
    seen = []
    for role, replica in (("prefill", 0), ("prefill", 1), ("decode", 0)):
        words, variables = run(
            artifact.files[f"{role}.sh"], tmp_path, REPLICA=str(replica), NODE_ADDRESS="10.0.0.1"
        )
        assert words[:2] == ["serve", "meta-llama/Llama-3.1-70B"]
        given = options(words)
        assert json.loads(given.pop("--kv-transfer-config")) == handover
        assert variables["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.1"
        assert variables["UCX_NET_DEVICES"] == "all"
        seen.append(
            (given.pop("--port"), variables["VLLM_NIXL_SIDE_CHANNEL_PORT"], variables["CUDA_VISIBLE_DEVICES"])
        )
        assert given == {
            "--tensor-parallel-size": "4",
            "--quantization": "fp8",
            "--kv-cache-dtype": "fp8",
            "--gpu-memory-utilization": "0.9",
            "--max-num-seqs": "64" if role == "prefill" else "256",
            "--max-num-batched-tokens": "8192",
            "--enable-chunked-prefill": "",
            "--enable-prefix-caching" if role == "prefill" else "--no-enable-prefix-caching": "",
            "--host": "0.0.0.0",
        }
    assert seen == [
        ("8100", "5600", "0,1,2,3"), ("8101", "5601", "4,5,6,7"), ("8200", "5700", "0,1,2,3"),
    ]  # fmt: skip
    words, _ = run(artifact.files["router.sh"], tmp_path, NODES="a b")
    assert " ".join(words) == (
        "toy_proxy_server.py --host 0.0.0.0 --port 8192 --prefiller-hosts a a --prefiller-ports 8100 8101 "
        "--decoder-hosts b --decoder-ports 8200"
    )
    with pytest.raises(subprocess.CalledProcessError):
        run(artifact.files["router.sh"], tmp_path, NODES="a")
    for missing in ({"REPLICA": "0"}, {"NODE_ADDRESS": "a"}):
        with pytest.raises(subprocess.CalledProcessError):
            run(artifact.files["prefill.sh"], tmp_path, **missing)


def test_each_option_says_which_field_of_which_workers_is_behind_it() -> None:
    files = export(request("vllm")).files
    for role in ROLES:
        reasons = dict(re.findall(r"^#   (--\S+) +(.+)$", files[f"{role}.sh"], re.MULTILINE))
        assert reasons["--max-num-seqs"] == f"{role}.batching.max_num_seqs"
        assert reasons["--kv-transfer-config"] == "serving"
    text = export(request("sglang")).files["decode.sh"]
    assert re.search(r"--tp-size +decode\.parallelism\.tensor x decode\.parallelism\.attention_data", text)


def test_sglang_workers_and_their_router(tmp_path: Path) -> None:
    ranks = {"parallelism": {"tensor": 1, "attention_data": 4, "expert": 4}}
    artifact = export(request("sglang", model="deepseek-v3"), {"prefix_caching": True}, ranks, (1, 2))
    words, variables = run(artifact.files["prefill.sh"], tmp_path)
    given = options(words)
    assert given["--disaggregation-mode"] == "prefill"
    assert given["--disaggregation-transfer-backend"] == "nixl"
    assert given["--disaggregation-bootstrap-port"] == "8998"
    assert (given["--host"], given["--port"]) == ("0.0.0.0", "11000")
    assert "--disable-radix-cache" not in given
    assert variables["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    words, variables = run(artifact.files["decode.sh"], tmp_path, REPLICA="1")
    given = options(words)
    assert given["--disaggregation-mode"] == "decode"
    assert "--disaggregation-bootstrap-port" not in given
    assert given["--port"] == "21000"
    assert "--disable-radix-cache" in given
    words, _ = run(artifact.files["router.sh"], tmp_path, NODES="a b")
    assert " ".join(words) == (
        "-m sglang_router.launch_router --pd-disaggregation --host 0.0.0.0 --port 8000 "
        "--prefill http://a:11000 8998 --decode http://a:21000 --decode http://b:21000"
    )
    assert any("mooncake" in note for note in artifact.notes)
    assert any("sglang-router" in note for note in artifact.notes)


def test_sglang_workers_on_one_node_keep_their_ports_apart(tmp_path: Path) -> None:
    files = export(request("sglang"), {"parallelism": {"tensor": 1}}, {}, (4, 1)).files
    found = [options(run(files["prefill.sh"], tmp_path, REPLICA=str(n))[0]) for n in range(4)]
    assert [one["--disaggregation-bootstrap-port"] for one in found] == ["8998", "8999", "9000", "9001"]
    assert [one["--port"] for one in found] == ["11000", "11100", "11200", "11300"]


def test_trtllm_servers_and_their_orchestrator(tmp_path: Path) -> None:
    budget = {"batching": {"max_num_batched_tokens": 5000}}
    artifact = export(request("trtllm"), budget, {"prefix_caching": True})
    assert list(artifact.files) == ["prefill.sh", "decode.sh", "router.sh", "prefill.yaml", "decode.yaml"]
    settings = {role: yaml.safe_load(artifact.files[f"{role}.yaml"]) for role in ROLES}
    for one in settings.values():
        assert one["cache_transceiver_config"] == {"backend": "NIXL", "max_tokens_in_buffer": 5056}
    assert settings["prefill"]["disable_overlap_scheduler"] is True
    assert "disable_overlap_scheduler" not in settings["decode"]
    assert settings["decode"]["kv_cache_config"]["enable_block_reuse"] is True
    assert "max_tokens_in_buffer prefill.batching.max_num_batched_tokens" in artifact.files["decode.yaml"]
    assert any("raise it on both sides to the longest" in note for note in artifact.notes)
    given = options(run(artifact.files["prefill.sh"], tmp_path, REPLICA="1")[0])
    assert given["--config"] == "prefill.yaml"
    assert (given["--host"], given["--port"]) == ("0.0.0.0", "8101")
    words, _ = run(artifact.files["router.sh"], tmp_path, NODES="10.0.0.1 b")
    assert (words[0], words[-2:]) == ("disaggregated", ["-c", "router.yaml"])
    assert yaml.safe_load((tmp_path / "router.yaml").read_text()) == {
        "hostname": "0.0.0.0",
        "port": 8000,
        "backend": "pytorch",
        "context_servers": {"num_instances": 2, "urls": ["10.0.0.1:8100", "10.0.0.1:8101"]},
        "generation_servers": {"num_instances": 1, "urls": ["b:8200"]},
    }
    whole = export(request("trtllm"), {"batching": {"chunked_prefill": False}})
    assert not any("max_tokens" in note for note in whole.notes)


def test_both_kinds_share_a_node_that_has_room(tmp_path: Path) -> None:
    files = export(request("vllm"), {}, {}, (1, 1)).files
    found = [
        run(files[f"{role}.sh"], tmp_path, NODE_ADDRESS="a")[1]["CUDA_VISIBLE_DEVICES"] for role in ROLES
    ]
    assert found == ["0,1,2,3", "4,5,6,7"]
    words, _ = run(files["router.sh"], tmp_path, NODES="localhost")
    assert words.count("localhost") == 2


def test_pools_have_nodes_of_their_own(tmp_path: Path) -> None:
    asked = request("vllm", devices=(H100, H200))
    artifact = export(asked, {"pool": "other"}, {"pool": "main"})
    words, _ = run(artifact.files["router.sh"], tmp_path, NODES="p d")
    assert words[words.index("--decoder-hosts") + 1] == "d"
    notes = "\n".join(artifact.notes)
    assert f"Prefill workers: the plan is for pool 'other': run it on its {H200} only" in notes
    assert f"Decode workers: the plan is for pool 'main': run it on its {H100} only" in notes
    assert "prefill.sh 2 times, with REPLICA from 0 to 1, on node 0 (of pool 'other')" in notes
    assert "decode.sh once, on node 1 (of pool 'main')" in notes
    assert "--attention-backend" in notes
    assert "--attention-backend" not in "\n".join(export(request("vllm")).notes)


@pytest.mark.parametrize("counts", [(1, 1), (3, 1), (1, 5), (7, 2), (2, 3)])
@pytest.mark.parametrize(
    ("prefill", "decode"), [(1, 8), (8, 1), (2, 4), (4, 2), (16, 4), (2, 16), (8, 8), (3, 2)]
)
def test_no_device_is_given_twice(counts: tuple[int, int], prefill: int, decode: int) -> None:
    sizes = {"prefill": prefill, "decode": decode}
    pair = pair_of(plan(counts=counts), request("vllm"), "vllm")
    for launch in pair.launches:
        launch.devices = sizes[launch.role]
    places = places_of(pair)
    taken: list[tuple[int, int]] = []
    for role, size in sizes.items():
        slots: dict[int, list[int]] = {}
        for place in places[role]:
            assert place.device + min(size, 8) <= 8
            taken += [(place.node + at // 8, (place.device + at) % 8) for at in range(size)]
            slots.setdefault(place.node, []).append(place.slot)
        assert all(found == list(range(len(found))) for found in slots.values())
        assert len(places[role]) == counts[0 if role == "prefill" else 1]
    assert len(taken) == len(set(taken))
    # Degrees of two fill every node but the last.
    if 3 not in sizes.values():
        assert {node for node, _ in taken} == set(range(-(-len(taken) // 8)))


def test_places_of_a_worker_over_nodes_come_in_a_row() -> None:
    pair = pair_of(
        plan({"parallelism": {"tensor": 2}}, {"parallelism": {"tensor": 16}}, (1, 2)), request("vllm"), "vllm"
    )
    assert places_of(pair) == {"prefill": [Place(4, 0, 0)], "decode": [Place(0, 0, 0), Place(2, 0, 0)]}


def test_a_clock_and_its_devices() -> None:
    notes = export(request("vllm"), CLOCK).notes
    assert any(note.startswith("Prefill workers: the plan locks core clocks.") for note in notes)
    assert any("--id" in note for note in notes)
    same = export(request("vllm"), CLOCK, CLOCK).notes
    assert any(note.startswith("The plan locks core clocks.") for note in same)
    assert not any("--id" in note for note in same)


def test_amd_devices_are_given_by_their_own_variable(tmp_path: Path) -> None:
    files = export(request("vllm", devices=("mi300x-192gb",))).files
    _, variables = run(files["prefill.sh"], tmp_path, REPLICA="1", NODE_ADDRESS="a")
    assert variables["HIP_VISIBLE_DEVICES"] == "4,5,6,7"
    assert "CUDA_VISIBLE_DEVICES" not in variables


# --- workers over several nodes ------------------------------------------------------------------


def test_a_vllm_worker_over_nodes_has_one_id_for_all_of_them(tmp_path: Path) -> None:
    wide = {"parallelism": {"tensor": 16}}
    asked = request("vllm", model="deepseek-v3")
    artifact = export(asked, wide, TP8)
    given = {"REPLICA": "1", "NODE_ADDRESS": "n", "NODE_RANK": "1", "HEAD_ADDRESS": "h"}
    words, variables = run(artifact.files["prefill.sh"], tmp_path, **given)
    found = options(words)
    assert json.loads(found["--kv-transfer-config"])["engine_id"] == "h"
    assert (found["--nnodes"], found["--node-rank"], found["--master-addr"]) == ("2", "1", "h")
    assert words[-1] == "--headless"
    assert variables["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "n"
    assert "CUDA_VISIBLE_DEVICES" not in variables
    words, _ = run(artifact.files["router.sh"], tmp_path, NODES="a b c d e")
    assert " ".join(words[5:11]) == "--prefiller-hosts a c --prefiller-ports 8100 8100"
    assert words[words.index("--decoder-hosts") + 1] == "e"
    assert any("One prefill worker takes 2 nodes" in note for note in artifact.notes)

    found_documents = documents("vllm", asked, prefill=wide, decode=TP8)
    group = found_documents["LeaderWorkerSet", "deepseek-v3-prefill"]["spec"]
    assert (group["replicas"], group["leaderWorkerTemplate"]["size"]) == (2, 2)
    # It makes the service of its own name.
    assert ("Service", "deepseek-v3-prefill") not in found_documents
    for kind in ("leaderTemplate", "workerTemplate"):
        container = group["leaderWorkerTemplate"][kind]["spec"]["containers"][0]
        script = container["args"][1].replace("exec ", "")
        words, _ = run(script, tmp_path, LWS_WORKER_INDEX="0", LWS_LEADER_ADDRESS="x-0.x")
        assert json.loads(options(words)["--kv-transfer-config"])["engine_id"] == "x-0.x"
        assert container["env"][1]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"


def test_an_sglang_worker_over_nodes(tmp_path: Path) -> None:
    wide = {"parallelism": {"tensor": 8, "pipeline": 2}}
    files = export(request("sglang"), wide, wide, (1, 1)).files
    words, _ = run(files["decode.sh"], tmp_path, NODE_RANK="1", HEAD_ADDRESS="h")
    assert " ".join(words).endswith("--nnodes 2 --node-rank 1 --dist-init-addr h:20000")


# --- manifests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_kubernetes(engine: str) -> None:
    found = documents(engine, request(engine), decode=TP8, counts=(2, 3))
    name, port = "llama-3-1-70b", option_table(engine)["port"]
    hosts = {}
    for role, replicas, devices in (("prefill", 2, 4), ("decode", 3, 8)):
        spec = found["StatefulSet", f"{name}-{role}"]["spec"]
        service = found["Service", f"{name}-{role}"]["spec"]
        assert spec["replicas"] == replicas
        assert spec["serviceName"] == f"{name}-{role}"
        assert service["clusterIP"] == "None"
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"] == service["selector"] == labels
        assert labels["app.kubernetes.io/component"] == role
        container = spec["template"]["spec"]["containers"][0]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": devices}
        assert container["args"][-4:] == ["--host", "0.0.0.0", "--port", str(port)]
        assert not any("{" in word and not word.startswith("{") for word in container["args"])
        notes = spec["template"]["metadata"]["annotations"]
        assert all(source.startswith((f"{role}.", "serving")) for source in notes.values())
        assert all(re.fullmatch(r"planfront/[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", key) for key in notes)
        hosts[role] = [f"{name}-{role}-{at}.{name}-{role}" for at in range(replicas)]
    # The router alone is behind the service that is asked.
    router = found["Deployment", f"{name}-router"]["spec"]
    service = found["Service", name]["spec"]
    assert (
        service["selector"] == router["template"]["metadata"]["labels"] == router["selector"]["matchLabels"]
    )
    assert service["selector"]["app.kubernetes.io/component"] == "router"
    container = router["template"]["spec"]["containers"][0]
    assert "resources" not in container
    words = [*container["command"], *container["args"]]
    if engine == "vllm":
        assert words[:2] == ["python3", "/etc/planfront/toy_proxy_server.py"]
        at = words.index("--prefiller-hosts")
        assert words[at:] == [
            "--prefiller-hosts", *hosts["prefill"], "--prefiller-ports", "8000", "8000",
            "--decoder-hosts", *hosts["decode"], "--decoder-ports", "8000", "8000", "8000",
        ]  # fmt: skip
        assert router["template"]["spec"]["volumes"][0]["configMap"]["name"] == f"{name}-proxy"
        pod = found["StatefulSet", f"{name}-decode"]["spec"]["template"]["spec"]
        variables = {one["name"]: one for one in pod["containers"][0]["env"]}
        address = variables["VLLM_NIXL_SIDE_CHANNEL_HOST"]["valueFrom"]
        assert address == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert variables["VLLM_NIXL_SIDE_CHANNEL_PORT"]["value"].isdecimal()
    elif engine == "sglang":
        urls = [word for word in words if word.startswith("http://")]
        assert urls == [f"http://{host}:30000" for role in ROLES for host in hosts[role]]
        assert words[words.index(urls[0]) + 1] == "8998"
    else:
        settings = yaml.safe_load(found["ConfigMap", f"{name}-router"]["data"]["router.yaml"])
        assert settings["context_servers"]["urls"] == [f"{host}:8000" for host in hosts["prefill"]]
        assert settings["generation_servers"]["num_instances"] == 3
        for role in ROLES:
            text = found["ConfigMap", f"{name}-{role}"]["data"][f"{role}.yaml"]
            assert yaml.safe_load(text)["cache_transceiver_config"]["backend"] == "NIXL"
            pod = found["StatefulSet", f"{name}-{role}"]["spec"]["template"]["spec"]
            given = options(pod["containers"][0]["args"])
            assert given["--config"] == f"/etc/planfront/{role}.yaml"
            assert {"name": "config", "configMap": {"name": f"{name}-{role}"}} in pod["volumes"]


def test_kubernetes_names_fit_whatever_the_model_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner import models

    found = models.load_model("llama-3.1-70b")
    monkeypatch.setattr(models, "load_model", lambda *_: found)
    for kind, name in documents("sglang", request("sglang", model="someone/" + "long-" * 20)):
        # A stateful set's pods are labelled with its name and eleven characters more.
        assert len(name) <= 52, (kind, name)
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


@pytest.mark.parametrize("engine", ENGINES)
def test_dynamo(engine: str) -> None:
    text = export(request(engine), {}, TP8, target="dynamo").files["graph.yaml"]
    frontend, *workers = yaml.safe_load(text)["spec"]["components"]
    assert frontend["type"] == "frontend"
    assert [(one["name"], one["type"], one["replicas"]) for one in workers] == [
        ("prefill", "prefill", 2), ("decode", "decode", 1),
    ]  # fmt: skip
    for role, one in zip(ROLES, workers, strict=True):
        container = one["podTemplate"]["spec"]["containers"][0]
        assert container["command"] == ["python3", "-m", f"dynamo.{engine}"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 4 if role == "prefill" else 8}
        given = options(container["args"])
        assert container["args"].count("--disaggregation-mode") == 1
        assert given["--disaggregation-mode"] == role
        if engine == "vllm":
            assert json.loads(given["--kv-transfer-config"])["kv_connector"] == "NixlConnector"
            assert all("SIDE_CHANNEL" not in variable["name"] for variable in container["env"])
        elif engine == "sglang":
            assert given["--disaggregation-transfer-backend"] == "nixl"
            assert given["--host"] == "0.0.0.0"
            assert given.get("--disaggregation-bootstrap-port") == ("8998" if role == "prefill" else None)
        else:
            settings = json.loads(given["--override-engine-args"])
            assert settings["cache_transceiver_config"]["max_tokens_in_buffer"] == 8192
            assert settings.get("disable_overlap_scheduler") == (True if role == "prefill" else None)


def test_rayserve() -> None:
    text = export(request("vllm"), {}, TP8, target="rayserve").files["serve.yaml"]
    (application,) = yaml.safe_load(text)["applications"]
    assert application["import_path"] == "ray.serve.llm:build_pd_openai_app"
    assert set(application["args"]) == {"prefill_config", "decode_config"}
    for role, replicas, tensor in (("prefill", 2, 4), ("decode", 1, 8)):
        config = application["args"][f"{role}_config"]
        assert config["model_loading_config"]["model_id"] == "meta-llama/Llama-3.1-70B"
        assert config["deployment_config"] == {"num_replicas": replicas}
        assert config["engine_kwargs"]["tensor_parallel_size"] == tensor
        assert config["engine_kwargs"]["kv_transfer_config"]["kv_role"] == "kv_both"
        assert config["engine_kwargs"]["enable_prefix_caching"] is False
    # Ray finds an id for each worker itself.
    wide = {"parallelism": {"tensor": 16}}
    assert "engine_id" not in export(request("vllm"), wide, wide, target="rayserve").files["serve.yaml"]


@pytest.mark.parametrize("target", ["vllm", "kubernetes", "dynamo", "rayserve"])
def test_states_of_recurrent_layers_are_laid_out_for_the_hand_over(target: str) -> None:
    hybrid = export(request("vllm", model="qwen3.5-397b-a17b"), target=target).text()
    assert re.search(r"VLLM_SSM_CONV_STATE_LAYOUT(=|: |\n +value: )DS", hybrid)
    assert "VLLM_SSM" not in export(request("vllm"), target=target).text()


# --- versions and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "version"),
    [
        ("vllm", "0.22.0"), ("vllm", "0.28"), ("vllm", "0.33.0"), ("sglang", "0.5.12"), ("sglang", "0.5.23"),
        ("trtllm", "1.2.0"), ("trtllm", "1.3.0rc20"),
    ],
)  # fmt: skip
def test_every_option_is_one_that_the_version_knows(engine: str, version: str, tmp_path: Path) -> None:
    table = option_table(engine)
    known = {"--host", "--port", "--model-path", "--dtype"}
    for rows in (table["options"], table.get("config", ()), table["disaggregated"].get("options", ())):
        for row in rows:
            if knows(row, version):
                known |= {row[key].partition("=")[0] for key in ("flag", "on", "off") if key in row}
    bare = {"batching": {"cuda_graphs": False, "chunked_prefill": False}}
    ranks = {
        "parallelism": {"tensor": 1, "attention_data": 8, "expert": 8},
        "prefix_caching": engine != "sglang",
    }
    files = export(request(engine, version, "deepseek-v3"), bare, ranks).files
    for role in ROLES:
        words, _ = run(files[f"{role}.sh"], tmp_path, REPLICA="0", NODE_ADDRESS="a")
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize(
    ("engine", "version"), [("vllm", "0.21.0"), ("sglang", "0.5.11"), ("trtllm", "1.1.0")]
)
@pytest.mark.parametrize("target", TARGETS)
def test_versions_before_a_known_hand_over_are_refused(engine: str, version: str, target: str) -> None:
    if target in ENGINES and target != engine:
        return
    with pytest.raises(
        InputError, match=r"^engine\.version: how .* serves a disaggregated plan is not known"
    ):
        export(request(engine, version), target=target)


@pytest.mark.parametrize(
    ("prefill", "decode", "asked", "message"),
    [
        ({}, {"quantization": {"kv_cache": "bf16"}}, request("vllm"),
         r"^plan\.decode\.worker\.quantization\.kv_cache: .* not prefill .* in fp8 and decode .* in bf16"),
        ({"quantization": {"weights": "bf16"}}, {"quantization": {"weights": "fp16"}}, request("vllm"),
         r"^plan\.decode\.worker\.quantization\.weights: .* from bfloat16 to float16"),
        ({}, TP8, request("vllm", model="qwen3.5-397b-a17b"),
         r"^plan\.decode\.worker\.parallelism\.tensor: vLLM hands the state of .* from 4 to 8"),
        ({"parallelism": {"tensor": 2}}, {"parallelism": {"tensor": 3}}, request("vllm"),
         r"^plan\.decode\.worker\.parallelism\.tensor: .* from 2 to 3"),
        ({"parallelism": {"tensor": 2, "pipeline": 2}}, {}, request("vllm"),
         r"^plan\.prefill\.worker\.parallelism\.pipeline: vLLM's NixlConnector"),
        ({}, {"parallelism": {"pipeline": 2}}, request("vllm"),
         r"^plan\.decode\.worker\.parallelism\.pipeline: vLLM's NixlConnector"),
        ({}, {"parallelism": {"pipeline": 2}}, request("sglang"),
         r"^plan\.decode\.worker\.parallelism\.pipeline: SGLang's decode workers have one stage"),
        ({}, TP8, request("sglang", model="gpt-oss-120b"),
         r"^plan\.decode\.worker\.parallelism\.tensor: SGLang hands the cache of layers with windows"),
        ({}, {"prefix_caching": True}, request("sglang"),
         r"^plan\.decode\.worker\.prefix_caching: SGLang's decode workers keep no prefixes"),
        ({"quantization": {"kv_cache": "fp4"}}, {"quantization": {"kv_cache": "fp4"}}, request("sglang"),
         r"^plan\.prefill\.worker\.quantization\.kv_cache: SGLang hands no cache in fp4 over"),
        ({}, {}, request("trtllm", model="qwen3.5-397b-a17b"), r"^plan\.serving: .* alike in all layers"),
        ({}, {"pool": "other"}, request("vllm", devices=(H100, "mi300x-192gb")),
         r"^plan\.decode\.worker\.pool: vllm is not known to hand caches over from h100.* to mi300x"),
        ({}, {}, request("vllm", devices=("tpu-v6e",)),
         r"^plan\.prefill\.worker\.pool: .* not for tpu-v6e"),
        # What aggregated plans are refused for has the path of the worker here.
        ({}, {"parallelism": {"expert": 2}}, request("vllm"),
         r"^plan\.decode\.worker\.parallelism\.expert: vLLM spreads experts"),
        ({"parallelism": {"tensor": 2, "attention_data": 4, "expert": 8}}, {}, request("trtllm"),
         r"^plan\.prefill\.worker\.parallelism\.attention_data: "),
        ({"quantization": {"kv_cache": "int4"}}, {"quantization": {"kv_cache": "int4"}}, request("vllm"),
         r"^plan\.prefill\.worker\.quantization\.kv_cache: no option"),
        ({}, {"parallelism": {"tensor": 16}}, request("trtllm"),
         r"^plan\.decode\.worker\.parallelism: .* not known"),
        ({}, {"parallelism": {"tensor": 12}}, request("vllm"),
         r"^plan\.decode\.worker\.parallelism: .* unevenly"),
    ],
)  # fmt: skip
def test_what_cannot_be_handed_over_is_refused(
    prefill: dict[str, Any], decode: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export(asked, prefill, decode)


def test_what_a_target_cannot_express_is_refused() -> None:
    wide = {"parallelism": {"tensor": 16}}
    with pytest.raises(InputError, match=r"^plan\.decode\.worker\.parallelism: workers that span nodes"):
        export(request("vllm"), {}, wide, target="dynamo")
    with pytest.raises(InputError, match=r"^--target: Ray Serve runs vLLM"):
        export(request("sglang"), target="rayserve")
    with pytest.raises(InputError, match=r"^plan\.serving: must be aggregated or disaggregated, not 'both'"):
        export_plan({**plan(), "serving": "both"}, request("vllm"), "vllm")


def test_sglang_takes_pipelines_that_match_and_states_that_do_not() -> None:
    stages = {"parallelism": {"tensor": 2, "pipeline": 2}}
    for decode in (stages, {}):
        assert export(request("sglang"), stages, decode).files
    assert export(request("sglang", model="qwen3.5-397b-a17b"), {}, TP8).files


@pytest.mark.parametrize("engine", ENGINES)
def test_text_holds_every_file(engine: str) -> None:
    artifact = export(request(engine))
    text = artifact.text()
    assert all(f"# --- {name}\n" in text for name in artifact.files)
    assert all(f"# {note}\n" in text for note in artifact.notes)
