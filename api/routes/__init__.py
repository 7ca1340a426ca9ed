"""The routes, by what they serve."""

from fastapi import APIRouter

from api.routes import catalog, health, planning

ROUTERS: tuple[APIRouter, ...] = (planning.router, catalog.router, health.router)
