"""Traces: every format, every kind of bad row, and anything at all as a file."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import InputError
from planner.workload import Workload, load_workload, read_trace, summarize
from planner.workload import traces as module

ROWS = [(0.0, 100, 10), (0.5, 2000, 1), (0.5, 7, 300), (3.25, 513, 25)]

FILES = {
    "planfront": "\n".join(
        json.dumps({"arrival_s": t, "input_tokens": i, "output_tokens": o}) for t, i, o in ROWS
    ),
    "planfront csv": "arrival_s,input_tokens,output_tokens\n"
    + "\n".join(f"{t},{i},{o}" for t, i, o in ROWS),
    "apex": "\n".join(
        json.dumps({"StartTimeOffset": int(t * 1e9), "ContextTokens": i, "GeneratedTokens": o})
        for t, i, o in ROWS
    ),
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    + "\r\n".join(f"2023-11-16 18:15:{46 + t:010.7f},{i},{o}" for t, i, o in ROWS),
    "azure offset": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    + "\n".join(f"2024-05-10 00:00:{t:09.6f}+00:00,{i},{o}" for t, i, o in ROWS),
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    + "\n".join(f"{t},ChatGPT,{i},{o},{i + o},Conversation log" for t, i, o in ROWS),
    "mooncake": "\n".join(
        json.dumps({"timestamp": int(t * 1000), "input_length": i, "output_length": o,
                    "hash_ids": [1, 2, 3, 4][: i // 512 + 1]})
        for t, i, o in ROWS
    ),
}  # fmt: skip


def write(folder: Path, text: str, name: str = "trace.any") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    work, report = read_trace(write(tmp_path, FILES[name]))
    assert report.format == name.split()[0]
    assert report.rows == len(work) == 4
    np.testing.assert_allclose(work.arrival_s, [t for t, _, _ in ROWS], atol=1e-6)
    np.testing.assert_array_equal(work.input_tokens, [i for _, i, _ in ROWS])
    np.testing.assert_array_equal(work.output_tokens, [o for _, _, o in ROWS])
    assert (work.parent == -1).all()


def test_gzip_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(("\ufeff" + FILES["planfront"].replace("\n", "\n\n") + "\n\n").encode()))
    assert len(read_trace(path)[0]) == 4


def test_rate_scale_and_limit(tmp_path: Path) -> None:
    work, _ = read_trace(write(tmp_path, FILES["azure"]), rate_scale=2.0, limit=3)
    np.testing.assert_allclose(work.arrival_s, [0.0, 0.25, 0.25], atol=1e-6)


def test_mooncake_hashes_become_prefix_ids_without_the_last_part_block(tmp_path: Path) -> None:
    work, _ = read_trace(write(tmp_path, FILES["mooncake"]))
    assert work.block_tokens == 512
    np.testing.assert_array_equal(np.diff(work.prefix_offset), [0, 3, 0, 1])
    np.testing.assert_array_equal(work.prefix_ids, [0, 1, 2, 0])
    assert work.prefix_unique == 3
    assert summarize(work).shared_prefix_share == pytest.approx(512 / (100 + 2000 + 7 + 513))


def test_sessions_and_hashes_of_our_own_format(tmp_path: Path) -> None:
    plain = {"input_tokens": 50, "output_tokens": 1}
    first = {"session_id": "a", "prefix_hashes": ["x", "y"], "block_tokens": 16}
    rows = [
        {"arrival_s": 0, **plain, **first},
        {"arrival_s": 1, **plain},
        {"arrival_s": 2, **plain, "session_id": "a", "prefix_hashes": ["x", "z", "q"]},
    ]
    work, _ = read_trace(write(tmp_path, "\n".join(map(json.dumps, rows))))
    np.testing.assert_array_equal(work.session, [0, 1, 0])
    assert (work.block_tokens, work.prefix_unique) == (16, 4)
    np.testing.assert_array_equal(np.diff(work.prefix_offset), [2, 0, 3])


BAD = {
    "unreadable": (
        '{"arrival_s": 0, "input_tokens": 5, "output_tokens": 5}\n{oops\n',
        "line 2: not readable",
    ),
    "missing": (
        '{"arrival_s": 0, "input_tokens": 5, "output_tokens": 5}\n{"arrival_s": 1}\n',
        "line 2: no field",
    ),
    "zero": ("arrival_s,input_tokens,output_tokens\n0,5,5\n1,0,5\n", "line 3: zero or negative tokens"),
    "negative": ("arrival_s,input_tokens,output_tokens\n0,5,-5\n", "line 2: zero or negative tokens"),
    "fraction": ("arrival_s,input_tokens,output_tokens\n0,5.5,5\n", "line 2: tokens are not whole numbers"),
    "nan": ("arrival_s,input_tokens,output_tokens\nnan,5,5\n", "line 2: time is not a finite number"),
    "huge": ("arrival_s,input_tokens,output_tokens\n0,99999999,5\n", "line 2: more than 10000000 tokens"),
    "clock": (
        "arrival_s,input_tokens,output_tokens\n5,5,5\n4,5,5\n6,5,5\n",
        "line 3: the clock goes backwards",
    ),
    "columns": ("arrival_s,input_tokens,output_tokens\n0,5,5\n1,5\n", "line 3: has 2 columns"),
    "word": ("arrival_s,input_tokens,output_tokens\n0,5,5\n1,five,5\n", "line 3: not readable"),
    "text": (
        '{"arrival_s": 0, "input_tokens": "5", "output_tokens": 5}\n',
        "line 1: time and tokens must be numbers",
    ),
    "true": (
        '{"arrival_s": 0, "input_tokens": true, "output_tokens": 5}\n',
        "line 1: time and tokens must be",
    ),
    "failure": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT-4,10,0,10,API log\n",
        "line 2: zero or negative tokens",
    ),
    "stamp": ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,4,4\n", "line 2: not readable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_by_line_and_skipped_on_request(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    path = write(tmp_path, text)
    with pytest.raises(InputError, match="bad row") as caught:
        read_trace(path)
    assert message in str(caught.value)
    assert caught.value.path == "workload.trace.path"
    with contextlib.suppress(InputError):  # nothing may be left
        work, report = read_trace(path, on_bad_row="skip")
        assert report.skipped == 1
        assert message in report.problems[0]
        assert len(work) == report.rows


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    text = "arrival_s,input_tokens,output_tokens\n" + "0,0,5\n" * 50 + "1,5,5\n"
    with pytest.raises(InputError, match=r"has 50 bad rows: line 2: .* and 45 more"):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ("arrival_s,input_tokens,output_tokens\n", "has no rows"),
        ("a,b,c\n1,2,3\n", "is no known trace: its first line is 'a,b,c'"),
        ('{"foo": 1}\n', "is no known trace: its first row has the fields foo"),
        ("{oops\n", "line 1 is not readable JSON"),
        ("\x1b[31mé\0\n", r"its first line is '\\x1b\[31m\\xe9\\x00'"),
    ],
)
def test_files_that_are_no_trace(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_trace(write(tmp_path, text))


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        read_trace(tmp_path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.csv")
    broken = tmp_path / "b.gz"
    broken.write_bytes(b"\x1f\x8bnot really")
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(broken)


def test_a_line_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 1 << 14)
    with pytest.raises(InputError, match="line 1 is longer than"):
        read_trace(write(tmp_path, "x" * 100_000))


def test_blocks_do_not_change_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "\n".join(f"{i * 0.1:.1f},{i + 1},{i + 2}" for i in range(500))
    path = write(tmp_path, "arrival_s,input_tokens,output_tokens\n" + rows)
    whole, _ = read_trace(path)
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    parts, _ = read_trace(path)
    np.testing.assert_array_equal(whole.arrival_s, parts.arrival_s)
    np.testing.assert_array_equal(whole.output_tokens, parts.output_tokens)


def test_wrong_format_named(tmp_path: Path) -> None:
    path = write(tmp_path, FILES["azure"])
    with pytest.raises(InputError, match="is a azure trace, not mooncake"):
        read_trace(path, format="mooncake")
    with pytest.raises(InputError, match=r"unknown trace format 'azur' \(nearest: azure\)"):
        read_trace(path, format="azur")


def test_exactly_one_workload(tmp_path: Path) -> None:
    trace = {"path": str(write(tmp_path, FILES["apex"]))}
    with pytest.raises(InputError, match="both are given"):
        load_workload({"trace": trace, "synthetic": {"preset": "chat"}})
    with pytest.raises(InputError, match="neither is given"):
        load_workload({})
    work, summary, report = load_workload({"trace": {"path": "trace.any"}}, tmp_path)
    assert len(work) == summary.requests == 4
    assert report is not None


_line = st.sampled_from(
    [text for name in FILES for text in FILES[name].splitlines()[:2]]
    + [text for text, _ in BAD.values()]
    + [
        "",
        "{}",
        "[]",
        '{"arrival_s": 1e999, "input_tokens": 1, "output_tokens": 1}',
        "nan,nan,nan",
        "1,1,1,1",
    ]
) | st.text(max_size=20)


@given(st.lists(_line, max_size=6), st.sampled_from(["refuse", "skip"]))
def test_any_text_is_a_workload_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], on_bad_row: Any
) -> None:
    path = tmp_path_factory.mktemp("t") / "t"
    path.write_bytes("\n".join(lines).encode("utf-8", errors="surrogatepass"))
    with contextlib.suppress(InputError):
        work, _ = read_trace(path, on_bad_row=on_bad_row)
        _sound(work)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_workload_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("b") / "t"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        _sound(read_trace(path)[0])


def _sound(work: Workload) -> None:
    assert len(work) > 0
    assert (work.input_tokens >= 1).all()
    assert (work.output_tokens >= 1).all()
    assert (np.diff(work.arrival_s) >= 0).all()
    assert work.arrival_s[0] == 0.0
