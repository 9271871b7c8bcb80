"""Who sees what: the header Atlas-Account narrows what a token may see, and never widens it."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from app.events.signature import Key
from app.store import expectations, keys
from app.store.sight import Sight, resolve
from tests.integration.ledger import Ledger


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    """A database that knows two accounts."""
    ledger = Ledger(database_url)
    known = [Key(account, b"", "main", f"print-{account}") for account in ("beta", "acme")]
    async with ledger.transaction() as connection:
        await keys.register(connection, known, at=datetime.now(UTC))
    yield ledger
    await ledger.database.close()


@pytest.mark.parametrize(
    "allowed, meant, expected",
    [
        pytest.param(None, None, Sight(None), id="everything"),
        pytest.param(["b", "a"], None, Sight(("a", "b")), id="all-that-is-allowed"),
        pytest.param(["beta"], "beta", Sight(("beta",)), id="an-account"),
        pytest.param(None, "beta", Sight(("beta",)), id="any-account"),
        pytest.param(["beta"], "acme", Sight(()), id="a-forbidden-account"),
        pytest.param(["new"], "new", Sight(("new",)), id="an-account-without-events"),
        pytest.param(None, "ext_7", Sight(None, "7"), id="a-tenant"),
        pytest.param(["beta"], "7", Sight(("beta",), "7"), id="a-tenant-of-an-account"),
    ],
)
async def test_is_narrowed_to_what_is_meant(
    ledger: Ledger, allowed: list[str] | None, meant: str | None, expected: Sight
) -> None:
    async with ledger.reading() as connection:
        assert expected == await resolve(connection, allowed, meant)


async def test_every_account_is_known_by_its_keys(ledger: Ledger) -> None:
    async with ledger.reading() as connection:
        assert ["acme", "beta"] == await expectations.accounts(connection)
