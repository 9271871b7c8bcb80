"""Identifiers of our own: UUIDv7, so that rows are appended in the order of time."""

import os
import time
from collections import deque
from uuid import UUID

_VERSION_AND_VARIANT = (0x7 << 76) | (0x2 << 62)
_NOISE_BYTES = 10
# Numbers for ids to come. To ask the system for one costs more than the rest of an id.
_noise: deque[int] = deque()
# A process that was forked must not have those of its parent.
os.register_at_fork(after_in_child=_noise.clear)


def new_id() -> UUID:
    """Make a UUIDv7 (RFC 9562): 48 bits of milliseconds, then 74 random bits."""
    return _id(time.time_ns() // 1_000_000, _some_noise())


def first_id_at(seconds: float) -> UUID:
    """Give the smallest id that could have been made at a time, in seconds since 1970."""
    return _id(max(0, int(seconds * 1000)), 0)


def _some_noise() -> int:
    while True:
        try:
            return _noise.popleft()
        except IndexError:
            fresh = os.urandom(128 * _NOISE_BYTES)
            starts = range(0, len(fresh), _NOISE_BYTES)
            _noise.extend([int.from_bytes(fresh[at : at + _NOISE_BYTES], "big") for at in starts])


def _id(milliseconds: int, noise: int) -> UUID:
    high = (noise >> 62 & 0xFFF) << 64
    low = noise & ((1 << 62) - 1)
    return UUID(int=(milliseconds & ((1 << 48) - 1)) << 80 | high | low | _VERSION_AND_VARIANT)
