"""Request files: what is refused, in one sentence, quickly, and without filling memory."""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import files
from api.files import parse_document, parse_json, read_document, read_lines
from hardware import InputError


@pytest.fixture
def bounded() -> Iterator[None]:
    """The test is quick, and memory does not grow by more than a few times what may be read."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < 20
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kibibytes < 400 << 10


def refused(data: bytes, name: str = "request.yaml") -> str:
    with pytest.raises(InputError) as caught:
        parse_document(data, name, json_only=name.endswith(".json"))
    assert caught.value.path == name
    assert len(caught.value.message) <= 300
    assert "\n" not in caught.value.message
    return caught.value.message


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ['{"a": [1, 2.5, null, true, "x"]}', "a: [1, 2.5, null, true, x]", "a: [1, 2.5, ~, yes, 'x']\n"]
)
def test_json_and_yaml_read_the_same(text: str) -> None:
    assert parse_document(text.encode(), "x.yaml") == {"a": [1, 2.5, None, True, "x"]}


def test_flow_yaml_that_only_looks_like_json() -> None:
    assert parse_document(b"{model: a, cluster: {pools: []}}", "x.yaml") == {
        "model": "a",
        "cluster": {"pools": []},
    }


def test_a_byte_order_mark_is_no_content() -> None:
    assert parse_document("﻿a: 1".encode(), "x.yaml") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("-2E6", -2e6), ("5.e1", 50.0), ("1.5e+3", 1500.0), ("'1e3'", "1e3"), ("1e", "1e")],
)
def test_numbers_with_an_exponent_are_numbers_in_yaml_too(text: str, value: Any) -> None:
    found = parse_document(f"a: {text}".encode(), "x.yaml")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("text", "version"), [("0.10", "0.10"), ("0.24", "0.24"), ("'0.30'", "0.30")])
def test_a_version_is_read_as_it_is_written(text: str, version: str) -> None:
    data = parse_document(f"engine: {{name: vllm, version: {text}}}".encode() + b"\nx: 0.10", "x.yaml")
    assert data == {"engine": {"name": "vllm", "version": version}, "x": 0.1}


def test_relative_paths_start_at_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text("a: 1")
    assert read_document(str(tmp_path / "r.yaml")) == ({"a": 1}, tmp_path.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a: 2")))
    assert read_document("-") == ({"a": 2}, tmp_path)


def test_honest_aliases_and_merges_work() -> None:
    text = b"base: &b {device: h100}\npools: [{<<: *b, nodes: 1}, {<<: *b, nodes: 2}]\n"
    assert parse_document(text, "x.yaml")["pools"] == [
        {"device": "h100", "nodes": 1},
        {"device": "h100", "nodes": 2},
    ]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_json_comes_back_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for json_only in (False, True):
        try:
            parse_document(data, "x", json_only=json_only)
        except InputError as error:
            assert error.message  # noqa: PT017 -- both outcomes are right


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        (bytes(range(256)), "is not UTF-8 text (byte 128)"),
        (b"\x00\x01\x02", "control characters"),
        (b"model: a\nmodel: b\n", "line 2: the key 'model' stands twice"),
        (b"a:\n  b: 1\n  b: 2\n", "line 3: the key 'b' stands twice"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (b"? [a, b]\n: 1\n", "unhashable key"),
        (b"a: [1\n", "line 2"),
        (b"a: *nobody\n", "undefined alias"),
        (b"&a [*a]", "alias of itself"),
        (b"a: " + b"9" * 5000, "is not readable YAML"),
    ],
)
def test_yaml_that_is_refused(data: bytes, words: str) -> None:
    assert words in refused(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a number"),
        (b"{", "is not readable JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"a: 1", "is not readable JSON"),
    ],
)
def test_json_that_is_refused(data: bytes, words: str) -> None:
    assert words in refused(data, "request.json")


_TENFOLD = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
_MERGES = "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    "text", ["a0: &a0 [x]\n" + _TENFOLD, "m0: &m0 {a: 1}\n" + _MERGES], ids=["lists", "merges"]
)
@pytest.mark.usefixtures("bounded")
def test_alias_bombs_are_refused(text: str) -> None:
    assert f"more than {files.MAX_EXPANDED} values" in refused(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 101,
        "a: " + "[" * 200_000,
        "a: " + "[" * 200_000 + "]" * 200_000,
        "- " * 200_000,
        "? " * 200_000,
    ],
    ids=["just", "open", "closed", "block", "keys"],
)
@pytest.mark.usefixtures("bounded")
def test_deep_yaml_is_refused_before_it_ends_the_process(text: str) -> None:
    assert "nested deeper than 100 levels" in refused(text.encode())


def test_yaml_at_the_depth_bound_is_read() -> None:
    found = parse_document(b"a: " + b"[" * 99 + b"]" * 99, "x.yaml")["a"]
    depth = 1
    while found:
        found, depth = found[0], depth + 1
    assert depth == 99


# --- files that cannot be read -------------------------------------------------------------------


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for name, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "no.yaml", "No such file"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            read_document(str(name))


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.usefixtures("bounded")
def test_two_gigabytes_are_not_read_into_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"big.{suffix}"
    with path.open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(InputError, match="is larger than 64 MB"):
        read_document(str(path))


def test_standard_input_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a" * 11)))
    with pytest.raises(InputError, match="standard input: is larger than"):
        read_document("-")


# --- lines ---------------------------------------------------------------------------------------


def test_lines_after_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{}\r\n')
    assert [number for number, _ in read_lines(tmp_path / "x.jsonl")] == [1, 2]
    assert [parse_json((line or b"").decode()) for _, line in read_lines(tmp_path / "x.jsonl")] == [
        {"a": 1},
        {},
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf")
    assert list(read_lines(tmp_path / "x.jsonl")) == []


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a\n\n  \r\nb\r\n\nlast")
    assert list(read_lines(path)) == [(1, b"a\n"), (4, b"b\r\n"), (6, b"last")]


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_a_line_above_the_bound_is_skipped_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a\n" + b"x" * (1000 + extra) + b"\n" + b"b\n")
    found = list(read_lines(path))
    assert found[0] == (1, b"a\n")
    assert found[1] == (2, b"x" * 1000 + b"\n" if extra == 0 else None)
    assert found[2:] == [(3, b"b\n")]


@pytest.mark.usefixtures("bounded")
def test_a_huge_line_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.truncate(700 << 20)  # more than memory may grow by
        file.seek(0, 2)
        file.write(b"\nnext\n")
    assert list(read_lines(path)) == [(1, None), (2, b"next\n")]
