"""The change feed and single events, as other services read them over HTTP."""

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlencode

import pytest

from app.cli.listening import Server, _bind, _server
from app.main import Application, create_app
from app.settings import Settings
from app.web import cursors
from app.wiring import Services
from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Answer, Connection, Header, exchange, request
from tests.acceptance.service import (
    BETA_KEY,
    BETA_TOKEN,
    KEY,
    OPERATOR_TOKEN,
    TOKEN,
    Service,
    wait_for,
)
from tests.acceptance.tables import count, rows
from tests.factories import SIGN_TOKEN, make_body, new_envelope_id
from tests.postgres import free_port
from tests.replicas import eventually

RAW_TOKEN = "token-of-who-may-read-bytes-1"
BETA_RAW_TOKEN = "token-of-beta-who-reads-bytes"
TOKENS = json.dumps(
    {
        "office": TOKEN,
        "beta-team": {"tokens": [BETA_TOKEN], "accounts": ["beta"]},
        "operator": {"tokens": [OPERATOR_TOKEN], "scopes": ["read", "operate"]},
        "auditor": {"tokens": [RAW_TOKEN], "scopes": ["raw"]},
        "beta-auditor": {"tokens": [BETA_RAW_TOKEN], "scopes": ["raw"], "accounts": ["beta"]},
    }
)
NOBODY = "019a9d1c-6a3b-7c4e-9d54-0f6c2b1a7e88"
BAD_CURSORS = [
    "x",
    "",
    "%00",
    "é",
    "a" * 201,
    cursors.write("envelopes", [1, 1]),
    cursors.write("feed", [1]),
    cursors.write("feed", [-1, 1]),
    cursors.write("feed", [2**63, 1]),
    cursors.write("feed", [1, 10**30]),
]


def bearer(token: str) -> Header:
    return b"Authorization", b"Bearer " + token.encode()


@pytest.fixture(name="service", scope="module")
def _service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(
        "serve",
        home=tmp_path_factory.mktemp("service"),
        DATABASE_URL=with_password(database),
        API_TOKENS=TOKENS,
        CALLBACKS="app.callbacks.audit_log:callbacks",
    ) as service:
        yield service.wait_until_known("audit_log")


def ask(service: Service, token: str = TOKEN, *headers: Header, **query: Any) -> Answer:
    target = f"/api/events?{urlencode(query, doseq=True)}"
    return service.ask(target, token, *headers)


def page(service: Service, token: str = TOKEN, *headers: Header, **query: Any) -> dict[str, Any]:
    answer = ask(service, token, *headers, **query)
    assert 200 == answer.status, answer.body
    document: dict[str, Any] = answer.json()
    return document


def latest(service: Service) -> str:
    """The cursor behind everything that has happened; what was recorded has its place by then."""
    wait_for(
        lambda: count(service.settings["DATABASE_URL"], "changes") == 0, "a place for everything"
    )
    cursor: str = page(service, after="latest")["next_cursor"]
    return cursor


def deliver(service: Service, *, key: str = KEY, **fields: Any) -> str:
    """Send an event that a service records; gives its id."""
    answer = service.record(make_body(**fields), key)
    # One that was answered 503 at first may be known already.
    assert answer.json()["outcome"] in {"recorded", "duplicate"}
    event_id: str = answer.json()["event_id"]
    return event_id


def read_to(service: Service, cursor: str, number: int, **query: Any) -> list[dict[str, Any]]:
    """Read items behind a cursor until there are so many."""
    items: list[dict[str, Any]] = []
    while len(items) < number:
        found = page(service, after=cursor, wait=10, **query)
        assert found["items"], f"only {len(items)} of {number} items came"
        items += found["items"]
        cursor = found["next_cursor"]
    return items


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["event_id"] for item in items]


class TestPages:
    def test_tell_what_happened_in_its_order(self, service: Service) -> None:
        cursor, envelope_id = latest(service), new_envelope_id()
        fields = {"envelope_id": envelope_id, "event_id": f"evt_{envelope_id}"}
        first = deliver(service, event="envelope.sent", envelope_id=envelope_id)
        second = deliver(service, event="envelope.viewed", **fields)

        items = read_to(service, cursor, 2)

        assert [first, second] == ids(items)
        assert {
            "kind": "event",
            "type": "envelope.viewed",
            "account": "default",
            "envelope_id": envelope_id,
            "atlas_event_id": f"evt_{envelope_id}",
            "sequence": 2,
            "effect": "milestone",
            "original_id": None,
        }.items() <= items[1].items()
        assert items[1]["at"].endswith("Z")
        assert b"@example.com" not in ask(service, after=cursor).body

    def test_follow_one_another_without_gap_or_overlap(self, service: Service) -> None:
        cursor = latest(service)
        sent = [deliver(service) for _ in range(5)]
        assert sent == ids(read_to(service, cursor, 5))

        seen, has_more = [], True
        while has_more:
            found = page(service, after=cursor, limit=2)
            seen.append(ids(found["items"]))
            cursor, has_more = found["next_cursor"], found["has_more"]

        assert [sent[:2], sent[2:4], sent[4:]] == seen
        assert {"items": [], "next_cursor": cursor, "has_more": False} == page(
            service, after=cursor
        )

    def test_go_on_behind_each_item(self, service: Service) -> None:
        cursor = latest(service)
        sent = [deliver(service) for _ in range(3)]
        items = read_to(service, cursor, 3)

        for number, item in enumerate(items, start=1):
            assert sent[number:] == ids(page(service, after=item["cursor"])["items"])
        assert items[-1]["cursor"] == page(service, after=cursor)["next_cursor"]

    def test_begin_with_the_first_item(self, service: Service) -> None:
        deliver(service)
        latest(service)
        query = "SELECT event_id FROM feed ORDER BY position LIMIT 1"
        [[first]] = rows(service.settings["DATABASE_URL"], query)

        [item] = page(service, limit=1)["items"]

        assert str(first).replace("-", "") == item["event_id"].replace("-", "")

    def test_are_the_same_for_all_readers(self, service: Service) -> None:
        cursor = latest(service)
        [deliver(service) for _ in range(3)]
        read_to(service, cursor, 3)

        assert 1 == len(
            {ask(service, token, after=cursor).body for token in (TOKEN, OPERATOR_TOKEN)}
        )

    @pytest.mark.parametrize("cursor", BAD_CURSORS)
    @pytest.mark.parametrize("suffix", ["", "/stream"])
    def test_of_cursors_that_were_not_given_are_refused(
        self, service: Service, cursor: str, suffix: str
    ) -> None:
        text = cursor if cursor == "%00" else quote(cursor)
        answer = service.ask(f"/api/events{suffix}?after={text}", TOKEN)

        assert 422 == answer.status
        assert answer.is_problem

    @pytest.mark.parametrize(
        "query",
        [
            "limit=0",
            "limit=1001",
            "limit=x",
            "wait=-1",
            "wait=61",
            "type=%00",
            "type=a*",
            "type=*.a",
            f"type={'x' * 256}",
            "&".join(["type=x"] * 51),
        ],
    )
    def test_have_limits(self, service: Service, query: str) -> None:
        answer = service.ask(f"/api/events?{query}", TOKEN)

        assert 422 == answer.status
        assert answer.is_problem

    @pytest.mark.parametrize("suffix", ["", "/stream"])
    def test_want_a_token_that_may_read(self, service: Service, suffix: str) -> None:
        assert 401 == service.get(f"/api/events{suffix}").status
        assert 403 == service.ask(f"/api/events{suffix}", RAW_TOKEN).status


class TestFilters:
    def test_take_types_and_patterns(self, service: Service) -> None:
        cursor, envelope_id = latest(service), new_envelope_id()
        sent, viewed, extracted = (
            deliver(service, event=name, envelope_id=envelope_id)
            for name in ("envelope.sent", "envelope.viewed", "contract.extracted")
        )
        read_to(service, cursor, 3)

        def found(*types: str) -> list[str]:
            return ids(page(service, after=cursor, type=types)["items"])

        assert [sent] == found("envelope.sent")
        assert [sent, viewed] == found("envelope.*")
        assert [sent, extracted] == found("contract.*", "envelope.sent")
        assert [sent, viewed, extracted] == found("*")
        assert [] == found("envelope", "env.*", "envelope.sent.*", "ENVELOPE.*")

    def test_move_on_where_they_find_nothing(self, service: Service) -> None:
        cursor = latest(service)
        last = [deliver(service) for _ in range(2)][-1]
        items = read_to(service, cursor, 2)

        found = page(service, after=cursor, type="contract.*")

        assert last == items[-1]["event_id"]
        assert {"items": [], "next_cursor": items[-1]["cursor"], "has_more": False} == found

    def test_show_each_token_its_own_accounts(self, service: Service) -> None:
        cursor = latest(service)
        ours, theirs = deliver(service), deliver(service, key=BETA_KEY)
        assert [ours, theirs] == ids(read_to(service, cursor, 2))

        def found(token: str, *headers: Header) -> list[str]:
            return ids(page(service, token, *headers, after=cursor)["items"])

        assert [theirs] == found(BETA_TOKEN)
        assert [theirs] == found(TOKEN, (b"Atlas-Account", b"beta"))
        assert [ours] == found(TOKEN, (b"Atlas-Account", b"default"))
        assert [] == found(BETA_TOKEN, (b"Atlas-Account", b"default"))
        assert [] == found(TOKEN, (b"Atlas-Account", b"nobody"))

    def test_show_one_tenant(self, service: Service) -> None:
        cursor, tenant = latest(service), new_envelope_id()
        theirs = deliver(service, organization_id=f"ext_{tenant}")
        deliver(service, organization_id="ext_other")
        read_to(service, cursor, 2)

        for name in (tenant, f"ext_{tenant}"):
            header = b"Atlas-Account", name.encode()
            assert [theirs] == ids(page(service, TOKEN, header, after=cursor)["items"])
            assert [] == page(service, BETA_TOKEN, header, after=cursor)["items"]


class TestWaiting:
    def test_ends_when_something_happens(self, service: Service) -> None:
        cursor = latest(service)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(page, service, after=cursor, wait=60)
            event_id = deliver(service)
            # Sooner than the wait would end by itself.
            found = waiting.result(40)

        assert [event_id] == ids(found["items"])

    def test_ends_when_the_time_is_over(self, service: Service) -> None:
        cursor = latest(service)
        began = time.monotonic()

        found = page(service, after=cursor, wait=1)

        assert {"items": [], "next_cursor": cursor, "has_more": False} == found
        assert 1 <= time.monotonic() - began < 30

    def test_goes_past_what_was_not_asked_for(self, service: Service) -> None:
        cursor = latest(service)

        def wait_for_another(seconds: int) -> dict[str, Any]:
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(page, service, after=cursor, wait=seconds, type="contract.*")
                deliver(service)
                return waiting.result(60)

        found = wait_for_another(2)
        if found["next_cursor"] == cursor:
            # On a busy machine the event may take longer than that.
            found = wait_for_another(15)

        assert [] == found["items"]
        assert latest(service) == found["next_cursor"] != cursor

    def test_for_a_tenant_ends_with_what_is_its(self, service: Service) -> None:
        cursor, tenant = latest(service), new_envelope_id()
        header = b"Atlas-Account", tenant.encode()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(page, service, TOKEN, header, after=cursor, wait=60)
            deliver(service, organization_id="ext_other")
            event_id = deliver(service, organization_id=tenant)
            found = waiting.result(40)

        assert [event_id] == ids(found["items"])

    def test_does_not_begin_while_there_is_something(self, service: Service) -> None:
        cursor = latest(service)
        event_id = deliver(service)
        latest(service)

        assert [event_id] == ids(page(service, after=cursor, wait=30)["items"])


class Listener:
    """One reader of the stream, as a browser would read it, but for what it remembers."""

    def __init__(self, port: int, *headers: Header, token: str = TOKEN, **query: Any) -> None:
        target = f"/api/events/stream?{urlencode(query, doseq=True)}"
        self._connection = Connection(port)
        self._connection.send(request("GET", target, [bearer(token), *headers]))
        head = self._connection._read_until(b"\r\n\r\n").decode("latin-1")
        self.status = int(head.split(" ")[1])
        self.headers = head.lower()
        self._chunks = self._connection._chunks()
        self._unread = ""
        self.last_id = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def block(self) -> dict[str, str] | None:
        """Read up to the next empty line; None at the end of the stream."""
        while "\n\n" not in self._unread:
            chunk = next(iter(self._chunks), None)
            if chunk is None:
                return None
            self._unread += chunk.decode()
        text, _, self._unread = self._unread.partition("\n\n")
        fields = {}
        for line in text.split("\n"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        self.last_id = fields.get("id", self.last_id)
        return fields

    def items(self, number: int) -> list[dict[str, Any]]:
        """Read so many items."""
        found: list[dict[str, Any]] = []
        while len(found) < number:
            block = self.block()
            assert block is not None, f"the stream ended after {len(found)} of {number} items"
            if "data" in block:
                found.append(json.loads(block["data"]))
                assert (block["id"], block["event"]) == (found[-1]["cursor"], found[-1]["type"])
        return found

    def is_ended(self) -> bool:
        while self.block() is not None:
            pass
        return True


class TestStream:
    def test_tells_what_happened_and_what_happens(self, service: Service) -> None:
        cursor = latest(service)
        first = deliver(service)
        latest(service)

        with Listener(service.port, after=cursor) as listener:
            past = listener.items(1)
            second = deliver(service)
            present = listener.items(1)

        assert [first, second] == ids(past + present)
        assert past + present == read_to(service, cursor, 2)
        assert "content-type: text/event-stream" in listener.headers
        assert "cache-control: no-store" in listener.headers
        assert "content-length" not in listener.headers

    def test_says_first_how_soon_to_come_again(self, service: Service) -> None:
        with Listener(service.port, after="latest") as listener:
            assert {"retry": "2000"} == listener.block()

    def test_goes_on_behind_the_last_id(self, service: Service) -> None:
        """A reader that stops and comes back misses nothing, whatever its address says."""
        cursor = latest(service)
        sent = [deliver(service) for _ in range(3)]
        with Listener(service.port, after=cursor) as listener:
            seen = listener.items(2)
        sent += [deliver(service) for _ in range(3)]

        last = b"Last-Event-ID", listener.last_id.encode()
        with Listener(service.port, last, after=cursor) as listener:
            seen += listener.items(4)

        assert sent == ids(seen)

    def test_goes_on_where_pages_ended(self, service: Service) -> None:
        cursor = latest(service)
        sent = [deliver(service) for _ in range(2)]
        [item] = page(service, after=cursor, limit=1, wait=10)["items"]

        with Listener(service.port, after=item["cursor"]) as listener:
            assert sent[1:] == ids(listener.items(1))

    def test_of_much_comes_in_order(self, service: Service) -> None:
        cursor = latest(service)
        sent = [deliver(service) for _ in range(250)]

        with Listener(service.port, after=cursor) as listener:
            assert sent == ids(listener.items(250))

    def test_takes_filters_and_accounts(self, service: Service) -> None:
        cursor, tenant = latest(service), new_envelope_id()
        with (
            Listener(service.port, after=cursor, type="contract.*") as contracts,
            Listener(service.port, token=BETA_TOKEN, after=cursor) as beta,
            Listener(service.port, (b"Atlas-Account", tenant.encode()), after=cursor) as one,
        ):
            assert contracts.block() == beta.block() == one.block()
            deliver(service)
            theirs = deliver(service, key=BETA_KEY)
            extracted = deliver(service, event="contract.extracted")
            of_tenant = deliver(service, organization_id=tenant)

            assert [extracted] == ids(contracts.items(1))
            assert [theirs] == ids(beta.items(1))
            assert [of_tenant] == ids(one.items(1))

    @pytest.mark.parametrize("cursor", ["x", "é", cursors.write("feed", [2**63, 1])])
    def test_refuses_ids_that_were_not_given(self, service: Service, cursor: str) -> None:
        header = b"Last-Event-ID", cursor.encode()
        answer = service.ask("/api/events/stream", TOKEN, header)

        assert 422 == answer.status
        assert answer.is_problem

    def test_names_what_has_no_type_by_its_kind(self, service: Service) -> None:
        cursor = latest(service)
        service.deliver(b"!" + new_envelope_id().encode(), KEY)
        latest(service)

        with Listener(service.port, after=cursor) as listener:
            listener.block()
            block = listener.block()

        assert block is not None
        assert "event" == block["event"]
        assert None is json.loads(block["data"])["type"]


class TestEvent:
    def test_shows_what_was_said_without_secrets(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        event_id = deliver(service, envelope_id=envelope_id, note="plain")

        answer = service.ask(f"/api/events/{event_id}", TOKEN)

        shown = answer.json()
        assert 200 == answer.status
        assert {
            "event_id": event_id,
            "account": "default",
            "envelope_id": envelope_id,
            "type": "envelope.signed",
            "effect": "applied",
            "status": "signed",
            "copies": 0,
            "reason": None,
            "key_label": "new",
        }.items() <= shown.items()
        assert "plain" == shown["data"]["note"]
        assert SIGN_TOKEN.encode() not in answer.body
        assert "content" not in shown

    def test_counts_its_copies(self, service: Service) -> None:
        body = make_body()
        event_id = service.deliver(body, KEY).json()["event_id"]
        service.deliver(body, KEY)

        shown = service.ask(f"/api/events/{event_id}", TOKEN).json()

        assert 1 == shown["copies"]
        assert shown["last_copy_at"] is not None

    @pytest.mark.parametrize(
        "body, data",
        [
            pytest.param(b"no json", None, id="text"),
            pytest.param(b"\xff\xfe\x00", None, id="bytes"),
            pytest.param(b"[NaN, 1]", None, id="not-a-number"),
            pytest.param(b"[1e999]", None, id="infinite"),
            pytest.param(b"[" * 5000, None, id="deep"),
            pytest.param(b'["\\ud800 half"]', ["? half"], id="half-a-character"),
            pytest.param(b"[1" + b"0" * 60 + b"]", [10**60], id="large"),
            pytest.param(b"[%d]" % 7 + b" " * 70_000, [7], id="long"),
            pytest.param(b'["x", null]', ["x", None], id="a-list"),
        ],
    )
    def test_in_quarantine_shows_what_is_json(
        self, service: Service, body: bytes, data: object
    ) -> None:
        # Each body once: a copy would be another event's.
        answer = service.deliver(body, KEY)
        assert "quarantined" == answer.json()["outcome"]

        answer = service.ask(f"/api/events/{answer.json()['event_id']}", TOKEN)

        assert 200 == answer.status
        assert data == answer.json()["data"]
        assert ("quarantined", None) == (answer.json()["effect"], answer.json()["type"])
        assert answer.json()["reason"]

    @pytest.mark.parametrize("suffix", ["", "/body"])
    @pytest.mark.parametrize("event_id", [NOBODY, "x", "%00", "env_1", "é", "1" * 40])
    def test_that_nobody_sent_is_not_found(
        self, service: Service, event_id: str, suffix: str
    ) -> None:
        token = RAW_TOKEN if suffix else TOKEN
        answer = service.ask(f"/api/events/{quote(event_id, safe='%')}{suffix}", token)

        assert 404 == answer.status
        assert answer.is_problem

    def test_of_another_account_is_not_there(self, service: Service) -> None:
        event_id = deliver(service)
        target = f"/api/events/{event_id}"

        assert 404 == service.ask(target, BETA_TOKEN).status
        assert 404 == service.ask(target, TOKEN, (b"Atlas-Account", b"beta")).status
        assert 404 == service.ask(f"{target}/body", BETA_RAW_TOKEN).status
        assert 200 == service.ask(target, TOKEN, (b"Atlas-Account", b"default")).status

    def test_of_another_tenant_is_not_there(self, service: Service) -> None:
        tenant = new_envelope_id()
        target = f"/api/events/{deliver(service, organization_id=tenant)}"
        lost = service.deliver(b"not of any envelope", KEY).json()["event_id"]

        def status(target: str, name: str) -> int:
            return service.ask(target, TOKEN, (b"Atlas-Account", name.encode())).status

        assert (200, 200, 404) == (
            status(target, tenant),
            status(target, f"ext_{tenant}"),
            status(target, "ext_other"),
        )
        assert 404 == status(f"/api/events/{lost}", tenant)


class TestBody:
    def test_is_what_was_received_and_the_audit_knows(self, service: Service) -> None:
        body = b' {"event" :\t"envelope.signed", "envelope_id": "%b", "sign_url": "https://a?token=x"}\n'
        body %= new_envelope_id().encode()
        event_id = service.deliver(body, KEY).json()["event_id"]

        answer = service.ask(f"/api/events/{event_id}/body", RAW_TOKEN)

        assert (200, body) == (answer.status, answer.body)
        assert "application/octet-stream" == answer.headers["content-type"]
        assert "nosniff" == answer.headers["x-content-type-options"]
        assert answer.headers["content-disposition"].startswith("attachment;")
        assert [("api:auditor", "body.read")] == acts(service, event_id)

    def test_wants_a_scope_of_its_own(self, service: Service) -> None:
        event_id = deliver(service)

        for token in (TOKEN, OPERATOR_TOKEN):
            assert 403 == service.ask(f"/api/events/{event_id}/body", token).status
        assert [] == acts(service, event_id)

    def test_that_is_no_longer_kept_is_gone(self, service: Service) -> None:
        event_id = deliver(service)
        rows_changed(service, "DELETE FROM bodies WHERE event_id = $1", event_id)

        answer = service.ask(f"/api/events/{event_id}/body", RAW_TOKEN)
        shown = service.ask(f"/api/events/{event_id}", TOKEN).json()

        assert 410 == answer.status
        assert answer.is_problem
        assert [] == acts(service, event_id)
        assert shown["data"] is None


def acts(service: Service, event_id: str) -> list[tuple[Any, ...]]:
    query = "SELECT actor, action FROM audit WHERE subject = $1 ORDER BY id"
    return rows(service.settings["DATABASE_URL"], query, f"event:{event_id}")


def rows_changed(service: Service, statement: str, event_id: str) -> None:
    """Change rows about an event by hand."""
    url = service.settings["DATABASE_URL"]
    change(
        url,
        statement.replace(
            "$1", f"'{event_id}'" if "postgres" in url else f"'{event_id.replace('-', '')}'"
        ),
    )


def change(url: str, statement: str) -> None:
    """Run one statement of a test's own."""
    if url.startswith("sqlite"):
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=30)) as connection:
            connection.execute(statement)
            connection.commit()
    else:
        rows(url, statement)


def post(service: Service, target: str, token: str, body: bytes = b"", *headers: Header) -> Answer:
    if body:
        headers += ((b"Content-Type", b"application/json"),)
    return exchange(service.port, request("POST", target, [bearer(token), *headers], body))


class TestRedispatch:
    def test_owes_it_again_and_says_so(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        event_id = deliver(service, envelope_id=envelope_id)
        owed = f"/api/deliveries?envelope_id={envelope_id}"
        wait_for(lambda: bool(service.ask(owed, TOKEN).json()["items"]), "the first delivery")
        target = f"/api/events/{event_id}/redispatch"

        first = post(service, target, OPERATOR_TOKEN)
        second = post(service, target, OPERATOR_TOKEN, b'{"callbacks": ["audit_log"]}')

        assert (200, 200) == (first.status, second.status), first.body + second.body
        made = [answer.json()["deliveries"][0] for answer in (first, second)]
        assert [("audit_log", 2), ("audit_log", 3)] == [
            (each["callback"], each["generation"]) for each in made
        ]
        assert event_id == first.json()["event_id"]
        assert [("api:operator", "event.redispatched")] * 2 == acts(service, event_id)

    @pytest.mark.parametrize(
        "body, status",
        [
            (b'{"callbacks": ["nobody"]}', 404),
            (b'{"callbacks": ["audit_log", "nobody"]}', 404),
            (b'{"callbacks": ["\\u0000"]}', 404),
            (b'{"callbacks": []}', 422),
            (b'{"callbacks": "audit_log"}', 422),
            (b'{"callback": ["audit_log"]}', 422),
            (b"[]", 422),
            (b"{", 422),
            (b'{"callbacks": ["' + b"x" * 70_000 + b'"]}', 413),
        ],
    )
    def test_to_nobody_is_refused(self, service: Service, body: bytes, status: int) -> None:
        event_id = deliver(service)

        answer = post(service, f"/api/events/{event_id}/redispatch", OPERATOR_TOKEN, body)

        assert status == answer.status
        assert answer.is_problem
        assert [] == acts(service, event_id)

    def test_of_what_was_not_understood_is_not_allowed(self, service: Service) -> None:
        event_id = service.deliver(b"?" + new_envelope_id().encode(), KEY).json()["event_id"]

        answer = post(service, f"/api/events/{event_id}/redispatch", OPERATOR_TOKEN)

        assert 409 == answer.status
        assert "reproject" in answer.json()["detail"]


class TestReproject:
    def test_applies_it_again_and_says_so(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        event_id = deliver(service, envelope_id=envelope_id)

        answer = post(service, f"/api/events/{event_id}/reproject", OPERATOR_TOKEN)

        assert {
            "event_id": event_id,
            "result": "unchanged",
            "effect": "applied",
            "was": "applied",
            "type": "envelope.signed",
            "envelope_id": envelope_id,
            "original_id": None,
            "owed": [],
        } == answer.json()
        assert ["api:operator"] == [actor for actor, _ in acts(service, event_id)]

    def test_takes_the_word_of_a_conflict_if_told_to(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        fields = {"envelope_id": envelope_id, "event_id": f"evt_{envelope_id}"}
        first = deliver(service, event="envelope.signed", **fields)
        body = make_body(event="envelope.declined", **fields)
        conflict = service.deliver(body, KEY).json()
        assert "conflict" == conflict["outcome"]
        target = f"/api/events/{conflict['event_id']}/reproject"

        refused = post(service, target, OPERATOR_TOKEN)
        accepted = post(service, f"{target}?accept=true", OPERATOR_TOKEN)

        assert 409 == refused.status
        assert ("accepted", first) == (
            accepted.json()["result"],
            accepted.json()["original_id"],
        )

    @pytest.mark.parametrize("act", ["redispatch", "reproject"])
    def test_and_redispatch_want_the_scope_and_the_account(
        self, service: Service, act: str
    ) -> None:
        event_id = deliver(service)
        beta = b"Atlas-Account", b"beta"

        assert 403 == post(service, f"/api/events/{event_id}/{act}", TOKEN).status
        assert 401 == post(service, f"/api/events/{event_id}/{act}", "x").status
        assert 404 == post(service, f"/api/events/{NOBODY}/{act}", OPERATOR_TOKEN).status
        assert 404 == post(service, f"/api/events/x/{act}", OPERATOR_TOKEN).status
        target = f"/api/events/{event_id}/{act}"
        assert 404 == post(service, target, OPERATOR_TOKEN, b"", beta).status
        assert [] == acts(service, event_id)


class TestSeats:
    """How many wait at once."""

    @pytest.fixture(name="narrow")
    def _narrow(self, sqlite_url: str, tmp_path: Path) -> Iterator[Service]:
        with Service(
            "serve",
            home=tmp_path,
            DATABASE_URL=sqlite_url,
            API_TOKENS=TOKENS,
            API_WAITERS="3",
            API_WAITERS_PER_TOKEN="2",
        ) as service:
            yield service

    def test_are_limited_by_token_and_in_all(self, narrow: Service) -> None:
        with ExitStack() as stack:

            def listen(token: str) -> Listener:
                return stack.enter_context(Listener(narrow.port, token=token, after="latest"))

            mine = [listen(TOKEN) for _ in range(2)]
            assert [200, 200] == [each.status for each in mine]
            assert 429 == listen(TOKEN).status
            refused = ask(narrow, wait=1)
            theirs = listen(BETA_TOKEN)
            full = ask(narrow, OPERATOR_TOKEN, wait=1)

            assert (429, 200, 429) == (refused.status, theirs.status, full.status)
            assert refused.is_problem
            assert "1" == refused.headers["retry-after"]
            # Who does not wait needs none.
            assert 200 == ask(narrow).status
            mine[0].close()
            wait_for(lambda: ask(narrow, wait=1).status == 200, "a seat for the next one")


class TestShutdown:
    def test_ends_every_wait_at_once(self, database_url: str, tmp_path: Path) -> None:
        with Service("serve", home=tmp_path, DATABASE_URL=database_url) as service:
            listeners = [Listener(service.port, after="latest") for _ in range(50)]
            polls = [Connection(service.port) for _ in range(50)]
            for poll in polls:
                poll.send(request("GET", "/api/events?wait=60", [bearer(TOKEN)]))
            for listener in listeners:
                assert {"retry": "2000"} == listener.block()
            cursor = page(service)["next_cursor"]
            # Who is not heard yet when the stop comes is not answered.
            wait_for(lambda: waiters(service) == 100, "everybody who waits")

            service.signal()
            began = time.monotonic()
            answers = [poll.read() for poll in polls]
            code = service.wait()
            # Promised are 2 s, and the machine may be busy; after 10 s they would be cut off.
            assert time.monotonic() - began < 9

            assert 0 == code
            assert all(listener.is_ended() for listener in listeners)
            assert [(200, cursor)] * 50 == [
                (answer.status, answer.json()["next_cursor"]) for answer in answers
            ]
            for poll, listener in zip(polls, listeners, strict=True):
                poll.close()
                listener.close()

    def test_does_not_wait_for_who_does_not_read(self, database_url: str, tmp_path: Path) -> None:
        fill_feed(database_url)
        with (
            Service("serve", home=tmp_path, DATABASE_URL=database_url) as service,
            socket.socket() as lazy,
        ):
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", service.port))
            lazy.send(request("GET", "/api/events/stream", [bearer(TOKEN)]))
            looks: deque[int] = deque(maxlen=20)
            wait_for(lambda: is_stuck(service.port, looks), "a full wire")

            service.signal()
            began = time.monotonic()

            assert 0 == service.wait()
            # It is given 2 s, and the machine may be busy; all others are waited for for 10 s.
            assert time.monotonic() - began < 9


def waiters(service: Service) -> int:
    """Say how many wait for news, as the service counts them."""
    said = service.ask("/metrics", TOKEN).body.decode().splitlines()
    [line] = [line for line in said if line.startswith("atlas_waiters ")]
    return int(float(line.split()[1]))


def is_stuck(port: int, looks: deque[int]) -> bool:
    """Whether a server has had the same to send for some looks."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    looks.append(sum(int(line[4][:8], 16) for line in lines if int(line[1][9:], 16) == port))
    return looks[0] > 0 and len(looks) == looks.maxlen and len(set(looks)) == 1


def fill_feed(url: str) -> None:
    """Put more into the feed than what lies between a server and its reader."""
    change(
        url,
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 8000) "
        "INSERT INTO feed (position, kind, at, account, envelope_id) "
        "SELECT i, 'archive', '2026-11-22 00:00:00.000000', 'default', "
        "'__' FROM n".replace("__", "x" * 2000),
    )


class TestRestored:
    """A database that was restored from a backup gives places again, at other times."""

    @pytest.fixture(name="own")
    def _own(self, database_url: str, tmp_path: Path) -> Iterator[Service]:
        with Service("serve", home=tmp_path, DATABASE_URL=database_url) as service:
            yield service

    def test_tells_readers_of_its_lost_future(self, own: Service) -> None:
        [deliver(own) for _ in range(3)]
        latest(own)
        past = page(own, limit=1)["next_cursor"]
        cursor = latest(own)
        with Listener(own.port, after=cursor) as listener:
            listener.block()
            change(own.settings["DATABASE_URL"], "DELETE FROM feed WHERE position > 1")
            assert listener.is_ended()

        shorter = ask(own, after=cursor)
        [deliver(own) for _ in range(4)]
        latest(own)
        other = ask(own, after=cursor)

        for answer in (shorter, other, ask(own, after=cursor, wait=1)):
            assert 410 == answer.status
            assert answer.is_problem
            assert "restored" in answer.json()["detail"]
        assert 410 == own.ask(f"/api/events/stream?after={cursor}", TOKEN).status
        last = b"Last-Event-ID", cursor.encode()
        assert 410 == own.ask("/api/events/stream", TOKEN, last).status
        assert 4 == len(page(own, after=past)["items"])


@asynccontextmanager
async def running(url: str, **settings: Any) -> AsyncIterator[tuple[Application, Services, int]]:
    """The service in this process, where a test can reach into it."""
    values = {
        "database_url": url,
        "atlas_api_key": KEY,
        "api_tokens": {"office": {"tokens": [TOKEN]}},
        **settings,
    }
    services = Services(Settings(_env_file=None, **values), takes_webhooks=True, works=False)  # type: ignore[call-arg]
    app = create_app(services)
    port = free_port()
    server: Server = _server(app, services, room=1000)
    app.state.connections = server.server_state.connections
    serving = asyncio.create_task(server.serve(_bind("127.0.0.1", port)))
    await eventually(lambda: server.started and services._is_prepared)
    try:
        yield app, services, port
    finally:
        server.should_exit = True
        services.tail.close()
        await serving


class Stream:
    """A reader of the stream that does not hold up the loop of the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int, **query: Any) -> Self:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        target = f"/api/events/stream?{urlencode(query)}"
        writer.write(request("GET", target, [bearer(TOKEN)]))
        stream = cls(reader, writer)
        assert b"retry: 2000" in await stream.until(lambda text: b"retry: 2000" in text)
        return stream

    async def until(self, is_enough: Callable[[bytes], bool], *, seconds: float = 40) -> bytes:
        text = b""
        async with asyncio.timeout(seconds):
            while not is_enough(text):
                chunk = await self.reader.read(65536)
                assert chunk, f"the stream ended after {text!r}"
                text += chunk
        return text

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


async def send(services: Services, **fields: Any) -> str:
    """Record an event past the door; gives its id."""
    receipt = await services.record(make_body(**fields), account="default", key_label="new")
    return str(receipt.event_id)


class TestHangingUp:
    async def test_gives_the_seat_back(self, database_url: str) -> None:
        async with running(database_url) as (app, _, port):
            polls = [Connection(port) for _ in range(2)]
            for poll in polls:
                poll.send(request("GET", "/api/events?wait=60", [bearer(TOKEN)]))
            stream = await Stream.open(port)
            await eventually(lambda: app.state.seats.taken == 3)

            polls[0].reset()
            polls[1].close()
            await stream.close()

            await eventually(lambda: app.state.seats.taken == 0)


class TestHeartbeats:
    async def test_come_while_nothing_happens(self, database_url: str) -> None:
        async with running(database_url) as (app, services, port):
            app.state.feed.heartbeat = timedelta(milliseconds=50)
            stream = await Stream.open(port, after="latest")

            await stream.until(lambda text: text.count(b":\n\n") >= 3)

            event_id = await send(services)
            await stream.until(lambda text: event_id.encode() in text)
            await stream.close()
            await eventually(lambda: app.state.seats.taken == 0)

    async def test_move_on_past_what_was_not_asked_for(self, database_url: str) -> None:
        async with running(database_url) as (app, services, port):
            app.state.feed.heartbeat = timedelta(milliseconds=50)
            stream = await Stream.open(port, after="latest", type="contract.*")

            event_id = await send(services)
            text = await stream.until(lambda text: b"\nid: " in text)

            cursor = text.partition(b"\nid: ")[2].split(b"\n")[0].decode()
            [item] = await asyncio.to_thread(items_of, port)
            assert (event_id, cursor) == (item["event_id"], item["cursor"])
            assert b"data:" not in text
            await stream.close()

    async def test_go_on_while_the_database_is_away(self, database_url: str) -> None:
        async with running(database_url) as (app, services, port):
            app.state.feed.heartbeat = timedelta(milliseconds=50)
            # One is behind the tail, and has to look into the database; one is not.
            await send(services)
            streams = [await Stream.open(port), await Stream.open(port, after="latest")]
            await streams[0].until(lambda text: b"data:" in text)
            await asyncio.to_thread(change, database_url, "ALTER TABLE feed RENAME TO hidden")

            for stream in streams:
                await stream.until(lambda text: text.count(b":\n\n") >= 5)

            await asyncio.to_thread(change, database_url, "ALTER TABLE hidden RENAME TO feed")
            event_id = await send(services)
            for stream in streams:
                await stream.until(lambda text: event_id.encode() in text)
                await stream.close()


def items_of(port: int) -> list[dict[str, Any]]:
    answer = exchange(port, request("GET", "/api/events", [bearer(TOKEN)]))
    found: list[dict[str, Any]] = answer.json()["items"]
    return found


class TestManyReaders:
    async def test_share_two_connections(self, database_url: str, tmp_path: Path) -> None:
        with Service(
            "serve", home=tmp_path, DATABASE_URL=database_url, DATABASE_POOL="2"
        ) as service:
            deliver(service)
            latest(service)
            streams: list[Stream] = []
            # All at once they would wait for one another, and the last of them for too long.
            for _ in range(20):
                opening = (Stream.open(service.port) for _ in range(10))
                streams += await asyncio.gather(*opening)
            event_id = deliver(service).encode()

            texts = await asyncio.gather(
                *(stream.until(lambda text: event_id in text) for stream in streams)
            )

            assert 200 == len(texts)
            await asyncio.gather(*(stream.close() for stream in streams))

    async def test_who_take_nothing_lose_their_seat(self, database_url: str) -> None:
        await asyncio.to_thread(fill_feed, database_url)
        async with running(database_url) as (app, _, port):
            app.state.feed.patience = timedelta(milliseconds=200)
            stream = await Stream.open(port)
            stream.reader._transport.pause_reading()  # type: ignore[attr-defined]
            await eventually(lambda: app.state.seats.taken == 1)

            await eventually(lambda: app.state.seats.taken == 0)

            await stream.close()

    async def test_who_do_not_read_are_not_written_to_without_end(self, database_url: str) -> None:
        async with running(database_url) as (app, services, port):
            lazy = Lazy()
            reading = asyncio.create_task(app(lazy.scope, lazy.receive, lazy.send))
            await eventually(lambda: lazy.said == [HELLO])
            sent = await asyncio.gather(*(send(services) for _ in range(250)))
            eager = await Stream.open(port)
            await eager.until(lambda text: text.count(b"data:") == len(sent))

            lazy.may_go_on.set()
            await eventually(lambda: len(lazy.said) == 2)

            await asyncio.sleep(0.2)
            assert 2 == len(lazy.said)
            assert 100 == lazy.said[1].count(b"data:")
            lazy.hang_up()
            await asyncio.wait_for(reading, 30)
            await eager.close()


HELLO = b"retry: 2000\n\n"


class Lazy:
    """A reader that takes one thing more only when it is told to."""

    def __init__(self) -> None:
        target, headers = "/api/events/stream", [(b"authorization", bearer(TOKEN)[1])]
        self.scope = {
            "type": "http",
            "method": "GET",
            "path": target,
            "raw_path": target.encode(),
            "query_string": b"",
            "headers": headers,
        }
        self.said: list[bytes] = []
        self.may_go_on = asyncio.Event()
        self._gone = asyncio.Event()

    async def receive(self) -> MutableMapping[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            self.said.append(message["body"])
            await self.may_go_on.wait()
            self.may_go_on.clear()

    def hang_up(self) -> None:
        self._gone.set()
