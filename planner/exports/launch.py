"""How an engine is started for one worker of a plan: its command, its options and its settings.

Option names are data (`options.toml`) with the versions that know them; every flag says which field of the
plan it stands for. What an engine cannot express is refused with the field's path, never guessed.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from hardware import InputError

if TYPE_CHECKING:
    from planner.models import ModelSpec

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
#: What a target makes of a plan: files by name, the first the main one, and notes.
Files: TypeAlias = tuple[dict[str, str], list[str]]


@dataclass(frozen=True, slots=True)
class Flag:
    """An option with its value ("" for a switch), and the field of the plan behind it."""

    name: str
    value: str
    source: str
    over_nodes: str = ""  # the value where a worker takes several nodes, if another

    def words(self, *, several: bool = False) -> list[str]:
        """The option and its value; on one node, or where it is one of `several`."""
        value = self.over_nodes if several and self.over_nodes else self.value
        return [self.name, value] if value else [self.name]


@dataclass(slots=True)
class Launch:
    """How an engine is started for one worker of a plan."""

    engine: str
    version: str
    model: str
    spec: ModelSpec
    role: str  # "prefill" or "decode"; "" for a worker that does both
    pool: str
    device: str
    flags: list[Flag]
    replicas: int
    devices: int
    devices_per_node: int
    vendor: str
    attention_data: int = 1
    config: dict[str, Any] = field(default_factory=dict)  # TensorRT-LLM's YAML
    config_flag: str = ""
    config_sources: dict[str, str] = field(default_factory=dict)  # the plan's fields by their place in it
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> int:
        """Nodes that one worker takes."""
        return -(-self.devices // self.devices_per_node)

    @property
    def path(self) -> str:
        """Where the worker stands in the request."""
        return f"plan.{self.role}.worker" if self.role else "plan.worker"

    @property
    def config_file(self) -> str:
        """The name of its YAML."""
        return f"{self.role or 'config'}.yaml"

    @property
    def label(self) -> str:
        """A DNS label of the model, as Kubernetes wants: from a letter to a letter or digit."""
        text = self.model.rstrip("/").split("/")[-1].lower()
        label = "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-")
        if not label[:1].isalpha():
            label = f"model-{label}"
        return label[:50].rstrip("-")

    def arguments(self, config_file: str) -> list[str]:
        """The command with all options."""
        words = [*option_table(self.engine)["command"], self.model]
        for flag in self.flags:
            words += flag.words(several=self.nodes > 1)
        if self.config:
            words += [self.config_flag, config_file]
        return words

    def source(self, field_of_worker: str) -> str:
        """A field of the worker (or several, multiplied) as the plan names it."""
        role = f"{self.role}." if self.role else ""
        return " x ".join(f"{role}{one}" for one in field_of_worker.split(" x "))

    def config_text(self) -> str:
        """The YAML, below a list of the plan's fields behind it."""
        width = max([42, *map(len, self.config_sources)])
        reasons = [f"#   {place:<{width}} {source}\n" for place, source in self.config_sources.items()]
        return "# The field of the plan behind each:\n" + "".join(reasons) + to_yaml([self.config])


@lru_cache(maxsize=1)
def option_tables() -> dict[str, Any]:
    """All of `options.toml`."""
    text = (resources.files("planner.exports") / "options.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def option_table(engine: str) -> dict[str, Any]:
    """What an engine is started with: its command, its options, its image."""
    found: dict[str, Any] = option_tables()[engine]
    return found


def _number(version: str) -> tuple[int, ...]:
    """Release numbers, three at least: 0.24 is 0.24.0, and 1.3.0rc29 is 1.3.0."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    return tuple(numbers + [0] * (3 - len(numbers)))


def quoted(word: str, variables: Mapping[str, str]) -> str:
    """A word for a shell; where a name stands in braces, the shell's variable (`$NAME`) of that name."""
    text = shlex.quote(word)
    for name, variable in variables.items():
        if word == f"{{{name}}}":
            return f'"{variable}"'
        text = text.replace(f"{{{name}}}", f"'\"{variable}\"'")
    return text


def release_of(version: str) -> str:
    """The version as releases are named: three numbers and what follows them."""
    suffix = re.sub(r"^v?\d+(\.\d+)*", "", version)
    return ".".join(map(str, _number(version))) + suffix


def image_of(table: Mapping[str, Any], version: str) -> str:
    """The engine's published image."""
    tag = release_of(version)
    return str(table["image"]).format(version=table.get("tags", {}).get(tag, tag))


def launch_of(part: Mapping[str, Any], request: Mapping[str, Any], engine: str, role: str = "") -> Launch:
    """How the request's engine is started for an aggregated plan, or for the part of one that has a role.

    Raises InputError for what it cannot express.
    """
    from hardware import load_catalog
    from planner.models import load_model

    table, worker = option_table(engine), part["worker"]
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
    catalog = load_catalog()
    device = catalog.device(pool["device"]) if pool.get("device") else None
    usual = catalog.default_node(device).devices_per_node if device else 0
    devices = degrees["tensor"] * degrees["pipeline"] * degrees["attention_data"]
    spec = load_model(request["model"], request.get("config"))
    model, own = _checkpoint(request["model"], spec)
    launch = Launch(
        engine, version, model, spec, role, pool.get("name", "main"), device.name if device else "", [],
        part["replicas"], devices, int(pool.get("devices_per_node") or usual or devices),
        device.vendor if device else "nvidia", degrees["attention_data"],
    )  # fmt: skip
    values = {
        **_flat(worker),
        "stage_devices": degrees["tensor"] * degrees["attention_data"],
        "worker_seqs": batching["max_num_seqs"] * degrees["attention_data"],
        "worker_tokens": batching["max_num_batched_tokens"] * degrees["attention_data"],
    }
    _check_spread(launch, degrees)
    for option in table["options"]:
        flag = _flag(option, values, version, own, launch)
        if flag is not None:
            launch.flags.append(flag)
    _formats(launch, worker["quantization"], own)
    if engine == "trtllm":
        launch.config = _trtllm_config(worker)
        launch.config_flag = next(row["flag"] for row in table["config"] if knows(row, version))
        launch.config_sources = {
            place: launch.source(source)
            for place, source in _TRTLLM_SOURCES.items()
            if _stands(launch.config, place)
        }
    _check_cache(launch, worker["quantization"]["kv_cache"])
    launch.flags = [replace(flag, source=launch.source(flag.source)) for flag in launch.flags]
    if len(pools) > 1 and device:
        launch.notes.append(f"The plan is for pool {launch.pool!r}: run it on its {device.name} only.")
    if worker.get("gpu_clock_hz"):
        mhz = f"{worker['gpu_clock_hz'] / 1e6:.0f}"
        launch.notes.append(
            "The plan locks core clocks. On every node, as root, before serving: nvidia-smi "
            f"--lock-gpu-clocks={mhz},{mhz} (nvidia-smi --reset-gpu-clocks undoes it)."
        )
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


def knows(row: Mapping[str, Any], version: str) -> bool:
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
    option: Mapping[str, Any], values: Mapping[str, Any], version: str, own: str, launch: Launch
) -> Flag | None:
    if not knows(option, version):
        return None
    name = option.get("source", option["field"])
    value = values[option["field"]]
    if isinstance(value, bool):
        text = option.get("on" if value else "off")
        return Flag(text, "", name) if text else None
    if "unless" in option and value == option["unless"]:
        return None
    if option.get("switch"):
        return Flag(option["flag"], "", name)
    if "values" in option:
        if option.get("online") and value == own:
            return None  # the checkpoint says so itself
        if value not in option["values"]:
            return None
        value = option["values"][value]
    if "when" in option and not values[option["when"]]:
        value = option["otherwise"]
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return Flag(option["flag"], text, name)


def _check_spread(launch: Launch, degrees: Mapping[str, int]) -> None:
    """Engines spread experts, or requests, over a whole stage or not at all, where options say no more."""
    stage = degrees["tensor"] * degrees["attention_data"]
    if launch.engine == "vllm" and degrees["expert"] not in (1, stage):
        raise InputError(
            f"{launch.path}.parallelism.expert",
            f"vLLM spreads experts over all {stage} devices of a stage or over none, not over "
            f"{degrees['expert']}",
        )
    if launch.engine == "trtllm" and degrees["attention_data"] > 1 and degrees["tensor"] > 1:
        raise InputError(
            f"{launch.path}.parallelism.attention_data",
            f"TensorRT-LLM's attention data parallelism takes all {stage} devices of a stage, not "
            f"{degrees['attention_data']} groups of {degrees['tensor']}",
        )


def _formats(launch: Launch, formats: Mapping[str, str], own: str) -> None:
    """The 16-bit type, and what has to be true of the checkpoint."""
    weights = formats["weights"]
    if weights in _DTYPES and launch.engine in ("vllm", "sglang"):
        launch.flags.append(Flag("--dtype", _DTYPES[weights], "quantization.weights"))
    if weights != own and (weights not in ("fp8", *_DTYPES) or (weights in _DTYPES and own not in _DTYPES)):
        launch.notes.append(
            f"The plan serves {weights} weights: name a checkpoint of {launch.model} in {weights}."
        )
    elif weights == "fp8" and own != "fp8":
        how = (
            "quantized when they are loaded" if launch.engine != "trtllm" else "taken from an fp8 checkpoint"
        )
        launch.notes.append(f"Weights are {how}; a published fp8 checkpoint keeps calibrated scales.")


def _check_cache(launch: Launch, kv_cache: str) -> None:
    """A cache that no option was found for would silently be kept in 16 bits."""
    said = any(flag.source == "quantization.kv_cache" for flag in launch.flags)
    if kv_cache in _DTYPES or said or "dtype" in launch.config.get("kv_cache_config", {}):
        return
    raise InputError(
        f"{launch.path}.quantization.kv_cache",
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


def to_yaml(documents: Sequence[Any]) -> str:
    """Documents in one text."""
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


def node_options(launch: Launch, rank: str, head: str) -> list[str]:
    """What a node of a worker on several is told besides, in shell words; nothing where one node will do.

    `rank`: the shell variable of the node's number, `head`: of the address of node 0. Raises InputError
    where the engine's options do not say it.
    """
    if launch.nodes == 1:
        return []
    spans = f"a worker of {launch.devices} devices spans nodes of {launch.devices_per_node}"
    table, where = option_table(launch.engine).get("nodes"), f"{launch.path}.parallelism"
    if launch.devices % launch.devices_per_node:
        raise InputError(where, f"{spans}, which it would fill unevenly")
    if table is None or not knows(table, launch.version):
        raise InputError(
            where, f"{spans}; how {launch.engine} {launch.version} is started on several is not known"
        )
    options = table["options"]
    if launch.attention_data > 1 and "rank_options" in table:
        if launch.attention_data % launch.nodes:
            raise InputError(where, f"{spans}, and so do ranks of data-parallel attention")
        options = table["rank_options"]
    ranks = launch.attention_data // launch.nodes
    words = [
        text.format(nodes=launch.nodes, ranks=ranks, rank=f'"${rank}"', head=f'"${head}"', number=rank)
        for text in options
    ]
    if "followers" in table:
        words.append(f'$([ "${rank}" = 0 ] || echo {table["followers"]})')
    return words
