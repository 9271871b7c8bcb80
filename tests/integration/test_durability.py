"""What a database promises when it says that something is committed, asked of the database."""

from app.store import durability
from tests.integration.ledger import Ledger


async def test_sqlite_keeps_every_promise(sqlite_url: str) -> None:
    ledger = Ledger(sqlite_url)

    found = await durability.inspect(ledger.database)

    await ledger.database.close()
    assert found.version.startswith("SQLite 3.")
    assert ["journal_mode", "synchronous"] == [promise.name for promise in found.promises]
    assert all(promise.is_kept for promise in found.promises)


async def test_postgresql_says_which_ones_it_breaks(postgres_url: str) -> None:
    """That of the tests does not write to its disk, so that they are fast."""
    ledger = Ledger(postgres_url)

    found = await durability.inspect(ledger.database)

    await ledger.database.close()
    kept = {promise.name: promise.is_kept for promise in found.promises}
    assert found.version.startswith("PostgreSQL ")
    assert {"fsync", "full_page_writes", "synchronous_commit"} == set(kept)
    assert kept["synchronous_commit"]


async def test_only_a_server_has_a_timeline(sqlite_url: str, postgres_url: str) -> None:
    found = []
    for url in (sqlite_url, postgres_url):
        ledger = Ledger(url)
        found.append(await durability.timeline_of(ledger.database))
        await ledger.database.close()

    assert [None, "00000001"] == found
