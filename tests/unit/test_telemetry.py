"""One fact is one line, whatever a sender put into it; and a log never fails a request."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from app import telemetry
from app.telemetry import Throttle, described, get_logger

NASTY = [
    pytest.param("env_1\r\n{}", id="cr-lf"),
    pytest.param('env_1\n{"event":"webhook.received"}', id="a-line-of-its-own"),
    pytest.param("\x1b[2J\x1b[31menv_1", id="ansi"),
    pytest.param("\x9b31menv_1", id="c1-ansi"),
    pytest.param("env\u2028_\u20291\x85", id="unicode-line-ends"),
    pytest.param("env_\u202e1\u2066", id="bidi"),
    pytest.param("env_\x001\x07", id="nul-and-bell"),
    pytest.param("env_\ud8001", id="lone-surrogate"),
    pytest.param('env_"1\\', id="quotes"),
    pytest.param("env_🖋", id="emoji"),
]


@pytest.fixture(name="lines", autouse=True)
def _lines() -> Iterator[io.BytesIO]:
    stream, root = io.BytesIO(), logging.getLogger()
    handlers, level = root.handlers, root.level
    yield stream
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level


def written(lines: io.BytesIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.getvalue().splitlines()]


class TestJson:
    def test_is_one_object_per_line(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", stream=lines)

        get_logger("intake").info("webhook.received", envelope_id="env_1", outcome="recorded")
        get_logger("door").warning("webhook.rejected", status=401)

        first, second = written(lines)
        assert "webhook.received" == first["event"]
        assert ("info", "intake", "env_1") == (
            first["level"],
            first["part"],
            first["envelope_id"],
        )
        assert first["timestamp"].endswith("Z")
        assert ("warning", 401) == (second["level"], second["status"])

    def test_is_a_line_for_each_of_many(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", stream=lines)

        get_logger("intake").info("webhook.received", each=[{"event_id": "1"}, {"event_id": "2"}])

        assert [("webhook.received", "1"), ("webhook.received", "2")] == [
            (line["event"], line["event_id"]) for line in written(lines)
        ]

    def test_is_nothing_for_each_of_none(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", stream=lines)

        get_logger("intake").info("webhook.received", each=[])

        assert b"" == lines.getvalue()

    @pytest.mark.parametrize("text", NASTY)
    def test_keeps_any_text_in_its_line(self, lines: io.BytesIO, text: str) -> None:
        telemetry.configure(form="json", stream=lines)

        get_logger("intake").info("webhook.received", envelope_id=text, nested={text: [text]})

        output = lines.getvalue()
        assert 1 == len(output.decode("ascii").splitlines())
        assert output.endswith(b"\n")
        assert not any(byte < 0x20 for byte in output[:-1])
        assert text == json.loads(output)["envelope_id"]

    def test_writes_what_json_does_not_know_as_text(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", stream=lines)

        get_logger("intake").info("webhook.received", error=ValueError("x"), reason=None)

        assert "x" == written(lines)[0]["error"]

    def test_is_what_a_file_gets(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="auto", stream=lines)

        get_logger("intake").info("webhook.received")

        assert "webhook.received" == written(lines)[0]["event"]

    def test_holds_back_what_is_below_the_level(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", level="WARNING", stream=lines)

        get_logger("intake").info("webhook.received")
        get_logger("intake").warning("events.refused")

        assert ["events.refused"] == [line["event"] for line in written(lines)]


class TestPretty:
    @pytest.mark.parametrize("text", NASTY)
    def test_sends_no_control_character_of_others_to_the_terminal(
        self, lines: io.BytesIO, text: str
    ) -> None:
        telemetry.configure(form="pretty", stream=lines)
        get_logger("intake").info("webhook.received", envelope_id="env_1")
        harmless = lines.getvalue().count(b"\x1b")

        get_logger("intake").info("webhook.received", envelope_id=text)

        output = lines.getvalue().decode()
        assert 2 == len(output.splitlines())
        assert 2 * harmless == output.count("\x1b")
        assert not set(output) & set("\r\x00\x07\x85\x9b\u2028\u2029\u202e\u2066")

    def test_is_a_line_for_each_of_many(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="pretty", stream=lines)

        get_logger("intake").info("webhook.received", each=[{"event_id": "1"}, {"event_id": "2"}])

        assert 2 == len(lines.getvalue().splitlines())


class TestLibraries:
    def test_speak_in_lines_of_ours(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", stream=lines)

        logging.getLogger("uvicorn.error").warning("Invalid %s received.", "request\r\n")
        logging.getLogger("asyncio").info("chatter")

        line = written(lines)[0]
        assert 1 == len(written(lines))
        assert ("library.logged", "uvicorn.error") == (line["event"], line["part"])

    def test_tell_kind_and_place_of_an_error_but_not_its_words(self, lines: io.BytesIO) -> None:
        """What an exception says may quote a password or a body."""
        telemetry.configure(form="json", stream=lines)
        try:
            int("postgresql://app:db-password@localhost")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")

        assert b"db-password" not in lines.getvalue()
        assert "ValueError" == written(lines)[0]["error"]
        assert "test_telemetry.py:" in written(lines)[0]["place"]

    def test_replace_what_was_set_up_before(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", stream=io.BytesIO())
        telemetry.configure(form="json", stream=lines)

        logging.getLogger("anything").error("once")

        assert 1 == len(written(lines))


class BrokenPipe(io.BytesIO):
    def write(self, _: Any) -> int:
        raise BrokenPipeError


class TestOutput:
    def test_that_is_gone_fails_nobody(self) -> None:
        telemetry.configure(form="json", stream=BrokenPipe())

        get_logger("intake").info("webhook.received")
        logging.getLogger("uvicorn").error("something")

    def test_that_is_closed_fails_nobody(self, lines: io.BytesIO) -> None:
        telemetry.configure(form="json", stream=lines)
        lines.close()

        get_logger("intake").info("webhook.received")


class TestErrors:
    def test_have_no_place_before_they_are_raised(self) -> None:
        assert {"error": "ValueError"} == described(ValueError("secret"))


class TestThrottle:
    @pytest.fixture(name="clock", autouse=True)
    def _clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [1000.5]
        monkeypatch.setattr("app.telemetry.time.monotonic", lambda: now[0])
        return now

    def test_lets_so_many_pass_in_a_second(self) -> None:
        throttle = Throttle(per_second=3)

        assert [0, 0, 0, None, None] == [throttle.pass_or_count() for _ in range(5)]

    def test_counts_what_it_held_back(self, clock: list[float]) -> None:
        throttle = Throttle(per_second=1)
        for _ in range(5):
            throttle.pass_or_count()

        clock[0] += 1

        assert [4, None] == [throttle.pass_or_count() for _ in range(2)]
        clock[0] += 1
        assert 1 == throttle.pass_or_count()
