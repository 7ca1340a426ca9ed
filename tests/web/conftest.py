"""One application with a planner of its own, and one real result, for all page tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.settings import Settings
from planner import Planner
from web.app import create_app

REQUEST: dict[str, Any] = {
    "model": "llama-3.2-1b",
    "cluster": {"pools": [{"name": "main", "device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 2}]},
    "workload": {"synthetic": {"preset": "chat", "requests": 40}},
    "slo": {"ttft_s": {"p95": 1.0}},
    "objectives": ["latency", "energy", "cost"],
    "space": {"max_num_seqs": [64], "max_num_batched_tokens": [2048, 8192]},
}
FORM = {
    "mode": "form",
    "model": "llama-3.2-1b",
    "engine": "vllm",
    "device": "h100-sxm-80gb",
    "nodes": "1",
    "devices_per_node": "1",
    "preset": "chat",
    "rate": "4",
    "requests": "40",
    "ttft_ms": "500",
    "tpot_ms": "",
    "budget_s": "20",
    "objectives": ["latency", "cost"],
}


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(settings=Settings(max_budget_s=20.0))) as found:
        yield found


@pytest.fixture(scope="session")
def result() -> dict[str, Any]:
    return Planner().plan(REQUEST).to_dict()


@pytest.fixture(scope="session")
def missed() -> dict[str, Any]:
    """A result in which no plan meets the SLO."""
    return Planner().plan({**REQUEST, "slo": {"tpot_s": {"mean": 1e-5}}}).to_dict()
