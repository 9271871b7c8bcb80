"""When to try again: an attempt's number becomes a wait, or the end.

With the defaults a delivery is tried 12 times: after 5, 15 and 45 seconds, after 2, 7 and
20 minutes, then hourly: about five and a half hours in all. A dead letter is kept, and an
operator may give it a fresh round.
"""

from dataclasses import dataclass
from datetime import timedelta

MAX_ATTEMPTS = 12
# What a callback may ask for with `RetryLater`. Whatever is added to the clock stays far
# below the last year that a time can express.
LONGEST_REQUEST = timedelta(hours=24)
LONGEST_CAP = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential waits: `base`, then `factor` times as long each, up to `cap`.

    Each wait is spread by `jitter` to both sides, so that what failed together does not
    come back together.
    """

    base: timedelta = timedelta(seconds=5)
    factor: float = 3.0
    cap: timedelta = timedelta(hours=1)
    jitter: float = 0.25


def wait_after(attempt: int, *, backoff: Backoff, noise: float) -> timedelta:
    """Give the wait after the `attempt`-th try; `noise` lies between 0 and 1."""
    cap = min(backoff.cap, LONGEST_CAP)
    # Beyond that exponent every sensible back-off is at its cap, and a float would overflow.
    growth = backoff.factor ** min(attempt - 1, 100)
    seconds = min(backoff.base.total_seconds() * growth, cap.total_seconds())
    spread = 1 + backoff.jitter * (2 * noise - 1)
    return timedelta(seconds=seconds * spread)


def next_try(
    attempt: int,
    *,
    max_attempts: int,
    backoff: Backoff,
    noise: float,
    after: timedelta | None = None,
) -> timedelta | None:
    """Give the wait until the next try, or None if this was the last one.

    `after` is what the callback asked for; it takes the place of the usual wait, within
    reason, and not that of the limit.
    """
    if attempt >= max_attempts:
        return None
    if after is not None:
        return min(max(after, timedelta(0)), LONGEST_REQUEST)
    return wait_after(attempt, backoff=backoff, noise=noise)
