"""One event: what was said, the bytes as they came, and replay with intent."""

import asyncio
import json
from datetime import timedelta
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Body, Path, Query, Response

from app.dispatch import replay
from app.dispatch.control import as_id
from app.errors import Gone, NotFound
from app.events.redaction import Json, redact
from app.intake import reproject as applying
from app.store import deliveries, events, lookups
from app.store.session import Connection, Database
from app.store.sight import Sight, resolve
from app.web.api.event_views import (
    EventView,
    RedeliveryView,
    Redispatch,
    RedispatchView,
    ReprojectView,
)
from app.web.bounded import BoundedRoute
from app.web.deps import AtlasAccount, Consumer, Operator, Pool, RawReader, Reader
from app.web.errors import problems

LIMIT = timedelta(seconds=3)
# A body above this is read beside the loop, which others wait for.
_LARGE = 64 * 1024

router = APIRouter(prefix="/api/events", tags=["events"], route_class=BoundedRoute)

EventId = Annotated[str, Path(max_length=64, description="Ours, as the door and the feed tell it.")]


@router.get("/{event_id}", summary="One event", responses=problems(404))
async def get_event(
    event_id: EventId, consumer: Reader, database: Pool, *, atlas_account: AtlasAccount = None
) -> EventView:
    """Give everything that is known of one event, and its body without secrets."""
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        row = await _find(connection, event_id, consumer=consumer, account=atlas_account)
        body = await events.read_body(connection, row.id)
    columns = set(EventView.model_fields) - {"event_id", "data"}
    values = {name: getattr(row, name) for name in columns}
    return EventView(event_id=row.id, data=await _readable(body), **values)


async def _find(
    connection: Connection, event_id: str, *, consumer: Consumer, account: str | None
) -> Any:
    """Find an event; what the consumer may not see is not there."""
    wanted = as_id(event_id, "an event")
    sight = await resolve(connection, consumer.accounts, account)
    row = await events.get(connection, wanted)
    if row is None or not await _is_seen(connection, row, sight):
        raise NotFound(f"there is no event {wanted} here")
    return row


async def _is_seen(connection: Connection, row: Any, sight: Sight) -> bool:
    if sight.accounts is not None and row.account not in sight.accounts:
        return False
    if sight.tenant is None:
        return True
    if row.envelope_id is None:
        return False
    theirs = Sight((row.account,), sight.tenant)
    return bool(await lookups.find_progress(connection, theirs, row.envelope_id))


async def _readable(body: bytes | None) -> Json:
    if body is None:
        return None
    if len(body) > _LARGE:
        return await asyncio.to_thread(_without_secrets, body)
    return _without_secrets(body)


def _without_secrets(body: bytes) -> Json:
    """Read a body as JSON, as far as it is, and leave out what nobody may read."""
    try:
        shown = redact(json.loads(body, parse_constant=_refuse))
        text = json.dumps(shown, ensure_ascii=False, allow_nan=False)
        # Half of a character can be written in JSON, but not sent.
        return json.loads(text.encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


@router.get(
    "/{event_id}/body",
    response_class=Response,
    summary="Its body, as received",
    responses={
        200: {
            "description": "The bytes, unaltered.",
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        },
        **problems(404, 410),
    },
)
async def get_body(
    event_id: EventId, consumer: RawReader, database: Pool, *, atlas_account: AtlasAccount = None
) -> Response:
    """Give the raw bytes that the sender signed; the audit notes who has read them.

    They may hold links that sign a document for whoever follows them. So this wants the scope
    `raw`, and no other.
    """
    async with database.begin(limit=LIMIT) as connection:
        row = await _find(connection, event_id, consumer=consumer, account=atlas_account)
        body = await events.read_body(connection, row.id)
        if body is None:
            raise Gone(f"the bytes of event {row.id} are no longer kept: pruned, or erased")
        await deliveries.audit(
            connection,
            actor=consumer.actor,
            action="body.read",
            subject=f"event:{row.id}",
            details={"bytes": len(body)},
        )
    headers = {"Content-Disposition": f'attachment; filename="{row.id}.bin"'}
    return Response(body, headers=headers, media_type="application/octet-stream")


@router.post(
    "/{event_id}/redispatch",
    summary="Owe it to callbacks again",
    responses=problems(404, 408, 409, 413),
)
async def redispatch(
    event_id: EventId,
    consumer: Operator,
    database: Pool,
    *,
    to: Annotated[Redispatch | None, Body()] = None,
    atlas_account: AtlasAccount = None,
) -> RedispatchView:
    """Owe an event once more to all callbacks that ask for it now, or to some of them.

    Each gets a new delivery with an idempotency key of its own, whatever became of those
    before. For all of them or, if one does not ask for it, for none.
    """
    row = await _see(database, event_id, consumer=consumer, account=atlas_account)
    accounts = consumer.accounts
    made = await replay.redispatch(
        database,
        row.id,
        actor=consumer.actor,
        to=None if to is None else to.callbacks,
        sight=Sight(None if accounts is None else tuple(accounts)),
    )
    views = [RedeliveryView.model_validate(each) for each in made]
    return RedispatchView(event_id=row.id, deliveries=views)


async def _see(
    database: Database, event_id: str, *, consumer: Consumer, account: str | None
) -> Any:
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        return await _find(connection, event_id, consumer=consumer, account=account)


@router.post(
    "/{event_id}/reproject",
    summary="Apply it again",
    responses=problems(404, 408, 409, 413),
)
async def reproject(
    event_id: EventId,
    consumer: Operator,
    database: Pool,
    *,
    accept: Annotated[
        bool,
        Query(description="Take the word of a conflict; the status of its envelope may go down."),
    ] = False,
    atlas_account: AtlasAccount = None,
) -> ReprojectView:
    """Read the bytes of an event anew, and apply what they say to its envelope.

    For one in quarantine, after an update that understands it; for one of which values were
    lost; and with `accept` for one that contradicts another.
    """
    row = await _see(database, event_id, consumer=consumer, account=atlas_account)
    done = await applying.reproject(database, row.id, actor=consumer.actor, is_accepted=accept)
    return ReprojectView(
        event_id=done.event_id,
        result=done.result,
        effect=done.effect,
        was=done.was,
        type=done.type,
        envelope_id=done.envelope_id,
        original_id=done.original,
        owed=list(done.owed),
    )
