"""The callbacks that processes have registered: looked at, paused, resumed."""

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path

from app.dispatch import control
from app.store.deliveries import EVERYTHING
from app.store.session import Database
from app.web.api.deliveries import Seen, refuse_nul
from app.web.api.operator_views import CallbackChange, CallbackList, Why, shown_callback
from app.web.bounded import BoundedRoute
from app.web.deps import Consumer, Operator, Pool, Reader
from app.web.errors import problems

router = APIRouter(prefix="/api/callbacks", tags=["callbacks"], route_class=BoundedRoute)


async def acting(consumer: Operator) -> Consumer:
    """Require a token for all accounts: a callback is shared by them."""
    if consumer.accounts is not None:
        raise HTTPException(
            403,
            "A callback is shared by all accounts: to pause or resume one wants a token that is "
            "not restricted to some.",
        )
    return consumer


Acting = Annotated[Consumer, Depends(acting)]
Name = Annotated[str, Path(max_length=255, description="The callback's name, percent-encoded.")]


@router.get("", summary="Who is told", responses=problems())
async def list_callbacks(_: Reader, sight: Seen, database: Pool) -> CallbackList:
    """Give every callback that was ever registered, with what is owed to it and seen by you."""
    found = await control.list_callbacks(database, sight=sight)
    return CallbackList(items=[shown_callback(status) for status in found])


@router.post(
    "/{name:path}/pause",
    summary="Give a callback nothing more",
    responses=problems(404, 408, 413),
)
async def pause(name: Name, why: Why, consumer: Acting, database: Pool) -> CallbackChange:
    """Deliver nothing more to a callback: what is owed to it gathers, and nothing is lost."""
    refuse_nul("callback", name)
    is_changed = await control.pause(database, name, reason=why.reason, actor=consumer.actor)
    return await _shown(database, name, is_changed=is_changed)


@router.post(
    "/{name:path}/resume",
    summary="Give a callback what is owed to it",
    responses=problems(404, 408, 413),
)
async def resume(name: Name, consumer: Acting, database: Pool) -> CallbackChange:
    """Deliver to a callback again, also if its breaker stopped that."""
    refuse_nul("callback", name)
    is_changed = await control.resume(database, name, actor=consumer.actor)
    return await _shown(database, name, is_changed=is_changed)


async def _shown(database: Database, name: str, *, is_changed: bool) -> CallbackChange:
    listed = await control.list_callbacks(database, sight=EVERYTHING)
    found = [each for each in listed if each.registered.subscription.name == name]
    if not found:
        raise HTTPException(404, f"There is no callback {name!r} any more.")
    return CallbackChange(is_changed=is_changed, callback=shown_callback(found[0]))
