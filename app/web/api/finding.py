"""The one envelope that a request means, among those that its token may see."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Annotated, Any

from fastapi import HTTPException, Path

from app.errors import NotAllowed, NotFound
from app.store import lookups, sight
from app.store.session import Database
from app.web.deps import Consumer

READ_LIMIT = timedelta(seconds=3)
LONGEST_ID = 255
# Which envelope is meant depends on these, too.
VARY = "Authorization, Atlas-Account"

EnvelopeId = Annotated[
    str,
    Path(min_length=1, max_length=LONGEST_ID, description="As Atlas gave it; a `/` is `%2F`."),
]


async def find(
    database: Database, consumer: Consumer, envelope_id: str, account: str | None
) -> Any:
    """Give the one row that is meant; what the consumer may not see is not there.

    Raises `NotFound`, and `NotAllowed` if more than one account has it.
    """
    refuse_unusable(envelope_id, account)
    async with database.begin(limit=READ_LIMIT, is_reading=True, is_split=True) as connection:
        seen = await sight.resolve(connection, consumer.accounts, account)
        rows = await lookups.find(connection, seen, envelope_id)
    return the_one(rows, envelope_id)


def refuse_unusable(envelope_id: str, account: str | None) -> None:
    """Refuse what no envelope can have: what is too long, and what cannot even be asked for."""
    if max(len(envelope_id), len(account or "")) > LONGEST_ID:
        raise HTTPException(422, f"An id or account has at most {LONGEST_ID} characters.")
    if "\x00" in envelope_id or "\x00" in (account or ""):
        raise NotFound("There is no envelope with a NUL in its id or account.")


def the_one(rows: Sequence[Any], envelope_id: str) -> Any:
    """Give the only row. Raises `NotFound`, or `NotAllowed` with the accounts to choose from."""
    if not rows:
        raise NotFound(f"There is no envelope {envelope_id} here.")
    if len(rows) > 1:
        raise NotAllowed(ambiguous(row.account for row in rows))
    return rows[0]


def ambiguous(accounts: Iterable[str]) -> str:
    """Say between which accounts the header Atlas-Account has to choose."""
    names = " and ".join(repr(account) for account in accounts)
    return f"The accounts {names} both have this envelope: say which with the header Atlas-Account."
