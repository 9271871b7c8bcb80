"""`command` with real programs: polite ones, and all the others."""

import asyncio
import gc
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from app.callbacks import Callbacks, Event
from app.callbacks.command import Command, callbacks
from app.callbacks.forward import document, encode
from app.callbacks.testing import Dead, Done, Failed, change_event, deliver, make_event
from app.dispatch.attempt import Verdict
from app.errors import ConfigError
from app.settings import read_settings

EVENT = make_event("envelope.signed", data={"metadata": {"name": "é"}})
LARGE = make_event(data={"metadata": {"text": "x" * 2_000_000}})


def with_time() -> Event:
    return make_event(deadline=datetime.now(UTC) + timedelta(minutes=5))


class Program:
    """A shell script; what it writes to files beside it can be read here."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / "program"

    def write(self, text: str) -> str:
        self.path.write_text(f'#!/bin/sh\ncd "{self.home}"\n{text}\n')
        self.path.chmod(0o755)
        return str(self.path)

    def read(self, name: str) -> str:
        return (self.home / name).read_text()

    def is_gone(self, name: str) -> bool:
        """Whether the process whose id stands in the file ends within some seconds."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                # In a container nobody may collect orphans; as zombies they do no harm.
                if psutil.Process(int(self.read(name))).status() == psutil.STATUS_ZOMBIE:
                    return True
            except psutil.NoSuchProcess:
                return True
            time.sleep(0.01)
        return False

    async def has_written(self, name: str) -> None:
        """Wait until the file is there and has a line."""
        path = self.home / name
        async with asyncio.timeout(30):
            while not (path.exists() and path.read_text().endswith("\n")):  # noqa: ASYNC110  # a file
                await asyncio.sleep(0.01)


@pytest.fixture(name="program")
def _program(tmp_path: Path) -> Program:
    return Program(tmp_path)


async def run(line: str, event: Event = EVENT, *, seconds: float = 30) -> Verdict:
    made = Callbacks()
    made.on("*", name="command", timeout=seconds)(Command(line))
    deadline = datetime.now(UTC) + timedelta(seconds=seconds)
    return (await deliver(made, replace(event, deadline=deadline)))["command"]


class TestProgram:
    async def test_it_gets_the_event_and_little_else(
        self, program: Program, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ATLAS_API_KEY", "a-secret-of-the-service")
        monkeypatch.setenv("LANG", "C.UTF-8")
        line = program.write("cat > body; env > env")

        event = with_time()

        await Command(line)(event)

        names = {each.partition("=")[0] for each in program.read("env").splitlines()}
        own = {name for name in names if name.startswith("ATLAS_")}
        assert encode(document(event)).decode() == program.read("body")
        assert own == {
            "ATLAS_EVENT_TYPE",
            "ATLAS_EVENT_ID",
            "ATLAS_DELIVERY_ID",
            "ATLAS_ENVELOPE_ID",
            "ATLAS_ATTEMPT",
        }
        # The shell adds the last three.
        assert names - own <= {"PATH", "HOME", "LANG", "PWD", "OLDPWD", "SHLVL", "_"}
        assert f"ATLAS_DELIVERY_ID={event.delivery_id}\n" in program.read("env")

    async def test_its_arguments_are_words_and_no_shell_reads_them(self, program: Program) -> None:
        line = program.write('printf "%s\\n" "$@" > words')

        assert Done() == await run(f"{line} --to 'two words' '$HOME;*' \"`id`\"")

        assert ["--to", "two words", "$HOME;*", "`id`"] == program.read("words").splitlines()

    async def test_an_event_about_no_envelope_is_fine(self, program: Program) -> None:
        line = program.write('echo "[$ATLAS_ENVELOPE_ID]" > id')

        await Command(line)(change_event(with_time(), envelope=None, envelope_id=None))

        assert "[]\n" == program.read("id")


class TestExitCode:
    async def test_0_is_done(self, program: Program) -> None:
        assert Done() == await run(program.write("echo fine; echo warning >&2"))

    async def test_75_is_again_later(self, program: Program) -> None:
        verdict = await run(program.write("echo the queue is full >&2; exit 75"))

        assert isinstance(verdict, Failed)
        assert "RetryLater: the program exited with 75: the queue is full" == verdict.error
        assert None is verdict.after

    async def test_100_is_never_again(self, program: Program) -> None:
        verdict = await run(program.write("echo no such customer >&2; exit 100"))

        assert isinstance(verdict, Dead)
        assert "GiveUp: the program exited with 100: no such customer" == verdict.error

    @pytest.mark.parametrize("code", [1, 2, 65, 127, 255])
    async def test_another_is_a_failure(self, program: Program, code: int) -> None:
        verdict = await run(program.write(f"exit {code}"))

        assert isinstance(verdict, Failed)
        assert f"CommandFailed: the program exited with {code}" == verdict.error

    async def test_a_signal_is_a_failure(self, program: Program) -> None:
        verdict = await run(program.write("kill -9 $$"))

        assert isinstance(verdict, Failed)
        assert "CommandFailed: the program was ended by SIGKILL" == verdict.error

    async def test_of_its_last_words_the_end_is_kept(self, program: Program) -> None:
        line = program.write(
            "head -c 3000000 /dev/zero | tr '\\0' 'é' >&2; echo ' end' >&2; exit 1"
        )

        verdict = await run(line)

        assert isinstance(verdict, Failed)
        assert verdict.error.endswith(" end")
        assert len(verdict.error) < 600

    async def test_a_program_that_cannot_be_started_is_a_failure(self, program: Program) -> None:
        line = program.write("exit 0")
        command = Command(line)
        program.path.write_text("#!/no/such/interpreter\n")
        made = Callbacks()
        made.on("*", name="command")(command)

        verdict = (await deliver(made, EVENT))["command"]

        assert isinstance(verdict, Failed)
        assert "CommandFailed: the program cannot be started: No such file" in verdict.error


class TestBadProgram:
    async def test_one_that_reads_nothing(self, program: Program) -> None:
        assert Done() == await run(program.write("exec < /dev/null; exit 0"), LARGE)

    async def test_one_that_reads_slowly_gets_all_of_it(self, program: Program) -> None:
        assert Done() == await run(program.write("dd bs=100000 2> /dev/null | wc -c > size"), LARGE)

        assert int(program.read("size")) > 4_000_000

    async def test_one_that_closes_everything_and_goes_on(self, program: Program) -> None:
        verdict = await run(program.write("exec <&- >&- 2>&-; sleep 600"), seconds=2)

        assert isinstance(verdict, Failed)
        assert re.search(r"did not end within [01]\.\d s", verdict.error)

    @pytest.mark.parametrize("channel", ["", ">&2"], ids=["output", "error"])
    async def test_one_that_writes_for_ever(self, program: Program, channel: str) -> None:
        verdict = await run(program.write(f"echo $$ > pid; exec yes {channel}"), seconds=4)

        assert isinstance(verdict, Failed)
        # A little of the time may be over when it is started.
        words = r"CommandFailed: the program did not end within [123]\.\d s"
        assert re.fullmatch(words, verdict.error), verdict.error
        assert program.is_gone("pid")

    async def test_one_that_does_not_want_to_stop(self, program: Program) -> None:
        line = program.write("trap '' TERM; echo $$ > pid; while :; do sleep 600; done")

        verdict = await run(line, seconds=4)

        assert isinstance(verdict, Failed)
        assert program.is_gone("pid")

    async def test_one_that_wants_to_stop_in_good_order_may(self, program: Program) -> None:
        line = program.write(
            "trap 'echo tidied > tidied; exit 0' TERM; echo ready; sleep 600 & wait"
        )

        verdict = await run(line, seconds=4)

        assert isinstance(verdict, Failed)
        assert "tidied\n" == program.read("tidied")

    async def test_children_that_it_leaves_behind_end_with_it(self, program: Program) -> None:
        line = program.write("sleep 600 & echo $! > pid; exit 0")

        assert Done() == await run(line)

        assert program.is_gone("pid")

    async def test_a_child_that_got_away_does_not_hold_it_up(self, program: Program) -> None:
        """In a session of its own, with our pipes in its hands, and a body nobody reads."""
        away = "setsid sh -c 'echo $$ > pid; exec sleep 600' &"
        line = program.write(f"{away} while [ ! -s pid ]; do sleep 0.01; done; exit 0")
        try:
            assert Done() == await run(line, LARGE)
        finally:
            await program.has_written("pid")
            os.kill(int(program.read("pid")), 9)

    async def test_a_call_that_is_cancelled_stops_it_and_its_children(
        self, program: Program
    ) -> None:
        line = program.write("sleep 600 & echo $! > child; echo $$ > pid; wait")
        call = asyncio.create_task(Command(line)(with_time()))
        await program.has_written("pid")

        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        assert program.is_gone("pid")
        assert program.is_gone("child")

    async def test_a_second_cancel_does_not_leave_it_running(self, program: Program) -> None:
        line = program.write("trap '' TERM; echo $$ > pid; while :; do sleep 600; done")
        call = asyncio.create_task(Command(line)(with_time()))
        await program.has_written("pid")

        call.cancel()
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        assert program.is_gone("pid")


class TestLoops:
    @pytest.mark.parametrize(
        "factory",
        [
            pytest.param(asyncio.new_event_loop, id="asyncio"),
            pytest.param(uvloop.new_event_loop, id="uvloop"),
        ],
    )
    async def test_it_works_on_loops_of_other_threads(
        self, program: Program, factory: Callable[[], asyncio.AbstractEventLoop]
    ) -> None:
        done = program.write("cat > body; echo said >&2")
        other = Program(program.home / "other")
        other.home.mkdir()
        slow = other.write("sleep 600 & echo $! > child; wait")

        def work(results: list[Any]) -> None:
            async def main() -> list[Verdict]:
                return list(
                    await asyncio.gather(*(run(done) for _ in range(4)), run(slow, seconds=4))
                )

            with asyncio.Runner(loop_factory=factory) as runner:
                results.extend(runner.run(main()))

        results: list[list[Any]] = [[], []]
        threads = [threading.Thread(target=work, args=(each,)) for each in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join, 20)
        gc.collect()

        for verdicts in results:
            assert [Done()] * 4 == verdicts[:4]
            assert isinstance(verdicts[4], Failed)
        assert other.is_gone("child")


class TestSettings:
    def test_they_are_enough_to_load_it(self, program: Program) -> None:
        made = callbacks(read_settings(command_line=program.write(""), command_events="envelope.*"))

        (callback,) = made
        assert ("command", ("envelope.*",)) == (callback.name, callback.patterns)

    def test_a_program_on_the_path_is_found(self) -> None:
        assert 1 == len(callbacks(read_settings(command_line="cat -")))

    def test_without_a_line_there_is_nothing_to_run(self) -> None:
        with pytest.raises(ConfigError, match="COMMAND_LINE is not set"):
            callbacks(read_settings())

    @pytest.mark.parametrize(
        "line,problem",
        [
            ("no-such-program-anywhere --x", "'no-such-program-anywhere', which is not there"),
            ("/no/such/file", "which is not there"),
            ("/etc/passwd", "make it executable"),
            ("/etc", "make it executable"),
            ("cat 'unclosed", "is a quote missing"),
            ("   ", "is a quote missing, or everything"),
            ("''", "which is not"),
        ],
    )
    def test_what_cannot_be_run_stops_the_start(self, line: str, problem: str) -> None:
        with pytest.raises(ConfigError, match=problem) as raised:
            callbacks(read_settings(command_line=line))

        assert str(raised.value).startswith("COMMAND_LINE ")
