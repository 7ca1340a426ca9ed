"""From a plan to files: the engine's command line, or a manifest around it.

What a target cannot express is refused with the field's path, never guessed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from hardware import InputError
from planner.exports.launch import (
    Launch,
    image_of,
    launch_of,
    node_options,
    option_table,
    option_tables,
    to_yaml,
)

ENGINE_TARGETS = ("vllm", "sglang", "trtllm")
TARGETS = (*ENGINE_TARGETS, "kubernetes", "dynamo", "rayserve")
#: What Kubernetes calls the devices of a vendor.
_RESOURCES = {
    "nvidia": "nvidia.com/gpu",
    "amd": "amd.com/gpu",
    "intel": "habana.ai/gaudi",
    "google": "google.com/tpu",
}


@dataclass(frozen=True, slots=True)
class Artifact:
    """Files by name, the first the main one; `notes` are what the reader has to know or do."""

    target: str
    files: dict[str, str]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """All files in one text, notes first as comments (after the line that names the interpreter)."""
        parts = [f"# {note}" for note in self.notes]
        for name, content in self.files.items():
            if len(self.files) > 1:
                parts.append(f"# --- {name}")
            elif content.startswith("#!"):
                first, content = content.split("\n", 1)
                parts.insert(0, first)
            parts.append(content.rstrip())
        return "\n".join(parts) + "\n"


def export_result(result: Mapping[str, Any], plan_id: str, target: str) -> Artifact:
    """The files of one plan of a result (plain values, as `--json` writes them).

    Raises InputError for an unknown target or plan, and for what the target cannot express.
    """
    entries = {entry["id"]: entry for entry in result.get("plans", ())}
    if plan_id == "recommended":
        plan_id = (result.get("recommended") or {}).get("plan_id", "")
    if plan_id not in entries:
        known = ", ".join([*result.get("front", ())][:8])
        raise InputError("--plan", f"the result has no plan {plan_id!r}; plans on its front are {known}")
    return export_plan(entries[plan_id]["plan"], result["request"], target)


def export_plan(plan: Mapping[str, Any], request: Mapping[str, Any], target: str) -> Artifact:
    """The files of a plan of a request. Raises InputError as `export_result` does."""
    if target not in TARGETS:
        raise InputError("--target", f"must be one of {', '.join(TARGETS)}, not {target!r}")
    if plan.get("serving") != "aggregated":
        raise InputError("plan.serving", "only aggregated plans are exported in this version")
    engine = request.get("engine", {}).get("name", "vllm")
    if target in ENGINE_TARGETS and target != engine:
        raise InputError(
            "--target", f"the plan was made for {engine}; plan again for {target} to export to it"
        )
    launch = launch_of(plan, request, engine)
    if target in ENGINE_TARGETS:
        return _command(launch, target)
    if target == "kubernetes":
        return _kubernetes(launch)
    if target == "dynamo":
        return _dynamo(launch)
    return _rayserve(launch)


# --- targets -------------------------------------------------------------------------------------


def _command(launch: Launch, target: str) -> Artifact:
    notes = [*launch.notes]
    if launch.replicas > 1:
        notes.append(f"Start {launch.replicas} of these and balance requests over them.")
    lines = [" ".join(map(shlex.quote, [*option_table(launch.engine)["command"], launch.model]))]
    # A comment inside a continued command would end it, so the reasons stand above.
    reasons = [f"#   {flag.name:<30} {flag.source}" for flag in launch.flags]
    lines += [f"  {flag.name}{' ' + shlex.quote(flag.value) if flag.value else ''}" for flag in launch.flags]
    if launch.config:
        lines.append(f"  {launch.config_flag} config.yaml")
    text = f"# {launch.engine} {launch.version}; each option and the field of the plan behind it:\n"
    text += "\n".join(reasons) + "\n"
    spread = node_options(launch, "NODE_RANK", "HEAD_ADDRESS")
    if spread:
        last = launch.nodes - 1
        notes.append(
            f"One worker takes {launch.nodes} nodes: start this on each, with NODE_RANK from 0 to {last} and "
            "HEAD_ADDRESS, the address of node 0."
        )
        text += f': "${{NODE_RANK:?from 0 to {last}}}" "${{HEAD_ADDRESS:?the address of node 0}}"\n'
        lines += [f"  {words}" for words in spread]
    text += " \\\n".join(lines) + "\n"
    files = {"run.sh": "#!/usr/bin/env bash\n" + text}
    if launch.config:
        files["config.yaml"] = launch.config_text()
    return Artifact(target, files, tuple(notes))


def _kubernetes(launch: Launch) -> Artifact:
    table = option_table(launch.engine)
    name = _name(launch)
    labels = {"app.kubernetes.io/name": name}
    arguments = launch.arguments
    if launch.config:
        arguments = [("/etc/planfront/config.yaml" if word == "config.yaml" else word) for word in arguments]
    arguments = [*arguments, "--host", "0.0.0.0", "--port", str(table["port"])]
    spread = node_options(launch, "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS")
    if spread:
        arguments = ["bash", "-c", " ".join(["exec", shlex.join(arguments), *spread])]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}}]
    documents: list[dict[str, Any]] = []
    if launch.config:
        documents.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": name},
                "data": {"config.yaml": launch.config_text()},
            }
        )
        mounts.append({"name": "config", "mountPath": "/etc/planfront"})
        volumes.append({"name": "config", "configMap": {"name": name}})
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10}
    container = {
        "name": "engine",
        "image": image_of(table, launch.version),
        "command": arguments[:1],
        "args": arguments[1:],
        "ports": [{"name": "http", "containerPort": table["port"]}],
        "env": [
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token", "optional": True}},
            }
        ],
        "resources": {"limits": {_RESOURCES[launch.vendor]: launch.devices // launch.nodes}},
        "startupProbe": {**probe, "failureThreshold": 180},
        "readinessProbe": probe,
        "volumeMounts": mounts,
    }
    annotations = {f"planfront/{f.name.lstrip('-').partition('=')[0]}": f.source for f in launch.flags}
    pod = {
        "metadata": {"labels": labels, "annotations": annotations},
        "spec": {"containers": [container], "volumes": volumes},
    }
    workload: dict[str, Any] = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {"replicas": launch.replicas, "selector": {"matchLabels": labels}, "template": pod},
    }
    if spread:
        # Requests go to the leaders alone, and nobody else answers a probe.
        probed = ("ports", "startupProbe", "readinessProbe")
        follower = {key: value for key, value in container.items() if key not in probed}
        group = {
            "size": launch.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": pod,
            "workerTemplate": {
                "metadata": {"annotations": annotations},
                "spec": {"containers": [follower], "volumes": volumes},
            },
        }
        workload = {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {"name": name, "labels": labels},
            "spec": {"replicas": launch.replicas, "leaderWorkerTemplate": group},
        }
    documents += [
        workload,
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    ]
    text = to_yaml(documents)
    notes = [*launch.notes, "A gated model needs the secret `hugging-face` with the key `token`."]
    if spread:
        notes.append(
            "Workers on several nodes need LeaderWorkerSet, and the network of your cluster in the pods."
        )
    if launch.vendor != "nvidia":
        notes.append(f"The image is built for NVIDIA devices: name one of {launch.engine} for this device.")
    return Artifact("kubernetes", {"deployment.yaml": text}, tuple(notes))


def _dynamo(launch: Launch) -> Artifact:
    if launch.devices > launch.devices_per_node:
        raise InputError("plan.worker.parallelism", "workers that span nodes are not exported to Dynamo yet")
    names = option_tables()["dynamo"][launch.engine]
    arguments = [names["model"], launch.model]
    for flag in launch.flags:
        name = names.get("options", {}).get(flag.name, flag.name)
        arguments += [name, flag.value] if flag.value else [name]
    if launch.config:
        arguments += [names["config"], json.dumps(launch.config)]
    graph = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": _name(launch)},
        "spec": {
            "components": [
                {"name": "frontend", "type": "frontend", "replicas": 1},
                {
                    "name": "worker",
                    "type": "worker",
                    "replicas": launch.replicas,
                    "podTemplate": {
                        "spec": {
                            "containers": [
                                {
                                    "name": "main",
                                    "command": ["python3", "-m", names["module"]],
                                    "args": arguments,
                                    "resources": {"limits": {_RESOURCES[launch.vendor]: launch.devices}},
                                }
                            ]
                        }
                    },
                },
            ]
        },
    }
    notes = (*launch.notes, "Set the image of both components to a Dynamo release with this engine version.")
    return Artifact("dynamo", {"graph.yaml": to_yaml([graph])}, notes)


def _rayserve(launch: Launch) -> Artifact:
    if launch.engine != "vllm":
        raise InputError("--target", f"Ray Serve runs vLLM, the plan was made for {launch.engine}")
    keywords: dict[str, Any] = {}
    for flag in launch.flags:
        name = flag.name.lstrip("-").replace("-", "_")
        if flag.value:
            keywords[name] = yaml.safe_load(flag.value)
        elif name.startswith("no_"):
            keywords[name.removeprefix("no_")] = False
        else:
            keywords[name] = True
    application = {
        "applications": [
            {
                "name": _name(launch),
                "route_prefix": "/",
                "import_path": "ray.serve.llm:build_openai_app",
                "args": {
                    "llm_configs": [
                        {
                            "model_loading_config": {"model_id": launch.model, "model_source": launch.model},
                            "deployment_config": {"num_replicas": launch.replicas},
                            "engine_kwargs": keywords,
                        }
                    ]
                },
            }
        ]
    }
    return Artifact(
        "rayserve", {"serve.yaml": yaml.safe_dump(application, sort_keys=False)}, tuple(launch.notes)
    )


def _name(launch: Launch) -> str:
    """A DNS label, as Kubernetes wants: from a letter to a letter or digit."""
    text = launch.model.rstrip("/").split("/")[-1].lower()
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-")
    if not label[:1].isalpha():
        label = f"model-{label}"
    return label[:50].rstrip("-")
