"""Prefill workers and decode workers of a disaggregated plan: how they are started, and what routes between.

What a pair needs besides its workers' own options is data (`options.toml`, `disaggregated`). What an engine
cannot hand over between two workers is refused with the path of the field that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hardware import InputError
from planner.exports.launch import Flag, Launch, knows, launch_of, option_table, release_of
from planner.handover import Side, handover_problem, recurrent

ROLES = ("prefill", "decode")


@dataclass(slots=True)
class Pair:
    """Both kinds of workers, and what concerns both."""

    prefill: Launch
    decode: Launch
    notes: list[str] = field(default_factory=list)

    @property
    def engine(self) -> str:
        """Of both."""
        return self.prefill.engine

    @property
    def label(self) -> str:
        """A DNS label of the model that has room for what is added for a kind of workers."""
        return self.prefill.label[:40].rstrip("-")

    @property
    def launches(self) -> tuple[Launch, Launch]:
        """Prefill workers first."""
        return self.prefill, self.decode


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker takes requests, and the port by which others ask it for its cache (0: none)."""

    host: str
    port: int
    handover_port: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands: its first node, its first device there, its number among its kind there."""

    node: int
    device: int
    slot: int


def pair_of(plan: Mapping[str, Any], request: Mapping[str, Any], engine: str) -> Pair:
    """How both kinds of a disaggregated plan's workers are started. Raises InputError as `launch_of` does."""
    prefill, decode = (launch_of(plan[role], request, engine, role) for role in ROLES)
    table = handover_table(engine)
    if not knows(table, prefill.version):
        raise InputError(
            "engine.version",
            f"how {engine} {prefill.version} serves a disaggregated plan is not known, only how it does from "
            f"{table['since']} on",
        )
    pair = Pair(prefill, decode)
    _check(pair, plan)
    for launch in pair.launches:
        for row in _rows(table.get("options", ()), launch):
            value, over_nodes = (
                row.get(key, "").replace("{role}", launch.role) for key in ("value", "over_nodes")
            )
            launch.flags.append(Flag(row["flag"], value, "serving", over_nodes))
        launch.environment = {
            row["name"]: row["value"] for row in _rows(table.get("environment", ()), launch)
        }
    if engine == "trtllm":
        _transceivers(pair, plan["prefill"]["worker"]["batching"])
    pair.notes += _notes(pair, plan)
    return pair


def handover_table(engine: str) -> dict[str, Any]:
    """What an engine's workers are told of their roles, and its router."""
    found: dict[str, Any] = option_table(engine)["disaggregated"]
    return found


def _rows(rows: Sequence[Mapping[str, Any]], launch: Launch) -> list[Mapping[str, Any]]:
    """The rows that concern a kind of workers of this version and model."""
    layers = _layers(launch)
    return [
        row
        for row in rows
        if knows(row, launch.version)
        and row.get("role", launch.role) == launch.role
        and ("layers" not in row or layers & set(row["layers"]))
    ]


def _layers(launch: Launch) -> set[str]:
    """What options ask of the model's layers: "state" where some keep one in the place of a cache."""
    return {"state"} if recurrent(launch.spec) else set()


# --- what cannot be handed over ------------------------------------------------------------------


def _check(pair: Pair, plan: Mapping[str, Any]) -> None:
    """Raises InputError for a pair that the engine hands no caches over between."""
    problem = handover_problem(
        pair.engine,
        pair.prefill.spec,
        *(_side(launch, plan[launch.role]["worker"]) for launch in pair.launches),
    )
    if problem is not None:
        raise InputError(f"plan.{problem.field}", problem.reason)
    names = [next((f.value for f in launch.flags if f.name == "--dtype"), "") for launch in pair.launches]
    if pair.engine == "vllm" and all(names) and names[0] != names[1]:
        # It is part of the hash by which each side checks the other.
        raise InputError(
            "plan.decode.worker.quantization.weights",
            f"vLLM hands caches over between workers of one 16-bit type, not from {names[0]} to {names[1]}",
        )


def _side(launch: Launch, worker: Mapping[str, Any]) -> Side:
    degrees = worker["parallelism"]
    return Side(
        launch.device, launch.vendor, degrees["tensor"], degrees["pipeline"],
        worker["quantization"]["kv_cache"], bool(worker["prefix_caching"]),
    )  # fmt: skip


# --- what both are told --------------------------------------------------------------------------


def _transceivers(pair: Pair, batching: Mapping[str, Any]) -> None:
    """TensorRT-LLM's settings of the hand-over."""
    # A buffer that holds a whole prompt sends it at once (disagg-serving.md). Where prompts are not cut, none
    # is longer than a step; rounded up to whole blocks, which have 64 tokens at most.
    tokens = -(-batching["max_num_batched_tokens"] // 64) * 64
    for launch in pair.launches:
        if launch.role == "prefill":
            # Not supported for context servers yet (disagg-serving.md).
            launch.config["disable_overlap_scheduler"] = True
            launch.config_sources["disable_overlap_scheduler"] = "serving"
        launch.config["cache_transceiver_config"] = {"backend": "NIXL", "max_tokens_in_buffer": tokens}
        launch.config_sources |= {
            "cache_transceiver_config.backend": "serving",
            "cache_transceiver_config.max_tokens_in_buffer": "prefill.batching.max_num_batched_tokens",
        }


def _notes(pair: Pair, plan: Mapping[str, Any]) -> list[str]:
    """What the reader has to know of a pair whatever starts it."""
    notes = [note for note in pair.prefill.notes if note in pair.decode.notes]
    for launch in pair.launches:
        notes += [
            f"{launch.role.capitalize()} workers: {note[:1].lower()}{note[1:]}"
            for note in launch.notes
            if note not in notes
        ]
    clocks = {plan[role]["worker"].get("gpu_clock_hz") for role in ROLES}
    if len(clocks) > 1 and pair.prefill.pool == pair.decode.pool:
        notes.append("On a node with both kinds of workers, give nvidia-smi the devices of one kind by --id.")
    differ = pair.prefill.device != pair.decode.device
    if pair.engine == "vllm":
        notes.append("Both kinds of workers need the package nixl beside the same release of vLLM.")
        if differ:
            notes.append(
                "They also need the same attention backend: where the devices' defaults differ, name one for "
                "both by --attention-backend."
            )
    elif pair.engine == "sglang":
        notes.append(
            "Caches go by NIXL: workers need the package nixl. SGLang's default is mooncake, of the package "
            "mooncake-transfer-engine."
        )
        if differ:
            notes.append(
                "Both kinds of workers need pages of one size: where the devices' defaults differ, name a "
                "--page-size for both."
            )
    elif plan["prefill"]["worker"]["batching"]["chunked_prefill"]:
        tokens = pair.prefill.config["cache_transceiver_config"]["max_tokens_in_buffer"]
        notes.append(
            f"max_tokens_in_buffer holds a step of a prefill worker, {tokens} tokens. Longer prompts are cut "
            "into steps: raise it on both sides to the longest, so that its cache is sent at once."
        )
    return notes


# --- the router ----------------------------------------------------------------------------------


def router_words(engine: str, addresses: Mapping[str, Sequence[Address]]) -> list[list[str]]:
    """A router's command, then an option and its values each, where it takes addresses as options."""
    table = handover_table(engine)["router"]
    lines = [list(table["command"])]
    for role in ROLES:
        if "urls" in table:
            # A prefill worker's URL is followed by the port where decode workers ask for its caches.
            lines += [
                [table["urls"][role], f"http://{one.host}:{one.port}"]
                + ([str(one.handover_port)] if role == "prefill" else [])
                for one in addresses[role]
            ]
        else:
            lines.append([table["hosts"][role], *(one.host for one in addresses[role])])
            lines.append([table["ports"][role], *(str(one.port) for one in addresses[role])])
    return lines


def router_config(engine: str, addresses: Mapping[str, Sequence[Address]]) -> dict[str, Any]:
    """A router's settings, where it takes addresses in a file; empty where it does not."""
    table = handover_table(engine)["router"]
    if "sections" not in table:
        return {}
    sections = {
        table["sections"][role]: {
            "num_instances": len(addresses[role]),
            "urls": [f"{one.host}:{one.port}" for one in addresses[role]],
        }
        for role in ROLES
    }
    return {"hostname": "0.0.0.0", "port": table["port"], "backend": "pytorch", **sections}


def router_notes(pair: Pair) -> list[str]:
    """Where the router comes from, and what it is not."""
    if pair.engine == "vllm":
        return [
            "toy_proxy_server.py is in vLLM's repository (tests/v1/kv_connector/nixl_integration at the tag "
            f"v{release_of(pair.prefill.version)}), an example that gives workers requests in turn. For "
            "production take a router that knows their load and prefixes, such as llm-d's or vllm-router."
        ]
    if pair.engine == "sglang":
        return ["The router is of the package sglang-router."]
    return []


# --- places on nodes -----------------------------------------------------------------------------


def places_of(pair: Pair) -> dict[str, list[Place]]:
    """Where each worker stands, by role. Nodes are numbered from 0, those of prefill workers' pool first.

    Larger workers are placed first, each on the first node of its pool with room: of sizes that divide each
    other, as degrees do, no device is left out.
    """
    nodes: list[tuple[bool, int]] = []  # (of the second pool?, devices taken)
    found: dict[str, list[Place]] = {role: [] for role in ROLES}
    for launch in sorted(pair.launches, key=lambda launch: -launch.devices):
        second = launch.pool != pair.prefill.pool
        slots: dict[int, int] = {}
        for _ in range(launch.replicas):
            room = launch.devices_per_node - launch.devices
            node = next(
                (n for n, (other, taken) in enumerate(nodes) if other == second and taken <= room), len(nodes)
            )
            if node == len(nodes):
                nodes += [(second, 0)] * launch.nodes
            taken = nodes[node][1]
            for spanned in range(node, node + launch.nodes):
                nodes[spanned] = (second, taken + min(launch.devices, launch.devices_per_node))
            slots[node] = slots.get(node, -1) + 1
            found[launch.role].append(Place(node, taken, slots[node]))
    order = sorted(range(len(nodes)), key=lambda node: nodes[node][0])
    numbers = {node: number for number, node in enumerate(order)}
    return {
        role: [Place(numbers[one.node], one.device, one.slot) for one in places]
        for role, places in found.items()
    }
