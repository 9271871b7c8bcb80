"""Tell whether the process is alive, and whether to send it requests."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import APIRouter
from fastapi.responses import JSONResponse

# Gives, for each thing that must work, `ok` or a word; the text belongs into the log.
Probe = Callable[[], Awaitable[dict[str, str]]]

MAX_AGE: Final = 1.0


class Recent:
    """Asks for everybody at once, and not more than once a second: anybody may ask."""

    def __init__(self, probe: Probe, *, max_age: float = MAX_AGE) -> None:
        self._probe = probe
        self._max_age = max_age
        self._asking: asyncio.Task[dict[str, str]] | None = None
        self._answered_at = 0.0

    async def __call__(self) -> dict[str, str]:
        """Give the answer under way, or one that is not old."""
        if self._asking is None or (self._asking.done() and self._is_old(self._asking)):
            self._asking = asyncio.create_task(self._ask())
        # One who stops waiting must not take the answer from the others.
        return await asyncio.shield(self._asking)

    def _is_old(self, asked: asyncio.Task[dict[str, str]]) -> bool:
        if asked.cancelled() or asked.exception() is not None:
            return True
        return asyncio.get_running_loop().time() - self._answered_at >= self._max_age

    async def _ask(self) -> dict[str, str]:
        answer = await self._probe()
        self._answered_at = asyncio.get_running_loop().time()
        return answer


def routes(probe: Probe) -> APIRouter:
    """Build `/livez` and `/readyz`; neither wants a token."""
    router = APIRouter(tags=["health"])
    recent = Recent(probe)

    @router.get("/livez", summary="The process runs; no database is asked")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz", summary="Requests may be sent here", responses={503: {}})
    async def readyz() -> JSONResponse:
        checks = await recent()
        is_ready = all(word.startswith("ok") for word in checks.values())
        status = "ready" if is_ready else "not ready"
        return JSONResponse({"status": status, "checks": checks}, 200 if is_ready else 503)

    return router
