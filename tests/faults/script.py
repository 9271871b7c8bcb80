"""Which callback is owed what, and how each call is to end: known to callbacks and judge."""

import zlib

NOTED = ("envelope.*", "contract.*")
TRIED = ("envelope.declined", "envelope.voided")
ONCE = ("envelope.sent", "envelope.signed")

# Out of a hundred events, those whose first attempt fails, and those that are given up.
FAILS, DIES = range(20), range(20, 25)


def luck(event_id: str) -> int:
    """Give a number below 100: always the same for one event, whoever attempts it."""
    return zlib.crc32(event_id.encode()) % 100


def owed(event_type: str) -> int:
    """Give the number of callbacks that are owed an event of this type."""
    return 1 + (event_type in TRIED) + (event_type in ONCE)
