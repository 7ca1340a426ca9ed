"""Runs are neither lost nor doubled while workers are killed and the API is restarted.

    python benchmarks/chaos.py [--runs 200] [--clients 16] [--kill-every-s 4] [--database-url URL]

The service has its default settings. Clients submit runs (plan searches, one in ten a fleet, one in ten a
sweep), each twice under one idempotency key, and wait for their ends. Meanwhile a worker gets SIGKILL every
few seconds, and the API is stopped and started twice (once by SIGTERM, once by SIGKILL). In the end: every
run has ended, there is one run for each key and one result for each run that has an answer, one `end` event
each, and runs of equal requests have answers that are equal bit for bit, interrupted or not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import text

from api.client import Client
from api.lifecycle import ENDS
from api.store import Filters, Store, open_store

ROOT = Path(__file__).resolve().parent.parent
#: Different questions; each is asked many times.
VARIANTS = 10


def kind_of(variant: int) -> str:
    return {3: "fleet", 7: "sweep"}.get(variant, "plan")


def submit(client: Client, variant: int, key: str) -> dict[str, Any]:
    body, label = question(variant), f"variant-{variant}"
    if kind_of(variant) == "sweep":
        return client.submit_sweep(body, "rate", [0.5, 1.0, 2.0], label=label, idempotency_key=key)
    if kind_of(variant) == "fleet":
        member = {name: body[name] for name in ("model", "workload", "slo")}
        space = {"max_num_seqs": [64], "max_num_batched_tokens": [2048]}
        fleet = {
            "models": [{"name": "one", "rate_rps": 20.0, "space": space, **member}],
            "cluster": body["cluster"],
            "search": body["search"],
        }
        return client.submit_fleet(fleet, label=label, idempotency_key=key)
    return client.submit(body, label=label, idempotency_key=key)


def question(variant: int) -> dict[str, Any]:
    return {
        "model": ("llama-3.1-8b", "qwen3-8b")[variant % 2],
        "cluster": {"pools": [{"device": "h100-sxm-80gb", "devices_per_node": 2}]},
        "workload": {
            "synthetic": {
                "arrivals": {"process": "poisson", "rate_rps": 4.0 + variant},
                "requests": 2000,
                "input_tokens": {"distribution": "lognormal", "mean": 900, "cv": 1.0},
                "output_tokens": {"distribution": "lognormal", "mean": 200, "cv": 0.8},
                "seed": variant,
            }
        },
        # One in five has an SLO that no plan meets: an answer as well.
        "slo": {"ttft_s": {"p95": 1e-4 if variant % 5 == 4 else 2.0}},
        "search": {"budget_s": 120},
    }


class Service:
    """`planfront serve`, started again and again on one port."""

    def __init__(self, url: str, port: int, workers: int, log: Path) -> None:
        self.url, self.port, self.workers, self.log = url, port, workers, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environ = {
            **os.environ,
            "PLANFRONT_DATABASE_URL": self.url,
            "PYTHONPATH": str(ROOT),
        }
        # Workers are started all the time, and would compile every module anew.
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [
            sys.executable, "-m", "api.cli", "serve", "--port", str(self.port),
            "--workers", str(self.workers), "--log-format", "json",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)

    def stop(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill-every-s", type=float, default=4.0)
    parser.add_argument("--database-url", help="default: a SQLite file in a temporary folder")
    parser.add_argument("--limit-s", type=float, default=900.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="planfront-chaos-") as folder:
        url = given.database_url or f"sqlite:///{folder}/chaos.db"
        store = open_store(url, upgrade=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = Path(folder) / "log"
        service = Service(url, port, given.workers, log)
        try:
            return attack(given, store, service)
        finally:
            if service.process is not None and service.process.poll() is None:
                service.stop(signal.SIGTERM)
            store.close()
            if os.environ.get("CHAOS_LOG"):
                Path(os.environ["CHAOS_LOG"]).write_bytes(log.read_bytes())


def attack(given: argparse.Namespace, store: Store, service: Service) -> int:
    began = time.monotonic()
    service.start()
    base = f"http://127.0.0.1:{service.port}"
    over = threading.Event()
    kills: list[int] = []
    restarts: list[str] = []
    ids: dict[str, set[str]] = {}
    lock = threading.Lock()

    def ask(number: int) -> str:
        key = f"chaos-{number}"
        with Client(base, patience_s=given.limit_s) as client:
            variant = number % VARIANTS
            for _ in range(2):  # the same question again is the same run
                run = submit(client, variant, key)
                with lock:
                    ids.setdefault(key, set()).add(run["id"])
            run = client.wait(run["id"], given.limit_s)
            if run["status"] in ("done", "infeasible"):
                part = {"plan": "plans", "fleet": "periods", "sweep": "points"}[kind_of(variant)]
                assert client.result(run["id"])[part]
            return str(run["status"])

    def kill() -> None:
        rng = random.Random(0)
        while not over.wait(given.kill_every_s):
            alive = [row["pid"] for row in store.workers(seen_within_s=12) if _alive(row["pid"])]
            if alive:
                pid = rng.choice(alive)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                kills.append(pid)

    def restart() -> None:
        plan = [(given.runs // 4, signal.SIGTERM), (given.runs // 2, signal.SIGKILL)]
        while plan and not over.wait(0.2):
            ended = sum(count for status, count in store.counts().items() if status in ENDS)
            if ended >= plan[0][0]:
                number = plan.pop(0)[1]
                service.stop(number)
                time.sleep(1.0)
                service.start()
                restarts.append(number.name)

    threads = [threading.Thread(target=kill), threading.Thread(target=restart)]
    for thread in threads:
        thread.start()
    try:
        with ThreadPoolExecutor(given.clients) as pool:
            ends = Counter(pool.map(ask, range(given.runs)))
    finally:
        over.set()
        for thread in threads:
            thread.join()
    return judge(given, store, ids, ends, kills, restarts, time.monotonic() - began)


def judge(
    given: argparse.Namespace,
    store: Store,
    ids: dict[str, set[str]],
    ends: Counter[str],
    kills: list[int],
    restarts: list[str],
    wall_s: float,
) -> int:
    stored = store.runs(Filters(), limit=10 * given.runs)
    with store.database.read() as connection:
        results = connection.scalar(text("SELECT count(*) FROM result"))
        end_events = connection.scalar(text("SELECT count(*) FROM event WHERE kind = 'end'"))
        resumed = connection.scalar(
            text("SELECT count(*) FROM event WHERE kind = 'status' AND data LIKE :told"),
            {"told": '%"resumed":true%'},
        )
        checkpoints = connection.scalar(text("SELECT count(*) FROM checkpoint"))
    answered = [run for run in stored if run["status"] in ("done", "infeasible")]
    digests: dict[str, set[str]] = {}
    for run in answered:
        digests.setdefault(run["label"], set()).add(run["result_digest"])
    checks = {
        "every run has ended": all(run["status"] in ENDS for run in stored),
        "no run is lost": len(stored) == given.runs == sum(ends.values()),
        "one run for each idempotency key": len(ids) == given.runs
        and all(len(found) == 1 for found in ids.values()),
        "one result for each answered run": results == len(answered),
        "one end for each run": end_events == len(stored),
        "no checkpoint is left": checkpoints == 0,
        "equal requests have equal answers, bit for bit": all(len(found) == 1 for found in digests.values()),
        "every run has an answer": len(answered) == given.runs,
        "the API was restarted twice": len(restarts) == 2,
    }
    attempts = Counter(run["attempt"] for run in stored)
    figures = {
        "database": store.database.dialect,
        "runs": len(stored),
        "clients": given.clients,
        "ends": dict(ends),
        "kinds": dict(Counter(run["kind"] for run in stored)),
        "workers_killed": len(kills),
        "api_restarts": restarts,
        "attempts": dict(sorted(attempts.items())),
        "taken_up_again": sum(run["attempt"] > 1 for run in stored),
        "resumed_from_a_checkpoint": resumed,
        "wall_s": round(wall_s, 1),
    }
    print(json.dumps({"figures": figures, "checks": checks}, indent=1))
    return 0 if all(checks.values()) else 1


def _alive(pid: int) -> bool:
    """Alive, and not waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
