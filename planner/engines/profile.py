"""Engine profiles read from `profiles.toml`."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from costmodels.table import HostOverhead
from hardware import Device, InputError

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryConstants:
    """Memory of a serving process besides weights and KV cache; see `profiles.toml`."""

    context_bytes: int
    collective_bytes: int
    logit_copies: int
    hidden_copies: int
    graph_fixed_bytes: int
    graph_bytes_per_size_and_layer: int


@dataclass(frozen=True, slots=True)
class Tier:
    """Defaults for devices of at least `min_memory_gib`."""

    min_memory_gib: float
    max_num_batched_tokens: int
    max_num_seqs: int
    graph_max: int
    graph_max_small_tensor: int = 0  # instead of graph_max below tensor 4; 0: the same
    not_architecture: str = ""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """One engine version: what it does by default, and what its host side costs.

    `request_s` and `request_per_token_s` (of the prompt) are the front end's share of a request's
    latency: HTTP, tokenisation, queues between processes, and streaming back.
    """

    engine: str
    version: str  # of the profile
    asked_version: str  # of the request; "" when it named none
    policy: str
    admission: str
    watermark: float
    block_tokens: int
    prefix_caching: bool
    chunked_prefill: bool
    cuda_graphs: bool
    memory_rule: str  # fraction_of_total | static_fraction | fraction_of_free
    fixed_memory_fraction: float  # 0: worked out per device
    graph_scheme: str
    tiers: tuple[Tier, ...]
    host: HostOverhead
    # Seconds that the host takes to launch a kernel when graphs are switched off, and compilation with them.
    eager_launch_s: float
    request_s: float
    request_per_token_s: float
    # Measured / predicted of whole runs, (5th, 95th percentile) by metric: what kernels' intervals leave out.
    run_error: Mapping[str, tuple[float, float]]
    # The part of it that differs between plans of one model on one device.
    plan_error: Mapping[str, tuple[float, float]]
    memory: MemoryConstants
    source: str
    # Disaggregated serving: what a decode worker is handed (see `SchedulerConfig.brought`), and whether its
    # front end sees the request "after" the prompt or "at_once" with the prefill worker's.
    brought: str
    handed_over: str

    def tier(self, device: Device) -> Tier:
        """The defaults that hold on `device`."""
        for tier in self.tiers:
            if device.memory_bytes >= tier.min_memory_gib * GIB * 0.985 and (
                not tier.not_architecture or device.architecture != tier.not_architecture
            ):
                return tier
        return self.tiers[-1]

    def graph_max(self, device: Device, tensor: int) -> int:
        """Largest decode batch that the engine captures as a CUDA graph."""
        tier = self.tier(device)
        return tier.graph_max_small_tensor if tensor < 4 and tier.graph_max_small_tensor else tier.graph_max

    def graph_sizes(self, device: Device, tensor: int, max_num_seqs: int) -> tuple[int, ...]:
        """Captured decode batch sizes, ascending, at most `max_num_seqs` (rounded up once)."""
        top = self.graph_max(device, tensor)
        if self.graph_scheme == "vllm":
            # CompilationConfig: 1, 2, 4, then eights to 256, then sixteens; at most twice the cap.
            top = min(top, 2 * max_num_seqs)
            sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 8193, 16)]
        elif self.graph_scheme == "sglang":
            sizes = [1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), *range(512, 8193, 32)]
        else:
            # TensorRT-LLM CudaGraphConfig with padding: 1, 2, 4, then eights to 128, then powers of two.
            sizes = [1, 2, 4, *range(8, 129, 8), 256, 512, 1024, 2048]
        return tuple(size for size in sizes if size <= top)

    def host_overhead(
        self, device: Device, tensor: int, max_num_seqs: int, *, cuda_graphs: bool
    ) -> HostOverhead:
        """The host's share of a step on this device, with the graph sizes the engine captures."""
        sizes = self.graph_sizes(device, tensor, max_num_seqs) if cuda_graphs else ()
        return replace(
            self.host,
            graph_sizes=sizes,
            launch_s=self.host.launch_s if cuda_graphs else self.eager_launch_s,
            mixed_graph_max_tokens=self.host.mixed_graph_max_tokens if cuda_graphs else 0,
        )

    def memory_fraction(
        self, device: Device, *, tensor: int, pipeline: int, attention_data: int, token_budget: int
    ) -> float:
        """The engine's default memory fraction for this device and parallelism."""
        if self.fixed_memory_fraction:
            return self.fixed_memory_fraction
        # SGLang ServerArgs: what is reserved for activations, graphs and large parallel sizes, in MiB.
        total = device.memory_bytes / MIB
        graph_max = self.graph_max(device, tensor)
        reserve = (
            512 + max(token_budget, 2048) * 1.5 + graph_max * 2 + tensor * attention_data * pipeline * 128
        )
        if attention_data > 1:
            reserve += graph_max * attention_data * (4.5 if graph_max > 300 else 3)
        if total > 60 * 1024:
            reserve = max(reserve, 10 * 1024)
        return round(max(0.1, (total - reserve) / total), 3)


@lru_cache(maxsize=1)
def _document() -> dict[str, Any]:
    text = resources.files("planner.engines").joinpath("profiles.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _profiles(engine: str) -> list[dict[str, Any]]:
    """The engine's profiles, newest first, inheritance resolved."""
    own = [dict(item) for item in _document()["profile"] if item["engine"] == engine]
    by_version = {item["version"]: item for item in own}

    def full(item: Mapping[str, Any]) -> dict[str, Any]:
        base = full(by_version[item["inherits"]]) if "inherits" in item else {}
        return {**base, **item}

    return sorted((full(item) for item in own), key=lambda item: _key(item["version"]), reverse=True)


def _key(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in re.findall(r"\d+", re.split(r"rc|post|dev|a|b", version)[0])[:3]]
    return tuple(parts + [0] * (3 - len(parts)))


def load_profile(engine: str, version: str | None = None, path: str = "engine") -> EngineProfile:
    """The profile of an engine version: the newest one not newer than `version`.

    Raises InputError for an unknown engine, a text that is no version, or a version older
    than the oldest the profiles describe.
    """
    known = sorted({item["engine"] for item in _document()["profile"]})
    if engine not in known:
        near = difflib.get_close_matches(engine, known, 1)
        raise InputError(f"{path}.name", f"unknown engine {engine!r}, known are {', '.join(known)}",
                         f"did you mean {near[0]!r}?" if near else "")  # fmt: skip
    profiles = _profiles(engine)
    item = profiles[0]
    if version:
        if not re.fullmatch(r"v?\d+(\.\d+){0,3}([.\-]?(rc|post|dev|a|b)\d*)*(\.post\d+)?", version):
            raise InputError(f"{path}.version", f"{version!r} is not a version of {engine}")
        key = _key(version)
        older = [candidate for candidate in profiles if _key(candidate["version"]) <= key]
        item = older[0] if older else profiles[-1]
        if key < _key(item["since"]):
            raise InputError(
                f"{path}.version",
                f"{engine} {version} is older than {item['since']}, the oldest version that is described",
            )
    host = _document()["host"][item.get("host", engine)]
    return EngineProfile(
        engine=engine,
        version=item["version"],
        asked_version=version or "",
        policy=item["policy"],
        admission=item["admission"],
        watermark=item["watermark"],
        block_tokens=item["block_tokens"],
        prefix_caching=item["prefix_caching"],
        chunked_prefill=item["chunked_prefill"],
        cuda_graphs=item["cuda_graphs"],
        memory_rule=item["memory_rule"],
        fixed_memory_fraction=item.get("memory_fraction", 0.0),
        graph_scheme=item["graph_scheme"],
        tiers=tuple(Tier(**tier) for tier in item["tiers"]),
        host=HostOverhead(
            **{
                name: host[name]
                for name in (
                    "decode_step_s",
                    "decode_per_sequence_s",
                    "mixed_per_token_s",
                    "mixed_launch_s",
                    "mixed_experts_share",
                    "collective_s",
                    "launch_s",
                    "mixed_graph_max_tokens",
                    "overlap_s",
                )
            }
        ),
        eager_launch_s=host["eager_launch_s"],
        request_s=host["request_s"],
        request_per_token_s=host["request_per_token_s"],
        run_error=MappingProxyType({name: tuple(host[f"{name}_error"]) for name in ("tpot", "ttft")}),
        plan_error=MappingProxyType({name: tuple(host[f"{name}_within"]) for name in ("tpot", "ttft")}),
        memory=MemoryConstants(**_document()["memory"]),
        source=item["source"],
        brought=item["brought"],
        handed_over=item["handed_over"],
    )


def engine_rows() -> list[dict[str, Any]]:
    """What `planfront catalog engines` lists: one plain dict per profile."""
    rows: list[dict[str, Any]] = []
    for engine in sorted({item["engine"] for item in _document()["profile"]}):
        hosts = _document()["host"]
        rows += [
            {
                "name": f"{engine}-{item['version']}",
                "engine": engine,
                "version": item["version"],
                "policy": item["policy"],
                "admission": item["admission"],
                "block_tokens": item["block_tokens"],
                "prefix_caching": item["prefix_caching"],
                "chunked_prefill": item["chunked_prefill"],
                "memory_rule": item["memory_rule"],
                "memory_fraction": item.get("memory_fraction"),
                "defaults_by_memory": item["tiers"],
                "disaggregated": {"brought": item["brought"], "handed_over": item["handed_over"]},
                "host_s": {k: v for k, v in hosts[item.get("host", engine)].items() if k != "source"},
                "host_source": hosts[item.get("host", engine)]["source"],
                "source": item["source"],
            }
            for item in _profiles(engine)
        ]
    return rows
