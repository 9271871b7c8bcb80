"""How bytes become one JSON object, which parser reads them, and where the limits are."""

import json

import pytest

from app.errors import PayloadRejected
from app.events.reading import (
    LongNumber,
    Repeating,
    has_escaped_ascii,
    read,
    read_watchfully,
)


def body_with(separators: int, **fields: str) -> bytes:
    """A body with so many commas and brackets, and then some text; none of that is escaped."""
    # The object itself, the list, and a comma before each field; a comma stands between zeros.
    zeros = separators - 2 - len(fields) + 1
    texts = "".join(f'"{key}":"{value}",' for key, value in fields.items())
    body = f'{{{texts}"x":[{",".join(["0"] * zeros)}]}}'
    return body.encode()


class TestTheParser:
    def test_is_the_fast_one_for_nearly_every_body(self) -> None:
        assert ({"a": [1, "\u00e9\x00", None]}, False) == read(b'{"a":[1,"\xc3\xa9\\u0000",null]}')

    @pytest.mark.parametrize("text", [r'"\ud800"', "1" + "0" * 4300], ids=["surrogate", "digits"])
    def test_is_the_patient_one_for_what_the_fast_one_refuses(self, text: str) -> None:
        top, is_odd = read(f'{{"a":{text}}}'.encode())

        assert (["a"], True) == (list(top), is_odd)

    def test_keeps_a_number_until_it_has_more_than_4300_digits(self) -> None:
        fits, too_long = "9" * 4300, "9" * 4301

        top, _ = read(f'{{"fits":{fits},"odd":"\\ud800","long":{too_long}}}'.encode())

        assert int(fits) == top["fits"]
        assert isinstance(top["long"], LongNumber)
        assert too_long == top["long"]


class TestACrowd:
    """What stands in text is no value, and must neither count nor hide what does."""

    LIMIT = 131_072

    def test_may_be_as_large_as_the_limit(self) -> None:
        read(body_with(self.LIMIT, a="plain"))

    def test_is_refused_one_above_it(self) -> None:
        with pytest.raises(PayloadRejected, match="too_many_values"):
            read(body_with(self.LIMIT + 1, a="plain"))

    @pytest.mark.parametrize("text", [",", "[{", "\\\\", '\\"', '\\\\\\",', ",,\\\\"])
    def test_is_counted_outside_of_text_only(self, text: str) -> None:
        top, _ = read(body_with(self.LIMIT, a=text, b=text))

        assert json.loads(f'"{text}"') == top["a"] == top["b"]

    @pytest.mark.parametrize("text", ["", "\\\\", '\\"', 'a\\\\\\"', "\\\\\\\\"])
    @pytest.mark.parametrize("fields", ["a", "ab", "abc"])
    def test_cannot_hide_behind_text(self, text: str, fields: str) -> None:
        with pytest.raises(PayloadRejected, match="too_many_values"):
            read(body_with(self.LIMIT + 1, **dict.fromkeys(fields, text)))


class TestAnEscape:
    @pytest.mark.parametrize("text", [r"\u0065vent", r"\u007B", r"say \\ and \u0022"])
    def test_of_a_plain_character_is_noticed(self, text: str) -> None:
        assert has_escaped_ascii(text.encode())

    @pytest.mark.parametrize("text", ["event", r"a\nb", r"\u00e9", r"\ud83d\ude00", r"\u0000"])
    def test_of_another_one_is_how_json_is_written(self, text: str) -> None:
        assert not has_escaped_ascii(text.encode())


class TestAKeyThatStandsTwice:
    @pytest.mark.parametrize(
        "one, other",
        [("1", "2"), ("1", "true"), ("0", "null"), ('""', "null"), ("[1]", "[2]"), ('"a"', '"A"')],
    )
    def test_is_named_if_its_values_differ(self, one: str, other: str) -> None:
        top = read_watchfully(f'{{"k":{one},"same":1,"k":{other},"same":1}}'.encode())

        assert isinstance(top, Repeating)
        assert {"k"} == top.repeated
        assert json.loads(other) == top["k"]

    @pytest.mark.parametrize("value", ["null", "1", '"a long text"', "[1,2]", '{"a":[]}'])
    def test_says_nothing_new_if_they_are_the_same(self, value: str) -> None:
        top = read_watchfully(f'{{"k":{value},"k":{value}}}'.encode())

        assert isinstance(top, Repeating)
        assert set() == top.repeated

    def test_makes_no_other_object_a_suspect(self) -> None:
        top = read_watchfully(b'{"k":1,"l":{"k":1,"k":2}}')

        assert not isinstance(top, Repeating)
        assert isinstance(top["l"], Repeating)
