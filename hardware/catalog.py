"""The hardware catalog: shipped tables, and a user's own files laid over them.

A user's file (TOML or YAML) has the same tables: `device`, `link`, `node`, `cluster`, each a mapping
of names. A known name overrides only the fields it gives; a new one may start from another with
`base = "h100-sxm-80gb"`. Files are named by the caller or by PLANFRONT_CATALOG (separated as PATH is).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from hardware.device import Device, Source
from hardware.errors import InputError
from hardware.units import gb, mhz, mib, microseconds, tflops

MAX_FILE_BYTES = 4_000_000
FORMATS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "fp4")
_SECTIONS = ("device", "link", "node", "cluster")
_DEVICE_NUMBERS = (
    "memory_mib", "memory_nominal_bytes", "memory_bandwidth_gb_per_s", "l2_mib", "sm_count",
    "boost_clock_mhz", "tdp_w", "idle_w", "usd_per_hour",
)  # fmt: skip
_DEVICE_WORDS = ("vendor", "architecture", "scale_up_link", "host_link", "kernels_like")
_SOURCED = (
    "memory_bytes", "memory_bandwidth_bytes_per_s", "peak_flops_per_s", "l2_bytes", "sm_count",
    "boost_clock_hz", "tdp_w", "idle_w", "usd_per_hour", "memory_nominal_bytes", "scale_up_link",
)  # fmt: skip
_SOURCE_KINDS = ("datasheet", "measured", "list-price", "derived")


@dataclass(frozen=True, slots=True)
class Link:
    """One kind of link: per device (or per NIC) and per direction."""

    name: str
    bandwidth_bytes_per_s: float
    latency_s: float
    switched: bool
    in_switch_reduction: bool
    source: Source


@dataclass(frozen=True, slots=True)
class NodeType:
    """A chassis: devices in it, how far the scale-up link reaches, and what leads out.

    `domain` is the most devices that the scale-up link joins at full rate; above
    `devices_per_node` it leaves the chassis (rack-scale NVLink, TPU slices).
    """

    name: str
    devices: tuple[str, ...]
    devices_per_node: int
    domain: int
    scale_up_link: Link
    nics: int
    scale_out_link: Link
    host_idle_w: float
    source: Source


@dataclass(frozen=True, eq=False)
class Catalog:
    """Everything known: frozen tables by name. `version` is a hash of their content."""

    devices: Mapping[str, Device]
    links: Mapping[str, Link]
    nodes: Mapping[str, NodeType]
    clusters: Mapping[str, Mapping[str, Any]]
    version: str

    def device(self, name: str, path: str = "device") -> Device:
        """A device by name, in any case; InputError with the nearest known name."""
        return _find(self.devices, name, path, "device")

    def link(self, name: str, path: str = "link") -> Link:
        """A link by name."""
        return _find(self.links, name, path, "link")

    def node(self, name: str, path: str = "node") -> NodeType:
        """A node type by name."""
        return _find(self.nodes, name, path, "node")

    def default_node(self, device: Device) -> NodeType:
        """The chassis that a device usually comes in; a plain PCIe server where none lists it."""
        for node in self.nodes.values():
            if device.name in node.devices:
                return node
        source = Source("a host with this device's own links", "", "derived")
        link = self.links[device.scale_up_link]
        alone = device.scale_up_link == device.host_link
        return NodeType(
            f"{device.name}-server", (device.name,), 8, 1 if alone else 8, link, 2,
            self.links["roce-100g"], 500.0, source,
        )  # fmt: skip


_T = TypeVar("_T")


def _find(table: Mapping[str, _T], name: Any, path: str, what: str) -> _T:
    if not isinstance(name, str):
        raise InputError(path, f"a {what} is named by text, not {type(name).__name__}")
    key = name.strip().lower()
    if key in table:
        return table[key]
    # What begins as it was typed is more likely meant than what is as long.
    begin = [known for known in table if key and known.startswith(key)]
    close = dict.fromkeys([*begin, *difflib.get_close_matches(key, table, n=3, cutoff=0.4)])
    nearest = ", ".join(list(close)[:3] or sorted(table)[:3])
    raise InputError(path, f"unknown {what} '{name[:80]}'", f"nearest: {nearest}")


# --- reading -------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _shipped() -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    folder = resources.files("hardware") / "catalog"
    for name in ("links.toml", "nodes.toml", "devices.toml"):
        for section, rows in tomllib.loads((folder / name).read_text(encoding="utf-8")).items():
            merged[section].update(rows)
    return merged


def load_catalog(extra: Sequence[str | Path] = ()) -> Catalog:
    """The shipped catalog with a user's files over it, later files over earlier ones.

    Raises InputError with file and path for a wrong entry.
    """
    given = [Path(item) for item in os.environ.get("PLANFRONT_CATALOG", "").split(os.pathsep) if item]
    return _load(tuple(str(path) for path in (*given, *extra)), _stamps((*given, *extra)))


def _stamps(paths: Iterable[str | Path]) -> tuple[float, ...]:
    """Modification times, so that a changed file is read anew."""
    found = []
    for path in paths:
        try:
            found.append(os.stat(path).st_mtime)
        except OSError:
            found.append(0.0)
    return tuple(found)


@lru_cache(maxsize=8)
def _load(paths: tuple[str, ...], stamps: tuple[float, ...]) -> Catalog:
    del stamps
    merged = {section: dict(rows) for section, rows in _shipped().items()}
    origin: dict[tuple[str, str], str] = {}
    for path in paths:
        for section, rows in read_file(Path(path)).items():
            for name, row in rows.items():
                key = str(name).strip().lower()
                merged[section][key] = _overlay(merged[section], key, row, f"{path}: {section}.{name}")
                origin[section, key] = path

    def where(section: str, name: str) -> str:
        file = origin.get((section, name), "")
        return f"{file}: {section}.{name}" if file else f"{section}.{name}"

    links = {name: _link(name, row, where("link", name)) for name, row in merged["link"].items()}
    nodes = {name: _node(name, row, links, where("node", name)) for name, row in merged["node"].items()}
    devices = {
        name: _device(name, row, links, where("device", name)) for name, row in merged["device"].items()
    }
    for node in nodes.values():
        for device in node.devices:
            _find(devices, device, f"{where('node', node.name)}.devices", "device")
    text = json.dumps(merged, sort_keys=True, default=str)
    return Catalog(
        MappingProxyType(devices),
        MappingProxyType(links),
        MappingProxyType(nodes),
        MappingProxyType(merged["cluster"]),
        hashlib.sha256(text.encode()).hexdigest()[:12],
    )


def read_file(path: Path) -> dict[str, dict[str, Any]]:
    """A user's TOML or YAML file as sections of named tables."""
    text = read_text(path)
    suffix = path.suffix.lower()
    data: Any
    try:
        if suffix == ".toml":
            data = tomllib.loads(text)
        elif suffix in (".yaml", ".yml", ".json"):
            import yaml

            data = yaml.safe_load(text)
        else:
            raise InputError(str(path), "a hardware file ends in .toml, .yaml, .yml or .json")
    except InputError:
        raise
    except Exception as error:  # parsers raise many kinds; all mean that the file is not readable
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(str(path), f"not a readable {suffix[1:]} file: {first[:200]}") from error
    if not isinstance(data, Mapping):
        raise InputError(str(path), f"expected tables {', '.join(_SECTIONS)}")
    found: dict[str, dict[str, Any]] = {}
    for section, rows in data.items():
        name = str(section).rstrip("s")
        if name not in _SECTIONS:
            known = ", ".join(_SECTIONS)
            raise InputError(f"{path}: {str(section)[:80]}", f"unknown table; known are {known}")
        if not isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows.values()):
            raise InputError(f"{path}: {section}", "expected a table of named entries")
        found[name] = {str(key): dict(row) for key, row in rows.items()}
    return found


def read_text(path: Path) -> str:
    """A small text file; InputError for a folder, a missing, huge or binary file."""
    try:
        if path.is_dir():
            raise InputError(str(path), "is a folder, not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(str(path), f"is larger than {MAX_FILE_BYTES // 1_000_000} MB")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(str(path), "is not UTF-8 text") from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(str(path), f"cannot be read: {reason}") from error


def _overlay(known: Mapping[str, Any], key: str, row: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A user's row over the entry it overrides or starts from."""
    base = row.get("base")
    start: Mapping[str, Any] = {}
    if base is not None:
        start = _find(known, base, f"{path}.base", "base")
    elif key in known:
        start = known[key]
    merged = {**start, **{name: value for name, value in row.items() if name != "base"}}
    changed = {name: value for name, value in row.items() if name not in ("base", "sources", "datasheet")}
    if start:
        # What the user changed is the user's word, not the data sheet's.
        mine = {"title": "user catalog", "date": "", "kind": "derived"}
        sources = dict(start.get("sources", {}))
        sources.update({_field(name): mine for name in changed})
        given = row.get("sources", {})
        sources.update(given if isinstance(given, Mapping) else {})
        merged["sources"] = sources
    return merged


def _field(name: str) -> str:
    """The Device field that a key of a table sets."""
    return {
        "memory_mib": "memory_bytes",
        "memory_bandwidth_gb_per_s": "memory_bandwidth_bytes_per_s",
        "peak_tflops": "peak_flops_per_s",
        "l2_mib": "l2_bytes",
        "boost_clock_mhz": "boost_clock_hz",
    }.get(name, name)


# --- validation ----------------------------------------------------------------------------------


def number(row: Mapping[str, Any], key: str, path: str, *, least: float = 0.0, above: bool = True) -> float:
    """A finite number of a table, above (or at least) `least`."""
    if key not in row:
        raise InputError(f"{path}.{key}", "this field is required")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{path}.{key}", f"must be a number, not {type(value).__name__}")
    if not math.isfinite(value) or value > 1e30 or (value <= least if above else value < least):
        word = "above" if above else "at least"
        raise InputError(f"{path}.{key}", f"must be a finite number {word} {least:g}, not {value}")
    return float(value)


def _whole(row: Mapping[str, Any], key: str, path: str) -> int:
    value = number(row, key, path)
    if value != int(value):
        raise InputError(f"{path}.{key}", f"must be a whole number, not {value}")
    return int(value)


def _word(row: Mapping[str, Any], key: str, path: str, default: str | None = None) -> str:
    value = row.get(key, default)
    if value is None:
        raise InputError(f"{path}.{key}", "this field is required")
    if not isinstance(value, str) or len(value) > 200:
        raise InputError(f"{path}.{key}", "must be a short text")
    return value


def _flag(row: Mapping[str, Any], key: str, path: str) -> bool:
    value = row.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"{path}.{key}", "must be true or false")
    return value


def _known(row: Mapping[str, Any], allowed: Iterable[str], path: str) -> None:
    allowed = tuple(allowed)
    for key in row:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.4)
            hint = f"nearest: {close[0]}" if close else f"known: {', '.join(allowed)}"
            raise InputError(f"{path}.{str(key)[:80]}", "unknown field", hint)


def _source(value: Any, path: str) -> Source:
    if value is None:
        return Source("user catalog", "", "derived")
    if not isinstance(value, Mapping):
        raise InputError(path, "a source is a table of title, date, kind and url")
    _known(value, ("title", "date", "kind", "url"), path)
    kind = _word(value, "kind", path, "derived")
    if kind not in _SOURCE_KINDS:
        raise InputError(f"{path}.kind", f"must be one of {', '.join(_SOURCE_KINDS)}")
    title, url = _word(value, "title", path), _word(value, "url", path, "")
    return Source(title, str(value.get("date", "")), kind, url)


def _link(name: str, row: Mapping[str, Any], path: str) -> Link:
    _known(
        row,
        ("bandwidth_gb_per_s", "latency_us", "switched", "in_switch_reduction", "source", "sources"),
        path,
    )
    return Link(
        name,
        gb(number(row, "bandwidth_gb_per_s", path)),
        microseconds(number(row, "latency_us", path, above=False)),
        _flag(row, "switched", path),
        _flag(row, "in_switch_reduction", path),
        _source(row.get("source"), f"{path}.source"),
    )


def _node(name: str, row: Mapping[str, Any], links: Mapping[str, Link], path: str) -> NodeType:
    _known(
        row,
        ("devices", "devices_per_node", "domain", "scale_up_link", "nics", "scale_out_link", "host_idle_w",
         "source", "sources"),
        path,
    )  # fmt: skip
    devices = row.get("devices")
    if not isinstance(devices, list) or not devices or not all(isinstance(item, str) for item in devices):
        raise InputError(f"{path}.devices", "must be a list of device names")
    return NodeType(
        name,
        tuple(item.strip().lower() for item in devices),
        _whole(row, "devices_per_node", path),
        _whole(row, "domain", path),
        _find(links, _word(row, "scale_up_link", path), f"{path}.scale_up_link", "link"),
        _whole(row, "nics", path),
        _find(links, _word(row, "scale_out_link", path), f"{path}.scale_out_link", "link"),
        number(row, "host_idle_w", path, above=False),
        _source(row.get("source"), f"{path}.source"),
    )


def _device(name: str, row: Mapping[str, Any], links: Mapping[str, Link], path: str) -> Device:
    _known(row, (*_DEVICE_NUMBERS, *_DEVICE_WORDS, "peak_tflops", "datasheet", "sources"), path)
    peaks = row.get("peak_tflops")
    if not isinstance(peaks, Mapping) or not peaks:
        raise InputError(f"{path}.peak_tflops", "must be a table of dense peaks by format")
    _known(peaks, FORMATS, f"{path}.peak_tflops")
    memory = int(mib(number(row, "memory_mib", path)))
    nominal = int(number(row, "memory_nominal_bytes", path)) if "memory_nominal_bytes" in row else memory
    for key in ("scale_up_link", "host_link"):
        _find(links, _word(row, key, path), f"{path}.{key}", "link")
    sheet = _source(row.get("datasheet"), f"{path}.datasheet")
    sources = dict.fromkeys(_SOURCED, sheet)
    given = row.get("sources", {})
    if not isinstance(given, Mapping):
        raise InputError(f"{path}.sources", "must be a table of fields")
    for field, value in given.items():
        sources[str(field)] = _source(value, f"{path}.sources.{field}")
    tdp, idle = number(row, "tdp_w", path), number(row, "idle_w", path, above=False)
    if idle >= tdp:
        raise InputError(f"{path}.idle_w", f"must be below tdp_w ({tdp:g}), not {idle:g}")
    return Device(
        name=name,
        vendor=_word(row, "vendor", path).lower(),
        architecture=_word(row, "architecture", path).lower(),
        memory_bytes=memory,
        memory_bandwidth_bytes_per_s=gb(number(row, "memory_bandwidth_gb_per_s", path)),
        peak_flops_per_s=MappingProxyType(
            {str(key): tflops(number(peaks, key, f"{path}.peak_tflops")) for key in peaks}
        ),
        l2_bytes=int(mib(number(row, "l2_mib", path))),
        sm_count=_whole(row, "sm_count", path),
        boost_clock_hz=mhz(number(row, "boost_clock_mhz", path)),
        tdp_w=tdp,
        idle_w=idle,
        usd_per_hour=number(row, "usd_per_hour", path, above=False),
        memory_nominal_bytes=nominal,
        scale_up_link=_word(row, "scale_up_link", path),
        host_link=_word(row, "host_link", path),
        kernels_like=_word(row, "kernels_like", path, ""),
        sources=MappingProxyType(sources),
    )


# --- showing -------------------------------------------------------------------------------------


def catalog_rows(catalog: Catalog | None = None) -> list[dict[str, Any]]:
    """One plain mapping per device: numbers in SI units and a source for each."""
    catalog = catalog or load_catalog()
    rows = []
    for device in catalog.devices.values():
        node = catalog.default_node(device)
        rows.append(
            {
                "name": device.name,
                "vendor": device.vendor,
                "architecture": device.architecture,
                "memory_bytes": device.memory_bytes,
                "memory_nominal_bytes": device.memory_nominal_bytes,
                "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s,
                "peak_flops_per_s": dict(device.peak_flops_per_s),
                "l2_bytes": device.l2_bytes,
                "sm_count": device.sm_count,
                "boost_clock_hz": device.boost_clock_hz,
                "tdp_w": device.tdp_w,
                "idle_w": device.idle_w,
                "usd_per_hour": device.usd_per_hour,
                "scale_up_link": device.scale_up_link,
                "node": node.name,
                "devices_per_node": node.devices_per_node,
                "scale_up_domain": node.domain,
                "sources": {
                    field: {"title": s.title, "date": s.date, "kind": s.kind, "url": s.url}
                    for field, s in device.sources.items()
                },
            }
        )
    return rows
