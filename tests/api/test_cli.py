"""The `planfront` command: answers, exit codes, one clear sentence for what is wrong, never a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api.cli import BAD_INPUT, CATALOGS, DONE, FAULT, INTERRUPTED, NO_PLAN, main
from api.words import instead, plan_words, told_apart
from planner import Planner
from planner.objectives import objective_value
from tests.api.conftest import ROOT, Captured, Save, command, error_of, python, small_request, synthetic

PLAN: dict[str, Any] = {"worker": {"parallelism": {"tensor": 2}}}
HEAVY = ("numpy", "numba", "pydantic", "rich", "networkx", "fastapi", "yaml", "sklearn", "ortools")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLANFRONT_DEBUG", raising=False)


# --- plan ----------------------------------------------------------------------------------------


PAIR_WORKER: dict[str, Any] = {
    "pool": "fast",
    "parallelism": {"tensor": 4, "pipeline": 1, "expert": 1, "attention_data": 1, "context": 1},
    "quantization": {"weights": "fp8", "activations": "fp8", "kv_cache": "fp8"},
    "batching": {"max_num_seqs": 1024, "max_num_batched_tokens": 8192},
}


def test_a_pair_of_workers_says_once_what_both_share() -> None:
    other = {
        **PAIR_WORKER,
        "pool": "cheap",
        "parallelism": {**PAIR_WORKER["parallelism"], "tensor": 2},
        "batching": {"max_num_seqs": 64, "max_num_batched_tokens": 2048},
    }
    plan = {
        "serving": "disaggregated",
        "prefill": {"replicas": 1, "worker": PAIR_WORKER},
        "decode": {"replicas": 2, "worker": other},
    }
    rest = "fp8, KV fp8, 64 seqs / 8192 tokens"
    assert plan_words(plan) == f"1 x TP4 prefill + 2 x TP2 decode, {rest}"
    assert plan_words(plan, short=True) == f"1 x TP4 > 2 x TP2, {rest}"
    assert plan_words(plan, pool=True) == f"1 x TP4 prefill on fast + 2 x TP2 decode on cheap, {rest}"
    plan["decode"]["worker"] = {**other, "quantization": {**other["quantization"], "weights": "bf16"}}
    apart = "1 x TP4 fp8, KV fp8 prefill + 2 x TP2 bf16/fp8, KV fp8 decode, 64 seqs / 8192 tokens"
    assert plan_words(plan) == apart


def test_a_locked_clock_stands_with_the_workers_it_locks() -> None:
    slow = {**PAIR_WORKER, "gpu_clock_hz": 1.2e9}
    rest = "fp8, KV fp8, 1024 seqs / 8192 tokens"
    plan: dict[str, Any] = {"serving": "aggregated", "replicas": 1, "worker": slow}
    assert plan_words(plan) == f"1 x TP4, {rest}, 1200 MHz"
    plan = {
        "serving": "disaggregated",
        "prefill": {"replicas": 1, "worker": PAIR_WORKER},
        "decode": {"replicas": 1, "worker": slow},
    }
    assert plan_words(plan) == f"1 x TP4 prefill + 1 x TP4 at 1200 MHz decode, {rest}"
    plan["prefill"]["worker"] = slow
    assert plan_words(plan) == f"1 x TP4 prefill + 1 x TP4 decode, {rest}, 1200 MHz"


def test_plan_shows_the_front_and_writes_the_result(save: Save, capsys: Captured, tmp_path: Path) -> None:
    assert main(["plan", save(small_request()), "--json", "out.json"]) == DONE
    out, err = capsys.readouterr()
    assert "llama-3.2-1b on 1 x 2 h100-sxm-80gb" in out
    assert err == ""  # a search this short reports no progress
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["status"] == "ok"
    assert result["front"]
    assert not list(tmp_path.glob("*.part"))
    assert result["plans"] == Planner().plan(small_request()).model_dump(mode="json")["plans"]


def test_plan_to_standard_output_is_json_and_nothing_else(save: Save, capsys: Captured) -> None:
    assert main(["plan", save(small_request()), "--json", "-", "--quiet"]) == DONE
    out, err = capsys.readouterr()
    assert json.loads(out)["search"]["certified"] is True
    assert err == ""


def test_plan_from_standard_input_in_yaml() -> None:
    text = "model: llama-3.2-1b\ncluster: {pools: [{device: t4, devices_per_node: 1}]}\n"
    text += "workload: {synthetic: {preset: chat, requests: 5}}\nspace: {max_num_seqs: [8]}\n"
    done = command("plan", "-", "--json", "-", stdin=text)
    assert done.returncode == DONE, done.stderr
    assert json.loads(done.stdout)["request"]["cluster"]["pools"][0]["device"] == "t4"


def test_plan_is_3_when_no_plan_meets_the_slo(save: Save, capsys: Captured) -> None:
    request = small_request(slo={"ttft_s": {"p95": 1e-6}})
    assert main(["plan", save(request), "--quiet"]) == NO_PLAN
    out = capsys.readouterr().out
    assert "No plan meets the SLO. The nearest, each with its best batching:" in out
    assert "TTFT p95" in out
    assert "Nearest " in out
    assert "Recommended" not in out
    assert main(["plan", save(request), "--quiet", "--json", "-"]) == NO_PLAN
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["front"]) == ("infeasible", [])
    assert all(entry["slo_misses"] for entry in result["plans"])


def test_plans_on_several_pools_say_on_which(save: Save, capsys: Captured) -> None:
    pools = [{"name": name, "device": device, "devices_per_node": 1} for name, device in
             (("big", "h100-sxm-80gb"), ("small", "l4"))]  # fmt: skip
    assert main(["plan", save(small_request(cluster={"pools": pools})), "--quiet"]) == DONE
    rows = [line for line in capsys.readouterr().out.splitlines() if " seqs / " in line]
    assert rows
    assert all(", on big" in line or ", on small" in line for line in rows)
    assert main(["plan", save(small_request()), "--quiet"]) == DONE
    assert ", on main" not in capsys.readouterr().out


@pytest.mark.parametrize("objectives", [["latency", "energy", "throughput"], ["tpot", "cost"]])
def test_what_to_take_for_another_aim_and_what_it_changes(objectives: list[str], save: Save) -> None:
    request = small_request(objectives=objectives, slo={"e2e_s": {"p95": 600.0}})
    result = Planner().plan(request).model_dump(mode="json")
    by_id = {entry["id"]: entry for entry in result["plans"]}
    chosen = by_id[result["recommended"]["plan_id"]]["metrics"]
    told = dict(instead(result))
    assert told
    for name in objectives:
        best = min(
            (by_id[ident] for ident in result["front"]), key=lambda e: objective_value(name, e["metrics"])
        )
        # Throughput is negated in both, so that more of it is a ratio above one.
        ratio = objective_value(name, best["metrics"]) / objective_value(name, chosen)
        if abs(ratio - 1.0) > 0.006:
            words = told[plan_words(best["plan"])]
            assert f"{name} {100 * (ratio - 1):+,.0f} %" in words
    cheapest = min(
        (e for e in result["plans"] if e["meets_slo"]),
        key=lambda e: e["metrics"]["usd_per_million_output_tokens"],
    )
    dearer = (
        chosen["usd_per_million_output_tokens"] > 1.005 * cheapest["metrics"]["usd_per_million_output_tokens"]
    )
    says = "cheapest that meets the SLO" in told.get(plan_words(cheapest["plan"]), "")
    assert says == (dearer and "cost" not in objectives)


def test_plans_that_differ_by_next_to_nothing_are_shown_once() -> None:
    def entry(name: str, latency: float, throughput: float) -> dict[str, Any]:
        return {"id": name, "metrics": {"e2e_s": {"mean": latency}, "output_tokens_per_s": throughput}}

    front = [
        entry("a", 1.0, 100.0),
        entry("b", 1.002, 100.2),
        entry("c", 1.004, 103.0),
        entry("d", 1.5, 150.0),
    ]
    names = ["latency", "throughput"]
    assert [e["id"] for e in told_apart(front, names, "d")] == ["a", "c", "d"]
    assert [e["id"] for e in told_apart(front, names, "b")] == ["b", "c", "d"]
    assert told_apart(front, ["throughput"], None) == [front[0], front[2], front[3]]
    assert told_apart([], names, None) == []


def test_of_conversations_the_beginnings_have_the_rate(save: Save, capsys: Captured) -> None:
    assert main(["plan", save(small_request(workload=synthetic(turns={"mean": 4}))), "--quiet"]) == DONE
    heading = capsys.readouterr().out.splitlines()[0]
    assert re.search(r"50 requests in conversations that begin at \d\.\d\d/s", heading)


def test_what_cannot_run_and_what_would_help_stand_apart(save: Save, capsys: Captured) -> None:
    request = small_request(model="llama-3.1-70b", space={})
    assert main(["plan", save(request), "--quiet"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    cannot = next(int(line.split(": ")[1].split()[0]) for line in lines if " cannot run, " in line)
    told = [re.match(r"  cannot run \((\d+)\): ", line) for line in lines]
    assert sum(int(found[1]) for found in told if found) == cannot, "every plan has its reason"
    request = small_request(slo={"ttft_s": {"p95": 1e-6}}, cluster={"pools": [{"device": "t4", "nodes": 1}]})
    request["model"] = "llama-3.1-8b"
    assert main(["plan", save(request), "--quiet"]) == NO_PLAN
    out = capsys.readouterr().out
    assert 0 < out.index("  cannot run (") < out.index("What would have to change")


def test_plan_options_override_the_request(save: Save, capsys: Captured) -> None:
    request = small_request(search={"method": "auto", "budget_s": 9, "seed": 4})
    arguments = [
        "plan",
        save(request),
        "--json",
        "-",
        "--method",
        "exhaustive",
        "--budget",
        "7.5",
        "--workers",
        "1",
    ]
    assert main(arguments) == DONE
    result = json.loads(capsys.readouterr().out)
    assert result["request"]["search"] == {"method": "exhaustive", "budget_s": 7.5, "seed": 4}
    assert result["search"]["method"] == "exhaustive"


def test_plan_reads_a_trace_beside_the_request(save: Save, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "below").mkdir()
    row = {"input_tokens": 64, "output_tokens": 8}
    save("".join(json.dumps({"arrival_s": 0.1 * i, **row}) + "\n" for i in range(20)), "below/t.jsonl")
    request = small_request(workload={"trace": {"path": "t.jsonl"}})
    assert main(["plan", save(request, "below/request.json"), "--json", "-"]) == DONE
    assert json.loads(capsys.readouterr().out)["workload"]["trace"]["rows"] == 20


@pytest.mark.parametrize("target", ["missing/out.json", ".", "folder"])
@pytest.mark.parametrize("call", ["plan", "evaluate", "lines"])
def test_a_target_that_cannot_be_written_is_refused_before_the_work(
    call: str, target: str, save: Save, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Planner, "load", lambda *_: pytest.fail("work was done"))
    name = save({**small_request(), "plan": PLAN}, "r.jsonl" if call == "lines" else "r.json")
    assert main([call.replace("lines", "evaluate"), name, "--json", target]) == BAD_INPUT
    assert error_of(capsys).startswith(f"{target}: ")


# --- evaluate ------------------------------------------------------------------------------------


def test_evaluate_judges_one_plan(save: Save, capsys: Captured, tmp_path: Path) -> None:
    name = save({**small_request(), "plan": PLAN, "id": "one"})
    assert main(["evaluate", name]) == DONE
    assert "TTFT" in capsys.readouterr().out
    assert main(["evaluate", name, "--json", "-"]) == DONE
    answer = json.loads(capsys.readouterr().out)
    assert (answer["id"], answer["status"]) == ("one", "ok")
    assert answer["plans"] == json.loads(json.dumps(Planner().evaluate(small_request(), PLAN)["plans"]))
    assert main(["evaluate", name, "--json", "out.json"]) == DONE
    assert json.loads((tmp_path / "out.json").read_text()) == answer


def test_evaluate_of_a_plan_that_does_not_fit_in_memory(save: Save, capsys: Captured) -> None:
    request = small_request(model="llama-3.1-405b", plan=PLAN)
    assert main(["evaluate", save(request), "--json", "-"]) == NO_PLAN
    answer = json.loads(capsys.readouterr().out)
    assert (answer["status"], answer["plans"]) == ("infeasible", [])
    assert "GB" in answer["rejected"][0]["reason"]


LINES = [
    json.dumps({**small_request(), "plan": PLAN, "id": "first"}),
    "",
    "not json",
    json.dumps({**small_request(model="llama-9"), "plan": PLAN, "id": 7}),
    json.dumps({**small_request(), "plan": {"worker": {"parallelism": {"tensor": 16}}}, "id": "infeasible"}),
    "[1]",
    '{"id": "nan", "plan": NaN}',
    "   ",
    json.dumps({**small_request(), "id": "no plan"}),
    json.dumps({**small_request(), "plan": {"worker": {"parallelism": {"tensor": 1}}}}),
    '{"id": "twice", "id": "twice"}',
    "\xff",
]


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluate_answers_each_line_in_order(save: Save, workers: int) -> None:
    name = save(b"\n".join(line.encode("latin-1") for line in LINES), "lines.jsonl")
    done = command("evaluate", name, "--workers", str(workers))
    assert (done.returncode, done.stderr) == (DONE, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(answer["id"], answer["status"]) for answer in answers] == [
        ("first", "ok"), (None, "error"), (7, "error"), ("infeasible", "infeasible"), (None, "error"),
        (None, "error"), ("no plan", "error"), (None, "ok"), (None, "error"), (None, "error"),
    ]  # fmt: skip
    paths = [answer["error"]["path"] for answer in answers if answer["status"] == "error"]
    assert paths == ["line 3", "model", "line 6", "line 7", "plan", "line 11", "line 12"]
    assert all(answer["error"]["message"] for answer in answers if answer["status"] == "error")
    assert answers[3]["rejected"][0]["field"] == "plan.worker.parallelism"
    direct = Planner().evaluate(small_request(), PLAN)
    assert answers[0]["plans"] == json.loads(json.dumps(direct["plans"]))


def test_evaluate_keeps_the_order_of_many_lines(save: Save, tmp_path: Path) -> None:
    # More than one task per process; lines take from nothing to a simulation.
    lines = [
        json.dumps({**small_request(), "plan": PLAN, "id": i} if i % 7 == 0 else {"id": i})
        for i in range(100)
    ]
    done = command("evaluate", save("\n".join(lines), "m.jsonl"), "--workers", "2", "--json", "out.jsonl")
    assert (done.returncode, done.stdout, done.stderr) == (DONE, "", "")
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == list(range(100))
    assert [answer["status"] == "ok" for answer in answers] == [i % 7 == 0 for i in range(100)]


def test_evaluate_of_an_empty_file_answers_nothing(save: Save, capsys: Captured) -> None:
    assert main(["evaluate", save("\n\n", "e.jsonl"), "--workers", "1"]) == DONE
    assert capsys.readouterr() == ("", "")


# --- catalog, schema, help -----------------------------------------------------------------------


@pytest.mark.parametrize("what", CATALOGS)
def test_catalog(what: str, capsys: Captured) -> None:
    assert main(["catalog", what, "--json"]) == DONE
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) >= 3
    assert all(row.get("source") or row.get("sources") for row in rows)
    assert main(["catalog", what]) == DONE
    out = capsys.readouterr().out
    # Folding may break a long name over lines, its first characters stay.
    assert all(row["name"][:8] in out for row in rows)


@pytest.mark.parametrize(
    ("what", "field"), [("request", "workload"), ("plan", "worker"), ("result", "front")]
)
def test_schema(what: str, field: str, capsys: Captured) -> None:
    assert main(["schema", what]) == DONE
    assert field in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize("command_", ["plan", "evaluate", "catalog", "schema"])
def test_help_has_an_example(command_: str, capsys: Captured) -> None:
    assert main([command_, "--help"]) == DONE
    assert f"example: planfront {command_} " in capsys.readouterr().out


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == DONE
    assert re.fullmatch(r"planfront \S+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["paln"], "did you mean 'plan'?"),
        (["evalute", "x"], "did you mean 'evaluate'?"),
        (["catalog", "device"], "did you mean 'devices'?"),
        (["plan"], "required: REQUEST"),
        (["plan", "x", "--method", "exhaustiv"], "did you mean 'exhaustive'?"),
        (["keys", "create", "--role", "boss"], "invalid choice: 'boss'"),
        (["keys", "create", "--role", "planer"], "did you mean 'planner'?"),
        (["plan", "x", "--budget", "soon"], "--budget: invalid float value: 'soon'"),
        (["plan", "x", "--nope"], "unrecognized arguments: --nope"),
        (["schema", "zzz"], "choose from"),
    ],
)
def test_a_wrong_command_line_says_what_is_meant(arguments: list[str], words: str, capsys: Captured) -> None:
    assert main(arguments) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("planfront: error: ")
    assert words in first
    assert second.startswith("Try 'planfront")


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["import api.cli", "from api.cli import main; main(['--help']); main(['paln'])"]
)
def test_help_imports_nothing_heavy(code: str) -> None:
    done = python(f"{code}\nimport sys; print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)")
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == ""


@pytest.mark.parametrize("name", ["plan", "load"])
def test_ctrl_c_is_130(name: str, save: Save, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Planner, name, interrupted)
    assert main(["plan", save(small_request())]) == INTERRUPTED
    assert capsys.readouterr() == ("", "planfront: interrupted\n")


def test_a_signal_ends_a_running_search_with_130(save: Save, tmp_path: Path) -> None:
    # A fifo: the command waits for the rest of its request, at a place that is always the same.
    os.mkfifo(tmp_path / "request.yaml")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [sys.executable, "-m", "api.cli", "plan", "request.yaml"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
        # Whoever runs the tests in the background has them ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        with (tmp_path / "request.yaml").open("w") as fifo:  # returns once the command reads
            fifo.write("model: ")
            fifo.flush()
            running.send_signal(signal.SIGINT)
        # Closed by now: a signal between two reads is only seen once the second of them returns.
        out, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    assert (running.returncode, out, err) == (INTERRUPTED, "", "planfront: interrupted\n")


def test_a_fault_of_ours_is_one_sentence(
    save: Save, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the cause\nin two lines")

    monkeypatch.setattr(Planner, "plan", broken)
    assert main(["plan", save(small_request())]) == FAULT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("planfront: internal error: RuntimeError: the cause")
    assert "PLANFRONT_DEBUG=1" in err
    assert "Traceback" not in err
    monkeypatch.setenv("PLANFRONT_DEBUG", "1")
    with pytest.raises(RuntimeError, match="the cause"):
        main(["plan", save(small_request())])


def test_a_reader_that_goes_away_is_no_error() -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [sys.executable, "-m", "api.cli", "catalog", "models", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    err = running.stderr.read()
    running.stderr.close()
    assert (running.wait(30), err) == (DONE, b"")


def test_workloads_of_the_command_line_have_no_service_limits(save: Save, capsys: Captured) -> None:
    """The caps of the REST API are for strangers; who runs the command owns the machine."""
    request = small_request(workload=synthetic(requests=100_001), plan=PLAN)
    assert main(["evaluate", save(request), "--json", "-"]) == DONE
    assert json.loads(capsys.readouterr().out)["status"] == "ok"
