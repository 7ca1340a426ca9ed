"""Models by catalog name, Hugging Face id or path of a `config.json`."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from hardware.errors import InputError
from planner.models.huggingface import from_config
from planner.models.parameters import count_parameters
from planner.models.spec import ModelSpec, QuantizationDefault

MAX_CONFIG_BYTES = 10_000_000

#: Parts of a Hugging Face name that do not change the architecture.
_VARIANT = re.compile(
    r"-(instruct|chat|it|pt|base|hf|thinking|nonthinking|preview|original|text|fp8-dynamic|fp8-kv|fp8|bf16|"
    r"awq|gptq|gptq-int4|gptq-int8|awq-int4|int4|int8|w8a8|w4a16|nvfp4-v2|fp4-v2|nvfp4|fp4|mxfp4|quantized|"
    r"bnb|4bit|8bit|4k|8k|128k|200k|static|dynamic|per-?tensor|per-?channel|v0\.[123]|zero|speciale|terminus|exp|"
    r"0324|0528|1210|0905|0711|25\d\d|24\d\d|[bm]m|gguf|marlin|quantized\.w\w+|16e|128e)(?=-|$)"
)
#: What such a part says of the checkpoint's formats (DeepSeek and Kimi are stored in fp8 themselves).
_FORMATS: tuple[tuple[str, QuantizationDefault], ...] = (
    ("nvfp4", QuantizationDefault("fp4", "fp4", "bf16", "nvfp4")),
    ("-fp4", QuantizationDefault("fp4", "fp4", "bf16", "nvfp4")),
    ("mxfp4", QuantizationDefault("fp4", "bf16", "bf16", "mxfp4")),
    ("-bf16", QuantizationDefault()),
    ("awq", QuantizationDefault("int4", "bf16", "bf16", "awq")),
    ("gptq-int8", QuantizationDefault("int8", "bf16", "bf16", "gptq")),
    ("gptq", QuantizationDefault("int4", "bf16", "bf16", "gptq")),
    ("w4a16", QuantizationDefault("int4", "bf16", "bf16", "compressed-tensors")),
    ("w8a8", QuantizationDefault("int8", "int8", "bf16", "compressed-tensors")),
    ("-int4", QuantizationDefault("int4", "bf16", "bf16", "gptq")),
    ("-int8", QuantizationDefault("int8", "bf16", "bf16", "gptq")),
    ("4bit", QuantizationDefault("int4", "bf16", "bf16", "bitsandbytes")),
    ("8bit", QuantizationDefault("int8", "bf16", "bf16", "bitsandbytes")),
    ("fp8-kv", QuantizationDefault("fp8", "fp8", "fp8", "fp8")),
    ("kimi-k2-thinking", QuantizationDefault("int4", "bf16", "bf16", "compressed-tensors")),
)
#: Variants whose own config holds more tokens than the first checkpoint's.
_CONTEXTS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"^qwen3-\d.*-2507(-|$)"), 262_144),
    (re.compile(r"-128k(-|$)"), 131_072),
    (re.compile(r"-200k(-|$)"), 200_000),
)


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, Any]]:
    text = (resources.files("planner.models") / "catalog.toml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = tomllib.loads(text)["model"]
    return rows


@lru_cache(maxsize=1)
def _index() -> dict[str, str]:
    """Every name and id, and their bare forms, to a catalog name."""
    index: dict[str, str] = {}
    for name, row in _rows().items():
        for known in (name, *row["ids"]):
            for form in (known.lower(), known.lower().split("/")[-1]):
                index.setdefault(form, name)
    for name, row in _rows().items():
        for known in (name, *row["ids"]):
            index.setdefault(_bare(known), name)
    return index


def _bare(name: str) -> str:
    """A name without organisation and variant parts."""
    text = name.lower().split("/")[-1].replace("_", "-")
    while True:
        shorter = _VARIANT.sub("", text)
        if shorter == text:
            return text.removeprefix("meta-")
        text = shorter


def _variant(asked: str, default: QuantizationDefault) -> QuantizationDefault:
    """The formats that a variant's name says, else the checkpoint's own."""
    text = asked.lower().replace("_", "-")
    for part, found in _FORMATS:
        if part in text:
            return found
    if re.search(r"-fp8(-|$)", text) and default.weights != "fp8":
        # Qwen and Z.ai publish block scales; others scales per tensor or channel.
        block = text.split("/")[-1].startswith(("qwen", "glm-5"))
        return QuantizationDefault("fp8", "fp8", "bf16", "fp8_block" if block else "fp8")
    return default


def _context(asked: str, default: int) -> int:
    """Tokens that the variant asked for holds."""
    text = asked.lower().split("/")[-1].replace("_", "-")
    return next((tokens for pattern, tokens in _CONTEXTS if pattern.search(text)), default)


@lru_cache(maxsize=512)
def _named(name: str) -> ModelSpec:
    row = _rows()[name]
    spec = from_config(row["config"], f"model.{name}", name)
    return replace(spec, name=name, hugging_face_ids=tuple(row["ids"]), source=row["source"])


def load_model(
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    allow_paths: bool = True,
    base_dir: Path | None = None,
    path: str = "model",
) -> ModelSpec:
    """A model by catalog name, Hugging Face id (in any case, variants included), or path.

    A path is a `config.json` or its folder; `hf_quant_config.json` beside it is read too. With a `config`,
    the content of a `config.json`, the model is what that describes and `name` only what it is called.
    Raises InputError with the nearest names, or why the file or the config cannot be used.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(path, "must be the name of a model or the path of its config.json")
    asked = name.strip()
    if config is not None:
        return replace(from_config(config, "config", asked), source="the request's config")
    found = _known(asked)
    if found is not None:
        spec = _named(found)
        return replace(
            spec,
            quantization=_variant(asked, spec.quantization),
            max_context_tokens=_context(asked, spec.max_context_tokens),
        )
    if _looks_like_path(asked, base_dir):
        if not allow_paths:
            raise InputError(path, "files are read on the command line only; name a model of the catalog")
        name, config, file = _read_file(asked, base_dir, path)
        return replace(from_config(config, f"{path}.config", name), source=str(file))
    close = difflib.get_close_matches(_bare(asked), sorted(_rows()), n=3, cutoff=0.3)
    named = ", ".join(close or sorted(_rows())[:3])
    other = "the path of its config.json, or its content" if allow_paths else "the content of its config.json"
    raise InputError(
        path, f"unknown model '{asked[:80]}'", f"nearest: {named}; of any other give {other} as `config`"
    )


def _looks_like_path(text: str, base_dir: Path | None) -> bool:
    if text.endswith(".json") or text.startswith((".", "/", "~")):
        return True
    try:
        return ((base_dir or Path.cwd()) / text).exists()
    except (OSError, ValueError):
        return False


def _known(asked: str) -> str | None:
    """The catalog name that a name or id means."""
    index = _index()
    forms = (asked.lower(), asked.lower().split("/")[-1], _bare(asked))
    return next((index[form] for form in forms if form in index), None)


def config_at(
    text: str, base_dir: Path | None = None, path: str = "model"
) -> tuple[str, dict[str, Any]] | None:
    """(name, content) of the `config.json` that a request's `model` names by path; None when it is no path.

    What `hf_quant_config.json` beside it says of the formats is in the content. Raises InputError.
    """
    asked = text.strip()
    if _known(asked) is not None or not _looks_like_path(asked, base_dir):
        return None
    name, config, _ = _read_file(asked, base_dir, path)
    return name, config


def _read_file(text: str, base_dir: Path | None, path: str) -> tuple[str, dict[str, Any], Path]:
    file = Path(text).expanduser()
    if not file.is_absolute():
        file = (base_dir or Path.cwd()) / file
    try:
        if file.is_dir():
            file = file / "config.json"
            if not file.exists():
                raise InputError(path, f"the folder '{text[:200]}' has no config.json")
        config = _read_json(file, path)
        beside = file.with_name("hf_quant_config.json")
        if isinstance(config, dict) and beside.exists():
            config = {**config, "quantization_config": _read_json(beside, path)}
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(path, f"'{text[:200]}' cannot be read: {reason}"[:300]) from error
    return file.parent.name or "model", config, file


def _read_json(file: Path, path: str) -> Any:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(path, f"'{file.name}' is larger than {MAX_CONFIG_BYTES // 1_000_000} MB")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"'{file.name}' is not readable JSON: {str(error)[:120]}") from error


def model_rows() -> list[dict[str, Any]]:
    """One plain mapping per catalog model, for catalogs."""
    rows = []
    for name, row in _rows().items():
        spec = _named(name)
        counted = count_parameters(spec)
        rows.append(
            {
                "name": name,
                "family": spec.family,
                "hugging_face_ids": list(row["ids"]),
                "parameters": counted.total,
                "active_parameters": counted.active,
                "published_parameters": row["parameters"],
                "layers": spec.num_layers,
                "hidden": spec.hidden,
                "vocab": spec.vocab,
                "max_context_tokens": spec.max_context_tokens,
                "weights": spec.quantization.weights,
                "quantization": spec.quantization.method,
                "source": row["source"],
            }
        )
    return rows
