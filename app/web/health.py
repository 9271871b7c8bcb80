"""Tell whether the process is alive, and whether to send it requests."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from fastapi.responses import JSONResponse

# Gives, for each thing that must work, a word when it does not.
Probe = Callable[[], Awaitable[dict[str, str]]]


def routes(probe: Probe) -> APIRouter:
    """Build `/livez` and `/readyz`; neither wants a token."""
    router = APIRouter(tags=["health"])

    @router.get("/livez", summary="The process runs; no database is asked")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz", summary="Requests may be sent here", responses={503: {}})
    async def readyz() -> JSONResponse:
        checks = await probe()
        is_ready = all(word.startswith("ok") for word in checks.values())
        status = "ready" if is_ready else "not ready"
        return JSONResponse({"status": status, "checks": checks}, 200 if is_ready else 503)

    return router
