"""Reading recorded traces, in bulk and in bounded memory, whatever is in the file.

A format is told by its content. Files are read in blocks; a block is parsed at once by the C parsers
of numpy or json, and only a block that fails is gone through line by line, so that every bad row is
named by its line. gzip is read too.

    planfront   jsonl: arrival_s, input_tokens, output_tokens, optional session_id and prefix_hashes
                (ids of successive blocks of `block_tokens` tokens, 512 unless the row says otherwise;
                an id stands for all content up to its block); or csv with the first four columns
    apex        jsonl: StartTimeOffset (ns), ContextTokens, GeneratedTokens
    azure       csv: TIMESTAMP, ContextTokens, GeneratedTokens
    burstgpt    csv: Timestamp (s), ..., Request tokens, Response tokens, ...; optional Session ID
    mooncake    jsonl: timestamp (ms), input_length, output_length, hash_ids of 512-token blocks
"""

from __future__ import annotations

import difflib
import gc
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from hardware.errors import InputError
from planner.workload.workload import Workload

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 16 << 20
MAX_TOKENS = 10_000_000
MAX_ROWS = 20_000_000
DEFAULT_BLOCK_TOKENS = 512  # Mooncake's
FORMATS = ("planfront", "apex", "azure", "burstgpt", "mooncake")

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What was read: format, rows kept, rows skipped, with the first bad lines in words."""

    path: str
    format: str
    rows: int
    skipped: int
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a result's `workload` section."""
        return {
            "path": self.path,
            "format": self.format,
            "rows": self.rows,
            "skipped": self.skipped,
            "problems": list(self.problems),
        }


@dataclass(slots=True)
class _Rows:
    """Parsed rows of one block: columns, and problems by line."""

    line: IntArray
    time_s: FloatArray
    inputs: FloatArray
    outputs: FloatArray
    session: list[Any] | None
    hashes: list[Any] | None
    block_tokens: int
    bad: list[tuple[int, str]]


# JSON formats: key of time, seconds per unit, keys of input and output tokens.
_JSON: Mapping[str, tuple[str, float, str, str]] = {
    "planfront": ("arrival_s", 1.0, "input_tokens", "output_tokens"),
    "apex": ("StartTimeOffset", 1e-9, "ContextTokens", "GeneratedTokens"),
    "mooncake": ("timestamp", 1e-3, "input_length", "output_length"),
}
_CSV: Mapping[str, tuple[str, str, str]] = {
    "planfront": ("arrival_s", "input_tokens", "output_tokens"),
    "azure": ("timestamp", "contexttokens", "generatedtokens"),
    "burstgpt": ("timestamp", "request tokens", "response tokens"),
}


def read_trace(
    path: str | Path,
    *,
    format: str = "auto",
    rate_scale: float = 1.0,
    limit: int | None = None,
    on_bad_row: str = "refuse",
    field: str = "workload.trace",
) -> tuple[Workload, TraceReport]:
    """A trace as a workload, arrivals from the first row on, divided by `rate_scale`.

    Only the first `limit` rows are read. Bad rows (unreadable, tokens that are not whole numbers of at
    least 1, a clock that goes backwards) refuse the file, or are counted with `on_bad_row="skip"`.
    Raises InputError at `field` in one sentence with line numbers.
    """
    where = f"{field}.path"
    file = Path(path)
    if format not in ("auto", *FORMATS):
        close = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"nearest: {close[0]}" if close else f"known: {', '.join(FORMATS)}"
        raise InputError(f"{field}.format", f"unknown trace format '{format[:40]}'", hint)
    try:
        if file.is_dir():
            raise InputError(where, f"'{file}' is a folder, not a trace file")
        with file.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: IO[bytes] = gzip.open(raw) if zipped else raw  # type: ignore[assignment]  # noqa: SIM115
            # Millions of small lists come and go: the cycle collector would walk them all, again and again.
            collecting = gc.isenabled()
            gc.disable()
            try:
                return _read(stream, file, format, rate_scale, limit, on_bad_row, field, where)
            finally:
                if collecting:
                    gc.enable()
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(where, f"'{file}' cannot be read: {reason}"[:300]) from error


def _read(
    stream: IO[bytes],
    file: Path,
    format: str,
    rate_scale: float,
    limit: int | None,
    on_bad_row: str,
    field: str,
    where: str,
) -> tuple[Workload, TraceReport]:
    found = ""
    columns: dict[str, int] = {}
    parts: list[_Rows] = []
    kept = skipped = 0
    problems: list[str] = []
    latest = -np.inf
    for first_line, lines in _blocks(stream, where):
        if not found:
            start = next((i for i, text in enumerate(lines) if text.strip()), None)
            if start is None:
                continue
            found, columns = _recognise(lines[start], first_line + start, file, format, field)
            if columns:  # the header
                first_line, lines = first_line + start + 1, lines[start + 1 :]
        rows = (
            _csv_rows(lines, first_line, columns, found) if columns else _json_rows(lines, first_line, found)
        )
        latest = _check(rows, latest)
        if rows.bad:
            rows.bad.sort()
            skipped += len(rows.bad)
            problems += [f"line {line}: {reason}" for line, reason in rows.bad[: 5 - len(problems)]]
        parts.append(rows)
        kept += len(rows.line)
        if limit is not None and kept >= limit:
            break
        if kept > MAX_ROWS:
            raise InputError(where, f"'{file}' has more than {MAX_ROWS} rows", "set workload.trace.limit")
    if skipped and on_bad_row != "skip":
        more = f" and {skipped - len(problems)} more" if skipped > len(problems) else ""
        raise InputError(
            where,
            f"'{file}' has {skipped} bad row{'s' if skipped > 1 else ''}: {'; '.join(problems)}{more}",
            "on_bad_row: skip reads the rest",
        )
    if not kept:
        raise InputError(where, f"'{file}' has no {'usable ' if skipped else ''}rows")
    workload = _workload(parts, rate_scale, limit, file)
    return workload, TraceReport(str(file), found, len(workload), skipped, tuple(problems))


def _blocks(stream: IO[bytes], where: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines) in blocks of a few MB."""
    line, rest = 1, b""
    while True:
        data = stream.read(BLOCK_BYTES)
        if not data:
            break
        cut = data.rfind(b"\n")
        if cut < 0:
            rest += data
            if len(rest) > MAX_LINE_BYTES:
                raise InputError(where, f"line {line} is longer than {MAX_LINE_BYTES >> 20} MB")
            continue
        text = (rest + data[: cut + 1]).decode("utf-8", errors="replace")
        if line == 1:
            text = text.removeprefix("\ufeff")
        rest = data[cut + 1 :]
        lines = text.split("\n")[:-1]
        yield line, lines
        line += len(lines)
    if rest:
        yield line, [rest.decode("utf-8", errors="replace")]


def _recognise(text: str, line: int, file: Path, asked: str, field: str) -> tuple[str, dict[str, int]]:
    """(format, columns of a csv header by lower-case name) of a trace's first line."""
    where = f"{field}.path"
    text = text.lstrip("\ufeff").strip()
    if text.startswith("{"):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise InputError(where, f"'{file}' line {line} is not readable JSON: {error}"[:300]) from error
        for name, (time, _, inputs, outputs) in _JSON.items():
            if time in row and inputs in row and outputs in row:
                _same(name, asked, field)
                return name, {}
        keys = ", ".join(list(row)[:8])
        raise InputError(where, f"'{file}' is no known trace: its first row has the fields {keys[:200]}")
    columns = {name.strip().strip('"').lower(): i for i, name in enumerate(text.split(","))}
    for name, needed in _CSV.items():
        if all(column in columns for column in needed):
            _same(name, asked, field)
            return name, columns
    raise InputError(where, f"'{file}' is no known trace: its first line is {text[:120]!a}")


def _same(found: str, asked: str, field: str) -> None:
    if asked not in ("auto", found):
        raise InputError(f"{field}.format", f"the file is a {found} trace, not {asked}")


# --- parsing -------------------------------------------------------------------------------------


def _json_rows(lines: Sequence[str], first_line: int, format: str) -> _Rows:
    time, unit, inputs, outputs = _JSON[format]
    kept = [(i, text) for i, text in enumerate(lines, first_line) if text and not text.isspace()]
    bad: list[tuple[int, str]] = []
    try:
        # A line with two values would shift the rest, hence the count.
        rows = json.loads("[" + ",".join(text for _, text in kept) + "]")
        whole = len(rows) == len(kept) and all(type(row) is dict for row in rows)
        raw = [[row[key] for row in rows] for key in (time, inputs, outputs)]
        if not whole or any(not set(map(type, column)) <= {int, float} for column in raw):
            raise ValueError
        columns = [np.array(column, dtype=np.float64) for column in raw]
        numbers = [i for i, _ in kept]
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        rows, numbers, values = [], [], []
        for i, text in kept:
            try:
                row = json.loads(text)
                triple = [row[key] for key in (time, inputs, outputs)]
                if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in triple):
                    raise TypeError("time and tokens must be numbers")
                values.append([float(value) for value in triple])
            except KeyError as error:
                bad.append((i, f"no field {error}"))
            except (ValueError, TypeError, RecursionError, OverflowError) as error:
                bad.append((i, "not readable" if isinstance(error, ValueError) else str(error)[:80]))
            else:
                rows.append(row)
                numbers.append(i)
        columns = list(np.array(values, dtype=np.float64).reshape(-1, 3).T)
    session = hashes = None
    block_tokens = 0
    if format == "mooncake":
        hashes = [row.get("hash_ids") or () for row in rows]
    elif format == "planfront":
        if any("session_id" in row for row in rows):
            session = [row.get("session_id") for row in rows]
        if any("prefix_hashes" in row for row in rows):
            hashes = [row.get("prefix_hashes") or () for row in rows]
            given = next((row["block_tokens"] for row in rows if "block_tokens" in row), 0)
            if given and (type(given) is not int or not 0 < given <= 65_536):
                bad.append((numbers[0], "block_tokens must be a whole number up to 65536"))
            else:
                block_tokens = given
    if hashes is not None:
        for at in [at for at, item in enumerate(hashes) if type(item) not in (list, tuple)]:
            bad.append((numbers[at], "prefix hashes must be a list of numbers or texts"))
            hashes[at] = ()
    return _Rows(
        np.array(numbers, np.int64), columns[0] * unit, columns[1], columns[2], session, hashes,
        block_tokens, bad,
    )  # fmt: skip


def _csv_rows(lines: Sequence[str], first_line: int, columns: Mapping[str, int], format: str) -> _Rows:
    names = _CSV[format]
    use = [columns[name] for name in names]
    session_name = next((name for name in ("session_id", "session id") if name in columns), None)
    kept = [(i, text) for i, text in enumerate(lines, first_line) if text and not text.isspace()]
    numbers = [i for i, _ in kept]
    bad: list[tuple[int, str]] = []
    texts = [text for _, text in kept]
    try:
        if not texts:
            raise ValueError  # numpy warns about nothing to read
        if format == "azure":
            stamps = np.loadtxt(texts, delimiter=",", usecols=use[0], dtype="U40", comments=None, ndmin=1)
            tokens = np.loadtxt(texts, delimiter=",", usecols=use[1:], comments=None, ndmin=2)
            values = [_timestamps(stamps), tokens[:, 0], tokens[:, 1]]
        else:
            values = list(np.loadtxt(texts, delimiter=",", usecols=use, comments=None, ndmin=2).T)
        if len(values[0]) != len(kept):
            raise ValueError
    except (ValueError, IndexError):
        rows: list[tuple[float, ...]] = []
        numbers, texts = [], []
        for i, text in kept:
            fields = text.split(",")
            try:
                picked = [fields[column].strip().strip('"') for column in use]
                when = float(_timestamps(np.array(picked[:1]))[0]) if format == "azure" else float(picked[0])
                rows.append((when, float(picked[1]), float(picked[2])))
            except (ValueError, IndexError):
                bad.append((i, "not readable" if len(fields) > max(use) else f"has {len(fields)} columns"))
            else:
                numbers.append(i)
                texts.append(text)
        values = list(np.array(rows, dtype=np.float64).reshape(-1, 3).T)
    session = None
    if session_name is not None:
        column = columns[session_name]
        session = [(text.split(",") + [""] * column)[column].strip() or None for text in texts]
    time_s, inputs, outputs = values
    return _Rows(np.array(numbers, np.int64), time_s, inputs, outputs, session, None, 0, bad)


def _timestamps(stamps: Any) -> FloatArray:
    """Seconds of time stamps like 2023-11-16 18:15:46.6805900, an offset at the end allowed."""
    plain = np.char.rstrip(np.char.strip(stamps), "Z")
    if np.char.find(plain, "+").max(initial=-1) >= 0:
        plain = np.char.partition(plain, "+")[:, 0]
    whole = plain.astype("datetime64[ns]").astype(np.int64)
    # An empty stamp is read as not-a-time, the least integer.
    return np.where(whole == np.iinfo(np.int64).min, np.nan, whole * 1e-9)


def _check(rows: _Rows, latest: float) -> float:
    """Move rows that cannot be used to `bad`; returns the latest time so far."""
    time, inputs, outputs = rows.time_s, rows.inputs, rows.outputs
    reason = np.zeros(len(time), dtype=np.int8)
    for column in (inputs, outputs):
        with np.errstate(invalid="ignore"):
            reason[~np.isfinite(column) | (column != np.floor(column))] = 1
            reason[(reason == 0) & (column < 1)] = 2
            reason[(reason == 0) & (column > MAX_TOKENS)] = 3
    reason[~np.isfinite(time)] = 4
    sound = reason == 0
    before = np.maximum.accumulate(np.concatenate(([latest], np.where(sound, time, -np.inf))))[:-1]
    with np.errstate(invalid="ignore"):
        reason[sound & (time < before)] = 5
    if reason.any():
        words = (
            "", "tokens are not whole numbers", "zero or negative tokens",
            f"more than {MAX_TOKENS} tokens", "time is not a finite number", "the clock goes backwards",
        )  # fmt: skip
        rows.bad += [(int(rows.line[i]), words[reason[i]]) for i in np.flatnonzero(reason)]
        good = np.flatnonzero(reason == 0)
        rows.line, rows.time_s = rows.line[good], time[good]
        rows.inputs, rows.outputs = inputs[good], outputs[good]
        if rows.session is not None:
            rows.session = [rows.session[i] for i in good]
        if rows.hashes is not None:
            rows.hashes = [rows.hashes[i] for i in good]
    return float(max(latest, rows.time_s.max())) if len(rows.time_s) else latest


# --- putting together ------------------------------------------------------------------------------


def _workload(parts: Sequence[_Rows], rate_scale: float, limit: int | None, file: Path) -> Workload:
    time = np.concatenate([part.time_s for part in parts])[:limit]
    inputs = np.concatenate([part.inputs for part in parts])[:limit].astype(np.int64)
    outputs = np.concatenate([part.outputs for part in parts])[:limit].astype(np.int64)
    n = len(time)
    session = np.arange(n, dtype=np.int64)
    if any(part.session is not None for part in parts):
        names = list(chain.from_iterable(part.session or [None] * len(part.line) for part in parts))[:n]
        codes: dict[Any, int] = {}
        # A row without a session is a session of its own.
        keys = [("row", i) if name is None else ("id", str(name)) for i, name in enumerate(names)]
        session = np.array([codes.setdefault(key, len(codes)) for key in keys], dtype=np.int64)
    offset, ids, unique, block_tokens = _prefixes(parts, inputs, n)
    return Workload(
        arrival_s=(time - time[0]) / rate_scale,
        input_tokens=inputs,
        output_tokens=outputs,
        parent=np.full(n, -1, np.int64),
        delay_s=np.zeros(n),
        session=session,
        concurrency=0,
        block_tokens=block_tokens,
        prefix_offset=offset,
        prefix_ids=ids,
        prefix_unique=unique,
        source=str(file),
    )


def _prefixes(parts: Sequence[_Rows], inputs: IntArray, n: int) -> tuple[IntArray, IntArray, int, int]:
    """(offset, dense ids, distinct ids, tokens per block); a last, partly filled block is left out."""
    stated = next((part.block_tokens for part in parts if part.block_tokens), 0)
    block_tokens = stated or DEFAULT_BLOCK_TOKENS
    empty = np.zeros(n + 1, np.int64), np.zeros(0, np.int64), 0, 0
    if not any(part.hashes for part in parts):
        return empty
    lists = list(chain.from_iterable(part.hashes or [()] * len(part.line) for part in parts))[:n]
    full = np.minimum(inputs // block_tokens, np.fromiter(map(len, lists), np.int64, n))
    flat = list(chain.from_iterable(item[:count] for item, count in zip(lists, full.tolist(), strict=True)))
    try:
        raw = np.array(flat, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        raw = np.array([str(item) for item in flat])
    unique, ids = np.unique(raw, return_inverse=True)
    offset = np.concatenate(([0], np.cumsum(full))).astype(np.int64)
    return (offset, ids.astype(np.int64), len(unique), block_tokens) if len(ids) else empty
