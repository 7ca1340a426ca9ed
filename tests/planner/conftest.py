"""Small questions asked of the real rooms: catalog devices, catalog models, short workloads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from planner.pipeline import Planner


def request_of(
    model: str = "llama-3.1-8b",
    device: str = "h100-sxm-80gb",
    devices: int = 2,
    *,
    rate_rps: float = 4.0,
    requests: int = 60,
    inputs: int = 512,
    outputs: int = 64,
    engine: str = "vllm",
    **more: Any,
) -> dict[str, Any]:
    """A planning request; `more` replaces or adds top-level fields."""
    return {
        "model": model,
        "engine": {"name": engine},
        "cluster": {"pools": [{"device": device, "nodes": 1, "devices_per_node": devices}]},
        "workload": {
            "synthetic": {
                "arrivals": {"process": "poisson", "rate_rps": rate_rps},
                "requests": requests,
                "input_tokens": {"distribution": "lognormal", "mean": inputs, "cv": 0.5},
                "output_tokens": {"distribution": "constant", "value": outputs},
                "seed": 1,
            }
        },
        **more,
    }


@pytest.fixture(scope="session")
def planner() -> Planner:
    """One planner for all tests, so that step tables are compiled once."""
    from planner.pipeline import Planner

    return Planner()
