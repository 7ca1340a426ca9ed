"""The commands of the service: serve, worker, db, keys, runs, rerun, backup, prune."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from api.client import Client, Direct
    from api.store import Store

DONE, NO_PLAN = 0, 3
ROLES = ("viewer", "planner", "admin")
_DATABASE = "sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/NAME (default: a file of your own)"


def add_commands(commands: Any) -> None:
    """The parsers."""
    serve = commands.add_parser(
        "serve",
        help="run the REST API, the pages and workers",
        description="Answer requests on one address: the REST API with stored runs, and the web pages. Runs "
        "are kept in a SQLite file of your own, or in the database of --database-url. Without API keys it "
        "serves this machine alone.",
        epilog="example: planfront serve --port 8000",
    )
    serve.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="default: this machine only")
    serve.add_argument("--port", metavar="N", type=int, default=8000, help="default: 8000; 0: any free one")
    serve.add_argument("--database-url", metavar="URL", help=_DATABASE)
    serve.add_argument("--workers", metavar="N", type=int, help="worker processes (default: cores - 1)")
    serve.add_argument("--insecure", action="store_true", help="let others in without API keys")
    _log_format(serve)

    worker = commands.add_parser(
        "worker",
        help="work on queued runs of a shared database",
        description="Take runs from the queue of a database, one at a time, until stopped. Several may share "
        "one PostgreSQL with several `planfront serve --workers 0`.",
        epilog="example: planfront worker --database-url postgresql+psycopg://planfront@db/planfront",
    )
    worker.add_argument("--database-url", metavar="URL", help=_DATABASE)
    worker.add_argument("--supervised", action="store_true", help="stop when standard input is closed")
    _log_format(worker)

    db = commands.add_parser(
        "db",
        help="bring the database's schema forward, or look at it",
        description="`upgrade` brings the schema of the database to that of this version; `check` says "
        "whether it is. A SQLite file is upgraded by `planfront serve` itself.",
        epilog="example: planfront db upgrade --database-url postgresql+psycopg://planfront@db/planfront",
    )
    db.add_argument("what", choices=("upgrade", "check"), metavar="{upgrade,check}")
    db.add_argument("--database-url", metavar="URL", help=_DATABASE)

    keys = commands.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="`create` prints a new key once; `list` shows all without their secrets; `revoke ID` "
        "ends one. Roles: viewer reads, planner also plans, admin also changes what others planned. Once "
        "there is a key, every call needs one.",
        epilog="example: planfront keys create --role planner --name nightly",
    )
    keys.add_argument("what", choices=("create", "list", "revoke"), metavar="{create,list,revoke}")
    keys.add_argument("id", nargs="?", metavar="ID", help="of the key to revoke")
    keys.add_argument("--role", choices=ROLES, default="planner", help="default: planner")
    keys.add_argument("--name", metavar="TEXT", default="", help="for people")
    keys.add_argument("--days", metavar="N", type=float, help="expires after so many days (default: never)")
    keys.add_argument("--json", action="store_true", help="print as JSON")
    keys.add_argument("--database-url", metavar="URL", help=_DATABASE)

    runs = commands.add_parser(
        "runs",
        help="list, show and cancel stored runs",
        description="Without ID: the newest runs. With ID: that run; --result writes its answer, --wait "
        "waits for its end, --cancel cancels it. Exit code 3 for a run without a plan that meets the SLO.",
        epilog="example: planfront runs --status running --server http://127.0.0.1:8000",
    )
    runs.add_argument("id", nargs="?", metavar="ID")
    runs.add_argument("--status", metavar="S", help="list only these")
    runs.add_argument("--label", metavar="TEXT", help="list only these")
    runs.add_argument("--limit", metavar="N", type=int, default=20, help="how many to list (default: 20)")
    runs.add_argument("--result", metavar="OUT", help="write the run's answer as JSON; - for standard output")
    runs.add_argument("--wait", metavar="S", type=float, help="seconds to wait for the run's end")
    runs.add_argument("--cancel", action="store_true", help="cancel the run")
    runs.add_argument("--json", action="store_true", help="print as JSON")
    _where(runs)

    rerun = commands.add_parser(
        "rerun",
        help="plan a stored run again and compare",
        description="Plan the request of a stored run again and say whether the answer is the same bit for "
        "bit, or which version differs. Exit code 0 when it is the same, 3 when it is not.",
        epilog="example: planfront rerun 019a2b3c4d5e6f708192a3b4c5d6",
    )
    rerun.add_argument("id", metavar="ID")
    rerun.add_argument("--json", action="store_true", help="print as JSON")
    _where(rerun)

    backup = commands.add_parser(
        "backup",
        help="copy the database while it is used",
        description="Write a copy of the SQLite file that is whole and consistent, while the service goes "
        "on. PostgreSQL is copied by its own pg_dump, which this calls.",
        epilog="example: planfront backup planfront-backup.db",
    )
    backup.add_argument("file", metavar="FILE")
    backup.add_argument("--database-url", metavar="URL", help=_DATABASE)

    prune = commands.add_parser(
        "prune",
        help="delete old runs",
        description="Delete runs that ended long ago, with their answers and events, and uploads that no run "
        "names any more.",
        epilog="example: planfront prune --older-than 90",
    )
    prune.add_argument("--older-than", metavar="DAYS", type=float, required=True)
    prune.add_argument("--database-url", metavar="URL", help=_DATABASE)

    compare = commands.add_parser(
        "compare",
        help="stored runs side by side",
        description="What differs between the requests of two to eight stored runs, and the recommended plan "
        "of each with its ratio to that of the first.",
        epilog="example: planfront compare 019a2b3c4d5e6f708192a3b4c5d6 019a2b3c4d5e6f708192a3b4c5d7",
    )
    compare.add_argument("ids", metavar="ID", nargs="+")
    compare.add_argument("--json", action="store_true", help="print as JSON")
    _where(compare)

    asked = ("plan", "evaluate", "batch", "fleet", "sweep", "validate")
    for name in (*asked, "export", "catalog"):
        known: argparse.ArgumentParser = commands.choices[name]
        words = "RESULT is the id of a run of this service" if name == "export" else "ask this service"
        # An export of a file and a list of what is known need nobody.
        default = os.environ.get("PLANFRONT_SERVER") if name in asked else None
        known.add_argument("--server", metavar="URL", default=default, help=words)


def _log_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="default: text")


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", metavar="URL", help="ask this service (default: PLANFRONT_SERVER)")
    parser.add_argument("--database-url", metavar="URL", help=_DATABASE)


# --- commands -------------------------------------------------------------------------------------


def serve(given: argparse.Namespace, make_app: Any) -> int:
    """`planfront serve`."""
    from api.serve import serve as run
    from hardware.errors import InputError

    workers = given.workers
    if workers is None:
        workers = max(1, (os.cpu_count() or 2) - 1)
    if not 0 <= workers <= 256:
        raise InputError("--workers", f"must be from 0 to 256, not {workers}")
    if not 0 <= given.port <= 65_535:
        raise InputError("--port", f"must be from 0 to 65535, not {given.port}")
    run(
        make_app,
        host=given.host,
        port=given.port,
        database_url=given.database_url,
        workers=workers,
        insecure=given.insecure,
        log_format=given.log_format,
        on_ready=lambda url: print(f"planfront serves {url}", flush=True),
    )
    return DONE


def worker(given: argparse.Namespace) -> int:
    """`planfront worker`."""
    from api.serve import work

    work(database_url=given.database_url, supervised=given.supervised, log_format=given.log_format)
    return DONE


def db(given: argparse.Namespace) -> int:
    """`planfront db`."""
    from api.store import Database, default_url

    database = Database(given.database_url or default_url())
    try:
        if given.what == "upgrade":
            before = database.revision()
            database.upgrade()
            print(f"schema {database.revision()}" + ("" if before else ", new database"))
        else:
            database.check_schema()
            print(f"schema {database.revision()}, as this version needs")
    finally:
        database.close()
    return DONE


def keys(given: argparse.Namespace) -> int:
    """`planfront keys`."""
    from api.keys import make_key
    from hardware.errors import InputError

    if (given.what == "revoke") != (given.id is not None):
        raise InputError("keys", "`revoke` needs the ID of a key, and nothing else takes one")
    if given.days is not None and not 0 < given.days < 36_500:
        raise InputError("--days", f"must be more than 0 days, not {given.days:g}")
    if len(given.name) > 100:
        raise InputError("--name", "must have at most 100 characters")
    store = _store(given)
    try:
        if given.what == "create":
            expires_in_s = None if given.days is None else given.days * 86_400
            text, record = make_key(given.name, given.role, expires_in_s=expires_in_s)
            first = not store.all_keys()
            store.add_key(record)
            if given.json:
                print(json.dumps({"id": record.id, "role": record.role, "name": record.name, "key": text}))
            else:
                print(text)
                print(f"key {record.id}, role {record.role}; it is not shown again", file=sys.stderr)
            if first:
                print("every call to this database's service needs a key from now on", file=sys.stderr)
        elif given.what == "revoke":
            if not store.revoke_key(given.id):
                raise InputError("ID", f"there is no active key {given.id[:40]!r}")
            print(f"key {given.id} is revoked")
        else:
            _show_keys(store, as_json=given.json)
    finally:
        store.close()
    return DONE


def _show_keys(store: Store, *, as_json: bool) -> None:
    import time

    from api.runs import instant

    now = time.time()
    rows = [
        {
            "id": record.id,
            "role": record.role,
            "name": record.name,
            "state": "active" if record.active(now) else "revoked" if record.revoked_at else "expired",
            "created_at": instant(record.created_at),
            "expires_at": instant(record.expires_at),
            "last_used_at": instant(record.last_used_at),
        }
        for record in store.all_keys()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['id']}  {row['role']:<8} {row['state']:<8} {row['created_at']}  {row['name']}")
    if not rows:
        print("no keys")


def runs(given: argparse.Namespace) -> int:
    """`planfront runs`."""
    from hardware.errors import InputError

    if given.id is None and (given.result or given.wait is not None or given.cancel):
        raise InputError("ID", "name the run")
    with source_of(given) as source:
        if given.id is None:
            page = source.runs(limit=given.limit, status=given.status, label=given.label)
            _show_runs(page, as_json=given.json)
            return DONE
        if given.cancel:
            run = source.cancel(given.id)
        elif given.wait is not None:
            run = source.wait(given.id, given.wait)
        else:
            run = source.run(given.id)
        if given.result:
            text = json.dumps(source.result(given.id), indent=1, allow_nan=False) + "\n"
            if given.result == "-":
                sys.stdout.write(text)
            else:
                Path(given.result).write_text(text, encoding="utf-8")
    if given.result != "-":
        print(json.dumps(run, indent=1) if given.json else _line(run))
    return NO_PLAN if run["status"] in ("infeasible", "failed", "cancelled") else DONE


def _show_runs(page: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(page, indent=1))
        return
    for run in page:
        print(_line(run))
    if not page:
        print("no runs")


def _line(run: dict[str, Any]) -> str:
    found = (run.get("summary") or {}).get("recommended") or {}
    words = f"{found['plan_id']}" if found else (run.get("error") or {}).get("detail", "")
    label = f" [{run['label']}]" if run["label"] else ""
    asked = run["model"] if run["kind"] == "plan" else f"{run['kind']} of {run['model']}"
    devices = ",".join(run["devices"])
    return f"{run['id']}  {run['status']:<11} {run['created_at']}  {asked} on {devices}{label}  {words}"


def rerun(given: argparse.Namespace) -> int:
    """`planfront rerun`."""
    with source_of(given) as source:
        answer = source.rerun(given.id)
    same = answer["reproduction"]
    if given.json:
        print(json.dumps(answer, indent=1))
    elif same["same"]:
        print(f"{given.id}: {same['reason']}")
    else:
        print(f"{given.id}: not the same: {same['reason']}")
        for row in same["differs"]:
            print(f"  {row['what']}: {row['before']} then, {row['now']} now")
    return DONE if same["same"] else NO_PLAN


def compare(given: argparse.Namespace) -> int:
    """`planfront compare`."""
    from hardware.errors import InputError

    ids = list(dict.fromkeys(given.ids))
    if not 2 <= len(ids) <= 8:
        raise InputError("ID", f"name 2 to 8 different runs, not {len(ids)}")
    with source_of(given) as source:
        answer = source.compare(*ids)
    if given.json:
        print(json.dumps(answer, indent=1))
    else:
        from api.terminal import show_comparison

        show_comparison(answer)
    return DONE


def backup(given: argparse.Namespace) -> int:
    """`planfront backup`."""
    from api.store.backup import copy_database

    store = _store(given)
    try:
        size = copy_database(store.database, Path(given.file))
    finally:
        store.close()
    print(f"{given.file}: {size / 1e6:.1f} MB")
    return DONE


def prune(given: argparse.Namespace) -> int:
    """`planfront prune`."""
    import time

    from hardware.errors import InputError

    if not 0 <= given.older_than < 36_500:
        raise InputError("--older-than", f"must be 0 days or more, not {given.older_than:g}")
    store = _store(given)
    try:
        count = store.prune(time.time() - given.older_than * 86_400)
    finally:
        store.close()
    print(f"{count} runs deleted")
    return DONE


# --- commands of their own that ask a service -------------------------------------------------------


def plan_there(server: str, data: Any, base: Path, *, quiet: bool) -> dict[str, Any]:
    """`planfront plan --server`: the result of a run of this request; Ctrl-C cancels it."""
    from api.client import Client

    with Client(server) as client:
        sent = Files(client, base)
        return _followed(client, client.submit(sent.in_request(data)), quiet=quiet)


def fleet_there(server: str, data: Any, base: Path, *, quiet: bool) -> dict[str, Any]:
    """`planfront fleet --server`: the same for a fleet."""
    from api.client import Client

    with Client(server) as client:
        sent = Files(client, base)
        if isinstance(data, dict) and isinstance(data.get("models"), list):
            data = {**data, "models": [sent.in_request(one) for one in data["models"]]}
        return _followed(client, client.submit_fleet(data), quiet=quiet)


def sweep_there(
    server: str, data: Any, vary: str, values: list[float], base: Path, *, quiet: bool
) -> dict[str, Any]:
    """`planfront sweep --server`: the same for a sweep."""
    from api.client import Client

    with Client(server) as client:
        request = Files(client, base).in_request(data)
        return _followed(client, client.submit_sweep(request, vary, values), quiet=quiet)


class Files:
    """Sends the files that requests name: traces, each once, and what a `config.json` says of a model."""

    def __init__(self, client: Client, base: Path) -> None:
        self._client, self._base = client, base
        self._sent: dict[tuple[Path, str], str] = {}

    def in_request(self, data: Any) -> Any:
        """The request with its files sent: no path is left that the service would have to read."""
        return self._with_trace(self.with_config(data))

    def with_config(self, data: Any) -> Any:
        """The request with what the `config.json` says that its `model` names by path."""
        from planner.models import config_at

        if not isinstance(data, dict) or not isinstance(data.get("model"), str) or "config" in data:
            return data
        found = config_at(data["model"], self._base)
        return data if found is None else {**data, "model": found[0], "config": found[1]}

    def _with_trace(self, data: Any) -> Any:
        from api.client import ServiceError
        from api.files import open_file
        from hardware.errors import InputError

        at = data
        for name in ("workload", "trace"):
            if not isinstance(at, dict) or not isinstance(at.get(name), dict):
                return data  # what is wrong with it, the service says
            at = at[name]
        path = at.get("path")
        if not isinstance(path, str) or not path or path.startswith("upload:"):
            return data
        file = Path(path) if Path(path).is_absolute() else self._base / path
        # What else `on_bad_row` may hold, the service says of the request.
        bad_row = "skip" if at.get("on_bad_row") == "skip" else "refuse"
        sent = self._sent.get((file, bad_row))
        if sent is None:
            with open_file(file) as source:
                content = source.read()
            try:
                sent = self._client.upload(content, file.name, on_bad_row=bad_row)["path"]
            except ServiceError as error:
                if error.status != 422:
                    raise
                raise InputError("workload.trace.path", error.message) from error
            self._sent[file, bad_row] = sent
        return {**data, "workload": {**data["workload"], "trace": {**at, "path": sent}}}


def _followed(client: Client, run: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """The result of a run that was just made, told as it comes; Ctrl-C cancels it."""
    from hardware.errors import InputError

    try:
        run = client.wait(run["id"], 365 * 86_400, None if quiet else _tell)
    except KeyboardInterrupt:
        client.cancel(run["id"])
        raise
    if not quiet:
        print(f"run {run['id']} is {run['status']}", file=sys.stderr)
    if run["error"]:
        found = [(row["path"], row["message"]) for row in run["error"].get("errors", ())]
        path, message = found[0] if found else ("", run["error"]["detail"])
        raise InputError(path, message)
    return client.result(run["id"])


def result_there(server: str, run_id: str) -> dict[str, Any]:
    """`planfront export --server`: the result of a stored run."""
    from api.client import Client

    with Client(server) as client:
        return client.result(run_id)


def catalog_there(server: str, kind: str) -> list[dict[str, Any]]:
    """`planfront catalog --server`."""
    from api.client import Client

    with Client(server) as client:
        return client.catalog(kind)


def _tell(run: dict[str, Any]) -> None:
    now = run["progress"]
    words = run["status"]
    if now:
        found = now.get("note") or f"{now['front']} on the front"
        words = f"{now['simulated']} simulated, {found}"
    print(f"run {run['id']}: {words}", file=sys.stderr)


def evaluate_there(server: str, file: Path, target: str | None, write: Any) -> int:
    """`planfront evaluate --server`: one request, or a file of them in order."""
    from api.client import Client, ServiceError
    from api.evaluate import encode, problem
    from api.files import parse_json, read_document, read_lines
    from hardware.errors import InputError

    with Client(server) as client:
        if file.suffix.lower() != ".jsonl":
            data, _ = read_document(str(file))
            answer = client.evaluate(data)
            answer = {"id": data.get("id"), **answer}
            if target:
                write(target, encode(answer) + "\n")
            if target != "-":
                from api.terminal import show_evaluation

                show_evaluation(answer)
            return DONE if answer["status"] == "ok" else NO_PLAN
        lines = []
        for number, line in read_lines(file):
            ident = None
            try:
                if line is None:
                    raise InputError(f"line {number}", "is too long")
                data = parse_json(line.decode("utf-8"))
                ident = data.get("id") if isinstance(data, dict) else None
                answer = {"id": ident, **client.evaluate(data)}
            except ServiceError as error:
                if error.status != 422:
                    raise
                answer = {"id": ident, "status": "error", "error": problem(error)}
            except (ValueError, InputError) as error:
                if isinstance(error, InputError) and error.path == "--server":
                    raise
                words = str(error)[:300]
                answer = {
                    "id": ident,
                    "status": "error",
                    "error": {"path": f"line {number}", "message": words},
                }
            lines.append(encode(answer) + "\n")
        write(target or "-", "".join(lines))
    return DONE


def schema(given: argparse.Namespace) -> int:
    """`planfront schema`."""
    from planner.request import Plan, PlanningRequest
    from planner.result import PlanningResult

    models: dict[str, Any] = {"request": PlanningRequest, "plan": Plan, "result": PlanningResult}
    print(json.dumps(models[given.what].model_json_schema(), indent=1))
    return DONE


# --- where runs are --------------------------------------------------------------------------------


def _store(given: argparse.Namespace) -> Store:
    from api.store import open_store

    return open_store(given.database_url)


def source_of(given: argparse.Namespace) -> Client | Direct:
    """The service that the command asks, or the database itself behind the same calls."""
    from api.client import Client, Direct

    server = given.server or os.environ.get("PLANFRONT_SERVER", "")
    if server and not given.database_url:
        return Client(server)
    return Direct(_store(given))
