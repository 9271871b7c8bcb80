"""`forward` against a real server: who can check what it sends, and what its answers lead to."""

import base64
import json
import secrets
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from app.callbacks import Callbacks, Event
from app.callbacks.forward import Forward
from app.callbacks.testing import Dead, Done, Failed, change_event, deliver, make_event
from app.dispatch.attempt import Verdict
from tests.misbehaving import (
    Behaviour,
    Misbehaving,
    answer,
    never_end,
    say_nothing,
    send_and_hang_up,
)

SECRET, OLD = ("whsec_" + base64.b64encode(secrets.token_bytes(size)).decode() for size in (24, 64))
EVENT = make_event("envelope.signed", envelope_id="env_1", data={"metadata": {"n": "é"}})


async def forward(
    server: Misbehaving,
    event: Event = EVENT,
    *,
    keys: tuple[str, ...] = (SECRET,),
    allow: tuple[str, ...] = ("127.0.0.1",),
    seconds: float = 10,
) -> Verdict:
    callbacks = Callbacks()
    timeout = timedelta(seconds=seconds)
    called = Forward(url=server.url, secrets=keys, timeout=timeout, allow=allow)
    callbacks.on("*", "receiver.*", name="forward")(called)
    (verdict,) = (await deliver(callbacks, event)).values()
    return verdict


async def verdict_on(behaviour: Behaviour, *, seconds: float = 10) -> Verdict:
    async with Misbehaving(behaviour) as server:
        verdict = await forward(server, seconds=seconds)
    assert "secret" not in str(verdict)
    return verdict


class TestRequest:
    async def test_every_holder_of_a_secret_can_check_it(self) -> None:
        async with Misbehaving(answer(204)) as server:
            assert Done() == await forward(server, keys=(SECRET, OLD))

        (sent,) = server.received
        for key in (SECRET, OLD):
            found = Webhook(key).verify(sent.body, dict(sent.headers))
            assert "envelope.signed" == found["type"]
        assert EVENT.delivery_id == sent.headers["webhook-id"]
        assert "application/json" == sent.headers["content-type"]

    async def test_nobody_else_takes_it_for_genuine(self) -> None:
        async with Misbehaving(answer()) as server:
            await forward(server, keys=(OLD,))

        (sent,) = server.received
        for body, key in ((sent.body, SECRET), (sent.body + b" ", OLD)):
            with pytest.raises(WebhookVerificationError):
                Webhook(key).verify(body, dict(sent.headers))

    async def test_the_body_is_the_same_in_every_attempt(self) -> None:
        async with Misbehaving(answer(500), answer(200)) as server:
            assert isinstance(await forward(server), Failed)
            assert Done() == await forward(server)

        first, second = (each.body for each in server.received)
        assert first == second


class TestAnswer:
    @pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
    async def test_any_2xx_is_the_end_of_it(self, status: int) -> None:
        body = b"" if status == 204 else b"thanks"

        assert Done() == await verdict_on(answer(status, body=body))

    async def test_a_2xx_that_goes_on_for_ever_is_accepted_all_the_same(self) -> None:
        assert Done() == await verdict_on(never_end(b"HTTP/1.1 200 OK\r\n\r\n"))

    async def test_a_packed_2xx_is_accepted_all_the_same(self) -> None:
        behaviour = answer(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b broken")

        assert Done() == await verdict_on(behaviour)

    @pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500, 503])
    async def test_another_is_tried_again_after_the_usual_wait(self, status: int) -> None:
        verdict = await verdict_on(answer(status, body=b"no\r\n such\x00 thing " + b"x" * 9000))

        assert isinstance(verdict, Failed)
        assert None is verdict.after
        assert f"127.0.0.1 answered {status}: no such thing xxx" in verdict.error
        assert len(verdict.error) < 300

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_is_a_failure_and_is_not_followed(self, status: int) -> None:
        async with Misbehaving(answer()) as inside:
            verdict = await verdict_on(answer(status, {"Location": inside.url}))

        assert isinstance(verdict, Failed)
        assert "redirects are not followed: FORWARD_URL" in verdict.error
        assert [] == inside.received

    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    async def test_a_busy_one_says_when_to_come_back(self, status: int) -> None:
        verdict = await verdict_on(answer(status, {"Retry-After": "120"}))

        assert isinstance(verdict, Failed)
        assert timedelta(minutes=2) == verdict.after

    @pytest.mark.parametrize("value", ["0", "Thu, 01 Jan 1970 00:00:00 GMT", "soon", ""])
    async def test_no_sensible_time_is_the_usual_wait(self, value: str) -> None:
        verdict = await verdict_on(answer(503, {"Retry-After": value}))

        assert isinstance(verdict, Failed)
        assert None is verdict.after

    async def test_a_wait_of_years_is_one_of_a_day(self) -> None:
        verdict = await verdict_on(answer(503, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}))

        assert isinstance(verdict, Failed)
        assert timedelta(days=1) == verdict.after

    async def test_gone_is_a_dead_letter_at_once(self) -> None:
        verdict = await verdict_on(answer(410, body=b"no such hook"))

        assert isinstance(verdict, Dead)
        assert "answered 410: no such hook (410 means Gone" in verdict.error

    @pytest.mark.parametrize(
        "behaviour,kind",
        [
            pytest.param(say_nothing, "DeadlinePassed", id="silence"),
            pytest.param(send_and_hang_up(b""), "BrokenAnswer", id="hangs-up"),
            pytest.param(send_and_hang_up(b"\xff\xff\r\n\r\n"), "BrokenAnswer", id="noise"),
        ],
    )
    async def test_no_answer_is_a_failure_with_a_name(
        self, behaviour: Behaviour, kind: str
    ) -> None:
        verdict = await verdict_on(behaviour, seconds=0.3)

        assert isinstance(verdict, Failed)
        assert verdict.error.startswith(kind)

    async def test_a_private_address_is_refused_with_the_remedy(self) -> None:
        async with Misbehaving(answer()) as server:
            verdict = await forward(server, allow=())

        assert isinstance(verdict, Failed)
        assert "127.0.0.1 is not a public address" in verdict.error
        assert "FORWARD_ALLOW" in verdict.error
        assert 0 == server.connections

    async def test_nobody_listening_is_a_failure(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
            callbacks = Callbacks()
            called = Forward(url=url, secrets=[SECRET], allow=["127.0.0.1"])
            callbacks.on("*", name="forward")(called)

            verdict = (await deliver(callbacks, EVENT))["forward"]

        assert isinstance(verdict, Failed)
        assert "cannot be reached" in verdict.error


class TestOwnEvent:
    async def test_one_about_no_envelope_is_sent_too(self) -> None:
        data: Mapping[str, Any] = {"event": "receiver.dead", "is_first": True}
        event = change_event(
            EVENT, type="receiver.dead", envelope=None, envelope_id=None, data=data
        )
        async with Misbehaving(answer()) as server:
            assert Done() == await forward(server, event)

        sent = json.loads(server.received[0].body)
        assert ("receiver.dead", None) == (sent["type"], sent["data"]["envelope"])
        assert data == sent["data"]["event"]
