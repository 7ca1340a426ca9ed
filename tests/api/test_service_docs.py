"""docs/service.md says what is so: limits with their defaults, calls that exist, programs that run."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from api.app import create_api
from api.cli import build_parser
from api.settings import Settings
from tests.api.conftest import ROOT

TEXT = (ROOT / "docs" / "service.md").read_text(encoding="utf-8")


def test_every_limit_is_told_with_its_default() -> None:
    rows = dict(re.findall(r"\| `(PLANFRONT_\w+)` \| ([0-9.]+) \|", TEXT))
    told = {name.removeprefix("PLANFRONT_").lower(): float(value) for name, value in rows.items()}
    assert told == {name: float(value) for name, value in asdict(Settings()).items()}


def test_every_call_exists() -> None:
    served = {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path))
        for path, operations in create_api(settings=Settings()).openapi()["paths"].items()
        for method in operations
    }
    for method, path in re.findall(r"\| `([A-Z]+) (/[^`?]*)", TEXT):
        assert (method, re.sub(r"\{\w+\}", "{}", path)) in served, path


def test_every_command_parses() -> None:
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL):
        for line in re.findall(r"^planfront (.*)$", block, re.MULTILINE):
            build_parser().parse_args(line.split())


def test_the_programs_run(capsys: pytest.CaptureFixture[str]) -> None:
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "service.md", "exec"), {})
    assert "False" in capsys.readouterr().out


def test_the_deploy_files_name_commands_that_exist() -> None:
    for file in (ROOT / "deploy").rglob("*"):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r"\[planfront, ([^\]]*)\]", text):
            build_parser().parse_args([word.strip().strip('"') for word in line.split(",")])
