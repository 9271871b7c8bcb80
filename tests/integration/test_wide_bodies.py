"""A body with as many names as fit in it holds up nobody else's event."""

import asyncio

import pytest

from tests.factories import new_envelope_id
from tests.replicas import replica

TICK = 0.01


async def count_turns(turns: list[None]) -> None:
    """Take a turn of the loop again and again, as other requests would."""
    while True:
        turns.append(None)
        await asyncio.sleep(TICK)


WIDE = ",".join(f'"{number:x}":1' for number in range(100_000))


class TestWidestBody:
    @pytest.mark.parametrize(
        "template",
        ['{"event":"envelope.viewed","envelope_id":"%s",%s}', '{"event":"%s","metadata":{%s}}'],
        ids=["at-the-top", "in-the-metadata"],
    )
    async def test_lets_others_have_their_turn(self, database_url: str, template: str) -> None:
        """Counted in turns, not in time: a loop that is held up takes none meanwhile."""
        body = (template % (new_envelope_id(), WIDE)).encode()
        assert 900_000 < len(body) <= 1024 * 1024
        loop, turns = asyncio.get_running_loop(), list[None]()
        async with replica(database_url) as one:
            others = asyncio.create_task(count_turns(turns))
            began = loop.time()

            outcome = await one.outcome(body)

            took = loop.time() - began
            others.cancel()

        assert outcome in {"recorded", "quarantined"}
        # One that was never held up would have ten times as many.
        assert len(turns) >= took / TICK / 10
