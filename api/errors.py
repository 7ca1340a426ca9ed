"""Every failure as an RFC 9457 problem: one shape, the field's path, nothing of the server's inside.

Handlers turn what was raised into an `ApiError` and hand it to the responder of the app
(`app.state.respond`), which an application that also serves pages replaces with its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from hardware import InputError

MEDIA_TYPE = "application/problem+json"
#: `type` of a problem that says more than its status code; else `about:blank` (RFC 9457, 4.2.1).
TYPE_PREFIX = "urn:planfront:problem:"
#: Messages come from people's own input; none is shown longer than this.
MAX_MESSAGE = 500
MAX_ERRORS = 100


class FieldProblem(BaseModel):
    """One thing that is wrong with the request."""

    path: str = Field(description="where it stands, e.g. `cluster.pools[0].device`; empty: the whole body")
    message: str = Field(description="one sentence that names the rule and the value")


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="`about:blank`, or a stable name of the kind of problem")
    title: str
    status: int
    detail: str = ""
    errors: list[FieldProblem] = Field(default_factory=list, description="every problem that was found")


class ApiError(Exception):
    """A failure with everything a reply needs. `errors` are (path, message) pairs."""

    def __init__(
        self,
        status: int,
        detail: str = "",
        *,
        kind: str = "",
        title: str = "",
        errors: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.kind = status, detail[:MAX_MESSAGE], kind
        self.title = title or HTTPStatus(status).phrase
        self.errors = [(path[:200], message[:MAX_MESSAGE]) for path, message in errors[:MAX_ERRORS]]
        self.headers = dict(headers or {})

    def problem(self) -> Problem:
        """The reply's body."""
        return Problem(
            type=TYPE_PREFIX + self.kind if self.kind else "about:blank",
            title=self.title,
            status=self.status,
            detail=self.detail,
            errors=[FieldProblem(path=path, message=message) for path, message in self.errors],
        )


Responder = Callable[[Request, ApiError], Response]


def problems_of(error: InputError) -> list[tuple[str, str]]:
    """(path, sentence) of everything an `InputError` reports."""
    several = getattr(error, "problems", None)
    if several:
        return [(str(path), str(message)) for path, message in several]
    return [(error.path, f"{error.message} ({error.hint})" if error.hint else error.message)]


def words_of(item: Mapping[str, Any], *, in_address: bool = False) -> str:
    """One of pydantic's errors in words. What stands in an address is repeated, what in a body never is:
    it may be a secret."""
    from planner.request import sentence

    shown = in_address or item["type"] in ("missing", "extra_forbidden")
    return sentence(item) if shown else str(item["msg"])


def unprocessable(errors: Sequence[tuple[str, str]]) -> ApiError:
    """422 with every problem; the first one is the detail."""
    path, message = errors[0]
    return ApiError(
        422,
        f"{path}: {message}" if path else message,
        kind="invalid-request",
        title="The request cannot be used",
        errors=errors,
    )


def fault() -> ApiError:
    """500, with nothing of the cause in it: that is in the log."""
    return ApiError(
        500, "The service met a fault of its own. The request was not at fault; it is in the log."
    )


def problem_response(request: Request, error: ApiError) -> Response:
    """The problem as `application/problem+json`."""
    return JSONResponse(
        error.problem().model_dump(), error.status, headers=error.headers, media_type=MEDIA_TYPE
    )


def _methods(request: Request) -> list[str]:
    """What the path is served for, by any of its routes (the framework names those of the first)."""

    def served(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes)

    return [method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if served(method)]


def install(app: FastAPI) -> None:
    """Handlers of everything a route can raise, all answered by `app.state.respond`."""
    app.state.respond = problem_response

    def respond(request: Request, error: ApiError) -> Response:
        responder: Responder = request.app.state.respond
        return responder(request, error)

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return respond(request, error)

    async def on_input_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, InputError)
        return respond(request, unprocessable(problems_of(error)))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        details = {
            404: f"Nothing is served at {request.url.path[:200]}.",
            405: f"{request.method} is not served at {request.url.path[:200]}.",
        }
        detail = details.get(error.status_code, str(error.detail or ""))
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request))
        return respond(request, ApiError(error.status_code, detail, headers=headers))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = [
            (_dotted(item["loc"][1:]), words_of(item, in_address=item["loc"][0] == "query"))
            for item in error.errors()
        ]
        return respond(request, unprocessable(found or [("", "is not valid")]))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(InputError, on_input_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)


def _dotted(parts: Sequence[Any]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
