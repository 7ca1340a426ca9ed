"""`planfront validate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.cli import main

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "measured.jsonl"


def test_the_example_is_judged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert main(["validate", str(EXAMPLE), "--json", str(out)]) == 0
    assert "inside interval" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {row["metric"] for row in report["summary"]} == {"ttft_s.mean", "tpot_s.mean"}
    assert not report["errors"]
    for run in report["runs"]:
        tpot = next(row for row in run["comparisons"] if row["metric"] == "tpot_s.mean")
        assert abs(tpot["error"]) < 0.25


def test_a_broken_line_is_told_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = EXAMPLE.read_text().splitlines()[0]
    file = tmp_path / "runs.jsonl"
    file.write_text('{"id": "x", "model": 3\n' + good + "\n")
    assert main(["validate", str(file)]) == 0
    assert "not readable JSON" in capsys.readouterr().out
    file.write_text("[1]\n")
    assert main(["validate", str(file)]) == 2
    assert capsys.readouterr().out.endswith("\nline 1: must be a mapping of fields\n")
    file.write_text("")
    assert main(["validate", str(file)]) == 2
    assert "holds no runs" in capsys.readouterr().err
