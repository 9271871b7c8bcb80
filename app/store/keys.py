"""API keys by their fingerprint: which account each belongs to, and when it last matched."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, and_, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from app.errors import ConfigError, NotAllowed, NotFound
from app.events.signature import Key
from app.store.ids import new_id
from app.store.models import (
    AuditRow,
    CallbackRow,
    ChangeRow,
    DeliveryRow,
    EnvelopeRow,
    EventRow,
    ExpectationRow,
    FeedRow,
    IdentityRow,
    KeyRow,
    TallyRow,
    TermRow,
)


async def register(connection: AsyncConnection, keys: Iterable[Key], *, at: datetime) -> None:
    """Write down keys that are new here.

    Raises `ConfigError` if the database knows one under another account: its events would
    be split between two accounts, and their copies no longer be recognised.
    """
    known = {row.fingerprint: row for row in await page(connection)}
    table = KeyRow.__table__
    for key in sorted(keys, key=lambda key: key.fingerprint):
        row = known.get(key.fingerprint)
        if row is None:
            await connection.execute(_insert(connection, key, at))
        elif row.account != key.account:
            message = (
                f"the key {key.label!r} stands under the account {key.account!r}, but the database "
                f"knows it by {row.account!r}: put it there in ATLAS_API_KEYS, or run "
                f"`python -m app keys rename {row.account} {key.account}`"
            )
            raise ConfigError(message)
        elif row.label != key.label:
            same = table.c.fingerprint == key.fingerprint
            await connection.execute(update(KeyRow).where(same).values(label=key.label))


def _insert(connection: AsyncConnection, key: Key, at: datetime) -> Any:
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert  # noqa: PLC0415  # one of two dialects
    else:
        from sqlalchemy.dialects.postgresql import (  # type: ignore[assignment]  # noqa: PLC0415
            insert,
        )
    row = {
        "fingerprint": key.fingerprint,
        "label": key.label,
        "account": key.account,
        "first_seen_at": at,
    }
    return insert(KeyRow).values(row).on_conflict_do_nothing()


async def touch(connection: AsyncConnection, matches: Mapping[str, datetime]) -> None:
    """Note when keys matched last; an earlier time than the known one changes nothing."""
    table = KeyRow.__table__
    for fingerprint in sorted(matches):
        at = matches[fingerprint]
        is_later = table.c.last_match_at.is_(None) | (table.c.last_match_at < at)
        await connection.execute(
            update(KeyRow)
            .where(table.c.fingerprint == fingerprint, is_later)
            .values(last_match_at=at)
        )


async def page(connection: AsyncConnection) -> Sequence[Row[Any]]:
    """Give every key that was ever registered."""
    table = KeyRow.__table__
    query = select(table).order_by(table.c.account, table.c.first_seen_at, table.c.fingerprint)
    return (await connection.execute(query)).all()


# In the order in which every writer locks them.
_LABELLED: Sequence[Any] = (
    IdentityRow.__table__,
    EnvelopeRow.__table__,
    EventRow.__table__,
    CallbackRow.__table__,
    DeliveryRow.__table__,
    FeedRow.__table__,
    ChangeRow.__table__,
    TermRow.__table__,
    ExpectationRow.__table__,
    KeyRow.__table__,
)
# What was counted for both is added up.
_MERGE = """
INSERT INTO tallies (at, account, name, label, count)
SELECT at, :new, name, label, count FROM tallies WHERE account = :old
ON CONFLICT (at, account, name, label) DO UPDATE SET count = tallies.count + excluded.count
"""


async def rename(
    connection: AsyncConnection, old: str, new: str, *, actor: str, at: datetime
) -> dict[str, int]:
    """Move everything of the account `old` to `new`; give the rows that moved, by table.

    Raises `NotFound` if nothing stands under `old`, and `NotAllowed` if `new` has an
    envelope or an event of the same identity: two histories cannot be told apart later.
    """
    if old == new:
        raise NotAllowed(f"the account is called {new!r} already")
    await _hold_writers(connection)
    await _refuse_collisions(connection, old, new)
    moved = {}
    for table in _LABELLED:
        moving = update(table).where(table.c.account == old).values(account=new)
        moved[table.name] = (await connection.execute(moving)).rowcount
    moved[TallyRow.__tablename__] = await _merge_tallies(connection, old, new)
    if not any(moved.values()):
        raise NotFound(f"nothing here belongs to an account {old!r}")
    note = {"id": new_id(), "at": at, "actor": actor, "action": "account.renamed"}
    await connection.execute(
        AuditRow.__table__.insert().values(  # type: ignore[attr-defined]
            **note, subject=f"account:{old}", details={"to": new, "rows": moved}
        )
    )
    return moved


async def _merge_tallies(connection: AsyncConnection, old: str, new: str) -> int:
    await connection.execute(text(_MERGE), {"old": old, "new": new})
    gone = delete(TallyRow).where(TallyRow.account == old)
    return (await connection.execute(gone)).rowcount


async def _hold_writers(connection: AsyncConnection) -> None:
    """Keep every writer out until the end; SQLite's only has one anyway."""
    if connection.dialect.name == "sqlite":
        return
    # Whoever wrote under the old label meanwhile would be left behind by the updates.
    names = ", ".join(table.name for table in _LABELLED)
    await connection.execute(text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))


async def _refuse_collisions(connection: AsyncConnection, old: str, new: str) -> None:
    for table, column, what in (
        (EnvelopeRow.__table__, "id", "envelopes"),
        (IdentityRow.__table__, "key", "events"),
        (ExpectationRow.__table__, "envelope_id", "expectations"),
    ):
        mine, theirs = table.alias(), table.alias()
        same = and_(mine.c[column] == theirs.c[column], theirs.c.account == new)
        query = select(func.count()).select_from(mine.join(theirs, same))
        count = (await connection.execute(query.where(mine.c.account == old))).scalar_one()
        if count:
            raise NotAllowed(
                f"{count} {what} stand under {old!r} and under {new!r}: the two accounts cannot "
                "become one; choose a label that nothing stands under"
            )
