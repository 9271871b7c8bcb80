"""An address is found however it is escaped, and nobody else's is taken for it."""

import json

import pytest

from app.events.mentions import address, identifier

ANN = address(" Ann@Example.com ")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"email": "ann@example.com"}', id="plain"),
        pytest.param(b'{"email": "ANN@Example.COM"}', id="capitals"),
        pytest.param(rb'{"email": "ann\u0040example.com"}', id="escaped"),
        pytest.param(rb'{"email": "\u0041\u006e\u006E@example\u002ecom"}', id="escaped-letters"),
        pytest.param(rb'{"text": "write to\nann@example.com"}', id="behind-a-line-end"),
        pytest.param(
            json.dumps({"metadata": json.dumps({"by": "ann@example.com"})}).encode(), id="in-text"
        ),
        pytest.param(rb'{"metadata": "{\"by\": \"ann\\u0040example.com\"}"}', id="escaped-in-text"),
        pytest.param(b'{"url": "https://x/?email=ann%40example.com&a=1"}', id="in-a-link"),
        pytest.param(b"https://x/?to=bob%40example.com%2Cann%40example.com", id="in-a-list"),
        pytest.param(b"https://x/?to=%3cAnn%40example%2ecom%3E", id="in-brackets-in-a-link"),
        pytest.param(b"https://x/?next=%2F%3Fto%3Dann%2540example.com", id="in-a-link-in-a-link"),
        pytest.param(rb'{"a": "\u0025\u0034\u0030", "b": "%2Cann\u002540example.com"}', id="both"),
        pytest.param(b"Please ask ann@example.com.", id="at-the-end-of-a-sentence"),
        pytest.param(b'"Ann" <ann@example.com>', id="in-brackets"),
        pytest.param("ann@example.com".encode("utf-16"), id="two-bytes-for-each"),
        pytest.param(b"\xff\xfe ann@example.com \xff", id="no-utf8"),
    ],
)
def test_is_found(body: bytes) -> None:
    assert ANN.is_in(body)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"joann@example.com", id="longer-name"),
        pytest.param(b"jo.ann@example.com", id="two-names"),
        pytest.param(b"jo+ann@example.com", id="tag"),
        pytest.param(b"ann@example.com.au", id="longer-host"),
        pytest.param(b"ann@example.community", id="longer-end"),
        pytest.param(b"ann@example.com-x.org", id="dash"),
        pytest.param(rb'{"x": "a\nb"}', id="escapes-of-others"),
        pytest.param(b"ann at example.com", id="spelled-out"),
    ],
)
def test_of_others_is_not_found(body: bytes) -> None:
    assert not ANN.is_in(body)


def test_with_other_letters_is_found_in_either_case() -> None:
    anna = address("änn@example.com")

    assert anna.is_in("ÄNN@example.com".encode())
    assert anna.is_in(rb'"\u00c4nn@example.com"')
    assert anna.is_in(b"?to=%c3%a4nn%40example.com")


@pytest.mark.parametrize(
    "path, is_through",
    [
        ("metadata.ann@example.com", True),
        ("metadata.Ann@example.com.street", True),
        ("metadata.joann@example.com", False),
        ("metadata.name", False),
    ],
)
def test_is_found_in_a_path(path: str, is_through: bool) -> None:  # noqa: FBT001  # a parameter
    assert is_through == ANN.is_in_path(path)


def test_an_id_counts_as_it_is_written() -> None:
    wanted = identifier("env_1")

    assert wanted.is_in(b'["env_1"]')
    assert not wanted.is_in(b'["env_11"]')
    assert not wanted.is_in(b'["ENV_1"]')


def test_is_found_anywhere_in_a_value() -> None:
    assert ANN.is_in_value({"a": [1, None, {"b": "to ann@example.com"}]})
    assert ANN.is_in_value({"ann@example.com": 1})
    assert not ANN.is_in_value({"a": [1, None, True], "b": "bob@example.com"})


def test_is_taken_out_of_a_value() -> None:
    value = {"a": ["ann@example.com", 1], "ann@example.com": None, "b": "bob@example.com"}

    assert {"a": ["-", 1], "-": None, "b": "bob@example.com"} == ANN.without(value, "-")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\\" * 500_000, id="backslashes"),
        pytest.param(b"\\\\u0040" * 100_000, id="escapes"),
        pytest.param(b"%25" * 300_000, id="percent-signs"),
        pytest.param(b"ann" * 300_000 + b"\\", id="beginnings"),
    ],
)
def test_hostile_bytes_are_looked_through(body: bytes) -> None:
    assert not ANN.is_in(body)
