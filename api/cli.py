"""The `planfront` command. Nothing heavy is imported before a command needs it: help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

DONE, FAULT, BAD_INPUT, NO_PLAN, INTERRUPTED = 0, 1, 2, 3, 130
SERVICE = ("serve", "worker", "db", "keys", "runs", "rerun", "compare", "backup", "prune")
CATALOGS = ("devices", "models", "engines", "workloads", "costmodels")
ENGINES = ("vllm", "sglang", "trtllm")
METHODS = ("auto", "exhaustive", "cp-sat", "mcts")


class _Parser(argparse.ArgumentParser):
    """One sentence and exit code 2; an unknown command suggests the nearest."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice" in message and "'" in message:
            import difflib

            given = message.split("'")[1]
            # Of what this very argument takes: Python 3.11 quotes the choices, 3.12 does not.
            choices = message.rpartition("(choose from ")[2].rstrip(")").replace("'", "").split(", ")
            close = difflib.get_close_matches(given, choices, n=1, cutoff=0.4)
            if close:
                message = f"unknown '{given}'; did you mean '{close[0]}'?"
        self.exit(BAD_INPUT, f"planfront: error: {message}\nTry '{self.prog} --help'.\n")


class _Version(argparse.Action):
    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        from importlib import metadata

        try:
            found = metadata.version("planfront")
        except metadata.PackageNotFoundError:
            found = "0+unknown"
        print(f"planfront {found}")
        parser.exit(DONE)


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = _Parser(
        prog="planfront",
        description="Finds the Pareto-best ways to serve a large language model on given machines "
        "for given traffic.",
        epilog="example: planfront plan examples/quickstart.yaml",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    plan = commands.add_parser(
        "plan",
        help="search for the best plans",
        description="Search all plans of a request and print the Pareto front. Exit code 0, or 3 when no "
        "plan meets the SLO (the nearest are shown with what they miss).",
        epilog="example: planfront plan examples/quickstart.yaml --json result.json",
    )
    plan.add_argument("request", metavar="REQUEST", help="YAML or JSON file, or - for standard input")
    plan.add_argument("--json", metavar="OUT", help="write the whole result as JSON; - for standard output")
    plan.add_argument("--html", metavar="OUT", help="write the result as one self-contained web page")
    plan.add_argument("--method", choices=METHODS, help="search method (default: the request's)")
    plan.add_argument("--budget", metavar="S", type=float, help="seconds to search (default: the request's)")
    plan.add_argument("--workers", metavar="N", type=int, help="workers that simulate (default: all cores)")
    plan.add_argument(
        "--backend",
        choices=("auto", "threads", "processes", "dask", "ray"),
        default="auto",
        help="where they run: this machine's threads or processes, or a dask or ray cluster (default: auto)",
    )
    plan.add_argument("--quiet", action="store_true", help="no progress")

    evaluate = commands.add_parser(
        "evaluate",
        help="judge plans of known shape",
        description="FILE is one request with a `plan:` key (YAML or JSON), or .jsonl with one request a "
        "line (optional `id`): one JSON line answers each, in order; a bad line answers with its error "
        "and the rest goes on.",
        epilog="example: planfront evaluate examples/evaluate.jsonl --json answers.jsonl",
    )
    evaluate.add_argument("file", metavar="FILE")
    evaluate.add_argument("--json", metavar="OUT", help="write answers there; - for standard output")
    evaluate.add_argument("--workers", metavar="N", type=int, help="processes (default: all cores)")

    batch = commands.add_parser(
        "batch",
        help="plan a file of requests, each to a file of its own",
        description="Plan every line of a .jsonl file (a planning request, optional `id`). Answers are whole "
        "files in DIR; after an interruption --resume works on what is missing. Exit code 0, or 3 when no "
        "request could be met.",
        epilog="example: planfront batch requests.jsonl --out answers --resume",
    )
    batch.add_argument("file", metavar="FILE")
    batch.add_argument("--out", metavar="DIR", required=True, help="where the answers go")
    batch.add_argument("--workers", metavar="N", type=int, help="processes (default: all cores)")
    batch.add_argument("--resume", action="store_true", help="keep answers that are there")
    batch.add_argument("--quiet", action="store_true", help="no progress")

    fleet = commands.add_parser(
        "fleet",
        help="the cheapest mix of replicas for several models over an inventory",
        description="Choose replicas of simulated plans on the pools of an inventory, for several models "
        "with their traffic and SLOs, at the least cost, energy or devices. Exit code 0, or 3 when the "
        "inventory cannot carry the demand.",
        epilog="example: planfront fleet examples/fleet.yaml --json fleet.json",
    )
    fleet.add_argument("request", metavar="REQUEST", help="YAML or JSON file, or - for standard input")
    fleet.add_argument("--json", metavar="OUT", help="write the answer as JSON; - for standard output")
    fleet.add_argument("--budget", metavar="S", type=float, help="seconds to search (default: the request's)")
    fleet.add_argument("--workers", metavar="N", type=int, help="threads of the solver (default: all cores)")
    fleet.add_argument("--quiet", action="store_true", help="no progress")

    sweep = commands.add_parser(
        "sweep",
        help="how the recommendation changes with an SLO, a price, the rate or the machines",
        description="Plan a request at several values of one of its numbers. FIELD is the path of a number "
        "(slo.ttft_s.p95, prices.l40s, cluster.pools[0].nodes) or `rate`, a multiple of the request's own.",
        epilog="example: planfront sweep examples/quickstart.yaml --vary rate --values 0.5,1,2,4",
    )
    sweep.add_argument("request", metavar="REQUEST", help="YAML or JSON file, or - for standard input")
    sweep.add_argument("--vary", metavar="FIELD", required=True, help="what to vary")
    sweep.add_argument("--values", metavar="A,B,...", required=True, help="its values, in order")
    sweep.add_argument("--json", metavar="OUT", help="write the answer as JSON; - for standard output")
    sweep.add_argument("--workers", metavar="N", type=int, help="threads that simulate (default: all cores)")
    sweep.add_argument("--quiet", action="store_true", help="no progress")

    export = commands.add_parser(
        "export",
        help="a plan as a command line or manifest",
        description="Write one plan of a result as what an engine or a cluster takes; each option names the "
        "field of the plan behind it.",
        epilog="example: planfront export result.json --plan recommended --target vllm",
    )
    stdin = "result of `planfront plan --json`, or - for standard input"
    export.add_argument("result", metavar="RESULT", help=stdin)
    export.add_argument("--plan", metavar="ID", default="recommended", help="default: the recommended")
    targets = "vllm, sglang, trtllm, kubernetes, dynamo or rayserve"
    export.add_argument("--target", metavar="T", required=True, help=targets)
    export.add_argument("--out", metavar="DIR", help="write the files there instead of printing them")

    catalog = commands.add_parser(
        "catalog",
        help="list what is known, with sources",
        description="List devices, models, engine profiles, traffic presets or fitted predictors, with "
        "their sources.",
        epilog="example: planfront catalog devices --json",
    )
    catalog.add_argument("what", choices=CATALOGS, metavar="{devices,models,engines,workloads,costmodels}")
    catalog.add_argument("--json", action="store_true", help="print as a JSON list")

    from api import cli_measure, validate

    cli_measure.add_commands(commands)
    validate.add_parser(commands)

    schema = commands.add_parser(
        "schema",
        help="print a JSON schema",
        description="Print the JSON schema of a request, a plan or a result.",
        epilog="example: planfront schema request > request.schema.json",
    )
    schema.add_argument("what", choices=("request", "plan", "result"))
    from api import cli_service

    cli_service.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 our fault, 2 bad input, 3 no plan."""
    try:
        given = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    from hardware.errors import InputError

    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "plan": _plan,
        "evaluate": _evaluate,
        "batch": _batch,
        "fleet": _fleet,
        "sweep": _sweep,
        "export": _export,
        "catalog": _catalog,
        "train": _measure,
        "profile": _measure,
        "validate": _measure,
    }
    try:
        code = run.get(given.command, _service)(given)
        sys.stdout.flush()
        return code
    except InputError as error:
        for path, message in _problems(error):
            print(
                f"planfront: error: {path}: {message}" if path else f"planfront: error: {message}",
                file=sys.stderr,
            )
        return BAD_INPUT
    except KeyboardInterrupt:
        print("planfront: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (as in `| head`): not an error; keep Python's exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:  # a fault of ours: one sentence, the rest on request
        if os.environ.get("PLANFRONT_DEBUG"):
            raise
        kind = type(error).__name__
        print(
            f"planfront: internal error: {kind}: {str(error)[:300]} (PLANFRONT_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        return FAULT


def _problems(error: Exception) -> list[tuple[str, str]]:
    several = getattr(error, "problems", None)
    if several:
        return list(several)
    from api.evaluate import problem
    from hardware.errors import InputError

    assert isinstance(error, InputError)
    found = problem(error)
    return [(found["path"], found["message"])]


def _workers(given: int | None) -> int:
    from hardware.errors import InputError

    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= given <= 1024:
        raise InputError("--workers", f"must be from 1 to 1024, not {given}")
    return given


def _check_target(target: str | None) -> None:
    """Refuse what cannot be written before the work and not after it."""
    from hardware.errors import InputError

    if target in (None, "-"):
        return
    path = Path(str(target))
    if path.is_dir():
        raise InputError(str(target), "is a folder; name a file to write")
    if not path.parent.is_dir():
        raise InputError(str(target), "cannot be written: its folder does not exist")


def _write(target: str, text: str) -> None:
    """To a file by way of a temporary one beside it, so that a kill leaves no half result."""
    from hardware.errors import InputError

    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target)
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(target, f"cannot be written: {error.strerror}") from error


# --- commands ------------------------------------------------------------------------------------


def _plan(given: argparse.Namespace) -> int:
    from api.files import read_document
    from hardware.errors import InputError

    data, base = read_document(given.request)
    search = (data.get("search") or {}) if isinstance(data, dict) else None
    # What is no mapping is the request's own error, told when it is read.
    if isinstance(search, dict) and (given.method or given.budget is not None):
        search = dict(search)
        if given.method:
            search["method"] = given.method
        if given.budget is not None:
            search["budget_s"] = given.budget
        data = {**data, "search": search}
    if given.json == "-" and given.html == "-":
        raise InputError("--html", "only one of --json and --html can go to standard output")
    _check_target(given.json)
    _check_target(given.html)
    workers = _workers(given.workers)
    from api.terminal import ProgressLine, show_result

    if given.server:
        from api.cli_service import plan_there

        plain = plan_there(given.server, data, base, quiet=given.quiet)
    else:
        from planner.pipeline import Planner
        from planner.search import Support

        support = Support(backend=given.backend)
        with ProgressLine(enabled=not given.quiet) as progress:
            result = Planner(base_dir=base).plan(data, progress=progress, workers=workers, support=support)
        plain = result.model_dump(mode="json")
    if given.json:
        import json

        _write(given.json, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    if given.html:
        from web.report import render_report

        _write(given.html, render_report(plain))
    if "-" not in (given.json, given.html):
        show_result(plain)
    return DONE if plain["status"] == "ok" else NO_PLAN


def _evaluate(given: argparse.Namespace) -> int:
    from api.evaluate import answer_file, encode
    from api.files import open_file, read_document
    from hardware.errors import InputError

    _check_target(given.json)
    path = Path(given.file)
    if given.server:
        from api.cli_service import evaluate_there

        return evaluate_there(given.server, path, given.json, _write)
    if path.suffix.lower() == ".jsonl":
        open_file(path).close()
        target = None
        if given.json and given.json != "-":
            try:
                target = Path(given.json).open("w", encoding="utf-8")  # noqa: SIM115 -- closed below
            except OSError as error:
                raise InputError(given.json, f"cannot be written: {error.strerror}") from error
        try:
            for line in answer_file(path, _workers(given.workers)):
                print(line, file=target or sys.stdout, flush=target is None)
        finally:
            if target is not None:
                target.close()
        return DONE
    data, base = read_document(given.file)
    from planner.pipeline import Planner

    answer = {
        "id": data.get("id") if isinstance(data, dict) else None,
        **Planner(base_dir=base).evaluate(data),
    }
    if answer["status"] != "ok":
        first = answer["rejected"][0]
        if first.get("field"):
            raise InputError(first["field"], first["reason"])
    if given.json:
        _write(given.json, encode(answer) + "\n")
    if given.json != "-":
        from api.terminal import show_evaluation

        show_evaluation(answer)
    return DONE if answer["status"] == "ok" else NO_PLAN


def _note(given: argparse.Namespace) -> Callable[[str], None] | None:
    return None if given.quiet else lambda text: print(text, file=sys.stderr, flush=True)


def _batch(given: argparse.Namespace) -> int:
    from api.batch import run_batch
    from api.files import open_file
    from hardware.errors import InputError

    path, out = Path(given.file), Path(given.out)
    open_file(path).close()
    if out.exists() and not out.is_dir():
        raise InputError("--out", f"{given.out} is a file; name a folder")
    workers = _workers(given.workers)
    if given.server:
        from api.batch import run_batch_there

        counts = run_batch_there(given.server, path, out, resume=given.resume, progress=_note(given))
    else:
        counts = run_batch(path, out, workers=workers, resume=given.resume, progress=_note(given))
    kept = f", {counts.kept} of them kept" if counts.kept else ""
    print(
        f"{counts.total} requests: {counts.ok} planned, {counts.infeasible} that no plan meets, "
        f"{counts.errors} with errors{kept}; {out / 'summary.jsonl'}"
    )
    if counts.ok or not counts.total:
        return DONE
    return NO_PLAN if counts.infeasible else BAD_INPUT


def _fleet(given: argparse.Namespace) -> int:
    from api.files import read_document

    data, base = read_document(given.request)
    search = (data.get("search") or {}) if isinstance(data, dict) else None
    if isinstance(search, dict) and given.budget is not None:
        data = {**data, "search": {**search, "budget_s": given.budget}}
    _check_target(given.json)
    workers = _workers(given.workers)
    if given.server:
        from api.cli_service import fleet_there

        answer = fleet_there(given.server, data, base, quiet=given.quiet)
    else:
        from planner.fleet import plan_fleet
        from planner.pipeline import Planner

        answer = plan_fleet(data, planner=Planner(base_dir=base), progress=_note(given), workers=workers)
    if given.json:
        import json

        _write(given.json, json.dumps(answer, indent=1, allow_nan=False) + "\n")
    if given.json != "-":
        from api.terminal import show_fleet

        show_fleet(answer)
    return DONE if answer["status"] == "ok" else NO_PLAN


def _sweep(given: argparse.Namespace) -> int:
    from api.files import read_document
    from hardware.errors import InputError

    data, base = read_document(given.request)
    try:
        values = [float(text) for text in given.values.split(",")]
    except ValueError:
        raise InputError(
            "--values", f"must be numbers with commas between, not {given.values[:60]!r}"
        ) from None
    _check_target(given.json)
    workers = _workers(given.workers)
    if given.server:
        from api.cli_service import sweep_there

        answer = sweep_there(given.server, data, given.vary, values, base, quiet=given.quiet)
    else:
        from planner.pipeline import Planner
        from planner.sweep import sweep

        planner = Planner(base_dir=base)
        answer = sweep(data, given.vary, values, planner=planner, progress=_note(given), workers=workers)
    if given.json:
        import json

        _write(given.json, json.dumps(answer, indent=1, allow_nan=False) + "\n")
    if given.json != "-":
        from api.terminal import show_sweep

        show_sweep(answer)
    return DONE if any(point["status"] == "ok" for point in answer["points"]) else NO_PLAN


def _export(given: argparse.Namespace) -> int:
    from api.files import read_document
    from hardware.errors import InputError
    from planner.exports import export_result

    if given.server:
        from api.cli_service import result_there

        data = result_there(given.server, given.result)
    else:
        data, _ = read_document(given.result)
    if not isinstance(data, dict) or not isinstance(data.get("plans"), list) or "request" not in data:
        raise InputError(given.result, "is no result of `planfront plan --json`")
    artifact = export_result(data, given.plan, given.target)
    if not given.out:
        sys.stdout.write(artifact.text())
        return DONE
    folder = Path(given.out)
    if folder.exists() and not folder.is_dir():
        raise InputError("--out", f"{given.out} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in artifact.files.items():
        _write(str(folder / name), text)
        print(folder / name)
    for note in artifact.notes:
        print(f"note: {note}")
    return DONE


def _catalog(given: argparse.Namespace) -> int:
    rows: list[dict[str, Any]]
    if given.server:
        from api.cli_service import catalog_there

        rows = catalog_there(given.server, given.what)
    elif given.what == "devices":
        from hardware import catalog_rows

        rows = catalog_rows()
    elif given.what == "models":
        from planner.models import model_rows

        rows = model_rows()
    elif given.what == "engines":
        from planner.engines import engine_rows

        rows = engine_rows()
    elif given.what == "costmodels":
        from costmodels import artifact_rows

        rows = artifact_rows()
    else:
        from planner.workload import workload_rows

        rows = workload_rows()
    if given.json:
        import json

        print(json.dumps(rows, indent=1, allow_nan=False))
        return DONE
    from api.terminal import show_catalog

    show_catalog(given.what, rows)
    return DONE


def _measure(given: argparse.Namespace) -> int:
    from api import cli_measure

    found: int = getattr(cli_measure, given.command)(given)
    return found


def _service(given: argparse.Namespace) -> int:
    from api import cli_service

    if given.command == "serve":
        from web.app import create_app

        return cli_service.serve(given, create_app)
    found: int = getattr(cli_service, given.command)(given)
    return found


if __name__ == "__main__":
    sys.exit(main())
