"""`planfront serve` and its workers as processes: killed, stopped, asked from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from api.cli import main
from api.client import Client, ServiceError
from api.store import Filters, Store, open_store
from tests.api.conftest import OWN_MODEL, ROOT, small_request
from tests.api.test_studies import FLEET

ENVIRON = {"OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Served:
    """A running `planfront serve` with its address, and its store beside it."""

    def __init__(self, folder: Path, *options: str, **environ: str) -> None:
        self.folder = folder
        self.environ = {
            **os.environ,
            **ENVIRON,
            "PLANFRONT_DATA_DIR": str(folder),
            "PLANFRONT_LEASE_S": "1.5",
            **environ,
        }
        self.log = (folder / "log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "serve", "--port", "0", "--log-format", "json", *options],
            stdout=subprocess.PIPE, stderr=self.log, env=self.environ,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line.startswith("planfront serves "), (folder / "log").read_text()
        self.url = line.split()[-1]
        self.store: Store = open_store(
            environ.get("PLANFRONT_DATABASE_URL") or f"sqlite:///{folder}/planfront.db"
        )

    def stop(self) -> int:
        """Its exit code; stopping twice is stopping once."""
        if self.process.returncode is not None:
            return self.process.returncode
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
        self.store.close()
        return code

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("served"), "--workers", "1")
    yield found
    found.stop()


def long_request() -> dict[str, Any]:
    """Some seconds of search, in many small simulations."""
    synthetic = {
        "preset": "chat",
        "requests": 30_000,
        "arrivals": {"process": "poisson", "rate_rps": 20.0},
    }
    return small_request(
        model="llama-3.1-8b",
        workload={"synthetic": synthetic},
        cluster={"pools": [{"device": "h100-sxm-80gb", "devices_per_node": 8}]},
        space={},
        search={"budget_s": 300, "method": "exhaustive"},
    )


def running(client: Client, run_id: str, simulated: int = 1) -> None:
    """Wait until a search is under way."""
    for _ in range(300):
        run = client.run(run_id)
        if run["status"] == "running" and (run["progress"] or {}).get("simulated", 0) >= simulated:
            return
        assert run["status"] in ("queued", "running", "interrupted"), run
        time.sleep(0.1)
    raise AssertionError("the search did not start")


def test_a_run_from_end_to_end(served: Served) -> None:
    with Client(served.url) as client:
        run = client.submit(small_request(), label="e2e", wait_s=60)
        assert run["status"] == "done"
        assert client.result(run["id"])["status"] == "ok"
        assert [event["event"] for event in client.events(run["id"])][-1] == "end"
        assert "vllm serve" in str(client.export(run["id"], "vllm")["files"])
        assert [row["id"] for row in client.runs(label="e2e")] == [run["id"]]
        assert client.annotate(run["id"], notes="n")["notes"] == "n"
        again = client.rerun(run["id"], 60)
        assert again["reproduction"]["same"] is True
        assert client.compare(run["id"], again["id"])["differences"] == []
        with pytest.raises(ServiceError) as caught:
            client.submit({"model": "x"})
        assert caught.value.status == 422
        assert ("cluster", "this field is required") in caught.value.problems


def test_a_running_search_is_cancelled_and_keeps_what_it_found(served: Served) -> None:
    with Client(served.url) as client:
        run = client.submit(long_request())
        running(client, run["id"])
        client.cancel(run["id"])
        run = client.wait(run["id"], 30)
        assert run["status"] == "cancelled"
        result = client.result(run["id"])
        assert result["plans"]
        assert result["search"]["certified"] is False


def test_a_killed_workers_run_is_resumed_by_the_next(served: Served) -> None:
    with Client(served.url) as client:
        run = client.submit(long_request())
        running(client, run["id"], simulated=5)
        for _ in range(200):
            with served.store.database.read() as connection:
                if connection.scalar(text("SELECT count(*) FROM checkpoint")):
                    break
            time.sleep(0.05)
        for worker in served.store.workers():
            try:
                os.kill(worker["pid"], signal.SIGKILL)
            except ProcessLookupError:
                continue
        seen: list[Any] = []
        for event in client.events(run["id"]):
            seen.append(event)
            if event["event"] == "status" and event["data"].get("resumed"):
                break
        statuses = [event["data"]["status"] for event in seen if event["event"] == "status"]
        assert statuses == ["queued", "running", "interrupted", "running"]
        client.cancel(run["id"])
        assert client.wait(run["id"], 30)["status"] == "cancelled"
        assert client.run(run["id"])["attempt"] == 2


@dataclass
class Line:
    """Runs commands in this process; what each wrote."""

    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, code: int = 0) -> str:
        assert main(arguments) == code, self.capsys.readouterr()
        self.out, self.err = self.capsys.readouterr()
        return self.out


@pytest.fixture
def line(served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.chdir(served.folder)
    monkeypatch.setenv("PLANFRONT_DATA_DIR", str(served.folder))
    return Line(capsys)


def test_the_command_line_asks_the_server(served: Served, line: Line) -> None:
    there = ("--server", served.url)
    Path("request.json").write_text(json.dumps(small_request()))
    line("plan", "request.json", *there, "--json", "result.json", "--quiet")
    assert json.loads(Path("result.json").read_text())["status"] == "ok"
    one = {**small_request(), "plan": {"worker": {}}}
    Path("one.json").write_text(json.dumps(one))
    assert json.loads(line("evaluate", "one.json", *there, "--json", "-"))["status"] == "ok"
    line("plan", "one.json", *there, code=2)
    assert "plan" in line.err
    rows = json.loads(line("runs", "--json", "--limit", "2", *there))
    assert len(rows) == 2
    assert rows == json.loads(line("runs", "--json", "--limit", "2"))
    done = [run["id"] for run in served.store.runs(Filters(status=("done",), kind="plan"))]
    assert "bit for bit" in line("rerun", done[0])
    assert "TTFT" not in line("compare", done[0], done[1], *there)
    assert line("compare", done[0], done[1], "--json", *there) == line("compare", done[0], done[1], "--json")
    line("compare", done[0], code=2)
    line("runs", "0" * 28, *there, code=2)
    assert line.err == "planfront: error: There is no run of this id.\n"
    assert len(json.loads(line("catalog", "costmodels", "--json", *there))) > 1


def test_fleets_and_sweeps_are_asked_of_the_server(served: Served, line: Line) -> None:
    there = ("--server", served.url)
    trace = [{"arrival_s": n / 10, "input_tokens": 100 + n, "output_tokens": 20} for n in range(40)]
    Path("trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trace))
    fleet = {**FLEET, "models": [{**FLEET["models"][0], "workload": {"trace": {"path": "trace.jsonl"}}}]}
    Path("fleet.json").write_text(json.dumps(fleet))
    line("fleet", "fleet.json", *there, "--json", "there.json")
    assert "run " in line.err
    line("fleet", "fleet.json", "--json", "here.json", "--quiet", "--workers", "1")
    there_, here = (json.loads(Path(name).read_text()) for name in ("there.json", "here.json"))
    assert there_["periods"] == here["periods"]
    Path("request.json").write_text(json.dumps(small_request()))
    asked = ("sweep", "request.json", "--vary", "rate", "--values", "1,2", "--quiet", "--json", "-")
    points = json.loads(line(*asked, *there))["points"]
    assert points == json.loads(line(*asked))["points"]
    line("sweep", "request.json", "--vary", "model", "--values", "1", *there, code=2)
    assert line.err.startswith("planfront: error: vary: ")
    # A model's own config.json travels with the request.
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(OWN_MODEL))
    Path("request.json").write_text(json.dumps(small_request(model="mine")))
    found = [json.loads(line("plan", "request.json", "--quiet", "--json", "-", *to)) for to in (there, ())]
    assert found[0]["plans"] == found[1]["plans"]
    assert (found[0]["request"]["model"], found[0]["request"]["config"]) == ("mine", OWN_MODEL)
    Path("fleet.json").write_text(json.dumps({**FLEET, "models": []}))
    line("fleet", "fleet.json", *there, code=2)
    assert line.err.startswith("planfront: error: models: ")


def test_measured_runs_are_compared_by_the_server(served: Served, line: Line) -> None:
    first = (ROOT / "examples" / "measured.jsonl").read_text().splitlines()[0]
    Path("measured.jsonl").write_text(f'{first}\n{{"id": "x"}}\n')
    file = "measured.jsonl"
    there = json.loads(line("validate", file, "--json", "-", "--server", served.url))
    here = json.loads(line("validate", file, "--json", "-"))
    assert (there["runs"], there["summary"]) == (here["runs"], here["summary"])
    assert [row["id"] for row in there["errors"]] == [row["id"] for row in here["errors"]] == ["x"]


def test_a_batch_of_the_server_is_taken_up_again(
    served: Served, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its submits: the same runs, each once, and the answers that a local batch gives."""
    rows: list[Any] = [
        {"id": n, **small_request(objectives=[name])} for n, name in ((1, "latency"), (2, "cost"))
    ]
    rows += [{"id": "bad", **small_request(model="nope")}, [1]]
    Path("batch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = ("batch", "batch.jsonl", "--out", "there", "--server", served.url)
    before = len(served.store.runs(Filters()))
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(Client, "wait", interrupted)
        line(*batch, code=130)
    assert len(served.store.runs(Filters())) == before + 2
    line(*batch, code=2)  # answers are there: the bad lines'
    line(*batch, "--resume")
    assert "4 requests: 2 planned" in line.out
    assert len(served.store.runs(Filters())) == before + 2
    line("batch", "batch.jsonl", "--out", "here", "--workers", "1", "--quiet")
    for name in ("000001-1.json", "000002-2.json", "000003-bad.json", "000004.json"):
        there, here = (json.loads((Path(folder) / name).read_text()) for folder in ("there", "here"))
        assert there["status"] == here["status"]
        assert (there.get("front"), there.get("plans")) == (here.get("front"), here.get("plans"))
        assert (there.get("error") or {}).get("path") == (here.get("error") or {}).get("path")
    assert line(*batch, "--resume", "--quiet").count("4 of them kept") == 1


def test_a_term_signal_gives_back_what_runs_and_ends_streams(served: Served) -> None:
    """The last that the shared service does."""
    seen = len(served.lines())
    with Client(served.url, patience_s=0) as client:
        run_id = client.submit(long_request())["id"]
        running(client, run_id)
        stream = client._stream(run_id, 0)
        next(stream)
        began = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - began < 10
        list(stream)
    store = open_store(f"sqlite:///{served.folder}/planfront.db")
    run = store.run(run_id)
    assert run is not None
    assert (run["status"], run["crashes"]) == ("interrupted", 0)
    assert store.workers(seen_within_s=3) == []
    store.close()
    lines = served.lines()[seen:]
    taken = next(line for line in lines if line["message"] == "run taken")
    assert taken["run_id"] == run_id
    assert any(line["message"] == "worker stopped" for line in lines)
    assert not [line for line in lines if line["level"] == "error"], lines


def test_api_and_worker_share_postgresql(tmp_path: Path, pg_url: str) -> None:
    open_store(pg_url, upgrade=True).close()
    served = Served(tmp_path, "--workers", "0", PLANFRONT_DATABASE_URL=pg_url)
    worker = subprocess.Popen(
        [sys.executable, "-m", "api.cli", "worker"], stderr=served.log, env=served.environ
    )
    try:
        with Client(served.url) as client:
            run = client.submit(small_request(), wait_s=40)
            assert run["status"] == "done"
            assert client.result(run["id"])["plans"]
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    finally:
        worker.kill()
        worker.wait()
        assert served.stop() == 0


def test_no_service_for_others_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLANFRONT_DATA_DIR", str(tmp_path))
    assert main(["serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    words = capsys.readouterr().err
    assert "there are no API keys" in words
    assert "planfront keys create" in words
