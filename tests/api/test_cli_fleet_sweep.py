"""`planfront fleet` and `planfront sweep` through the command's own door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.cli import main

FLEET = """
cluster: {pools: [{name: a, device: h100-sxm-80gb, nodes: 1, devices_per_node: 4}]}
models:
  - name: chat
    model: llama-3.2-1b
    rate_rps: 5.0
    workload: {synthetic: {preset: chat, requests: 40}}
    slo: {ttft_s: {p95: 1.0}}
    space: {max_num_seqs: [64], max_num_batched_tokens: [2048], pipeline: [1]}
"""
PLAN = """
model: llama-3.2-1b
cluster: {pools: [{device: h100-sxm-80gb, devices_per_node: 2}]}
workload: {synthetic: {preset: chat, requests: 40}}
objectives: [latency, cost]
space: {max_num_seqs: [64], max_num_batched_tokens: [2048]}
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "fleet.yaml").write_text(FLEET, encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    return tmp_path


def test_fleet_prints_a_table_and_writes_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "out.json"
    assert main(["fleet", str(files / "fleet.yaml"), "--json", str(out), "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "optimal" in shown.out
    assert "ways to serve a replica" in shown.err
    answer = json.loads(out.read_text(encoding="utf-8"))
    assert answer["status"] == "ok"
    assert answer["periods"][0]["assignments"]


def test_fleet_without_room_exits_3(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FLEET.replace("rate_rps: 5.0", "rate_rps: 1000000.0")
    (files / "big.yaml").write_text(text, encoding="utf-8")
    assert main(["fleet", str(files / "big.yaml"), "--quiet"]) == 3
    shown = capsys.readouterr()
    assert "carries the demand" in shown.out
    assert shown.err == ""


def test_bad_fleets_name_the_field(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "bad.yaml").write_text(FLEET.replace("llama-3.2-1b", "llama-9"), encoding="utf-8")
    assert main(["fleet", str(files / "bad.yaml"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("planfront: error: models[0].model: ")


def test_sweep_prints_the_recommendation_at_each_value(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", str(files / "plan.yaml"), "--vary", "rate", "--values", "0.5,1,4", "--quiet"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "The recommendation" in shown
    assert main([*arguments, "--json", "-"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [point["value"] for point in answer["points"]] == [0.5, 1.0, 4.0]


@pytest.mark.parametrize(
    ("vary", "values", "path"),
    [("rate", "1,two", "--values"), ("model", "1", "vary"), ("slo.ttft_s.p95", "0", "slo.ttft_s.p95")],
)
def test_bad_sweeps_name_what_is_wrong(
    files: Path, capsys: pytest.CaptureFixture[str], vary: str, values: str, path: str
) -> None:
    assert main(["sweep", str(files / "plan.yaml"), "--vary", vary, "--values", values]) == 2
    assert capsys.readouterr().err.startswith(f"planfront: error: {path}: ")


def test_export_writes_what_an_engine_takes(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = files / "result.json"
    assert main(["plan", str(files / "plan.yaml"), "--quiet", "--json", str(out)]) == 0
    capsys.readouterr()
    assert main(["export", str(out), "--target", "vllm"]) == 0
    assert "vllm serve meta-llama/Llama-3.2-1B" in capsys.readouterr().out
    assert main(["export", str(out), "--target", "kubernetes", "--out", str(files / "k8s")]) == 0
    assert (files / "k8s" / "deployment.yaml").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan.yaml", "--target", "vllm"], "is no result of"),
        (["result.json", "--target", "podman"], "--target: must be one of"),
        (["result.json", "--target", "vllm", "--plan", "nope"], "--plan: the result has no plan 'nope'"),
    ],
)
def test_bad_exports_name_what_is_wrong(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["plan", str(files / "plan.yaml"), "--quiet", "--json", str(files / "result.json")]) == 0
    capsys.readouterr()
    assert main(["export", str(files / arguments[0]), *arguments[1:]]) == 2
    assert words in capsys.readouterr().err
