"""What operators do over HTTP: look, retry, discard, pause; and the flight recorder."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest

from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Answer, Connection, Header, exchange, request
from tests.acceptance.service import BETA_KEY, KEY, Service, wait_for
from tests.acceptance.tables import rows
from tests.acceptance.test_command_line import Operator
from tests.factories import SIGN_TOKEN, SIGNER, make_body, new_envelope_id

READER = "token-canary-of-one-who-reads"
OPERATOR = "token-canary-of-one-who-acts"
BETA_OPERATOR = "token-canary-of-betas-operator"
NOBODY = "00000000-0000-7000-8000-000000000000"
CALLBACKS = '''
"""Two callbacks that refuse everything until they are mended, and one that never does."""

from pathlib import Path

from app.callbacks import Callbacks, Event, GiveUp

MENDED = Path(__file__).with_name("mended")

callbacks = Callbacks()


@callbacks.on("contract.extracted", breaker=None)
async def filing(event: Event) -> None:
    if not MENDED.exists():
        raise GiveUp("the cabinet is full")


@callbacks.on("survey.sent", breaker=None)
async def asking(event: Event) -> None:
    raise GiveUp("nobody answers")


@callbacks.on("envelope.signed")
async def onboarding(event: Event) -> None: ...
'''
TOKENS = {
    "reader": READER,
    "ada": {"tokens": [OPERATOR], "scopes": ["read", "operate"]},
    "beta-ops": {"tokens": [BETA_OPERATOR], "scopes": ["read", "operate"], "accounts": ["beta"]},
}


class Desk:
    """An operator at the API of one service."""

    def __init__(self, service: Service, database: str, home: Path) -> None:
        self.service = service
        self.database = database
        self.mended = home / "mended"

    def get(self, target: str, *headers: Header, token: str = READER) -> Answer:
        return self.service.ask(target, token, *headers)

    def post(self, target: str, token: str = OPERATOR, **said: Any) -> Answer:
        return exchange(self.service.port, self.written(target, token, **said))

    def written(self, target: str, token: str = OPERATOR, **said: Any) -> bytes:
        headers = [
            (b"Authorization", b"Bearer " + token.encode()),
            (b"Content-Type", b"application/json"),
        ]
        return request("POST", target, headers, json.dumps(said).encode() if said else b"")

    def bury(self, event: str = "contract.extracted", key: str = KEY) -> dict[str, Any]:
        """Make one dead letter, of an envelope of its own."""
        envelope_id = new_envelope_id()
        body = make_body(event=event, envelope_id=envelope_id)
        assert 200 == self.service.record(body, key).status
        return self.delivery_of(envelope_id, "dead")

    def delivery_of(self, envelope_id: str, state: str) -> dict[str, Any]:
        target = f"/api/deliveries?envelope_id={envelope_id}&state={state}"
        wait_for(lambda: bool(self.get(target).json()["items"]), f"{envelope_id} is {state}")
        found: dict[str, Any] = self.get(target).json()["items"][0]
        return found

    def acts(self, subject: str) -> list[tuple[Any, ...]]:
        query = "SELECT actor, action, details FROM audit WHERE subject = $1 ORDER BY id"
        found = rows(self.database, query, subject)
        return [(actor, action, json.loads(details)) for actor, action, details in found]

    def cause(self, callback: str) -> dict[str, Any]:
        [found] = self.get(f"/api/failures?callback={callback}").json()["items"]
        return dict(found)


@pytest.fixture(name="desk", scope="module")
def _desk(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    home = tmp_path_factory.mktemp("desk")
    (home / "desk_callbacks.py").write_text(CALLBACKS)
    settings = {
        "DATABASE_URL": with_password(database),
        "CALLBACKS": "desk_callbacks:callbacks",
        "PYTHONPATH": str(home),
        "API_TOKENS": json.dumps(TOKENS),
    }
    with Service("serve", home=home, **settings) as service:
        service.wait_until_known("asking", "filing", "onboarding")
        yield Desk(service, database, home)


def account(label: str) -> Header:
    return b"Atlas-Account", label.encode()


@contextmanager
def held(database: str, delivery_id: str) -> Iterator[None]:
    """Hold a delivery as one who works on it does, and let it go unchanged."""
    if database.startswith("sqlite:///"):
        path = database.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield
        return
    with asyncio.Runner() as runner:
        settings = {"search_path": "atlas_receiver"}
        connecting = asyncpg.connect(database, timeout=30, server_settings=settings)
        holder = runner.run(connecting)
        runner.run(holder.execute("BEGIN"))
        query = "SELECT 1 FROM deliveries WHERE id = $1::text::uuid FOR UPDATE"
        assert 1 == runner.run(holder.fetchval(query, delivery_id))
        yield
        runner.run(holder.execute("ROLLBACK"))
        runner.run(holder.close())


def lines(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.body.splitlines()]


class TestDeliveries:
    def test_are_listed_newest_first_page_by_page(self, desk: Desk) -> None:
        made = [desk.bury()["id"] for _ in range(3)]

        first = desk.get("/api/deliveries?state=dead&limit=2").json()
        rest = desk.get(f"/api/deliveries?state=dead&limit=100&cursor={first['next_cursor']}")

        listed = [item["id"] for item in [*first["items"], *rest.json()["items"]]]
        assert made[::-1] == [id_ for id_ in listed if id_ in made]
        assert sorted(listed, reverse=True) == listed
        assert 2 == len(first["items"])

    def test_are_found_by_callback_envelope_and_account(self, desk: Desk) -> None:
        delivery = desk.bury(key=BETA_KEY)
        filters = f"callback=filing&envelope_id={delivery['envelope_id']}&state=dead"

        seen = desk.get(f"/api/deliveries?{filters}", account("beta")).json()
        hidden = desk.get(f"/api/deliveries?{filters}", account("default")).json()

        assert [delivery["id"]] == [item["id"] for item in seen["items"]]
        assert ([], None) == (hidden["items"], hidden["next_cursor"])

    def test_show_every_attempt_and_act(self, desk: Desk) -> None:
        delivery = desk.bury()

        shown = desk.get(f"/api/deliveries/{delivery['id']}").json()

        assert ("dead", "filing", 1, []) == (
            shown["state"],
            shown["callback"],
            shown["tries"][0]["number"],
            shown["acts"],
        )
        assert "the cabinet is full" in shown["tries"][0]["error"]

    def test_are_retried_and_that_is_written_down(self, desk: Desk) -> None:
        delivery = desk.bury()

        answer = desk.post(f"/api/deliveries/{delivery['id']}/retry")

        assert 200 == answer.status
        assert ["delivery.retried"] == [act["action"] for act in answer.json()["acts"]]
        details = {"from_state": "dead", "attempts": 1, "reason": None}
        assert [("api:ada", "delivery.retried", details)] == desk.acts(f"delivery:{delivery['id']}")
        desk.delivery_of(delivery["envelope_id"], "dead")

    def test_are_discarded_for_a_reason_that_is_kept(self, desk: Desk) -> None:
        delivery = desk.bury()

        answer = desk.post(f"/api/deliveries/{delivery['id']}/discard", reason=" by hand ")
        again = desk.post(f"/api/deliveries/{delivery['id']}/discard", reason="by hand")

        assert (200, "discarded") == (answer.status, answer.json()["state"])
        assert 409 == again.status
        assert "is discarded already" in again.json()["detail"]
        [(actor, action, details)] = desk.acts(f"delivery:{delivery['id']}")
        assert ("api:ada", "delivery.discarded") == (actor, action)
        assert "by hand" == details["reason"]

    def test_that_somebody_holds_are_refused_and_not_waited_for(self, desk: Desk) -> None:
        delivery = desk.bury()
        target = f"/api/deliveries/{delivery['id']}"

        with held(desk.database, delivery["id"]):
            retried = desk.post(f"{target}/retry")
            discarded = desk.post(f"{target}/discard", reason="by hand")
            looked = desk.get(target)

        assert [503, 503, 200] == [each.status for each in (retried, discarded, looked)]
        assert all(
            each.is_problem and "retry-after" in each.headers for each in (retried, discarded)
        )
        if not desk.database.startswith("sqlite"):
            assert "Somebody else is just changing" in discarded.json()["detail"]
        assert [] == desk.acts(f"delivery:{delivery['id']}")
        assert 200 == desk.post(f"{target}/discard", reason="by hand").status

    def test_that_are_done_are_refused(self, desk: Desk) -> None:
        envelope_id = new_envelope_id()
        desk.service.deliver(make_body(envelope_id=envelope_id), KEY)
        delivery = desk.delivery_of(envelope_id, "done")

        answer = desk.post(f"/api/deliveries/{delivery['id']}/retry")

        assert 409 == answer.status
        assert answer.is_problem
        assert "events redispatch" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "said",
        [
            pytest.param({}, id="none"),
            pytest.param({"reason": ""}, id="empty"),
            pytest.param({"reason": "  "}, id="blank"),
            pytest.param({"reason": "x" * 501}, id="long"),
            pytest.param({"reason": "a\x00b"}, id="nul"),
            pytest.param({"reason": "\ud800"}, id="surrogate"),
            pytest.param({"reason": 17}, id="number"),
            pytest.param({"reason": "x", "why": "y"}, id="unknown-field"),
        ],
    )
    def test_are_not_discarded_without_a_reason(self, desk: Desk, said: dict[str, Any]) -> None:
        answer = desk.post(f"/api/deliveries/{NOBODY}/discard", **said)

        assert 422 == answer.status
        assert answer.is_problem

    def test_take_no_reason_that_has_no_end(self, desk: Desk) -> None:
        answer = desk.post(f"/api/deliveries/{NOBODY}/discard", reason="x" * 100_000)

        assert (413, True) == (answer.status, answer.is_problem)

    def test_of_another_account_are_not_there(self, desk: Desk) -> None:
        delivery = desk.bury()
        target = f"/api/deliveries/{delivery['id']}"

        looked = desk.get(target, token=BETA_OPERATOR)
        retried = desk.post(f"{target}/retry", BETA_OPERATOR)
        discarded = desk.post(f"{target}/discard", BETA_OPERATOR, reason="x")
        listed = desk.get("/api/deliveries?limit=100", token=BETA_OPERATOR).json()

        assert [404, 404, 404] == [each.status for each in (looked, retried, discarded)]
        assert {"beta"} >= {item["account"] for item in listed["items"]}
        assert [] == desk.acts(f"delivery:{delivery['id']}")

    @pytest.mark.parametrize(
        "target, status, words",
        [
            ("/api/deliveries/7", 404, "is not the id of a delivery: that is a UUID"),
            (f"/api/deliveries/{NOBODY}", 404, "there is no delivery"),
            ("/api/deliveries/%00", 404, "is not the id of a delivery"),
            (f"/api/deliveries/{'x' * 10_000}", 422, ""),
            ("/api/deliveries?callback=nobody", 404, "registered: asking, filing, onboarding"),
            ("/api/deliveries?callback=%00", 404, "NUL"),
            ("/api/deliveries?envelope_id=%00", 404, "NUL"),
            (f"/api/deliveries?envelope_id={'x' * 10_000}", 422, ""),
            ("/api/deliveries?state=lost", 422, ""),
            ("/api/deliveries?limit=101", 422, ""),
            ("/api/deliveries?cursor=wrong", 422, "a cursor is what an earlier answer gave"),
            ("/api/deliveries?cursor=WzEsImRlbGl2ZXJpZXMiLCJ4Il0", 422, "was changed"),
        ],
    )
    def test_that_cannot_be_are_answered(
        self, desk: Desk, target: str, status: int, words: str
    ) -> None:
        answer = desk.get(target)

        assert status == answer.status, answer.body
        assert answer.is_problem
        assert words in answer.json()["detail"]


class TestFailures:
    def test_are_listed_by_cause(self, desk: Desk) -> None:
        died = [desk.bury("survey.sent") for _ in range(2)]

        found = desk.cause("asking")

        assert ("asking", "survey.sent", died[-1]["id"]) == (
            found["callback"],
            found["event_type"],
            found["delivery_id"],
        )
        assert found["count"] >= 2
        assert died[0]["fingerprint"] == found["fingerprint"]
        assert "nobody answers" in found["error"]

    def test_are_retried_line_by_line_until_each_was_tried(self, desk: Desk) -> None:
        desk.bury()
        cause = desk.cause("filing")
        desk.mended.touch()
        try:
            answer = desk.post(f"/api/failures/{cause['fingerprint']}/retry?rate=1000")
        finally:
            desk.mended.unlink()

        told = lines(answer)
        last = told[-1]
        assert (200, "application/x-ndjson") == (answer.status, answer.headers["content-type"])
        assert [False] * (len(told) - 1) + [True] == [line["is_last"] for line in told]
        assert cause["count"] == last["total"] == last["retried"] == last["done"]
        assert (0, None) == (last["waiting"], last["stopped"])
        [begun, ended] = desk.acts(f"failure:{cause['fingerprint']}")[-2:]
        assert ("api:ada", "failures.retried") == begun[:2]
        assert ("api:ada", "failures.retry_ended") == ended[:2]

    def test_are_retried_no_further_once_the_reader_is_gone(self, desk: Desk) -> None:
        for _ in range(3):
            desk.bury("survey.sent")
        subject = f"failure:{desk.cause('asking')['fingerprint']}"

        with Connection(desk.service.port) as connection:
            fingerprint = desk.cause("asking")["fingerprint"]
            connection.send(desk.written(f"/api/failures/{fingerprint}/retry?rate=0.01"))
            assert b"200" in connection._read_until(b"\r\n\r\n")
            connection._read_until(b"\n")
        wait_for(
            lambda: desk.acts(subject)[-1][1] == "failures.retry_ended", "the end is written down"
        )

        [(_, _, details)] = desk.acts(subject)[-1:]
        assert "interrupted" == details["stopped"]
        assert details["retried"] <= 1

    def test_that_a_pause_holds_stop_at_once_and_say_so(self, desk: Desk) -> None:
        desk.bury("survey.sent")
        fingerprint = desk.cause("asking")["fingerprint"]
        assert 200 == desk.post("/api/callbacks/asking/pause", reason="a test").status
        try:
            told = lines(desk.post(f"/api/failures/{fingerprint}/retry"))
        finally:
            desk.post("/api/callbacks/asking/resume")

        assert told[-1]["is_last"]
        assert "callback 'asking' is paused" in told[-1]["stopped"]
        assert 0 == told[-1]["retried"]

    def test_of_other_accounts_are_neither_counted_nor_discarded(self, desk: Desk) -> None:
        mine, theirs = desk.bury("survey.sent"), desk.bury("survey.sent", BETA_KEY)
        counted = desk.get("/api/failures?callback=asking", token=BETA_OPERATOR).json()["items"]
        fingerprint = counted[0]["fingerprint"]

        answer = desk.post(f"/api/failures/{fingerprint}/discard", BETA_OPERATOR, reason="x")
        again = desk.post(f"/api/failures/{fingerprint}/discard", BETA_OPERATOR, reason="x")
        retried = desk.post(f"/api/failures/{fingerprint}/retry", BETA_OPERATOR)

        assert (theirs["id"], 1) == (counted[0]["delivery_id"], counted[0]["count"])
        assert (200, {"discarded": 1}) == (answer.status, answer.json())
        assert [404, 404] == [again.status, retried.status]
        assert "dead" == desk.get(f"/api/deliveries/{mine['id']}").json()["state"]
        assert "api:beta-ops" == desk.acts(f"failure:{fingerprint}")[-1][0]

    def test_without_a_fingerprint_are_named_by_their_callback(self, desk: Desk) -> None:
        assert 404 == desk.post("/api/failures/-/retry?callback=filing").status
        assert 404 == desk.post("/api/failures/-/discard?callback=filing", reason="x").status
        for target in ("/api/failures/-/retry", "/api/failures/feed/retry?callback=filing"):
            answer = desk.post(target)
            assert (422, True) == (answer.status, answer.is_problem)

    @pytest.mark.parametrize(
        "target, status",
        [
            ("/api/failures/feed/retry", 404),
            ("/api/failures/%00/retry", 404),
            ("/api/failures/-/retry?callback=%00", 404),
            (f"/api/failures/{'x' * 10_000}/retry", 422),
            ("/api/failures/feed/retry?rate=0", 422),
            ("/api/failures/feed/retry?rate=nan", 422),
            ("/api/failures/feed/retry?rate=inf", 422),
        ],
    )
    def test_that_cannot_be_are_answered(self, desk: Desk, target: str, status: int) -> None:
        answer = desk.post(target)

        assert (status, True) == (answer.status, answer.is_problem)


class TestCallbacks:
    def test_are_listed_with_what_is_owed(self, desk: Desk) -> None:
        desk.bury("survey.sent")

        listed = {each["name"]: each for each in desk.get("/api/callbacks").json()["items"]}

        assert ["asking", "filing", "onboarding"] == sorted(listed)
        assert listed["asking"]["is_served"]
        assert listed["asking"]["counts"]["dead"] >= 1
        assert ["survey.sent"] == listed["asking"]["patterns"]

    def test_are_paused_for_a_reason_and_resumed(self, desk: Desk) -> None:
        paused = desk.post("/api/callbacks/onboarding/pause", reason="CRM is moving").json()
        again = desk.post("/api/callbacks/onboarding/pause", reason="still").json()
        resumed = desk.post("/api/callbacks/%6Fnboarding/resume").json()

        assert (True, "CRM is moving") == (
            paused["is_changed"],
            paused["callback"]["pause_reason"],
        )
        assert (False, True) == (again["is_changed"], resumed["is_changed"])
        assert resumed["callback"]["paused_at"] is None
        assert ["callback.paused", "callback.resumed"] == [
            action for actor, action, _ in desk.acts("callback:onboarding") if actor == "api:ada"
        ]

    def test_are_held_only_by_who_may_act_for_all_accounts(self, desk: Desk) -> None:
        looked = desk.get("/api/callbacks", token=BETA_OPERATOR)
        for act, said in (("pause", {"reason": "x"}), ("resume", {})):
            answer = desk.post(f"/api/callbacks/onboarding/{act}", BETA_OPERATOR, **said)
            assert 403 == answer.status
            assert "shared by all accounts" in answer.json()["detail"]

        assert 200 == looked.status

    @pytest.mark.parametrize("name, status", [("%00", 404), ("a%2Fb", 404), ("x" * 10_000, 422)])
    def test_that_cannot_be_are_answered(self, desk: Desk, name: str, status: int) -> None:
        paused = desk.post(f"/api/callbacks/{name}/pause", reason="x")
        resumed = desk.post(f"/api/callbacks/{name}/resume")

        assert [status, status] == [paused.status, resumed.status]
        assert paused.is_problem


class TestExplain:
    def test_tells_everything_in_order(self, desk: Desk) -> None:
        delivery = desk.bury()
        body = make_body(event="envelope.sent", envelope_id=delivery["envelope_id"])
        for _ in range(2):
            desk.service.deliver(body, KEY)
        desk.post(f"/api/deliveries/{delivery['id']}/discard", reason="by hand")

        answer = desk.get(f"/api/envelope/{delivery['envelope_id']}/explain")

        story = answer.json()
        told = [item["kind"] for item in story["items"]]
        assert 200 == answer.status
        assert ["event", "delivery", "attempt", "event", "copies", "act"] == [
            item["kind"] for item in story["items"] if not item.get("type", "").startswith("rec")
        ], told
        times = [item["at"] for item in story["items"]]
        assert sorted(times) == times
        assert ("pending", False, None) == (
            story["envelope"]["status"],
            story["envelope"]["disputed"],
            story["next_cursor"],
        )
        assert all(item["summary"].endswith(".") for item in story["items"])
        for secret in (SIGNER, SIGN_TOKEN):
            assert secret.encode() not in answer.body

    def test_goes_on_behind_a_page(self, desk: Desk) -> None:
        envelope_id = new_envelope_id()
        for event in ("envelope.sent", "envelope.viewed", "envelope.signed"):
            desk.service.deliver(make_body(event=event, envelope_id=envelope_id), KEY)
        target = f"/api/envelope/{envelope_id}/explain?limit=2"

        first = desk.get(target).json()
        rest = desk.get(f"{target}&cursor={first['next_cursor']}").json()

        types = [item["type"] for item in [*first["items"], *rest["items"]] if "type" in item]
        assert ["envelope.sent", "envelope.viewed", "envelope.signed"] == types
        assert rest["next_cursor"] is None

    def test_takes_an_id_with_a_slash(self, desk: Desk) -> None:
        envelope_id = f"{new_envelope_id()}/explain"
        desk.service.deliver(make_body(envelope_id=envelope_id), KEY)

        story = desk.get(f"/api/envelope/{quote(envelope_id, safe='')}/explain").json()

        assert envelope_id == story["envelope_id"]

    def test_is_of_what_may_be_seen(self, desk: Desk) -> None:
        envelope_id = new_envelope_id()
        target = f"/api/envelope/{envelope_id}/explain"
        desk.service.deliver(make_body(envelope_id=envelope_id), KEY)

        hidden = desk.get(target, token=BETA_OPERATOR)
        desk.service.deliver(make_body(envelope_id=envelope_id), BETA_KEY)
        ambiguous = desk.get(target)
        narrowed = desk.get(target, account("beta"))

        assert [404, 409, 200] == [each.status for each in (hidden, ambiguous, narrowed)]
        assert "'beta' and 'default'" in ambiguous.json()["detail"]
        assert "beta" == narrowed.json()["account"]

    @pytest.mark.parametrize(
        "target, status",
        [
            ("/api/envelope/nowhere/explain", 404),
            ("/api/envelope/%00/explain", 404),
            (f"/api/envelope/{'x' * 10_000}/explain", 422),
            ("/api/envelope/nowhere/explain?cursor=x", 422),
            ("/api/envelope/nowhere/explain?cursor=WzEsImV4cGxhaW4iLCJ4Il0", 422),
            ("/api/envelope/nowhere/explain?limit=501", 422),
        ],
    )
    def test_of_what_cannot_be_is_answered(self, desk: Desk, target: str, status: int) -> None:
        answer = desk.get(target)

        assert (status, True) == (answer.status, answer.is_problem)

    def test_is_a_verb_too(
        self, desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        envelope_id = new_envelope_id()
        desk.service.deliver(make_body(envelope_id=envelope_id), KEY)
        operator = Operator(desk.service, capsys, monkeypatch)

        told = operator.say("events", "explain", envelope_id)
        written = operator.say("events", "explain", envelope_id, "--json")
        nowhere = operator.say("events", "explain", "nowhere", "--account", "beta")

        assert 0 == told.code, told.err
        assert "envelope.signed changed the envelope; it is signed (version 1)." in told.out
        story = json.loads(written.out)
        assert (envelope_id, True) == (story["envelope_id"], story["is_complete"])
        assert "event" == story["items"][0]["kind"]
        assert (2, "error: There is no envelope nowhere here.\n") == (nowhere.code, nowhere.err)

    def test_as_a_verb_says_that_there_is_more(
        self, desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        envelope_id = new_envelope_id()
        for event in ("envelope.sent", "envelope.signed"):
            desk.service.deliver(make_body(event=event, envelope_id=envelope_id), KEY)

        told = Operator(desk.service, capsys, monkeypatch).say(
            "events", "explain", envelope_id, "--limit", "1"
        )

        assert "there is more" in told.err


def test_a_retry_ends_with_the_service(sqlite_url: str, tmp_path: Path) -> None:
    """What is long must not outlive the process, and says that it was cut off."""
    (tmp_path / "ending_callbacks.py").write_text(CALLBACKS)
    settings = {
        "DATABASE_URL": sqlite_url,
        "CALLBACKS": "ending_callbacks:callbacks",
        "PYTHONPATH": str(tmp_path),
        "API_TOKENS": json.dumps(TOKENS),
    }
    with Service("serve", home=tmp_path, **settings) as service:
        desk = Desk(service, sqlite_url, tmp_path)
        for _ in range(2):
            desk.bury("survey.sent")
        fingerprint = desk.cause("asking")["fingerprint"]
        with Connection(service.port) as connection:
            connection.send(desk.written(f"/api/failures/{fingerprint}/retry?rate=0.01"))
            connection._read_until(b"\n{")
            began = time.monotonic()
            service.signal()
            assert 0 == service.wait()

        assert time.monotonic() - began < 20
        actor, action, details = desk.acts(f"failure:{fingerprint}")[-1]
        assert ("api:ada", "failures.retry_ended") == (actor, action)
        assert "interrupted" == details["stopped"]
