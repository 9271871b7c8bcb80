"""Identifiers of our own: UUIDv7, so that rows are appended in the order of time."""

import os
import time
from uuid import UUID

_VERSION_AND_VARIANT = (0x7 << 76) | (0x2 << 62)


def new_id() -> UUID:
    """Make a UUIDv7 (RFC 9562): 48 bits of milliseconds, then 74 random bits."""
    return _id(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10), "big"))


def first_id_at(seconds: float) -> UUID:
    """Give the smallest id that could have been made at a time, in seconds since 1970."""
    return _id(max(0, int(seconds * 1000)), 0)


def _id(milliseconds: int, noise: int) -> UUID:
    high = (noise >> 62 & 0xFFF) << 64
    low = noise & ((1 << 62) - 1)
    return UUID(int=(milliseconds & ((1 << 48) - 1)) << 80 | high | low | _VERSION_AND_VARIANT)
