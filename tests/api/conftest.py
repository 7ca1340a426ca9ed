"""A small request, a service that is shared by the tests that do not change it, and the command line."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_api
from api.settings import Settings
from api.store import new_id
from tests.api import postgres

ROOT = Path(__file__).resolve().parent.parent.parent

_REQUEST: dict[str, Any] = {
    "model": "llama-3.2-1b",
    "cluster": {"pools": [{"device": "h100-sxm-80gb", "nodes": 1, "devices_per_node": 2}]},
    "workload": {
        "synthetic": {
            "arrivals": {"process": "poisson", "rate_rps": 4.0},
            "requests": 50,
            "input_tokens": {"distribution": "constant", "value": 256},
            "output_tokens": {"distribution": "constant", "value": 32},
        }
    },
    "space": {"max_num_batched_tokens": [8192], "max_num_seqs": [256]},
}


#: A config.json that is no catalog model's.
OWN_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 4096, "vocab_size": 32000,
}  # fmt: skip


def small_request(**changes: Any) -> dict[str, Any]:
    """One model of 1B on one node of two H100, 50 requests; `changes` replace whole sections."""
    return copy.deepcopy({**_REQUEST, **changes})


@pytest.fixture
def request_data() -> dict[str, Any]:
    return small_request()


@pytest.fixture(scope="session")
def client() -> Iterator[TestClient]:
    with TestClient(create_api(settings=Settings())) as found:
        yield found


@pytest.fixture(scope="session")
def pg_address() -> Iterator[str]:
    """A PostgreSQL server of the tests' own; skips where there is no program for one."""
    reason = postgres.why_not()
    if reason:
        pytest.skip(reason)
    with postgres.server() as address:
        yield address


@pytest.fixture
def pg_url(pg_address: str) -> str:
    """A fresh, empty PostgreSQL database."""
    return postgres.new_database(pg_address, f"test_{new_id()}")


# --- the command line ------------------------------------------------------------------------------

Captured = pytest.CaptureFixture[str]
Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a request (or text, or bytes) to a file; returns its name."""

    def write(content: Any, name: str = "request.json") -> str:
        data = content if isinstance(content, bytes) else None
        if data is None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
        (tmp_path / name).write_bytes(data)
        return name

    return write


def synthetic(**changes: Any) -> dict[str, Any]:
    return {"synthetic": {**small_request()["workload"]["synthetic"], **changes}}


def error_of(capsys: Captured) -> str:
    """The one sentence on standard error; nothing on standard output, no traceback."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("planfront: error: ")
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, err
    return lines[0].removeprefix("planfront: error: ")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env=environ
    )


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "api.cli", *arguments],
        input=stdin, capture_output=True, text=True, timeout=60, env=environ,
    )  # fmt: skip
