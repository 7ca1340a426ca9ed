"""A plan as shell scripts: the engine's command line, one for each kind of workers, and their router's."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from planner.exports.launch import Files, Launch, node_options, option_table, quoted, to_yaml
from planner.exports.roles import (
    Address,
    Pair,
    Place,
    handover_table,
    places_of,
    router_config,
    router_notes,
    router_words,
)

_FIRST_LINE = "#!/usr/bin/env bash\n"
#: By what a process is told which devices of its node are its own.
_VISIBLE = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "HIP_VISIBLE_DEVICES"}
#: Shell variables in the place of what an option's value names in braces.
_VARIABLES = {
    "head": "$HEAD_ADDRESS",
    "address": "$NODE_ADDRESS",
    "devices": "${devices[REPLICA]}",
    "handover_port": "${handover_ports[REPLICA]}",
}


def of_worker(launch: Launch) -> Files:
    """One script for an aggregated plan, and the settings it names."""
    notes = [*launch.notes]
    if launch.replicas > 1:
        notes.append(f"Start {launch.replicas} of these and balance requests over them.")
    if launch.nodes > 1:
        last = launch.nodes - 1
        notes.append(
            f"One worker takes {launch.nodes} nodes: start this on each, with NODE_RANK from 0 to {last} and "
            "HEAD_ADDRESS, the address of node 0."
        )
    files = {"run.sh": _script(launch, "", [], [])}
    if launch.config:
        files[launch.config_file] = launch.config_text()
    return files, notes


def of_pair(pair: Pair) -> Files:
    """A script for each kind of workers of a disaggregated plan and one for their router."""
    places = places_of(pair)
    files = {f"{launch.role}.sh": _role_script(pair, launch, places[launch.role]) for launch in pair.launches}
    files["router.sh"] = _router_script(pair, places)
    files |= {launch.config_file: launch.config_text() for launch in pair.launches if launch.config}
    notes = [*pair.notes]
    for launch in pair.launches:
        notes += _starts(launch, places[launch.role])
    notes.append(
        "Then start router.sh, with NODES, the addresses of all nodes: requests go to its port "
        f"{handover_table(pair.engine)['router']['port']}."
    )
    return files, [*notes, *router_notes(pair)]


def _starts(launch: Launch, places: Sequence[Place]) -> list[str]:
    """How often and where the script of a kind of workers is started."""
    first = min(place.node for place in places)
    last = max(place.node for place in places) + launch.nodes - 1
    where = f"nodes {first} to {last}" if last > first else f"node {first}"
    often = f"{launch.replicas} times, with REPLICA from 0 to {launch.replicas - 1}"
    notes = [
        f"Start {launch.role}.sh {often if launch.replicas > 1 else 'once'}, on {where} (of pool "
        f"{launch.pool!r}): the script says which worker stands where."
    ]
    if launch.nodes > 1:
        notes.append(
            f"One {launch.role} worker takes {launch.nodes} nodes: start it on each, with NODE_RANK from 0 "
            f"to {launch.nodes - 1} and HEAD_ADDRESS, the address of the first of them."
        )
    return notes


def _script(launch: Launch, title: str, before: Sequence[str], after: Sequence[str]) -> str:
    """A worker's command, with shell lines `before` it and shell words `after` its options."""
    lines = [" ".join(map(shlex.quote, [*option_table(launch.engine)["command"], launch.model]))]
    # A comment inside a continued command would end it, so the reasons stand above.
    reasons = [f"#   {flag.name:<30} {flag.source}\n" for flag in launch.flags]
    for flag in launch.flags:
        name, *values = flag.words(several=launch.nodes > 1)
        lines.append("  " + " ".join([name, *(quoted(value, _VARIABLES) for value in values)]))
    if launch.config:
        lines.append(f"  {launch.config_flag} {launch.config_file}")
    spread = node_options(launch, "NODE_RANK", "HEAD_ADDRESS")
    lines += [f"  {words}" for words in (*after, *spread)]
    text = f"{_FIRST_LINE}# {launch.engine} {launch.version}{title}; each option and the field of the plan"
    text += " behind it:\n" + "".join(reasons)
    if spread:
        last = launch.nodes - 1
        head = "its first node" if launch.role else "node 0"
        text += f': "${{NODE_RANK:?from 0 to {last}}}" "${{HEAD_ADDRESS:?the address of {head}}}"\n'
    return text + "".join(f"{line}\n" for line in before) + " \\\n".join(lines) + "\n"


def _role_script(pair: Pair, launch: Launch, places: Sequence[Place]) -> str:
    addresses = _addresses(pair, launch, places)
    given = f"?from 0 to {launch.replicas - 1}" if launch.replicas > 1 else "=0"
    before = [
        f': "${{REPLICA:{given}}}"',
        "# By worker: the (first) node it stands on, as router.sh numbers them, and what it takes there.",
        _array("nodes", [str(place.node) for place in places]),
    ]
    environment = launch.environment
    if launch.devices < launch.devices_per_node:
        own = [range(place.device, place.device + launch.devices) for place in places]
        before.append(_array("devices", [",".join(map(str, devices)) for devices in own]))
        environment = {_VISIBLE[launch.vendor]: "{devices}", **environment}
    before.append(_array("ports", [str(one.port) for one in addresses]))
    said = [*environment.values(), *(flag.value for flag in launch.flags)]
    if "{handover_port}" in said:
        before.append(_array("handover_ports", [str(one.handover_port) for one in addresses]))
    if "{address}" in said:
        number = "$((nodes[REPLICA] + NODE_RANK))" if launch.nodes > 1 else "${nodes[REPLICA]}"
        before.append(f': "${{NODE_ADDRESS:?the address of this node, number {number}}}"')
    before += [f"export {name}={quoted(value, _VARIABLES)}" for name, value in environment.items()]
    after = ["--host 0.0.0.0", '--port "${ports[REPLICA]}"']
    return _script(launch, f", {launch.role} workers", before, after)


def _array(name: str, values: Sequence[str]) -> str:
    return f"{name}=({' '.join(values)})"


def _addresses(pair: Pair, launch: Launch, places: Sequence[Place]) -> list[Address]:
    """Of each worker, its host a shell's `${node[...]}`."""
    table = handover_table(pair.engine)
    base = table.get("handover_port", {}).get(launch.role, 0)
    return [
        Address(
            f"${{node[{place.node}]}}",
            table["ports"][launch.role] + table["port_step"] * place.slot,
            base + launch.attention_data * place.slot if base else 0,
        )
        for place in places
    ]


def _router_script(pair: Pair, places: Mapping[str, Sequence[Place]]) -> str:
    addresses = {launch.role: _addresses(pair, launch, places[launch.role]) for launch in pair.launches}
    last = max(place.node + launch.nodes - 1 for launch in pair.launches for place in places[launch.role])
    text = (
        _FIRST_LINE
        + "# Takes requests, and has each computed by a prefill worker and then a decode worker.\n"
    )
    text += f'read -ra node <<<"${{NODES:?the addresses of nodes 0 to {last}, in this order}}"\n'
    text += f': "${{node[{last}]:?is not in NODES}}"\n'
    lines = [list(handover_table(pair.engine)["router"]["command"])]
    config = router_config(pair.engine, addresses)
    if config:
        text += f"cat >router.yaml <<END\n{to_yaml([config])}END\n"
        lines[0].append("router.yaml")
    else:
        lines = router_words(pair.engine, addresses)
    return text + " \\\n  ".join(" ".join(map(_in_double_quotes, words)) for words in lines) + "\n"


def _in_double_quotes(word: str) -> str:
    """A word for a shell, in which `${node[...]}` is the shell's own."""
    return f'"{word}"' if "${" in word else shlex.quote(word)
