"""The built-in `archive`: a real server, real files, and the row of the envelope."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import select

from app.atlas.client import ApiKey, Atlas
from app.callbacks import Callbacks, Event
from app.callbacks.archive import Archiver, callbacks
from app.callbacks.shelf import Bucket, open_shelf
from app.callbacks.testing import Dead, Done, Failed, change_event, deliver, make_event
from app.dispatch.attempt import Verdict
from app.settings import Settings
from app.store import feed
from app.store.archives import Archive, record_archive
from app.store.models import EnvelopeRow
from app.store.session import DatabaseAddress
from app.store.sessions import AuthorSessions
from app.upkeep.sequencer import Sequencer
from tests.atlas_stand_in import (
    KEY,
    LINK_TOKEN,
    PDF,
    Asked,
    AtlasStandIn,
    Reply,
    atlas_stand_in,
    document,
    said,
)
from tests.integration.ledger import Ledger, until

MAX_BYTES = 100_000
OTHER_PDF = PDF.replace(b"1.7", b"2.0")
HOSTILE = ["../../../etc/x", "/etc/x", "a\x00b", "x" * 300, "a\nb", "CON", "nul.pdf", "..", "é/\\"]


@pytest.fixture(name="stand_in")
async def _stand_in() -> AsyncIterator[AtlasStandIn]:
    async with atlas_stand_in() as stand_in:
        yield stand_in


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    return tmp_path / "archive"


@pytest.fixture(name="settings")
def _settings(stand_in: AtlasStandIn, root: Path) -> Settings:
    return _read(
        atlas_api_key=KEY,
        atlas_base_url=stand_in.base_url,
        archive_url=str(root),
        archive_max_bytes=MAX_BYTES,
        forward_allow="127.0.0.1",
    )


@pytest.fixture(name="archive")
def _archive(settings: Settings) -> Callbacks:
    return callbacks(settings)


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url)
    await ledger.envelope()
    yield ledger
    await ledger.database.close()


@pytest.fixture(name="sessions")
async def _sessions(database_url: str) -> AsyncIterator[AuthorSessions]:
    sessions = AuthorSessions(DatabaseAddress(database_url))
    yield sessions
    await sessions.close()


async def row_of(ledger: Ledger, envelope_id: str = "env_1") -> Any:
    async with ledger.transaction() as connection:
        query = select(EnvelopeRow.__table__).where(EnvelopeRow.id == envelope_id)
        return (await connection.execute(query)).one()


async def run(archive: Callbacks, event: Event, session: Any = None) -> Verdict:
    return (await deliver(archive, event, session=session))["archive"]


async def text_of(archive: Callbacks, event: Event, kind: type[Failed | Dead]) -> str:
    """What is written down of a call that fails before it uses its session."""
    verdict = await run(archive, event)
    assert isinstance(verdict, kind)
    return verdict.error


def files_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if not path.is_dir()]


def archived(event: Event, **columns: Any) -> Event:
    """The event as it is after an earlier delivery."""
    assert event.envelope is not None
    return change_event(event, envelope=replace(event.envelope, **columns))


class TestKeeping:
    async def test_the_document_and_where_it_is(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        ledger: Ledger,
        sessions: AuthorSessions,
        root: Path,
    ) -> None:
        stand_in.sign("env_1")
        before = datetime.now(UTC)

        async with sessions.begin() as session:
            verdict = await run(archive, make_event(), session)

        row = await row_of(ledger)
        assert Done(is_committed=True) == verdict
        assert (root / row.archive_name).read_bytes() == PDF
        assert (sha256(PDF).hexdigest(), len(PDF)) == (row.archive_sha256, row.archive_bytes)
        assert before <= row.archived_at == row.updated_at <= datetime.now(UTC)
        assert 2 == row.version

    async def test_twice_is_once(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        ledger: Ledger,
        sessions: AuthorSessions,
        root: Path,
    ) -> None:
        stand_in.sign("env_1")
        event = make_event()

        async with sessions.begin() as session:
            await run(archive, event, session)
        first = await row_of(ledger)
        async with sessions.begin() as session:
            await run(archive, replace(event, attempt=2), session)

        assert first == await row_of(ledger)
        assert 1 == len(files_in(root))

    async def test_after_a_crash_before_the_commit_the_same_file_is_recorded(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        ledger: Ledger,
        sessions: AuthorSessions,
        root: Path,
    ) -> None:
        stand_in.sign("env_1")
        event = make_event()

        with pytest.raises(ZeroDivisionError):
            await _run_and_crash(archive, event, sessions)
        assert (await row_of(ledger)).archive_name is None
        async with sessions.begin() as session:
            await run(archive, event, session)

        (path,) = files_in(root)
        assert str(path.relative_to(root)) == (await row_of(ledger)).archive_name

    async def test_nothing_slow_happens_in_the_transaction(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        ledger: Ledger,
        sessions: AuthorSessions,
    ) -> None:
        stand_in.sign("env_1")
        states: list[bool] = []

        async with sessions.begin() as session:
            stand_in.on_asked = lambda _: states.append(session.in_transaction())
            await run(archive, make_event(), session)

        assert [False, False] == states
        assert (await row_of(ledger)).archived_at is not None

    async def test_a_bucket_does_as_well(
        self, stand_in: AtlasStandIn, ledger: Ledger, sessions: AuthorSessions
    ) -> None:
        """As an author makes it, in code."""
        bucket = Bucket(pytest.importorskip("obstore.store").MemoryStore())
        archiver = Archiver(
            atlas=Atlas(stand_in.base_url, allow=["127.0.0.1"]),
            shelf=bucket,
            keys={"default": [ApiKey(KEY)]},
            max_bytes=MAX_BYTES,
            schema="atlas_receiver",
        )
        stand_in.sign("env_1")

        async with sessions.begin() as session:
            await archiver(make_event(), session)

        name = (await row_of(ledger)).archive_name
        assert b"".join([piece async for piece in bucket.read(name)]) == PDF

    async def test_tests_are_kept_like_others(
        self, archive: Callbacks, stand_in: AtlasStandIn, ledger: Ledger, sessions: AuthorSessions
    ) -> None:
        stand_in.sign("env_1")

        async with sessions.begin() as session:
            await run(archive, make_event(data={"is_test": True}), session)

        assert (await row_of(ledger)).archive_name is not None

    async def test_through_the_dispatcher(
        self, archive: Callbacks, stand_in: AtlasStandIn, ledger: Ledger, root: Path
    ) -> None:
        stand_in.sign("env_1")
        await ledger.register("archive", patterns=["envelope.signed"])
        await ledger.owe("archive")

        with ledger.dispatching(archive):
            await until(lambda: _is_done(ledger))

        row = await row_of(ledger)
        assert (root / row.archive_name).read_bytes() == PDF
        assert 2 == row.version

    async def test_says_so_in_one_line_without_a_secret(
        self, archive: Callbacks, stand_in: AtlasStandIn, ledger: Ledger, sessions: AuthorSessions
    ) -> None:
        stand_in.sign("env_1")
        event = make_event(data={"fields_status": "ready"})

        async with sessions.begin() as session:
            with structlog.testing.capture_logs() as lines:
                await run(archive, event, session)

        (line,) = lines
        assert ("document.archived", "env_1", "ready", "envelope.signed") == (
            line["event"],
            line["envelope_id"],
            line["fields_status"],
            line["event_type"],
        )
        assert LINK_TOKEN not in str(line)
        assert KEY not in str(line)
        assert (await row_of(ledger)).archive_name == line["name"]


async def _run_and_crash(archive: Callbacks, event: Event, sessions: AuthorSessions) -> None:
    async with sessions.begin() as session:
        await run(archive, event, session)
        raise ZeroDivisionError


async def _is_done(ledger: Ledger) -> bool:
    return ["done"] == await ledger.states()


class TestNames:
    @pytest.mark.parametrize("envelope_id", HOSTILE)
    async def test_hold_nothing_that_the_sender_wrote(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path, envelope_id: str
    ) -> None:
        stand_in.sign(envelope_id)
        event = make_event(envelope_id="env_1", data={"metadata": {"external_id": envelope_id}})

        # Its end needs a session, which this one lacks: the file is there by then.
        await run(archive, replace(event, envelope_id=envelope_id))

        paths = files_in(root)
        if envelope_id != "..":
            (path,) = paths
            assert path.read_bytes() == PDF
            assert envelope_id not in str(path.relative_to(root))
        assert not [path for path in files_in(root.parent) if root not in path.parents]

    async def test_tell_envelopes_and_accounts_apart(
        self, settings: Settings, stand_in: AtlasStandIn, root: Path
    ) -> None:
        archive = callbacks(_with_accounts(settings, acme=[KEY], beta=[KEY + "2"]))
        stand_in.keys = {KEY, KEY + "2"}
        for envelope_id in ("env_1", "env_2"):
            stand_in.sign(envelope_id)

        for account in ("acme", "beta"):
            for envelope_id in ("env_1", "env_2"):
                await run(archive, make_event(envelope_id=envelope_id, account=account))

        assert 4 == len(files_in(root))


class TestOtherContent:
    """A signed document never changes; if it does, nothing is lost and somebody hears of it."""

    async def test_both_files_are_kept_and_the_newer_is_named(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        ledger: Ledger,
        sessions: AuthorSessions,
        root: Path,
    ) -> None:
        event = make_event()
        stand_in.sign("env_1")
        async with sessions.begin() as session:
            await run(archive, event, session)
        first = await row_of(ledger)
        stand_in.sign("env_1", OTHER_PDF)
        again = archived(
            event, archive_name=first.archive_name, archive_sha256=first.archive_sha256
        )

        async with sessions.begin() as session:
            with structlog.testing.capture_logs() as lines:
                await run(archive, again, session)

        second = await row_of(ledger)
        assert (root / first.archive_name).read_bytes() == PDF
        assert (root / second.archive_name).read_bytes() == OTHER_PDF
        assert 3 == second.version
        assert ("warning", "document.replaced", first.archive_name) == (
            lines[0]["log_level"],
            lines[0]["event"],
            lines[0]["before"],
        )

    async def test_a_replay_puts_a_lost_file_back(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        ledger: Ledger,
        sessions: AuthorSessions,
        root: Path,
    ) -> None:
        event = make_event()
        stand_in.sign("env_1")
        async with sessions.begin() as session:
            await run(archive, event, session)
        row = await row_of(ledger)
        (root / row.archive_name).unlink()
        replay = archived(
            replace(event, received_at=event.received_at + timedelta(days=90)),
            archive_name=row.archive_name,
            archive_sha256=row.archive_sha256,
        )

        async with sessions.begin() as session:
            await run(archive, replay, session)

        assert (root / row.archive_name).read_bytes() == PDF
        assert row == await row_of(ledger)

    async def test_an_erased_envelope_is_not_fetched_again(
        self, archive: Callbacks, stand_in: AtlasStandIn
    ) -> None:
        stand_in.sign("env_1")
        erased = archived(make_event(), erased_at=datetime.now(UTC))

        assert Done(is_committed=True) == await run(archive, erased)
        assert [] == stand_in.asked

    async def test_of_one_erased_meanwhile_nothing_is_left(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        ledger: Ledger,
        sessions: AuthorSessions,
        root: Path,
    ) -> None:
        """The file was removed before it was there; so whoever put it there takes it away."""
        stand_in.sign("env_1")
        await ledger.change("UPDATE envelopes SET erased_at = first_seen_at")

        async with sessions.begin() as session:
            verdict = await run(archive, make_event(), session)

        assert Done(is_committed=True) == verdict
        assert [] == files_in(root)
        assert (await row_of(ledger)).archive_name is None

    async def test_what_an_attempt_left_that_died_is_removed(
        self,
        archive: Callbacks,
        stand_in: AtlasStandIn,
        sessions: AuthorSessions,
        root: Path,
        ledger: Ledger,
    ) -> None:
        stand_in.sign("env_1")
        event = make_event()
        async with sessions.begin() as session:
            await run(archive, event, session)
        assert 1 == len(files_in(root))

        assert Done(is_committed=True) == await run(
            archive, archived(event, erased_at=datetime.now(UTC))
        )

        assert [] == files_in(root)
        assert (await row_of(ledger)).archive_name is not None


class TestNotYet:
    @pytest.mark.parametrize(
        "fields",
        [{"signed_pdf_url": None}, {"status": "pending"}, {"signed_pdf_url": ""}],
        ids=str,
    )
    async def test_without_a_link_it_is_tried_later(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path, fields: dict[str, Any]
    ) -> None:
        stand_in.sign("env_1", **fields)

        assert "no link" in await text_of(archive, make_event(), Failed)
        assert [] == files_in(root)

    async def test_each_attempt_asks_for_a_fresh_link(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path
    ) -> None:
        stand_in.sign("env_1")
        stand_in.documents["/documents/0"] = said({}, status=403)
        assert "403" in await text_of(archive, make_event(), Failed)

        stand_in.sign("env_1")
        await run(archive, make_event())

        assert 1 == len(files_in(root))

    @pytest.mark.parametrize("status", [429, 503])
    async def test_it_waits_as_long_as_atlas_asks_for(
        self, archive: Callbacks, stand_in: AtlasStandIn, status: int
    ) -> None:
        stand_in.replies = [said({}, status=status, **{"Retry-After": "90"})]

        verdict = await run(archive, make_event())

        assert isinstance(verdict, Failed)
        assert timedelta(seconds=90) == verdict.after


class TestUnfit:
    @pytest.mark.parametrize(
        "reply",
        [
            pytest.param(document(b"<html>please log in</html>"), id="a page"),
            pytest.param(document(b""), id="nothing"),
            pytest.param(document(PDF[:-8]), id="cut off by the sender"),
            pytest.param(document(b"PK\x03\x04" + b"\0" * 9000), id="an archive"),
        ],
    )
    async def test_what_is_no_pdf_is_given_up_and_not_kept(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path, reply: Reply
    ) -> None:
        stand_in.sign("env_1")
        stand_in.documents["/documents/0"] = reply

        text = await text_of(archive, make_event(), Dead)

        assert "not a complete PDF" in text
        assert LINK_TOKEN not in text
        assert [] == files_in(root)

    @pytest.mark.parametrize(
        "reply",
        [
            pytest.param(document(PDF + b" " * MAX_BYTES), id="declared"),
            pytest.param(Reply(PDF + b" " * MAX_BYTES), id="not declared"),
            pytest.param(Reply(PDF, length=10**15), id="a petabyte, declared"),
        ],
    )
    async def test_what_is_too_large_is_given_up_and_not_kept(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path, reply: Reply
    ) -> None:
        stand_in.sign("env_1")
        stand_in.documents["/documents/0"] = reply

        assert "ARCHIVE_MAX_BYTES" in await text_of(archive, make_event(), Dead)
        assert [] == files_in(root)

    async def test_an_exact_fit_is_kept(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path
    ) -> None:
        middle = b" " * (MAX_BYTES - len(PDF))
        stand_in.sign("env_1", PDF.replace(b"trailer", middle + b"trailer"))

        await run(archive, make_event())

        (path,) = files_in(root)
        assert MAX_BYTES == path.stat().st_size

    @pytest.mark.parametrize(
        "reply",
        [
            pytest.param(Reply(PDF, length=len(PDF) + 1), id="cut off on the way"),
            pytest.param(Reply(PDF, headers={"Content-Encoding": "gzip"}), id="packed"),
            pytest.param(said({}, status=302, Location="http://10.0.0.1/"), id="redirect"),
        ],
    )
    async def test_a_broken_download_is_tried_again_and_not_kept(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path, reply: Reply
    ) -> None:
        stand_in.sign("env_1")
        stand_in.documents["/documents/0"] = reply

        assert LINK_TOKEN not in await text_of(archive, make_event(), Failed)
        assert [] == files_in(root)

    async def test_a_link_into_a_private_network_names_the_setting(
        self, archive: Callbacks, stand_in: AtlasStandIn
    ) -> None:
        stand_in.sign("env_1", signed_pdf_url=f"https://10.0.0.1/x?token={LINK_TOKEN}")

        text = await text_of(archive, make_event(), Failed)

        assert "FORWARD_ALLOW" in text
        assert LINK_TOKEN not in text

    async def test_an_event_about_no_envelope_is_given_up(self, archive: Callbacks) -> None:
        assert "no envelope" in await text_of(
            archive, replace(make_event(), envelope_id=None), Dead
        )

    async def test_a_directory_that_cannot_be_written_is_tried_again(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path
    ) -> None:
        stand_in.sign("env_1")
        root.write_bytes(b"")  # noqa: ASYNC240  # a file where the directory should be

        assert "ARCHIVE_URL" in await text_of(archive, make_event(), Failed)


class TestKeys:
    async def test_the_next_one_is_tried_if_atlas_refuses_one(
        self, settings: Settings, stand_in: AtlasStandIn, root: Path
    ) -> None:
        archive = callbacks(_with_accounts(settings, default=["revoked-0123456789", KEY]))
        stand_in.sign("env_1")

        await run(archive, make_event())

        assert ["revoked-0123456789", KEY] == _keys_of(stand_in.asked[:2])
        assert 1 == len(files_in(root))

    async def test_one_that_is_over_or_only_verifies_is_not_used(
        self, settings: Settings, stand_in: AtlasStandIn
    ) -> None:
        over = datetime.now(UTC) - timedelta(seconds=1)
        archive = callbacks(
            _with_accounts(
                settings,
                default=[
                    {"key": "over-0123456789abcdef", "not_after": over},
                    {"key": "only-verifies-0123456", "use": ["verify"]},
                ],
                other=[KEY],
            )
        )
        stand_in.sign("env_1")

        text = await text_of(archive, make_event(), Failed)

        assert "ATLAS_API_KEYS" in text
        assert [] == stand_in.asked

    async def test_all_refused_is_a_failure_without_a_key_in_it(
        self, archive: Callbacks, stand_in: AtlasStandIn
    ) -> None:
        stand_in.keys = set()

        text = await text_of(archive, make_event(), Failed)

        assert "401 (unauthorized)" in text
        assert KEY not in text

    async def test_a_tenant_is_asked_for_and_then_the_key_alone(
        self, archive: Callbacks, stand_in: AtlasStandIn, root: Path
    ) -> None:
        stand_in.sign("env_1")
        stand_in.replies = [said({}, status=403)]

        await run(archive, make_event(tenant="acme-corp"))

        accounts = [asked.headers.get("atlas-account") for asked in stand_in.asked]
        assert ["ext_acme-corp", None, None] == accounts
        assert 1 == len(files_in(root))


def _with_accounts(settings: Settings, **accounts: Any) -> Settings:
    values = settings.model_dump(exclude={"atlas_api_key", "atlas_api_keys"}, exclude_unset=True)
    return _read(atlas_api_keys=accounts, **values)


def _read(**values: Any) -> Settings:
    """Settings of what stands in an environment, mostly text."""
    return Settings(**values)


def _keys_of(requests: list[Asked]) -> list[str]:
    return [asked.headers["authorization"].removeprefix("Bearer ") for asked in requests]


class TestRecording:
    """The query by itself, on a session that does not know our schema."""

    ARCHIVE = Archive("acme/a.pdf", "a" * 64, 7, datetime(2026, 11, 22, tzinfo=UTC))

    async def record(
        self, sessions: AuthorSessions, archive: Archive, *, account: str = "default"
    ) -> bool:
        async with sessions.begin() as session:
            return await record_archive(
                session,
                schema="atlas_receiver",
                account=account,
                envelope_id="env_1",
                archive=archive,
            )

    async def test_is_done_once(self, ledger: Ledger, sessions: AuthorSessions) -> None:
        first = await self.record(sessions, self.ARCHIVE)
        second = await self.record(sessions, replace(self.ARCHIVE, name="acme/b.pdf"))

        row = await row_of(ledger)
        assert (True, False) == (first, second)
        assert ("acme/a.pdf", 2) == (row.archive_name, row.version)

    async def test_is_noted_for_the_feed_when_it_is_new(
        self, ledger: Ledger, sessions: AuthorSessions
    ) -> None:
        await self.record(sessions, self.ARCHIVE)
        await self.record(sessions, self.ARCHIVE)
        await self.record(sessions, self.ARCHIVE, account="other")
        await Sequencer(ledger.database, holder="a").step()

        async with ledger.reading() as connection:
            items = await feed.read(connection, 0, limit=10)
        assert [("archive", "receiver.archived", "default", "env_1", None)] == [
            (item.kind, item.type, item.account, item.envelope_id, item.event_id) for item in items
        ]

    async def test_touches_no_other_account(self, ledger: Ledger, sessions: AuthorSessions) -> None:
        assert not await self.record(sessions, self.ARCHIVE, account="other")

        assert (await row_of(ledger)).archive_name is None


async def test_a_kept_document_can_be_read_again(
    archive: Callbacks, stand_in: AtlasStandIn, root: Path
) -> None:
    stand_in.sign("env_1")
    await run(archive, make_event())
    (path,) = files_in(root)

    shelf = open_shelf(str(root))

    assert b"".join([piece async for piece in shelf.read(str(path.relative_to(root)))]) == PDF
