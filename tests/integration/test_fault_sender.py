"""The sender of fault runs does as Atlas: it signs, waits, and tries again when it says so."""

import asyncio
import time

import pytest

from tests.acceptance.service import KEY
from tests.factories import signature
from tests.faults.ledger import BROKEN, TOO_LATE, Ledger
from tests.faults.sender import ASKED_FOR, GAPS, Sender
from tests.faults.traffic import Traffic
from tests.misbehaving import (
    Behaviour,
    Misbehaving,
    Received,
    answer,
    say_nothing,
    send_and_reset,
)

EVENT_ID = "01a20246-373e-7fc0-b125-620858b22292"
[ONE] = Traffic(seed=3, events=1, accounts=["default"]).sendings()

TAKEN = answer(body=f'{{"outcome":"recorded","event_id":"{EVENT_ID}"}}'.encode())
REFUSED = answer(503, body=b"{}")
# A minute is 6 ms.
COMPRESS = 10_000


async def send(*behaviours: Behaviour, patience: float = 10.0) -> tuple[Ledger, Misbehaving]:
    """Send one event to a server that behaves like this."""
    ledger = Ledger()
    async with Misbehaving(*behaviours) as server:
        sender = Sender(
            [server.port], ledger, keys={"default": KEY}, compress=COMPRESS, patience=patience
        )
        await sender.send([ONE], rate=100)
    return ledger, server


class TestSender:
    async def test_signs_what_it_sends(self) -> None:
        _, server = await send(TAKEN)

        [received] = server.received
        assert ONE.body == received.body
        assert signature(ONE.body, KEY).decode() == received.headers["x-atlas-signature"]

    async def test_an_answer_acknowledges(self) -> None:
        ledger, _ = await send(TAKEN)

        assert (1, 1, 0) == (ledger.acknowledged, ledger.tries, ledger.given_up)
        assert {EVENT_ID} == {str(event_id) for event_id in ledger.entries[0].event_ids}
        assert ONE.digest == ledger.entries[0].recorded

    @pytest.mark.parametrize(
        "first",
        [
            pytest.param(REFUSED, id="503"),
            pytest.param(send_and_reset(b"HTTP/1.1 200"), id="half an answer"),
            pytest.param(send_and_reset(b""), id="a reset"),
        ],
    )
    async def test_without_acknowledgement_it_tries_again(self, first: Behaviour) -> None:
        ledger, _ = await send(first, TAKEN)

        assert (1, 2) == (ledger.acknowledged, ledger.tries)
        assert 1 == ledger.statuses[503] + ledger.unanswered[BROKEN]

    async def test_it_does_not_wait_for_ever(self) -> None:
        ledger, _ = await send(say_nothing, TAKEN, patience=2)

        assert (1, 1) == (ledger.acknowledged, ledger.unanswered[TOO_LATE])

    async def test_it_gives_up_after_four_retries_and_sends_again_if_it_is_asked(self) -> None:
        start = time.monotonic()

        ledger, _ = await send(*[REFUSED] * 5, TAKEN)

        assert (1, 6, 1) == (ledger.acknowledged, ledger.tries, ledger.given_up)
        assert time.monotonic() - start >= sum(GAPS) / COMPRESS

    async def test_nobody_asks_for_ever(self) -> None:
        ledger, _ = await send(REFUSED)

        assert (0, 5 + ASKED_FOR, 1) == (ledger.acknowledged, ledger.tries, ledger.given_up)

    async def test_no_more_requests_are_under_way_than_may_be(self) -> None:
        many = list(Traffic(seed=3, events=20, accounts=["default"]).sendings())
        under_way, most = 0, 0

        async def look(request: Received, writer: asyncio.StreamWriter) -> None:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0.01)
            under_way -= 1
            await TAKEN(request, writer)

        ledger = Ledger()
        async with Misbehaving(look) as server:
            sender = Sender([server.port], ledger, keys={"default": KEY}, in_flight=3)
            await sender.send(many, rate=100_000)

        assert (20, 3) == (ledger.acknowledged, most)

    async def test_where_nobody_listens_it_goes_to_the_next_at_once(self) -> None:
        ledger = Ledger()
        async with Misbehaving(TAKEN) as server:
            async with Misbehaving(TAKEN) as gone:
                pass
            sender = Sender([gone.port, server.port], ledger, keys={"default": KEY})
            await sender.send([ONE], rate=100)

        assert (1, 1) == (ledger.acknowledged, ledger.tries)

    async def test_milestones_are_reached_by_acknowledgements(self) -> None:
        ledger = Ledger()
        waiting = asyncio.create_task(ledger.reaches(1))
        await asyncio.sleep(0)
        assert not waiting.done()

        ledger.note(ONE, 200, f'{{"outcome":"recorded","event_id":"{EVENT_ID}"}}'.encode(), 0.1)

        await asyncio.wait_for(waiting, 5)
