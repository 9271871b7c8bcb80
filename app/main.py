"""The ASGI application: the door in front, everything else behind it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app import __version__
from app.metrics import one
from app.web import docs, errors, health, metrics
from app.web.api import (
    callbacks,
    deliveries,
    documents,
    drift,
    envelopes,
    events,
    expectations,
    explain,
    failures,
    feed,
    progress,
    stats,
)
from app.web.deps import Consumer, Tokens
from app.web.headers import Dressed, OnAnswer
from app.web.openapi import SUMMARY, TITLE, complete, operation_id
from app.web.seats import Seats
from app.web.webhooks import Door, DoorLimits
from app.wiring import Services


class Face(StrEnum):
    """What a listener shows: one part, or everything."""

    EVERYTHING = "everything"
    WEBHOOKS = "webhooks"
    API = "api"
    HEALTH = "health"


class Application(FastAPI):
    """FastAPI behind the door: webhooks never meet routing or middleware."""

    door: Door | None = None
    # True if the document describes the door although nobody stands at it.
    describes_door: bool = False

    def __init__(self, *, on_answer: OnAnswer = lambda _: None, **options: Any) -> None:
        super().__init__(
            title=TITLE,
            version=__version__,
            summary=SUMMARY,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
            telemetry={"logs": False},
            generate_unique_id_function=operation_id,
            **options,
        )
        self._dressed = Dressed(super().__call__, on_answer=on_answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send webhooks to the door and all else to the routes."""
        door = self.door
        if door is not None and scope["type"] == "http" and door.is_at(scope["path"]):
            await door(scope, receive, send)
        else:
            await self._dressed(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Describe the routes, and the door, which is none."""
        if self.openapi_schema is None:
            has_door = self.describes_door or self.door is not None
            self.openapi_schema = complete(super().openapi(), has_door=has_door)
        return self.openapi_schema


def create_app(
    services: Services,
    *,
    face: Face = Face.EVERYTHING,
    is_owner: bool = True,
    is_production: bool = True,
) -> Application:
    """Build the application of one listener; its owner starts and stops the services.

    In production the page about the API wants a token, too.
    """
    app = Application(
        on_answer=services.metrics.count_answer,
        lifespan=_lifespan(services) if is_owner else None,
    )
    app.state.tokens = _tokens(services)
    errors.install(app)
    app.include_router(health.routes(services.probe))
    if face in {Face.EVERYTHING, Face.WEBHOOKS}:
        app.door = _door(services)
    if face is not Face.WEBHOOKS:
        app.state.metrics, app.state.gauges = services.metrics, services.gauges
        app.include_router(metrics.router)
    if face in {Face.EVERYTHING, Face.API}:
        app.state.is_production = is_production
        _equip(app, services)
        _include_api(app)
        app.include_router(docs.router)
    return app


def describe() -> dict[str, Any]:
    """Write the OpenAPI document of everything; no setting changes a word of it."""

    async def probe() -> dict[str, str]:
        return {}

    app = Application()
    app.describes_door = True
    app.include_router(health.routes(probe))
    app.include_router(metrics.router)
    _include_api(app)
    return app.openapi()


def _equip(app: Application, services: Services) -> None:
    """Give the API what it asks."""
    app.state.database = services.database
    app.state.tail = services.tail
    app.state.seats = Seats(
        services.settings.api_waiters, each=services.settings.api_waiters_per_token
    )
    app.state.feed = feed.Feed(services.database, services.tail)
    app.state.documents = documents.Documents(services.settings.archive_url)
    seats: Seats = app.state.seats
    services.metrics.gauge("atlas_waiters", "Who waits for news", [], lambda: one(seats.taken))


def _include_api(app: Application) -> None:
    # Before the envelopes, whose route takes any path.
    app.include_router(explain.router)
    app.include_router(progress.router)
    app.include_router(documents.router)
    app.include_router(expectations.router)
    app.include_router(envelopes.router)
    # The feed first: its `/stream` is no event's id.
    app.include_router(feed.router)
    app.include_router(events.router)
    app.include_router(deliveries.router)
    app.include_router(failures.router)
    app.include_router(callbacks.router)
    app.include_router(drift.router)
    app.include_router(stats.router)


def _lifespan(services: Services) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.start()
        try:
            yield
        finally:
            await services.stop()

    return lifespan


def _door(services: Services) -> Door:
    settings = services.settings
    limits = DoorLimits(settings.max_body_bytes, pending_bytes=settings.max_pending_bytes)
    return Door(
        services.keyring,
        services,
        on_match=services.usage.note,
        on_refusal=services.counting.rejected,
        limits=limits,
    )


def _tokens(services: Services) -> Tokens:
    return Tokens(
        (token.get_secret_value(), Consumer(name, frozenset(spec.scopes), spec.accounts))
        for name, spec in services.settings.api_tokens.items()
        for token in spec.tokens
    )
