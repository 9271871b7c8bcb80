"""The door, driven as the ASGI application that it is: refusals come before any work."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import structlog

from app.errors import NotDurable
from app.events.signature import Key, KeyRing, default_label, fingerprint_of
from app.intake import OnAnswer, Outcome, Receipt
from app.web import webhooks
from app.web.webhooks import Door, DoorLimits
from tests.factories import make_body, signature, signed

SECRET = b"atlas_live_0123456789abcdef"
OTHER = b"atlas_live_fedcba9876543210"
EVENT_ID = UUID(int=1)
LIMIT = 200_000

Headers = Sequence[tuple[bytes, bytes]]


def make_key(secret: bytes, account: str = "default", not_after: datetime | None = None) -> Key:
    return Key(account, secret, default_label(secret), fingerprint_of(secret), not_after)


@dataclass
class Recorder:
    """Stands where intake does; only here a test can see that nobody came that far."""

    refusal: NotDurable | RuntimeError | None = None
    bodies: list[bytes] = field(default_factory=list)
    accounts: list[str] = field(default_factory=list)

    async def record(self, body: bytes, *, account: str, key_label: str) -> Receipt:
        self.bodies.append(body)
        self.accounts.append(account)
        assert key_label
        if self.refusal is not None:
            raise self.refusal
        return Receipt(Outcome.RECORDED, EVENT_ID)

    def submit(self, body: bytes, *, account: str, key_label: str, on_answer: OnAnswer) -> None:
        """The same for the quick way; it is noted by the slow one."""
        assert body
        assert account
        assert key_label
        if self.refusal is None:
            on_answer(Receipt(Outcome.RECORDED, EVENT_ID))
        elif isinstance(self.refusal, NotDurable) and self.refusal.reason != "queue_full":
            on_answer(self.refusal)
        else:
            raise self.refusal


@dataclass
class Answer:
    status: int | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Sender:
    """One connection to a door: sends messages, counts how many were asked for."""

    door: Door
    asked: int = 0

    async def send(
        self,
        headers: Headers,
        *chunks: bytes,
        method: str = "POST",
        path: str = "/webhooks/atlas",
        is_complete: bool = True,
        then: str | None = None,
    ) -> Answer:
        """Send a body in chunks; `then` disconnects or stalls after the last."""
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks
        ]
        if is_complete and messages:
            messages[-1]["more_body"] = False
        if then == "disconnect":
            messages.append({"type": "http.disconnect"})

        async def receive() -> dict[str, Any]:
            self.asked += 1
            if messages:
                return messages.pop(0)
            await asyncio.Event().wait()
            raise AssertionError

        answer = Answer()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], dict(message["headers"])
            else:
                answer.body += message["body"]

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.lower(), value) for name, value in headers],
        }
        await self.door(scope, receive, send)
        if is_complete and len(chunks) == 1 and then is None:
            assert answer == await self._at_once(scope, chunks[0])
        return answer

    async def _at_once(self, scope: dict[str, Any], body: bytes) -> Answer:
        """The same request by the quick way, which has to say the same."""
        said: asyncio.Future[webhooks.Answer] = asyncio.get_running_loop().create_future()
        self.door.take(scope, body, said.set_result)
        answer = await said
        length = (b"content-length", str(len(answer.body)).encode())
        return Answer(answer.status, dict([length, *answer.headers]), answer.body)


@pytest.fixture(name="recorder")
def _recorder() -> Recorder:
    return Recorder()


@pytest.fixture(name="matches")
def _matches() -> list[Key]:
    return []


@pytest.fixture(name="sender")
def _sender(recorder: Recorder, matches: list[Key]) -> Sender:
    keyring = KeyRing([make_key(SECRET), make_key(OTHER, "beta")])
    limits = DoorLimits(body_bytes=LIMIT, body_time=timedelta(milliseconds=50))
    return Sender(
        Door(keyring, recorder, on_match=lambda key, _: matches.append(key), limits=limits)
    )


def lengths(*values: bytes) -> Iterable[tuple[bytes, bytes]]:
    return [(b"content-length", value) for value in values]


class TestGenuineBody:
    @pytest.mark.parametrize(
        "pieces", [1, 2, 7], ids=["in-one-piece", "in-two-pieces", "in-seven-pieces"]
    )
    async def test_is_recorded_as_it_came(
        self, sender: Sender, recorder: Recorder, pieces: int
    ) -> None:
        body = make_body()
        size = -(-len(body) // pieces)
        chunks = [body[start : start + size] for start in range(0, len(body), size)]

        answer = await sender.send([signed(body, SECRET)], *chunks)

        assert 200 == answer.status
        assert {"outcome": "recorded", "event_id": str(EVENT_ID)} == json.loads(answer.body)
        assert b"application/json" == answer.headers[b"content-type"]
        assert str(len(answer.body)).encode() == answer.headers[b"content-length"]
        assert [body] == recorder.bodies
        assert isinstance(recorder.bodies[0], bytes)

    async def test_may_end_with_an_empty_piece(self, sender: Sender, recorder: Recorder) -> None:
        body = make_body()

        await sender.send([signed(body, SECRET)], body, b"")

        assert [body] == recorder.bodies

    async def test_that_is_large_is_recorded_too(self, sender: Sender, recorder: Recorder) -> None:
        """Its digest is taken in a thread."""
        body = make_body(metadata={"text": "x" * 100_000})

        assert 200 == (await sender.send([signed(body, SECRET)], body)).status
        assert [body] == recorder.bodies

    async def test_tells_which_key_proved_it(self, sender: Sender, matches: list[Key]) -> None:
        body = make_body()

        await sender.send([signed(body, OTHER)], body)

        assert {default_label(OTHER)} == {key.label for key in matches}

    async def test_belongs_to_the_account_of_its_key(
        self, sender: Sender, recorder: Recorder
    ) -> None:
        body = make_body()

        await sender.send([signed(body, OTHER)], body)

        assert ["beta"] == recorder.accounts


class TestRefusalByTheHead:
    @pytest.mark.parametrize(
        "status, headers, method",
        [
            pytest.param(401, [], "POST", id="no-signature"),
            pytest.param(401, [(b"x-atlas-signature", b"sha256=")], "POST", id="prefix-only"),
            pytest.param(401, [(b"x_atlas_signature", b"sha256=" + b"0" * 64)], "POST", id="x_"),
            pytest.param(405, [signed(b"{}", SECRET)], "GET", id="get"),
            pytest.param(405, [signed(b"{}", SECRET)], "PUT", id="put"),
            pytest.param(
                415,
                [signed(b"{}", SECRET), (b"content-encoding", b"gzip")],
                "POST",
                id="encoded",
            ),
            pytest.param(
                413, [signed(b"{}", SECRET), *lengths(b"200001")], "POST", id="declared-too-large"
            ),
            pytest.param(
                400, [signed(b"{}", SECRET), *lengths(b"+2")], "POST", id="length-with-sign"
            ),
            pytest.param(
                400, [signed(b"{}", SECRET), *lengths(b"9" * 30)], "POST", id="length-without-end"
            ),
        ],
    )
    async def test_never_reads_the_body(
        self, sender: Sender, recorder: Recorder, status: int, headers: Headers, method: str
    ) -> None:
        answer = await sender.send(headers, b"{}", method=method)

        assert status == answer.status
        assert status == json.loads(answer.body)["status"]
        assert b"application/problem+json" == answer.headers[b"content-type"]
        assert 0 == sender.asked
        assert [] == recorder.bodies

    async def test_of_a_method_names_the_right_one(self, sender: Sender) -> None:
        answer = await sender.send([], method="DELETE")

        assert b"POST" == answer.headers[b"allow"]

    @pytest.mark.parametrize("coding", [b"identity", b"Identity ", b""])
    async def test_does_not_fall_on_a_coding_that_is_none(
        self, sender: Sender, coding: bytes
    ) -> None:
        body = make_body()
        headers = [signed(body, SECRET), (b"content-encoding", coding)]

        assert 200 == (await sender.send(headers, body)).status


class TestRefusalByTheBody:
    async def test_of_a_wrong_signature_looks_like_any_other(
        self, sender: Sender, recorder: Recorder, matches: list[Key]
    ) -> None:
        body = make_body()
        absent = await sender.send([], body)

        wrong = await sender.send([signed(body + b" ", SECRET)], body)

        assert absent == wrong
        assert 401 == wrong.status
        assert [] == recorder.bodies
        assert [] == matches

    async def test_of_an_unknown_account_looks_like_that_of_a_known_one(
        self, sender: Sender
    ) -> None:
        body = make_body()

        known = await sender.send([signed(body, OTHER)], body, path="/webhooks/atlas/default")
        unknown = await sender.send([signed(body, OTHER)], body, path="/webhooks/atlas/nobody")

        assert known == unknown
        assert 401 == known.status

    async def test_comes_as_soon_as_it_is_too_large(self, sender: Sender) -> None:
        piece = b"x" * (LIMIT // 4)

        answer = await sender.send([signed(b"", SECRET)], *[piece] * 100)

        assert 413 == answer.status
        assert 5 == sender.asked

    @pytest.mark.parametrize("size, status", [(LIMIT - 1, 200), (LIMIT, 200), (LIMIT + 1, 413)])
    @pytest.mark.parametrize("pieces", [1, 2])
    async def test_allows_exactly_the_limit(
        self, sender: Sender, size: int, status: int, pieces: int
    ) -> None:
        body = b"x" * size
        chunks = [body] if pieces == 1 else [body[:1000], body[1000:]]

        assert status == (await sender.send([signed(body, SECRET)], *chunks)).status

    @pytest.mark.parametrize("declared", [b"1", b"3"])
    async def test_of_another_length_than_declared(
        self, sender: Sender, recorder: Recorder, declared: bytes
    ) -> None:
        answer = await sender.send([signed(b"{}", SECRET), *lengths(declared)], b"{}")

        assert 400 == answer.status
        assert [] == recorder.bodies

    @pytest.mark.parametrize("chunks", [[], [b"{"], [b"{", b'"'] * 3])
    async def test_that_does_not_arrive(
        self, sender: Sender, recorder: Recorder, chunks: list[bytes]
    ) -> None:
        """One deadline for all of it: a sender that trickles gets no time on top."""
        async with asyncio.timeout(20):
            answer = await sender.send([signed(b"{}", SECRET)], *chunks, is_complete=False)

        assert 400 == answer.status
        assert b"close" == answer.headers[b"connection"]
        assert [] == recorder.bodies

    @pytest.mark.parametrize("chunks", [[], [b"{"], [b"{", b'"']])
    async def test_is_not_for_a_sender_that_went_away(
        self, sender: Sender, recorder: Recorder, chunks: list[bytes]
    ) -> None:
        answer = await sender.send(
            [signed(b"{}", SECRET)], *chunks, is_complete=False, then="disconnect"
        )

        assert answer.status is None
        assert [] == recorder.bodies


class TestNotDurable:
    @pytest.mark.parametrize(
        "after, seconds", [(timedelta(seconds=5), b"5"), (timedelta(milliseconds=10), b"1")]
    )
    async def test_asks_for_another_try(
        self, sender: Sender, recorder: Recorder, after: timedelta, seconds: bytes
    ) -> None:
        body = make_body()
        recorder.refusal = NotDurable("queue_full", retry_after=after)

        answer = await sender.send([signed(body, SECRET)], body)

        assert 503 == answer.status
        assert seconds == answer.headers[b"retry-after"]
        assert 503 == json.loads(answer.body)["status"]
        assert b"queue_full" not in answer.body


class TestADefect:
    async def test_behind_the_door_is_no_acknowledgement(
        self, sender: Sender, recorder: Recorder
    ) -> None:
        """The event may be lost; whoever sent it has to send it again."""
        recorder.refusal = RuntimeError("nobody thought of that")
        body = make_body()

        with structlog.testing.capture_logs() as lines:
            answer = await sender.send([signed(body, SECRET)], body)

        assert 503 == answer.status
        assert b"nobody" not in answer.body
        failed = [line for line in lines if line["event"] == "webhook.failed"]
        # Once on each of the two ways.
        assert ["RuntimeError"] * 2 == [line["error"] for line in failed]


class TestBodiesInPieces:
    async def test_hold_no_more_together_than_they_may(self, recorder: Recorder) -> None:
        limits = DoorLimits(body_time=timedelta(seconds=2), pending_bytes=1000)
        door = Door(KeyRing([make_key(SECRET)]), recorder, on_match=lambda *_: None, limits=limits)
        body = make_body(metadata={"text": "x" * 500})
        headers = [signed(body, SECRET)]

        held = asyncio.create_task(Sender(door).send(headers, b"x" * 900, is_complete=False))
        await asyncio.sleep(0)
        refused = await Sender(door).send(headers, body[:300], body[300:])
        whole = await Sender(door).send(headers, body)
        await held
        then = await Sender(door).send(headers, body[:300], body[300:])

        assert (503, 200, 200) == (refused.status, whole.status, then.status)
        assert int(refused.headers[b"retry-after"]) > 0
        assert 0 == door._held


class TestPath:
    @pytest.mark.parametrize(
        "path",
        [
            "/webhooks/atlas",
            "/webhooks/atlas/",
            "/webhooks/atlas/acme",
            "/webhooks/atlas/acme/",
            "/webhooks/atlas/nobody",
        ],
    )
    def test_leads_here(self, sender: Sender, path: str) -> None:
        assert sender.door.is_at(path)

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "",
            "/webhooks",
            "/webhooks/atlases",
            "/webhooks/atlas//",
            "//webhooks/atlas",
            "/webhooks//atlas",
            "/webhooks/atlas/acme/more",
            "/webhooks/atlas//acme",
            "/Webhooks/Atlas",
            "/api/webhooks/atlas",
        ],
    )
    def test_leads_elsewhere(self, sender: Sender, path: str) -> None:
        assert not sender.door.is_at(path)

    @pytest.mark.parametrize("path", ["/webhooks/atlas/beta", "/webhooks/atlas/beta/"])
    async def test_names_the_account_whose_keys_count(
        self, sender: Sender, recorder: Recorder, path: str
    ) -> None:
        body = make_body()

        theirs = await sender.send([signed(body, OTHER)], body, path=path)
        ours = await sender.send([signed(body, SECRET)], body, path=path)

        assert (200, 401) == (theirs.status, ours.status)
        assert ["beta"] == recorder.accounts


class TestRotation:
    async def test_ends_when_the_old_key_does(self, recorder: Recorder) -> None:
        body = make_body()
        past = datetime.now(UTC) - timedelta(seconds=1)
        keyring = KeyRing([make_key(SECRET), make_key(OTHER, not_after=past)])
        sender = Sender(Door(keyring, recorder, on_match=lambda *_: None))

        new = await sender.send([signed(body, SECRET)], body)
        old = await sender.send([(b"x-atlas-signature", signature(body, OTHER))], body)

        assert (200, 401) == (new.status, old.status)
