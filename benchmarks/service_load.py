"""Requests per second and their latency while a search runs.

    python benchmarks/service_load.py [--seconds 10] [--database-url URL]

Starts `planfront serve` with one worker on a SQLite file, keeps a long search running, and asks from other
processes at a fixed rate (an open loop: a slow answer delays no later question, and is not hidden by it):
`GET /runs/{id}` at 520/s, then `POST /runs` at 105/s, then both. The goal is 500/s and 100/s with a
P99 below 100 ms. With each load stand the cores that the API, what asks it, the worker with its search, and
whatever else runs on the machine took meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from api.client import Client

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 32
#: Runs that are asked for in turn.
RUNS = 50


def long_request() -> dict[str, Any]:
    """A search that takes minutes."""
    lengths = {"distribution": "lognormal", "mean": 1500, "cv": 1.2}
    return {
        "model": "llama-3.1-70b",
        "cluster": {"pools": [{"device": "h100-sxm-80gb", "nodes": 4, "devices_per_node": 8}]},
        "workload": {
            "synthetic": {
                "arrivals": {"process": "poisson", "rate_rps": 40.0},
                "requests": 50_000,
                "input_tokens": lengths,
                "output_tokens": lengths,
            }
        },
        "search": {"budget_s": 600, "method": "exhaustive"},
    }


def small_request(number: int) -> dict[str, Any]:
    """Different in each: nothing of it is known from before."""
    return {
        "model": "llama-3.1-8b",
        "cluster": {"pools": [{"device": "h100-sxm-80gb", "devices_per_node": 2}]},
        "workload": {
            "synthetic": {"preset": "chat", "requests": 200, "seed": number},
        },
        "slo": {"ttft_s": {"p95": 1.0}},
    }


class Asker:
    """Sends ready-made bytes over kept connections at a rate; notes when each answer came."""

    def __init__(self, port: int, rate_rps: float, seconds: float) -> None:
        self.port, self.rate_rps, self.seconds = port, rate_rps, seconds
        self.latencies: list[float] = []
        self.statuses: dict[int, int] = {}

    async def run(self, requests: list[bytes]) -> None:
        free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        for _ in range(CONNECTIONS):
            free.put_nowait(await asyncio.open_connection("127.0.0.1", self.port))
        tasks = []
        start = time.perf_counter()
        count = int(self.rate_rps * self.seconds)
        for number in range(count):
            due = start + number / self.rate_rps
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(self._one(free, requests[number % len(requests)], due)))
        await asyncio.gather(*tasks)
        self.wall_s = time.perf_counter() - start

    async def _one(self, free: Any, request: bytes, due: float) -> None:
        reader, writer = await free.get()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                await reader.readexactly(int(line.split(b":")[1]))
        status = int(head[9:12])
        self.statuses[status] = self.statuses.get(status, 0) + 1
        # From when it was due, not from when a connection was free.
        self.latencies.append(time.perf_counter() - due)
        free.put_nowait((reader, writer))


def ask(port: int, rate_rps: float, seconds: float, requests: list[bytes], pipe: Any) -> None:
    asker = Asker(port, rate_rps, seconds)
    asyncio.run(asker.run(requests))
    pipe.send((asker.latencies, asker.statuses, asker.wall_s, time.process_time()))


def get_bytes(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def post_bytes(body: Any) -> bytes:
    text = json.dumps(body).encode()
    head = (
        "POST /api/v1/runs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


class Cores:
    """Processor time since it was made, in cores, by who took it."""

    def __init__(self, api: int) -> None:
        self._api = api
        self._began = time.monotonic()
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        """(the API's, that of all its descendants, the machine's) seconds."""
        parents: dict[int, int] = {}
        used: dict[int, float] = {}
        tick = os.sysconf("SC_CLK_TCK")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / tick
        below = {self._api}
        for _ in range(4):
            below |= {pid for pid, parent in parents.items() if parent in below}
        numbers = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        machine = (sum(numbers[:3]) + sum(numbers[5:8])) / tick
        return used.get(self._api, 0.0), sum(used[pid] for pid in below - {self._api}), machine

    def __call__(self, asking_s: float) -> dict[str, float]:
        """Cores of each; `asking_s`: what the load itself took."""
        wall_s = time.monotonic() - self._began
        api, worker, machine = (
            (now - before) / wall_s for now, before in zip(self._now(), self._before, strict=True)
        )
        asking = asking_s / wall_s
        found = {"api": api, "asking": asking, "worker": worker, "other": machine - api - worker - asking}
        return {name: round(value, 2) for name, value in found.items()}


def measure(
    api: int, port: int, loads: dict[str, tuple[float, list[bytes]]], seconds: float
) -> dict[str, Any]:
    """Each load from a process of its own, at once."""
    context = multiprocessing.get_context("fork")
    cores = Cores(api)
    started = []
    for name, (rate_rps, requests) in loads.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=ask, args=(port, rate_rps, seconds, requests, theirs))
        process.start()
        started.append((name, process, ours))
    found: dict[str, Any] = {}
    asking_s = 0.0
    for name, process, pipe in started:
        latencies, statuses, wall_s, used_s = pipe.recv()
        asking_s += used_s
        process.join()
        p50, p95, p99 = (float(np.percentile(latencies, q)) for q in (50, 95, 99))
        found[name] = {
            "per_s": round(len(latencies) / wall_s, 1),
            "p50_ms": round(1e3 * p50, 1),
            "p95_ms": round(1e3 * p95, 1),
            "p99_ms": round(1e3 * p99, 1),
            "max_ms": round(1e3 * max(latencies), 1),
            "statuses": statuses,
        }
    return {"loads": found, "cores": cores(asking_s)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--get-rps", type=float, default=520.0)
    parser.add_argument("--post-rps", type=float, default=105.0)
    parser.add_argument("--database-url", help="default: a SQLite file in a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="planfront-load-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PLANFRONT_DATABASE_URL": given.database_url or f"sqlite:///{folder}/load.db",
            "PLANFRONT_MAX_QUEUED_PER_KEY": "1000000",
        }
        command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--workers", "1"]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        try:
            return load(given, process.pid, port)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def load(given: argparse.Namespace, api: int, port: int) -> int:
    with Client(f"http://127.0.0.1:{port}", patience_s=60) as client:
        run = client.submit(long_request())
        while client.run(run["id"])["progress"] is None:  # until it searches in earnest
            time.sleep(0.2)
        # The run that is searched changes all the time; those that wait are asked for as well.
        asked = [run, *(client.submit(small_request(1_000_000 + number)) for number in range(RUNS - 1))]
        gets = (given.get_rps, [get_bytes(f"/api/v1/runs/{one['id']}") for one in asked])
        measure(api, port, {"get": (50.0, gets[1])}, 1.0)
        report = {"GET alone": measure(api, port, {"get": gets}, given.seconds)}
        count = int(given.post_rps * given.seconds)
        for number, name in enumerate(("POST alone", "both at once")):
            posts = [post_bytes(small_request(number * count + n)) for n in range(count)]
            loads = {"post": (given.post_rps, posts)} | ({"get": gets} if number else {})
            report[name] = measure(api, port, loads, given.seconds)
        during = client.run(run["id"])
        client.cancel(run["id"])
    searched = during["status"] == "running"
    good = searched and all(
        row["p99_ms"] < 100 and set(row["statuses"]) <= {200, 202}
        for rows in report.values()
        for row in rows["loads"].values()
    )
    report["search"] = {"status": during["status"], **(during["progress"] or {})}
    print(json.dumps({"goal": "P99 below 100 ms", "kept": good, "measured": report}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
