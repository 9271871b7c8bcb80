"""Times, on their way to a database and back."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Dialect
from sqlalchemy.dialects import postgresql, sqlite

from app.store.base import UtcDateTime, in_utc, text_to_time, time_to_text

DIALECTS = [sqlite.dialect(), postgresql.dialect()]  # type: ignore[no-untyped-call]
ZONES = st.integers(-23 * 60, 23 * 60).map(lambda m: timezone(timedelta(minutes=m)))
# A day from the edges: another zone would push these beyond what Python can name.
INSTANTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=ZONES)  # noqa: DTZ001


@given(instant=INSTANTS)
def test_text_is_read_back_as_the_same_instant(instant: datetime) -> None:
    assert instant == text_to_time(time_to_text(instant))


@given(one=INSTANTS, other=INSTANTS)
def test_text_sorts_by_time(one: datetime, other: datetime) -> None:
    assert (one < other) == (time_to_text(one) < time_to_text(other))


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
class TestUtcDateTime:
    @given(instant=INSTANTS)
    def test_an_instant_survives(self, dialect: Dialect, instant: datetime) -> None:
        kind = UtcDateTime()

        read = kind.process_result_value(kind.process_bind_param(instant, dialect), dialect)

        assert instant == read

    def test_nothing_stays_nothing(self, dialect: Dialect) -> None:
        kind = UtcDateTime()

        assert kind.process_bind_param(None, dialect) is None
        assert kind.process_result_value(None, dialect) is None

    def test_a_time_without_a_zone_is_refused(self, dialect: Dialect) -> None:
        with pytest.raises(ValueError, match="without a zone"):
            UtcDateTime().process_bind_param(datetime(2026, 7, 1), dialect)  # noqa: DTZ001


@pytest.mark.parametrize("extreme", [datetime.min, datetime.max])  # noqa: DTZ901
def test_what_a_driver_gives_back_without_a_zone_is_in_utc(extreme: datetime) -> None:
    assert extreme.replace(tzinfo=UTC) == in_utc(extreme)
