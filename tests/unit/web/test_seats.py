"""How many may wait, and for how long."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from app.errors import TooMany
from app.web.seats import Seats, until_gone


class TestSeats:
    def test_are_given_back(self) -> None:
        seats = Seats(1, each=1)

        for _ in range(3):
            with seats.take("office"):
                assert 1 == seats.taken

        assert 0 == seats.taken

    def test_are_given_back_by_who_fails(self) -> None:
        seats = Seats(1, each=1)

        with pytest.raises(ZeroDivisionError), seats.take("office"):
            raise ZeroDivisionError

        assert 0 == seats.taken

    def test_of_one_token_are_not_all(self) -> None:
        seats = Seats(3, each=2)

        with seats.take("office"), seats.take("office"):
            with pytest.raises(TooMany, match="API_WAITERS_PER_TOKEN"), seats.take("office"):
                pass
            with seats.take("audit"):
                with pytest.raises(TooMany, match=r"API_WAITERS\)"), seats.take("crm"):
                    pass
                assert 3 == seats.taken


class Caller:
    """One who has asked, and may hang up."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self.messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    async def receive(self) -> MutableMapping[str, Any]:
        return await self.messages.get()

    def hang_up(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


class TestUntilGone:
    async def test_ends_what_nobody_waits_for_any_more(self) -> None:
        caller = Caller()
        done = []

        async def answer() -> None:
            async with until_gone({}, caller.receive):
                await asyncio.Event().wait()
                done.append("inside")
            done.append("behind")

        answering = asyncio.create_task(answer())
        caller.hang_up()
        await asyncio.wait_for(answering, 10)

        assert ["behind"] == done

    async def test_lets_be_what_ends_before(self) -> None:
        caller = Caller()

        async with until_gone({}, caller.receive):
            await asyncio.sleep(0)
        caller.hang_up()
        await asyncio.sleep(0)

    async def test_leaves_other_deadlines_alone(self) -> None:
        with pytest.raises(TimeoutError):
            async with until_gone({}, Caller().receive), asyncio.timeout(0.01):
                await asyncio.Event().wait()

    async def test_is_cancelled_like_everything_else(self) -> None:
        async def answer() -> None:
            async with until_gone({}, Caller().receive):
                await asyncio.Event().wait()

        answering = asyncio.create_task(answer())
        await asyncio.sleep(0.01)
        answering.cancel()

        with pytest.raises(asyncio.CancelledError):
            await answering
