"""Signed but hostile bodies, and broken HTTP: never a 5xx, and the same on both databases."""

import time
from collections.abc import Sequence
from uuid import UUID

import pytest

from tests.acceptance.conftest import MAX_BODY_BYTES
from tests.acceptance.raw import Answer, Connection, Header, chunked, exchange, request
from tests.acceptance.service import DOOR, KEY, Service, wait_for
from tests.acceptance.tables import bodies_of, count, rows
from tests.factories import make_body, new_envelope_id, signed

RECORDED, QUARANTINED = "recorded", "quarantined"
# A connection that is to be closed at once is by then; one that is kept stays for longer.
SOON = 9

# Where `%s` stands, each test puts an id of its own.
VIEWED = '{"event":"envelope.viewed","envelope_id":"%s"'


def nested(levels: int) -> str:
    return VIEWED + ',"deep":' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


HOSTILE = [
    # Text that a column cannot hold.
    pytest.param(VIEWED + ',"metadata":{"a":"\\u0000"}}', RECORDED, id="nul-in-a-value"),
    pytest.param(VIEWED + ',"metadata":{"\\u0000":"a"}}', RECORDED, id="nul-in-a-key"),
    pytest.param(VIEWED + ',"parties":[{"name":"A\\u0000"}]}', RECORDED, id="nul-in-a-name"),
    pytest.param(VIEWED + ',"event_id":"evt_\\u0000%s"}', QUARANTINED, id="nul-in-the-event-id"),
    pytest.param(
        '{"event":"envelope.viewed","envelope_id":"\\u0000%s"}', QUARANTINED, id="nul-in-the-id"
    ),
    pytest.param(
        '{"event":"envelope.\\u0000","envelope_id":"%s"}', QUARANTINED, id="nul-in-the-type"
    ),
    pytest.param(VIEWED + ',"metadata":{"a":"\x00"}}', QUARANTINED, id="nul-byte-in-a-value"),
    pytest.param(VIEWED + ',"metadata":{"a":"\\ud800"}}', RECORDED, id="surrogate-in-a-value"),
    pytest.param(VIEWED + ',"metadata":{"\\udfff":1}}', RECORDED, id="surrogate-in-a-key"),
    pytest.param(VIEWED + ',"reason":"\\udc00\\ud800"}', RECORDED, id="surrogates-swapped"),
    pytest.param(
        '{"event":"envelope.viewed","envelope_id":"%s\\ud800"}', QUARANTINED, id="surrogate-in-id"
    ),
    pytest.param(VIEWED + ',"metadata":{"a":"\\ud83d\\ude00"}}', RECORDED, id="a-pair"),
    # Numbers.
    pytest.param(VIEWED + ',"metadata":{"a":NaN}}', QUARANTINED, id="nan"),
    pytest.param(VIEWED + ',"metadata":{"a":Infinity}}', QUARANTINED, id="infinity"),
    pytest.param(VIEWED + ',"metadata":{"a":-Infinity}}', QUARANTINED, id="minus-infinity"),
    pytest.param(VIEWED + ',"metadata":{"a":1e999}}', RECORDED, id="beyond-a-float"),
    pytest.param(VIEWED + f',"metadata":{{"a":{2**53 + 1}}}}}', RECORDED, id="2^53+1"),
    pytest.param(VIEWED + f',"fields_version":{2**63}}}', RECORDED, id="2^63"),
    pytest.param(VIEWED + ',"metadata":{"a":' + "9" * 4300 + "}}", RECORDED, id="4300-digits"),
    pytest.param(VIEWED + ',"metadata":{"a":' + "9" * 4301 + "}}", RECORDED, id="4301-digits"),
    pytest.param(VIEWED + ',"metadata":{"a":' + "9" * 200_000 + "}}", RECORDED, id="200000-digits"),
    # Depth.
    pytest.param(nested(64), RECORDED, id="64-levels"),
    pytest.param(nested(65), QUARANTINED, id="65-levels"),
    pytest.param(nested(999), QUARANTINED, id="999-levels"),
    pytest.param(nested(1_000), QUARANTINED, id="1000-levels"),
    pytest.param(nested(20_000), QUARANTINED, id="20000-levels"),
    pytest.param(nested(100_000), QUARANTINED, id="100000-levels"),
    pytest.param("[" * 200_000 + "%s", QUARANTINED, id="nested-without-end"),
    # Whole documents.
    pytest.param("null%.0s", QUARANTINED, id="null"),
    pytest.param('"%s"', QUARANTINED, id="text"),
    pytest.param("17%.0s", QUARANTINED, id="number"),
    pytest.param('["%s"]', QUARANTINED, id="list"),
    pytest.param("{}%.0s", QUARANTINED, id="empty-object"),
    pytest.param(" %.0s", QUARANTINED, id="blank"),
    pytest.param(VIEWED + "}{}", QUARANTINED, id="two-documents"),
    pytest.param(VIEWED + "}\x00", QUARANTINED, id="trailing-nul"),
    pytest.param(VIEWED, QUARANTINED, id="cut-off"),
    pytest.param("event=envelope.viewed&envelope_id=%s", QUARANTINED, id="a-form"),
    # Types of what identifies an event.
    pytest.param('{"event":"envelope.viewed","envelope_id":17}%.0s', QUARANTINED, id="id-number"),
    pytest.param('{"event":"envelope.viewed","envelope_id":1.5}%.0s', QUARANTINED, id="id-float"),
    pytest.param('{"event":"envelope.viewed","envelope_id":true}%.0s', QUARANTINED, id="id-bool"),
    pytest.param('{"event":"envelope.viewed","envelope_id":["%s"]}', QUARANTINED, id="id-list"),
    pytest.param('{"event":"envelope.viewed","envelope_id":{"a":"%s"}}', QUARANTINED, id="id-dict"),
    pytest.param('{"event":"envelope.viewed","envelope_id":null}%.0s', QUARANTINED, id="id-null"),
    pytest.param('{"event":"envelope.viewed","envelope_id":"  "}%.0s', QUARANTINED, id="id-blank"),
    pytest.param(
        '{"event":"envelope.viewed","envelope_id":"%s' + "x" * 300 + '"}', QUARANTINED, id="id-long"
    ),
    pytest.param(VIEWED + ',"event_id":17}', QUARANTINED, id="event-id-number"),
    pytest.param('{"event":17,"envelope_id":"%s"}', QUARANTINED, id="type-number"),
    pytest.param('{"envelope_id":"%s"}', QUARANTINED, id="no-type"),
    pytest.param('{"event":"envelope.viewed"}%.0s', QUARANTINED, id="no-id"),
    # Everything else.
    pytest.param('{"event":"envelope.exploded","envelope_id":"%s"}', RECORDED, id="unknown-type"),
    pytest.param(VIEWED + ',"status":"quantum"}', RECORDED, id="unknown-status"),
    pytest.param(VIEWED + ',"parties":"none","metadata":[1]}', RECORDED, id="wrong-shapes"),
    pytest.param(VIEWED + ',"parties":[null,1,"a",[]]}', RECORDED, id="parties-of-anything"),
    pytest.param(
        VIEWED + "," + ",".join(f'"k{n}":{n}' for n in range(15_000)) + "}", RECORDED, id="wide"
    ),
]

TIMES = [
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59-23:59",
    "2026-06-30T23:59:60Z",
    "2026-06-30T24:00:00Z",
    "2026-02-30T00:00:00Z",
    "2026-06-30T12:00:00",
    "yesterday",
    "",
    1_782_000_000_000,
    -1e300,
    9e18,
    True,
    {},
]


# What is wrong below HTTP never comes near a database, so one of them is enough.
ONE_DATABASE = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def outcome(answer: Answer) -> str:
    assert 200 == answer.status
    found: str = answer.json()["outcome"]
    return found


def stored(database: str, answer: Answer) -> bytes:
    """Give the bytes kept for the event that was answered."""
    event_id = UUID(answer.json()["event_id"])
    wanted = event_id.hex if database.startswith("sqlite") else event_id
    [(body,)] = rows(database, "SELECT body FROM bodies WHERE event_id = $1", wanted)
    return bytes(body)


class TestHostileBody:
    @pytest.mark.parametrize("template, expected", HOSTILE)
    def test_is_taken_and_kept(
        self, service: Service, database: str, template: str, expected: str
    ) -> None:
        body = template.replace("%s", new_envelope_id()).replace("%.0s", "").encode()

        answer = service.deliver(body, KEY)

        assert expected == outcome(answer)
        assert body == stored(database, answer)

    @pytest.mark.parametrize(
        "encoding, expected",
        [
            ("utf-8", RECORDED),
            ("utf-8-sig", QUARANTINED),
            ("utf-16", QUARANTINED),
            ("utf-16-le", QUARANTINED),
            ("utf-32", QUARANTINED),
            ("utf-32-be", QUARANTINED),
        ],
    )
    def test_is_utf_8_or_not_understood(
        self, service: Service, database: str, encoding: str, expected: str
    ) -> None:
        body = make_body().decode().encode(encoding)

        answer = service.deliver(body, KEY)

        assert expected == outcome(answer)
        assert body == stored(database, answer)

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(b"\xff", id="never-a-byte"),
            pytest.param(b"\xc0\xaf", id="overlong"),
            pytest.param(b"\xed\xa0\x80", id="cesu-8"),
            pytest.param(b"\xf5\x80\x80\x80", id="beyond-unicode"),
            pytest.param(b"\xe2\x82", id="cut-off"),
        ],
    )
    def test_of_broken_utf_8_is_kept(self, service: Service, database: str, text: bytes) -> None:
        body = make_body(metadata={"a": "@@"}).replace(b"@@", text)

        answer = service.deliver(body, KEY)

        assert QUARANTINED == outcome(answer)
        assert body == stored(database, answer)

    def test_that_is_empty_is_kept_too(self, service: Service, database: str) -> None:
        """An empty body can be signed as well as any other."""
        answer = service.deliver(b"", KEY)

        assert outcome(answer) in {QUARANTINED, "duplicate"}
        assert b"" == stored(database, answer)

    @pytest.mark.parametrize("moment", TIMES, ids=repr)
    @pytest.mark.parametrize("name", ["timestamp", "created_at"])
    def test_with_an_odd_time_loses_the_time_only(
        self, service: Service, database: str, name: str, moment: object
    ) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id, **{name: moment})

        assert RECORDED == outcome(service.deliver(body, KEY))
        found = rows(database, "SELECT status FROM envelopes WHERE id = $1", envelope_id)
        assert [("signed",)] == found

    def test_cannot_set_what_is_ours(self, service: Service, database: str) -> None:
        envelope_id = new_envelope_id()
        body = make_body(
            envelope_id=envelope_id,
            account="beta",
            version=999,
            sequence=999,
            disputed=True,
            marks={"stamps": {}},
            attempts=9,
            due_at="2020-01-01T00:00:00Z",
            effect="conflict",
            copies=7,
            first_seen_at="2020-01-01T00:00:00Z",
            erased_at="2020-01-01T00:00:00Z",
        )

        assert RECORDED == outcome(service.deliver(body, KEY))

        query = (
            "SELECT account, version, sequence, erased_at IS NULL, disputed "
            "FROM envelopes WHERE id = $1"
        )
        assert [("default", 1, 1, 1, 0)] == rows(database, query, envelope_id)
        query = "SELECT effect, copies FROM events WHERE envelope_id = $1"
        assert [("applied", 0)] == rows(database, query, envelope_id)

    @pytest.mark.parametrize(
        "envelope_ids",
        [
            pytest.param(("Env_%s", "env_%s"), id="case"),
            pytest.param(("é_%s", "e\u0301_%s"), id="normal-form"),
            pytest.param(("%s", "%s "), id="trailing-blank"),
            pytest.param(("%s", "%s\u200b"), id="zero-width"),
        ],
    )
    def test_is_about_the_envelope_of_exactly_that_id(
        self, service: Service, database: str, envelope_ids: Sequence[str]
    ) -> None:
        same = new_envelope_id()
        ids = [text.replace("%s", same) for text in envelope_ids]

        for envelope_id in ids:
            assert RECORDED == outcome(service.deliver(make_body(envelope_id=envelope_id), KEY))

        assert all(1 == len(bodies_of(database, envelope_id)) for envelope_id in ids)

    @pytest.mark.parametrize(
        "content_type",
        [
            None,
            b"",
            b"text/plain",
            b"application/x-www-form-urlencoded",
            b"multipart/form-data",
            b"multipart/form-data; boundary=" + b"x" * 1000,
            b"application/json; charset=utf-16",
            b"application/json; charset=klingon",
            b"\xff\xfe",
            b"a/b; " + b";" * 500,
        ],
    )
    def test_is_read_by_its_bytes_whatever_type_it_claims(
        self, service: Service, content_type: bytes | None
    ) -> None:
        body = make_body()
        headers = [signed(body, KEY)]
        if content_type is not None:
            headers.append((b"Content-Type", content_type))

        assert RECORDED == outcome(service.post(body, *headers))


class TestSize:
    @pytest.mark.parametrize(
        "size, status",
        [(MAX_BODY_BYTES - 1, 200), (MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)],
    )
    @pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
    def test_is_allowed_up_to_the_limit(
        self, service: Service, size: int, status: int, *, is_chunked: bool
    ) -> None:
        body = make_body()
        body += b" " * (size - len(body))
        headers = [signed(body, KEY)]
        data = (
            chunked(DOOR, headers, body[:9000], body[9000:])
            if is_chunked
            else request("POST", DOOR, headers, body)
        )

        answer = exchange(service.port, data)

        assert status == answer.status
        assert 200 == status or answer.is_problem

    def test_that_is_declared_too_large_is_refused_before_the_body(self, service: Service) -> None:
        headers = [signed(b"", KEY)]
        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR, headers, declared=10**12))

            assert connection.read().is_problem

    def test_that_nobody_declared_is_refused_when_it_is_passed(self, service: Service) -> None:
        """And not at the end, which never comes."""
        piece = b"%x\r\n%s\r\n" % (16_384, b"x" * 16_384)
        with Connection(service.port) as connection:
            connection.send(chunked(DOOR, [signed(b"", KEY)], end=b""))
            for _ in range(MAX_BODY_BYTES // 16_384 + 4):
                connection.send(piece)

            assert 413 == connection.read().status

    @pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd", b"gzip, identity"])
    def test_of_an_encoded_body_is_not_looked_at(self, service: Service, coding: bytes) -> None:
        body = make_body()

        answer = service.post(body, signed(body, KEY), (b"Content-Encoding", coding))

        assert 415 == answer.status
        assert answer.is_problem

    @pytest.mark.parametrize(
        "lines",
        [
            pytest.param([(b"X-Padding", b"x" * 70_000)], id="one-line"),
            pytest.param([(b"X-%d" % n, b"x" * 20) for n in range(5_000)], id="many-lines"),
        ],
    )
    def test_of_the_head_is_limited_too(
        self, service: Service, lines: list[tuple[bytes, bytes]]
    ) -> None:
        answer = exchange(service.port, request("POST", DOOR, lines, b"{}"))

        assert 431 == answer.status
        assert answer.is_problem


@ONE_DATABASE
class TestBrokenRequest:
    @pytest.mark.parametrize("ending", ["fin", "rst"])
    @pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
    def test_that_is_cut_off_leaves_nothing(
        self, service: Service, database: str, ending: str, *, is_chunked: bool
    ) -> None:
        body = make_body()
        before, seen = count(database, "events"), len(service.lines("webhook.abandoned"))
        headers = [signed(body, KEY)]
        data = (
            chunked(DOOR, headers, body, end=b"")
            if is_chunked
            else request("POST", DOOR, headers, body, declared=len(body) + 1)
        )

        with Connection(service.port) as connection:
            connection.send(data)
            time.sleep(0.05)  # so that the request has begun when its connection ends
            connection.reset() if ending == "rst" else connection.close()

        wait_for(
            lambda: len(service.lines("webhook.abandoned")) == seen + 1, "a line about the sender"
        )
        assert [] == service.errors()
        assert before == count(database, "events")
        service.wait_until_ready()

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(
                b"POST /webhooks/atlas HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
                id="length-and-chunked",
            ),
            pytest.param(
                b"POST /webhooks/atlas HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
                b"Content-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
                id="chunked-and-length",
            ),
            pytest.param(
                b"POST /webhooks/atlas HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
                b"Content-Length: 3\r\n\r\n{} ",
                id="two-lengths",
            ),
            pytest.param(
                b"POST /webhooks/atlas HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
                b"Content-Length: 2\r\n\r\n{}",
                id="one-length-twice",
            ),
            pytest.param(
                b"POST /webhooks/atlas HTTP/1.1\r\nHost: a\r\nContent-Length: -2\r\n\r\n{}",
                id="negative-length",
            ),
            pytest.param(
                b"POST /webhooks/atlas HTTP/1.1\r\nHost: a\r\nContent-Length: 0x2\r\n\r\n{}",
                id="length-in-hex",
            ),
            pytest.param(
                b"POST /webhooks/atlas HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip"
                b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
                id="chunked-not-last",
            ),
            pytest.param(b"POST webhooks/atlas HTTP/1.1\r\nHost: a\r\n\r\n", id="no-slash"),
            pytest.param(b"POST http://a HTTP/1.1\r\nHost: a\r\n\r\n", id="no-path"),
            pytest.param(b"POST /\xff HTTP/1.1\r\nHost: a\r\n\r\n", id="path-no-ascii"),
            pytest.param(b"POST / HTTP/1.1\r\nHost : a\r\n\r\n", id="blank-before-colon"),
            pytest.param(b"POST / HTTP/1.1\r\nA: b\x00c\r\n\r\n", id="nul-in-a-header"),
            pytest.param(b"POST / HTTP/1.1\r\nA: b\nC: d\r\n\r\n", id="bare-line-feed"),
            pytest.param(b"POST / HTTP/9.9\r\nHost: a\r\n\r\n", id="other-version"),
            pytest.param(b"SIGN / HTTP/1.1\r\nHost: a\r\n\r\n", id="unknown-method"),
            pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="tls-hello"),
            pytest.param(b"{}\r\n\r\n", id="no-http-at-all"),
        ],
    )
    def test_is_refused_as_a_problem(self, service: Service, database: str, data: bytes) -> None:
        before = count(database, "events")

        answer = exchange(service.port, data)

        assert 400 == answer.status
        assert answer.is_problem
        assert "close" == answer.headers["connection"]
        assert before == count(database, "events")

    @pytest.mark.parametrize(
        "end",
        [
            pytest.param(b"\nX", id="bare-line-feed"),
            pytest.param(b"XX0\r\n\r\n", id="no-line-end"),
            pytest.param(b"\r\nzz\r\n", id="size-no-hex"),
            pytest.param(b"\r\n-1\r\n", id="size-negative"),
            pytest.param(b"\r\nffffffffffffffffff\r\n", id="size-too-large"),
        ],
    )
    def test_in_its_chunks_is_refused(self, service: Service, database: str, end: bytes) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)
        data = chunked(DOOR, [signed(body, KEY)], end=b"%x\r\n%s" % (len(body), body) + end)

        answer = exchange(service.port, data)

        assert 400 == answer.status
        assert answer.is_problem
        assert [] == bodies_of(database, envelope_id)

    def test_with_a_signature_after_its_body_is_not_proven(self, service: Service) -> None:
        """A trailer comes too late: some servers in front would drop it, and others would not."""
        body = make_body()
        trailer = b"0\r\nX-Atlas-Signature: %s\r\n\r\n" % signed(body, KEY)[1]

        answer = exchange(service.port, chunked(DOOR, [], body, end=trailer))

        assert 401 == answer.status


@ONE_DATABASE
class TestExpectation:
    def test_of_a_good_request_is_met(self, service: Service) -> None:
        body = make_body()
        headers = [signed(body, KEY), (b"Expect", b"100-continue")]
        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR, headers, declared=len(body)))
            assert 100 == connection.read().status
            connection.send(body)

            assert RECORDED == outcome(connection.read())

    @pytest.mark.parametrize(
        "headers, declared, status",
        [
            pytest.param([], 2, 401, id="no-signature"),
            pytest.param([signed(b"", KEY)], MAX_BODY_BYTES + 1, 413, id="too-large"),
            pytest.param([signed(b"", KEY), (b"Content-Encoding", b"gzip")], 2, 415, id="encoded"),
        ],
    )
    def test_of_a_bad_request_is_refused_before_its_body(
        self, service: Service, headers: list[tuple[bytes, bytes]], declared: int, status: int
    ) -> None:
        with Connection(service.port) as connection:
            connection.send(
                request("POST", DOOR, [*headers, (b"Expect", b"100-continue")], declared=declared)
            )

            assert status == connection.read().status

    def test_that_is_unknown_hangs_nobody(self, service: Service) -> None:
        body = make_body()

        answer = service.post(body, signed(body, KEY), (b"Expect", b"the-unexpected"))

        assert answer.status in {200, 417}


@ONE_DATABASE
class TestConnection:
    def test_carries_two_requests_at_once(self, service: Service) -> None:
        good, bad = make_body(), make_body()
        data = request("POST", DOOR, [signed(good, KEY)], good)
        data += request("POST", DOOR, [signed(good, KEY)], bad)

        with Connection(service.port) as connection:
            connection.send(data)

            assert RECORDED == outcome(connection.read())
            assert 401 == connection.read().status

    def test_goes_on_after_a_refusal_before_the_body(self, service: Service) -> None:
        """The body that nobody read is not taken for the next request."""
        body = make_body()
        smuggled = request("POST", DOOR, [signed(body, KEY)], body)
        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR, [], smuggled))
            assert 401 == connection.read().status
            connection.send(request("POST", DOOR, [signed(body, KEY)], body))

            assert RECORDED == outcome(connection.read())

    def test_that_ends_at_once_does_not_end_the_work(self, service: Service, database: str) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)

        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR, [signed(body, KEY)], body))

        wait_for(lambda: bodies_of(database, envelope_id) == [body], "the event of the sender")
        assert "duplicate" == outcome(service.deliver(body, KEY))
        assert [body] == bodies_of(database, envelope_id)

    @pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
    def test_is_not_upgraded(self, service: Service, protocol: bytes) -> None:
        """Java's client and `curl --http2` offer h2c with every request."""
        body = make_body()
        headers = [(b"Connection", b"Upgrade, HTTP2-Settings"), (b"Upgrade", protocol)]

        assert 405 == exchange(service.port, request("GET", DOOR, headers)).status
        assert RECORDED == outcome(service.post(body, signed(body, KEY), *headers))

    def test_that_ends_on_one_side_gets_its_answer(self, service: Service) -> None:
        body = make_body()
        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR, [signed(body, KEY)], body))
            connection.half_close()

            assert RECORDED == outcome(connection.read())
            assert connection.is_closed_within(SOON)

    def test_that_is_idle_and_ends_on_one_side_is_closed(self, service: Service) -> None:
        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR))
            assert 401 == connection.read().status
            connection.half_close()

            assert connection.is_closed_within(SOON)

    @pytest.mark.parametrize(
        "size, header, status",
        [
            pytest.param(2_000_000, signed(b"", KEY), 413, id="too-large"),
            pytest.param(200_000, (b"X-Atlas-Signature", b"bad"), 401, id="bad-signature"),
        ],
    )
    def test_has_one_answer_to_a_body_that_is_refused_early(
        self, service: Service, size: int, header: Header, status: int
    ) -> None:
        """What follows the answer is a body still, and no head without end."""
        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR, [header], declared=size))
            assert status == connection.read().status
            connection.send(b"x" * size)
            body = make_body()
            connection.send(request("POST", DOOR, [signed(body, KEY)], body))

            assert RECORDED == outcome(connection.read())

    def test_with_garbage_behind_a_request_answers_the_request(self, service: Service) -> None:
        body = make_body()
        with Connection(service.port) as connection:
            connection.send(request("POST", DOOR, [signed(body, KEY)], body) + b"\x16\x03\r\n")

            assert RECORDED == outcome(connection.read())
            assert connection.is_closed_within(SOON)

    def test_is_no_tunnel(self, service: Service) -> None:
        assert 400 == exchange(service.port, b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n").status


@ONE_DATABASE
class TestTarget:
    @pytest.mark.parametrize(
        "target",
        [
            DOOR,
            f"{DOOR}/",
            f"{DOOR}?a=b",
            f"http://receiver.test{DOOR}",
            f"https://elsewhere.test:1{DOOR}/default",
            "/webhooks/%61tlas",
            "/webhooks%2Fatlas",
            f"{DOOR}%2Fdefault",
        ],
    )
    def test_is_the_door_however_it_is_written(self, service: Service, target: str) -> None:
        answer = service.deliver(make_body(), KEY, target=target)

        assert 200 == answer.status

    @pytest.mark.parametrize(
        "target",
        [
            "/",
            f"/{DOOR}",
            f"{DOOR}//",
            f"{DOOR}//default",
            "/webhooks//atlas",
            "/webhooks/./atlas",
            "/webhooks/x/../atlas",
            "/WEBHOOKS/ATLAS",
            f"{DOOR}/default/more",
            f"{DOOR}%00",
            "/api/../webhooks/atlas",
        ],
    )
    def test_is_no_door_and_never_a_redirect(self, service: Service, target: str) -> None:
        """Senders count a redirect as a failure, or follow it without the body."""
        answer = service.deliver(make_body(), KEY, target=target)

        assert 404 == answer.status
        assert answer.is_problem

    @pytest.mark.parametrize(
        "host", [b"receiver.test/api/envelope/1?", b"", b"\xff", b"a b", b"[::1", b"x" * 5000]
    )
    def test_does_not_depend_on_the_host_header(self, service: Service, host: bytes) -> None:
        body = make_body()

        good = exchange(service.port, request("POST", DOOR, [signed(body, KEY)], body, host=host))
        bad = exchange(service.port, request("POST", DOOR, [], body, host=host))

        assert (200, 401) == (good.status, bad.status)

    @pytest.mark.parametrize(
        "method", ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE"]
    )
    @pytest.mark.parametrize("target", [DOOR, f"{DOOR}/default"])
    def test_takes_post_only(
        self, service: Service, database: str, method: str, target: str
    ) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)
        data = request(method, target, [signed(body, KEY)], body)

        answer = exchange(service.port, data, is_head=method == "HEAD")

        assert 405 == answer.status
        assert "POST" == answer.headers["allow"]
        assert method == "HEAD" or answer.is_problem
        assert [] == bodies_of(database, envelope_id)


class TestLog:
    def test_has_one_line_per_webhook_with_what_the_guides_ask_for(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id, fields_status="complete")

        event_id = service.deliver(body, KEY).json()["event_id"]

        line = service.line("webhook.received", event_id=event_id)
        assert {
            "outcome": "recorded",
            "envelope_id": envelope_id,
            "event_type": "envelope.signed",
            "fields_status": "complete",
            "effect": "applied",
            "reason": None,
            "account": "default",
            "key": "new",
        }.items() <= line.items()

    def test_says_why_a_body_was_not_understood(self, service: Service) -> None:
        answer = service.deliver(b'{"envelope_id":"%s"}' % new_envelope_id().encode(), KEY)

        line = service.line("webhook.received", event_id=answer.json()["event_id"])
        assert ("quarantined", "event_name_absent") == (line["outcome"], line["reason"])

    def test_says_why_a_request_was_refused(self, service: Service) -> None:
        def seen() -> int:
            return len(service.lines("webhook.rejected", reason="malformed", status=401))

        before = seen()
        # At most ten such lines a second are written, and other tests write some, too.
        wait_for(
            lambda: (
                service.post(b"{}", (b"X-Atlas-Signature", b"x")).status == 401 and seen() > before
            ),
            "a line about a refusal",
        )

    @pytest.mark.parametrize(
        "text",
        ["\u2028%s\u2029", "%s\u202e\u200f", '%s","event":"forged'],
        ids=["unicode-line-ends", "bidi", "quotes"],
    )
    def test_keeps_an_id_of_any_text_in_its_line(self, service: Service, text: str) -> None:
        envelope_id = text.replace("%s", new_envelope_id())

        answer = service.deliver(make_body(envelope_id=envelope_id), KEY)

        line = service.line("webhook.received", event_id=answer.json()["event_id"])
        assert envelope_id == line["envelope_id"]
        assert service.log.isascii()

    @pytest.mark.parametrize("text", ["\r\n%s", "\x1b[31m%s", "%s\x07"])
    def test_shows_no_id_with_control_characters(self, service: Service, text: str) -> None:
        body = make_body(envelope_id=text.replace("%s", new_envelope_id()))

        answer = service.deliver(body, KEY)

        line = service.line("webhook.received", event_id=answer.json()["event_id"])
        assert (None, "envelope_id_unusable") == (line["envelope_id"], line["reason"])

    def test_has_no_error_after_all_of_this(self, service: Service) -> None:
        assert [] == service.errors()
        assert [] == service.lines(status=500)
        assert "Traceback" not in service.log + service.said
        service.wait_until_ready()
