"""How the free places are shared among callbacks."""

from collections.abc import Mapping

from app.dispatch.capacity import Load, share
from app.dispatch.registry import Callback, Callbacks


def of(*names: str, concurrency: int | None = None) -> list[Callback]:
    callbacks = Callbacks()
    for name in names:
        callbacks.on("*", name=name, concurrency=concurrency)(print)
    return list(callbacks)


def shared(
    callbacks: list[Callback],
    *,
    slots: int = 64,
    running: Mapping[str, int] | None = None,
    hungry: str = "",
    ahead: Mapping[str, int] | None = None,
) -> dict[str, int]:
    load = Load(slots, running or {}, set(hungry), ahead or {})
    return {room.callback: room.limit for room in share(callbacks, load)}


class TestShare:
    def test_who_is_alone_gets_all(self) -> None:
        assert {"a": 64} == shared(of("a"))

    def test_all_get_the_same_if_nobody_has_a_backlog(self) -> None:
        assert {"a": 21, "b": 21, "c": 21} == shared(of("a", "b", "c"))

    def test_a_backlog_gets_more_but_not_everything(self) -> None:
        assert {"a": 42, "b": 10, "c": 10} == shared(of("a", "b", "c"), hungry="a")

    def test_never_more_than_are_free(self) -> None:
        rooms = shared(of("a", "b", "c"), slots=64, running={"a": 40, "b": 20}, hungry="abc")

        assert sum(rooms.values()) <= 4

    def test_slow_calls_of_one_leave_places_for_the_others(self) -> None:
        """Without a reserve, 64 calls that hang would stop everything else."""
        rooms = shared(of("slow", "quick"), running={"slow": 62}, hungry="s")

        assert {"quick": 1} == rooms

    def test_quick_calls_are_claimed_ahead_of_their_places(self) -> None:
        assert {"a": 164} == shared(of("a"), ahead={"a": 100})

    def test_slow_ones_never_are(self) -> None:
        """They would be kept from workers that have places for them."""
        rooms = shared(of("slow", "quick"), running={"slow": 60}, ahead={"quick": 500}, hungry="s")

        assert 64 >= 60 + rooms.get("slow", 0)

    def test_concurrency_is_a_limit(self) -> None:
        assert {"a": 3} == shared(of("a", concurrency=5), running={"a": 2})
        assert {} == shared(of("a", concurrency=5), running={"a": 5})

    def test_nobody_gets_anything_when_all_places_are_taken(self) -> None:
        assert {} == shared(of("a", "b"), running={"a": 70})
        assert {} == shared([])

    def test_more_callbacks_than_places_are_served_from_the_front(self) -> None:
        assert {"a": 1, "b": 1} == shared(of("a", "b", "c", "d"), slots=2)
