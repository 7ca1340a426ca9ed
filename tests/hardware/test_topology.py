"""Topology: closed forms against widest paths on the graph, placements, and bad clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import Cluster, InputError, build_cluster, load_catalog

CATALOG = load_catalog()


def cluster(device: str = "h100-sxm-80gb", nodes: int = 2, inter: str | None = None, **more: Any) -> Cluster:
    return build_cluster([{"name": "main", "device": device, "nodes": nodes, **more}], inter, CATALOG)


def test_inside_a_node_it_is_the_scale_up_link() -> None:
    group = cluster().group("main", 8)
    assert (group.per_node, group.nodes, group.intra_link) == (8, 1, "nvlink4")
    assert group.intra_bandwidth_bytes_per_s == 450e9
    assert group.switched
    assert group.in_switch_reduction
    assert group.inter_bandwidth_bytes_per_s == 0


def test_across_nodes_each_device_has_its_share_of_the_ports() -> None:
    group = cluster(inter="infiniband-400g").group("main", 16)
    assert (group.per_node, group.nodes) == (8, 2)
    assert group.inter_bandwidth_bytes_per_s == 50e9
    shared = cluster("l40s").group("main", 16)
    assert shared.inter_bandwidth_bytes_per_s == pytest.approx(2 * 12.5e9 / 8)
    # Fewer devices than ports: a device drives one port.
    assert cluster(devices_per_node=4).group("main", 8).inter_bandwidth_bytes_per_s == 50e9


def test_rack_scale_domain_joins_trays() -> None:
    rack = cluster("gb200-186gb", nodes=18)
    assert rack.group("main", 72).per_node == 72
    assert rack.group("main", 8).intra_link == "nvlink5"
    assert len(rack.fits("main", 72)) == 1
    assert cluster("gb200-186gb", nodes=36).group("main", 144).nodes == 2


def test_bridged_pairs_fall_back_to_pcie() -> None:
    pairs = cluster("h100-nvl-94gb", nodes=1)
    assert pairs.group("main", 2).intra_link == "nvlink4-bridge"
    assert pairs.group("main", 4).intra_link == "pcie5-x16"
    assert pairs.fits("main", 2) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert pairs.fits("main", 4) == []
    assert len(cluster().fits("main", 8)) == 2


def test_between_pools_the_slower_share_counts() -> None:
    both = build_cluster(
        [{"name": "p", "device": "h100-sxm-80gb"}, {"name": "d", "device": "l40s"}], None, CATALOG
    )
    pair = both.point_to_point("p", 0, "d", 3)
    assert pair.inter_bandwidth_bytes_per_s == pytest.approx(2 * 12.5e9 / 8)
    assert both.point_to_point("p", 0, "p", 1).intra_link == "nvlink4"
    with pytest.raises(ValueError, match="itself"):
        both.point_to_point("p", 1, "p", 1)


@given(
    st.sampled_from(
        ["h100-sxm-80gb", "h100-nvl-94gb", "h200-nvl-141gb", "l40s", "gb200-186gb", "mi300x-192gb", "t4"]
    ),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 9),
    st.integers(0, 5),
)
def test_closed_form_equals_widest_paths(device: str, nodes: int, size: int, stride: int, start: int) -> None:
    found = cluster(device, nodes)
    if start + (size - 1) * stride >= found.devices:
        with pytest.raises(ValueError, match="leaves pool"):
            found.group("main", size, stride, start)
        return
    members = [start + k * stride for k in range(size)]
    closed, paths = found.group("main", size, stride, start), found.path_group("main", members)
    if closed.per_node == 1:
        # Nobody shares an island, so the inner link is not used and the two may name different ones.
        assert (closed.size, closed.per_node, closed.inter_link) == (
            paths.size,
            paths.per_node,
            paths.inter_link,
        )
        assert closed.inter_bandwidth_bytes_per_s == paths.inter_bandwidth_bytes_per_s
    else:
        assert closed == paths


@given(st.integers(2, 16), st.floats(1.0, 500.0), st.floats(1.0, 4.0))
def test_faster_links_never_slow_a_group(size: int, base: float, factor: float) -> None:
    import dataclasses

    usual = cluster()
    pool = usual.pools[0]
    for field in ("host_link", "scale_out"):
        link = dataclasses.replace(getattr(pool, field), bandwidth_bytes_per_s=base * 1e9)
        faster = dataclasses.replace(link, bandwidth_bytes_per_s=base * factor * 1e9)
        slow = Cluster((dataclasses.replace(pool, **{field: link}),)).group("main", size)
        fast = Cluster((dataclasses.replace(pool, **{field: faster}),)).group("main", size)
        assert fast.intra_bandwidth_bytes_per_s >= slow.intra_bandwidth_bytes_per_s
        assert fast.inter_bandwidth_bytes_per_s >= slow.inter_bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("pool", "inter", "message"),
    [
        ({"device": "h101"}, None, r"cluster\.pools\[0\]\.device: unknown device 'h101'"),
        ({}, None, r"cluster\.pools\[0\]\.device: this field is required"),
        ({"device": 3}, None, r"device: a device is named by text, not int"),
        ({"device": "l4", "nodes": 0}, None, r"cluster\.pools\[0\]\.nodes: must be at least 1, not 0"),
        ({"device": "l4", "nodes": True}, None, r"nodes: must be a whole number, not True"),
        ({"device": "l4", "nodes": 1.5}, None, r"nodes: must be a whole number"),
        (
            {"device": "l4", "devices_per_node": 9},
            None,
            r"devices_per_node: a pcie4-server node holds at most 8 l4",
        ),
        ({"device": "l4", "gpus": 9}, None, r"pools\[0\]\.gpus: unknown field"),
        ({"device": "l4"}, "token-ring", r"cluster\.inter_node\.kind: unknown link 'token-ring'"),
        ({"device": "l4", "nodes": 10**6}, None, r"8000000 devices are more than"),
        ({"topology": "cluster:none"}, None, r"topology: unknown cluster 'none'"),
    ],
)
def test_wrong_pools_are_refused(pool: dict[str, Any], inter: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_cluster([pool], inter, CATALOG)


def test_two_pools_of_one_name() -> None:
    with pytest.raises(InputError, match=r"pools\[1\]\.name: two pools are called 'a'"):
        build_cluster([{"name": "a", "device": "l4"}] * 2, None, CATALOG)


def test_topology_file_gives_a_whole_cluster(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(
        "clusters:\n  lab:\n    inter_node: roce-100g\n    pools:\n"
        "      - {name: fast, device: h100-sxm-80gb, nodes: 2}\n"
        "      - {name: slow, device: l4, devices_per_node: 4}\n"
    )
    lab = build_cluster([{"topology": "lab.yaml"}], None, CATALOG, base_dir=tmp_path)
    assert [pool.name for pool in lab.pools] == ["fast", "slow"]
    assert lab.pool("fast").network_bytes_per_s == 12.5e9
    known = load_catalog([file])
    same = build_cluster([{"topology": "cluster:lab"}], None, known)
    assert same.devices == lab.devices == 20


def test_thousand_devices_are_built_at_once() -> None:
    large = cluster(nodes=128)
    assert large.devices == 1024
    assert large.group("main", 1024).nodes == 128
