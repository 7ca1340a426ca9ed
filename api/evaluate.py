"""`planfront evaluate`: plans of known shape judged, one or a file of them, in order."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api.files import MAX_LINE_BYTES, parse_json, read_lines
from hardware.errors import InputError

if TYPE_CHECKING:
    from planner.pipeline import Planner

#: Lines per task: enough that handing them over costs little, few enough that answers keep flowing.
CHUNK_LINES = 16

_planner: Planner | None = None


def answer_line(planner: Planner, number: int, line: bytes | None) -> dict[str, Any]:
    """The answer to one line: ok, infeasible, or error with path and message."""
    ident: Any = None
    try:
        if line is None:
            raise InputError(f"line {number}", f"is longer than {MAX_LINE_BYTES >> 20} MB")
        try:
            data = parse_json(line.decode("utf-8"))
        except ValueError as error:
            raise InputError(f"line {number}", f"is not readable JSON: {error}"[:300]) from error
        if not isinstance(data, Mapping):
            raise InputError(f"line {number}", "must be a mapping of fields")
        ident = data.get("id")
        return {"id": ident, **planner.evaluate(data)}
    except InputError as error:
        return {"id": ident, "status": "error", "error": problem(error)}


def problem(error: InputError) -> dict[str, str]:
    """Path and sentence of an error."""
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return {"path": error.path, "message": message}


def encode(answer: Mapping[str, Any]) -> str:
    """One line of strict JSON."""
    return json.dumps(answer, allow_nan=False, separators=(", ", ": "))


def answer_file(path: Path, workers: int) -> Iterator[str]:
    """One line of JSON per line of the file, in order, as soon as it is known."""
    base = path.resolve().parent
    if workers <= 1:
        _start(str(base))
        for number, line in read_lines(path):
            yield from _answer([(number, line)])
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(str(base),)) as pool:
        waiting: deque[Future[list[str]]] = deque()
        for chunk in _chunks(path):
            waiting.append(pool.submit(_answer, chunk))
            while len(waiting) > 4 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _chunks(path: Path) -> Iterator[list[tuple[int, bytes | None]]]:
    chunk: list[tuple[int, bytes | None]] = []
    for item in read_lines(path):
        chunk.append(item)
        if len(chunk) == CHUNK_LINES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _start(base_dir: str) -> None:
    """One planner per process, so that lines share step tables."""
    global _planner
    from planner.pipeline import Planner

    _planner = Planner(base_dir=Path(base_dir))


def _answer(chunk: list[tuple[int, bytes | None]]) -> list[str]:
    assert _planner is not None
    return [encode(answer_line(_planner, number, line)) for number, line in chunk]
