"""Keys are known by their account, and an account can be given another label."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import insert, select

from app.errors import ConfigError, NotAllowed, NotFound
from app.events.signature import Key, default_label, fingerprint_of
from app.intake import Outcome
from app.intake.record import record
from app.intake.submission import Submission, understand
from app.store import callbacks, deliveries, events, keys, lookups, tallies
from app.store.callbacks import Subscription
from app.store.models import AuditRow, ExpectationRow, FeedRow, TallyRow, TermRow
from app.store.session import Database, DatabaseAddress, Limits
from app.store.sight import Sight
from app.store.tallies import Tally
from tests.factories import make_body

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
LIMIT = timedelta(seconds=10)
EVERYTHING = Sight(("new", "old", "other"))


@pytest.fixture(name="database")
async def _database(database_url: str) -> AsyncIterator[Database]:
    # None of those who come at once waits for a connection, and nobody is cut off at a lock.
    limits = Limits(lock=LIMIT, statement=LIMIT, sqlite_lock=LIMIT)
    database = Database(DatabaseAddress(database_url), size=10, limits=limits)
    yield database
    await database.close()


def make_key(name: str = "main", *, account: str = "old", label: str | None = None) -> Key:
    secret = f"atlas_live_0123456789_{name}".encode()
    return Key(account, secret, label or default_label(secret), fingerprint_of(secret))


async def register(database: Database, *known: Key) -> None:
    async with database.begin(limit=LIMIT) as connection:
        await keys.register(connection, known, at=NOW)


async def known_keys(database: Database) -> list[Any]:
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        return list(await keys.page(connection))


async def receive(
    database: Database, envelope_id: str = "env_1", *, account: str = "old", **fields: Any
) -> Submission:
    """Record one event, owed to one callback."""
    body = make_body(envelope_id=envelope_id, **fields)
    submission = understand(body, account=account, key_label="main", received_at=NOW)
    async with database.begin(limit=LIMIT) as connection:
        await record(connection, [submission], interested=lambda *_: ("crm",), now=NOW)
    return submission


async def outcome_of(database: Database, submission: Submission, *, account: str) -> Outcome:
    """Receive the same bytes again, and say what they were taken for."""
    again = understand(submission.body, account=account, key_label="main", received_at=NOW)
    async with database.begin(limit=LIMIT) as connection:
        projection = await record(connection, [again], interested=lambda *_: (), now=NOW)
    return projection.facts[0].receipt.outcome


async def rename(database: Database, old: str = "old", new: str = "new") -> dict[str, int]:
    async with database.begin(limit=LIMIT) as connection:
        return await keys.rename(connection, old, new, actor="cli:ada", at=NOW)


class TestRegister:
    async def test_writes_a_key_down_once(self, database: Database) -> None:
        await register(database, make_key())
        await register(database, make_key())

        (row,) = await known_keys(database)
        assert ("old", NOW, None) == (row.account, row.first_seen_at, row.last_match_at)

    async def test_takes_over_a_new_label_of_a_key(self, database: Database) -> None:
        await register(database, make_key())
        await register(database, make_key(label="2026"))

        assert ["2026"] == [row.label for row in await known_keys(database)]

    async def test_refuses_a_key_that_is_known_by_another_account(self, database: Database) -> None:
        await register(database, make_key())

        with pytest.raises(ConfigError, match="keys rename old new"):
            await register(database, make_key(account="new"))


class TestTouch:
    async def test_keeps_the_latest_match(self, database: Database) -> None:
        key = make_key()
        await register(database, key)

        for at in (NOW, NOW - timedelta(hours=1)):
            async with database.begin(limit=LIMIT) as connection:
                await keys.touch(connection, {key.fingerprint: at})

        assert [NOW] == [row.last_match_at for row in await known_keys(database)]


class TestRename:
    async def test_moves_everything_that_bears_the_label(self, database: Database) -> None:
        await register(database, make_key(), make_key("other", account="other"))
        submission = await receive(database)
        await receive(database, "env_2", account="other")

        moved = await rename(database)

        everything = ("identities", "envelopes", "events", "deliveries", "changes", "keys")
        assert dict.fromkeys(everything, 1) == {
            table: count for table, count in moved.items() if count
        }
        async with database.begin(limit=LIMIT, is_reading=True) as connection:
            (envelope,) = await lookups.find(connection, EVERYTHING, "env_1")
            (other,) = await lookups.find(connection, EVERYTHING, "env_2")
            event = await events.get(connection, submission.event_id)
            owed = await deliveries.page(connection, filters={}, limit=10)
        assert ("new", "other") == (envelope.account, other.account)
        assert event is not None
        assert "new" == event.account
        assert {("env_1", "new"), ("env_2", "other")} == {
            (each.envelope_id, each.account) for each in owed
        }

    async def test_moves_feed_and_callbacks(self, database: Database) -> None:
        async with database.begin(limit=LIMIT) as connection:
            await callbacks.register(connection, [Subscription("crm", ("*",), "old")])
            await connection.execute(
                FeedRow.__table__.insert().values(  # type: ignore[attr-defined]
                    position=1, kind="event", account="old", at=NOW
                )
            )

        moved = await rename(database)

        assert (1, 1) == (moved["feed"], moved["callbacks"])
        async with database.begin(limit=LIMIT, is_reading=True) as connection:
            (subscription,) = await callbacks.read(connection)
        assert "new" == subscription.account

    async def test_moves_what_is_searched_and_expected(self, database: Database) -> None:
        async with database.begin(limit=LIMIT) as connection:
            await connection.execute(
                insert(TermRow).values(term="env_1", account="old", envelope_id="env_1")
            )
            await connection.execute(
                insert(ExpectationRow).values(
                    account="old", envelope_id="env_1", consumer="crm", created_at=NOW
                )
            )

        moved = await rename(database)

        assert (1, 1) == (moved["terms"], moved["expectations"])

    async def test_adds_up_what_was_counted_for_both(self, database: Database) -> None:
        counts = {Tally(NOW, "old", "outcomes", "recorded"): 2}
        counts |= {Tally(NOW, "new", "outcomes", "recorded"): 3}
        async with database.begin(limit=LIMIT) as connection:
            await tallies.add(connection, counts)

        await rename(database)

        async with database.begin(limit=LIMIT, is_reading=True) as connection:
            rows = (await connection.execute(select(TallyRow.account, TallyRow.count))).all()
        assert {("new", 5)} == {tuple(row) for row in rows}

    async def test_lets_copies_be_recognised_under_the_new_label(self, database: Database) -> None:
        """That is what it is for: otherwise every retry would count as a new event."""
        submission = await receive(database)

        await rename(database)

        assert Outcome.DUPLICATE is await outcome_of(database, submission, account="new")

    async def test_lets_the_key_start_under_the_new_label(self, database: Database) -> None:
        await register(database, make_key())

        await rename(database)

        await register(database, make_key(account="new"))

    async def test_may_join_two_accounts_that_share_nothing(self, database: Database) -> None:
        await receive(database, "env_1", account="old")
        await receive(database, "env_2", account="new")

        await rename(database)

        async with database.begin(limit=LIMIT, is_reading=True) as connection:
            for envelope_id in ("env_1", "env_2"):
                (row,) = await lookups.find(connection, EVERYTHING, envelope_id)
                assert "new" == row.account

    async def test_refuses_to_mix_two_histories_of_one_envelope(self, database: Database) -> None:
        await receive(database, account="old")
        await receive(database, account="new", event="envelope.declined")

        with pytest.raises(NotAllowed, match="1 envelopes stand under 'old' and under 'new'"):
            await rename(database)

        assert await accounts_of(database, "env_1") == ["new", "old"]

    async def test_refuses_to_mix_two_events_of_one_identity(self, database: Database) -> None:
        await receive(database, "env_1", account="old", event_id="evt_1")
        await receive(database, "env_2", account="new", event_id="evt_1")

        with pytest.raises(NotAllowed, match="1 events stand"):
            await rename(database)

    async def test_of_an_account_that_nobody_knows_is_a_mistake(self, database: Database) -> None:
        with pytest.raises(NotFound, match="'old'"):
            await rename(database)

    async def test_to_itself_is_a_mistake(self, database: Database) -> None:
        await register(database, make_key())

        with pytest.raises(NotAllowed, match="already"):
            await rename(database, "old", "old")

    async def test_is_written_to_the_audit(self, database: Database) -> None:
        await register(database, make_key())

        await rename(database)

        table = AuditRow.__table__
        async with database.begin(limit=LIMIT, is_reading=True) as connection:
            row = (await connection.execute(table.select())).one()
        assert ("cli:ada", "account.renamed", "account:old") == (row.actor, row.action, row.subject)
        assert "new" == row.details["to"]
        assert 1 == row.details["rows"]["keys"]
        assert isinstance(row.id, UUID)

    async def test_leaves_nothing_behind_while_events_come_in(self, database: Database) -> None:
        """Who writes under the old label meanwhile does so before it, or after, not between."""
        await receive(database, "env_0")
        pending = [receive(database, f"env_{number}") for number in range(1, 8)]

        await asyncio.gather(rename(database), *pending)

        await rename_if_any(database)
        async with database.begin(limit=LIMIT, is_reading=True) as connection:
            owed = await deliveries.page(connection, filters={"account": "new"}, limit=100)
            for each in owed:
                event = await events.get(connection, each.event_id)
                assert event is not None
                assert "new" == event.account
        assert 8 == len(owed)


async def accounts_of(database: Database, envelope_id: str) -> list[str]:
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        found = await lookups.find(connection, EVERYTHING, envelope_id)
    return [row.account for row in found]


async def rename_if_any(database: Database) -> None:
    try:
        await rename(database)
    except NotFound:
        return
