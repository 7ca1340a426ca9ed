"""Documents say what is so: commands exist, options are told, examples run, links lead somewhere."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import yaml

from api.cli import build_parser
from planner import Plan, Planner, PlanningRequest, PlanningResult, parse_request
from planner.fleet import parse_fleet

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "examples" / "README.md"])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no commands")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_two_commands_stand_in_the_readme() -> None:
    shell = "\n".join(blocks(README, "sh"))
    assert "pip install . && planfront plan examples/quickstart.yaml" in shell
    assert "pip install '.[test]' && pytest" in shell


def test_every_command_and_option_is_documented() -> None:
    for name, parser in commands().items():
        assert f"`planfront {name}" in README
        assert "example: planfront" in (parser.epilog or ""), name
        row = next(line for line in README.splitlines() if line.startswith(f"| `planfront {name}"))
        for action in parser._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    assert option in row, f"{name} {option}"


def test_documented_commands_parse() -> None:
    for document in DOCUMENTS:
        for block in blocks(document.read_text(encoding="utf-8"), "sh"):
            for line in re.findall(rf"planfront ((?:{'|'.join(commands())})[^\n&|#>]*)", block):
                build_parser().parse_args(line.split())


def test_the_request_of_the_readme_is_valid() -> None:
    for block in blocks(README, "yaml"):
        parse_request(yaml.safe_load(block))


def test_the_program_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(README, "python"):
        exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"'tensor': \d", capsys.readouterr().out)


def test_the_shown_output_has_the_shape_of_a_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Same heading, same columns, same closing sentence as the command prints today."""
    from api.cli import main

    found = re.search(r"<!-- output: quickstart -->\n```text\n(.*?)```", README, re.DOTALL)
    assert found is not None
    shown = [line for line in found.group(1).splitlines() if line.strip()]
    request = ROOT / "examples" / "quickstart.yaml"
    assert main(["plan", str(request), "--quiet"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert shown[0].split(";")[0] == printed[0].split(";")[0]
    assert [w for w in shown[1].split() if w.isalpha()] == [w for w in printed[1].split() if w.isalpha()]
    count = re.compile(r"[\d,]+ plans: .* the front is certified")
    assert any(count.search(line) for line in shown)
    assert any(count.search(line) for line in printed)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data.pop("plan", None)
    if "models" in data:
        parse_fleet(data)
    else:
        Planner(base_dir=path.parent).load(data)
    assert path.name in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_every_environment_variable_is_documented() -> None:
    used = set()
    for room in ("hardware", "costmodels", "planner"):
        for path in (ROOT / room).rglob("*.py"):
            used |= set(re.findall(r"\"(PLANFRONT_[A-Z_]+)\"", path.read_text(encoding="utf-8")))
    for name in used:
        assert f"`{name}`" in README, name


# The contract's names: what pipelines read must be there under exactly these names.
REQUEST_FIELDS = {
    "schema_version",
    "model",
    "engine",
    "cluster",
    "workload",
    "slo",
    "objectives",
    "space",
    "search",
    "prices",
}
PLAN_FIELDS = {"serving", "replicas", "worker", "prefill", "decode"}
RESULT_FIELDS = {
    "schema_version",
    "request",
    "status",
    "front",
    "recommended",
    "plans",
    "rejected",
    "search",
    "provenance",
}
SEARCH_FIELDS = {"method", "space_size", "bounded", "simulated", "wall_s", "certified", "hypervolume", "seed"}
METRICS = {
    "ttft_s", "tpot_s", "itl_s", "e2e_s", "makespan_s",
    "output_tokens_per_s", "output_tokens_per_s_per_device",
    "requests_per_s", "goodput_rps", "energy_j", "energy_j_per_output_token", "power_w", "devices",
    "power_w_per_device", "usd_per_hour", "usd_per_million_output_tokens", "mfu", "mbu", "preemptions",
    "prefix_hit_rate",
}  # fmt: skip


def test_the_contract_holds() -> None:
    assert set(PlanningRequest.model_json_schema()["properties"]) >= REQUEST_FIELDS
    assert set(Plan.model_json_schema()["properties"]) >= PLAN_FIELDS
    assert set(PlanningResult.model_json_schema()["properties"]) >= RESULT_FIELDS
    result = (
        Planner()
        .plan(
            {
                "model": "llama-3.2-1b",
                "cluster": {"pools": [{"device": "h100-sxm-80gb", "devices_per_node": 1}]},
                "workload": {"synthetic": {"preset": "chat", "requests": 20}},
                "space": {"weights": ["bf16"]},
            }
        )
        .model_dump(mode="json")
    )
    assert set(result) >= RESULT_FIELDS
    assert set(result["search"]) >= SEARCH_FIELDS
    entry = result["plans"][0]
    assert set(entry) >= {
        "id",
        "plan",
        "meets_slo",
        "metrics",
        "memory_bytes_per_device",
        "interval",
        "breakdown_s",
    }
    assert set(entry["metrics"]) >= METRICS
    assert set(entry["metrics"]["ttft_s"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert set(entry["memory_bytes_per_device"]) >= {
        "weights",
        "kv_cache",
        "activations",
        "runtime",
        "free",
        "capacity",
    }
    assert set(entry["breakdown_s"]) >= {"gemm", "attention", "moe", "communication", "host", "idle"}
    assert set(entry["interval"]) >= {"ttft_s", "tpot_s"}
    for row in result["provenance"]["cost_models"]:
        assert set(row) >= {"operator", "device", "source", "kind"}
