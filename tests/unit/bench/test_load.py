"""The load generator: what it takes for acknowledged has to be what was answered."""

import gc
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.bench import load
from tests.bench.load import Load, Order

ANSWER = b'HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{"outcome":"recorded"}'


class Sluggish:
    """Answers whoever comes first only when the next one has come."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        first, _ = self._listening.accept()
        first.recv(65536)
        second, _ = self._listening.accept()
        with first, second:
            first.sendall(ANSWER)
            second.recv(65536)
            second.sendall(ANSWER)
            second.recv(65536)

    def close(self) -> None:
        self._thread.join(10)
        self._listening.close()


@pytest.fixture(name="server")
def _server() -> Iterator[Sluggish]:
    server = Sluggish()
    yield server
    server.close()


def test_a_late_answer_is_not_taken_for_that_of_the_next_request(
    server: Sluggish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "LAST_ANSWER", 0.1)
    firing = Load(Order(server.port, "secret", 1, 1.0, ""))
    first, second = firing._maker.make(2)

    firing.closed_loop([first], 0.1)
    firing.closed_loop([second], 5.0)

    assert [second] == firing._acknowledged
    assert {load.UNANSWERED: 1} == dict(firing._failures)
    for connection in firing._connections.values():
        connection.socket.close()


def test_what_nobody_answered_in_the_warm_up_may_be_stored_later(
    server: Sluggish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "LAST_ANSWER", 0.1)
    firing = Load(Order(server.port, "secret", 1, 1.0, ""))
    firing.closed_loop(firing._maker.make(1), 0.1)
    firing._failures["503"] = 3
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "disable", lambda: None)

    firing.prepare(0)

    assert {load.UNANSWERED: 1} == dict(firing._failures)
    for connection in firing._connections.values():
        connection.socket.close()
