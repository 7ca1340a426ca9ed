"""One accelerator, as the planner sees it: frozen, in SI units, each number with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Source:
    """Where one number of the catalog comes from."""

    title: str
    date: str  # ISO 8601 date on which the source was published or read
    kind: str  # datasheet | measured | list-price | derived
    url: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a pool (a GPU, a GCD pair presented as one card, a TPU chip).

    `peak_flops_per_s` holds *dense* peaks only (never the 2:4 sparse figure), keyed by
    the format the multiplication runs in: fp32, fp16, bf16, fp8, int8, fp4, int4. A
    format that is missing has no arithmetic of its own on the device; weights may still
    be stored in it and multiplied in a wider one.
    """

    name: str
    vendor: str  # nvidia | amd | intel | google
    architecture: str  # volta, turing, ampere, ada, hopper, blackwell, cdna2, cdna3, ...
    memory_bytes: int  # what the runtime reports as total device memory
    memory_bandwidth_bytes_per_s: float
    peak_flops_per_s: Mapping[str, float]
    l2_bytes: int
    sm_count: int  # streaming multiprocessors, compute units, tensor cores: units a grid is spread over
    boost_clock_hz: float
    tdp_w: float
    idle_w: float
    usd_per_hour: float
    memory_nominal_bytes: int  # the figure on the box
    scale_up_link: str  # catalog name of the link inside a node
    host_link: str  # catalog name of the link to the host
    kernels_like: str = ""  # same die as this device: measured kernels may be shared
    sources: Mapping[str, Source] = field(default_factory=lambda: MappingProxyType({}))

    def peak(self, dtype: str) -> float:
        """Dense peak in FLOP/s of `dtype`; KeyError where the device has none."""
        return self.peak_flops_per_s[dtype]


@dataclass(frozen=True, slots=True)
class CommGroup:
    """What a collective needs to know of the devices it runs over.

    The group is `size` devices, `per_node` of them in each node that it touches.
    Bandwidths are per device and per direction; latency is that of one hop.
    """

    size: int
    per_node: int
    intra_link: str
    intra_bandwidth_bytes_per_s: float
    intra_latency_s: float
    inter_link: str = ""
    inter_bandwidth_bytes_per_s: float = 0.0
    inter_latency_s: float = 0.0
    switched: bool = True  # all-to-all switch inside the node (NVSwitch), not a mesh or PCIe tree
    in_switch_reduction: bool = False  # NVLink SHARP

    @property
    def nodes(self) -> int:
        """Nodes the group spreads over."""
        return -(-self.size // max(1, self.per_node))
