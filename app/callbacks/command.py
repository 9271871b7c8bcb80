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
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import NoReturn, Protocol

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
        given = encode(document(event))
        run = _Run(self._arguments, _environment(event))
        try:
            async with asyncio.timeout(seconds):
                await run.finish(given)
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


class _Run(asyncio.Protocol):
    """One process and what it has started, which is one group of processes.

    Its exit is waited for in a thread, which works beside every kind of event loop. It must
    not mean waiting for its pipes: a child that is left behind may hold them for ever.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._is_quiet = asyncio.Event()
        self._words = b""
        self._stdin: asyncio.WriteTransport | None = None
        self._stderr: asyncio.ReadTransport | None = None
        try:
            self._process = subprocess.Popen(  # noqa: S603  # the operator's own line, without a shell
                arguments,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise CommandFailed(f"the program cannot be started: {reason}") from error

    @property
    def code(self) -> int | None:
        """The exit code; below 0 the signal; None while it runs."""
        return self._process.returncode

    async def finish(self, given: bytes) -> None:
        """Give it its standard input, which it may take or leave, and wait for its exit."""
        Thread(target=self._wait, name="command", daemon=True).start()
        connect = self._loop.connect_read_pipe(lambda: self, self._process.stderr)
        self._stderr, _ = await connect
        pipe = self._process.stdin
        self._stdin, _ = await self._loop.connect_write_pipe(asyncio.BaseProtocol, pipe)
        self._stdin.write(given)
        self._stdin.write_eof()
        await self._exited.wait()

    def _wait(self) -> None:
        self._process.wait()
        with suppress(RuntimeError):  # the loop is closed; nobody wants to know any more
            self._loop.call_soon_threadsafe(self._exited.set)

    def data_received(self, data: bytes) -> None:
        """Keep the end of what it writes to standard error, however much that is."""
        self._words = (self._words + data)[-4 * LAST_WORDS :]

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that nobody can write to it any more."""
        del exc
        self._is_quiet.set()

    def last_words(self) -> str:
        """Give the end of what it wrote to standard error."""
        return self._words.decode("utf-8", "replace").strip()[-LAST_WORDS:]

    async def end(self) -> None:
        """End it if it still runs, and whatever it has left behind; politely at first."""
        try:
            if self.code is None:
                self._signal(signal.SIGTERM)
                await _within(POLITE_SECONDS, self._exited)
        finally:
            # Also when somebody is not willing to wait for so long.
            self._signal(signal.SIGKILL)
            await self._let_go()

    async def _let_go(self) -> None:
        try:
            await _within(POLITE_SECONDS, self._exited)
            if self._stderr is not None:
                await _within(PARTING_SECONDS, self._is_quiet)
        finally:
            self._close_stdin()
            self._close_stderr()

    def _close_stdin(self) -> None:
        if self._stdin is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
        elif self._stdin.get_write_buffer_size():
            # To close it would be to wait until somebody reads what is left in there; when
            # nothing is, it is closed already.
            self._stdin.abort()

    def _close_stderr(self) -> None:
        if self._stderr is None:
            assert self._process.stderr is not None
            self._process.stderr.close()
        else:
            self._stderr.close()

    def _signal(self, number: signal.Signals) -> None:
        # The process is the leader of its group: its id is that of the group, as long as
        # anybody is left in there. Afterwards there is nobody to be hit.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


async def _within(seconds: float, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


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
