"""`planfront batch`: whole files, in order, kept over a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from api.batch import run_batch
from api.cli import main
from hardware import InputError


def request(ident: Any, **changes: Any) -> dict[str, Any]:
    return {
        "id": ident,
        "model": "llama-3.2-1b",
        "cluster": {"pools": [{"device": "h100-sxm-80gb", "devices_per_node": 1}]},
        "workload": {"synthetic": {"preset": "chat", "requests": 20}},
        "objectives": ["latency", "cost"],
        "space": {"weights": ["bf16"], "max_num_seqs": [64], "max_num_batched_tokens": [2048]},
        **changes,
    }


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_line_has_its_file_and_a_bad_one_does_not_stop_the_rest(tmp_path: Path) -> None:
    rows = [
        request("a/b c"),
        "{broken",
        request(2, model="llama-9"),
        request("slow", slo={"tpot_s": {"mean": 1e-6}}),
    ]
    said: list[str] = []
    counts = run_batch(write(tmp_path / "r.jsonl", rows), tmp_path / "out", progress=said.append)
    assert (counts.ok, counts.infeasible, counts.errors, counts.kept) == (1, 1, 2, 0)
    assert said[1].startswith("line 2: error: is not readable JSON")
    assert said[2].startswith("line 3: error: model: unknown model 'llama-9'")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000001-a-b-c.json", "000002.json", "000003-2.json", "000004-slow.json", "summary.jsonl"]
    summary = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    assert [row["line"] for row in summary] == [1, 2, 3, 4]
    assert [row["status"] for row in summary] == ["ok", "error", "error", "infeasible"]
    assert summary[2]["error"]["path"] == "model"
    first = json.loads((tmp_path / "out" / "000001-a-b-c.json").read_text())
    assert first["recommended"]["plan_id"] == summary[0]["plan_id"]


def test_the_exit_code_tells_lines_in_error_from_targets_missed(tmp_path: Path) -> None:
    bad, slow = request(1, model="llama-9"), request(2, slo={"tpot_s": {"mean": 1e-6}})
    for name, rows, code in (("a", [bad], 2), ("b", [bad, slow], 3), ("c", [bad, slow, request(3)], 0)):
        path = write(tmp_path / f"{name}.jsonl", rows)
        assert main(["batch", str(path), "--out", str(tmp_path / name), "--quiet"]) == code, name


def test_resuming_keeps_what_answers_the_same_line(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [request(1), request(2)])
    out = tmp_path / "out"
    run_batch(path, out)
    before = (out / "000001-1.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="--resume"):
        run_batch(path, out)
    write(path, [request(1), request(2, objectives=["energy"]), request(3)])
    (out / "000003-3.json").write_text('{"status": "ok", "half', encoding="utf-8")
    counts = run_batch(path, out, resume=True)
    assert (counts.total, counts.kept) == (3, 1)
    assert (out / "000001-1.json").stat().st_mtime_ns == before
    assert json.loads((out / "000002-2.json").read_text())["request"]["objectives"] == ["energy"]


def test_processes_change_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [request(i) for i in range(5)])
    code = (
        "from pathlib import Path; from api.batch import run_batch;"
        f"run_batch(Path({str(path)!r}), Path({str(tmp_path / 'two')!r}), workers=2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    run_batch(path, tmp_path / "one")
    for file in sorted((tmp_path / "one").glob("0*.json")):
        one, two = (json.loads((tmp_path / n / file.name).read_text()) for n in ("one", "two"))
        for answer in (one, two):
            answer["search"]["wall_s"] = 0
        assert one == two


def test_a_killed_batch_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [request(i) for i in range(30)])
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "api.cli",
        "batch",
        str(path),
        "--out",
        str(out),
        "--workers",
        "1",
        "--quiet",
    ]
    running = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while len(list(out.glob("0*.json"))) < 2 and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    there = len(list(out.glob("0*.json")))
    counts = run_batch(path, out, resume=True)
    assert counts.total == counts.ok == 30
    assert counts.kept == there >= 2


def test_the_command_says_what_became_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "r.jsonl", [request(1), request(2, model="x")])
    assert main(["batch", str(path), "--out", str(tmp_path / "out"), "--workers", "1", "--quiet"]) == 0
    assert "2 requests: 1 planned, 0 that no plan meets, 1 with errors" in capsys.readouterr().out
    assert main(["batch", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "is a folder" in capsys.readouterr().err
