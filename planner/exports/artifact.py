"""From a plan to files: the engine's command line, or a manifest around it.

Option names are data (`options.toml`) with the versions that know them; every flag says which field of the
plan it stands for. What a target cannot express is refused with the field's path, never guessed.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import yaml

from hardware import InputError

if TYPE_CHECKING:
    from planner.models import ModelSpec

ENGINE_TARGETS = ("vllm", "sglang", "trtllm")
TARGETS = (*ENGINE_TARGETS, "kubernetes", "dynamo", "rayserve")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
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


@dataclass(frozen=True, slots=True)
class _Flag:
    """An option with its value ("" for a switch), and the field of the plan behind it."""

    name: str
    value: str
    source: str


@dataclass(slots=True)
class _Launch:
    """How an engine is started for one worker of a plan."""

    engine: str
    version: str
    model: str
    flags: list[_Flag]
    replicas: int
    devices: int
    devices_per_node: int
    vendor: str
    config: dict[str, Any] = field(default_factory=dict)  # TensorRT-LLM's YAML
    config_flag: str = ""
    config_sources: dict[str, str] = field(default_factory=dict)  # the plan's fields by their place in it
    notes: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        """The command with all options."""
        words = [*_table(self.engine)["command"], self.model]
        for flag in self.flags:
            words += [flag.name, flag.value] if flag.value else [flag.name]
        if self.config:
            words += [self.config_flag, "config.yaml"]
        return words

    def config_text(self) -> str:
        """The YAML, below a list of the plan's fields behind it."""
        reasons = [f"#   {place:<42} {source}\n" for place, source in self.config_sources.items()]
        return "# The field of the plan behind each:\n" + "".join(reasons) + _yaml([self.config])


@lru_cache(maxsize=1)
def _tables() -> dict[str, Any]:
    text = (resources.files("planner.exports") / "options.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _table(engine: str) -> dict[str, Any]:
    found: dict[str, Any] = _tables()[engine]
    return found


def _number(version: str) -> tuple[int, ...]:
    """Release numbers, three at least: 0.24 is 0.24.0, and 1.3.0rc29 is 1.3.0."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    return tuple(numbers + [0] * (3 - len(numbers)))


def _image(table: Mapping[str, Any], version: str) -> str:
    """The engine's published image: its tags have three numbers and what follows them."""
    suffix = re.sub(r"^v?\d+(\.\d+)*", "", version)
    tag = ".".join(map(str, _number(version))) + suffix
    return str(table["image"]).format(version=table.get("tags", {}).get(tag, tag))


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
    launch = _launch(plan, request, engine)
    if target in ENGINE_TARGETS:
        return _command(launch, target)
    if target == "kubernetes":
        return _kubernetes(launch)
    if target == "dynamo":
        return _dynamo(launch)
    return _rayserve(launch)


# --- the engine's own options --------------------------------------------------------------------


def _launch(plan: Mapping[str, Any], request: Mapping[str, Any], engine: str) -> _Launch:
    from hardware import load_catalog
    from planner.models import load_model

    table, worker = _table(engine), plan["worker"]
    version = str(request.get("engine", {}).get("version") or table["newest"])
    if _number(version) < _number(table["oldest"]) or _number(version) > _number(table["newest"]):
        raise InputError(
            "engine.version",
            f"option names of {engine} {version} are not known, only those of {table['oldest']} to "
            f"{table['newest']}",
        )
    degrees, batching = worker["parallelism"], worker["batching"]
    pools = {pool.get("name", "main"): pool for pool in request["cluster"]["pools"]}
    pool = pools.get(worker["pool"], next(iter(pools.values())))
    device = load_catalog().device(pool["device"]) if pool.get("device") else None
    devices = degrees["tensor"] * degrees["pipeline"] * degrees["attention_data"]
    spec = load_model(request["model"])
    model, own = _checkpoint(request["model"], spec)
    launch = _Launch(
        engine, version, model, [], plan["replicas"], devices, int(pool.get("devices_per_node") or devices),
        device.vendor if device else "nvidia",
    )  # fmt: skip
    values = {
        **_flat(worker),
        "stage_devices": degrees["tensor"] * degrees["attention_data"],
        "worker_seqs": batching["max_num_seqs"] * degrees["attention_data"],
        "worker_tokens": batching["max_num_batched_tokens"] * degrees["attention_data"],
    }
    _check_experts(launch, degrees)
    for option in table["options"]:
        flag = _flag(option, values, version, own, launch)
        if flag is not None:
            launch.flags.append(flag)
    _formats(launch, worker["quantization"], own)
    if engine == "trtllm":
        launch.config = _trtllm_config(worker)
        launch.config_flag = next(row["flag"] for row in table["config"] if _knows(row, version))
        launch.config_sources = {
            place: source for place, source in _TRTLLM_SOURCES.items() if _stands(launch.config, place)
        }
    _check_cache(launch, worker["quantization"]["kv_cache"])
    return launch


def _checkpoint(asked: str, spec: ModelSpec) -> tuple[str, str]:
    """(what the engine loads, the format of its weights) for a model as the request names it."""
    ids = spec.hugging_face_ids
    for found in ids:
        if asked.lower() in (found.lower(), found.lower().split("/")[-1]):
            return found, spec.quantization.weights
    if "/" in asked or not ids:
        # An id of someone's own, or a folder: engines want that of a config.json.
        return asked.removesuffix("/config.json"), spec.quantization.weights
    from planner.models import load_model

    # A name of the catalog stands for the first checkpoint, whatever formats a variant of it has.
    return ids[0], load_model(spec.name).quantization.weights


def _knows(row: Mapping[str, Any], version: str) -> bool:
    """Whether a version of an engine has what a row of its table says."""
    if "since" in row and _number(version) < _number(row["since"]):
        return False
    return not ("until" in row and _number(version) > _number(row["until"]))


def _stands(config: Any, place: str) -> bool:
    for part in place.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def _flat(value: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{path}.{key}" if path else key
        found.update(_flat(inner, name) if isinstance(inner, Mapping) else {name: inner})
    return found


def _flag(
    option: Mapping[str, Any], values: Mapping[str, Any], version: str, own: str, launch: _Launch
) -> _Flag | None:
    if not _knows(option, version):
        return None
    name = option.get("source", option["field"])
    value = values[option["field"]]
    if isinstance(value, bool):
        text = option.get("on" if value else "off")
        return _Flag(text, "", name) if text else None
    if "unless" in option and value == option["unless"]:
        return None
    if option.get("switch"):
        return _Flag(option["flag"], "", name)
    if "values" in option:
        if option.get("online") and value == own:
            return None  # the checkpoint says so itself
        if value not in option["values"]:
            return None
        value = option["values"][value]
    if "when" in option and not values[option["when"]]:
        value = option["otherwise"]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _Flag(option["flag"], text, name)


def _check_experts(launch: _Launch, degrees: Mapping[str, int]) -> None:
    """Engines spread experts over a whole stage or not at all, where their options say no more."""
    stage = degrees["tensor"] * degrees["attention_data"]
    if launch.engine == "vllm" and degrees["expert"] not in (1, stage):
        raise InputError(
            "plan.worker.parallelism.expert",
            f"vLLM spreads experts over all {stage} devices of a stage or over none, not over "
            f"{degrees['expert']}",
        )


def _formats(launch: _Launch, formats: Mapping[str, str], own: str) -> None:
    """The 16-bit type, and what has to be true of the checkpoint."""
    weights = formats["weights"]
    if weights in _DTYPES and launch.engine in ("vllm", "sglang"):
        launch.flags.append(_Flag("--dtype", _DTYPES[weights], "quantization.weights"))
    if weights != own and (weights not in ("fp8", *_DTYPES) or (weights in _DTYPES and own not in _DTYPES)):
        launch.notes.append(
            f"The plan serves {weights} weights: name a checkpoint of {launch.model} in {weights}."
        )
    elif weights == "fp8" and own != "fp8":
        how = (
            "quantized when they are loaded" if launch.engine != "trtllm" else "taken from an fp8 checkpoint"
        )
        launch.notes.append(f"Weights are {how}; a published fp8 checkpoint keeps calibrated scales.")


def _check_cache(launch: _Launch, kv_cache: str) -> None:
    """A cache that no option was found for would silently be kept in 16 bits."""
    said = any(flag.source == "quantization.kv_cache" for flag in launch.flags)
    if kv_cache in _DTYPES or said or "dtype" in launch.config.get("kv_cache_config", {}):
        return
    raise InputError(
        "plan.worker.quantization.kv_cache",
        f"no option of {launch.engine} {launch.version} is known that keeps the cache in {kv_cache}",
    )


#: The plan's field behind each entry of TensorRT-LLM's YAML.
_TRTLLM_SOURCES = {
    "kv_cache_config.free_gpu_memory_fraction": "memory_fraction",
    "kv_cache_config.enable_block_reuse": "prefix_caching",
    "kv_cache_config.dtype": "quantization.kv_cache",
    "enable_chunked_prefill": "batching.chunked_prefill",
    "cuda_graph_config": "batching.cuda_graphs",
    "enable_attention_dp": "parallelism.attention_data",
}


class _Plain(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """YAML without anchors: what is the same twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


def _yaml(documents: Sequence[Any]) -> str:
    text: str = yaml.dump_all(documents, Dumper=_Plain, sort_keys=False)
    return text


def _trtllm_config(worker: Mapping[str, Any]) -> dict[str, Any]:
    """What TensorRT-LLM takes in its YAML."""
    batching, degrees = worker["batching"], worker["parallelism"]
    cache: dict[str, Any] = {
        "free_gpu_memory_fraction": round(float(worker["memory_fraction"]), 4),
        "enable_block_reuse": bool(worker["prefix_caching"]),
    }
    if worker["quantization"]["kv_cache"] == "fp8":
        cache["dtype"] = "fp8"
    config: dict[str, Any] = {
        "kv_cache_config": cache,
        "enable_chunked_prefill": bool(batching["chunked_prefill"]),
        "cuda_graph_config": (
            {"enable_padding": True, "max_batch_size": min(batching["max_num_seqs"], 128)}
            if batching["cuda_graphs"]
            else None
        ),
    }
    if degrees["attention_data"] > 1:
        config["enable_attention_dp"] = True
    return config


# --- targets -------------------------------------------------------------------------------------


def _command(launch: _Launch, target: str) -> Artifact:
    notes = [*launch.notes]
    if launch.replicas > 1:
        notes.append(f"Start {launch.replicas} of these and balance requests over them.")
    if launch.devices > launch.devices_per_node:
        raise InputError(
            "plan.worker.parallelism",
            f"a worker of {launch.devices} devices spans nodes of {launch.devices_per_node}; commands for "
            "one worker on several nodes are not written yet",
        )
    lines = [" ".join(map(shlex.quote, [*_table(launch.engine)["command"], launch.model]))]
    # A comment inside a continued command would end it, so the reasons stand above.
    reasons = [f"#   {flag.name:<30} {flag.source}" for flag in launch.flags]
    lines += [f"  {flag.name}{' ' + shlex.quote(flag.value) if flag.value else ''}" for flag in launch.flags]
    if launch.config:
        lines.append(f"  {launch.config_flag} config.yaml")
    text = f"# {launch.engine} {launch.version}; each option and the field of the plan behind it:\n"
    text += "\n".join(reasons) + "\n" + " \\\n".join(lines) + "\n"
    files = {"run.sh": "#!/usr/bin/env bash\n" + text}
    if launch.config:
        files["config.yaml"] = launch.config_text()
    return Artifact(target, files, tuple(notes))


def _kubernetes(launch: _Launch) -> Artifact:
    if launch.devices > launch.devices_per_node:
        raise InputError(
            "plan.worker.parallelism",
            f"a worker of {launch.devices} devices spans nodes of {launch.devices_per_node}; manifests for "
            "one worker on several nodes are not written yet",
        )
    table = _table(launch.engine)
    name = _name(launch)
    labels = {"app.kubernetes.io/name": name}
    arguments = launch.arguments
    if launch.config:
        arguments = [("/etc/planfront/config.yaml" if word == "config.yaml" else word) for word in arguments]
    bind = {"vllm": ["--host", "0.0.0.0"], "sglang": ["--host", "0.0.0.0"], "trtllm": ["--host", "0.0.0.0"]}
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
        "image": _image(table, launch.version),
        "command": arguments[:1],
        "args": [*arguments[1:], *bind[launch.engine], "--port", str(table["port"])],
        "ports": [{"name": "http", "containerPort": table["port"]}],
        "env": [
            {
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hugging-face", "key": "token", "optional": True}},
            }
        ],
        "resources": {"limits": {_RESOURCES[launch.vendor]: launch.devices}},
        "startupProbe": {**probe, "failureThreshold": 180},
        "readinessProbe": probe,
        "volumeMounts": mounts,
    }
    documents += [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": launch.replicas,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {
                        "labels": labels,
                        "annotations": {
                            f"planfront/{f.name.lstrip('-').partition('=')[0]}": f.source
                            for f in launch.flags
                        },
                    },
                    "spec": {"containers": [container], "volumes": volumes},
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": labels},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    ]
    text = _yaml(documents)
    notes = [*launch.notes, "A gated model needs the secret `hugging-face` with the key `token`."]
    if launch.vendor != "nvidia":
        notes.append(f"The image is built for NVIDIA devices: name one of {launch.engine} for this device.")
    return Artifact("kubernetes", {"deployment.yaml": text}, tuple(notes))


def _dynamo(launch: _Launch) -> Artifact:
    if launch.devices > launch.devices_per_node:
        raise InputError("plan.worker.parallelism", "workers that span nodes are not exported to Dynamo yet")
    names = _tables()["dynamo"][launch.engine]
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
    return Artifact("dynamo", {"graph.yaml": _yaml([graph])}, notes)


def _rayserve(launch: _Launch) -> Artifact:
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


def _name(launch: _Launch) -> str:
    """A DNS label, as Kubernetes wants: from a letter to a letter or digit."""
    text = launch.model.rstrip("/").split("/")[-1].lower()
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-")
    if not label[:1].isalpha():
        label = f"model-{label}"
    return label[:50].rstrip("-")
