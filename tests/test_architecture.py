"""The walls: who imports whom, what is shipped, and what may not stand in a file."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("hardware", "costmodels", "planner", "api", "web")
#: The command offers a page of a result; it reaches for it when asked, and only there.
UPWARD = {("api/cli.py", "web")}
#: The compiled loop is one function for speed (docs/decisions/0002).
LONG = {"planner/simulator/core.py"}
MAX_LINES = 600
TEXT = {".py", ".toml", ".md", ".yaml", ".yml", ".jsonl", ".json", ".html", ".css", ".txt", ".cfg", ""}


def product_files(suffix: str = ".py") -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob(f"*{suffix}"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Full names of the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name lives"
            names.add(node.module or "")
    return frozenset(names)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_before_it(room: str) -> None:
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in sorted((ROOT / room).rglob("*.py"))
        for name in imported(path)
        if name.split(".")[0] in ROOMS and name.split(".")[0] not in allowed
    ]
    assert [pair for pair in wrong if (pair[0], pair[1].split(".")[0]) not in UPWARD] == []


def test_scikit_learn_and_ortools_have_one_door_each() -> None:
    doors = {
        "sklearn": "costmodels/learned/", "lightgbm": "costmodels/learned/boosting.py",
        "ortools": "planner/search/", "sqlmodel": "api/",
    }  # fmt: skip
    for package, door in doors.items():
        users = [
            str(p.relative_to(ROOT))
            for p in product_files()
            if any(n.split(".")[0] == package for n in imported(p))
        ]
        assert [user for user in users if not user.startswith(door)] == [], package


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in product_files()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert set(long) <= LONG, long


def test_nothing_points_outside_the_project() -> None:
    # Spelt in parts so that this file does not match itself.
    forbidden = re.compile(
        "|".join([r"\.\./" + "shared", "/work" + "/", "/tmp" + "/w", "/home" + "/", "/root" + "/"])
    )
    wrong = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if (
            not path.is_file()
            or path.suffix not in TEXT
            or any(p.startswith(".") and p != ".ci" for p in parts)
        ):
            continue
        if any(part in ("__pycache__", "build", "dist") or part.endswith(".egg-info") for part in parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {found.group()}" for found in forbidden.finditer(text)]
    assert wrong == []


def test_the_wheel_holds_the_five_rooms_and_only_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(ROOMS)
    for room in ROOMS:
        assert (ROOT / room / "__init__.py").is_file()
        assert (ROOT / room / "py.typed").is_file(), f"{room} is typed and says so"


def test_everything_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"scikit-learn": "sklearn", "pyyaml": "yaml", "nvidia-ml-py": "pynvml"}
    declared = {re.split(r"[<>=\[ ]", item)[0].lower() for item in project["dependencies"]}
    extras = {
        re.split(r"[<>=\[ ]", item)[0].lower()
        for items in project["optional-dependencies"].values()
        for item in items
    }
    modules = {names.get(item, item.replace("-", "_")) for item in declared | extras}
    import sys

    used = {name.split(".")[0] for path in product_files() for name in imported(path)}
    # starlette is fastapi's own base; vllm is an engine whose kernels are profiled where it stands.
    known = set(sys.stdlib_module_names) | set(ROOMS) | modules | {"starlette", "vllm", "__future__"}
    assert used - known == set()
