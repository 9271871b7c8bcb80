"""Personal data taken out of rows for good. What makes a copy recognisable stays.

Identities and ids stay: they are the tombstone. A text becomes a mark that says that there was
one, so that a copy is not taken for a contradiction, and an operator sees why it is gone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, case, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.erasure import ERASED, erased
from app.events.lifecycle import STATUSES
from app.store import envelopes, feed, pruning
from app.store.callbacks import OWN_EVENTS
from app.store.dialects import now
from app.store.envelopes import EnvelopeKey, EnvelopesBusy, Held
from app.store.feed import Kind
from app.store.models import (
    AttemptRow,
    AuditRow,
    DeliveryRow,
    EnvelopeRow,
    EventRow,
    ExpectationRow,
    ShapeRow,
)

_envelopes: Any = EnvelopeRow.__table__
_events: Any = EventRow.__table__
_deliveries: Any = DeliveryRow.__table__
_attempts: Any = AttemptRow.__table__
_expectations: Any = ExpectationRow.__table__
_audit: Any = AuditRow.__table__
_shapes: Any = ShapeRow.__table__

# What stands in `details` in words of a person, or of a callback.
_TEXTS = ("reason", "error")
_CHUNK = 500


async def find(
    connection: AsyncConnection, envelope_id: str, account: str | None
) -> Sequence[tuple[str, str]]:
    """Give the keys of the envelopes with this id, in one account or in all."""
    query = select(_envelopes.c.account, _envelopes.c.id).where(_envelopes.c.id == envelope_id)
    if account is not None:
        query = query.where(_envelopes.c.account == account)
    rows = await connection.execute(query.order_by(_envelopes.c.account))
    return [(row.account, row.id) for row in rows]


async def lock(connection: AsyncConnection, key: EnvelopeKey) -> Held | None:
    """Lock an envelope; None if there is none. Raises `EnvelopesBusy` if somebody holds it."""
    held = await envelopes.lock(connection, [key])
    if not held and await find(connection, key[1], key[0]):
        raise EnvelopesBusy([key])
    return held.get(key)


async def clear_envelope(connection: AsyncConnection, held: Held) -> bool:
    """Leave of an envelope its identity, status, times and counts; False if no more is left.

    The reference to its file stays for as long as the file may be there.
    """
    if held.erased_at is not None:
        return False
    moment = (await connection.execute(select(now(connection)))).scalar_one()
    held.envelope = erased(held.envelope)
    held.version += 1
    held.updated_at, held.is_changed = moment, True
    await envelopes.write(connection, [held])
    changed = _envelopes.update().where(*_is(held.key)).values(erased_at=moment)
    await connection.execute(changed)
    account, envelope_id = held.key
    await feed.note(connection, Kind.ERASURE, account=account, envelope_id=envelope_id)
    return True


def _is(key: EnvelopeKey) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return _envelopes.c.account == key[0], _envelopes.c.id == key[1]


async def said_of(connection: AsyncConnection, key: EnvelopeKey) -> Sequence[Any]:
    """Give the events of an envelope, and those that contradict one of them."""
    columns = [_events.c[name] for name in ("id", "type", "original_id", "received_at")]
    query = select(*columns)
    of_envelope = query.where(_events.c.account == key[0], _events.c.envelope_id == key[1])
    rows = list((await connection.execute(of_envelope)).all())
    # A contradiction may name another envelope; an event of our own leads to it.
    led_to = {row.original_id for row in rows if (row.type or "").startswith(OWN_EVENTS)}
    for chunk in _chunks(led_to - {row.id for row in rows} - {None}):
        found = query.where(_events.c.id.in_(chunk), _events.c.effect == "conflict")
        rows += (await connection.execute(found)).all()
    return rows


async def clear_events(connection: AsyncConnection, ids: Iterable[UUID]) -> dict[str, int]:
    """Take the bodies and texts of some events, and of what was owed of them; say how many."""
    counts = dict.fromkeys(("events", "bodies", "deliveries", "attempts"), 0)
    for chunk in _chunks(ids):
        locked = select(_events.c.id).where(_events.c.id.in_(chunk)).order_by(_events.c.id)
        await connection.execute(locked.with_for_update())
        await pruning.digest(connection, chunk)
        counts["bodies"] += await pruning.empty(connection, chunk)
        counts["events"] += await _clear_texts(connection, chunk)
        owed = await _lock_deliveries(connection, _deliveries.c.event_id.in_(chunk))
        await _take_back(connection, owed)
        counts["deliveries"] += await clear_errors(connection, owed)
        for part in _chunks(owed):
            counts["attempts"] += await _clear_attempts(connection, part)
    return counts


async def _clear_texts(connection: AsyncConnection, ids: Sequence[UUID]) -> int:
    """Leave of the core what identifies; the paths of lost values may name what callers wrote."""
    status, reason = _events.c.core_status, _events.c.core_reason
    is_strange = status.not_in([*STATUSES, ERASED])
    is_told = reason.is_not(None) & (reason != ERASED)
    changed = _events.update().where(
        _events.c.id.in_(ids), is_strange | is_told | _events.c.degraded.is_not(None)
    )
    values = {
        "core_status": case((is_strange, ERASED), else_=status),
        "core_reason": case((reason.is_not(None), ERASED)),
        "degraded": None,
    }
    return (await connection.execute(changed.values(values))).rowcount


async def _lock_deliveries(
    connection: AsyncConnection, condition: ColumnElement[bool]
) -> list[UUID]:
    query = select(_deliveries.c.id).where(condition).order_by(_deliveries.c.id)
    return list((await connection.execute(query.with_for_update())).scalars())


async def _take_back(connection: AsyncConnection, ids: Sequence[UUID]) -> None:
    """Take deliveries that are under way from their workers: they know what is gone now.

    What comes of such an attempt no longer counts, nor does the attempt; there is another one
    once its lease is over.
    """
    for chunk in _chunks(ids):
        is_running = (_deliveries.c.id.in_(chunk), _deliveries.c.state == "running")
        values = {
            "state": "pending",
            "attempts": _deliveries.c.attempts - 1,
            "token": _deliveries.c.token + 1,
        }
        await connection.execute(_deliveries.update().where(*is_running).values(values))


async def clear_errors(connection: AsyncConnection, ids: Iterable[UUID]) -> int:
    """Take out the last errors of some deliveries: an error may quote what it failed at."""
    error = _deliveries.c.last_error
    cleared = 0
    for chunk in _chunks(ids):
        changed = _deliveries.update().where(_deliveries.c.id.in_(chunk), error != ERASED)
        cleared += (await connection.execute(changed.values(last_error=ERASED))).rowcount
    return cleared


async def _clear_attempts(connection: AsyncConnection, ids: Sequence[UUID]) -> int:
    changed = _attempts.update().where(_attempts.c.delivery_id.in_(ids), _is_quoting())
    return (await connection.execute(changed.values(error=ERASED))).rowcount


def _is_quoting() -> ColumnElement[bool]:
    is_quoting: ColumnElement[bool] = _attempts.c.error != ERASED
    return is_quoting


async def clear_attempt(connection: AsyncConnection, delivery_id: UUID, token: int) -> int:
    """Take out the error of one attempt."""
    is_it = (_attempts.c.delivery_id == delivery_id, _attempts.c.token == token)
    changed = _attempts.update().where(*is_it, _is_quoting())
    return (await connection.execute(changed.values(error=ERASED))).rowcount


async def drop_expectation(connection: AsyncConnection, key: EnvelopeKey) -> int:
    """Expect an envelope no longer."""
    is_it = (_expectations.c.account == key[0], _expectations.c.envelope_id == key[1])
    return (await connection.execute(_expectations.delete().where(*is_it))).rowcount


async def clear_acts(
    connection: AsyncConnection, key: EnvelopeKey, event_ids: Sequence[UUID]
) -> int:
    """Take out what operators wrote when they did something to an envelope or its events."""
    subjects = [f"envelope:{key[1]}"]
    for chunk in _chunks(event_ids):
        subjects += [f"event:{id_}" for id_ in chunk]
        owed = select(_deliveries.c.id).where(_deliveries.c.event_id.in_(chunk))
        subjects += [f"delivery:{id_}" for id_ in (await connection.execute(owed)).scalars()]
    cleared = 0
    for named in _chunks(subjects):
        acts = select(_audit.c.id, _audit.c.details).where(_audit.c.subject.in_(named))
        for act in (await connection.execute(acts)).all():
            cleared += await _clear_act(connection, act, key[0])
    return cleared


async def _clear_act(connection: AsyncConnection, act: Any, account: str) -> int:
    details: Mapping[str, Any] = act.details or {}
    texts = {name for name in _TEXTS if details.get(name) not in {None, ERASED}}
    if not texts or details.get("account", account) != account:
        return 0
    await change_act(connection, act.id, {**details, **dict.fromkeys(texts, ERASED)})
    return 1


async def acts(connection: AsyncConnection, ids: Sequence[UUID]) -> Sequence[Any]:
    """Give what operators did, by id."""
    query = select(_audit.c.id, _audit.c.details).where(_audit.c.id.in_(ids))
    return (await connection.execute(query)).all()


async def change_act(connection: AsyncConnection, act_id: UUID, details: Mapping[str, Any]) -> None:
    """Write down the details of an act anew."""
    changed = _audit.update().where(_audit.c.id == act_id).values(details=dict(details))
    await connection.execute(changed)


async def drop_shape(connection: AsyncConnection, shape: Sequence[str]) -> int:
    """Forget a field or a word that was seen."""
    columns = (_shapes.c.type, _shapes.c.kind, _shapes.c.path)
    is_it = [column == value for column, value in zip(columns, shape, strict=True)]
    return (await connection.execute(_shapes.delete().where(*is_it))).rowcount


async def archived(connection: AsyncConnection, key: EnvelopeKey) -> str | None:
    """Give the name of the file that an envelope refers to."""
    query = select(_envelopes.c.archive_name).where(*_is(key))
    name: str | None = (await connection.execute(query)).scalar()
    return name


async def forget_archive(connection: AsyncConnection, key: EnvelopeKey) -> None:
    """Write down that the file of an erased envelope is gone."""
    changed = _envelopes.update().where(*_is(key), _envelopes.c.archive_name.is_not(None))
    values = dict.fromkeys(("archived_at", "archive_name", "archive_sha256", "archive_bytes"))
    await connection.execute(changed.values(**values, version=_envelopes.c.version + 1))


def _chunks(items: Iterable[Any]) -> list[list[Any]]:
    """Cut a list so that a statement takes each piece; one order for all who lock."""
    ordered = sorted(items)
    return [ordered[start : start + _CHUNK] for start in range(0, len(ordered), _CHUNK)]
