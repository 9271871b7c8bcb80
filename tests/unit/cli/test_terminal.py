"""What verbs print: for people on a terminal, and for programs behind a pipe."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
import typer
from rich.text import Text

from app.cli.deliveries import State
from app.cli.terminal import (
    ago,
    cell,
    print_fields,
    print_table,
    printable,
    read_id,
    read_moment,
)
from app.dispatch.control import STATES

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


class TestTable:
    def test_is_lines_with_tabs_behind_a_pipe(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_table(["ID", "SEEN"], [("a b", NOW), (None, True)])

        assert "ID\tSEEN\na b\t2026-07-01T12:00:00Z\n\tyes\n" == capsys.readouterr().out

    def test_is_aligned_on_a_terminal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("TERM", "dumb")

        print_table(["ID", "SEEN"], [("[bold]a", True), ("b", False)])

        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert ["ID       SEEN", "[bold]a  yes", "b        no"] == lines

    def wide(self, capsys: pytest.CaptureFixture[str], *rows: tuple[str, ...]) -> list[str]:
        print_table(["ID", "ITS ERROR"], rows)
        return [Text.from_ansi(line).plain for line in capsys.readouterr().out.splitlines()]

    @pytest.mark.parametrize("columns, room", [(80, 42), (62, 24), (20, 24)])
    def test_gives_way_in_its_last_column_only(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        columns: int,
        room: int,
    ) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        identifier = "01a2004d-4677-7eac-a27c-8b66fbd7d8f3"

        header, line, short = self.wide(capsys, (identifier, "x" * 100), ("b", "two\nlines"))

        assert f"ID{' ' * 36}ITS ERROR" == header
        assert f"{identifier}  {'x' * (room - 1)}…" == line
        assert f"b{' ' * 37}two lines" == short

    def test_measures_letters_as_they_are_shown(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)

        assert "契約  x" == self.wide(capsys, ("契約", "x"))[1]
        assert "ID    ITS ERROR" == self.wide(capsys, ("契約", "x"))[0]

    def test_cannot_be_broken_by_what_a_sender_wrote(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_table(["ID"], [("\x1b[31m\tred\n",)])

        assert "ID\n\\x1b[31m\\tred\\n\n" == capsys.readouterr().out


class TestFields:
    def test_leave_out_what_is_not_known(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_fields({"type": "envelope.signed", "reason": None, "copies": 0})

        assert "type    envelope.signed\ncopies  0\n" == capsys.readouterr().out


class TestValues:
    @pytest.mark.parametrize(
        "age, text",
        [
            (timedelta(seconds=-3), "just now"),
            (timedelta(milliseconds=3), "just now"),
            (timedelta(seconds=1), "1 second ago"),
            (timedelta(minutes=59, seconds=59), "59 minutes ago"),
            (timedelta(hours=25), "1 day ago"),
            (timedelta(days=400), "400 days ago"),
        ],
    )
    def test_of_age_are_in_the_largest_unit(self, age: timedelta, text: str) -> None:
        assert text == ago(NOW - age, NOW)

    def test_of_time_are_utc(self) -> None:
        east = NOW.astimezone(datetime.strptime("+0530", "%z").tzinfo)

        assert "2026-07-01T12:00:00Z" == cell(east)

    def test_keep_letters_of_every_script(self) -> None:
        assert "Łódź 契約" == printable("Łódź 契約")


class TestMoments:
    @pytest.mark.parametrize(
        "text, moment",
        [
            ("2026-06-30", datetime(2026, 6, 30, tzinfo=UTC)),
            (" 2026-06-30T09:30 ", datetime(2026, 6, 30, 9, 30, tzinfo=UTC)),
            ("2026-06-30T09:30:00+02:00", datetime(2026, 6, 30, 7, 30, tzinfo=UTC)),
            ("2026-06-30T09:30Z", datetime(2026, 6, 30, 9, 30, tzinfo=UTC)),
            ("7d", NOW - timedelta(days=7)),
            ("12h ago", NOW - timedelta(hours=12)),
            ("90 m", NOW - timedelta(minutes=90)),
        ],
    )
    def test_are_read_as_people_write_them(self, text: str, moment: datetime) -> None:
        assert moment == read_moment(text, NOW)

    @pytest.mark.parametrize("text", ["", "yesterday", "7", "-7d", "9999999d", "2026-13-01"])
    def test_that_are_none_are_a_mistake_with_a_remedy(self, text: str) -> None:
        with pytest.raises(typer.BadParameter, match="is no time: 2026-07-01"):
            read_moment(text, NOW)

    def test_before_all_time_are_the_first(self) -> None:
        assert read_moment("999999d", NOW) == datetime.min.replace(tzinfo=UTC)


class TestIds:
    def test_are_read_in_full(self) -> None:
        text = "01a2004d-4677-7eac-a27c-8b66fbd7d8f3"

        assert UUID(text) == read_id(text, "an event")

    @pytest.mark.parametrize("text", ["", "01a2004d", "env_1", "\x1b[31m", "x" * 1000])
    def test_that_are_none_are_a_mistake_with_a_remedy(self, text: str) -> None:
        with pytest.raises(
            typer.BadParameter, match="no id of an event: give it in full"
        ) as caught:
            read_id(text, "an event")

        assert str(caught.value).isprintable()


class TestStates:
    def test_of_deliveries_are_those_of_the_dispatcher(self) -> None:
        assert set(STATES) == set(State)
