"""A plan as what serving frameworks take: Dynamo's graph of components, Ray Serve's application."""

from __future__ import annotations

import json
from typing import Any

import yaml

from hardware import InputError
from planner.exports.launch import Files, Launch, option_tables, to_yaml
from planner.exports.manifests import RESOURCES
from planner.exports.roles import Pair, handover_table

# --- Dynamo --------------------------------------------------------------------------------------


def dynamo_of_worker(launch: Launch) -> Files:
    """A frontend and replicas of one worker."""
    graph = _graph(launch.label, [_component(launch, "worker")])
    notes = [*launch.notes, "Set the image of both components to a Dynamo release with this engine version."]
    return {"graph.yaml": graph}, notes


def dynamo_of_pair(pair: Pair) -> Files:
    """A frontend, which routes, and both kinds of workers."""
    graph = _graph(pair.label, [_component(launch, launch.role) for launch in pair.launches])
    notes = [*pair.notes, "Set the image of all components to a Dynamo release with this engine version."]
    return {"graph.yaml": graph}, notes


def _graph(name: str, workers: list[dict[str, Any]]) -> str:
    graph = {
        "apiVersion": "nvidia.com/v1beta1",
        "kind": "DynamoGraphDeployment",
        "metadata": {"name": name},
        "spec": {"components": [{"name": "frontend", "type": "frontend", "replicas": 1}, *workers]},
    }
    return to_yaml([graph])


def _component(launch: Launch, kind: str) -> dict[str, Any]:
    if launch.devices > launch.devices_per_node:
        raise InputError(
            f"{launch.path}.parallelism", "workers that span nodes are not exported to Dynamo yet"
        )
    names = option_tables()["dynamo"][launch.engine]
    arguments = [names["model"], launch.model]
    for flag in launch.flags:
        name, *values = flag.words()
        arguments += [names.get("options", {}).get(name, name), *values]
    if launch.role:
        port = str(handover_table(launch.engine).get("handover_port", {}).get(launch.role, ""))
        arguments = [port if word == "{handover_port}" else word for word in arguments]
        arguments += [word.replace("{role}", launch.role) for word in names["disaggregated"]]
    if launch.config:
        arguments += [names["config"], json.dumps(launch.config)]
    container: dict[str, Any] = {
        "name": "main",
        "command": ["python3", "-m", names["module"]],
        "args": arguments,
        "resources": {"limits": {RESOURCES[launch.vendor]: launch.devices}},
    }
    environment = _environment(launch)
    if environment:
        container["env"] = [{"name": name, "value": value} for name, value in environment.items()]
    return {
        "name": kind,
        "type": kind,
        "replicas": launch.replicas,
        "podTemplate": {"spec": {"containers": [container]}},
    }


def _environment(launch: Launch) -> dict[str, str]:
    """What has to be set: frameworks find addresses and ports of the hand-over themselves."""
    return {name: value for name, value in launch.environment.items() if "{" not in value}


# --- Ray Serve -----------------------------------------------------------------------------------


def rayserve_of_worker(launch: Launch) -> Files:
    """An application of one model."""
    arguments = {"llm_configs": [_llm_config(launch)]}
    return {"serve.yaml": _application(launch.label, "build_openai_app", arguments)}, [*launch.notes]


def rayserve_of_pair(pair: Pair) -> Files:
    """An application whose decode workers have prompts computed by its prefill workers."""
    arguments = {f"{launch.role}_config": _llm_config(launch) for launch in pair.launches}
    return {"serve.yaml": _application(pair.label, "build_pd_openai_app", arguments)}, [*pair.notes]


def _application(name: str, builder: str, arguments: dict[str, Any]) -> str:
    application = {
        "applications": [
            {
                "name": name,
                "route_prefix": "/",
                "import_path": f"ray.serve.llm:{builder}",
                "args": arguments,
            }
        ]
    }
    text: str = yaml.safe_dump(application, sort_keys=False)
    return text


def _llm_config(launch: Launch) -> dict[str, Any]:
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
    config = {
        "model_loading_config": {"model_id": launch.model, "model_source": launch.model},
        "deployment_config": {"num_replicas": launch.replicas},
        "engine_kwargs": keywords,
    }
    environment = _environment(launch)
    if environment:
        config["runtime_env"] = {"env_vars": environment}
    return config
