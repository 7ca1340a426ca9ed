"""Where devices sit and how they reach each other.

Groups are answered in closed form (a cluster of a thousand devices costs nothing to build);
`Cluster.graph` makes the same thing a networkx graph, and `path_group` answers from that graph by
widest paths, the second algorithm that tests hold the first against.

A device reaches another over the scale-up link when both are in one *domain*, over PCIe when they
share a chassis only, and else over its share of the chassis's network ports: nics x port bandwidth /
devices in the chassis, at most one port.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware.catalog import Catalog, Link, NodeType, number, read_file
from hardware.device import CommGroup, Device
from hardware.errors import InputError

if TYPE_CHECKING:
    import networkx as nx

MAX_DEVICES = 65_536


@dataclass(frozen=True, eq=True)
class Pool:
    """Devices of one kind: `nodes` chassis of `devices_per_node`, numbered chassis by chassis."""

    name: str
    device: Device
    nodes: int
    devices_per_node: int
    node: NodeType
    host_link: Link
    scale_out: Link

    def __hash__(self) -> int:
        shape = (self.nodes, self.devices_per_node)
        return hash((self.name, self.device.name, shape, self.node.name, self.scale_out.name))

    @property
    def devices(self) -> int:
        """All devices of the pool."""
        return self.nodes * self.devices_per_node

    def chassis(self, index: int) -> int:
        """The chassis a device is in."""
        return index // self.devices_per_node

    def domain(self, index: int) -> tuple[int, int]:
        """The scale-up domain a device is in, as (chassis or rack, part of it)."""
        size = self.node.domain
        if size > self.node.devices_per_node and self.devices_per_node == self.node.devices_per_node:
            return index // size, -1  # the link leaves the chassis
        chassis = self.chassis(index)
        return chassis, (index - chassis * self.devices_per_node) // size

    @property
    def network_bytes_per_s(self) -> float:
        """One device's share of its chassis's network ports."""
        port = self.scale_out.bandwidth_bytes_per_s
        return min(port, port * self.node.nics / self.devices_per_node)


@dataclass(frozen=True, eq=False)
class Cluster:
    """Pools of devices and the network between their nodes."""

    pools: tuple[Pool, ...]
    inter_node: Link | None = None

    def pool(self, name: str) -> Pool:
        """A pool by name; KeyError when there is none."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise KeyError(name)

    @property
    def devices(self) -> int:
        """All devices of all pools."""
        return sum(pool.devices for pool in self.pools)

    def group(self, pool_name: str, size: int, stride: int = 1, start: int = 0) -> CommGroup:
        """The group of devices start, start + stride, ... of a pool.

        Bandwidth of a level is that of its slowest pair. Raises ValueError outside the pool.
        """
        return _group(self.pool(pool_name), size, stride, start)

    def fits(self, pool_name: str, size: int) -> list[tuple[int, ...]]:
        """Where a group of `size` neighbours stays inside one scale-up domain: aligned placements.

        Each is the group's devices; empty when no domain is that large.
        """
        pool = self.pool(pool_name)
        found = []
        for start in range(0, pool.devices - size + 1, size):
            members = tuple(range(start, start + size))
            if len({pool.domain(i) for i in members}) == 1:
                found.append(members)
        return found

    def point_to_point(self, pool_a: str, index_a: int, pool_b: str, index_b: int) -> CommGroup:
        """The pair of two devices, of one pool or of two."""
        first, second = self.pool(pool_a), self.pool(pool_b)
        if pool_a == pool_b:
            if index_a == index_b:
                raise ValueError("a device does not talk to itself")
            low, high = sorted((index_a, index_b))
            return self.group(pool_a, 2, stride=high - low, start=low)
        link = self.inter_node or first.scale_out
        return CommGroup(
            size=2,
            per_node=1,
            intra_link=first.node.scale_up_link.name,
            intra_bandwidth_bytes_per_s=first.node.scale_up_link.bandwidth_bytes_per_s,
            intra_latency_s=first.node.scale_up_link.latency_s,
            inter_link=link.name,
            inter_bandwidth_bytes_per_s=min(first.network_bytes_per_s, second.network_bytes_per_s),
            inter_latency_s=link.latency_s,
        )

    # --- the same as a graph -------------------------------------------------------------------

    def graph(self) -> nx.Graph:
        """Devices, scale-up switches, hosts and the network as a graph.

        Edges carry `bandwidth_bytes_per_s` (per device and direction), `latency_s` and `link`. A hop
        device to device is two edges through a switch or host, so each carries half the latency.
        """
        import networkx as nx

        graph = nx.Graph()

        def edge(a: Any, b: Any, link: Link, bandwidth: float | None = None) -> None:
            graph.add_edge(
                a,
                b,
                bandwidth_bytes_per_s=bandwidth or link.bandwidth_bytes_per_s,
                latency_s=link.latency_s / 2,
                link=link.name,
            )

        for pool in self.pools:
            for i in range(pool.devices):
                device = ("device", pool.name, i)
                graph.add_node(device, device=pool.device.name, chassis=pool.chassis(i))
                if pool.node.domain > 1:
                    edge(device, ("switch", pool.name, *pool.domain(i)), pool.node.scale_up_link)
                edge(device, ("host", pool.name, pool.chassis(i)), pool.host_link)
                edge(device, ("network",), pool.scale_out, pool.network_bytes_per_s)
        return graph

    def path_group(self, pool_name: str, members: Sequence[int]) -> CommGroup:
        """The group of any devices of a pool, by widest paths on the graph (slow, for tests and oddities)."""
        import networkx as nx

        pool = self.pool(pool_name)
        graph = self.graph()
        islands = Counter(_island(pool, i) for i in members)
        # The widest path between two nodes of a graph lies on its maximum spanning tree; of all paths
        # that wide, the nearest counts.
        tree = nx.maximum_spanning_tree(graph, weight="bandwidth_bytes_per_s")
        intra: tuple[float, float, str] | None = None
        inter: tuple[float, float, str] | None = None
        for a in members:
            widest = nx.single_source_shortest_path(tree, ("device", pool_name, a))
            for b in members:
                if b <= a:
                    continue
                path = widest["device", pool_name, b]
                slowest = min(
                    (graph.edges[edge] for edge in pairwise(path)), key=lambda e: e["bandwidth_bytes_per_s"]
                )
                width = slowest["bandwidth_bytes_per_s"]
                wide = nx.subgraph_view(
                    graph, filter_edge=lambda u, v, w=width: graph.edges[u, v]["bandwidth_bytes_per_s"] >= w
                )
                latency_s = nx.shortest_path_length(
                    wide, ("device", pool_name, a), ("device", pool_name, b), weight="latency_s"
                )
                found = (width, float(latency_s), slowest["link"])
                if _island(pool, a) == _island(pool, b):
                    intra = found if intra is None or found[0] < intra[0] else intra
                else:
                    inter = found if inter is None or found[0] < inter[0] else inter
        own = pool.node.scale_up_link if pool.node.domain > 1 else pool.host_link
        low = intra or (own.bandwidth_bytes_per_s, own.latency_s, own.name)
        switched = low[2] == pool.node.scale_up_link.name and pool.node.scale_up_link.switched
        return CommGroup(
            size=len(members),
            per_node=max(islands.values()),
            intra_link=low[2],
            intra_bandwidth_bytes_per_s=low[0],
            intra_latency_s=low[1],
            inter_link=inter[2] if inter else "",
            inter_bandwidth_bytes_per_s=inter[0] if inter else 0.0,
            inter_latency_s=inter[1] if inter else 0.0,
            switched=switched,
            in_switch_reduction=switched and pool.node.scale_up_link.in_switch_reduction,
        )


def _island(pool: Pool, index: int) -> tuple[int, ...]:
    """Devices of one island reach each other without the network: a chassis, or a larger domain."""
    domain = pool.domain(index)
    return domain if domain[1] == -1 else (domain[0],)


@lru_cache(maxsize=65_536)
def _group(pool: Pool, size: int, stride: int, start: int) -> CommGroup:
    if size < 1 or stride < 1 or start < 0 or start + (size - 1) * stride >= pool.devices:
        place = f"{size} with stride {stride} from {start}"
        raise ValueError(f"a group of {place} leaves pool {pool.name} of {pool.devices}")
    members = range(start, start + size * stride, stride)
    islands: dict[tuple[int, ...], set[tuple[int, int]]] = {}
    counts: Counter[tuple[int, ...]] = Counter()
    for i in members:
        island = _island(pool, i)
        counts[island] += 1
        islands.setdefault(island, set()).add(pool.domain(i))
    scale_up = pool.node.scale_up_link
    # Inside an island the slowest pair decides: PCIe as soon as one spans two domains.
    over_host = pool.node.domain == 1 or any(len(domains) > 1 for domains in islands.values())
    link = pool.host_link if over_host else scale_up
    switched = not over_host and scale_up.switched
    spread = len(islands) > 1
    return CommGroup(
        size=size,
        per_node=max(counts.values()),
        intra_link=link.name,
        intra_bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
        intra_latency_s=link.latency_s,
        inter_link=pool.scale_out.name if spread else "",
        inter_bandwidth_bytes_per_s=pool.network_bytes_per_s if spread else 0.0,
        inter_latency_s=pool.scale_out.latency_s if spread else 0.0,
        switched=switched,
        in_switch_reduction=switched and scale_up.in_switch_reduction,
    )


# --- from a request ------------------------------------------------------------------------------


def build_cluster(
    pools: Sequence[Mapping[str, Any]],
    inter_node: str | None,
    catalog: Catalog,
    *,
    base_dir: Path | None = None,
    path: str = "cluster",
) -> Cluster:
    """A cluster from `{name, device, nodes, devices_per_node}` or `{topology: file}` pools.

    A topology file holds `cluster` tables: named clusters, each with `pools` of the same form and an
    optional `inter_node`. `cluster:NAME` stands for a cluster of the catalog. Raises InputError with
    the dotted path of what is wrong.
    """
    if not isinstance(pools, Sequence) or isinstance(pools, str) or not pools:
        raise InputError(f"{path}.pools", "at least one pool is required")
    flat: list[tuple[Mapping[str, Any], str]] = []
    for index, row in enumerate(pools):
        where = f"{path}.pools[{index}]"
        if not isinstance(row, Mapping):
            raise InputError(where, "a pool is a mapping of name, device, nodes and devices_per_node")
        if row.get("topology") is None:
            flat.append((row, where))
            continue
        for cluster in _topology(row["topology"], catalog, base_dir, f"{where}.topology").values():
            inter_node = inter_node or cluster.get("inter_node")
            inner = cluster.get("pools")
            if not isinstance(inner, list):
                raise InputError(f"{where}.topology", "its cluster has no list of pools")
            flat += [(item, f"{where}.topology.pools[{i}]") for i, item in enumerate(inner)]
    network = catalog.link(inter_node, f"{path}.inter_node.kind") if inter_node else None
    built: list[Pool] = []
    names: set[str] = set()
    for row, where in flat:
        pool = _pool(row, network, catalog, where, default=f"pool{len(built)}" if built else "main")
        if pool.name in names:
            raise InputError(f"{where}.name", f"two pools are called '{pool.name}'")
        names.add(pool.name)
        built.append(pool)
    total = sum(pool.devices for pool in built)
    if total > MAX_DEVICES:
        raise InputError(f"{path}.pools", f"{total} devices are more than the {MAX_DEVICES} planned at most")
    return Cluster(tuple(built), network)


def _topology(
    value: Any, catalog: Catalog, base_dir: Path | None, where: str
) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(value, (str, Path)):
        raise InputError(where, "must be the path of a file or cluster:NAME")
    text = str(value)
    if text.startswith("cluster:"):
        name = text.removeprefix("cluster:").strip().lower()
        if name not in catalog.clusters:
            known = ", ".join(catalog.clusters) or "none"
            raise InputError(where, f"unknown cluster '{name[:80]}'", f"known: {known}")
        return {name: catalog.clusters[name]}
    found = Path(text) if Path(text).is_absolute() else (base_dir or Path.cwd()) / text
    clusters = read_file(found).get("cluster", {})
    if len(clusters) != 1:
        raise InputError(where, f"the file names {len(clusters)} clusters; it must name one")
    return clusters


def _pool(row: Any, network: Link | None, catalog: Catalog, where: str, *, default: str) -> Pool:
    if not isinstance(row, Mapping):
        raise InputError(where, "a pool is a mapping of name, device, nodes and devices_per_node")
    for key in row:
        if key not in ("name", "device", "nodes", "devices_per_node", "node"):
            raise InputError(f"{where}.{str(key)[:80]}", "unknown field")
    name = row.get("name", default)
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}.name", f"must be a text that is not empty, not {name!r:.80}")
    if row.get("device") is None:
        raise InputError(f"{where}.device", "this field is required")
    device = catalog.device(row["device"], f"{where}.device")
    node = catalog.node(row["node"], f"{where}.node") if row.get("node") else catalog.default_node(device)
    numbers = {}
    for key, usual in (("nodes", 1), ("devices_per_node", node.devices_per_node)):
        value = row.get(key, usual)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputError(f"{where}.{key}", f"must be a whole number, not {value!r}"[:200])
        if value < 1:
            raise InputError(f"{where}.{key}", f"must be at least 1, not {value}")
        numbers[key] = int(number({key: value}, key, where))
    most = max(node.devices_per_node, node.domain)
    if numbers["devices_per_node"] > most:
        raise InputError(
            f"{where}.devices_per_node",
            f"a {node.name} node holds at most {most} {device.name}, not {numbers['devices_per_node']}",
            "use more nodes, or name another node type",
        )
    return Pool(
        name.strip(),
        device,
        numbers["nodes"],
        numbers["devices_per_node"],
        node,
        catalog.link(device.host_link),
        network or node.scale_out_link,
    )
