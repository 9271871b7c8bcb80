"""Registering callbacks: what is asked for, and what is refused with which words."""

import functools
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest

from app.callbacks import Breaker, Callbacks, Event
from app.dispatch.schedule import Backoff
from app.errors import ConfigError, DuplicateCallback
from app.store.callbacks import Subscription


@pytest.fixture(name="callbacks")
def _callbacks() -> Callbacks:
    return Callbacks()


def plain(event: Event) -> None: ...


class AsyncFiler:
    async def __call__(self, event: Event) -> None: ...


class TestOn:
    def test_the_defaults_serve_most(self, callbacks: Callbacks) -> None:
        @callbacks.on("envelope.signed", "envelope.signed", "contract.*")
        async def start(event: Event) -> None: ...

        (callback,) = callbacks
        assert ("start", ("envelope.signed", "contract.*")) == (callback.name, callback.patterns)
        assert callback.function is start
        assert (timedelta(seconds=30), 12) == (callback.timeout, callback.max_attempts)
        assert (Backoff(), None, True) == (
            callback.backoff,
            callback.concurrency,
            callback.is_ordered,
        )
        assert callback.is_async
        assert callback.place.startswith(f"{__name__}:")

    def test_every_option_is_kept(self, callbacks: Callbacks) -> None:
        callbacks.on(
            "*",
            name="my.own-name:2",
            timeout=1.5,
            max_attempts=1,
            backoff=timedelta(hours=2),
            concurrency=3,
            ordered=False,
            account="acme",
            where=bool,
        )(plain)

        (callback,) = callbacks
        assert ("my.own-name:2", timedelta(seconds=1.5)) == (callback.name, callback.timeout)
        assert Backoff(base=timedelta(hours=2), cap=timedelta(hours=2)) == callback.backoff
        assert (1, 3, False, "acme") == (
            callback.max_attempts,
            callback.concurrency,
            callback.is_ordered,
            callback.account,
        )
        assert callback.where is bool
        assert not callback.is_async
        expected = Subscription("my.own-name:2", ("*",), "acme")
        assert expected == callback.subscription
        assert 1.5 == callback.subscription.options["timeout"]

    def test_a_whole_backoff_may_be_given(self, callbacks: Callbacks) -> None:
        backoff = Backoff(factor=2)

        callbacks.on("*", backoff=backoff)(plain)

        assert [backoff] == [callback.backoff for callback in callbacks]

    @pytest.mark.parametrize(
        "function, is_async",
        [
            pytest.param(plain, False, id="def"),
            pytest.param(functools.partial(plain), False, id="partial"),
            pytest.param(AsyncFiler(), True, id="object"),
            pytest.param(AsyncFiler().__call__, True, id="method"),
            pytest.param(lambda *events: events, False, id="any-arguments"),
            pytest.param(lambda event, times=3: (event, times), False, id="default"),
        ],
    )
    def test_anything_that_takes_an_event_can_be_a_callback(
        self, callbacks: Callbacks, function: Any, *, is_async: bool
    ) -> None:
        callbacks.on("*", name="it")(function)

        assert [is_async] == [callback.is_async for callback in callbacks]

    def test_two_of_one_name_are_refused_with_both_places(self, callbacks: Callbacks) -> None:
        callbacks.on("*")(plain)

        with pytest.raises(DuplicateCallback) as refusal:
            callbacks.on("envelope.signed", name="plain")(AsyncFiler())

        assert "'plain'" in str(refusal.value)
        assert 2 <= str(refusal.value).count(__name__)
        assert 1 == len(callbacks)

    @pytest.mark.parametrize(
        "pattern",
        ["", "*.*", "envelope*", "envelope.", ".signed", "envelope.*.signed", "envelope signed", 7],
    )
    def test_what_is_no_pattern_is_refused(self, callbacks: Callbacks, pattern: Any) -> None:
        with pytest.raises(ConfigError, match="is no pattern for events"):
            callbacks.on(pattern)(plain)

    def test_no_pattern_at_all_is_refused(self, callbacks: Callbacks) -> None:
        with pytest.raises(ConfigError, match="names no event"):
            callbacks.on()(plain)

    @pytest.mark.parametrize(
        "options, word",
        [
            ({"timeout": 0}, "timeout=0"),
            ({"timeout": -1}, "timeout=-1"),
            ({"timeout": "soon"}, "timeout='soon'"),
            ({"timeout": float("inf")}, "timeout=inf"),
            ({"timeout": timedelta(days=2)}, "at most 1 day"),
            ({"backoff": 0}, "backoff=0"),
            ({"max_attempts": 0}, "max_attempts=0"),
            ({"max_attempts": 2.5}, "max_attempts=2.5"),
            ({"max_attempts": True}, "max_attempts=True"),
            ({"concurrency": 0}, "concurrency=0"),
            ({"name": ""}, "cannot be the name"),
            ({"name": "a b"}, "cannot be the name"),
            ({"name": 7}, "cannot be the name"),
            ({"where": "yes"}, "where="),
            ({"where": AsyncFiler()}, "where="),
        ],
    )
    def test_an_option_that_makes_no_sense_is_refused(
        self, callbacks: Callbacks, options: dict[str, Any], word: str
    ) -> None:
        with pytest.raises(ConfigError) as refusal:
            callbacks.on("*", **options)(plain)

        assert word in str(refusal.value)

    def test_a_function_without_a_name_needs_one(self, callbacks: Callbacks) -> None:
        with pytest.raises(ConfigError, match="name="):
            callbacks.on("*")(lambda _: None)

    def test_a_second_argument_session_is_written_with(self, callbacks: Callbacks) -> None:
        async def writes(event: Event, session: object) -> None: ...

        callbacks.on("*")(writes)

        assert next(iter(callbacks)).takes_session

    def test_a_plain_function_cannot_take_a_session(self, callbacks: Callbacks) -> None:
        def writes(event: Event, session: object) -> None: ...

        with pytest.raises(ConfigError, match="must be async def"):
            callbacks.on("*")(writes)

    @pytest.mark.parametrize(
        "function",
        [lambda: None, lambda event, other: (event, other), lambda *, event: event],
        ids=["none", "two", "by-name-only"],
    )
    def test_a_wrong_number_of_arguments_is_refused(
        self, callbacks: Callbacks, function: Any
    ) -> None:
        with pytest.raises(ConfigError, match="exactly one argument"):
            callbacks.on("*", name="it")(function)

    def test_generators_and_things_are_refused(self, callbacks: Callbacks) -> None:
        def generates(event: Event) -> Iterator[Event]:
            yield event

        async def generates_later(event: Event) -> AsyncIterator[Event]:
            yield event

        thing: Any = 7
        with pytest.raises(ConfigError, match="yields"):
            callbacks.on("*")(generates)
        with pytest.raises(ConfigError, match="yields"):
            callbacks.on("*")(generates_later)
        with pytest.raises(ConfigError, match="is no function"):
            callbacks.on("*", name="it")(thing)


class TestInclude:
    def test_takes_over_the_callbacks_of_another_set_once(self, callbacks: Callbacks) -> None:
        other = Callbacks()
        other.on("*")(plain)

        callbacks.include(other)
        callbacks.include(other)

        assert list(other) == list(callbacks)

    def test_names_must_differ_here_too(self, callbacks: Callbacks) -> None:
        other = Callbacks()
        other.on("*")(plain)
        callbacks.on("*", name="plain")(AsyncFiler())

        with pytest.raises(DuplicateCallback):
            callbacks.include(other)


class TestWants:
    @pytest.mark.parametrize(
        "pattern, event_type, is_wanted",
        [
            ("envelope.signed", "envelope.signed", True),
            ("envelope.signed", "envelope.signed.twice", False),
            ("envelope.*", "envelope.signed", True),
            ("envelope.*", "envelope.a.b", True),
            ("envelope.*", "envelope", False),
            ("envelope.*", "envelopes.signed", False),
            ("*", "anything", True),
            ("*", "receiver.dead", False),
            ("envelope.*", "receiver.dead", False),
            ("receiver.dead", "receiver.dead", True),
            ("receiver.*", "receiver.dead", True),
        ],
    )
    def test_a_pattern_is_exact_a_prefix_or_all_but_our_own(
        self, pattern: str, event_type: str, *, is_wanted: bool
    ) -> None:
        """The service's events about itself go to those only who name them."""
        assert is_wanted == Subscription("it", (pattern,)).wants(event_type, "default")

    def test_an_account_narrows(self) -> None:
        subscription = Subscription("it", ("*",), "acme")

        assert subscription.wants("envelope.signed", "acme")
        assert not subscription.wants("envelope.signed", "default")


class TestBreaker:
    def test_is_there_if_nothing_is_said(self, callbacks: Callbacks) -> None:
        callbacks.on("*", name="it")(lambda _: None)

        assert Breaker() == next(iter(callbacks)).breaker

    def test_can_be_left_out(self, callbacks: Callbacks) -> None:
        callbacks.on("*", name="it", breaker=None)(lambda _: None)

        assert next(iter(callbacks)).breaker is None

    @pytest.mark.parametrize(
        "breaker, word",
        [
            (True, "be a Breaker"),
            (Breaker(failure_rate=0), "failure_rate"),
            (Breaker(failure_rate=1.1), "failure_rate"),
            (Breaker(calls=0), "at least one call"),
            (Breaker(probes=0), "at least one call"),
            (Breaker(pause=timedelta(0)), "times above 0"),
        ],
    )
    def test_that_could_never_work_is_refused(
        self, callbacks: Callbacks, breaker: Any, word: str
    ) -> None:
        with pytest.raises(ConfigError, match=word):
            callbacks.on("*", name="it", breaker=breaker)(lambda _: None)


class TestMistakes:
    @pytest.mark.parametrize(
        "options",
        [
            {"timeout": 0},
            {"max_attempts": 0},
            {"backoff": -1},
            {"concurrency": "4"},
            {"breaker": 1},
            {"where": 1},
        ],
        ids=str,
    )
    def test_in_options_are_named_with_their_place(self, options: dict[str, Any]) -> None:
        def mistaken(_: Event) -> None: ...

        line = mistaken.__code__.co_firstlineno

        with pytest.raises(ConfigError, match=rf"of mistaken \({__name__}:{line}\) must"):
            Callbacks().on("*", **options)(mistaken)
