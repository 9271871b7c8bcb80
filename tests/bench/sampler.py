"""Runs the service, and notes at what it is while its processor time goes by.

`python -m tests.bench.sampler FILE ARGUMENTS` is `python -m app ARGUMENTS`. SIGUSR1 begins to
take samples, SIGUSR2 ends it and writes them to FILE. The kernel gives a signal for every so
much processor time, its own work for the process included, so a process that waits is not
sampled; most kernels cannot count less than 4 ms.
"""

import dis
import json
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

INTERVAL = 0.002
_RESUME = dis.opmap["RESUME"]

# File and qualified name of each function that is under way, the innermost first.
Frame = tuple[str, str]
Stack = tuple[Frame, ...]


class Sampler:
    """Counts how often each stack is found."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._counts: Counter[Stack] = Counter()

    def listen(self) -> None:
        """Wait for the two signals."""
        signal.signal(signal.SIGPROF, lambda _, frame: self._sample(frame))
        signal.signal(signal.SIGUSR1, lambda *_: self._begin())
        signal.signal(signal.SIGUSR2, lambda *_: self._end())

    def _begin(self) -> None:
        self._counts.clear()
        signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)

    def _end(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0, 0)
        partial = self._output.with_suffix(".partial")
        partial.write_text(json.dumps(list(self._counts.items())))
        partial.replace(self._output)

    def _sample(self, frame: FrameType | None) -> None:
        self._counts[stack_of(frame)] += 1


def stack_of(frame: FrameType | None) -> Stack:
    """Give what is under way at `frame`.

    A signal is noticed where Python code goes on. If that is the first step of a function, the
    time went by before it, in compiled code of its caller: most often in the event loop.
    """
    if frame is not None and _is_at_its_start(frame):
        frame = frame.f_back or frame
    return tuple((f.f_code.co_filename, f.f_code.co_qualname) for f in _outwards(frame))


def _is_at_its_start(frame: FrameType) -> bool:
    return frame.f_lasti >= 0 and frame.f_code.co_code[frame.f_lasti] == _RESUME


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
    # SQLAlchemy runs its synchronous half in a greenlet, where the stack begins anew.
    greenlet: Any = sys.modules.get("greenlet")
    current = greenlet.getcurrent() if greenlet is not None else None
    while current is not None and (current := current.parent) is not None:
        frame = current.gr_frame
        while frame is not None:
            yield frame
            frame = frame.f_back


def read(samples: Path) -> Counter[Stack]:
    """Read what a sampler has written."""
    counts: Counter[Stack] = Counter()
    for stack, count in json.loads(samples.read_text()):
        counts[tuple((file, name) for file, name in stack)] += count
    return counts


if __name__ == "__main__":
    Sampler(Path(sys.argv.pop(1))).listen()
    runpy.run_module("app", run_name="__main__", alter_sys=True)
