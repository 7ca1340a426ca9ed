"""How long a collective takes over a group of devices.

Inside a node every measured curve is described to 3-12 % by three terms,

    time = alpha + w / (efficiency * B) + mid * sqrt(w / B),

w the bytes each device sends at least once (ring: 2 (n-1)/n of the message for an all-reduce,
(n-1)/n for the rest), B the link's bandwidth per device and direction. The square root stands for
the range in which the number of channels and the protocol still grow with the message. Across
nodes: reduce-scatter inside, all-reduce outside, all-gather inside (NCCL's and every engine's way).
The time never rises with bandwidth. Coefficients: fits of log time on the NCCL and custom
all-reduce tables of aiconfigurator-core 0.12 (Apache-2.0; half precision, `message_size` counts
elements, CUDA-graph rows). `benchmarks/collectives_fit.py` repeats them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from costmodels.ops import Collective, FloatArray
from hardware.device import CommGroup
from hardware.errors import InputError

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "point_to_point")


class Curve(NamedTuple):
    """alpha in s, efficiency of w / B, mid in sqrt(s)."""

    alpha_s: float
    efficiency: float
    mid: float


def _curves(rows: Mapping[int, tuple[float, float, float]]) -> dict[int, Curve]:
    return {n: Curve(a * 1e-6, e, m * 1e-6) for n, (a, e, m) in rows.items()}


#: (link class, collective) -> devices -> (alpha us, efficiency, mid us / sqrt(s)). NCCL: nvlink4 H100
#: (2.29.2), nvlink5 B200 (2.29.2), nvlink3 A100 (2.27.3), pcie4 L40S (2.27.3), pcie5 RTX PRO 6000 (2.29.2).
_NCCL: Mapping[tuple[str, str], Mapping[int, Curve]] = MappingProxyType(
    {
        ("nvlink4", "all_reduce"): _curves(
            {2: (5.91, 0.746, 3952), 4: (9.39, 0.818, 3059), 8: (15.36, 1.102, 4907)}
        ),
        ("nvlink4", "all_gather"): _curves(
            {2: (5.07, 0.639, 4775), 4: (7.04, 0.779, 4229), 8: (10.51, 0.822, 3731)}
        ),
        ("nvlink4", "reduce_scatter"): _curves(
            {2: (5.23, 0.569, 3550), 4: (7.02, 0.732, 3031), 8: (10.26, 0.772, 2168)}
        ),
        ("nvlink4", "all_to_all"): _curves(
            {2: (6.95, 0.791, 5164), 4: (7.46, 0.759, 4216), 8: (8.20, 0.758, 3322)}
        ),
        ("nvlink5", "all_reduce"): _curves(
            {2: (10.01, 0.670, 3579), 4: (14.87, 0.802, 4406), 8: (24.81, 0.893, 6178)}
        ),
        ("nvlink5", "all_gather"): _curves(
            {2: (8.84, 0.598, 4569), 4: (11.32, 0.793, 4950), 8: (16.84, 0.837, 5087)}
        ),
        ("nvlink5", "reduce_scatter"): _curves(
            {2: (8.83, 0.522, 3680), 4: (11.46, 0.732, 4124), 8: (16.12, 0.821, 4855)}
        ),
        ("nvlink5", "all_to_all"): _curves(
            {2: (9.85, 0.458, 5885), 4: (10.58, 0.680, 4947), 8: (11.65, 0.777, 5379)}
        ),
        ("nvlink3", "all_reduce"): _curves(
            {2: (9.60, 0.761, 7236), 4: (13.76, 0.763, 5058), 8: (21.27, 0.771, 4910)}
        ),
        ("nvlink3", "all_gather"): _curves(
            {2: (9.07, 0.586, 7191), 4: (10.70, 0.767, 7840), 8: (14.96, 0.724, 5104)}
        ),
        ("nvlink3", "reduce_scatter"): _curves(
            {2: (8.98, 0.674, 6500), 4: (10.55, 0.791, 6521), 8: (14.38, 0.758, 5079)}
        ),
        ("nvlink3", "all_to_all"): _curves(
            {2: (10.75, 0.651, 6542), 4: (12.06, 0.717, 4951), 8: (12.85, 0.749, 5235)}
        ),
        ("pcie5", "all_reduce"): _curves(
            {2: (5.83, 0.605, 2422), 4: (12.29, 0.413, 2801), 8: (22.75, 0.401, 7511)}
        ),
        ("pcie5", "all_gather"): _curves(
            {2: (5.47, 0.530, 2997), 4: (8.80, 0.384, 2814), 8: (13.54, 0.392, 6545)}
        ),
        ("pcie5", "reduce_scatter"): _curves(
            {2: (5.07, 0.514, 3077), 4: (8.93, 0.383, 2741), 8: (14.03, 0.395, 6214)}
        ),
        ("pcie5", "all_to_all"): _curves(
            {2: (6.53, 0.427, 1786), 4: (7.77, 0.388, 3806), 8: (9.29, 0.290, 7661)}
        ),
        ("pcie4", "all_reduce"): _curves(
            {2: (5.51, 0.657, 3054), 4: (11.30, 0.161, 481), 8: (16.78, 0.047, 15328)}
        ),
        ("pcie4", "all_gather"): _curves(
            {2: (5.52, 0.647, 3031), 4: (8.44, 0.149, 1124), 8: (10.18, 0.038, 13650)}
        ),
        ("pcie4", "reduce_scatter"): _curves(
            {2: (4.97, 0.622, 3128), 4: (7.45, 0.155, 3387), 8: (8.65, 0.052, 23130)}
        ),
        ("pcie4", "all_to_all"): _curves(
            {2: (8.04, 0.749, 3006), 4: (8.65, 0.148, 3777), 8: (5.95, 0.042, 28081)}
        ),
    }
)
#: The engines' own all-reduce inside CUDA graphs (one-shot, two-shot, multimem, NCCL above their
#: limits): vLLM 0.24 (A100 0.14, L40S 0.22), SGLang 0.5.14 (A100 0.5.10), TensorRT-LLM 1.3.0rc20
#: (A100 1.0.0).
_ENGINE: Mapping[tuple[str, str], Mapping[int, Curve]] = MappingProxyType(
    {
        ("nvlink4", "vllm"): _curves({2: (4.18, 0.623, 445), 4: (4.34, 0.773, 2136), 8: (4.55, 1.061, 3331)}),
        ("nvlink4", "sglang"): _curves(
            {2: (2.50, 0.689, 256), 4: (2.52, 0.791, 1812), 8: (3.17, 1.028, 3631)}
        ),
        ("nvlink4", "trtllm"): _curves(
            {2: (2.74, 0.639, 82), 4: (2.66, 0.769, 2632), 8: (2.56, 1.193, 7542)}
        ),
        ("nvlink5", "vllm"): _curves(
            {2: (6.31, 0.693, 5346), 4: (6.48, 0.818, 5617), 8: (7.40, 0.860, 4191)}
        ),
        ("nvlink5", "sglang"): _curves(
            {2: (3.91, 0.594, 827), 4: (4.29, 0.701, 2662), 8: (4.55, 0.849, 4582)}
        ),
        ("nvlink5", "trtllm"): _curves({2: (4.78, 0.561, 0), 4: (4.74, 0.658, 2333), 8: (4.70, 0.893, 7325)}),
        ("nvlink3", "vllm"): _curves({2: (4.97, 0.604, 109), 4: (4.93, 0.715, 2714), 8: (5.38, 0.769, 4691)}),
        ("nvlink3", "sglang"): _curves(
            {2: (5.14, 0.621, 142), 4: (4.98, 0.725, 2550), 8: (5.41, 0.776, 4157)}
        ),
        ("nvlink3", "trtllm"): _curves(
            {2: (3.80, 0.618, 2229), 4: (3.78, 0.744, 5228), 8: (4.04, 0.866, 9835)}
        ),
        ("pcie4", "vllm"): _curves({2: (5.32, 0.597, 0), 4: (12.66, 0.119, 0), 8: (23.30, 0.063, 0)}),
        ("pcie4", "sglang"): _curves({2: (5.47, 0.594, 0), 4: (13.38, 0.116, 0), 8: (25.19, 0.058, 0)}),
        ("pcie4", "trtllm"): _curves(
            {2: (6.24, 0.655, 3023), 4: (11.51, 0.159, 1650), 8: (16.33, 0.064, 22048)}
        ),
        ("pcie5", "vllm"): _curves({2: (4.28, 0.594, 78), 4: (11.64, 0.477, 4389), 8: (22.99, 0.395, 7556)}),
        ("pcie5", "sglang"): _curves({2: (4.49, 0.606, 0), 4: (12.09, 0.479, 4399), 8: (23.17, 0.400, 7532)}),
        ("pcie5", "trtllm"): _curves(
            {2: (6.08, 0.608, 2495), 4: (12.20, 0.389, 2603), 8: (23.11, 0.393, 7540)}
        ),
    }
)
#: A ring or tree without reduction in the switch sends every byte itself.
_PLAIN_LIMIT = 0.88
#: A device pair, NCCL send/receive (H100 NVLink, APEX+ communication profile).
_SEND = Curve(6e-6, 0.78, 2000e-6)
#: Across nodes, GPUDirect RDMA: start of an NCCL kernel, and what a hop costs besides the wire; 0.85-0.92
#: of line rate is what nccl-tests reach on large messages.
_INTER_START_S = 8e-6
_INTER_HOP_S = 3e-6
_INTER_EFFICIENCY = 0.85


def link_class(group: CommGroup) -> tuple[str, bool]:
    """The measured class that stands for the group's inner link, and whether it is that very link."""
    name = group.intra_link.lower()
    found = re.search(r"nvlink[^0-9]*(\d)", name)
    if found:
        generation = int(found.group(1))
        return f"nvlink{min(5, max(3, generation))}", 3 <= generation <= 5
    if "nvlink" in name or "nvl" in name:
        return "nvlink4", False
    if "pcie" in name or (not group.switched and group.intra_bandwidth_bytes_per_s < 70e9):
        found = re.search(r"(?:pcie|gen)[^0-9]*(\d)", name)
        generation = int(found.group(1)) if found else 4
        return ("pcie5" if generation >= 5 else "pcie4"), found is not None and generation in (4, 5)
    return "nvlink4", False


def wire_share(kind: str, size: int) -> float:
    """Bytes each device must send, as a share of the message, without in-switch reduction."""
    if size <= 1:
        return 0.0
    if kind == "point_to_point":
        return 1.0
    return (2.0 if kind == "all_reduce" else 1.0) * (size - 1) / size


def _curve(table: Mapping[int, Curve], size: int) -> Curve:
    """Between measured sizes linear in n; beyond, alpha grows with the depth of a tree."""
    sizes = sorted(table)
    if size in table:
        return table[size]
    if size < sizes[0]:
        return table[sizes[0]]
    if size > sizes[-1]:
        last = table[sizes[-1]]
        return last._replace(alpha_s=last.alpha_s * (1.0 + 0.5 * np.log2(size / sizes[-1])))
    above = next(n for n in sizes if n > size)
    below = max(n for n in sizes if n < size)
    part = (size - below) / (above - below)
    low, high = table[below], table[above]
    return Curve(*(float(a + part * (b - a)) for a, b in zip(low, high, strict=True)))


def _inside(kind: str, message: FloatArray, size: int, group: CommGroup, engine: str) -> FloatArray:
    if size <= 1:
        return np.zeros_like(message)
    name, _ = link_class(group)
    if kind == "point_to_point":
        curve = _SEND
    else:
        table = _ENGINE.get((name, engine)) if kind == "all_reduce" else None
        curve = _curve(table or _NCCL[(name, kind)], size)
    limit = 1.25 if group.in_switch_reduction and kind == "all_reduce" else _PLAIN_LIMIT
    seconds = wire_share(kind, size) * message / group.intra_bandwidth_bytes_per_s
    return np.asarray(
        curve.alpha_s + seconds / min(curve.efficiency, limit) + curve.mid * np.sqrt(seconds),
        dtype=np.float64,
    )


def _outside(kind: str, message: FloatArray, nodes: int, group: CommGroup) -> FloatArray:
    """One device per node, `nodes` of them."""
    if nodes <= 1:
        return np.zeros_like(message)
    depth = 1 if kind in ("point_to_point", "all_to_all") else int(np.ceil(np.log2(nodes)))
    hops = 2 * depth if kind == "all_reduce" else depth
    seconds = wire_share(kind, nodes) * message / group.inter_bandwidth_bytes_per_s
    alpha = _INTER_START_S + hops * (_INTER_HOP_S + group.inter_latency_s)
    return np.asarray(alpha + seconds / _INTER_EFFICIENCY, dtype=np.float64)


def _check(op: Collective) -> CommGroup:
    group = op.group
    if op.kind not in KINDS:
        raise InputError(
            "collective.kind", f"unknown collective {op.kind!r}", "known are " + ", ".join(KINDS)
        )
    if not isinstance(group, CommGroup):
        raise InputError("collective.group", f"a CommGroup is needed, not {type(group).__name__}")
    if group.size > 1 and group.per_node > 1 and group.intra_bandwidth_bytes_per_s <= 0:
        raise InputError("collective.group", "the link inside the node has no bandwidth")
    if group.nodes > 1 and group.inter_bandwidth_bytes_per_s <= 0:
        raise InputError("collective.group", "the group spans nodes, but no link between nodes is given")
    return group


def collective_time(op: Collective, engine: str = "") -> tuple[FloatArray, str]:
    """(seconds, source) of a collective; 0 for a group of one or an empty message.

    `source` starts with "measured" when the link class and size were measured, else says from
    what it was derived. Raises InputError for an unknown kind or a group without its link.
    """
    group = _check(op)
    message = np.asarray(op.message_bytes, dtype=np.float64)
    if group.size <= 1:
        return np.zeros_like(message), "no communication"
    inner = min(group.size, max(1, group.per_node))
    nodes = group.nodes
    name, exact = link_class(group)
    if nodes <= 1:
        time = _inside(op.kind, message, group.size, group, engine)
        exact = exact and group.size in (2, 4, 8) and op.kind != "point_to_point"
        who = engine if op.kind == "all_reduce" and (name, engine) in _ENGINE else "NCCL"
        source = f"{'measured' if exact else 'transferred'}: {who} on {name}, aiconfigurator-core 0.12"
    else:
        source = f"alpha-beta between {nodes} nodes ({group.inter_link}), {name} curves inside"
        if op.kind == "point_to_point":
            time = _outside(op.kind, message, 2, group)
        elif op.kind == "all_to_all":
            # What leaves the node crosses its device's own adapter, the rest goes inside at the same time.
            away = message * (group.size - inner) / max(1, group.size - 1)
            inside = _inside(op.kind, message - away, inner, group, "")
            time = np.maximum(inside, _outside(op.kind, away * nodes / max(1, nodes - 1), nodes, group))
        elif op.kind == "all_reduce":
            time = _outside("all_reduce", message / inner, nodes, group)
            if inner > 1:
                time = time + _inside("reduce_scatter", message, inner, group, "")
                time = time + _inside("all_gather", message, inner, group, "")
        else:
            time = _outside(op.kind, message / inner, nodes, group)
            time = time + _inside(op.kind, message, inner, group, "")
    return np.where(message > 0, time, 0.0), source


def collective_bound(op: Collective) -> FloatArray:
    """Least seconds: what must cross the slowest link at its full rate (halved for an all-reduce
    whose switch adds up)."""
    group = _check(op)
    message = np.asarray(op.message_bytes, dtype=np.float64)
    if group.size <= 1:
        return np.zeros_like(message)
    inner = min(group.size, max(1, group.per_node))
    if group.nodes <= 1:
        share = wire_share(op.kind, group.size)
        if op.kind == "all_reduce" and group.in_switch_reduction:
            share = min(share, 1.0)
        return message * share / group.intra_bandwidth_bytes_per_s
    if op.kind == "point_to_point":
        return message / group.inter_bandwidth_bytes_per_s
    if op.kind == "all_to_all":
        return message * (group.size - inner) / max(1, group.size - 1) / group.inter_bandwidth_bytes_per_s
    return message / inner * wire_share(op.kind, group.nodes) / group.inter_bandwidth_bytes_per_s


def collective_interval(op: Collective) -> tuple[float, float]:
    """(low, high) factors of the 90 % interval: residuals of the fit, wider where nothing was measured."""
    name, exact = link_class(op.group)
    if op.group.nodes > 1:
        return 0.7, 1.7
    if name.startswith("pcie"):
        return (0.75, 1.4) if exact else (0.6, 2.0)
    return (0.85, 1.25) if exact and op.group.size <= 8 else (0.7, 1.5)
