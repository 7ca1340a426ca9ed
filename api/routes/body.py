"""A JSON body, read strictly."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request

from api.errors import ApiError


async def json_body(request: Request) -> Any:
    """The body's JSON value. Raises ApiError 415 for another media type, 400 for what is no JSON.

    Stricter than JSON readers are by default: NaN and Infinity are no JSON, and a name that stands
    twice in one object is refused, since either of its values could have been meant.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        given = f"not {media_type[:80]!r}" if media_type else "and the request names none"
        raise ApiError(
            415,
            f"The body's Content-Type must be application/json, {given}.",
            headers={"Accept-Post": "application/json"},
        )
    body = await request.body()
    try:
        value = json.loads(body, object_pairs_hook=_object, parse_constant=_constant)
        if b"\\u" in body:
            # Half of a surrogate pair is no character: no reply that repeats it could be written.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _malformed(f"The body is not JSON: {error.msg} at {where}.") from None
    except _Refused as error:
        raise _malformed(str(error)) from None
    except RecursionError:
        raise _malformed("The body is nested too deeply.") from None
    except ValueError:  # what is not Unicode, integers of thousands of digits
        raise _malformed("The body is not JSON in UTF-8 with numbers of sensible size.") from None


class _Refused(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"The name {twice[:60]!r} stands twice in one object.")
    return found


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not a JSON number.")


def _malformed(detail: str) -> ApiError:
    return ApiError(400, detail, kind="malformed-json", title="The body cannot be read")
