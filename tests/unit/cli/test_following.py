"""How verbs that take long show where they stand, and how they end."""

import io
from collections.abc import AsyncGenerator

import pytest
import typer
from rich.console import Console

from app.cli import terminal
from app.cli.terminal import Step, follow, uninterrupted


async def counting(total: int, *, ended: list[str]) -> AsyncGenerator[int, None]:
    try:
        for number in range(total + 1):
            yield number
    finally:
        ended.append("ended")


def shown(number: int) -> Step:
    return Step(number, 3, f"{number} [bold]done")


class TestFollow:
    async def test_gives_the_last_step_and_ends_the_first_line_at_once(self) -> None:
        ended: list[str] = []
        text = io.StringIO()

        last = await follow(counting(3, ended=ended), shown, console=Console(file=text, width=80))

        assert 3 == last
        assert ["ended"] == ended
        assert text.getvalue().startswith("0/3 0")
        assert 1 == text.getvalue().count("\n")

    async def test_prints_a_line_for_each_step_that_takes_long(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
        text = io.StringIO()
        console = Console(file=text, width=80, markup=False)

        await follow(counting(3, ended=[]), shown, console=console)

        assert [f"{n}/3 {n} [bold]done" for n in range(4)] == text.getvalue().splitlines()

    async def test_draws_a_bar_on_a_terminal(self) -> None:
        text = io.StringIO()
        console = Console(file=text, width=80, force_terminal=True)

        await follow(counting(3, ended=[]), shown, console=console)

        assert "3/3" in text.getvalue()
        assert "3 [bold]done" in text.getvalue()

    async def test_ends_what_it_follows_if_it_cannot_go_on(self) -> None:
        """What a retry writes down at its end needs the database, which is closed next."""
        ended: list[str] = []

        def fail(_: int) -> Step:
            raise RuntimeError

        with pytest.raises(RuntimeError):
            await follow(counting(3, ended=ended), fail, console=Console(file=io.StringIO()))

        assert ["ended"] == ended


class TestInterruption:
    def test_says_what_it_means(self, capsys: pytest.CaptureFixture[str]) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        with pytest.raises(typer.Exit) as caught:
            uninterrupted(interrupt, "what is left stays dead")

        assert 130 == caught.value.exit_code
        assert "interrupted: what is left stays dead" in capsys.readouterr().err

    def test_is_none_if_nobody_interrupts(self) -> None:
        assert 7 == uninterrupted(lambda: 7, "never said")
