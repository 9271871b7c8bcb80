"""`check` notices what would go wrong later, and says what to do."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.callbacks import Callbacks
from app.cli import findings
from app.cli.findings import Finding, Level
from app.settings import Settings
from app.store import durability
from app.store.session import DatabaseAddress

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
KEY = "atlas-0123456789abcdef-0123456789abcdef"
SHORT = "atlas-0123456789abcdef"
TOKEN = "token-0123456789abcdef-0123456789abcdef"
POSTGRES = "postgresql://receiver:hunter22@db.example.com/receiver"


def settings_with(**fields: Any) -> Settings:
    return Settings(_env_file=None, **fields)  # type: ignore[call-arg]


def with_key(**spec: Any) -> Settings:
    return settings_with(atlas_api_keys={"acme": [{"key": KEY, "label": "main", **spec}]})


def of_keys(settings: Settings) -> list[Finding]:
    return list(findings.of_keys(settings, now=NOW))


def only(found: Iterable[Finding]) -> Finding:
    (finding,) = found
    return finding


class TestLine:
    def test_begins_with_a_word_that_can_be_searched_for(self) -> None:
        assert "ok   schema" == str(Finding(Level.OK, "schema"))
        assert "warn schema: is old" == str(Finding(Level.WARN, "schema", "is old"))
        assert "fail schema: is gone" == str(Finding(Level.FAIL, "schema", "is gone"))


class TestKeys:
    def test_a_long_one_is_fine(self) -> None:
        assert Level.OK is only(of_keys(with_key())).level

    def test_there_must_be_one(self) -> None:
        assert Level.FAIL is only(of_keys(settings_with())).level

    def test_one_for_calls_only_proves_nothing(self) -> None:
        assert Level.FAIL is only(of_keys(with_key(use=["call"]))).level

    @pytest.mark.parametrize(
        "spec, text",
        [
            pytest.param({"key": SHORT}, "22 bytes", id="short"),
            pytest.param({"key": f"local_{KEY}"}, "make run", id="generated"),
            pytest.param({"not_after": NOW - timedelta(days=1)}, "expired at", id="expired"),
            pytest.param({"not_after": NOW + timedelta(days=1)}, "expires at", id="soon"),
        ],
    )
    def test_a_weak_one_is_worth_a_warning(self, spec: dict[str, Any], text: str) -> None:
        finding = only(of_keys(with_key(**spec)))

        assert Level.WARN is finding.level
        assert text in finding.why
        assert "'main' of the account 'acme'" in finding.what

    @pytest.mark.parametrize("spec", [{}, {"key": SHORT}, {"key": f"local_{KEY}"}])
    def test_are_never_shown(self, spec: dict[str, Any]) -> None:
        text = str(only(of_keys(with_key(**spec))))

        assert KEY not in text
        assert SHORT not in text

    def test_more_than_the_door_tries_are_too_many(self) -> None:
        keys = [f"{KEY}-{number}" for number in range(33)]

        found = of_keys(settings_with(atlas_api_keys={"acme": keys}))

        assert ["33 keys"] == [f.what for f in found if f.level is Level.WARN]

    def test_of_one_account_want_labels_of_their_own(self) -> None:
        keys = [{"key": KEY, "label": "main"}, {"key": f"{KEY}-2", "label": "main"}]

        found = of_keys(settings_with(atlas_api_keys={"acme": keys}))

        assert ["label 'main'"] == [f.what for f in found if f.level is Level.WARN]


class TestTokens:
    @pytest.mark.parametrize(
        "spec, level",
        [
            pytest.param(TOKEN, Level.OK, id="plain"),
            pytest.param("token-0123456789abcdef", Level.WARN, id="short"),
            pytest.param({"tokens": [TOKEN], "accounts": ["acme"]}, Level.OK, id="account"),
            pytest.param({"tokens": [TOKEN], "accounts": ["acne"]}, Level.WARN, id="no-account"),
            pytest.param({"tokens": [TOKEN], "scopes": []}, Level.WARN, id="no-scope"),
            pytest.param({"tokens": [TOKEN], "accounts": []}, Level.WARN, id="sees-nothing"),
        ],
    )
    def test_are_looked_at(self, spec: Any, level: Level) -> None:
        keys = {"acme": [KEY]}

        found = only(
            findings.of_tokens(settings_with(atlas_api_keys=keys, api_tokens={"crm": spec}))
        )

        assert level is found.level
        assert "token-" not in str(found)

    def test_without_one_nobody_may_ask(self) -> None:
        assert Level.WARN is only(findings.of_tokens(settings_with())).level


class TestCallbacks:
    def test_are_listed_with_their_patterns(self) -> None:
        callbacks = Callbacks()
        callbacks.on("envelope.signed", "contract.*", name="crm")(print_nothing)

        finding = only(findings.of_callbacks(tuple(callbacks), with_key()))

        assert "ok   callback 'crm' wants envelope.signed, contract.*" == str(finding)

    def test_of_an_account_without_a_key_will_never_run(self) -> None:
        callbacks = Callbacks()
        callbacks.on("*", account="acne")(print_nothing)

        assert Level.WARN is only(findings.of_callbacks(tuple(callbacks), with_key())).level

    @pytest.mark.parametrize("pattern", ["envelope.sined", "envelop.signed", "receiver.deaf"])
    def test_that_nothing_will_ever_reach_are_worth_a_warning(self, pattern: str) -> None:
        callbacks = Callbacks()
        callbacks.on(pattern, "envelope.signed")(print_nothing)

        finding = only(findings.of_callbacks(tuple(callbacks), with_key()))

        assert Level.WARN is finding.level
        assert f"Atlas is not known to send {pattern}:" in finding.why

    @pytest.mark.parametrize(
        "pattern",
        ["*", "envelope.*", "survey.*", "contract.extracted", "receiver.dead", "receiver.accepted"],
    )
    def test_that_may_be_reached_are_fine(self, pattern: str) -> None:
        callbacks = Callbacks()
        callbacks.on(pattern)(print_nothing)

        assert Level.OK is only(findings.of_callbacks(tuple(callbacks), with_key())).level

    def test_may_be_none(self) -> None:
        assert Level.WARN is only(findings.of_callbacks((), with_key())).level


def print_nothing(_: object) -> None:
    """Do nothing."""


class TestAddress:
    def found(self, url: str, **fields: Any) -> list[Finding]:
        settings = settings_with(database_url=url, **fields)
        return list(findings.of_address(settings, DatabaseAddress(url)))

    def test_of_a_server_needs_no_remark(self) -> None:
        assert [] == self.found(POSTGRES)

    def test_of_several_servers_needs_none_either(self) -> None:
        assert [] == self.found("postgresql://receiver@one:5432,two:5432/receiver")

    def test_of_a_pooler_wants_to_be_known_as_one(self) -> None:
        url = POSTGRES.replace(".com/", ".com:6432/")

        finding = only(self.found(url))

        assert "PGBOUNCER=true" in finding.why
        assert "hunter22" not in str(finding)

    def test_of_a_pooler_is_no_place_for_migrations(self) -> None:
        assert "MIGRATE_DATABASE_URL" in only(self.found(POSTGRES, pgbouncer=True)).why
        assert [] == self.found(POSTGRES, pgbouncer=True, migrate_database_url=POSTGRES)


SAFE = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}


class TestDurability:
    @pytest.mark.parametrize(
        "change",
        [
            {"fsync": "off"},
            {"full_page_writes": "off"},
            {"synchronous_commit": "off"},
            {"synchronous_commit": "local"},
            {"synchronous_commit": "remote_write"},
        ],
        ids=str,
    )
    def test_of_postgresql_is_broken_by_one_setting(self, change: dict[str, str]) -> None:
        promises = durability.judge({**SAFE, **change}, is_postgresql=True)

        assert list(change) == [p.name for p in promises if not p.is_kept]

    def test_of_postgresql_is_kept_by_its_defaults(self) -> None:
        assert all(p.is_kept for p in durability.judge(SAFE, is_postgresql=True))

    @pytest.mark.parametrize(
        "mode, synchronous, broken",
        [
            ("wal", "2", []),
            ("wal", "3", []),
            ("wal", "1", ["synchronous"]),
            ("delete", "2", ["journal_mode"]),
        ],
    )
    def test_of_sqlite_wants_both(self, mode: str, synchronous: str, broken: list[str]) -> None:
        values = {"journal_mode": mode, "synchronous": synchronous}

        promises = durability.judge(values, is_postgresql=False)

        assert broken == [p.name for p in promises if not p.is_kept]


class TestEnvFile:
    @pytest.mark.parametrize("mode, levels", [(0o600, []), (0o644, [Level.WARN])])
    def test_is_for_its_owner_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, levels: list[Level]
    ) -> None:
        path = tmp_path / ".env"
        path.touch(mode)
        path.chmod(mode)
        monkeypatch.setenv("ENV_FILE", str(path))

        assert levels == [f.level for f in findings.of_env_file()]
