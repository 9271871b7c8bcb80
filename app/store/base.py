"""Column types that mean the same on PostgreSQL and on SQLite, and the declarative base."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, MetaData, String, TypeDecorator
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase


class UtcDateTime(TypeDecorator[datetime]):
    """An instant. PostgreSQL keeps it as `timestamptz`, SQLite as text that sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        """Use text on SQLite, which has no type for an instant."""
        if dialect.name == "sqlite":
            return dialect.type_descriptor(String())
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """Refuse a time without a zone: nobody could say which instant it means."""
        if value is None:
            return None
        if value.tzinfo is None:
            message = "a time without a zone cannot be stored"
            raise ValueError(message)
        return time_to_text(value) if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Give back UTC, whatever the session's zone is."""
        if value is None:
            return None
        return text_to_time(value) if dialect.name == "sqlite" else in_utc(value)


def in_utc(value: datetime) -> datetime:
    """Say of an instant of PostgreSQL that it is in UTC, as every session of ours is."""
    # asyncpg stores the first and the last instant that Python knows as -infinity and
    # infinity, and gives these two back without a zone.
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)


def time_to_text(value: datetime) -> str:
    """Write an instant the way SQLite rows hold it."""
    # strftime does not pad years before 1000; isoformat does, and so the text sorts.
    instant = value if value.tzinfo is UTC else value.astimezone(UTC)
    return instant.isoformat(" ", "microseconds").removesuffix("+00:00")


def text_to_time(value: str) -> datetime:
    """Read an instant the way SQLite rows hold it."""
    return datetime.fromisoformat(value).replace(tzinfo=UTC)


# `none_as_null`: an absent document is NULL, not the JSON word null.
Document = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class Base(DeclarativeBase):
    """Every table; constraints have names, so that a later migration can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "ck": "%(table_name)s_%(constraint_name)s_check",
            "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
            "pk": "%(table_name)s_pkey",
        }
    )
