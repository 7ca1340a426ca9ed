"""Where a plan's workers stand: nodes, devices and links as a drawing, with the same in words.

Workers are laid out as the planner counts them: one after the other, neighbours together, tensor-parallel
ranks innermost; prefill workers before decode workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from markupsafe import Markup

from api.checks import NOWHERE
from hardware import InputError, build_cluster, load_catalog
from hardware.topology import Cluster, Pool
from web.format import quantity
from web.labels import devices_of, parts_of

_MOST_NODES, _MOST_DEVICES = 6, 16
_BOX, _GAP, _PAD = 50, 8, 14
#: Colours of neighbouring workers by role; what they mean stands in the boxes as well.
_SHADES = {"": (0, 1, 2, 3, 4, 5), "prefill": (0, 3), "decode": (1, 2)}
_SHORT = {"": "R", "prefill": "Pre ", "decode": "Dec "}
_KEYS = {
    "R": "R: replica",
    "Pre": "Pre: prefill worker",
    "Dec": "Dec: decode worker",
    "P": "P: pipeline stage",
    "D": "D: attention-data rank",
    "T": "T: tensor rank",
}
#: Replicas of a worker that stand in one pool, with their role.
_Member = tuple[Mapping[str, Any], int, str]


def placements(plan: Mapping[str, Any], request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One drawing per pool that the plan uses; empty when the machines cannot be built from the request."""
    cluster = _cluster(request)
    if cluster is None:
        return []
    used: dict[str, list[_Member]] = {}
    for role, part in parts_of(plan):
        worker = part.get("worker") or {}
        used.setdefault(_pool_of(part, cluster), []).append((worker, part.get("replicas", 1), role))
    found = []
    for name, members in used.items():
        try:
            pool = cluster.pool(name)
        except KeyError:
            continue
        found.append(_drawing(pool, members))
    return found


def handover_words(plan: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """The way of KV caches from prefill to decode workers: that between the plan's first and last device."""
    cluster, parts = _cluster(request), [part for role, part in parts_of(plan) if role]
    if cluster is None or len(parts) != 2:
        return ""
    first, second = parts
    pools = _pool_of(first, cluster), _pool_of(second, cluster)
    last = (devices_of(first) if pools[0] == pools[1] else 0) + devices_of(second) - 1
    try:
        group = cluster.point_to_point(pools[0], 0, pools[1], last)
    except (KeyError, ValueError):
        return ""
    link, rate = group.intra_link, group.intra_bandwidth_bytes_per_s
    if group.nodes > 1:
        link, rate = group.inter_link, group.inter_bandwidth_bytes_per_s
    return f"KV caches go from prefill to decode workers over {link}, {quantity(rate, 'B/s')} a device."


def _pool_of(part: Mapping[str, Any], cluster: Cluster) -> str:
    return str((part.get("worker") or {}).get("pool") or cluster.pools[0].name)


def _cluster(request: Mapping[str, Any]) -> Cluster | None:
    network = (request["cluster"].get("inter_node") or {}).get("kind")
    try:
        pools = [dict(pool) for pool in request["cluster"]["pools"]]
        return build_cluster(pools, network, load_catalog(), base_dir=NOWHERE)
    except InputError:
        return None


def _ranks(worker: Mapping[str, Any], replica: int, role: str) -> list[dict[str, Any]]:
    """What each device of one worker does."""
    degrees = worker.get("parallelism") or {}
    tensor, pipeline = degrees.get("tensor", 1), degrees.get("pipeline", 1)
    data, context = degrees.get("attention_data", 1), degrees.get("context", 1)
    size = tensor * pipeline * data * context
    stage = size // pipeline
    rows = []
    for index in range(size):
        lines = [f"{_SHORT[role]}{replica + 1}"]
        within = index % stage
        parts = []
        if pipeline > 1:
            parts.append(f"P{index // stage}")
        if data > 1:
            parts.append(f"D{within // (tensor * context)}")
        if tensor > 1 or not parts:
            parts.append(f"T{within % tensor}")
        lines.append(" ".join(parts))
        shades = _SHADES[role]
        rows.append({"lines": lines, "shade": shades[replica % len(shades)]})
    return rows


def _laid_out(pool: Pool, members: list[_Member], *, whole: bool) -> list[dict[str, Any] | None]:
    """What each device of a pool does; `whole`: workers that fit into a node stand in one, and larger ones
    begin with one, so that the rest of a node stays empty."""
    ranks: list[dict[str, Any] | None] = []
    for worker, replicas, role in members:
        for replica in range(replicas):
            found = _ranks(worker, replica, role)
            room = pool.devices_per_node - len(ranks) % pool.devices_per_node
            if whole and room < min(len(found), pool.devices_per_node):
                ranks += [None] * room
            ranks += found
    return ranks


def _key(ranks: list[dict[str, Any] | None]) -> str:
    """What the letters in the boxes mean, of those that are there."""
    words = [text for rank in ranks if rank for line in rank["lines"] for text in line.split()]
    used = {word.rstrip("0123456789") for word in words}
    return ", ".join(meaning for short, meaning in _KEYS.items() if short in used)


def _drawing(pool: Pool, members: list[_Member]) -> dict[str, Any]:
    ranks = _laid_out(pool, members, whole=True)
    if len(ranks) > pool.devices:
        ranks = _laid_out(pool, members, whole=False)
    told = []
    for worker, replicas, role in members:
        size = len(_ranks(worker, 0, role))
        words = f"{replicas} {role + ' ' if role else ''}{'worker' if replicas == 1 else 'workers'}"
        told.append(f"{words} of {size} {'device' if size == 1 else 'devices'}")
    nodes_used = max(1, -(-len(ranks) // pool.devices_per_node))
    nodes = min(max(nodes_used, min(pool.nodes, 2)), _MOST_NODES)
    shown = min(pool.devices_per_node, _MOST_DEVICES)
    columns = shown if shown <= 8 else (shown + 1) // 2
    lines = -(-shown // columns)
    width = columns * (_BOX + _GAP) - _GAP + 2 * _PAD
    link = pool.node.scale_up_link
    network = quantity(pool.network_bytes_per_s, "B/s")
    joined = pool.node.domain > 1 and pool.devices_per_node > 1
    body = 26 + lines * (_BOX + _GAP) + (30 if joined else 6)
    per_row = max(1, 640 // (width + 24))
    across = min(nodes, per_row)
    down = -(-nodes // across)
    total_width = across * (width + 24) - 24
    # One node has no network below it to draw.
    total_height = down * (body + 46) if nodes > 1 else body
    words = (
        f"Pool {pool.name}: {' and '.join(told)} on {nodes_used} of {pool.nodes} "
        f"{'node' if pool.nodes == 1 else 'nodes'} with {pool.devices_per_node} × {pool.device.name} each."
    )
    if joined:
        rate = quantity(link.bandwidth_bytes_per_s, "B/s")
        words += f" Devices of a node are joined by {link.name}, {rate} each way."
    if pool.nodes > 1:
        words += f" Nodes are joined by {pool.scale_out.name}, {network} a device."
    ident = f"place-{escape(pool.name, quote=True)}".replace(" ", "-")
    parts = [
        f'<svg class="chart place" width="{1.2 * total_width:.0f}" '
        f'viewBox="0 0 {total_width} {total_height}" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{ident}-t">Placement</title><desc id="{ident}-d">{escape(words)}</desc>'
    ]
    if nodes > 1:
        for row in range(down):
            y = (row + 1) * (body + 46) - 14
            parts.append(f'<path class="net" d="M10 {y}H{total_width - 10}"/>')
        parts.append(
            f'<text class="tick" x="{total_width - 10}" y="{total_height - 2}" text-anchor="end">'
            f"{escape(pool.scale_out.name)}, {network} a device</text>"
        )
    for node in range(nodes):
        x0 = (node % across) * (width + 24)
        y0 = (node // across) * (body + 46)
        parts += _node(pool, ranks, node, x0, y0, width, body, columns, shown, joined)
        if nodes > 1:
            parts.append(f'<path class="net" d="M{x0 + width // 2} {y0 + body}v32"/>')
    parts.append("</svg>")
    left_out = pool.nodes - nodes
    return {
        "pool": pool.name,
        "words": words,
        "key": _key(ranks),
        "chart": Markup("".join(parts)),
        "left_out": left_out if left_out > 0 else 0,
    }


def _node(
    pool: Pool,
    ranks: list[dict[str, Any] | None],
    node: int,
    x0: int,
    y0: int,
    width: int,
    body: int,
    columns: int,
    shown: int,
    joined: bool,
) -> list[str]:
    parts = [
        f'<rect class="chassis" x="{x0 + 0.5}" y="{y0 + 0.5}" '
        f'width="{width - 1}" height="{body - 1}" rx="8"/>',
        f'<text class="tick" x="{x0 + _PAD}" y="{y0 + 18}">Node {node + 1}</text>',
    ]
    if shown < pool.devices_per_node:
        parts.append(
            f'<text class="tick" x="{x0 + width - _PAD}" y="{y0 + 18}" text-anchor="end">'
            f"{shown} of {pool.devices_per_node} drawn</text>"
        )
    bus = y0 + body - 22
    for slot in range(shown):
        x = x0 + _PAD + (slot % columns) * (_BOX + _GAP)
        y = y0 + 26 + (slot // columns) * (_BOX + _GAP)
        index = node * pool.devices_per_node + slot
        rank = ranks[index] if index < len(ranks) else None
        if joined:
            parts.append(f'<path class="link" d="M{x + _BOX // 2} {y + _BOX}V{bus}"/>')
        css = f"dev rep-{rank['shade']}" if rank else "dev unused"
        tip = f"device {index}: {' '.join(rank['lines'])}" if rank else f"device {index}: not used"
        parts.append(
            f'<rect class="{css}" x="{x}" y="{y}" width="{_BOX}" height="{_BOX}" rx="6">'
            f"<title>{escape(tip)}</title></rect>"
        )
        if rank:
            for line, text in enumerate(rank["lines"]):
                css = "dev-name" if line == 0 else "dev-rank"
                parts.append(
                    f'<text class="{css}" x="{x + _BOX // 2}" y="{y + 22 + 16 * line}" '
                    f'text-anchor="middle">{escape(text)}</text>'
                )
    if joined:
        link = pool.node.scale_up_link
        parts.append(f'<path class="bus" d="M{x0 + _PAD} {bus}H{x0 + width - _PAD}"/>')
        rate = quantity(link.bandwidth_bytes_per_s, "B/s")
        label = f"{link.name} {rate}" if width > 180 else link.name
        parts.append(
            f'<text class="tick" x="{x0 + width // 2}" y="{bus + 15}" '
            f'text-anchor="middle">{escape(label)}</text>'
        )
    return parts
