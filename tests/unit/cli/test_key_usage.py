"""`keys` says which key can be withdrawn."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from app.cli.keys import Usage, combine
from app.events.signature import Key

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
LONG_AGO = datetime(2026, 5, 1, 12, tzinfo=UTC)


def make_key(name: str, *, account: str = "acme") -> Key:
    return Key(account, b"0123456789abcdef", label=name, fingerprint=name)


def make_row(name: str, *, account: str = "acme", last_match_at: datetime | None = None) -> Any:
    return SimpleNamespace(
        fingerprint=name, label=name, account=account, last_match_at=last_match_at
    )


def usage(**fields: Any) -> Usage:
    values = {"is_configured": True, "last_match_at": NOW, **fields}
    return Usage("main", "acme", "f00", **values)


class TestVerdict:
    @pytest.mark.parametrize(
        "fields, verdict",
        [
            pytest.param({}, "still in use", id="just-now"),
            pytest.param({"last_match_at": NOW - timedelta(hours=3)}, "still in use", id="today"),
            pytest.param(
                {"last_match_at": LONG_AGO}, "unused since 2026-05-01T12:00:00Z", id="long-ago"
            ),
            pytest.param({"last_match_at": None}, "never matched", id="never"),
            pytest.param(
                {"not_after": LONG_AGO},
                "expired: refused since 2026-05-01T12:00:00Z",
                id="expired",
            ),
            pytest.param({"not_after": NOW + timedelta(1)}, "still in use", id="expires-later"),
            pytest.param(
                {"is_configured": False, "last_match_at": LONG_AGO}, "withdrawn", id="withdrawn"
            ),
            pytest.param(
                {"is_configured": False},
                "withdrawn here, but it matched lately",
                id="withdrawn-too-early",
            ),
        ],
    )
    def test_follows_from_the_last_match(self, fields: dict[str, Any], verdict: str) -> None:
        assert verdict == usage(**fields).verdict(NOW)


class TestList:
    def test_brings_settings_and_database_together(self) -> None:
        found = combine(
            [make_key("new"), make_key("main")],
            [make_row("main", last_match_at=NOW), make_row("old", last_match_at=LONG_AGO)],
        )

        assert [("main", True, NOW), ("new", True, None), ("old", False, LONG_AGO)] == [
            (each.label, each.is_configured, each.last_match_at) for each in found
        ]

    def test_groups_by_account(self) -> None:
        found = combine([make_key("b", account="one"), make_key("a", account="two")], [])

        assert ["one", "two"] == [each.account for each in found]
