"""What is owed to callbacks, and what an operator may do about it."""

from datetime import timedelta
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Query

from app.dispatch import control
from app.errors import InvalidCursor, NotFound
from app.store import sight as sights
from app.store.sight import Sight
from app.web import cursors
from app.web.api.operator_views import (
    DeliveryDetail,
    DeliveryPage,
    State,
    Why,
    shown,
    shown_whole,
)
from app.web.bounded import BoundedRoute
from app.web.deps import AtlasAccount, Consumer, Pool, consumer
from app.web.deps import Operator as Acting
from app.web.deps import Reader as Looking
from app.web.errors import problems

LIMIT = timedelta(seconds=3)
LIST = "deliveries"

router = APIRouter(prefix="/api/deliveries", tags=["deliveries"], route_class=BoundedRoute)


async def seen(
    consumer: Annotated[Consumer, Depends(consumer)],
    database: Pool,
    atlas_account: AtlasAccount = None,
) -> Sight:
    """Say what this request may see: the accounts of its token, or what it narrows them to."""
    if atlas_account is None:
        return Sight(None if consumer.accounts is None else tuple(sorted(consumer.accounts)))
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        return await sights.resolve(connection, consumer.accounts, atlas_account)


Seen = Annotated[Sight, Depends(seen)]
DeliveryId = Annotated[
    str, Path(max_length=255, description="The delivery's id, as the list shows it.")
]
CallbackName = Annotated[
    str | None, Query(max_length=255, description="Only those of this callback.")
]


def refuse_nul(what: str, value: str | None) -> None:
    """Say that there is none: no name holds a NUL, and PostgreSQL cannot be asked for one."""
    if value is not None and "\x00" in value:
        raise NotFound(f"there is no {what} with a NUL in its name")


@router.get("", summary="What is owed to callbacks", responses=problems(404))
async def list_deliveries(  # noqa: PLR0913  # each is a parameter of the request
    _: Looking,
    sight: Seen,
    database: Pool,
    *,
    state: Annotated[State | None, Query(description="Only those in this state.")] = None,
    callback: CallbackName = None,
    envelope_id: Annotated[
        str | None, Query(max_length=255, description="Only those of this envelope.")
    ] = None,
    cursor: Annotated[
        str | None, Query(max_length=500, description="The `next_cursor` of an earlier page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="At most so many.")] = 50,
) -> DeliveryPage:
    """Give deliveries, newest first.

    A filter looks at a bounded number of deliveries at once, so a page may be short, or empty,
    and still have a `next_cursor`.
    """
    refuse_nul("callback", callback)
    refuse_nul("envelope", envelope_id)
    page = await control.list_deliveries(
        database,
        state=state,
        callback=callback,
        envelope_id=envelope_id,
        sight=sight,
        limit=limit,
        cursor=_place(cursor),
        looks=1,
    )
    following = None if page.next_cursor is None else cursors.write(LIST, [page.next_cursor])
    return DeliveryPage(items=[shown(each) for each in page.items], next_cursor=following)


def _place(cursor: str | None) -> str | None:
    if cursor is None:
        return None
    [place] = cursors.read(LIST, cursor, [str])
    try:
        return str(UUID(place))
    except ValueError:
        raise InvalidCursor(
            "a cursor is what an earlier answer gave; this one was changed"
        ) from None


@router.get(
    "/{delivery_id}",
    summary="One delivery",
    responses=problems(404),
)
async def get_delivery(
    delivery_id: DeliveryId, _: Looking, sight: Seen, database: Pool
) -> DeliveryDetail:
    """Give one delivery, every attempt at it, and what operators did to it."""
    return shown_whole(await control.find(database, delivery_id, sight=sight))


@router.post(
    "/{delivery_id}/retry",
    summary="Try it again now",
    responses=problems(404, 408, 409, 413),
)
async def retry(
    delivery_id: DeliveryId, acting: Acting, sight: Seen, database: Pool
) -> DeliveryDetail:
    """Make a delivery due now, with a fresh round of attempts; its idempotency key stays.

    One that is done or discarded is refused: its event can be redispatched.
    """
    await control.retry(database, delivery_id, actor=acting.actor, sight=sight)
    return shown_whole(await control.find(database, delivery_id, sight=sight))


@router.post(
    "/{delivery_id}/discard",
    summary="Owe it no longer",
    responses=problems(404, 408, 409, 413),
)
async def discard(
    delivery_id: DeliveryId, why: Why, acting: Acting, sight: Seen, database: Pool
) -> DeliveryDetail:
    """Owe a delivery no longer: its callback will never see it, unless it is redispatched."""
    await control.discard(database, delivery_id, reason=why.reason, actor=acting.actor, sight=sight)
    return shown_whole(await control.find(database, delivery_id, sight=sight))
