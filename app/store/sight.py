"""What a consumer may see: some accounts, or one tenant in them."""

from collections.abc import Iterable

from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.frozen import frozen
from app.store.dialects import is_postgresql
from app.store.session import fetch


@frozen
class Sight:
    """The accounts that are seen (None: all of them), and the one tenant, if it is one."""

    accounts: tuple[str, ...] | None
    tenant: str | None = None


_KNOWN = "SELECT 1 FROM keys WHERE account = {account} LIMIT 1"


async def resolve(
    connection: AsyncConnection, accounts: Iterable[str] | None, meant: str | None
) -> Sight:
    """Narrow what may be seen to what is `meant`, as the header Atlas-Account says it.

    That is the label of an account, or else a tenant, with or without `ext_`. An account
    that may not be seen is as one that does not exist.
    """
    allowed = None if accounts is None else tuple(sorted(accounts))
    if meant is None:
        return Sight(allowed)
    if allowed is not None and meant in allowed:
        return Sight((meant,))
    if await _is_account(connection, meant):
        return Sight((meant,) if allowed is None else ())
    return Sight(allowed, meant.removeprefix("ext_"))


async def _is_account(connection: AsyncConnection, label: str) -> bool:
    mark = "$1::text" if is_postgresql(connection) else "?"
    return bool(await fetch(connection, _KNOWN.format(account=mark), (label,)))
