"""Settings to a running service: the only file that knows every part."""

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from app import __version__
from app.callbacks.loader import load
from app.dispatch.options import DispatchOptions
from app.dispatch.registry import Callback
from app.dispatch.worker import Dispatcher
from app.errors import ConfigError, NotDurable
from app.events.signature import Key, KeyRing, default_label, fingerprint_of
from app.intake import (
    DATABASE_LIMITS,
    Announcer,
    Fact,
    Intake,
    IntakeLimits,
    OnAnswer,
    Receipt,
    Subscriptions,
)
from app.metrics import Metrics, labelled, one
from app.settings import ROOT, KeySpec, Settings
from app.store import durability
from app.store import keys as key_rows
from app.store.levels import pool_of
from app.store.schema import Fit, read_state
from app.store.session import (
    Database,
    DatabaseAddress,
    DatabaseError,
    is_pooler,
    takes_no_writes,
)
from app.telemetry import described, get_logger
from app.upkeep.counting import Counting
from app.upkeep.drift import Drift
from app.upkeep.following import Following
from app.upkeep.levels import Gauges, Lag, show
from app.upkeep.pruning import Pruner
from app.upkeep.sequencer import Sequencer
from app.upkeep.silence import Silence
from app.upkeep.succession import Succession
from app.upkeep.tail import Tail
from app.upkeep.tallying import Tallies
from app.upkeep.terms import Terms

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
        self.metrics = Metrics(version=__version__)
        self.tallies = Tallies(self.database, holder=worker_name())
        self.counting = Counting(self.metrics, self.tallies)
        self.gauges, self.lag = Gauges(self.database), Lag()
        self.usage, self.succession = KeyUsage(self.database), Succession(self.database)
        self.subscriptions = Subscriptions(self.database)
        self.intake = Intake(
            self.database,
            interested=self.subscriptions.names_for,
            on_owed=self._tell_workers,
            on_recorded=self._tell_others,
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
        if self.dispatcher is not None:
            self.dispatcher.on_attempted = self.counting.attempted
        self.pruner = (
            Pruner(self.database, settings.body_retention, holder=worker_name())
            if works and settings.body_retention is not None
            else None
        )
        self._served = {callback.name for callback in callbacks}
        self.announcer = Announcer(self.database)
        self.sequencer = Sequencer(
            self.database, holder=worker_name(), is_pressed=lambda: self.intake.is_busy
        )
        self.tail = Tail(self.database)
        self.silence = Silence(self.database, on_owed=self._tell_workers)
        self.drift = Drift()
        self.following = Following(
            self.database,
            followers=[Terms(), self.drift],
            is_pressed=lambda: self.intake.is_busy,
        )
        self._takes_webhooks = takes_webhooks
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: set[str] = set()
        self._is_prepared = False
        self._obstacle = "the database has not answered yet"
        self._words: dict[str, str] = {}
        self._show_levels()

    def _show_levels(self) -> None:
        """Show in metrics how much waits, here and in the database."""
        show(self.metrics, self.gauges)
        calls, gauge = self.dispatcher, self.metrics.gauge
        gauge("atlas_pending_events", "Wait for a commit", [], lambda: one(self.intake.pending[0]))
        gauge("atlas_pending_bytes", "Wait for a commit", [], lambda: one(self.intake.pending[1]))
        gauge("atlas_event_loop_lag_seconds", "The worst lately", [], lambda: one(self.lag.worst))
        drift = "Fields, types and words that events never had before"
        self.metrics.total("atlas_drift", drift, ["kind"], lambda: labelled(self.drift.noticed))
        pool = "Connections of the pool for webhooks and the API"
        gauge("atlas_database_pool_size", pool, [], lambda: one(pool_of(self.database)[0]))
        gauge("atlas_database_pool_in_use", pool, [], lambda: one(pool_of(self.database)[1]))
        successors = "Times that another server took the place of the database"
        self.metrics.total(
            "atlas_database_successions", successors, [], lambda: one(self.succession.seen)
        )
        if calls is not None:
            what = "Calls of callbacks, by what they are doing"
            gauge("atlas_calls", what, ["state"], lambda: labelled(_under_way(calls)))

    def submit(self, body: bytes, *, account: str, key_label: str, on_answer: OnAnswer) -> None:
        """Begin to record one small authentic body, once the database is known to fit."""
        if not self._is_prepared:
            raise NotDurable("not_ready")
        self.intake.submit(body, account=account, key_label=key_label, on_answer=on_answer)

    async def record(self, body: bytes, *, account: str, key_label: str) -> Receipt:
        """Record one authentic body of any size, once the database is known to fit."""
        if not self._is_prepared:
            raise NotDurable("not_ready")
        return await self.intake.record(body, account=account, key_label=key_label)

    def _tell_workers(self, callbacks: set[str]) -> None:
        """Wake whoever serves these: this process, others, or both."""
        if self.dispatcher is not None:
            self.dispatcher.wake()
        if self.database.is_postgresql and not callbacks <= self._served:
            self.announcer.announce()

    def _tell_others(self, facts: Sequence[Fact], waits: Sequence[float]) -> None:
        """Have what is on disk placed in the feed, and counted."""
        self.sequencer.wake()
        self.counting.recorded(facts, waits)

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
        self._keep("tallies", self.tallies.run)
        self._keep("lag", self.lag.run)
        # Where there are items to follow, one of these runs; who only answers questions has
        # many to answer.
        if self._takes_webhooks or self.dispatcher is not None:
            self._keep("following", self.following.run)
            self._keep("silence", self.silence.run)
        if self.pruner is not None:
            self._keep("retention", self.pruner.run)
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
            self._see(_trouble(error)[1])
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
            return self._word("database", *_trouble(error))
        if not state.is_servable:
            why = f"the schema is at {state.found}, this release needs {state.needed}"
            return self._word("database", f"schema {state.fit}", why)
        if not self._is_prepared:
            return self._word("database", "not prepared", self._obstacle)
        await self.succession.look()
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
            # One that failed would begin again and again.
            committing.cancel()
        await self._stop_the_feed()
        for task in self._tasks.values():
            task.cancel()
        if self.dispatcher is not None:
            await asyncio.to_thread(self.dispatcher.stop, self.settings.shutdown_grace)
        await self.usage.flush()
        await self.tallies.flush()
        await self.database.close()
        log.info("service.stopped", worker=worker_name())

    async def _stop_the_feed(self) -> None:
        """Let what gives places and what follows come to its end, and others go on at once."""
        self.sequencer.close()
        self.following.close()
        ending = [self._tasks[name] for name in ("feed", "following") if name in self._tasks]
        if ending:
            await asyncio.wait(ending, timeout=2)
            await self.sequencer.stop()


def _under_way(dispatcher: Dispatcher) -> dict[str, float]:
    counts = dispatcher.counts()
    return {state: counts.get(state, 0) for state in ("running", "stuck", "unsettled")}


def _trouble(error: BaseException) -> tuple[str, str]:
    """Say what is wrong with a database, in a word and in a sentence."""
    if takes_no_writes(error):
        return "takes no writes", "the database is a standby, or set to read only: name the primary"
    if is_pooler(error):
        return (
            "is a pooler",
            "DATABASE_URL leads to a pooler: set PGBOUNCER=true if it is PgBouncer",
        )
    return "does not answer", f"the database does not answer ({type(error).__name__})"


def _servable(fit: Fit) -> str:
    # Old replicas go on while new ones roll in; who looks can see that they do.
    return "ok" if fit is Fit.EQUAL else f"ok, schema {fit}"
