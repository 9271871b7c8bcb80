"""What is changed, and the tests that have to notice."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
_UNIT: Final = "tests/unit"
_INTEGRATION: Final = "tests/integration"


@dataclass(frozen=True)
class Subject:
    """A module and its tests."""

    path: str
    tests: tuple[str, ...]
    needs_postgres: bool = False

    @property
    def name(self) -> str:
        return self.path.removeprefix("app/").removesuffix(".py")

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".")

    @property
    def source(self) -> str:
        return (ROOT / self.path).read_text("utf-8")


_EVENTS: Final = f"{_UNIT}/events"
_DELIVERIES: Final = f"{_INTEGRATION}/test_deliveries.py"
_OF_CLAIMS: Final = ("Claim", "Order", "HeldBack", "Waking", "Lease", "Poll")
SUBJECTS: Final = (
    Subject("app/events/signature.py", (f"{_EVENTS}/test_signature.py",)),
    Subject(
        "app/events/payload.py", (f"{_EVENTS}/test_payload.py", f"{_EVENTS}/test_lifecycle.py")
    ),
    Subject("app/events/reading.py", (f"{_EVENTS}/test_reading.py", f"{_EVENTS}/test_payload.py")),
    Subject("app/events/heading.py", (f"{_EVENTS}/test_payload.py", f"{_EVENTS}/test_identity.py")),
    Subject("app/events/values.py", (f"{_EVENTS}/test_payload.py",)),
    Subject(
        "app/events/parties.py",
        (
            f"{_EVENTS}/test_parties.py",
            f"{_EVENTS}/test_payload.py",
            f"{_EVENTS}/test_lifecycle.py",
        ),
    ),
    Subject(
        "app/events/identity.py", (f"{_EVENTS}/test_identity.py", f"{_EVENTS}/test_erasure.py")
    ),
    Subject(
        "app/events/lifecycle.py", (f"{_EVENTS}/test_lifecycle.py", f"{_EVENTS}/test_accepting.py")
    ),
    Subject("app/dispatch/schedule.py", (f"{_UNIT}/dispatch/test_schedule.py",)),
    Subject("app/dispatch/breaker.py", (f"{_UNIT}/dispatch/test_breaker.py",)),
    Subject("app/dispatch/attempt.py", (f"{_UNIT}/dispatch/test_attempt.py",)),
    Subject(
        "app/dispatch/settling.py",
        (f"{_UNIT}/dispatch/test_settling.py", f"{_INTEGRATION}/test_settling.py"),
        needs_postgres=True,
    ),
    Subject(
        "app/store/leases.py",
        (f"{_INTEGRATION}/test_feed_sequencer.py::TestLease",),
        needs_postgres=True,
    ),
    Subject(
        "app/store/claims.py",
        tuple(f"{_DELIVERIES}::Test{each}" for each in _OF_CLAIMS),
        needs_postgres=True,
    ),
)
