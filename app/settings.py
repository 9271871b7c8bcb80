"""Settings: the environment, `.env`, or files. Read once, by entry points only.

The environment wins over `.env`; `NAME_FILE` names a file that holds the value of a
secret `NAME`, and `SECRETS_DIR` a directory of such files. Every message names the
variable and the remedy, never the value.
"""

import json
import os
import re
from collections import ChainMap
from collections.abc import Mapping
from datetime import timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from app.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_ACCOUNT = "default"
MIN_SECRET_BYTES = 16
SECRETS = (
    "ATLAS_API_KEY",
    "ATLAS_API_KEYS",
    "API_TOKENS",
    "DATABASE_URL",
    "MIGRATE_DATABASE_URL",
    "FORWARD_SECRETS",
    "SLACK_URL",
    "PUBLISH_URL",
)

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?\s*")
_PLACEHOLDER = re.compile(
    r"change.?me|replace.?me|your.?(api.?)?key|placeholder|<.*>|\.\.\.|x{8,}", re.IGNORECASE
)
_ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _duration(value: Any) -> Any:
    """Read `30s`, `15m`, `2h`, `7d`, or a plain number of seconds."""
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(str(value))
    if match is None:
        message = "give a length of time such as 30s, 15m, 2h or 7d"
        raise ValueError(message)
    try:
        return timedelta(seconds=float(match[1]) * _UNITS[match[2] or "s"])
    except OverflowError:
        message = "is longer than any wait"
        raise ValueError(message) from None


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def clean_secret(value: str) -> str:
    """Drop what editors and shells leave around a secret: blanks, line ends, a BOM."""
    return value.strip("\ufeff \t\r\n")


def _confidential(value: Any, *, empty: str = "is empty") -> str:
    """Refuse what cannot be kept from others in one line; say why, never what it was."""
    if not isinstance(value, str):
        message = "must be text"
        raise ValueError(message)  # noqa: TRY004  # pydantic turns only ValueError into a message
    text = clean_secret(value)
    if not text:
        raise ValueError(empty)
    if not text.isprintable():
        message = "holds a control character, such as NUL, or a line end inside"
        raise ValueError(message)
    return text


def _secret(value: Any) -> str:
    """Refuse what others could guess, too."""
    no_key = "is empty; without a key nobody's events could be told from Atlas'"
    secret = _confidential(value, empty=no_key)
    if _PLACEHOLDER.search(secret) or len(set(secret)) == 1:
        message = "is a placeholder; put the real one there"
        raise ValueError(message)
    if len(secret.encode()) < MIN_SECRET_BYTES:
        message = f"is shorter than {MIN_SECRET_BYTES} bytes, which can be guessed"
        raise ValueError(message)
    return secret


def _words(value: Any) -> Any:
    """Read a list that is separated by commas."""
    if not isinstance(value, str):
        return value
    return tuple(word for part in value.split(",") if (word := part.strip()))


def _network(value: Any) -> Any:
    try:
        ip_network(str(value), strict=False)
    except ValueError:
        message = f"{str(value)[:60]!r} is no network: write 10.1.0.0/16, or one address"
        raise ValueError(message) from None
    return value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Networks = Annotated[
    tuple[Annotated[str, BeforeValidator(_network)], ...], NoDecode, BeforeValidator(_words)
]
Duration = Annotated[timedelta, BeforeValidator(_duration), Field(gt=timedelta(0))]
Secret = Annotated[SecretStr, BeforeValidator(_secret)]
# Whoever uses it knows what is right: an address may hold a password, and may be short.
Confidential = Annotated[SecretStr, BeforeValidator(_confidential)]
Scope = Literal["read", "operate", "raw"]


class KeySpec(BaseModel):
    """One Atlas API key of an account."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    key: Secret
    label: str | None = Field(default=None, min_length=1, max_length=64)
    use: frozenset[Literal["verify", "call"]] = frozenset({"verify", "call"})
    not_after: AwareDatetime | None = None


class TokenSpec(BaseModel):
    """A consumer of the internal API: its tokens, what it may do, whose data it may see."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    tokens: tuple[Secret, ...] = Field(min_length=1)
    scopes: frozenset[Scope] = frozenset({"read"})
    # None: every account.
    accounts: frozenset[str] | None = None


class RepeatedNameError(ValueError):
    """A JSON object has one name twice; the first value would silently be lost."""


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        message = "has one name twice in a JSON object; only the last one would count"
        raise RepeatedNameError(message)
    return dict(pairs)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return {}
    try:
        decoded = json.loads(clean_secret(value), object_pairs_hook=_each_name_once)
    except RepeatedNameError:
        raise
    except (ValueError, RecursionError):
        message = "is not valid JSON"
        raise ValueError(message) from None
    if not isinstance(decoded, dict):
        message = "must be a JSON object"
        raise ValueError(message)  # noqa: TRY004  # pydantic turns only ValueError into a message
    return decoded


class SecretFiles(PydanticBaseSettingsSource):
    """Reads `NAME` from the file that `NAME_FILE` names, or from `SECRETS_DIR/NAME`."""

    def __init__(
        self, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource
    ) -> None:
        super().__init__(settings_cls)
        # By lower-case name, of the environment and of `.env`; the first source wins.
        self._named = ChainMap(
            *(dict(s.env_vars) for s in sources if isinstance(s, EnvSettingsSource))
        )

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        """Give the content of the secret's file, if there is one."""
        del field  # the name says it all
        name = field_name.upper()
        path = self._path(name)
        if path is None:
            return None, field_name, False
        try:
            # utf-8-sig: editors on some systems put a BOM in front.
            return clean_secret(path.read_text("utf-8-sig")), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            message = f"{name}_FILE: cannot read {path}: {type(error).__name__}"
            raise ConfigError(message) from error

    def _path(self, name: str) -> Path | None:
        if named := self._named.get(f"{name}_file".lower()):
            return ROOT / named
        folder = self._named.get("secrets_dir")
        if not folder:
            return None
        if not (ROOT / folder).is_dir():
            raise ConfigError(f"SECRETS_DIR: {folder} is not a directory")
        path = ROOT / folder / name
        return path if path.is_file() else None

    def __call__(self) -> dict[str, Any]:
        """Give every secret that a file holds."""
        found: dict[str, Any] = {}
        for name in SECRETS:
            field = name.lower()
            value, _, _ = self.get_field_value(None, field)
            if value is not None:
                found[field] = value
        return found


class Settings(BaseSettings):
    """Everything that can be set; a field without a default here is decided by others."""

    model_config = SettingsConfigDict(
        env_file_encoding="utf-8",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    # Who may send: one key, or several accounts with several keys each.
    atlas_api_key: Secret | None = None
    atlas_api_keys: Annotated[Mapping[str, tuple[KeySpec, ...]], NoDecode] = {}
    atlas_base_url: str = "https://atlaswork.ai/api"

    # Where everything is kept.
    database_url: SecretStr = SecretStr("sqlite:///var/receiver.db")
    database_schema: str = Field(default="atlas_receiver", pattern=r"^[a-z_][a-z0-9_]{0,62}$")
    migrate_database_url: SecretStr | None = None
    pgbouncer: bool = False
    database_pool: int = Field(default=8, ge=2, le=200)

    # For how long bodies are kept; unset, nothing is pruned by itself.
    body_retention: Duration | None = None

    # Who is told.
    callbacks: str = ""
    delivery_lease: Duration = timedelta(seconds=30)
    delivery_concurrency: int = Field(default=64, ge=1, le=1000)
    order_max_wait: Duration = timedelta(minutes=15)
    shutdown_grace: Duration = timedelta(seconds=20)

    # What comes along: each of these is used by the built-in callback of its name.
    forward_url: str | None = None
    forward_secrets: Annotated[tuple[Confidential, ...], NoDecode, BeforeValidator(_words)] = ()
    forward_events: Words = ("*",)
    forward_timeout: Duration = timedelta(seconds=15)
    forward_allow: Networks = ()
    slack_url: Confidential | None = None
    slack_events: Words = ("envelope.signed", "envelope.declined", "envelope.voided")
    archive_url: str = "var/archive"
    archive_max_bytes: int = Field(default=50 * 1024 * 1024, ge=1024, le=2 * 1024**3)
    publish_url: Confidential | None = None
    publish_to: str = "atlas"
    publish_source: str = "atlas-receiver"
    publish_events: Words = ("*",)
    command_line: str | None = None
    command_events: Words = ("*",)

    # Who may ask.
    api_tokens: Annotated[Mapping[str, TokenSpec], NoDecode] = {}
    api_port: int | None = Field(default=None, ge=1, le=65535)
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    api_waiters: int = Field(default=5000, ge=1)
    api_waiters_per_token: int = Field(default=2000, ge=1)

    # What the public door takes.
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024, le=64 * 1024 * 1024)
    max_pending_bytes: int = Field(default=64 * 1024 * 1024, ge=1024 * 1024)
    max_pending_events: int = Field(default=4096, ge=1)
    # What each listener takes at once.
    max_connections: int = Field(default=8192, ge=1, le=100_000)

    # What it says.
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = (
        "INFO"
    )
    log_format: Annotated[Literal["auto", "json", "pretty"], BeforeValidator(_lower)] = "auto"

    @field_validator("atlas_api_keys", mode="before")
    @classmethod
    def _read_keys(cls, value: Any) -> Any:
        accounts = _from_json(value)
        if not isinstance(accounts, dict):
            return accounts
        return {account: _key_list(account, keys) for account, keys in accounts.items()}

    @field_validator("api_tokens", mode="before")
    @classmethod
    def _read_tokens(cls, value: Any) -> Any:
        names = _from_json(value)
        if not isinstance(names, dict):
            return names
        return {n: {"tokens": [t]} if isinstance(t, str) else t for n, t in names.items()}

    @model_validator(mode="before")
    @classmethod
    def _empty_is_the_default(cls, values: dict[str, Any]) -> dict[str, Any]:
        # Compose files pass on what is not set as an empty string. A key that is empty was
        # to be one, though: whoever mounts it too late must hear of it.
        return {
            name: value for name, value in values.items() if value != "" or name == "atlas_api_key"
        }

    @model_validator(mode="after")
    def _keys_are_told_apart(self) -> "Settings":
        seen: dict[str, str] = {}
        for account, keys in self.keys.items():
            for spec in keys:
                other = seen.setdefault(spec.key.get_secret_value(), account)
                if other != account:
                    message = (
                        f"ATLAS_API_KEYS: one key stands under the accounts {other!r} and "
                        f"{account!r}; all keys of one Atlas organisation belong in one list"
                    )
                    raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _tokens_are_told_apart(self) -> "Settings":
        seen: dict[str, str] = {}
        for name, spec in self.api_tokens.items():
            for token in spec.tokens:
                other = seen.setdefault(token.get_secret_value(), name)
                if other != name:
                    message = f"API_TOKENS: {other!r} and {name!r} share a token"
                    raise ValueError(message)
        return self

    @property
    def keys(self) -> dict[str, tuple[KeySpec, ...]]:
        """The keys of every account, the single one under `default`."""
        keys = dict(self.atlas_api_keys)
        if self.atlas_api_key is not None:
            single = KeySpec(key=self.atlas_api_key.get_secret_value())  # type: ignore[arg-type]
            keys[DEFAULT_ACCOUNT] = (single, *keys.get(DEFAULT_ACCOUNT, ()))
        return keys

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # replaced by our own
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: the environment wins over files, files over `.env`."""
        files = SecretFiles(settings_cls, env_settings, dotenv_settings)
        return init_settings, env_settings, files, dotenv_settings


def _key_list(account: str, keys: Any) -> Any:
    if not _ACCOUNT.fullmatch(account):
        message = (
            f"the account label {_shown(account)!r} is not usable in a URL: "
            "letters, digits, '.', '_' and '-', at most 64"
        )
        raise ValueError(message)
    if not isinstance(keys, list) or not keys:
        message = f"the account {_shown(account)!r} needs a list of at least one key"
        raise ValueError(message)
    return tuple({"key": key} if isinstance(key, str) else key for key in keys)


def read_settings(**overrides: Any) -> Settings:
    """Read the settings of this process; raise `ConfigError` in words a person can act on.

    `ENV_FILE` names another file than `.env` beside the code; empty, it names none.
    """
    env_file = os.environ.get("ENV_FILE", str(ROOT / ".env")) or None
    try:
        return Settings(_env_file=env_file, **overrides)  # type: ignore[call-arg]
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    except (SettingsError, UnicodeDecodeError) as error:
        message = f"the settings cannot be read: {type(error).__name__}; is {env_file} UTF-8 text?"
        raise ConfigError(message) from None


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        name, *parts = (str(part) for part in problem["loc"] or ("",))
        path = ".".join(map(_shown, parts))
        text = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{name.upper()}{f' ({path})' if path else ''}: {text}" if name else text)
    return "; ".join(lines)


def _shown(name: str) -> str:
    """Cut a name that is as long as a secret: it may be one, in the wrong place."""
    return name if len(name) < MIN_SECRET_BYTES else f"{name[:4]}…"


def is_loopback(host: str) -> bool:
    """True if only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
