"""`planfront batch`: many planning requests from a file, each answer a file of its own; survives a kill.

    DIR/000001-<id>.json   the result of line 1 (a planning result, or {"status": "error", "error": ...})
    DIR/summary.jsonl      one line per request, in order, written when all are done

Answers are written beside their place and moved into it, so that a file that is there is whole. A run with
`--resume` keeps those that answer the same line under the same version, and works on the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api.client import ServiceError
from api.evaluate import problem
from api.files import MAX_LINE_BYTES, parse_json, read_lines
from hardware.errors import InputError

if TYPE_CHECKING:
    from planner.pipeline import Planner

_planner: Planner | None = None
#: Runs of one batch that a service has at once: the rest are submitted as these end.
_MOST_WAITING = 64
#: How long a service that is away, or has enough to do, is asked again, in s.
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the requests."""

    ok: int = 0
    infeasible: int = 0
    errors: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """All requests, kept ones included in their own status."""
        return self.ok + self.infeasible + self.errors


def run_batch(
    path: Path,
    out_dir: Path,
    *,
    workers: int = 1,
    resume: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Counts:
    """Plan every line of a file. Raises InputError for a folder with answers when not resuming."""
    _prepare(out_dir, resume)
    base = str(path.resolve().parent)
    summaries: dict[int, dict[str, Any]] = {}
    kept = 0

    def take(summary: dict[str, Any]) -> None:
        summaries[summary["line"]] = summary
        if progress:
            progress(_words(summary))

    def open_lines() -> Iterator[tuple[int, bytes | None, Path]]:
        nonlocal kept
        for number, line in read_lines(path):
            target = out_dir / _name(number, line)
            found = _kept(target, number, line) if resume else None
            if found is not None:
                kept += 1
                take(found)
                continue
            yield number, line, target

    if workers <= 1:
        _start(base)
        for number, line, target in open_lines():
            take(_work(number, line, str(target)))
    else:
        with ProcessPoolExecutor(workers, initializer=_start, initargs=(base,)) as pool:
            waiting: set[Future[dict[str, Any]]] = set()
            for number, line, target in open_lines():
                waiting.add(pool.submit(_work, number, line, str(target)))
                # Few at a time: a request can be megabytes.
                while len(waiting) >= 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        take(future.result())
            for future in waiting:
                take(future.result())
    return _finish(out_dir, summaries, kept)


def run_batch_there(
    server: str,
    path: Path,
    out_dir: Path,
    *,
    resume: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Counts:
    """The same by a service: every line is a stored run there, under an idempotency key of its own.

    An interrupted batch is taken up with `resume`: lines whose answer is here are kept, and those that were
    submitted already are the same runs, which went on meanwhile. Raises InputError as `run_batch`, and for a
    service that does not answer.
    """
    from api.cli_service import Files
    from api.client import Client

    _prepare(out_dir, resume)
    batch_id = _batch_id(out_dir)
    summaries: dict[int, dict[str, Any]] = {}
    counts = {"kept": 0}

    def take(summary: dict[str, Any]) -> None:
        summaries[summary["line"]] = summary
        if progress:
            progress(_words(summary))

    with Client(server, patience_s=_PATIENCE_S) as client:
        files = Files(client, path.resolve().parent)
        waiting: deque[tuple[int, bytes | None, Any, str]] = deque()

        def collect() -> None:
            number, line, ident, run_id = waiting.popleft()
            run = client.wait(run_id, 365 * 86_400)
            if run["status"] in ("done", "infeasible"):
                answer = {"id": ident, **client.result(run_id)}
            else:
                found = run["error"] or {"detail": f"run {run_id} is {run['status']}"}
                rows = found.get("errors") or [{"path": "", "message": found["detail"]}]
                answer = {"id": ident, "status": "error", "error": rows[0]}
            take(_stored(number, line, out_dir, {**answer, "run_id": run_id}))

        for number, line in read_lines(path):
            found = _kept(out_dir / _name(number, line), number, line) if resume else None
            if found is not None:
                counts["kept"] += 1
                take(found)
                continue
            ident: Any = None
            try:
                data = _request(number, line)
                ident = data.get("id")
                request = files.in_request({key: value for key, value in data.items() if key != "id"})
                key = f"batch-{batch_id}-{number}-{_mark(line)}"
                run = client.submit(request, label=f"batch {batch_id}", idempotency_key=key)
            except ServiceError as error:
                if error.status != 422:
                    raise
                answer = {"id": ident, "status": "error", "error": problem(error)}
                take(_stored(number, line, out_dir, answer))
                continue
            except InputError as error:
                if error.path == "--server":
                    raise
                answer = {"id": ident, "status": "error", "error": problem(error)}
                take(_stored(number, line, out_dir, answer))
                continue
            waiting.append((number, line, ident, run["id"]))
            if len(waiting) >= _MOST_WAITING:
                collect()
        while waiting:
            collect()
    return _finish(out_dir, summaries, counts["kept"])


def _words(summary: Mapping[str, Any]) -> str:
    words = f"line {summary['line']}: {summary['status']}"
    if summary["status"] == "error":
        path, message = summary["error"].get("path", ""), summary["error"].get("message", "")
        place = "" if path.startswith("line ") else f"{path}: " if path else ""
        words += f": {place}{message}"
    return words


def _batch_id(out_dir: Path) -> str:
    """The name of the batch that this folder holds the answers of: its runs are known by it."""
    file = out_dir / "batch.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["batch"]
        if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{16}", found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = secrets.token_hex(8)
    _write(file, json.dumps({"batch": found}) + "\n")
    return found


def _prepare(out_dir: Path, resume: bool) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    if not resume and any(out_dir.glob("[0-9]*.json")):
        raise InputError(
            "--out", f"{out_dir} holds answers already; add --resume to keep them, or name another"
        )


def _stored(number: int, line: bytes | None, out_dir: Path, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Write an answer to its place; its summary."""
    target = out_dir / _name(number, line)
    whole = {**answer, "batch": {"line": number, "mark": _mark(line)}}
    _write(target, json.dumps(whole, allow_nan=False) + "\n")
    return _summary(number, whole, target)


def _finish(out_dir: Path, summaries: Mapping[int, dict[str, Any]], kept: int) -> Counts:
    _write(
        out_dir / "summary.jsonl",
        "".join(json.dumps(summaries[number], allow_nan=False) + "\n" for number in sorted(summaries)),
    )
    states = [summary["status"] for summary in summaries.values()]
    return Counts(states.count("ok"), states.count("infeasible"), states.count("error"), kept)


def _name(number: int, line: bytes | None) -> str:
    """A file name from a line's number and its id, if it has one that a file name can hold."""
    ident = ""
    if line is not None:
        try:
            data = json.loads(line)
            ident = str(data.get("id") or "") if isinstance(data, dict) else ""
        except ValueError:
            ident = ""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", ident).strip(".-")[:60]
    return f"{number:06d}-{safe}.json" if safe else f"{number:06d}.json"


def _mark(line: bytes | None) -> str:
    """What an answer belongs to: the line and the version that answered it."""
    from planner.pipeline import version

    return hashlib.sha256(version().encode() + b"\0" + (line or b"")).hexdigest()[:16]


def _kept(target: Path, number: int, line: bytes | None) -> dict[str, Any] | None:
    """The summary of an answer that is there already, if it is one to this very line."""
    try:
        answer = json.loads(target.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(answer, dict) or answer.get("batch", {}).get("mark") != _mark(line):
        return None
    return _summary(number, answer, target)


def _start(base_dir: str) -> None:
    global _planner
    from planner.pipeline import Planner

    _planner = Planner(base_dir=Path(base_dir))


def _work(number: int, line: bytes | None, target: str) -> dict[str, Any]:
    """Plan one line and write its answer; the summary."""
    assert _planner is not None
    return _stored(number, line, Path(target).parent, _answer(_planner, number, line))


def _request(number: int, line: bytes | None) -> Mapping[str, Any]:
    """A line as a mapping. Raises InputError."""
    if line is None:
        raise InputError(f"line {number}", f"is longer than {MAX_LINE_BYTES >> 20} MB")
    try:
        data = parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"line {number}", f"is not readable JSON: {error}"[:300]) from error
    if not isinstance(data, Mapping):
        raise InputError(f"line {number}", "must be a mapping of fields")
    return data


def _answer(planner: Planner, number: int, line: bytes | None) -> dict[str, Any]:
    ident: Any = None
    try:
        data = _request(number, line)
        ident = data.get("id")
        request = {key: value for key, value in data.items() if key != "id"}
        return {"id": ident, **planner.plan(request).to_dict()}
    except InputError as error:
        return {"id": ident, "status": "error", "error": problem(error)}


def _summary(number: int, answer: Mapping[str, Any], target: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "line": number,
        "id": answer.get("id"),
        "status": answer["status"],
        "file": target.name,
    }
    if answer["status"] == "error":
        return {**found, "error": answer["error"]}
    recommended = (answer.get("recommended") or {}).get("plan_id")
    metrics = next((p["metrics"] for p in answer["plans"] if p["id"] == recommended), None)
    return {
        **found,
        "plan_id": recommended,
        "front": len(answer["front"]),
        "certified": answer["search"]["certified"],
        "metrics": metrics
        and {
            name: metrics[name]
            for name in ("output_tokens_per_s", "energy_j_per_output_token", "usd_per_million_output_tokens")
        },
    }


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
