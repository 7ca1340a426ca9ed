"""The REST API: `create_api()` puts settings, service, errors, headers and routes together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api import errors, schemas
from api.gate import Gate
from api.metrics import Metrics
from api.middleware import BodyLimit, Outermost
from api.often import Often
from api.routes import ROUTERS
from api.runs import Runs
from api.service import Service
from api.settings import Settings
from planner.pipeline import version

if TYPE_CHECKING:
    from api.store import Store
    from planner import Planner

_DESCRIPTION = """\
Which way of serving a language model on given machines, for given traffic, is best: a Pareto front of
plans with predicted latency, throughput, energy, memory and cost.

A request that no plan can satisfy is an answer (200, `infeasible`, with reasons), not an error. Every error
is an RFC 9457 problem that names the fields. Units stand in the names: `_s` seconds, `_j` joules, `_w` watts,
`_bytes`, `_rps` requests per second.
"""


def create_api(
    planner: Planner | None = None,
    settings: Settings | None = None,
    *,
    store: Store | None = None,
    keys_needed: bool = False,
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """The application. `planner`: one to use instead of own ones (it must not read paths).

    `store`: where runs, uploads and API keys are kept; without one there are none, and everybody may use
    what computes at once. `keys_needed`: refuse who has no key even while there is none; else keys are
    needed once one has been made. `hosts`: names that a request's Host may have (None: any). Raises
    InputError when the environment holds a setting that cannot be used.
    """
    settings = settings or Settings.from_env()
    service = Service(planner, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.runs = None if store is None else Runs(store, settings)
        yield
        if app.state.runs is not None:
            app.state.runs.close()
        service.close()

    app = FastAPI(
        title="planfront",
        summary="Plan search for LLM serving",
        description=_DESCRIPTION,
        version=version(),
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        # The interactive documentation loads its scripts from other hosts; the schema is enough.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.service = service
    app.state.store = store
    app.state.runs = None
    app.state.metrics = Metrics(store)
    errors.install(app)
    app.add_middleware(Often)
    app.add_middleware(
        BodyLimit, limit=settings.max_body_bytes, limits={"/api/v1/uploads": settings.max_upload_bytes}
    )
    app.add_middleware(Gate, store=store, settings=settings, keys_needed=keys_needed, hosts=hosts)
    app.add_middleware(Outermost)  # added last: outermost
    for router in ROUTERS:
        app.include_router(router)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                license_info=app.license_info,
                routes=app.routes,
            )
            app.openapi_schema = schemas.complete(document)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app
