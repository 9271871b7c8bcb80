"""Hear from other processes that something is due; without it, the poll finds it."""

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta

from app.dispatch import blame
from app.store.session import DatabaseAddress
from app.store.wakeups import listen
from app.telemetry import get_logger

log = get_logger("dispatch")

LONGEST_PAUSE = timedelta(seconds=30)


async def listen_for_ever(
    address: DatabaseAddress, wake: Callable[[], object], *, pause: float = 0.5
) -> None:
    """Call `wake` whenever a process announces deliveries, whatever the connection does."""
    failures = 0

    def heard() -> None:
        nonlocal failures
        # First, because who is woken may fail, and then nothing has resumed.
        wake()
        if failures:
            log.info("wakeups.resumed", failures=failures)
        failures = 0

    while True:
        try:
            await listen(address, heard)
        except Exception as error:  # noqa: BLE001  # the fence: no error ends the listening
            # Once for each time without hearing: the poll goes on, so nobody need hurry.
            if not failures:
                log.warning("wakeups.interrupted", error=blame.summarise(error))
        failures += 1
        longest = min(LONGEST_PAUSE.total_seconds(), pause * 2 ** min(failures, 10))
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))  # noqa: S311  # spreads, hides nothing
