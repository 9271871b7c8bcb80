"""`slack` against a local stand-in: what it posts, and what the answers lead to."""

import json
from datetime import timedelta

import pytest

from app.callbacks.slack import callbacks
from app.callbacks.testing import Dead, Done, Failed, Skipped, deliver, make_event
from app.dispatch.attempt import Verdict
from app.settings import read_settings
from tests.misbehaving import Behaviour, Misbehaving, answer

EVENT = make_event("envelope.signed")


async def verdict_on(behaviour: Behaviour) -> Verdict:
    async with Misbehaving(behaviour) as server:
        made = callbacks(read_settings(slack_url=server.url, forward_allow="127.0.0.1"))
        verdict = (await deliver(made, EVENT))["slack"]
    assert "secret" not in str(verdict)
    return verdict


class TestSlack:
    async def test_a_message_is_posted(self) -> None:
        async with Misbehaving(answer(200, body=b"ok")) as server:
            made = callbacks(read_settings(slack_url=server.url, forward_allow="127.0.0.1"))
            assert {"slack": Done()} == await deliver(made, EVENT)

        (sent,) = server.received
        assert ("POST", "application/json") == (sent.method, sent.headers["content-type"])
        assert "*Signed*: envelope `env_1`" == json.loads(sent.body)["text"]

    async def test_a_test_envelope_is_skipped(self) -> None:
        async with Misbehaving(answer()) as server:
            made = callbacks(read_settings(slack_url=server.url, forward_allow="127.0.0.1"))
            verdicts = await deliver(made, make_event(data={"is_test": True}))

        assert isinstance(verdicts["slack"], Skipped)
        assert [] == server.received

    @pytest.mark.parametrize("status", [429, 503])
    async def test_a_busy_slack_says_when_to_come_back(self, status: int) -> None:
        verdict = await verdict_on(answer(status, {"Retry-After": "30"}))

        assert isinstance(verdict, Failed)
        assert timedelta(seconds=30) == verdict.after

    @pytest.mark.parametrize(
        "status,said",
        [
            (400, b"invalid_payload"),
            (403, b"action_prohibited"),
            (404, b"no_service"),
            (410, b"channel_is_archived"),
        ],
    )
    async def test_what_will_never_work_is_a_dead_letter(self, status: int, said: bytes) -> None:
        verdict = await verdict_on(answer(status, body=said))

        assert isinstance(verdict, Dead)
        assert f"Slack answered {status}: {said.decode()}" in verdict.error
        assert "SLACK_URL" in verdict.error

    @pytest.mark.parametrize("status", [301, 408, 429, 500])
    async def test_the_rest_is_tried_again(self, status: int) -> None:
        verdict = await verdict_on(answer(status))

        assert isinstance(verdict, Failed)
        assert None is verdict.after
