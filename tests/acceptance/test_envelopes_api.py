"""Envelopes over HTTP: lists, waits, what is expected, and the signed document."""

import asyncio
import hashlib
import json
import signal
import sqlite3
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from tests.acceptance.conftest import copy_sqlite
from tests.acceptance.raw import Answer, Connection, Header, exchange, request
from tests.acceptance.service import (
    BETA_KEY,
    BETA_TOKEN,
    KEY,
    OPERATOR_TOKEN,
    SETTINGS,
    TOKEN,
    Service,
    wait_for,
)
from tests.atlas_stand_in import KEY as ATLAS_KEY
from tests.atlas_stand_in import PDF, atlas_stand_in
from tests.factories import make_body, new_envelope_id

DEFAULT = (b"Atlas-Account", b"default")
MANAGER_TOKEN = "token-canary-of-the-manager-1"


def authorised(token: str, *headers: Header) -> list[Header]:
    return [(b"Authorization", b"Bearer " + token.encode()), *headers]


def put(
    service: Service, target: str, body: Any = None, *headers: Header, token: str = OPERATOR_TOKEN
) -> Answer:
    content = b"" if body is None else json.dumps(body).encode()
    kind = [(b"Content-Type", b"application/json")]
    return exchange(
        service.port, request("PUT", target, authorised(token, *kind, *headers), content)
    )


def new_envelope(service: Service, key: str = KEY, **fields: Any) -> str:
    envelope_id: str = fields.setdefault("envelope_id", new_envelope_id())
    assert 200 == service.deliver(make_body(**fields), key).status
    return envelope_id


def listed(service: Service, *headers: Header, token: str = TOKEN, **query: Any) -> Answer:
    return service.ask(f"/api/envelopes?{urlencode(query)}", token, *headers)


def ids(service: Service, *headers: Header, token: str = TOKEN, **query: Any) -> list[str]:
    """Read a list to its end."""
    found: list[str] = []
    while True:
        answer = listed(service, *headers, token=token, **query)
        assert 200 == answer.status, answer.body
        page = answer.json()
        found += [item["envelope_id"] for item in page["items"]]
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


class TestList:
    def test_has_filters_in_the_words_of_atlas(self, service: Service) -> None:
        mine = f"crm-{new_envelope_id()}"
        sent = new_envelope(service, event="envelope.sent", external_id=mine)
        signed = new_envelope(service, external_id=mine, is_test=True)

        assert [signed, sent] == ids(service, external_id=mine)
        for word in ("pending", "in_progress"):
            assert [sent] == ids(service, external_id=mine, status=word)
        for word in ("signed", "completed"):
            assert [signed] == ids(service, external_id=mine, status=word)
        assert [] == ids(service, external_id=mine, status="none")
        assert [signed] == ids(service, external_id=mine, is_test="true")
        assert [sent] == ids(service, external_id=mine, is_test="false")

    def test_shows_envelopes_as_they_are_shown_one_by_one(self, service: Service) -> None:
        mine = f"crm-{new_envelope_id()}"
        envelope_id = new_envelope(service, external_id=mine)

        (item,) = listed(service, external_id=mine).json()["items"]

        assert item == service.ask(f"/api/envelope/{envelope_id}", TOKEN).json()

    def test_goes_on_from_its_cursor(self, service: Service) -> None:
        mine = f"crm-{new_envelope_id()}"
        made = [new_envelope(service, external_id=mine) for _ in range(5)]

        assert made[::-1] == ids(service, external_id=mine, limit=2)
        assert made == ids(service, external_id=mine, limit=2, updated_after="2020-01-01T00:00:00Z")

    def test_gives_what_changed_after_a_time(self, service: Service) -> None:
        first = new_envelope(service)
        at = service.ask(f"/api/envelope/{first}", TOKEN).json()["updated_at"]
        second = new_envelope(service)

        found = ids(service, updated_after=at)

        assert second in found
        assert first not in found

    @pytest.mark.parametrize(
        "text", ["2026-07-01T12:00:00Z", "2026-07-01T12:00:00+02:00", "9999-12-31T23:59:59Z"]
    )
    def test_takes_times_with_a_zone(self, service: Service, text: str) -> None:
        assert 200 == listed(service, updated_after=text).status
        # As somebody writes it who forgets that a plus is a blank here.
        assert 200 == service.ask(f"/api/envelopes?updated_after={text}", TOKEN).status

    def test_finds_by_the_beginning_of_an_id_or_address(self, service: Service) -> None:
        envelope_id = f"Q-{new_envelope_id()}"
        address = f"{envelope_id.lower()}@example.com"
        new_envelope(service, envelope_id=envelope_id, parties=[{"email": address}])

        wait_for(lambda: ids(service, q=envelope_id.upper()) == [envelope_id], "its terms")

        assert [envelope_id] == ids(service, q=address)
        assert [envelope_id] == ids(service, q=envelope_id, status="signed")
        assert [] == ids(service, q=envelope_id, status="voided")
        assert [] == ids(service, token=BETA_TOKEN, q=envelope_id)

    @pytest.mark.parametrize(
        "q", ["%", "_", "%%", "A" * 255, "🖋", "\U0010ffff" * 255, "'", '"', "\\", " ", "é", "\n"]
    )
    def test_takes_any_text_as_it_is(self, service: Service, q: str) -> None:
        for name in ("q", "external_id", "client_reference_id", "tenant"):
            answer = listed(service, **{name: q})
            assert 200 == answer.status
            assert [] == answer.json()["items"]

    def test_shows_only_what_the_token_may_see(self, service: Service) -> None:
        mine = f"crm-{new_envelope_id()}"
        ours = new_envelope(service, external_id=mine, organization_id="ext_org_7")
        theirs = new_envelope(service, BETA_KEY, external_id=mine, organization_id="org_7")

        assert [theirs, ours] == ids(service, external_id=mine)
        assert [theirs] == ids(service, token=BETA_TOKEN, external_id=mine)
        assert [ours] == ids(service, DEFAULT, external_id=mine)
        assert [] == ids(service, DEFAULT, token=BETA_TOKEN, external_id=mine)
        for tenant in ("org_7", "ext_org_7"):
            header = (b"Atlas-Account", tenant.encode())
            assert [theirs, ours] == ids(service, header, external_id=mine)
            assert [theirs] == ids(service, header, token=BETA_TOKEN, external_id=mine)
            assert [theirs, ours] == ids(service, external_id=mine, tenant=tenant)
        assert [] == ids(service, (b"Atlas-Account", b"org_8"), external_id=mine)

    @pytest.mark.parametrize(
        "query",
        [
            "limit=0",
            "limit=101",
            "limit=x",
            "status=done",
            "status=",
            "status=%00",
            "is_test=perhaps",
            "updated_after=2026-07-01T12:00:00",
            "updated_after=yesterday",
            "updated_after=0001-01-01T00:00:00%2B23:00",
            "q=",
            "q=%00",
            f"q={'x' * 256}",
            "external_id=a%00",
            f"tenant={'x' * 256}",
            "cursor=x",
            "cursor=%00",
            f"cursor={'x' * 10_001}",
            "cursor=eyJ9",
        ],
    )
    def test_refuses_what_cannot_be_meant(self, service: Service, query: str) -> None:
        answer = service.ask(f"/api/envelopes?{query}", TOKEN)

        assert 422 == answer.status, query
        assert answer.is_problem

    def test_says_which_words_there_are(self, service: Service) -> None:
        answer = listed(service, status="finished")

        assert "completed" in answer.json()["errors"][0]["what"]

    def test_refuses_the_cursor_of_another_list(self, service: Service) -> None:
        mine = f"crm-{new_envelope_id()}"
        for _ in range(2):
            new_envelope(service, external_id=mine)
        cursor = listed(service, external_id=mine, limit=1).json()["next_cursor"]
        assert cursor is not None

        after = "2020-01-01T00:00:00Z"
        others = (
            listed(service, cursor=cursor, q="x"),
            listed(service, cursor=cursor, updated_after=after),
            service.ask(f"/api/events?after={cursor}", TOKEN),
        )

        assert [422] * 3 == [answer.status for answer in others]

    @pytest.mark.parametrize(
        "keys",
        [
            ["yesterday", "a", "b"],
            ["2026-07-01T12:00:00Z", "a\x00", "b"],
            ["2026-07-01T12:00:00Z", "a", "\ud800"],
            ["0001-01-01T00:00:00+23:00", "a", "b"],
            ["2026-07-01T12:00:00Z", "a"],
        ],
    )
    def test_refuses_a_cursor_that_was_changed(self, service: Service, keys: list[str]) -> None:
        import base64

        text = json.dumps([1, "envelopes", *keys]).encode()

        answer = listed(service, cursor=base64.urlsafe_b64encode(text).rstrip(b"=").decode())

        assert 422 == answer.status

    def test_wants_a_token_that_may_read(self, service: Service) -> None:
        assert 401 == service.get("/api/envelopes").status
        assert 403 == listed(service, token=OPERATOR_TOKEN).status


def waiting(
    service: Service, envelope_id: str, *headers: Header, token: str = TOKEN, **query: Any
) -> Connection:
    """Ask, and do not read the answer yet; whoever reads it has less patience than 60 s."""
    connection = Connection(service.port)
    target = f"/api/envelope/{quote(envelope_id, safe='')}?{urlencode(query)}"
    connection.send(request("GET", target, authorised(token, *headers)))
    return connection


class TestWait:
    def test_ends_when_the_status_has_come(self, service: Service) -> None:
        envelope_id = new_envelope(service, event="envelope.sent")
        with waiting(service, envelope_id, wait=60, until="completed") as connection:
            new_envelope(service, envelope_id=envelope_id, event="envelope.viewed")
            new_envelope(service, envelope_id=envelope_id)
            answer = connection.read()

        assert (200, "signed") == (answer.status, answer.json()["status"])

    @pytest.mark.parametrize("end", ["envelope.declined", "envelope.voided", "envelope.expired"])
    def test_ends_with_every_other_end(self, service: Service, end: str) -> None:
        envelope_id = new_envelope(service, event="envelope.sent")
        with waiting(service, envelope_id, wait=60, until="signed") as connection:
            new_envelope(service, envelope_id=envelope_id, event=end)
            answer = connection.read()

        assert (200, end.removeprefix("envelope.")) == (answer.status, answer.json()["status"])

    @pytest.mark.parametrize("until", ["draft", "pending", "signed"])
    def test_is_none_for_what_has_come_already(self, service: Service, until: str) -> None:
        envelope_id = new_envelope(service)

        answer = service.ask(f"/api/envelope/{envelope_id}?wait=60&until={until}", TOKEN)

        assert 200 == answer.status

    def test_ends_with_the_envelope_as_it_is(self, service: Service) -> None:
        envelope_id = new_envelope(service, event="envelope.sent")

        answer = service.ask(f"/api/envelope/{envelope_id}?wait=1&until=signed", TOKEN)

        assert (200, "pending") == (answer.status, answer.json()["status"])

    def test_for_an_unknown_one_ends_when_it_appears(self, service: Service) -> None:
        envelope_id = f"a/ü '%{new_envelope_id()}"
        with waiting(service, envelope_id, wait=60) as connection:
            new_envelope(service, envelope_id=new_envelope_id())
            new_envelope(service, envelope_id=envelope_id, event="envelope.sent")
            answer = connection.read()

        assert (200, envelope_id) == (answer.status, answer.json()["envelope_id"])

    def test_for_an_unknown_one_ends_without_it(self, service: Service) -> None:
        answer = service.ask("/api/envelope/nobody?wait=1", TOKEN)

        assert 404 == answer.status
        assert answer.is_problem

    def test_for_one_of_another_account_ends_without_it(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        with waiting(service, envelope_id, token=BETA_TOKEN, wait=1) as connection:
            new_envelope(service, envelope_id=envelope_id)
            assert 404 == connection.read().status

    def test_for_a_version_ends_with_it(self, service: Service) -> None:
        envelope_id = new_envelope(service, event="envelope.sent")
        with waiting(service, envelope_id, wait=60, min_version=2) as connection:
            new_envelope(service, envelope_id=envelope_id)
            answer = connection.read()

        assert 200 == answer.status
        assert answer.json()["version"] >= 2

    @pytest.mark.parametrize("wait", [0, 1])
    def test_for_a_version_that_does_not_come_says_when_to_ask_again(
        self, service: Service, wait: int
    ) -> None:
        envelope_id = new_envelope(service)
        target = f"/api/envelope/{envelope_id}"

        missed = service.ask(f"{target}?min_version=99&wait={wait}", TOKEN)
        both = service.ask(f"{target}?min_version=99&until=signed&wait={wait}", TOKEN)
        met = service.ask(f"{target}?min_version=1&wait={wait}", TOKEN)

        assert (503, 503, 200) == (missed.status, both.status, met.status)
        assert missed.is_problem
        assert int(missed.headers["retry-after"]) > 0

    def test_with_a_known_version_ends_with_another(self, service: Service) -> None:
        envelope_id = new_envelope(service, event="envelope.sent")
        tag = service.ask(f"/api/envelope/{envelope_id}", TOKEN).headers["etag"].encode()
        with waiting(service, envelope_id, (b"If-None-Match", tag), wait=60) as connection:
            new_envelope(service, envelope_id=envelope_id)
            answer = connection.read()

        assert (200, "signed") == (answer.status, answer.json()["status"])
        assert tag.decode() != answer.headers["etag"]

    def test_with_a_known_version_ends_with_nothing(self, service: Service) -> None:
        envelope_id = new_envelope(service)
        tag = service.ask(f"/api/envelope/{envelope_id}", TOKEN).headers["etag"].encode()
        target = f"/api/envelope/{envelope_id}"

        waited = service.ask(f"{target}?wait=1", TOKEN, (b"If-None-Match", tag))
        # What was to come has come, and is known: there is nothing to wait for.
        over = service.ask(f"{target}?wait=60&until=signed", TOKEN, (b"If-None-Match", tag))

        assert [(304, b"")] * 2 == [(answer.status, answer.body) for answer in (waited, over)]

    def test_needs_an_account_if_two_have_it(self, service: Service) -> None:
        envelope_id = new_envelope(service)
        new_envelope(service, BETA_KEY, envelope_id=envelope_id)

        answer = service.ask(f"/api/envelope/{envelope_id}?wait=60&min_version=99", TOKEN)

        assert 409 == answer.status
        assert "'beta' and 'default'" in answer.json()["detail"]

    def test_has_a_tag_for_each_account(self, service: Service) -> None:
        envelope_id = new_envelope(service)
        new_envelope(service, BETA_KEY, envelope_id=envelope_id)
        target = f"/api/envelope/{envelope_id}"

        ours = service.ask(target, TOKEN, DEFAULT)
        theirs = service.ask(target, BETA_TOKEN, (b"If-None-Match", ours.headers["etag"].encode()))

        assert ours.json()["version"] == theirs.json()["version"]
        assert 200 == theirs.status
        assert ours.headers["etag"] != theirs.headers["etag"]

    @pytest.mark.parametrize(
        "query",
        [
            "wait=61",
            "wait=-1",
            "wait=x",
            "wait=1&until=done",
            "until=",
            "until=none",
            "min_version=0",
            f"min_version={2**63}",
            "min_version=x",
        ],
    )
    def test_refuses_what_cannot_be_waited_for(self, service: Service, query: str) -> None:
        assert 422 == service.ask(f"/api/envelope/env_1?{query}", TOKEN).status

    def test_misses_nothing_that_happens_at_the_same_moment(self, service: Service) -> None:
        """Each event falls somewhere between a look at the row and the wait behind it."""
        for _ in range(15):
            envelope_id = new_envelope_id()
            with waiting(service, envelope_id, wait=60, until="signed") as connection:
                new_envelope(service, envelope_id=envelope_id)
                assert "signed" == connection.read().json()["status"]


def waiters(service: Service) -> int:
    said = service.ask("/metrics", TOKEN).body.decode()
    (line,) = [line for line in said.splitlines() if line.startswith("atlas_waiters ")]
    return int(float(line.split()[1]))


class TestManyWaits:
    def test_are_refused_beyond_their_seats_and_end_with_the_service(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        settings = {"API_WAITERS": "3", "API_WAITERS_PER_TOKEN": "2", "DATABASE_URL": sqlite_url}
        with Service("serve", home=tmp_path, **settings) as service:
            envelope_id = new_envelope(service, event="envelope.sent")
            target = f"/api/envelope/{envelope_id}?wait=60&until=signed"
            query: dict[str, Any] = {"wait": 60, "until": "signed"}
            seats = [waiting(service, envelope_id, **query) for _ in range(2)]
            wait_for(lambda: waiters(service) == 2, "two who wait")

            refused = service.ask(target, TOKEN)
            seats[0].close()
            # Who hangs up leaves a seat.
            wait_for(lambda: waiters(service) == 1, "one who waits")
            again = waiting(service, envelope_id, **query)
            wait_for(lambda: waiters(service) == 2, "the one who came after")
            service.signal(signal.SIGTERM)
            answers = []
            for connection in (seats[1], again):
                with connection:
                    answers.append(connection.read())
            code = service.wait()

        assert 429 == refused.status
        assert refused.is_problem
        assert "API_WAITERS_PER_TOKEN" in refused.json()["detail"]
        assert [(200, "pending")] * 2 == [(a.status, a.json()["status"]) for a in answers]
        assert 0 == code


class TestExpect:
    def test_is_remembered_once(self, service: Service) -> None:
        target = f"/api/envelope/{quote('a/b %' + new_envelope_id(), safe='')}/expect"

        first = put(service, target, None, DEFAULT)
        again = put(service, target, {"within": 3600}, DEFAULT)

        shown = first.json()
        assert (200, 200) == (first.status, again.status)
        assert first.json() == again.json()
        assert ("default", "operator", False, None) == (
            shown["account"],
            shown["expected_by"],
            shown["seen"],
            shown["silent_at"],
        )
        assert shown["due_at"] > shown["expected_at"]

    def test_of_one_that_is_there_says_so(self, service: Service) -> None:
        envelope_id = new_envelope(service)

        answer = put(service, f"/api/envelope/{envelope_id}/expect", {}, DEFAULT)

        assert (True, None) == (answer.json()["seen"], answer.json()["due_at"])

    def test_needs_to_know_the_account(self, service: Service) -> None:
        answer = put(service, f"/api/envelope/{new_envelope_id()}/expect")

        assert 409 == answer.status
        assert "any of 'beta', 'default'" in answer.json()["detail"]

    def test_finds_the_account_that_has_it(self, service: Service) -> None:
        envelope_id = new_envelope(service, BETA_KEY)
        target = f"/api/envelope/{envelope_id}/expect"

        found = put(service, target)
        new_envelope(service, KEY, envelope_id=envelope_id)
        ambiguous = put(service, target)

        assert (200, "beta") == (found.status, found.json()["account"])
        assert 409 == ambiguous.status
        assert "'beta' and 'default' both have" in ambiguous.json()["detail"]

    def test_is_over_once_it_was_heard_of(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        target = f"/api/envelope/{envelope_id}/expect"

        before = put(service, target, None, DEFAULT).json()
        new_envelope(service, KEY, envelope_id=envelope_id)
        after = put(service, target, None, DEFAULT).json()

        assert (False, True) == (before["seen"], after["seen"])
        assert before["due_at"] is not None
        assert after["due_at"] is None

    def test_takes_no_body_that_has_no_end(self, service: Service) -> None:
        body = {"within": 3600, "because": "x" * 100_000}

        answer = put(service, "/api/envelope/env_1/expect", body, DEFAULT)

        assert (413, True) == (answer.status, answer.is_problem)

    @pytest.mark.parametrize(
        "body", [{"within": 59}, {"within": 604_801}, {"within": "soon"}, {"when": 60}, [], 7]
    )
    def test_refuses_other_times(self, service: Service, body: Any) -> None:
        assert 422 == put(service, "/api/envelope/env_1/expect", body, DEFAULT).status

    def test_is_for_operators_of_accounts_that_are_there(self, service: Service) -> None:
        target = "/api/envelope/env_1/expect"

        assert 403 == put(service, target, None, DEFAULT, token=TOKEN).status
        assert 404 == put(service, "/api/envelope/%00/expect", None, DEFAULT).status
        assert 422 == put(service, f"/api/envelope/{'x' * 256}/expect", None, DEFAULT).status


@pytest.fixture(name="managed", scope="module")
def _managed(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path
) -> Iterator[tuple[Service, Path]]:
    """A service with an archive, an operator of one account, and its folder."""
    home = tmp_path_factory.mktemp("managed")
    copy_sqlite(sqlite_template, home / "receiver.db")
    (home / "archive").mkdir()
    tokens = json.loads(SETTINGS["API_TOKENS"])
    tokens["manager"] = {
        "tokens": [MANAGER_TOKEN],
        "scopes": ["operate"],
        "accounts": ["beta"],
    }
    settings = {
        "DATABASE_URL": f"sqlite:///{home / 'receiver.db'}",
        "ARCHIVE_URL": str(home / "archive"),
        "API_TOKENS": json.dumps(tokens),
    }
    with Service("serve", home=home, **settings) as service:
        yield service, home


class TestExpectOfOneAccount:
    def test_knows_it_by_the_token(self, managed: tuple[Service, Path]) -> None:
        service, _ = managed
        target = f"/api/envelope/{new_envelope_id()}/expect"

        own = put(service, target, token=MANAGER_TOKEN)
        others = put(service, target, None, DEFAULT, token=MANAGER_TOKEN)
        nobodys = put(service, target, None, (b"Atlas-Account", b"bta"), token=MANAGER_TOKEN)

        assert (200, "beta") == (own.status, own.json()["account"])
        # Whose label it is shows nowhere, and who mistypes one expects nothing somewhere else.
        assert (404, others.json()) == (others.status, nobodys.json())

    def test_knows_a_new_one_by_the_tenant(self, managed: tuple[Service, Path]) -> None:
        service, _ = managed
        for tenant in (b"ext_org_9", b"1b4e28ba-2fa1-11d2-883f-0016d3cca427"):
            answer = put(
                service,
                f"/api/envelope/{new_envelope_id()}/expect",
                None,
                (b"Atlas-Account", tenant),
                token=MANAGER_TOKEN,
            )
            assert (200, "beta") == (answer.status, answer.json()["account"])

    def test_is_not_for_an_envelope_of_another_tenant(self, managed: tuple[Service, Path]) -> None:
        service, _ = managed
        envelope_id = new_envelope(service, BETA_KEY, organization_id="org_1")
        target = f"/api/envelope/{envelope_id}/expect"

        def ask(tenant: bytes) -> int:
            return put(
                service, target, None, (b"Atlas-Account", tenant), token=MANAGER_TOKEN
            ).status

        assert (200, 404) == (ask(b"ext_org_1"), ask(b"ext_org_2"))

    def test_leaves_a_trace_and_is_noticed(self, managed: tuple[Service, Path]) -> None:
        service, home = managed
        envelope_id = new_envelope_id()
        put(service, f"/api/envelope/{envelope_id}/expect", token=MANAGER_TOKEN)

        with closing(sqlite3.connect(home / "receiver.db", timeout=30)) as connection, connection:
            audited = connection.execute(
                "SELECT actor, action FROM audit WHERE subject = ?",
                [f"envelope:{envelope_id}"],
            ).fetchall()
            connection.execute(
                "UPDATE expectations SET due_at = created_at WHERE envelope_id = ?", [envelope_id]
            )
        line = service.line("envelope.silent", envelope_id=envelope_id)

        assert [("api:manager", "envelope.expected")] == audited
        assert ("beta", "manager") == (line["account"], line["expected_by"])
        feed = service.ask("/api/events?wait=20&type=receiver.silent", TOKEN).json()["items"]
        assert [envelope_id] == [item["envelope_id"] for item in feed]


@dataclass
class Kept:
    """One envelope whose document is in the archive."""

    service: Service
    envelope_id: str
    path: Path
    digest: str

    @property
    def target(self) -> str:
        return f"/api/envelope/{quote(self.envelope_id, safe='')}/pdf"

    def ask(self, *headers: Header, token: str = TOKEN) -> Answer:
        return self.service.ask(self.target, token, *headers)


CONTENT = PDF + b"%" * 1_500_000


@pytest.fixture(name="kept")
def _kept(managed: tuple[Service, Path]) -> Kept:
    service, home = managed
    envelope_id = new_envelope(service, envelope_id=f'é/../"; x=🖋{new_envelope_id()}')
    digest = hashlib.sha256(CONTENT).hexdigest()
    name = f"default/2026/07/{hashlib.md5(envelope_id.encode()).hexdigest()}-{digest[:16]}.pdf"  # noqa: S324  # only a name
    path = home / "archive" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    with closing(sqlite3.connect(home / "receiver.db", timeout=30)) as connection, connection:
        connection.execute(
            "UPDATE envelopes SET archived_at = updated_at, archive_name = ?, archive_sha256 = ?, "
            "archive_bytes = ? WHERE id = ?",
            [name, digest, len(CONTENT), envelope_id],
        )
    return Kept(service, envelope_id, path, digest)


class TestDocument:
    def test_is_given_as_it_was_archived(self, kept: Kept) -> None:
        answer = kept.ask()

        assert 200 == answer.status
        assert CONTENT == answer.body
        assert "application/pdf" == answer.headers["content-type"]
        assert f'"{kept.digest}"' == answer.headers["etag"]
        assert "nosniff" == answer.headers["x-content-type-options"]

    def test_has_a_name_that_leads_nowhere(self, kept: Kept) -> None:
        """Case 168: an envelope id may hold anything."""
        said = kept.ask().headers["content-disposition"]

        plain, _, encoded = said.partition("; filename*=UTF-8''")
        assert plain.startswith('attachment; filename="envelope-')
        assert plain.endswith('.pdf"')
        assert plain.isascii()
        assert encoded.isascii()
        for trap in ("/", "%2F", "%0D", "%0A", "%22", "\r", "\n"):
            assert trap not in said

    def test_is_not_sent_again(self, kept: Kept) -> None:
        answer = kept.ask((b"If-None-Match", f'"{kept.digest}"'.encode()))

        assert (304, b"") == (answer.status, answer.body)

    def test_belongs_to_its_account(self, kept: Kept) -> None:
        assert 404 == kept.ask(token=BETA_TOKEN).status

    @pytest.mark.parametrize(
        "content", [CONTENT[:-1], CONTENT + b"%", b"%" * len(CONTENT), b"", None]
    )
    def test_that_is_not_what_was_archived_is_not_given(
        self, kept: Kept, content: bytes | None
    ) -> None:
        if content is None:
            kept.path.unlink()
        else:
            kept.path.write_bytes(content)

        answer = kept.ask()

        assert 503 == answer.status
        assert answer.is_problem
        assert "retry-after" in answer.headers
        assert kept.service.line("document.unreadable", envelope_id=kept.envelope_id)

    def test_that_is_not_archived_is_not_found(self, managed: tuple[Service, Path]) -> None:
        service, _ = managed
        envelope_id = new_envelope(service)

        answer = service.ask(f"/api/envelope/{envelope_id}/pdf", TOKEN)

        assert 404 == answer.status
        assert "not archived" in answer.json()["detail"]

    def test_that_was_erased_is_gone(self, managed: tuple[Service, Path]) -> None:
        service, home = managed
        envelope_id = new_envelope(service)
        with closing(sqlite3.connect(home / "receiver.db", timeout=30)) as connection, connection:
            connection.execute(
                "UPDATE envelopes SET erased_at = updated_at WHERE id = ?", [envelope_id]
            )

        assert 410 == service.ask(f"/api/envelope/{envelope_id}/pdf", TOKEN).status


class Poller:
    """A program as the guides of Atlas have it: it knows a base URL and a token, and polls."""

    def __init__(self, base_url: str, token: str) -> None:
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {token}"}

    def _get(self, path: str, **query: str) -> Any:
        url = f"{self._base_url}{path}{'?' if query else ''}{urlencode(query)}"
        asked = urllib.request.Request(url, headers=self._headers)  # noqa: S310  # ours
        with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310  # likewise
            return json.load(answer)

    def wait_until_signed(self, envelope_id: str) -> list[str]:
        """Poll until all have signed; give the statuses that were seen."""
        seen: list[str] = []
        while not seen or seen[-1] != "signed":
            progress = self._get(f"/envelope/{envelope_id}/status")
            assert progress["signed_count"] <= progress["total"]
            assert (progress["next_signer_email"] is None) is (progress["status"] == "signed")
            seen.append(progress["status"])
            assert len(seen) < 1000
        return seen

    def read(self, envelope_id: str) -> Any:
        return self._get(f"/envelope/{envelope_id}")

    def find(self, external_id: str, status: str) -> list[str]:
        found = self._get("/envelopes", status=status, external_id=external_id)
        return [envelope["envelope_id"] for envelope in found["items"]]


class TestProgramWrittenForAtlas:
    """It runs against Atlas, and against us with base URL and token changed."""

    async def test_runs_against_atlas(self) -> None:
        async with atlas_stand_in() as atlas:
            atlas.sign("env_1", external_id="crm-1", signed_count=2, total=2)
            atlas.envelopes["env_1"] |= {"status": "pending", "signed_count": 1}
            atlas.envelopes["env_1"]["next_signer_email"] = "b@example.com"

            def sign(_: object) -> None:
                if len(atlas.asked) == 3:
                    atlas.sign("env_1", external_id="crm-1", signed_count=2, total=2)

            atlas.on_asked = sign
            await asyncio.to_thread(
                self.follow, Poller(atlas.base_url, ATLAS_KEY), "env_1", "crm-1"
            )

    def test_runs_against_us(self, service: Service) -> None:
        external_id = f"crm-{new_envelope_id()}"
        parties = [
            {"email": "a@example.com", "order": 1, "status": "signed"},
            {"email": "b@example.com", "order": 2, "status": "pending"},
        ]
        about: dict[str, Any] = {"external_id": external_id, "parties": parties}
        envelope_id = new_envelope(service, event="envelope.sent", **about)
        poller = Poller(f"http://127.0.0.1:{service.port}/api", TOKEN)
        assert [envelope_id] == poller.find(external_id, "pending")

        new_envelope(service, envelope_id=envelope_id, **about)

        self.follow(poller, envelope_id, external_id)

    def follow(self, poller: Poller, envelope_id: str, external_id: str) -> None:
        assert "signed" == poller.wait_until_signed(envelope_id)[-1]
        assert "signed" == poller.read(envelope_id)["status"]
        assert [envelope_id] == poller.find(external_id, "signed")
