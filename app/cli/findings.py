"""What `check` looks at, thing by thing; each finding says what is wrong and what to do."""

import asyncio
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from app.cli.terminal import READ_LIMIT, cell
from app.dispatch import control
from app.dispatch.control import CallbackStatus
from app.dispatch.obituary import DEAD
from app.dispatch.registry import Callback
from app.events.lifecycle import IMPLIED_STATUS, MILESTONES
from app.events.signature import MAX_UNDIRECTED_KEYS, Key
from app.intake.projection import CONFLICT, DISPUTED, QUARANTINED
from app.intake.reproject import ACCEPTED
from app.settings import ROOT, Settings
from app.store import durability
from app.store import keys as key_rows
from app.store.schema import read_state
from app.store.session import Database, DatabaseAddress, is_pooler, takes_no_writes
from app.wiring import verification_keys

ADVISED_BYTES: Final = 32
SOON: Final = timedelta(days=14)
GENERATED: Final = b"local_"
PGBOUNCER_PORT: Final = 6432
OWN_TYPES: Final = frozenset({DEAD, CONFLICT, DISPUTED, QUARANTINED, ACCEPTED})
KNOWN_TYPES: Final = {*IMPLIED_STATUS, *MILESTONES, *OWN_TYPES}


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `fail` keeps the service from working or from promising."""

    level: Level
    what: str
    why: str = ""

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        # One finding is one line, also where the message of another part has several.
        return f"{self.level:<4} {' '.join(text.split())}"


def _ok(what: str) -> Finding:
    return Finding(Level.OK, what)


def _warn(what: str, why: str) -> Finding:
    return Finding(Level.WARN, what, why)


def _fail(what: str, remedy: str) -> Finding:
    return Finding(Level.FAIL, what, remedy)


def of_env_file() -> Iterator[Finding]:
    """Look at who may read the file with the keys."""
    named = os.environ.get("ENV_FILE", str(ROOT / ".env"))
    path = Path(named)
    if named and path.is_file() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield _warn(str(path), f"others may read it, and it holds keys: chmod 600 {path}")


def of_keys(settings: Settings, *, now: datetime) -> Iterator[Finding]:
    """Look at the keys that prove webhooks genuine."""
    keys = verification_keys(settings)
    if not keys:
        yield _fail("keys", "none may verify: set ATLAS_API_KEY (`make run` makes one)")
    for key in keys:
        yield _of_key(key, now)
    undirected = [key for key in keys if key.not_after is None or key.not_after >= now]
    if len(undirected) > MAX_UNDIRECTED_KEYS:
        yield _warn(
            f"{len(undirected)} keys",
            f"/webhooks/atlas tries {MAX_UNDIRECTED_KEYS} of them only: give Atlas "
            "/webhooks/atlas/ACCOUNT as webhook_url",
        )
    labels = Counter((key.account, key.label) for key in keys)
    for (account, label), count in labels.items():
        if count > 1:
            yield _warn(f"label {label!r}", f"{count} keys of the account {account!r} share it")


def _of_key(key: Key, now: datetime) -> Finding:
    what = f"key {key.label!r} of the account {key.account!r}"
    if key.not_after is not None and key.not_after < now:
        return _warn(what, f"expired at {cell(key.not_after)}: take it out, or move not_after")
    if key.not_after is not None and key.not_after < now + SOON:
        return _warn(what, f"expires at {cell(key.not_after)}")
    if key.secret.startswith(GENERATED):
        return _warn(what, "made by `make run`, so Atlas does not know it: put your key there")
    if len(key.secret) < ADVISED_BYTES:
        return _warn(what, f"has {len(key.secret)} bytes; {ADVISED_BYTES} or more are advised")
    return _ok(what)


def of_tokens(settings: Settings) -> Iterator[Finding]:
    """Look at who may ask the internal API."""
    if not settings.api_tokens:
        yield _warn("API_TOKENS", "none, so nobody may ask the internal API")
    for name, spec in settings.api_tokens.items():
        what = f"token of {name!r} ({', '.join(sorted(spec.scopes)) or 'no scope'})"
        unknown = sorted((spec.accounts or frozenset()) - settings.keys.keys())
        if unknown:
            yield _warn(what, f"names accounts that no key belongs to: {', '.join(unknown)}")
        elif not spec.scopes or spec.accounts == frozenset():
            yield _warn(what, "may do nothing: give it scopes and accounts, or leave both out")
        elif any(len(t.get_secret_value().encode()) < ADVISED_BYTES for t in spec.tokens):
            yield _warn(what, f"shorter than {ADVISED_BYTES} bytes, which are advised")
        else:
            yield _ok(what)


def of_callbacks(callbacks: Sequence[Callback], settings: Settings) -> Iterator[Finding]:
    """Look at what `CALLBACKS` names here."""
    if not callbacks:
        yield _warn("CALLBACKS", "names none, so this process would run none")
    for callback in callbacks:
        what = f"callback {callback.name!r} wants {', '.join(callback.patterns)}"
        unknown = [p for p in callback.patterns if not p.endswith("*") and p not in KNOWN_TYPES]
        if callback.account is not None and callback.account not in settings.keys:
            yield _warn(what, f"of the account {callback.account!r}, to which no key belongs")
        elif unknown:
            yield _warn(what, f"Atlas is not known to send {', '.join(unknown)}: is it misspelt?")
        else:
            yield _ok(what)


def of_address(settings: Settings, address: DatabaseAddress) -> Iterator[Finding]:
    """Look at how the database is reached."""
    if not address.is_postgresql:
        yield _ok(f"SQLite at {address.sqlite_path}: one machine, one process that takes webhooks")
        return
    port = _port(address.url)
    if port == PGBOUNCER_PORT and not settings.pgbouncer:
        yield _warn(
            "DATABASE_URL", f"port {port} is that of PgBouncer: set PGBOUNCER=true if it is"
        )
    if settings.pgbouncer and settings.migrate_database_url is None:
        yield _warn(
            "PGBOUNCER",
            "migrations need a direct connection: set MIGRATE_DATABASE_URL to the server itself",
        )


def _port(url: str) -> int | None:
    try:
        return urlsplit(url).port
    except ValueError:
        # Several hosts, each with a port of its own.
        return None


async def of_server(database: Database) -> list[Finding]:
    """Look at what a commit is worth."""
    server = await durability.inspect(database)
    found = [_ok(f"{server.version} answers")]
    for promise in server.promises:
        what = f"{promise.name} is {promise.value}"
        found.append(_ok(what) if promise.is_kept else _fail(what, promise.remedy))
    return found


async def of_schema(database: Database, settings: Settings) -> list[Finding]:
    """Look at the tables, and at what they know that the settings do not."""
    async with asyncio.timeout(READ_LIMIT.total_seconds()):
        state = await read_state(database)
    if not state.is_servable:
        return [_fail(f"schema is {state.fit}", "run `python -m app migrate`, or deploy what fits")]
    found = [_ok(f"schema at {state.found} ({state.fit})")]
    found += await _of_known_keys(database, settings)
    return found + [_of_registered(each) for each in await control.list_callbacks(database)]


async def _of_known_keys(database: Database, settings: Settings) -> list[Finding]:
    async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
        known = {row.fingerprint: row.account for row in await key_rows.page(connection)}
    return [
        _fail(
            f"key {key.label!r} of the account {key.account!r}",
            f"the database knows it by {known[key.fingerprint]!r}: put it there in ATLAS_API_KEYS, "
            f"or run `python -m app keys rename {known[key.fingerprint]} {key.account}`",
        )
        for key in verification_keys(settings)
        if known.get(key.fingerprint, key.account) != key.account
    ]


def _of_registered(status: CallbackStatus) -> Finding:
    registered = status.registered
    what = f"deliveries to {registered.subscription.name!r}"
    if registered.paused_at is not None:
        return _warn(what, f"paused since {cell(registered.paused_at)}")
    if status.flow.open_until is not None:
        return _warn(
            what, f"too many fail: its breaker is open until {cell(status.flow.open_until)}"
        )
    if not registered.is_served:
        waiting = sum(status.counts.values())
        return _warn(
            what,
            f"no process has served it since {cell(registered.last_seen_at)}, {waiting} wait: "
            "start a worker whose CALLBACKS has it",
        )
    if dead := status.counts.get("dead"):
        return _warn(what, f"{dead} are dead: `python -m app deliveries failures`")
    return _ok(what)


def of_failure(
    error: BaseException, database: Database, *, setting: str = "DATABASE_URL"
) -> Finding:
    """Say what is probably wrong with a database that does not answer."""
    if takes_no_writes(error):
        return _fail(
            "database", f"is a standby, or set to read only: name the primary in {setting}"
        )
    if is_pooler(error):
        return _fail("database", f"{setting} leads to a pooler: set PGBOUNCER=true")
    place = "PostgreSQL" if database.is_postgresql else str(database.address.sqlite_path)
    return _fail(
        f"database ({place})",
        f"does not answer ({_cause(error)}): is it running, and is {setting} right?",
    )


def _cause(error: BaseException) -> str:
    # The text of a driver's error may quote the address, and with it the password.
    original = getattr(error, "orig", None)
    return type(error if original is None else original.__cause__ or original).__name__
