"""What most tests of the database begin with."""

from collections.abc import AsyncIterator

import pytest

from tests.integration.ledger import Ledger


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url)
    yield ledger
    await ledger.database.close()


@pytest.fixture(name="postgres_ledger")
async def _postgres_ledger(postgres_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(postgres_url)
    yield ledger
    await ledger.database.close()
