"""`planfront validate`: predictions beside measured runs, a line of JSON each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.validate import Comparison


def add_parser(commands: Any) -> None:
    """The command's arguments."""
    validate = commands.add_parser(
        "validate",
        help="compare predictions with measured runs",
        description="FILE is .jsonl: one request with its `plan` a line, as `evaluate` takes it, and "
        "`measured`, what a benchmark of it gave (ttft_s: {mean: 0.21}, output_tokens_per_s: 1830, ...). "
        "Prints each run's error and, by metric, mean and median error, bias, and how often the 90 %% "
        "interval held. Lines that cannot be judged are told and counted.",
        epilog="example: planfront validate examples/measured.jsonl",
    )
    validate.add_argument("file", metavar="FILE")
    validate.add_argument(
        "--json", metavar="OUT", help="write every comparison as JSON; - for standard output"
    )


def validate_file(path: Path, server: str | None = None) -> dict[str, Any]:
    """All runs of a file: comparisons, a summary by metric, and what could not be judged.

    `server`: the service that predicts; None: this process. Raises InputError for a file that cannot be read
    and a service that does not answer.
    """
    from planner.validate import Comparison, compare_run

    with ExitStack() as stack:
        if server:
            from api.cli_service import Files
            from api.client import Client

            client = stack.enter_context(Client(server))
            files = Files(client, path.resolve().parent)

            def compare(run: Mapping[str, Any]) -> list[Comparison]:
                names = ("metric", "measured", "predicted", "low", "high")
                rows = client.measure(files.with_config(run))["comparisons"]
                return [Comparison(**{name: row[name] for name in names}) for row in rows]

        else:
            from planner.pipeline import Planner

            planner = Planner(base_dir=path.resolve().parent)

            def compare(run: Mapping[str, Any]) -> list[Comparison]:
                return compare_run(planner, run)

        return _judged(path, compare)


def _judged(path: Path, compare: Callable[[Mapping[str, Any]], list[Comparison]]) -> dict[str, Any]:
    from api.client import ServiceError
    from api.evaluate import problem
    from api.files import parse_json, read_lines
    from hardware.errors import InputError
    from planner.validate import as_json, summarise

    runs, errors, every = [], [], []
    for number, line in read_lines(path):
        ident: Any = f"line {number}"
        try:
            if line is None:
                raise InputError(ident, "is too long")
            try:
                run = parse_json(line.decode("utf-8"))
            except ValueError as error:
                raise InputError(ident, f"is not readable JSON: {error}"[:300]) from error
            if not isinstance(run, Mapping):
                raise InputError(ident, "must be a mapping of fields")
            ident = run.get("id") or ident
            found = compare(run)
            every += found
            runs.append({"id": ident, "comparisons": [as_json(item) for item in found]})
        except InputError as error:
            refused = error.status == 422 if isinstance(error, ServiceError) else error.path != "--server"
            if not refused:
                raise
            errors.append({"id": ident, "error": problem(error)})
    if not runs and not errors:
        raise InputError(str(path), "holds no runs")
    return {"summary": summarise(every), "runs": runs, "errors": errors}


def run(given: argparse.Namespace, write: Any) -> int:
    """Judge the file and print; exit code 2 when no line could be judged."""
    import json

    from rich.table import Table

    from api.terminal import console

    report = validate_file(Path(given.file), given.server)
    if given.json:
        write(given.json, json.dumps(report, allow_nan=False, indent=1) + "\n")
    if given.json != "-":
        out = console()
        each = Table("run", "metric", "measured", "predicted", "error", "90 % interval", box=None)
        for item in report["runs"]:
            for row in item["comparisons"]:
                ends = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
                mark = "" if row["inside"] in (None, True) else "  outside"
                each.add_row(
                    str(item["id"]), row["metric"], f"{row['measured']:.4g}", f"{row['predicted']:.4g}",
                    f"{100 * row['error']:+.0f} %", ends + mark,
                )  # fmt: skip
        out.print(each)
        total = Table("metric", "runs", "mean error", "median", "bias", "inside interval", box=None)
        for row in report["summary"]:
            held = row["inside_interval"]
            total.add_row(
                row["metric"], str(row["runs"]), f"{100 * row['mean_absolute_error']:.0f} %",
                f"{100 * row['median_absolute_error']:.0f} %", f"{100 * row['bias']:+.0f} %",
                "" if held is None else f"{100 * held:.0f} %",
            )  # fmt: skip
        out.print()
        out.print(total)
        for item in report["errors"]:
            places = dict.fromkeys(str(name) for name in (item["id"], item["error"]["path"]) if name)
            out.print(": ".join([*places, item["error"]["message"]]))
    return 0 if report["runs"] else 2
