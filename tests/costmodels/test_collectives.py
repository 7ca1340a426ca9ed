"""Collectives: limits, monotonicity, hierarchy, and the measured points they were fitted to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodels import Collective, collective_time, roofline_bound
from costmodels.collectives import KINDS
from hardware import InputError
from tests.costmodels.devices import H100, nvlink

kinds = st.sampled_from(KINDS)
engines = st.sampled_from(["", "vllm", "sglang", "trtllm"])


@settings(max_examples=150, deadline=None)
@given(
    kind=kinds,
    engine=engines,
    size=st.sampled_from([2, 3, 4, 6, 8, 16, 32, 72]),
    per_node=st.sampled_from([1, 2, 4, 8]),
    link=st.sampled_from(["nvlink3", "nvlink4", "nvlink5", "pcie4-x16", "pcie5-x16", "infinity-fabric"]),
    message=st.floats(1, 1e9),
    more=st.floats(1.0, 8.0),
    sharp=st.booleans(),
)
def test_faster_links_and_smaller_messages_never_slow(
    kind: str, engine: str, size: int, per_node: int, link: str, message: float, more: float, sharp: bool
) -> None:
    group = nvlink(size, link=link, per_node=per_node, sharp=sharp)
    base = float(collective_time(Collective(kind, message, group), engine)[0])
    faster = replace(group, intra_bandwidth_bytes_per_s=group.intra_bandwidth_bytes_per_s * more)
    wider = replace(group, inter_bandwidth_bytes_per_s=group.inter_bandwidth_bytes_per_s * more)
    nearer = replace(group, inter_latency_s=group.inter_latency_s / more)
    for better in (faster, wider, nearer):
        assert float(collective_time(Collective(kind, message, better), engine)[0]) <= base * (1 + 1e-12)
    assert float(collective_time(Collective(kind, message * more, group), engine)[0]) >= base * (1 - 1e-12)
    assert base >= float(roofline_bound(Collective(kind, message, group), H100))


@given(kind=kinds, message=st.floats(0, 1e9))
def test_alone_costs_nothing(kind: str, message: float) -> None:
    assert float(collective_time(Collective(kind, message, nvlink(1)))[0]) == 0.0
    assert float(collective_time(Collective(kind, 0.0, nvlink(8)))[0]) == 0.0


@pytest.mark.parametrize(
    ("engine", "size", "message", "micros"),
    [
        ("vllm", 2, 4096, 4.3),
        ("vllm", 4, 2**19, 11.4),
        ("vllm", 8, 2**21, 19.4),
        ("sglang", 8, 65536, 4.8),
        ("sglang", 4, 2**26, 327.9),
        ("", 8, 2**20, 25.4),
        ("", 8, 2**29, 2111.1),
        ("", 2, 2**24, 82.2),
        ("", 4, 2**22, 42.2),
    ],
)
def test_h100_all_reduce_measurements(engine: str, size: int, message: int, micros: float) -> None:
    time, source = collective_time(Collective("all_reduce", message, nvlink(size)), engine)
    assert source.startswith("measured")
    assert float(time) * 1e6 == pytest.approx(micros, rel=0.25)


@pytest.mark.parametrize(
    ("size_kb", "micros"),
    [(1, 6), (1024, 12), (2048, 15), (8192, 32), (32768, 102), (131072, 379), (262144, 738)],
)
def test_h100_send_measurements(size_kb: int, micros: float) -> None:
    """A pair of H100s over NVLink (APEX+ communication profile)."""
    time, _ = collective_time(Collective("point_to_point", size_kb * 1024.0, nvlink(2)))
    assert float(time) * 1e6 == pytest.approx(micros, rel=0.25)


def test_crossing_nodes_costs_more() -> None:
    for kind in KINDS:
        inside = collective_time(Collective(kind, 1e7, nvlink(8)))[0]
        across = collective_time(Collective(kind, 1e7, nvlink(16)))[0]
        assert float(across) > float(inside)


def test_in_switch_reduction_helps_large_messages() -> None:
    plain = collective_time(Collective("all_reduce", 1e9, nvlink(8, sharp=False)))[0]
    assert float(collective_time(Collective("all_reduce", 1e9, nvlink(8)))[0]) < 0.9 * float(plain)


def test_vectorised_and_refusals() -> None:
    sizes = np.array([0.0, 1e3, 1e6, 1e9])
    times, _ = collective_time(Collective("all_gather", sizes, nvlink(4)))
    assert times.shape == sizes.shape
    assert times[0] == 0
    with pytest.raises(InputError, match="unknown collective"):
        collective_time(Collective("gather", 1.0, nvlink(2)))
    with pytest.raises(InputError, match="spans nodes"):
        collective_time(Collective("all_reduce", 1.0, replace(nvlink(16), inter_bandwidth_bytes_per_s=0.0)))
