"""Static files, and plotly.js as the installed package `plotly` ships it: under content hashes, for good.

Nothing of another project is copied here. Without the package the pages keep their SVG charts.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.errors import ApiError

STATIC = Path(__file__).resolve().parent / "static"
_FOR_GOOD = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
#: The one file that is not ours.
PLOTLY = "plotly.min.js"

router = APIRouter(include_in_schema=False)


@lru_cache(maxsize=1)
def _plotly() -> Path | None:
    """plotly.js inside the installed package; None when it is not installed."""
    # The package itself is not imported: it is large, and only its data file is wanted.
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "package_data" / PLOTLY
    return file if file.is_file() else None


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    """All files that are served, by their names in addresses."""
    files = {
        path.relative_to(STATIC).as_posix().replace("/", "-"): path
        for path in sorted(STATIC.rglob("*"))
        if path.suffix in _TYPES
    }
    plotly = _plotly()
    if plotly is not None:
        files[PLOTLY] = plotly
    return files


@lru_cache(maxsize=32)
def _content(name: str) -> tuple[bytes, bytes, str]:
    """(bytes, the same compressed, fingerprint) of a file."""
    raw = _files()[name].read_bytes()
    return raw, gzip.compress(raw, 9, mtime=0), hashlib.sha256(raw).hexdigest()[:12]


def fingerprint(name: str) -> str:
    """What the content of a static file is known by in its address."""
    return _content(name)[2]


def static_address(name: str) -> str:
    """The address of a static file: it changes with the content, so browsers may keep it for good."""
    return f"/static/{fingerprint(name)}/{name}"


def plotly_address() -> str:
    """The address of plotly.js; "" when it is not installed."""
    return static_address(PLOTLY) if PLOTLY in _files() else ""


@router.get("/static/{version}/{name}")
def static(request: Request, version: str, name: str) -> Response:
    """A static file under the fingerprint of its content."""
    if name not in _files() or fingerprint(name) != version:
        raise ApiError(404, "Nothing is served at this address.")
    raw, packed, _ = _content(name)
    kind = _TYPES[Path(name).suffix]
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(packed, media_type=kind, headers={**_FOR_GOOD, "Content-Encoding": "gzip"})
    return Response(raw, media_type=kind, headers=_FOR_GOOD)
