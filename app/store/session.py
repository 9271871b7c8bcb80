"""Connections: one engine per loop, and a transaction that cannot outlive its deadline."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import asyncpg
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, StaticPool

from app.errors import ConfigError
from app.store.file_writer import FileWriter

T = TypeVar("T")

# SQLSTATE classes that blame the data: 22 data, 23 integrity, 54 program limits.
_DATA_CLASSES = ("22", "23", "54")

# Classes that blame what a statement names: 42 what is not there or of another type, XX what
# is remembered and is not there.
_SCHEMA_CLASSES = ("42", "XX")

DEFAULT_SCHEMA = "atlas_receiver"

# As other drivers spell it.
_SPELLINGS = {"ssl": "sslmode"}
# What asyncpg understands of libpq's parameters; the others steer libpq itself
# (`channel_binding`, `keepalives`, …) and would be refused by the server.
_DSN_PARAMETERS = {
    "application_name",
    "database",
    "dbname",
    "host",
    "krbsrvname",
    "gsslib",
    "options",
    "passfile",
    "password",
    "port",
    "service",
    "servicefile",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
    "target_session_attrs",
    "user",
}


class TakesNoWrites(OSError):  # as good as not there
    """The server answers and would refuse to write: it is a standby, or was set so."""


# So long the server may take to close a connection that we leave.
_GOODBYE = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the server may take; the client's own deadline lies above them."""

    connect: timedelta = timedelta(seconds=2)
    lock: timedelta = timedelta(milliseconds=1500)
    statement: timedelta = timedelta(milliseconds=2500)
    idle: timedelta = timedelta(seconds=5)
    # SQLite has one write lock for all; somebody who holds it for 3 s is waited for.
    sqlite_lock: timedelta = timedelta(milliseconds=3300)


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """Where the database is, as the settings give it, and how to speak to it."""

    url: str
    schema: str = DEFAULT_SCHEMA
    pgbouncer: bool = False

    @property
    def is_postgresql(self) -> bool:
        """True for PostgreSQL, False for SQLite; anything else is a `ConfigError`."""
        scheme = self.url.partition("://")[0]
        if scheme in {"postgres", "postgresql", "postgresql+asyncpg"}:
            return True
        if scheme in {"sqlite", "sqlite+aiosqlite"}:
            return False
        message = (
            f"DATABASE_URL starts with {scheme[:40]!r}://; "
            "this service speaks postgresql:// and sqlite:// only"
        )
        raise ConfigError(message)

    @property
    def sqlite_path(self) -> Path:
        """The file of a SQLite database; relative paths count from the project root."""
        path = self.url.partition("://")[2].partition("?")[0].removeprefix("/")
        if not path or path == ":memory:":
            message = "DATABASE_URL must name a file: a database in memory would lose every event"
            raise ConfigError(message)
        return Path(__file__).resolve().parents[2] / path

    @property
    def dsn(self) -> str:
        """The URL as asyncpg takes it: hosts, TLS and the rest as libpq would read them."""
        parts = urlsplit(self.url)
        given = {_SPELLINGS.get(name, name): value for name, value in parse_qsl(parts.query)}
        known = {name: value for name, value in given.items() if name in _DSN_PARAMETERS}
        if not self.pgbouncer:
            # Nothing is ever decided by what a standby says, which may be behind. After a
            # fail-over the old address may lead to one, and a pool would keep to it.
            known.setdefault("target_session_attrs", "read-write")
        query = urlencode({"application_name": "atlas-receiver", **known}, quote_via=quote)
        return urlunsplit(("postgresql", parts.netloc, parts.path, query, ""))


class Database:
    """One pool of connections, for one event loop."""

    def __init__(
        self,
        address: DatabaseAddress,
        *,
        size: int = 4,
        limits: Limits | None = None,
    ) -> None:
        self.address = address
        self.limits = limits or Limits()
        self.is_postgresql = address.is_postgresql
        # Through a transaction pooler no session is ours, so each transaction brings them.
        self._local_settings = (
            set_locally(session_settings(address.schema, self.limits)) if address.pgbouncer else ""
        )
        self.engine = (
            postgresql_engine(
                address,
                settings=session_settings(address.schema, self.limits),
                size=size,
                limits=self.limits,
            )
            if self.is_postgresql
            else sqlite_engine(address, limits=self.limits)
        )
        self._turn = asyncio.Lock()
        self.size = size
        self._writing = self._reading = self.engine
        if self.is_postgresql:
            # The driver's own transaction is used: SQLAlchemy would begin one only with a
            # statement of its own.
            self._writing = self.engine.execution_options(isolation_level="AUTOCOMMIT")
            self._reading = self._writing
        else:
            self._reading = self.engine.execution_options(is_reading=True)
            self.writer = FileWriter(sqlite_writer(address, limits=self.limits))

    async def run(self, work: Callable[[Any], Coroutine[Any, Any, T]], *, limit: timedelta) -> T:
        """Run one transaction, on a file as quickly as it can be; raises as `begin` does.

        `work` awaits nothing but its statements. On a file it may still commit after `limit`.
        """
        if self.is_postgresql:
            async with self.begin(limit=limit) as connection:
                return await work(connection)
        end = asyncio.get_running_loop().time() + limit.total_seconds()
        async with self._in_turn(end), asyncio.timeout_at(end):
            return await self.writer.run(work)

    @property
    def splits(self) -> bool:
        """True if what is begun as `split` commits each statement by itself."""
        # Without a session of ours there are no settings but those of a transaction.
        return self.is_postgresql and not self._local_settings

    @asynccontextmanager
    async def begin(
        self, *, limit: timedelta, is_reading: bool = False, is_split: bool = False
    ) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that commits at the end, and is cut off after `limit`.

        One that is only reading does not take SQLite's one write lock. One that is `split`
        may commit each statement by itself, which saves two round trips: for statements that
        do not need each other. Raises whatever SQLAlchemy or the driver raises.
        """
        engine = self._reading if is_reading else self._writing
        end = asyncio.get_running_loop().time() + limit.total_seconds()
        is_queueing = not (self.is_postgresql or is_reading)
        async with self._in_turn(end) if is_queueing else nullcontext():
            connection = await self.connect(end, engine)
            try:
                if not self.is_postgresql:
                    async with _transact_on_sqlite(connection, end):
                        yield connection
                else:
                    async with self.transact(connection, end, is_split=is_split and self.splits):
                        yield connection
            finally:
                await asyncio.shield(connection.close())

    @asynccontextmanager
    async def _in_turn(self, end: float) -> AsyncIterator[None]:
        """Wait for those who came before and want to write, too.

        The file's own lock has no order: who waits for it looks again less and less often,
        and holds a connection meanwhile, which readers would want.
        """
        async with asyncio.timeout_at(end):
            await self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()

    async def connect(self, end: float, engine: AsyncEngine | None = None) -> AsyncConnection:
        """Take a connection from the pool, for writing if nothing else is said, until `end`."""
        async with asyncio.timeout_at(end):
            return await (engine or self._writing).connect()

    @asynccontextmanager
    async def transact(
        self, connection: AsyncConnection, end: float, *, is_split: bool = False
    ) -> AsyncIterator[None]:
        """Run a transaction of PostgreSQL, or none if `is_split`; its socket closes at `end`."""
        assert connection.sync_connection is not None  # it was just checked out
        driver: Any = connection.sync_connection.connection.driver_connection
        connection.info["driver"] = driver
        # A frozen server answers neither a query nor a cancel request, so what ends a late
        # transaction is closing its socket.
        watchdog = asyncio.get_running_loop().call_at(end, driver.terminate)
        try:
            async with nullcontext() if is_split else _transaction(driver):
                if self._local_settings:
                    await driver.execute(self._local_settings)
                yield
        finally:
            watchdog.cancel()
            if driver.is_closed():
                await connection.invalidate()

    async def ping(self, *, limit: timedelta = timedelta(seconds=2)) -> None:
        """Prove that the database answers, and that it would take a write."""
        question = "SHOW transaction_read_only" if self.is_postgresql else "SELECT 1"
        async with self.begin(limit=limit, is_reading=True) as connection:
            answer = (await connection.exec_driver_sql(question)).scalar()
        if answer == "on":
            raise TakesNoWrites

    async def close(self) -> None:
        """Close every connection; another loop may open new ones."""
        if not self.is_postgresql:
            await self.writer.close()
        await self.engine.dispose()
        self._turn = asyncio.Lock()


class KeptConnections:
    """Connections that stay checked out, for somebody who writes again and again.

    To take one from the pool and to give it back costs more than a statement. What is written
    commits statement by statement, as with `is_split`; for databases that can do that.
    """

    def __init__(self, database: Database, *, most: int) -> None:
        self._database = database
        self._most = most
        self._idle: list[AsyncConnection] = []

    @asynccontextmanager
    async def begin(self, *, limit: timedelta) -> AsyncIterator[AsyncConnection]:
        """Give a connection that is cut off after `limit`; raises as `Database.begin`."""
        end = asyncio.get_running_loop().time() + limit.total_seconds()
        connection = await self._take(end)
        is_fine = False
        try:
            async with self._database.transact(connection, end, is_split=True):
                yield connection
            is_fine = True
        except DatabaseError as error:
            # What the driver has learned of row types may be of a schema that is gone, such
            # as one that was restored; it learns anew only on another connection.
            if (sqlstate(error) or "").startswith(_SCHEMA_CLASSES):
                await connection.invalidate()
            raise
        finally:
            # One that was cut off at the last moment is fine, and of no use any more.
            is_of_use = is_fine and not connection.invalidated
            if is_of_use and len(self._idle) < self._most:
                self._idle.append(connection)
            else:
                await asyncio.shield(connection.close())

    async def _take(self, end: float) -> AsyncConnection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.info["driver"].is_closed():
                return connection
            # The server has ended it meanwhile; the pool must not give it to anybody.
            await connection.invalidate()
            await connection.close()
        return await self._database.connect(end)

    async def close(self) -> None:
        """Give all back to the pool."""
        while self._idle:
            await asyncio.shield(self._idle.pop().close())


@asynccontextmanager
async def _transaction(driver: Any) -> AsyncIterator[None]:
    # Said in BEGIN: under another default, a key that was waited for stays unseen.
    transaction = driver.transaction(isolation="read_committed")
    await transaction.start()
    try:
        yield
    except BaseException:
        # On a connection that is gone this fails, and must not hide what went wrong before:
        # whoever was cancelled has to stay cancelled.
        try:
            await transaction.rollback()
        except DatabaseError:
            driver.terminate()
        raise
    await transaction.commit()


@asynccontextmanager
async def _transact_on_sqlite(connection: AsyncConnection, end: float) -> AsyncIterator[None]:
    # The driver's thread finishes what it was given, and then takes the rollback.
    async with asyncio.timeout_at(end), connection.begin():
        yield


async def fetch(
    connection: AsyncConnection, statement: str, arguments: Sequence[Any] = ()
) -> Sequence[Any]:
    """Run one statement of the hot path; give its rows, as tuples.

    On PostgreSQL it goes straight to the driver, in the same transaction: what SQLAlchemy
    does around a statement costs more than the statement (docs/adr/0003).
    """
    driver = connection.info.get("driver")
    if driver is not None:
        rows: Sequence[Any] = await driver.fetch(statement, *arguments)
        return rows
    result = await connection.exec_driver_sql(statement, tuple(arguments))
    return result.all() if result.returns_rows else ()


def is_disconnect(error: BaseException) -> bool:
    """True if the connection is gone, so that the same statement may succeed on another."""
    # A server that dies in the middle of an answer leaves the driver in a state that it
    # takes for a defect of its own.
    gone = (
        OSError,
        asyncpg.PostgresConnectionError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
    )
    return isinstance(error, gone) or getattr(error, "connection_invalidated", False)


def sqlstate(error: BaseException) -> str | None:
    """Give the SQLSTATE behind `error`, if the database named one."""
    original = getattr(error, "orig", error)
    code = getattr(original, "sqlstate", None)
    return code if isinstance(code, str) else None


def takes_no_writes(error: BaseException) -> bool:
    """True if the server was found, and is one that only reads."""
    cause: BaseException | None = error
    # SQLAlchemy wraps what the driver raises twice.
    while cause is not None:
        if isinstance(cause, TakesNoWrites | asyncpg.TargetServerAttributeNotMatched):
            return True
        cause = cause.__cause__
    return sqlstate(error) == "25006"


def is_pooler(error: BaseException) -> bool:
    """True if what answers refuses settings of a session, as a transaction pooler does."""
    return sqlstate(error) == "08P01"


def blames_data(error: BaseException) -> bool:
    """True if the database, or its driver, refused a value rather than the transaction."""
    code = sqlstate(error)
    if code is not None:
        return code.startswith(_DATA_CLASSES)
    cause = getattr(error, "orig", None) or error
    # A certificate that does not fit is a ValueError, too, and no fault of the data.
    if is_disconnect(cause):
        return False
    names = {kind.__name__ for kind in type(cause).__mro__}
    # The drivers raise these before a server sees the value: lone surrogates, integers
    # beyond 64 bits, documents that JSON cannot write.
    return bool(names & {"UnicodeError", "OverflowError", "IntegrityError", "DataError"}) or (
        isinstance(cause, ValueError)
    )


# What the other packages call a connection; only this one knows whose it is.
Connection = AsyncConnection

DatabaseError = (
    SQLAlchemyError,
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


def postgresql_engine(
    address: DatabaseAddress,
    *,
    settings: dict[str, str],
    size: int,
    limits: Limits,
    wait: timedelta = timedelta(seconds=1),
) -> AsyncEngine:
    """Make a pool whose sessions have these settings, and for which one may `wait`."""
    arguments: dict[str, Any] = {"async_creator_fn": _connector(address, settings, limits)}
    options: dict[str, Any] = {
        "pool_size": size,
        "max_overflow": 0,
        "pool_timeout": wait.total_seconds(),
    }
    if address.pgbouncer:
        # A transaction pooler hands each transaction another server connection, which
        # knows neither our prepared statements nor our session settings.
        arguments |= {
            "prepared_statement_cache_size": 0,
            # Without a name: one with a name would stay in the server's connection when
            # ours ends, because nobody is left to close it.
            "prepared_statement_name_func": str,
        }
        options = {"poolclass": NullPool}
    engine = create_async_engine(
        "postgresql+asyncpg://", connect_args=arguments, hide_parameters=True, **options
    )
    event.listen(engine.sync_engine, "checkout", _refuse_what_is_closed)
    return engine


def _refuse_what_is_closed(connection: Any, *_: object) -> None:
    # When a server restarts, the driver hears of it on every connection of the pool. Without
    # this, each of them would first fail somebody.
    if connection.driver_connection.is_closed():
        raise InvalidatePoolError


def session_settings(schema: str, limits: Limits) -> dict[str, str]:
    """Name the server settings that every session of ours has."""
    return {
        "search_path": f'"{schema}"',
        "synchronous_commit": "on",
        # Under another default, a row that was waited for stays as it was.
        "default_transaction_isolation": "read committed",
        "timezone": "UTC",
        "lock_timeout": _milliseconds(limits.lock),
        "statement_timeout": _milliseconds(limits.statement),
        "idle_in_transaction_session_timeout": _milliseconds(limits.idle),
        # A statement is planned once and then for good, perhaps when its table is empty;
        # a plan that scans would still scan when there are millions of rows. Everything
        # that is asked here has an index.
        "enable_seqscan": "off",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
        # A scan that is left all the same, of a table with two rows, counts as dear as a
        # query that is worth compiling, which takes longer than anything we ask.
        "jit": "off",
    }


def _milliseconds(value: timedelta) -> str:
    return str(int(value.total_seconds() * 1000))


def _connector(
    address: DatabaseAddress, settings: dict[str, str], limits: Limits
) -> Callable[..., Awaitable[asyncpg.Connection]]:
    options: dict[str, Any] = {"server_settings": settings}
    if address.pgbouncer:
        options = {"statement_cache_size": 0}
    dsn = address.dsn

    async def connect(**_: Any) -> asyncpg.Connection:
        return await asyncpg.connect(
            dsn, timeout=limits.connect.total_seconds(), connection_class=_Leaving, **options
        )

    return connect


class _Leaving(asyncpg.Connection):
    """A connection that says goodbye, and leaves: a frozen server never answers that."""

    async def close(self, *, timeout: float | None = None) -> None:  # noqa: ASYNC109  # the driver's name
        """Close it, in the end without the server; raises nothing for that."""
        with suppress(TimeoutError):
            await super().close(timeout=timeout or _GOODBYE.total_seconds())


def set_locally(settings: dict[str, str]) -> str:
    """Write the statement that gives one transaction these settings."""
    calls = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    return f"SELECT {calls}"


def sqlite_engine(
    address: DatabaseAddress,
    *,
    limits: Limits,
    size: int = 4,
    is_shared: bool = False,
    wait: timedelta | None = None,
) -> AsyncEngine:
    """Make a pool on the file; connections that are `shared` may be closed by any thread."""
    # Under WAL readers do not wait; writers take turns on the file's own lock.
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{address.sqlite_path}",
        connect_args=_sqlite_arguments(limits, is_shared=is_shared),
        hide_parameters=True,
        pool_size=size,
        max_overflow=0,
        pool_timeout=(wait or limits.statement).total_seconds(),
        pool_use_lifo=True,
    )
    _listen_on_sqlite(engine.sync_engine)
    return engine


def sqlite_writer(address: DatabaseAddress, *, limits: Limits) -> Engine:
    """Make one connection to the file, for a thread that writes."""
    engine = create_engine(
        f"sqlite:///{address.sqlite_path}",
        connect_args=_sqlite_arguments(limits, is_shared=True),
        hide_parameters=True,
        poolclass=StaticPool,
    )
    _listen_on_sqlite(engine)
    return engine


def _sqlite_arguments(limits: Limits, *, is_shared: bool) -> dict[str, Any]:
    return {
        "timeout": limits.sqlite_lock.total_seconds(),
        "isolation_level": None,
        "check_same_thread": not is_shared,
    }


def _listen_on_sqlite(engine: Engine) -> None:
    event.listen(engine, "connect", prepare_sqlite)
    event.listen(engine, "begin", _begin_immediate)


def prepare_sqlite(connection: Any, _: Any) -> None:
    """Set up a connection to a file as this service wants it."""
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "journal_size_limit=67108864",
        # Sixteen megabytes: what is written again and again is not read again each time.
        "cache_size=-16384",
        # Pages are copied back into the file once for 32 MB of writes, instead of once for 4:
        # most of them have been written again and again by then.
        "wal_autocheckpoint=8000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: Any) -> None:
    # A transaction that reads first and writes later would fail at the upgrade with
    # SQLITE_BUSY_SNAPSHOT, for which no time-out waits.
    is_reading = connection.get_execution_options().get("is_reading", False)
    connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")
