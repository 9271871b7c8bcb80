"""A service that can be told where it shall break when it is started the next time."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.acceptance.service import Service


class Breakable(Service):
    """A process of the service with failpoints; without any it is the service as it is."""

    def __init__(self, *arguments: str, home: Path, **settings: str) -> None:
        super().__init__(*arguments, home=home, **settings)
        self.points: Sequence[str] = ()
        # Of the dice of points that are thrown for.
        self.seed = 0

    @property
    def command(self) -> list[str]:
        """How the process is started, if it is started now."""
        if not self.points:
            return super().command
        at = [word for point in self.points for word in ("--at", point)]
        program = [sys.executable, "-m", "tests.faults.failpoints", "--seed", str(self.seed)]
        return [*program, *at, "--", *self.arguments]

    def is_ready_or_over(self) -> bool:
        """True once it takes requests, or has broken before it could."""
        return not self.is_running or self.is_ready()
