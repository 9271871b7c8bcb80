"""What is printed of a profile."""

import pytest

from tests.bench.measurement import Measurement
from tests.bench.profiling import Profile
from tests.bench.sampler import Stack

PARSE: Stack = (("app/events/payload.py", "parse"),)
SIGN: Stack = (("app/events/signature.py", "KeyRing.verify"),)


@pytest.fixture
def profile() -> Profile:
    """Of 200 µs for each event, three quarters are spent on parsing."""
    measured = Measurement("service", connections=32, rate=100.0, cpu=200.0, acknowledged=7)
    return Profile(measured, {PARSE: 75, SIGN: 25})


class TestStations:
    def test_what_the_system_has_counted_is_divided_by_the_samples(self, profile: Profile) -> None:
        rows = {name: (cpu, share) for name, cpu, share in profile.stations()}

        assert ("150.0", "75.0%") == rows["parsing"]
        assert ("50.0", "25.0%") == rows["signature"]

    def test_the_stations_add_up_to_it(self, profile: Profile) -> None:
        *stations, (name, cpu, share) = profile.stations()

        assert ("all of it", "200.0", "100.0%") == (name, cpu, share)
        assert float(cpu) == sum(float(station[1]) for station in stations)


class TestFunctions:
    def test_the_dearest_comes_first(self, profile: Profile) -> None:
        titles = [title for title, _, _ in profile.functions()]

        assert [
            "parse (app/events/payload.py)",
            "KeyRing.verify (app/events/signature.py)",
        ] == titles


class TestKept:
    def test_a_lost_event_is_said_instead_of_the_good_news(self, profile: Profile) -> None:
        profile.measured.faults.append("1 acknowledged event is lost")

        assert "1 acknowledged event is lost" == profile.kept()
