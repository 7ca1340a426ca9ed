"""What the command refuses: exit code 2, the field's path and one clear sentence."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from api.cli import BAD_INPUT, main
from tests.api.conftest import Captured, Save, error_of, python, small_request, synthetic

PLAN: dict[str, Any] = {"worker": {"parallelism": {"tensor": 2}}}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


_V100 = {"pools": [{"device": "v100-sxm2-16gb", "devices_per_node": 2}]}
_H100X8 = {"pools": [{"device": "h100-sxm-80gb", "devices_per_node": 8}]}
BAD_PLANS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "llama-9"}, "model", "unknown model 'llama-9'"),
    ({"cluster": {"pools": [{"device": "h101"}]}}, "cluster.pools[0].device", "unknown device 'h101'"),
    ({"cluster": _V100, "space": {"weights": ["fp8"]}}, "space", "v100-sxm2-16gb cannot run fp8 weights"),
    ({"cluster": {"pools": [{"device": "t4", "nodes": 0}]}}, "cluster.pools[0].nodes", "at least 1, not 0"),
    ({"cluster": _H100X8, "space": {"tensor": [3]}}, "space", "tensor 3 does not divide 32 attention heads"),
    (
        {"workload": synthetic(arrivals={"process": "poisson", "rate_rps": -1})},
        "workload.synthetic.arrivals.rate_rps",
        "more than 0, not -1",
    ),
    (
        {"workload": synthetic(input_tokens={"distribution": "constant", "value": 0})},
        "workload.synthetic.input_tokens.value",
        "at least 1, not 0",
    ),
    ({"workload": {"trace": {"path": "missing.jsonl"}}}, "workload.trace.path", "No such file"),
    ({"workload": {"trace": {"path": "."}}}, "workload.trace.path", "is a folder"),
    (
        {"workload": {**synthetic(), "trace": {"path": "t"}}},
        "workload",
        "exactly one of `trace` and `synthetic` (both are given)",
    ),
    ({"workload": {}}, "workload", "neither is given"),
    ({"search": [1]}, "search", "must be a mapping"),
    ({"modle": "x"}, "modle", "did you mean 'model'?"),
    ({"objectives": ["speed"]}, "objectives[0]", "must be one of"),
    ({"schema_version": "2"}, "schema_version", "must be one of 1"),
    ({"plan": PLAN}, "plan", "unknown field"),
]


@pytest.mark.parametrize(
    ("changes", "path", "words"), BAD_PLANS, ids=[f"{row[1]}-{i}" for i, row in enumerate(BAD_PLANS)]
)
def test_plan_refuses(changes: dict[str, Any], path: str, words: str, save: Save, capsys: Captured) -> None:
    assert main(["plan", save(small_request(**changes)), "--quiet"]) == BAD_INPUT
    sentence = error_of(capsys)
    assert sentence.startswith(f"{path}: ")
    assert words in sentence


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({}, "plan", "required"),
        ({"plan": []}, "plan", "a mapping"),
        ({"plan": {"worker": {"tensor": 2}}}, "plan.worker.tensor", "unknown field"),
        (
            {"cluster": _H100X8, "plan": {"worker": {"parallelism": {"tensor": 3}}}},
            "plan.worker.parallelism",
            "tensor 3 does not divide 32 attention heads",
        ),
        (
            {"cluster": _V100, "plan": {"worker": {"quantization": {"weights": "fp8"}}}},
            "plan.worker.quantization",
            "v100-sxm2-16gb cannot run fp8 weights",
        ),
        ({"plan": {"replicas": 9, "worker": {}}}, "plan.replicas", "takes 9 devices, pool 'main' has 2"),
        ({"plan": {"worker": {"pool": "other"}}}, "plan.worker.pool", "no pool is named 'other'"),
    ],
)
def test_evaluate_refuses(
    changes: dict[str, Any], path: str, words: str, save: Save, capsys: Captured
) -> None:
    assert main(["evaluate", save(small_request(**changes))]) == BAD_INPUT
    sentence = error_of(capsys)
    assert sentence.startswith(f"{path}: ")
    assert words in sentence


def test_several_problems_are_all_named(save: Save, capsys: Captured) -> None:
    request = small_request(slo={"ttft_s": {"p95": -1}}, objectives=[], colour="red")
    assert main(["plan", save(request)]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    paths = {line.split(": ")[2] for line in err.splitlines()}
    assert paths == {"slo.ttft_s.p95", "objectives", "colour"}


@pytest.mark.parametrize(("name", "value"), [("--workers", "0"), ("--workers", "-1"), ("--workers", "99999")])
def test_workers_out_of_range(name: str, value: str, save: Save, capsys: Captured) -> None:
    assert main(["plan", save(small_request()), name, value]) == BAD_INPUT
    assert error_of(capsys).startswith("--workers: must be from 1 to 1024")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_budget_out_of_range(value: str, save: Save, capsys: Captured) -> None:
    assert main(["plan", save(small_request()), f"--budget={value}"]) == BAD_INPUT
    assert error_of(capsys).startswith("search.budget_s: must be ")


def test_options_do_not_hide_a_search_of_the_wrong_form(save: Save, capsys: Captured) -> None:
    assert main(["plan", save(small_request(search=[1])), "--method", "auto"]) == BAD_INPUT
    assert error_of(capsys).startswith("search: must be a mapping")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        (
            '{"arrival_s": 0, "input_tokens": 5, "output_tokens": 5}\nbroken\n'
            '{"arrival_s": 1, "input_tokens": 0, "output_tokens": 5}\n',
            "has 2 bad rows: line 2: not readable; line 3: zero or negative tokens",
        ),
        (
            '{"arrival_s": 5, "input_tokens": 5, "output_tokens": 5}\n'
            '{"arrival_s": 1, "input_tokens": 5, "output_tokens": 5}\n',
            "line 2",
        ),
    ],
)
def test_a_trace_that_cannot_be_used(text: str, words: str, save: Save, capsys: Captured) -> None:
    save(text, "t.jsonl")
    assert main(["plan", save(small_request(workload={"trace": {"path": "t.jsonl"}}))]) == BAD_INPUT
    sentence = error_of(capsys)
    assert sentence.startswith("workload.trace.path: ")
    assert words in sentence


#: Ten lines that stand for 9 ** 9 values.
BOMB = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nan.json", json.dumps(small_request(slo={"ttft_s": {"p95": float("nan")}})), "NaN is not a number"),
        ("twice.yaml", "model: a\nmodel: b\n", "line 2: the key 'model' stands twice"),
        ("binary.yaml", bytes(range(256)), "is not UTF-8 text"),
        ("null.yaml", b"\x00\x01", "control characters"),
        ("empty.yaml", "", "is empty"),
        ("bomb.yaml", BOMB, "YAML aliases"),
        ("deep.yaml", "a: " + "[" * 100_000, "nested deeper than"),
        ("deep.json", "[" * 100_000, "nested too deeply"),
        ("broken.json", "{", "is not readable JSON"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used(
    name: str, content: Any, words: str, save: Save, capsys: Captured
) -> None:
    for call in ("plan", "evaluate"):
        assert main([call, save(content, name)]) == BAD_INPUT
        sentence = error_of(capsys)
        assert sentence.startswith(f"{name}: ")
        assert words in sentence


def test_nan_in_yaml_names_its_field(save: Save, capsys: Captured) -> None:
    text = "model: llama-3.2-1b\ncluster: {pools: [{device: t4}]}\n"
    text += "workload: {synthetic: {preset: chat, requests: 5}}\nslo: {ttft_s: {p95: .nan}}\n"
    assert main(["plan", save(text, "r.yaml")]) == BAD_INPUT
    assert error_of(capsys).startswith("slo.ttft_s.p95: must be a finite number")


@pytest.mark.parametrize("call", ["plan", "evaluate"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "is a folder"),
        ("missing.yaml", "No such file"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_a_path_that_cannot_be_opened(call: str, name: str, words: str, capsys: Captured) -> None:
    assert main([call, name]) == BAD_INPUT
    assert words in error_of(capsys)


@pytest.mark.parametrize("name", ["folder.jsonl", "missing.jsonl"])
def test_lines_that_cannot_be_opened(name: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    assert main(["evaluate", name]) == BAD_INPUT
    assert error_of(capsys).startswith(f"{name}: ")


def test_files_of_two_gigabytes_are_refused_in_bounded_memory(save: Save, tmp_path: Path) -> None:
    for name in ("big.yaml", "big.json", "big.trace"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2 << 30)
    trace = save(small_request(workload={"trace": {"path": "big.trace"}}))
    # In a process that may have 1.5 GB and no more; the planner's own libraries take a part of it.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))\n"
        "from api.cli import main\n"
        "sys.exit(max(main(['plan', name]) for name in sys.argv[1:]))"
    )
    start = time.monotonic()
    done = python(code, "big.yaml", "big.json", trace)
    assert time.monotonic() - start < 30
    assert done.returncode == BAD_INPUT, done.stderr
    lines = done.stderr.splitlines()
    assert lines == [
        "planfront: error: big.yaml: is larger than 64 MB",
        "planfront: error: big.json: is larger than 64 MB",
        "planfront: error: workload.trace.path: line 1 is longer than 16 MB",
    ]
