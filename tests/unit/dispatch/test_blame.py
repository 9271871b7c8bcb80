"""What is kept of an error: enough to act on, nothing that nobody should read."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.callbacks.forward import Forward
from app.callbacks.testing import make_event
from app.dispatch import blame
from app.errors import AppError


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise SystemExit


def fails_here(_: object = None) -> None:
    raise ValueError


def fails_deeper(_: object = None) -> None:
    fails_here()


def fails_in_a_library(_: object = None) -> None:
    int("x")


def caught(function: object) -> BaseException:
    assert callable(function)
    try:
        function()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError


class TestDescribe:
    @pytest.mark.parametrize(
        "error, text",
        [
            pytest.param(ValueError("no"), "ValueError: no", id="plain"),
            pytest.param(KeyError(), "KeyError", id="without-text"),
            pytest.param(
                UnreadableError(),
                "UnreadableError: (its text cannot be read: SystemExit)",
                id="text-raises",
            ),
        ],
    )
    def test_names_type_and_text(self, error: BaseException, text: str) -> None:
        assert text == blame.describe(error)

    def test_is_cut(self) -> None:
        assert 2000 == len(blame.describe(ValueError("x" * 10_000_000)))

    def test_names_the_place_however_long_the_text_is(self) -> None:
        found = blame.describe(ValueError("x" * 10_000), at="slow.py:10 in buggy")

        assert 2000 == len(found)
        assert found.endswith("xx (slow.py:10 in buggy)")

    @given(st.text(st.characters()))
    def test_any_text_fits_a_column(self, text: str) -> None:
        found = blame.describe(ValueError(text))

        assert "\x00" not in found
        found.encode()

    @pytest.mark.parametrize(
        "text, kept",
        [
            ("a\x00b\x1b[31mc", "a\ufffdb\ufffd[31mc"),
            ("\ud800 lone", "\ufffd lone"),
            ("two\nlines\tare fine", "two\nlines\tare fine"),
            ("Authorization: Bearer abc.def", "Authorization: Bearer [redacted]"),
            ("token=abc&page=2", "token=[redacted]&page=2"),
            ("X-Atlas-Signature: sha256=0af1", "X-Atlas-Signature: sha256=[redacted]"),
            ("mail to ada@example.com failed", "mail to [address] failed"),
            ("postgresql://me:pw@db/x", "postgresql://[redacted]@db/x"),
        ],
    )
    def test_secrets_and_control_characters_are_taken_out(self, text: str, kept: str) -> None:
        assert kept == blame.clean(text)

    def test_a_summary_is_one_line_and_quotes_no_statement(self) -> None:
        outer = RuntimeError("(driver) refused\n[SQL: SELECT secret]")
        outer.orig = OSError("refused\nby the server")  # type: ignore[attr-defined]

        assert "OSError: refused" == blame.summarise(outer)
        assert "RuntimeError: (driver) refused" == blame.summarise(RuntimeError(str(outer)))


class TestFingerprint:
    def test_one_cause_has_one_fingerprint(self) -> None:
        first, second = (
            blame.fingerprint("ValueError", "m:f", callback="c", event_type="e") for _ in range(2)
        )

        assert first == second
        assert 16 == len(first)

    def test_each_part_makes_a_difference(self) -> None:
        prints = {
            blame.fingerprint(kind, place, callback=callback, event_type=event_type)
            for kind in ("ValueError", "KeyError")
            for place in ("m:f", "m:g")
            for callback in ("a", "b")
            for event_type in ("x", "\ud800")
        }

        assert 16 == len(prints)


class TestPlace:
    @pytest.mark.parametrize(
        "function, name",
        [
            (fails_here, "fails_here"),
            (fails_deeper, "fails_here"),
            (fails_in_a_library, "fails_in_a_library"),
        ],
    )
    def test_is_the_innermost_line_that_is_the_authors_own(
        self, function: object, name: str
    ) -> None:
        assert callable(function)
        assert f"{__name__}:{name}" == blame.place_of(caught(function), function)

    @pytest.mark.parametrize("function", [fails_here, fails_deeper, fails_in_a_library])
    def test_has_a_line_to_look_at(self, function: Callable[..., None]) -> None:
        innermost = fails_here if function is fails_deeper else function
        line = innermost.__code__.co_firstlineno + 1

        found = blame.line_of(caught(function), function)

        assert f"test_blame.py:{line} in {innermost.__name__}" == found

    def test_has_no_line_if_the_code_of_the_author_was_not_reached(self) -> None:
        assert blame.line_of(ValueError(), fails_here) is None

    async def test_has_no_line_if_a_built_in_callback_says_it(self) -> None:
        """Its text is made for people, also where an author's function calls it."""
        forward = Forward(url="http://127.0.0.1:9", secrets=["whsec_" + "A" * 32])

        async def wrapped() -> None:
            await forward(make_event("envelope.signed"))

        for function in (wrapped, forward):
            with pytest.raises(AppError) as refused:
                await wrapped()
            assert blame.line_of(refused.value, function) is None

    def test_is_the_callback_if_its_code_was_not_reached(self) -> None:
        assert f"{__name__}:fails_here" == blame.place_of(ValueError(), fails_here)

    def test_a_callable_object_is_named_by_its_type(self) -> None:
        class Filer:
            def __call__(self, _: object) -> None: ...

        assert f"{__name__}:Filer" == blame.home_of(Filer())
