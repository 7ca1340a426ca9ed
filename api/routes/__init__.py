"""The routes, by what they serve."""

from fastapi import APIRouter

from api.routes import catalog, health, planning, runs, studies, uploads

ROUTERS: tuple[APIRouter, ...] = (
    planning.router,
    runs.router,
    studies.router,
    uploads.router,
    catalog.router,
    health.router,
)
