"""The ASGI application: the door in front, everything else behind it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app import __version__
from app.web import errors, health
from app.web.api import envelopes
from app.web.deps import Consumer, Tokens
from app.web.openapi import describe_door
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send webhooks to the door and all else to the routes."""
        door = self.door
        if door is not None and scope["type"] == "http" and door.is_at(scope["path"]):
            await door(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Describe the routes, and the door, which is none."""
        document = super().openapi()
        return describe_door(document) if self.door is not None else document


def create_app(
    services: Services, *, face: Face = Face.EVERYTHING, is_owner: bool = True
) -> Application:
    """Build the application of one listener; its owner starts and stops the services."""
    app = Application(
        title="Atlas Receiver",
        version=__version__,
        summary="Receives Atlas' e-signature webhooks, and answers what became of them.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        telemetry={"logs": False},
        lifespan=_lifespan(services) if is_owner else None,
    )
    errors.install(app)
    app.include_router(health.routes(services.probe))
    if face in {Face.EVERYTHING, Face.WEBHOOKS}:
        app.door = _door(services)
    if face in {Face.EVERYTHING, Face.API}:
        app.state.database = services.database
        app.state.tokens = _tokens(services)
        app.state.tail = services.tail
        app.state.seats = Seats(
            services.settings.api_waiters, each=services.settings.api_waiters_per_token
        )
        app.include_router(envelopes.router)
    return app


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
    return Door(services.keyring, services, on_match=services.usage.note, limits=limits)


def _tokens(services: Services) -> Tokens:
    return Tokens(
        (token.get_secret_value(), Consumer(name, frozenset(spec.scopes), spec.accounts))
        for name, spec in services.settings.api_tokens.items()
        for token in spec.tokens
    )
