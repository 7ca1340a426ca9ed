"""Devices and groups made by hand from datasheet figures, so that tests of this room need no catalog."""

from __future__ import annotations

from hardware.device import CommGroup, Device

H100 = Device(
    name="h100-sxm-80gb",
    vendor="nvidia",
    architecture="hopper",
    memory_bytes=85_520_809_984,
    memory_bandwidth_bytes_per_s=3.35e12,
    peak_flops_per_s={
        "fp32": 66.9e12,
        "bf16": 989.4e12,
        "fp16": 989.4e12,
        "fp8": 1978.9e12,
        "int8": 1978.9e12,
    },
    l2_bytes=50 * 2**20,
    sm_count=132,
    boost_clock_hz=1.98e9,
    tdp_w=700.0,
    idle_w=70.0,
    usd_per_hour=2.5,
    memory_nominal_bytes=80 * 10**9,
    scale_up_link="nvlink4",
    host_link="pcie5-x16",
)
A100 = Device(
    name="a100-sxm-80gb",
    vendor="nvidia",
    architecture="ampere",
    memory_bytes=85_175_107_584,
    memory_bandwidth_bytes_per_s=2.039e12,
    peak_flops_per_s={"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12, "int8": 624e12},
    l2_bytes=40 * 2**20,
    sm_count=108,
    boost_clock_hz=1.41e9,
    tdp_w=400.0,
    idle_w=55.0,
    usd_per_hour=1.5,
    memory_nominal_bytes=80 * 10**9,
    scale_up_link="nvlink3",
    host_link="pcie4-x16",
)
B200 = Device(
    name="b200-sxm-180gb",
    vendor="nvidia",
    architecture="blackwell",
    memory_bytes=191_000_000_000,
    memory_bandwidth_bytes_per_s=7.7e12,
    peak_flops_per_s={"bf16": 2.25e15, "fp16": 2.25e15, "fp8": 4.5e15, "fp4": 9.0e15},
    l2_bytes=126 * 2**20,
    sm_count=148,
    boost_clock_hz=1.965e9,
    tdp_w=1000.0,
    idle_w=140.0,
    usd_per_hour=4.0,
    memory_nominal_bytes=180 * 10**9,
    scale_up_link="nvlink5",
    host_link="pcie5-x16",
)
V100 = Device(
    name="v100-sxm2-32gb",
    vendor="nvidia",
    architecture="volta",
    memory_bytes=34_000_000_000,
    memory_bandwidth_bytes_per_s=900e9,
    peak_flops_per_s={"fp32": 15.7e12, "fp16": 125e12},
    l2_bytes=6 * 2**20,
    sm_count=80,
    boost_clock_hz=1.53e9,
    tdp_w=300.0,
    idle_w=40.0,
    usd_per_hour=0.5,
    memory_nominal_bytes=32 * 10**9,
    scale_up_link="nvlink2",
    host_link="pcie3-x16",
)
MI300X = Device(
    name="mi300x-192gb",
    vendor="amd",
    architecture="cdna3",
    memory_bytes=206_000_000_000,
    memory_bandwidth_bytes_per_s=5.3e12,
    peak_flops_per_s={"bf16": 1307e12, "fp16": 1307e12, "fp8": 2615e12, "int8": 2615e12},
    l2_bytes=256 * 2**20,
    sm_count=304,
    boost_clock_hz=2.1e9,
    tdp_w=750.0,
    idle_w=140.0,
    usd_per_hour=3.0,
    memory_nominal_bytes=192 * 10**9,
    scale_up_link="infinity-fabric",
    host_link="pcie5-x16",
)
ALL = (H100, A100, B200, V100, MI300X)


def half(device: Device) -> str:
    return "bf16" if "bf16" in device.peak_flops_per_s else "fp16"


def nvlink(
    size: int, *, bandwidth: float = 450e9, link: str = "nvlink4", per_node: int = 8, sharp: bool = True
) -> CommGroup:
    return CommGroup(
        size=size,
        per_node=min(size, per_node),
        intra_link=link,
        intra_bandwidth_bytes_per_s=bandwidth,
        intra_latency_s=1e-6,
        inter_link="infiniband-400g",
        inter_bandwidth_bytes_per_s=50e9,
        inter_latency_s=3e-6,
        switched=True,
        in_switch_reduction=sharp,
    )
