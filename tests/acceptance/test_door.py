"""Only what Atlas signed comes in; everything else gets one and the same answer."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.raw import Connection, Header, exchange, request
from tests.acceptance.service import BETA_KEY, DOOR, KEY, OLD_KEY, Service
from tests.acceptance.tables import Row, bodies_of, count, rows
from tests.factories import make_body, new_envelope_id, signature, signed

NAME = b"X-Atlas-Signature"
WRONG = b"sha256=" + b"0" * 64

HeadersOf = Callable[[bytes], list[Header]]


def value(make: Callable[[bytes], bytes]) -> HeadersOf:
    """Headers with one signature, made of the good one."""
    return lambda good: [(NAME, make(good))]


BAD_SIGNATURES = [
    pytest.param(lambda _: [], id="no-header"),
    pytest.param(value(lambda _: b""), id="empty"),
    pytest.param(value(lambda _: b" \t"), id="blank"),
    pytest.param(value(lambda _: b"sha256="), id="only-the-prefix"),
    pytest.param(value(lambda _: WRONG), id="zeros"),
    pytest.param(value(lambda good: good[:-1] + b"\xe9"), id="latin-1-byte-at-the-end"),
    pytest.param(value(lambda _: b"\xff\xfe\x80\xa0"), id="bytes-above-127"),
    pytest.param(value(lambda good: good[:-1]), id="63-digits"),
    pytest.param(value(lambda good: good + b"0"), id="65-digits"),
    pytest.param(value(lambda good: good[:-32]), id="cut-to-a-right-beginning"),
    pytest.param(value(lambda good: good + good[7:]), id="digest-twice"),
    pytest.param(value(lambda good: good[:39] + b" " + good[39:]), id="blank-inside"),
    pytest.param(value(lambda good: good[:38] + b" " + good[39:]), id="blank-for-a-digit"),
    pytest.param(value(lambda good: b"sha256= " + good[7:]), id="blank-after-the-prefix"),
    pytest.param(value(lambda good: b"sha256=0x" + good[9:]), id="0x"),
    pytest.param(value(lambda _: ("sha256=" + "\uff11" * 64).encode()), id="full-width-digits"),
    pytest.param(
        value(lambda good: b"sha256=" + base64.b64encode(bytes.fromhex(good[7:].decode()))),
        id="base64",
    ),
    pytest.param(value(lambda good: b"sha512=" + good[7:]), id="other-prefix"),
    pytest.param(value(lambda good: good[7:]), id="no-prefix"),
    pytest.param(value(lambda good: b"t=1,v1=" + good[7:]), id="words-of-another-sender"),
    pytest.param(lambda good: [(NAME, good), (NAME, WRONG)], id="good-then-bad"),
    pytest.param(lambda good: [(NAME, WRONG), (NAME, good)], id="bad-then-good"),
    pytest.param(lambda good: [(NAME, good), (NAME, good)], id="good-twice"),
    pytest.param(value(lambda good: good + b"," + WRONG), id="good-comma-bad"),
    pytest.param(value(lambda good: WRONG + b", " + good), id="bad-comma-good"),
    pytest.param(lambda good: [(b"X_Atlas_Signature", good)], id="underscores"),
    pytest.param(lambda good: [(b"Atlas-Signature", good)], id="other-name"),
    pytest.param(lambda good: [(b"X-Hub-Signature-256", good)], id="name-of-another-sender"),
    pytest.param(lambda good: [(b"Authorization", good)], id="authorization"),
]


@pytest.fixture(name="refusal", scope="module")
def _refusal(service: Service) -> bytes:
    """The one body of every 401."""
    return service.post(b"{}").body


class TestWhatIsNotProven:
    @pytest.mark.parametrize("headers_of", BAD_SIGNATURES)
    def test_is_refused_in_the_same_words_and_not_stored(
        self, service: Service, database: str, refusal: bytes, headers_of: HeadersOf
    ) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)

        answer = service.post(body, *headers_of(signature(body, KEY)))

        assert 401 == answer.status
        assert refusal == answer.body
        assert answer.is_problem
        assert [] == bodies_of(database, envelope_id)

    @pytest.mark.parametrize(
        "target", [DOOR, f"{DOOR}/default", f"{DOOR}/beta", f"{DOOR}/nobody", f"{DOOR}/%00"]
    )
    def test_does_not_learn_which_accounts_there_are(
        self, service: Service, refusal: bytes, target: str
    ) -> None:
        body = make_body()

        answer = service.deliver(body, "a key that nobody was given", target=target)

        assert 401 == answer.status
        assert refusal == answer.body

    def test_is_refused_on_a_folded_line(self, service: Service) -> None:
        body = make_body()
        folded = signature(body, KEY).replace(b"=", b"=\r\n ")

        assert service.post(body, (NAME, folded)).status in {400, 401}

    def test_is_any_body_with_one_bit_flipped(self, service: Service, database: str) -> None:
        """White space included: the bytes are signed, not what they mean."""
        body = b'{ "event":"envelope.signed",\t"envelope_id": "%s" }\n' % (
            new_envelope_id().encode()
        )
        header = signed(body, KEY)
        before = count(database, "events")

        with Connection(service.port) as connection:
            for position in range(len(body)):
                flipped = bytearray(body)
                flipped[position] ^= 1 << position % 8
                connection.send(request("POST", DOOR, [header], bytes(flipped)))
                assert 401 == connection.read().status, position

        assert before == count(database, "events")

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(b"[" * 200_000, id="nested-without-end"),
            pytest.param(b'{"a":' + b"9" * 200_000 + b"}", id="number-without-end"),
            pytest.param(b"\xff" * 200_000, id="no-text"),
        ],
    )
    def test_is_never_parsed(self, service: Service, refusal: bytes, body: bytes) -> None:
        answer = service.post(body, (NAME, WRONG))

        assert 401 == answer.status
        assert refusal == answer.body

    def test_is_a_captured_request_at_the_door_of_another_account(
        self, service: Service, database: str
    ) -> None:
        envelope_id = new_envelope_id()
        captured = make_body(envelope_id=envelope_id)
        assert 200 == service.deliver(captured, KEY).status

        answer = service.deliver(captured, KEY, target=f"{DOOR}/beta")

        assert 401 == answer.status
        accounts = rows(database, "SELECT account FROM envelopes WHERE id = $1", envelope_id)
        assert [("default",)] == accounts


class TestWhatIsProven:
    @pytest.mark.parametrize(
        "headers_of",
        [
            pytest.param(value(lambda good: good), id="as-atlas-writes-it"),
            pytest.param(value(lambda good: b"sha256=" + good[7:].upper()), id="upper-case"),
            pytest.param(
                value(lambda good: good[:40].lower() + good[40:].upper()), id="mixed-case"
            ),
            pytest.param(value(lambda good: b"  \t" + good), id="blanks-before"),
            pytest.param(value(lambda good: good + b" \t "), id="blanks-after"),
            pytest.param(lambda good: [(b"x-atlas-signature", good)], id="lower-case-name"),
            pytest.param(lambda good: [(b"X-ATLAS-SIGNATURE", good)], id="upper-case-name"),
            pytest.param(
                lambda good: [(b"X_Atlas_Signature", WRONG), (NAME, good)], id="underscores-beside"
            ),
        ],
    )
    def test_is_recorded(self, service: Service, headers_of: HeadersOf) -> None:
        body = make_body()

        answer = service.post(body, *headers_of(signature(body, KEY)))

        assert (200, "recorded") == (answer.status, answer.json()["outcome"])

    @pytest.mark.parametrize(
        "key, target, account",
        [
            (KEY, DOOR, "default"),
            (OLD_KEY, DOOR, "default"),
            (BETA_KEY, DOOR, "beta"),
            (BETA_KEY, f"{DOOR}/beta", "beta"),
            (KEY, f"{DOOR}/default/", "default"),
        ],
    )
    def test_belongs_to_the_account_of_the_key(
        self, service: Service, database: str, key: str, target: str, account: str
    ) -> None:
        envelope_id = new_envelope_id()

        answer = service.deliver(make_body(envelope_id=envelope_id), key, target=target)

        assert 200 == answer.status
        accounts = rows(database, "SELECT account FROM envelopes WHERE id = $1", envelope_id)
        assert [(account,)] == accounts

    @pytest.mark.parametrize(
        "template",
        [
            pytest.param('{"event":"envelope.viewed","envelope_id":"%s"}', id="compact"),
            pytest.param('{ "event" : "envelope.viewed" ,\n\t"envelope_id":"%s"}', id="spaced"),
            pytest.param('{"envelope_id":"%s","event":"envelope.viewed"}', id="reordered"),
            pytest.param('{"event":"envelope.viewed","envelope_id":"%s"}\n', id="line-end"),
            pytest.param('\r\n {"event":"envelope.viewed","envelope_id":"%s"} ', id="padded"),
            pytest.param(
                '{"event":"envelope.viewed","envelope_id":"%s","metadata":{"a":"\\/\\u2028é\u2028"}}',
                id="escapes",
            ),
            pytest.param(
                '{"event":"envelope.viewed","envelope_id":"%s","metadata":{"a":1.0,"b":1e2,"c":-0}}',
                id="numbers-as-written",
            ),
            pytest.param(
                '{"event":"envelope.viewed","envelope_id":"%s","a":1,"a":2}', id="key-twice"
            ),
        ],
    )
    def test_is_kept_byte_by_byte(self, service: Service, database: str, template: str) -> None:
        envelope_id = new_envelope_id()
        body = (template % envelope_id).encode()

        assert 200 == service.deliver(body, KEY).status

        [stored] = bodies_of(database, envelope_id)
        assert hashlib.sha256(body).digest() == hashlib.sha256(stored).digest()

    def test_again_is_a_duplicate_of_the_first(self, service: Service, database: str) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)

        first = service.deliver(body, KEY).json()
        again = [service.deliver(body, key).json() for key in (KEY, OLD_KEY, KEY)]

        assert "recorded" == first["outcome"]
        assert [{"outcome": "duplicate", "event_id": first["event_id"]}] * 3 == again
        assert [body] == bodies_of(database, envelope_id)

    def test_under_two_accounts_is_two_events(self, service: Service) -> None:
        body = make_body()

        answers = [service.deliver(body, key).json() for key in (KEY, BETA_KEY)]

        assert ["recorded", "recorded"] == [answer["outcome"] for answer in answers]
        assert answers[0]["event_id"] != answers[1]["event_id"]


class TestRotation:
    def test_takes_both_keys_until_the_old_one_is_withdrawn(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        new, old = {"key": KEY, "label": "2026"}, {"key": OLD_KEY, "label": "2025"}
        during = json.dumps({"default": [new, old]})
        after = json.dumps({"default": [new]})
        sent = {key: make_body() for key in (KEY, OLD_KEY)}

        with Service(
            "serve", "--no-work", home=tmp_path, DATABASE_URL=sqlite_url, ATLAS_API_KEYS=during
        ) as service:
            in_overlap = [service.deliver(sent[key], key).status for key in (KEY, OLD_KEY)]
            service.terminate()
            matched_before = rows(sqlite_url, LAST_MATCHES)
            service.settings["ATLAS_API_KEYS"] = after
            service.start().wait_until_ready()
            retry = service.deliver(sent[KEY], KEY).json()["outcome"]
            afterwards = [service.deliver(make_body(), key).status for key in (KEY, OLD_KEY)]

        assert [200, 200] == in_overlap
        assert "duplicate" == retry
        assert [200, 401] == afterwards
        labels = rows(sqlite_url, "SELECT key_label FROM events ORDER BY id")
        assert [("2026",), ("2025",), ("2026",)] == labels
        check_last_matches(matched_before, rows(sqlite_url, LAST_MATCHES))
        columns = {value for row in rows(sqlite_url, "SELECT * FROM keys") for value in row}
        assert not {KEY, OLD_KEY} & columns


LAST_MATCHES = "SELECT label, last_match_at FROM keys WHERE account = 'default'"


def check_last_matches(before: list[Row], after: list[Row]) -> None:
    """An operator withdraws a key when its last match is long ago."""
    first: dict[str, Any] = dict(before)
    last: dict[str, Any] = dict(after)
    assert {"2025", "2026"} == set(first) == set(last)
    assert None not in first.values()
    assert first["2025"] == last["2025"]
    assert first["2026"] < last["2026"]


def test_a_request_without_anything_is_refused(service: Service) -> None:
    answer = exchange(service.port, request("POST", DOOR, declared=0))

    assert 401 == answer.status
