"""YAML that people type: plain data only, with the line of what is wrong."""

from __future__ import annotations

from typing import Any

import yaml

from hardware import InputError

#: A request has a few hundred nodes; this is room for long lists and still no load.
MAX_YAML_NODES = 50_000


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain data only; a name that stands twice in one mapping is an error, as in JSON bodies."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{str(key.value)[:60]!r} stands twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """One YAML document of plain data. Raises InputError with the line.

    Anchors are refused: a request needs none, and a few lines of them expand to gigabytes.
    """
    if not text.strip():
        raise InputError("", "the YAML is empty")
    try:
        for nodes, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise InputError(f"line {event.start_mark.line + 1}", "anchors and aliases are not read here")
            if nodes > MAX_YAML_NODES:
                raise InputError(f"line {event.start_mark.line + 1}", "the document has too many parts")
        return yaml.load(text, Loader=_Loader)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(line, f"this is not YAML: {error.problem or error.context}"[:300]) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError("", "this is not YAML that can be read") from None
