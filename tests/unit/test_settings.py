"""A wrong setting stops the start, names the variable, and never shows a secret."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from app.errors import ConfigError
from app.settings import SECRETS, Settings, clean_secret, is_loopback, read_settings

KEY = "atlas_live_0123456789abcdef"
OTHER = "atlas_live_fedcba9876543210"
TOKEN = "a-token-of-the-back-office"

Refusal = Callable[..., str]


@pytest.fixture(name="given")
def _given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Reads the settings of an environment that holds nothing else."""

    def read(**environment: str) -> Settings:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return read_settings()

    return read


@pytest.fixture(name="refusal")
def _refusal(given: Callable[..., Settings]) -> Refusal:
    """Gives the words in which an environment is refused."""

    def read(**environment: str) -> str:
        with pytest.raises(ConfigError) as caught:
            given(**environment)
        return str(caught.value)

    return read


def keys_of(settings: Settings) -> dict[str, list[str]]:
    return {
        account: [spec.key.get_secret_value() for spec in specs]
        for account, specs in settings.keys.items()
    }


BAD_SECRETS = [
    pytest.param("", "is empty", id="empty"),
    pytest.param(" \t\r\n", "is empty", id="blank"),
    pytest.param("\ufeff", "is empty", id="only-a-bom"),
    pytest.param("changeme-changeme", "is a placeholder", id="changeme"),
    pytest.param("<your atlas key here>", "is a placeholder", id="angle-brackets"),
    pytest.param("your_api_key_goes_here", "is a placeholder", id="your-api-key"),
    pytest.param("atlas_live_xxxxxxxxxxxx", "is a placeholder", id="x-es"),
    pytest.param("00000000000000000000", "is a placeholder", id="one-character"),
    pytest.param("atlas_live_1234", "shorter than 16 bytes", id="15-bytes"),
    pytest.param("atlas_live\x010123456789", "control character", id="control-inside"),
    pytest.param("atlas_live_01234\n56789abc", "control character", id="line-end-inside"),
    pytest.param("atlas_live_0123456789\x7f01", "control character", id="delete-inside"),
]


class TestTheKey:
    def test_alone_is_that_of_the_default_account(self, given: Callable[..., Settings]) -> None:
        assert {"default": [KEY]} == keys_of(given(ATLAS_API_KEY=KEY))

    @pytest.mark.parametrize("value, why", BAD_SECRETS)
    def test_is_refused_unless_it_can_be_a_secret(
        self, refusal: Refusal, value: str, why: str
    ) -> None:
        said = refusal(ATLAS_API_KEY=value)

        assert said.startswith("ATLAS_API_KEY: ")
        assert why in said
        assert not clean_secret(value) or clean_secret(value) not in said

    @pytest.mark.parametrize("value, why", BAD_SECRETS)
    def test_of_an_account_is_held_to_the_same(
        self, refusal: Refusal, value: str, why: str
    ) -> None:
        said = refusal(ATLAS_API_KEYS=json.dumps({"acme": [KEY, value]}))

        assert said.startswith("ATLAS_API_KEYS (acme.1")
        assert why in said
        assert not clean_secret(value) or clean_secret(value) not in said

    def test_may_hold_no_nul(self, refusal: Refusal) -> None:
        """HMAC pads with NULs, so such a key would verify under other spellings of itself."""
        said = refusal(ATLAS_API_KEYS=json.dumps({"acme": [f"{KEY}\x00{KEY}"]}))

        assert "control character" in said

    @pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t"])
    @pytest.mark.parametrize("start", ["", "\ufeff", " "])
    def test_is_taken_without_what_editors_leave_around_it(
        self, given: Callable[..., Settings], start: str, end: str
    ) -> None:
        assert {"default": [KEY]} == keys_of(given(ATLAS_API_KEY=f"{start}{KEY}{end}"))

    def test_is_in_no_representation(self, given: Callable[..., Settings]) -> None:
        settings = given(
            ATLAS_API_KEY=KEY,
            API_TOKENS=json.dumps({"office": TOKEN}),
            DATABASE_URL="postgresql://app:db-password@localhost/app",
        )

        for text in (repr(settings), str(settings), settings.model_dump_json()):
            assert KEY not in text
            assert TOKEN not in text
            assert "db-password" not in text


class TestKeysOfAccounts:
    def test_are_lists_of_strings_or_of_objects(self, given: Callable[..., Settings]) -> None:
        second = {"key": OTHER, "label": "old", "use": ["verify"], "not_after": "2026-12-01T00:00Z"}

        settings = given(ATLAS_API_KEYS=json.dumps({"acme": [KEY, second]}))

        first, old = settings.keys["acme"]
        assert {"acme": [KEY, OTHER]} == keys_of(settings)
        assert (None, None) == (first.label, first.not_after)
        assert ["call", "verify"] == sorted(first.use)
        assert ("old", ["verify"]) == (old.label, sorted(old.use))
        assert old.not_after is not None
        assert old.not_after.year == 2026

    def test_stand_beside_the_single_key(self, given: Callable[..., Settings]) -> None:
        settings = given(ATLAS_API_KEY=KEY, ATLAS_API_KEYS=json.dumps({"default": [OTHER]}))

        assert {"default": [KEY, OTHER]} == keys_of(settings)

    def test_belong_to_one_account_each(self, refusal: Refusal) -> None:
        said = refusal(ATLAS_API_KEYS=json.dumps({"acme": [KEY], "beta": [OTHER, KEY]}))

        assert "'acme'" in said
        assert "'beta'" in said
        assert KEY not in said

    def test_may_not_repeat_the_single_key_elsewhere(self, refusal: Refusal) -> None:
        said = refusal(ATLAS_API_KEY=KEY, ATLAS_API_KEYS=json.dumps({"acme": [KEY]}))

        assert "'default'" in said
        assert KEY not in said

    @pytest.mark.parametrize(
        "value, why",
        [
            pytest.param("{", "is not valid JSON", id="broken"),
            pytest.param("[" * 100_000, "is not valid JSON", id="nested-without-end"),
            pytest.param("'{}'", "is not valid JSON", id="quoted-twice"),
            pytest.param(json.dumps([KEY]), "must be a JSON object", id="list"),
            pytest.param(
                f'{{"acme": ["{KEY}"], "acme": []}}', "has one name twice", id="account-twice"
            ),
            pytest.param(json.dumps({"acme": KEY}), "needs a list", id="no-list"),
            pytest.param(json.dumps({"acme": []}), "needs a list", id="empty-list"),
            pytest.param(json.dumps({"acme": [1]}), "acme.0", id="number"),
            pytest.param(json.dumps({"acme": [{"label": "a"}]}), "acme.0.key", id="no-key"),
            pytest.param(json.dumps({"a/b": [KEY]}), "not usable in a URL", id="slash-in-label"),
            pytest.param(json.dumps({"": [KEY]}), "not usable in a URL", id="empty-label"),
            pytest.param(
                json.dumps({"acme": [{"key": KEY, "user": "x"}]}), "acme.0.user", id="unknown-word"
            ),
            pytest.param(
                json.dumps({"acme": [{"key": KEY, "use": ["sign"]}]}),
                "acme.0.use",
                id="unknown-use",
            ),
            pytest.param(
                json.dumps({"acme": [{"key": KEY, "not_after": "2026-12-01T00:00"}]}),
                "acme.0.not_after",
                id="time-without-zone",
            ),
        ],
    )
    def test_are_refused_with_the_place_of_the_mistake(
        self, refusal: Refusal, value: str, why: str
    ) -> None:
        said = refusal(ATLAS_API_KEYS=value)

        assert said.startswith("ATLAS_API_KEYS")
        assert why in said
        assert KEY not in said

    @pytest.mark.parametrize("value", [{KEY: ["acme"]}, {KEY: "acme"}, {f"{KEY}/": [OTHER]}])
    def test_in_the_place_of_the_label_are_not_shown(self, refusal: Refusal, value: object) -> None:
        assert KEY not in refusal(ATLAS_API_KEYS=json.dumps(value))


class TestSecretsOfBuiltIns:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("PUBLISH_URL", "nats://nats"),
            ("PUBLISH_URL", "redis://redis"),
            ("SLACK_URL", "http://x"),
            # Said to be wrong by `forward`, which says what is right.
            ("FORWARD_SECRETS", "abc"),
        ],
    )
    def test_may_be_short_and_are_hidden(
        self, given: Callable[..., Settings], name: str, value: str
    ) -> None:
        settings = given(**{name: value})

        (secret,) = {settings.publish_url, settings.slack_url, *settings.forward_secrets} - {None}
        assert secret is not None
        assert value == secret.get_secret_value()
        assert value not in repr(settings)

    @pytest.mark.parametrize("name", ["PUBLISH_URL", "SLACK_URL", "FORWARD_SECRETS"])
    def test_are_one_line_of_text(self, refusal: Refusal, name: str) -> None:
        said = refusal(**{name: "nats://na\x01ts"})

        assert said.startswith(name)
        assert "control character" in said
        assert "nats" not in said

    @pytest.mark.parametrize("name", ["PUBLISH_URL", "SLACK_URL"])
    def test_are_more_than_blanks(self, refusal: Refusal, name: str) -> None:
        assert f"{name}: is empty" == refusal(**{name: " "})


class TestFiles:
    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(KEY.encode(), id="bare"),
            pytest.param(f"{KEY}\n".encode(), id="lf"),
            pytest.param(f"{KEY}\r\n".encode(), id="crlf"),
            pytest.param(b"\xef\xbb\xbf" + KEY.encode(), id="bom"),
            pytest.param(b"\xef\xbb\xbf" + f"  {KEY}\r\n\r\n".encode(), id="all-of-it"),
        ],
    )
    def test_may_hold_the_key(
        self, given: Callable[..., Settings], tmp_path: Path, content: bytes
    ) -> None:
        file = tmp_path / "key"
        file.write_bytes(content)

        assert {"default": [KEY]} == keys_of(given(ATLAS_API_KEY_FILE=str(file)))

    def test_may_stand_in_one_directory(
        self, given: Callable[..., Settings], tmp_path: Path
    ) -> None:
        (tmp_path / "ATLAS_API_KEY").write_text(f"{KEY}\n")
        (tmp_path / "API_TOKENS").write_text(json.dumps({"office": TOKEN}))
        (tmp_path / "UNRELATED").write_text("nothing of ours")

        settings = given(SECRETS_DIR=str(tmp_path))

        assert {"default": [KEY]} == keys_of(settings)
        assert {"office"} == set(settings.api_tokens)

    def test_named_one_by_one_win_over_the_directory(
        self, given: Callable[..., Settings], tmp_path: Path
    ) -> None:
        (tmp_path / "ATLAS_API_KEY").write_text(OTHER)
        (tmp_path / "mine").write_text(KEY)

        settings = given(SECRETS_DIR=str(tmp_path), ATLAS_API_KEY_FILE=str(tmp_path / "mine"))

        assert {"default": [KEY]} == keys_of(settings)

    def test_lose_to_the_environment(self, given: Callable[..., Settings], tmp_path: Path) -> None:
        (tmp_path / "ATLAS_API_KEY").write_text(OTHER)

        assert {"default": [KEY]} == keys_of(given(SECRETS_DIR=str(tmp_path), ATLAS_API_KEY=KEY))

    @pytest.mark.parametrize("name", ["missing", "."])
    def test_that_cannot_be_read_stop_the_start(
        self, refusal: Refusal, tmp_path: Path, name: str
    ) -> None:
        said = refusal(ATLAS_API_KEY_FILE=str(tmp_path / name))

        assert said.startswith("ATLAS_API_KEY_FILE: ")
        assert str(tmp_path) in said

    def test_that_are_no_text_stop_the_start(self, refusal: Refusal, tmp_path: Path) -> None:
        file = tmp_path / "key"
        file.write_bytes(b"\xff\xfe" + KEY.encode("utf-16-le"))

        assert refusal(ATLAS_API_KEY_FILE=str(file)).startswith("ATLAS_API_KEY_FILE: ")

    def test_that_are_empty_stop_the_start(self, refusal: Refusal, tmp_path: Path) -> None:
        """An orchestrator that mounts a secret too late leaves such a file."""
        file = tmp_path / "key"
        file.write_text("\n")

        assert "is empty" in refusal(ATLAS_API_KEY_FILE=str(file))

    def test_need_their_directory(self, refusal: Refusal, tmp_path: Path) -> None:
        said = refusal(SECRETS_DIR=str(tmp_path / "missing"), ATLAS_API_KEY=KEY)

        assert said.startswith("SECRETS_DIR: ")


class TestEnvFile:
    @pytest.fixture(name="env_file")
    def _env_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "settings.env"
        monkeypatch.setenv("ENV_FILE", str(path))
        return path

    def test_is_read(self, env_file: Path) -> None:
        env_file.write_text(f"ATLAS_API_KEY={KEY}\nUNRELATED=1\n")

        assert {"default": [KEY]} == keys_of(read_settings())

    def test_loses_to_the_environment(self, env_file: Path, given: Callable[..., Settings]) -> None:
        env_file.write_text(f"ATLAS_API_KEY={OTHER}\n")

        assert {"default": [KEY]} == keys_of(given(ATLAS_API_KEY=KEY))

    def test_may_name_the_file_of_a_secret(self, env_file: Path, tmp_path: Path) -> None:
        (tmp_path / "key").write_text(KEY)
        env_file.write_text(f"ATLAS_API_KEY_FILE={tmp_path / 'key'}\n")

        assert {"default": [KEY]} == keys_of(read_settings())

    def test_may_name_the_directory_of_the_secrets(self, env_file: Path, tmp_path: Path) -> None:
        (tmp_path / "ATLAS_API_KEY").write_text(KEY)
        env_file.write_text(f"SECRETS_DIR={tmp_path}\n")

        assert {"default": [KEY]} == keys_of(read_settings())

    def test_that_is_missing_is_none(self, env_file: Path) -> None:
        assert not env_file.exists()
        assert {} == keys_of(read_settings())

    def test_that_is_no_text_stops_the_start(self, env_file: Path) -> None:
        env_file.write_bytes(b"\xff\xfeA\x00")

        with pytest.raises(ConfigError, match="UTF-8"):
            read_settings()


class TestTokens:
    def test_are_strings_or_objects(self, given: Callable[..., Settings]) -> None:
        spec = {"tokens": [OTHER, KEY], "scopes": ["read", "raw"], "accounts": ["acme"]}

        tokens = given(API_TOKENS=json.dumps({"office": TOKEN, "audit": spec})).api_tokens

        assert ["read"] == sorted(tokens["office"].scopes)
        assert tokens["office"].accounts is None
        assert ["raw", "read"] == sorted(tokens["audit"].scopes)
        assert ["acme"] == sorted(tokens["audit"].accounts or ())
        assert 2 == len(tokens["audit"].tokens)

    @pytest.mark.parametrize("value", ["", " ", "{}"])
    def test_may_be_none(self, given: Callable[..., Settings], value: str) -> None:
        assert {} == given(API_TOKENS=value).api_tokens

    def test_are_told_apart(self, refusal: Refusal) -> None:
        said = refusal(API_TOKENS=json.dumps({"office": TOKEN, "audit": TOKEN}))

        assert "API_TOKENS" in said
        assert "'office' and 'audit'" in said
        assert TOKEN not in said

    @pytest.mark.parametrize(
        "value",
        [
            pytest.param("{", id="broken"),
            pytest.param(json.dumps([TOKEN]), id="list"),
            pytest.param(json.dumps({"office": "short"}), id="short"),
            pytest.param(json.dumps({"office": {"tokens": []}}), id="no-token"),
            pytest.param(json.dumps({"office": {"tokens": TOKEN}}), id="no-list"),
            pytest.param(
                json.dumps({"office": {"tokens": [TOKEN], "scopes": ["all"]}}), id="unknown-scope"
            ),
            pytest.param(json.dumps({TOKEN: "office"}), id="the-wrong-way-round"),
            pytest.param(json.dumps({"office": {TOKEN: "tokens"}}), id="a-token-as-a-word"),
        ],
    )
    def test_are_refused_without_being_shown(self, refusal: Refusal, value: str) -> None:
        said = refusal(API_TOKENS=value)

        assert said.startswith("API_TOKENS")
        assert TOKEN not in said


class TestDurations:
    @pytest.mark.parametrize(
        "value, expected",
        [
            ("45", timedelta(seconds=45)),
            ("1500ms", timedelta(seconds=1.5)),
            ("30s", timedelta(seconds=30)),
            ("15m", timedelta(minutes=15)),
            ("15 min", timedelta(minutes=15)),
            ("2h", timedelta(hours=2)),
            (" 7d ", timedelta(days=7)),
            ("0.5h", timedelta(minutes=30)),
        ],
    )
    def test_have_units(
        self, given: Callable[..., Settings], value: str, expected: timedelta
    ) -> None:
        assert expected == given(ORDER_MAX_WAIT=value).order_max_wait

    @pytest.mark.parametrize(
        "value", ["soon", "-5s", "0", "0s", "5 weeks", "1e3", "nan", "9" * 400, "9999999999d"]
    )
    def test_are_refused_if_nobody_could_wait_them(self, refusal: Refusal, value: str) -> None:
        assert refusal(ORDER_MAX_WAIT=value).startswith("ORDER_MAX_WAIT: ")


class TestOthers:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("MAX_BODY_BYTES", "1023"),
            ("MAX_BODY_BYTES", "a lot"),
            ("MAX_PENDING_BYTES", "0"),
            ("MAX_PENDING_EVENTS", "-1"),
            ("API_PORT", "0"),
            ("API_PORT", "65536"),
            ("API_PORT", "eight thousand"),
            ("DATABASE_SCHEMA", 'x"; drop table events; --'),
            ("DATABASE_SCHEMA", "Upper"),
            ("DATABASE_POOL", "1"),
            ("PGBOUNCER", "maybe"),
            ("DELIVERY_LEASE", "0"),
            ("DELIVERY_CONCURRENCY", "0"),
            ("LOG_LEVEL", "LOUD"),
            ("LOG_FORMAT", "xml"),
        ],
    )
    def test_are_refused_by_name(self, refusal: Refusal, name: str, value: str) -> None:
        assert refusal(**{name: value}).startswith(f"{name}: ")

    def test_are_all_refused_at_once(self, refusal: Refusal) -> None:
        """Nobody wants to learn of three mistakes in three deployments."""
        said = refusal(LOG_LEVEL="LOUD", API_PORT="0", ATLAS_API_KEY="short")

        assert {"LOG_LEVEL", "API_PORT", "ATLAS_API_KEY"} <= {
            part.split(":")[0] for part in said.split("; ")
        }

    @pytest.mark.parametrize("name", ["DATABASE_URL", "MIGRATE_DATABASE_URL"])
    def test_empty_addresses_are_absent(self, given: Callable[..., Settings], name: str) -> None:
        """Compose files pass on what is not set as an empty string."""
        settings = given(**{name: ""})

        assert "sqlite:///var/receiver.db" == settings.database_url.get_secret_value()
        assert settings.migrate_database_url is None

    @pytest.mark.parametrize(
        "name", sorted({name.upper() for name in Settings.model_fields} - {"ATLAS_API_KEY"})
    )
    def test_that_are_empty_are_the_default(
        self, given: Callable[..., Settings], name: str
    ) -> None:
        assert given() == given(**{name: ""})

    def test_that_are_empty_win_over_the_file(
        self, given: Callable[..., Settings], tmp_path: Path
    ) -> None:
        """`make migration` counts on it: what is meant is the default, not what is elsewhere."""
        file = tmp_path / "settings.env"
        file.write_text("MIGRATE_DATABASE_URL=postgresql://localhost/real\nAPI_PORT=9000\n")

        settings = given(ENV_FILE=str(file), MIGRATE_DATABASE_URL="", API_PORT="")

        assert (None, None) == (settings.migrate_database_url, settings.api_port)

    def test_may_be_words_in_any_case(self, given: Callable[..., Settings]) -> None:
        settings = given(LOG_LEVEL="info", LOG_FORMAT="JSON")

        assert ("INFO", "json") == (settings.log_level, settings.log_format)

    def test_cannot_be_changed_later(self, given: Callable[..., Settings]) -> None:
        with pytest.raises(ValueError, match="frozen"):
            given().log_level = "DEBUG"

    def test_of_other_programs_are_left_alone(self, given: Callable[..., Settings]) -> None:
        assert os.environ.get("PATH")
        assert given(UNRELATED="x").keys == {}


CANARY = "settings-canary-0123456789"
# None of them is what anybody meant, wherever it stands.
GARBAGE = [
    CANARY,
    f"{CANARY}\nX=1",
    f"\ufeff{CANARY}",
    f"{CANARY}\x01",
    f"\udce9{CANARY}",
    f"{CANARY}" + "é" * 10_000,
    f"-1{CANARY}",
    "-1",
    "1e309",
    "9" * 5_000,
    f'["{CANARY}"]',
    f'{{"a": "{CANARY}"}}',
    f'{{"a": [{{"key": "{CANARY}", "use": ["{CANARY}"]}}]}}',
    "[" * 100_000,
    "null",
    "${DATABASE_URL}",
]


class TestEverySetting:
    @pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
    @pytest.mark.parametrize("name", sorted(name.upper() for name in Settings.model_fields))
    def test_is_taken_or_refused_by_its_name(
        self, given: Callable[..., Settings], name: str, garbage: str
    ) -> None:
        """Never with an error of another kind; and a secret is not quoted in either case."""
        said = words_about(given, name, garbage)

        assert name in said
        assert name not in SECRETS or CANARY not in said


def words_about(given: Callable[..., Settings], name: str, value: str) -> str:
    """Give the refusal of a value, or what is shown of the settings that hold it."""
    try:
        return f"{name}: {given(**{name: value})!r}"
    except ConfigError as refused:
        return str(refused)


class TestLoopback:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
    def test_is_this_machine_alone(self, host: str) -> None:
        assert is_loopback(host)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.com", "127.1", "*"])  # noqa: S104
    def test_is_nothing_else(self, host: str) -> None:
        assert not is_loopback(host)
