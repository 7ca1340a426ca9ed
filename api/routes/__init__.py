"""The routes, by what they serve."""

from fastapi import APIRouter

from api.routes import catalog, health, planning, runs, uploads

ROUTERS: tuple[APIRouter, ...] = (
    planning.router,
    runs.router,
    uploads.router,
    catalog.router,
    health.router,
)
