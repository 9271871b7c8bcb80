"""Built in: run a program of this machine for every event, with the event on standard input.

Usage::

    CALLBACKS=app.callbacks.command:callbacks
    COMMAND_LINE=/usr/local/bin/on-event --to crm

The program gets one JSON document, the one that `forward` sends, and these variables: PATH,
HOME, LANG, ATLAS_EVENT_TYPE, ATLAS_EVENT_ID, ATLAS_DELIVERY_ID (the idempotency key),
ATLAS_ENVELOPE_ID and ATLAS_ATTEMPT. No shell reads the line. Its exit code says how it went:
0 done; 75 again later, after the usual wait; 100 never again, a dead letter; anything else a
failure, with the end of what it wrote to standard error. It has until shortly before the
timeout of its callback; then it is stopped, with all that it has started.
"""

import asyncio
import os
import shlex
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Protocol, cast

from app.callbacks import Callbacks, Event, GiveUp, RetryLater
from app.callbacks.forward import document, encode
from app.errors import AppError, ConfigError

AGAIN_LATER = 75  # EX_TEMPFAIL of sysexits.h
NEVER_AGAIN = 100
# Programs are heavier than calls.
CONCURRENCY = 8
# Of the time of a call, what is kept for stopping the program.
STOPPING_SECONDS = 3.0
POLITE_SECONDS = 1.5
# For the last words of a program that has ended, while somebody else holds its pipe.
PARTING_SECONDS = 0.5
LAST_WORDS = 500

_INHERITED = ("PATH", "HOME", "LANG")
_STDIN, _STDERR = 0, 2


class CommandSettings(Protocol):
    """What `command` reads of the settings."""

    @property
    def command_line(self) -> str | None: ...
    @property
    def command_events(self) -> Sequence[str]: ...


class CommandFailed(AppError):
    """The program could not be started, took too long, or says that it failed."""


def callbacks(settings: CommandSettings) -> Callbacks:
    """Make the callback `command` of the settings; raises `ConfigError` if they cannot work."""
    if settings.command_line is None:
        raise ConfigError("COMMAND_LINE is not set: name the program that is to be run")
    command = Command(settings.command_line)
    found = Callbacks()
    found.on(*settings.command_events, name="command", concurrency=CONCURRENCY)(command)
    return found


class Command:
    """A callback that runs a program with the event on its standard input."""

    def __init__(self, line: str) -> None:
        self._arguments = _arguments(line)

    async def __call__(self, event: Event) -> None:
        """Run the program once; return if it exits with 0."""
        left = (event.deadline - datetime.now(UTC)).total_seconds()
        seconds = max(left - STOPPING_SECONDS, left / 2, 0.0)
        run = await _start(self._arguments, _environment(event))
        try:
            run.feed(encode(document(event)))
            async with asyncio.timeout(seconds):
                await run.exited
        except TimeoutError:
            raise CommandFailed(f"the program did not end within {seconds:.1f} s") from None
        finally:
            await run.end()
        _judge(run)


def _judge(run: "_Run") -> None:
    if run.code == 0:
        return
    words = run.last_words()
    text = _ending(run.code) + (f": {words}" if words else "")
    if run.code == AGAIN_LATER:
        raise RetryLater(text)
    if run.code == NEVER_AGAIN:
        raise GiveUp(text)
    raise CommandFailed(text)


def _ending(code: int | None) -> str:
    if code is None:
        return "the program cannot be stopped"
    if code < 0:
        with suppress(ValueError):
            return f"the program was ended by {signal.Signals(-code).name}"
    return f"the program exited with {code}"


class _Run(asyncio.SubprocessProtocol):
    """One process and what it has started, which is one group of processes.

    Waiting for its exit must not mean waiting for its pipes: a child that it leaves behind
    may hold them open for ever.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[None] = loop.create_future()
        self._is_quiet = asyncio.Event()
        self._is_closed = asyncio.Event()
        self._words = b""

    @property
    def code(self) -> int | None:
        """The exit code; below 0 the signal; None while it runs."""
        return self._transport.get_returncode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note what the process is controlled with."""
        # Casts, because the classes of other event loops are not related to these.
        self._transport = cast("asyncio.SubprocessTransport", transport)
        stdin = self._transport.get_pipe_transport(_STDIN)
        self._stdin = cast("asyncio.WriteTransport", stdin)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Keep the end of what it writes, however much that is."""
        del fd  # there is but one
        self._words = (self._words + data)[-4 * LAST_WORDS :]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """Note that nobody can write any more."""
        del exc  # a program need not read what it is given
        if fd == _STDERR:
            self._is_quiet.set()

    def process_exited(self) -> None:
        """Note that it has ended; its pipes may still be open."""
        if not self.exited.done():
            self.exited.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that nothing of it is left."""
        del exc
        self._is_closed.set()

    def feed(self, data: bytes) -> None:
        """Give it its standard input; it may take that, or leave it."""
        self._stdin.write(data)
        self._stdin.write_eof()

    def last_words(self) -> str:
        """Give the end of what it wrote to standard error."""
        return self._words.decode("utf-8", "replace").strip()[-LAST_WORDS:]

    async def end(self) -> None:
        """End it if it still runs, and whatever it has left behind; politely at first."""
        try:
            if self.code is None:
                self._signal(signal.SIGTERM)
                await self._exits_within(POLITE_SECONDS)
        finally:
            # Also when somebody is not willing to wait for so long.
            self._signal(signal.SIGKILL)
            self._let_go_of_input()
            await self._close()

    async def _close(self) -> None:
        try:
            await self._exits_within(POLITE_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(PARTING_SECONDS):
                    await self._is_quiet.wait()
        finally:
            self._transport.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                await self._is_closed.wait()

    async def _exits_within(self, seconds: float) -> None:
        # Unlike wait_for, this leaves the future as it is.
        await asyncio.wait({self.exited}, timeout=seconds)

    def _signal(self, number: signal.Signals) -> None:
        # The process is the leader of its group: its id is that of the group, as long as
        # anybody is left in there. Afterwards there is nobody to be hit.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._transport.get_pid(), number)

    def _let_go_of_input(self) -> None:
        # Closing would wait until somebody reads what is left; if nothing is, it is closed.
        if self._stdin.get_write_buffer_size():
            self._stdin.abort()


async def _start(arguments: Sequence[str], environment: Mapping[str, str]) -> _Run:
    loop = asyncio.get_running_loop()
    try:
        _, run = await loop.subprocess_exec(
            _Run,
            *arguments,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise CommandFailed(f"the program cannot be started: {reason}") from error
    return run


def _environment(event: Event) -> Mapping[str, str]:
    # Not the service's own: that holds keys and passwords.
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {
        **inherited,
        "ATLAS_EVENT_TYPE": event.type,
        "ATLAS_EVENT_ID": event.id,
        "ATLAS_DELIVERY_ID": event.delivery_id,
        "ATLAS_ENVELOPE_ID": event.envelope_id or "",
        "ATLAS_ATTEMPT": str(event.attempt),
    }


def _arguments(line: str) -> Sequence[str]:
    try:
        program, *others = shlex.split(line)
    except ValueError:
        _refuse("cannot be split into words: is a quote missing, or everything?")
    found = shutil.which(program)
    if found is None:
        problem = (
            "is not a program: make it executable (chmod +x)"
            if Path(program).exists()
            else "is not there: is its path right, or is it on PATH?"
        )
        _refuse(f"names {program!r}, which {problem}")
    # The working directory may be another one by the time it is run.
    return (str(Path(found).absolute()), *others)


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"COMMAND_LINE {problem}")
