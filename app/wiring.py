"""Settings to a running service: the only file that knows every part."""

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app.callbacks.loader import load
from app.dispatch.options import DispatchOptions
from app.dispatch.registry import Callback
from app.dispatch.worker import Dispatcher
from app.errors import ConfigError, NotDurable
from app.events.signature import Key, KeyRing, default_label, fingerprint_of
from app.intake import DATABASE_LIMITS, Announcer, Intake, IntakeLimits, Receipt, Subscriptions
from app.settings import ROOT, KeySpec, Settings
from app.store import durability
from app.store import keys as key_rows
from app.store.schema import Fit, read_state
from app.store.session import Database, DatabaseAddress, DatabaseError
from app.telemetry import described, get_logger
from app.upkeep.sequencer import Sequencer
from app.upkeep.tail import Tail

log = get_logger("service")

_RETRY = timedelta(seconds=1)
_FLUSH = timedelta(seconds=5)


def database_address(settings: Settings, *, is_migrating: bool = False) -> DatabaseAddress:
    """Say where the database is; migrations may have an address of their own."""
    url = settings.database_url
    if is_migrating and settings.migrate_database_url is not None:
        url = settings.migrate_database_url
    _require_readable(url.get_secret_value())
    address = DatabaseAddress(
        url.get_secret_value(),
        schema=settings.database_schema,
        pgbouncer=settings.pgbouncer and not is_migrating,
    )
    if not address.is_postgresql:
        _require_directory(address.sqlite_path)
    return address


def _require_readable(url: str) -> None:
    """Refuse an address that no driver could read, without showing any of its password."""
    try:
        hosts = urlsplit(url).netloc.rpartition("@")[2].split(",")
        ports = [urlsplit(f"//{host}").port for host in hosts]
    except ValueError:
        ports = []
    if not ports or "://" not in url:
        raise ConfigError(
            "DATABASE_URL cannot be read: it is postgresql://user:password@host:port/database, "
            "with special characters of the password percent-encoded, or sqlite:///file"
        )


def _require_directory(path: Path) -> None:
    if path.parent == ROOT / "var":
        path.parent.mkdir(exist_ok=True)
    if not path.parent.is_dir():
        raise ConfigError(f"DATABASE_URL names a file in {path.parent}, which is not a directory")
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK):
        raise ConfigError(f"DATABASE_URL names {path}, which this user may not write")


def verification_keys(settings: Settings) -> list[Key]:
    """Give every key that may prove a request genuine."""
    return [
        _key(account, spec)
        for account, specs in settings.keys.items()
        for spec in specs
        if "verify" in spec.use
    ]


def _key(account: str, spec: KeySpec) -> Key:
    secret = spec.key.get_secret_value().encode()
    return Key(
        account=account,
        secret=secret,
        label=spec.label or default_label(secret),
        fingerprint=fingerprint_of(secret),
        not_after=spec.not_after,
    )


def load_callbacks(settings: Settings) -> tuple[Callback, ...]:
    """Import what `CALLBACKS` names."""
    return load(settings.callbacks, settings)


def worker_name() -> str:
    """Name this process in leases and in the history of attempts."""
    return f"{socket.gethostname()[:64]}:{os.getpid()}"


def dispatcher(
    settings: Settings, callbacks: tuple[Callback, ...], *, is_pressed: Callable[[], bool]
) -> Dispatcher:
    """Build the part that runs callbacks, with threads and connections of its own."""
    options = DispatchOptions(
        lease=settings.delivery_lease,
        slots=settings.delivery_concurrency,
        order_max_wait=settings.order_max_wait,
    )
    return Dispatcher(
        database_address(settings),
        callbacks,
        options=options,
        worker=worker_name(),
        listens_at=_listening_address(settings),
        is_pressed=is_pressed,
    )


def _listening_address(settings: Settings) -> DatabaseAddress | None:
    """Say where a session of one's own is to be had: behind a pooler only at the server."""
    if settings.pgbouncer and settings.migrate_database_url is None:
        return None
    address = database_address(settings, is_migrating=settings.pgbouncer)
    return address if address.is_postgresql else None


@dataclass(slots=True)
class KeyUsage:
    """Remembers when keys matched, and writes it down now and then, off the path."""

    database: Database
    matches: dict[str, datetime] = field(default_factory=dict)

    def note(self, key: Key, at: datetime) -> None:
        """Note that `key` proved a request genuine."""
        self.matches[key.fingerprint] = at

    async def flush(self) -> None:
        """Write down what was noted since the last time."""
        if not self.matches:
            return
        matches, self.matches = self.matches, {}
        try:
            async with self.database.begin(limit=timedelta(seconds=2)) as connection:
                await key_rows.touch(connection, matches)
        except DatabaseError:
            self.matches = {**matches, **self.matches}


class Services:
    """The parts of one process, started and stopped in order."""

    def __init__(self, settings: Settings, *, takes_webhooks: bool, works: bool) -> None:
        self.settings = settings
        self.keys = verification_keys(settings)
        self.keyring = KeyRing(self.keys)
        self.database = Database(
            database_address(settings), size=settings.database_pool, limits=DATABASE_LIMITS
        )
        self.usage = KeyUsage(self.database)
        self.subscriptions = Subscriptions(self.database)
        self.intake = Intake(
            self.database,
            interested=self.subscriptions.names_for,
            on_owed=self._tell_workers,
            limits=IntakeLimits(
                events=settings.max_pending_events, bytes=settings.max_pending_bytes
            ),
        )
        callbacks = load_callbacks(settings) if works else ()
        self.dispatcher = (
            dispatcher(settings, callbacks, is_pressed=lambda: self.intake.is_pressed)
            if works
            else None
        )
        self._served = {callback.name for callback in callbacks}
        self.announcer = Announcer(self.database)
        self.sequencer = Sequencer(self.database, holder=worker_name())
        self.tail = Tail(self.database)
        self._takes_webhooks = takes_webhooks
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: set[str] = set()
        self._is_prepared = False
        self._obstacle = "the database has not answered yet"
        self._words: dict[str, str] = {}

    async def record(self, body: bytes, *, account: str, key_label: str) -> Receipt:
        """Record one authentic body, once the database is known to fit."""
        if not self._is_prepared:
            raise NotDurable("not_ready")
        return await self.intake.record(body, account=account, key_label=key_label)

    def _tell_workers(self, callbacks: set[str]) -> None:
        """Wake whoever serves these: this process, others, or both."""
        if self.dispatcher is not None:
            self.dispatcher.wake()
        if self.database.is_postgresql and not callbacks <= self._served:
            self.announcer.announce()

    async def start(self) -> None:
        """Start every loop; a database that is away does not stop the process."""
        await self._try_to_prepare()
        if not self._is_prepared:
            self._keep("preparation", self._prepare_for_ever)
        if self._takes_webhooks:
            self._keep("subscriptions", self.subscriptions.run)
            self._keep("intake", self.intake.run)
            self._keep("keys", self._flush_for_ever)
            self._keep("announcer", self.announcer.run)
        self._keep("feed", self.sequencer.run)
        self._keep("tail", self.tail.run)
        if self.dispatcher is not None:
            self.dispatcher.start()
        log.info("service.started", worker=worker_name())

    def _keep(self, name: str, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks[name] = asyncio.create_task(self._survive(name, loop), name=name)

    async def _survive(self, name: str, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a loop to its own end; one that fails takes readiness with it, and starts again."""
        while True:
            try:
                await loop()
            except Exception as error:  # noqa: BLE001  # the fence of a loop: it must not end
                log.error("loop.failed", loop=name, **described(error))  # noqa: TRY400  # no values
                self._failed.add(name)
                await asyncio.sleep(_RETRY.total_seconds())
                self._failed.discard(name)
            else:
                return

    async def prepare(self) -> None:
        """Check that the schema fits and that every key is known by its account.

        Raises `ConfigError` with what to do, or a `DatabaseError` if nobody answers.
        """
        async with asyncio.timeout(5):
            state = await read_state(self.database)
        state.require()
        if state.fit is Fit.COMPATIBLE:
            log.warning("schema.newer", found=state.found, needed=state.needed)
        async with self.database.begin(limit=timedelta(seconds=3)) as connection:
            await key_rows.register(connection, self.keys, at=datetime.now(UTC))
        if self._takes_webhooks:
            await self.subscriptions.refresh()
            await self._warn_of_durability()

    async def _warn_of_durability(self) -> None:
        """Say it once, loudly, if a 200 of this process would promise too much."""
        server = await durability.inspect(self.database)
        for promise in server.promises:
            if not promise.is_kept:
                log.warning(
                    "durability.weak",
                    setting=promise.name,
                    value=promise.value,
                    remedy=promise.remedy,
                )

    async def _try_to_prepare(self) -> None:
        try:
            await self.prepare()
        except ConfigError as error:
            self._see(str(error))
        except DatabaseError as error:
            self._see(f"the database does not answer ({type(error).__name__})")
        else:
            self._is_prepared = True

    def _see(self, obstacle: str) -> None:
        if obstacle != self._obstacle:
            log.error("service.not_ready", obstacle=obstacle)
        self._obstacle = obstacle

    async def _prepare_for_ever(self) -> None:
        while not self._is_prepared:
            await asyncio.sleep(_RETRY.total_seconds())
            await self._try_to_prepare()
        log.info("service.prepared")

    async def _flush_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH.total_seconds())
            await self.usage.flush()

    async def probe(self) -> dict[str, str]:
        """Say of each thing that must work `ok`, or in a word what is wrong."""
        checks = {"database": await self._probe_database(), "loops": self._probe_loops()}
        if self.dispatcher is not None:
            why = "; ".join(self.dispatcher.problems())
            checks["dispatch"] = self._word("dispatch", "not working" if why else "ok", why)
        return checks

    def _word(self, part: str, word: str, why: str) -> str:
        """Give `word`, which anybody may read; why it is so, the log says once."""
        if not word.startswith("ok") and word != self._words.get(part):
            log.error("service.not_ready", obstacle=why)
        self._words[part] = word
        return word

    async def _probe_database(self) -> str:
        try:
            await self.database.ping()
            async with asyncio.timeout(3):
                state = await read_state(self.database)
        except DatabaseError as error:
            why = f"the database does not answer ({type(error).__name__})"
            return self._word("database", "does not answer", why)
        if not state.is_servable:
            why = f"the schema is at {state.found}, this release needs {state.needed}"
            return self._word("database", f"schema {state.fit}", why)
        if not self._is_prepared:
            return self._word("database", "not prepared", self._obstacle)
        return self._word("database", _servable(state.fit), "")

    def _probe_loops(self) -> str:
        ended = {n for n, task in self._tasks.items() if task.done() and n != "preparation"}
        down = sorted(ended | self._failed)
        return f"down: {', '.join(down)}" if down else "ok"

    async def stop(self) -> None:
        """Commit what is waiting, let callbacks end, and close every connection."""
        self.tail.close()
        await self.intake.close()
        if (committing := self._tasks.pop("intake", None)) is not None:
            await asyncio.wait([committing], timeout=6)
        for task in self._tasks.values():
            task.cancel()
        if self.dispatcher is not None:
            await asyncio.to_thread(self.dispatcher.stop, self.settings.shutdown_grace)
        await self.usage.flush()
        await self.database.close()
        log.info("service.stopped", worker=worker_name())


def _servable(fit: Fit) -> str:
    # Old replicas go on while new ones roll in; who looks can see that they do.
    return "ok" if fit is Fit.EQUAL else f"ok, schema {fit}"
