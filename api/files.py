"""Reading request files: YAML or JSON, safely and with bounds.

YAML is read with a safe loader that refuses duplicate keys and aliases that multiply (a few lines of
them stand for gigabytes), and that takes 1e-3 for a number and a version as it is written; JSON refuses
duplicate keys and the constants that are no numbers.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hardware.errors import InputError

MAX_FILE_BYTES = 64 << 20
MAX_LINE_BYTES = 16 << 20
#: Lists and mappings within each other: the C loader calls itself for each, and no error ends its stack.
MAX_DEPTH = 100
#: Values that aliases may multiply a YAML document to.
MAX_EXPANDED = 200_000
_FLOAT = "tag:yaml.org,2002:float"


def read_document(name: str) -> tuple[Any, Path]:
    """(plain data, folder that relative paths start at) of a YAML or JSON file; `-` is standard input.

    Raises InputError naming the file for what cannot be read.
    """
    if name == "-":
        data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        return parse_document(_bounded(data, "standard input"), "standard input"), Path.cwd()
    path = Path(name)
    with open_file(path) as file:
        data = _bounded(file.read(MAX_FILE_BYTES + 1), name)
    return parse_document(data, name, json_only=path.suffix.lower() == ".json"), path.resolve().parent


def open_file(path: Path) -> IO[bytes]:
    """Open for reading; a folder, a missing or a forbidden file is an InputError."""
    try:
        if path.is_dir():
            raise InputError(str(path), "is a folder, not a file")
        return path.open("rb", buffering=1 << 20)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(str(path), f"cannot be read: {reason}") from error


def _bounded(data: bytes, name: str) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise InputError(name, f"is larger than {MAX_FILE_BYTES >> 20} MB")
    return data


def parse_document(data: bytes, name: str, *, json_only: bool = False) -> Any:
    """Plain data of a YAML or JSON text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(name, f"is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise InputError(name, "is empty")
    if json_only or text.lstrip()[:1] in ("{", "["):
        try:
            return parse_json(text)
        except ValueError as error:
            if json_only or not isinstance(error, json.JSONDecodeError):
                raise InputError(name, f"is not readable JSON: {error}"[:300]) from error
    return _parse_yaml(text, name)


def parse_json(text: str) -> Any:
    """JSON without duplicate keys, NaN or infinities; ValueError otherwise."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise ValueError(f"the key '{key[:80]}' stands twice")
            found[key] = value
        return found

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is not a number that JSON knows")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _parse_yaml(text: str, name: str) -> Any:
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = key_node.value if isinstance(key_node.value, str) else None
                if key is not None and key in seen:
                    line = key_node.start_mark.line + 1
                    raise InputError(name, f"line {line}: the key '{key[:80]}' stands twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

        def construct_yaml_map(self, node: Any) -> Any:
            for key_node, value_node in node.value:
                # Read as a number, 0.10 would be 0.1, which is another version.
                if key_node.value == "version" and value_node.tag == _FLOAT:
                    value_node.tag = "tag:yaml.org,2002:str"
            yield from super().construct_yaml_map(node)

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_yaml_map)
    # A number in YAML 1.2 and JSON; the 1.1 that this loader speaks wants 1.0e-3.
    Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))

    try:
        depth = 0
        for event in yaml.parse(text, Loader=base):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(name, f"is nested deeper than {MAX_DEPTH} levels")
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if "&" in text:  # there may be aliases
                _expanded(node, name, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if "nesting depth" in problem:  # libyaml looks ahead, and since PyYAML 6.0.4 has a bound of its own
            raise InputError(name, f"is nested deeper than {MAX_DEPTH} levels") from error
        raise InputError(name, f"is not readable YAML: {where}{problem}"[:300]) from error
    except (RecursionError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(name, f"is not readable YAML: {reason}"[:300]) from error


def _expanded(node: Any, name: str, known: dict[int, int]) -> int:
    """Values in a YAML node with every alias written out. Raises InputError where that is too many.

    Who walks a document of nested aliases, if only to merge keys or to show it in an error, never comes
    back. `known`: counts of lists and mappings by identity, -1 while one is being counted.
    """
    if not isinstance(getattr(node, "value", None), list):
        return 1
    count = known.get(id(node))
    if count is None:
        known[id(node)] = -1
        count = 1
        for item in node.value:
            # An item of a list is a node, one of a mapping a pair of them.
            for inner in item if isinstance(item, tuple) else (item,):
                count += _expanded(inner, name, known)
        known[id(node)] = count
    if count < 0:
        raise InputError(name, "holds a YAML alias of itself")
    if count > MAX_EXPANDED:
        raise InputError(name, f"comes to more than {MAX_EXPANDED} values with its YAML aliases written out")
    return count


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number, text) of each line that is not blank; None for one above the bound, which is skipped
    without being held in memory."""
    with open_file(path) as file:
        number = 0
        while True:
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8) or b"\n"
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 16)
                yield number, None
            elif line.strip():
                yield number, line
