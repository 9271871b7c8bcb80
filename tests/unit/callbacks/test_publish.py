"""What `publish` sends, which brokers it knows, and what it refuses before it starts."""

import asyncio
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import SecretStr

from app.callbacks import Event
from app.callbacks.publish import Publish, Unconfirmed, address, callbacks, cloudevent
from app.callbacks.publish.to_kafka import login_of
from app.callbacks.publish.to_nats import subject_of
from app.callbacks.testing import change_event, make_event
from app.errors import ConfigError

PASSWORD = "s3cret-of-nobody"


def made(event: Event, *, source: str = "atlas-receiver") -> dict[str, Any]:
    document: dict[str, Any] = json.loads(cloudevent.make(event, source=source).body)
    return document


class TestCloudEvent:
    """The rules of the CloudEvents specification 1.0, and of its JSON format, by hand."""

    @pytest.mark.parametrize(
        "event",
        [
            pytest.param(make_event(), id="plain"),
            pytest.param(make_event(data={"event_id": "evt_1"}), id="atlas-id"),
            pytest.param(make_event(envelope_id="ünï code / \N{GRINNING FACE}"), id="odd-id"),
            pytest.param(
                change_event(make_event(), type="receiver.dead", envelope_id=None, envelope=None),
                id="about-no-envelope",
            ),
            pytest.param(make_event(type="", atlas_event_id=""), id="without-type"),
        ],
    )
    def test_is_valid(self, event: Event) -> None:
        document = made(event)
        attributes = {name: value for name, value in document.items() if name != "data"}

        assert "1.0" == attributes["specversion"]
        assert {"id", "source", "specversion", "type"} <= attributes.keys()
        for name, value in attributes.items():
            assert re.fullmatch(r"[a-z0-9]{1,20}", name)
            assert isinstance(value, str)
            assert value
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", value)
        assert datetime.fromisoformat(attributes["time"]).tzinfo is not None
        assert "application/json" == attributes["datacontenttype"]

    def test_has_the_names_of_the_event(self) -> None:
        event = make_event("envelope.signed", envelope_id="env_7", data={"event_id": "evt_1"})

        document = made(event, source="/receiver")

        assert {
            "id": event.delivery_id,
            "source": "/receiver",
            "type": "ai.atlaswork.envelope.signed",
            "subject": "env_7",
            "eventid": event.id,
            "atlaseventid": "evt_1",
        }.items() <= document.items()

    def test_has_one_id_in_all_attempts_and_another_in_a_replay(self) -> None:
        first = make_event()
        second = dataclasses.replace(first, attempt=2)
        replay = dataclasses.replace(first, delivery_id="another", is_replay=True)

        assert made(first) == made(second)
        assert made(first)["id"] != made(replay)["id"]
        assert made(first)["eventid"] == made(replay)["eventid"]

    def test_says_what_was_received_and_what_the_envelope_is(self) -> None:
        event = make_event(
            envelope_id="env_7",
            data={"parties": [{"email": "ada@example.com"}], "metadata": {"deal": [1, None]}},
            is_late=True,
        )

        data = made(event)["data"]

        assert ("default", "env_7", "signed", 1, "applied", True, False) == tuple(
            data[name]
            for name in (
                "account",
                "envelope_id",
                "status",
                "sequence",
                "effect",
                "is_late",
                "is_replay",
            )
        )
        assert {"deal": [1, None]} == data["event"]["metadata"] == data["envelope"]["metadata"]
        assert "ada@example.com" == data["envelope"]["parties"][0]["email"]
        assert event.envelope is not None
        assert event.envelope.updated_at.isoformat() == data["envelope"]["updated_at"]

    def test_has_the_time_at_which_it_happened_else_at_which_it_came(self) -> None:
        zone = timezone(timedelta(hours=2))
        event = make_event(
            received_at=datetime(2026, 7, 2, 10, 0, tzinfo=UTC),
            occurred_at=datetime(2026, 7, 2, 11, 30, tzinfo=zone),
        )

        assert "2026-07-02T09:30:00+00:00" == made(event)["time"]
        assert (
            "2026-07-02T10:00:00+00:00"
            == made(dataclasses.replace(event, occurred_at=None))["time"]
        )

    def test_what_the_service_says_of_itself_does_not_have_atlas_name(self) -> None:
        assert "receiver.dead" == cloudevent.type_of("receiver.dead")

    def test_what_json_cannot_say_is_a_failure(self) -> None:
        with pytest.raises(TypeError, match="object has no form in JSON"):
            made(make_event(data=None, effect=object()))


class TestAddress:
    @pytest.mark.parametrize(
        "url, text, is_encrypted",
        [
            ("nats://broker", "NATS at broker:4222", False),
            ("tls://broker", "NATS at broker:4222", True),
            ("nats://a:1,b,[::1]:3", "NATS at a:1, b:4222, ::1:3", False),
            ("amqp://broker", "RabbitMQ at broker:5672", False),
            ("amqps://broker/", "RabbitMQ at broker:5671", True),
            ("redis://broker:7000/2", "Redis at broker:7000", False),
            ("rediss://broker", "Redis at broker:6379", True),
            ("kafka://a,b:2", "Kafka at a:9092, b:2", False),
            ("kafkas://a", "Kafka at a:9092", True),
        ],
    )
    def test_names_broker_and_places(self, url: str, text: str, *, is_encrypted: bool) -> None:
        found = address.parse(url)

        assert (text, is_encrypted) == (str(found), found.is_encrypted)

    @pytest.mark.parametrize(
        "url, expected",
        [
            ("nats://token@broker", ("token", None, "")),
            ("nats://me:pass@broker", ("me", "pass", "")),
            ("redis://:p%40ss%2Fword@broker/0", (None, "p@ss/word", "0")),
            ("amqp://me:@broker/%2F", ("me", "", "/")),
            ("amqp://me:a@b@broker/prod", ("me", "a@b", "prod")),
        ],
    )
    def test_reads_who_we_are(self, url: str, expected: tuple[Any, ...]) -> None:
        found = address.parse(url)

        assert expected == (found.user, found.password, found.path)

    def test_reads_how_kafka_checks_the_password(self) -> None:
        found = address.parse("kafkas://me:secret@broker?mechanism=scram-sha-512")

        assert "SCRAM-SHA-512" == found.mechanism

    def test_does_not_show_who_we_are(self) -> None:
        found = address.parse(f"amqp://me:{PASSWORD}@broker")

        assert PASSWORD not in f"{found!r} {found}"

    def test_takes_secrets_out_of_what_libraries_say(self) -> None:
        found = address.parse("redis://:p%40ss@broker")

        text = found.describe(OSError("redis://:p%40ss@broker\nrefused p@ss"))

        assert "p@ss" not in text
        assert "p%40ss" not in text
        assert "\n" not in text

    @pytest.mark.parametrize(
        "url, words",
        [
            pytest.param("", "names no broker", id="empty"),
            pytest.param(f"{PASSWORD}@broker", "names no broker", id="no-scheme"),
            pytest.param(f"http://me:{PASSWORD}@broker", "nats://", id="other-scheme"),
            pytest.param(f"redis://:{PASSWORD}@", "needs a host", id="no-host"),
            pytest.param("nats://", "needs a host", id="nothing"),
            pytest.param("kafka://a,,b", "needs a host", id="empty-host"),
            pytest.param("redis://broker:port", "port from 1 to 65535", id="port-not-a-number"),
            pytest.param("redis://broker:0", "port from 1 to 65535", id="port-0"),
            pytest.param("redis://broker:70000", "port from 1 to 65535", id="port-too-large"),
            pytest.param(f"amqp://me:12/{PASSWORD}@broker", "%2F", id="slash-in-password"),
            pytest.param(f"amqp://me:#{PASSWORD}@broker", "names no broker", id="hash-in-password"),
            pytest.param("redis://broker/name", "a path", id="database-not-a-number"),
            pytest.param("nats://broker/atlas", "PUBLISH_TO", id="path-of-nats"),
            pytest.param("redis://a,b", "several hosts", id="two-hosts"),
            pytest.param("kafka://a?mechanism=GSSAPI", "SCRAM-SHA-256", id="mechanism"),
            pytest.param(f"amqp://a?password={PASSWORD}", "option", id="option"),
            pytest.param("nats://a?mechanism=PLAIN", "option", id="mechanism-elsewhere"),
        ],
    )
    def test_what_cannot_be_read_is_refused_without_quoting_it(self, url: str, words: str) -> None:
        with pytest.raises(ConfigError) as refusal:
            address.parse(url)

        assert words in str(refusal.value)
        assert "PUBLISH_URL" in str(refusal.value)
        assert PASSWORD not in str(refusal.value)


class TestSubject:
    @pytest.mark.parametrize(
        "event_type, subject",
        [
            ("envelope.signed", "atlas.envelope.signed"),
            ("envelope.field-filled_2", "atlas.envelope.field-filled_2"),
            ("a *.>", "atlas.a__._"),
            ("..", "atlas._._._"),
            ("", "atlas._"),
            ("über", "atlas._ber"),
        ],
    )
    def test_has_no_words_of_nats(self, event_type: str, subject: str) -> None:
        assert subject == subject_of("atlas", event_type)


BROKER = SecretStr("nats://broker")


@dataclass(frozen=True)
class Given:
    publish_url: SecretStr | None = BROKER
    publish_to: str = "atlas"
    publish_source: str = "atlas-receiver"
    publish_events: Sequence[str] = ("*",)


class TestSettings:
    def test_make_one_callback(self) -> None:
        (callback,) = callbacks(Given(publish_events=("envelope.*", "receiver.dead")))

        assert ("publish", ("envelope.*", "receiver.dead")) == (callback.name, callback.patterns)
        assert callback.is_async

    def test_without_a_broker_nothing_starts(self) -> None:
        with pytest.raises(ConfigError, match="PUBLISH_URL is not set"):
            callbacks(Given(publish_url=None))

    @pytest.mark.parametrize(
        "url, to",
        [
            ("nats://broker", "atlas.>"),
            ("nats://broker", "atlas."),
            ("nats://broker", ""),
            ("amqp://broker", "amq.topic"),
            ("redis://broker", "my stream"),
            ("kafka://broker", ".."),
            ("kafka://broker", "a/b"),
        ],
    )
    def test_a_name_that_the_broker_cannot_have_is_refused(self, url: str, to: str) -> None:
        with pytest.raises(ConfigError, match="PUBLISH_TO="):
            callbacks(Given(publish_url=SecretStr(url), publish_to=to))

    @pytest.mark.parametrize("source", ["", "two words", "<here>", "a\nb"])
    def test_a_source_that_is_no_uri_is_refused(self, source: str) -> None:
        with pytest.raises(ConfigError, match="PUBLISH_SOURCE="):
            callbacks(Given(publish_source=source))

    @pytest.mark.parametrize(
        "url, library, module, extra",
        [
            ("nats://broker", "nats", "to_nats", "nats"),
            ("amqp://broker", "aio_pika", "to_rabbitmq", "rabbitmq"),
            ("redis://broker", "redis", "to_redis", "redis"),
            ("kafka://broker", "aiokafka", "to_kafka", "kafka"),
        ],
    )
    def test_a_library_that_is_not_installed_is_named_with_its_extra(
        self, url: str, library: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours = f"app.callbacks.publish.{module}"
        for name in list(sys.modules):
            if name == ours or name.partition(".")[0] == library:
                monkeypatch.delitem(sys.modules, name)
        # What Python takes for "there is none".
        monkeypatch.setitem(sys.modules, library, None)

        with pytest.raises(ConfigError, match=f"EXTRAS={extra} make run"):
            callbacks(Given(publish_url=SecretStr(url)))

    def test_the_callback_does_not_show_the_password(self) -> None:
        publish = Publish(url=f"nats://me:{PASSWORD}@broker")

        assert "<Publish to 'atlas' of NATS at broker:4222>" == repr(publish)


class TestKafkaLogin:
    @pytest.mark.parametrize(
        "url, login",
        [
            ("kafka://broker", {"security_protocol": "PLAINTEXT"}),
            ("kafkas://broker", {"security_protocol": "SSL"}),
            (
                "kafkas://me:pass@broker?mechanism=SCRAM-SHA-256",
                {
                    "security_protocol": "SASL_SSL",
                    "sasl_mechanism": "SCRAM-SHA-256",
                    "sasl_plain_username": "me",
                    "sasl_plain_password": "pass",
                },
            ),
        ],
    )
    def test_is_what_the_url_says(self, url: str, login: dict[str, str]) -> None:
        assert login == login_of(address.parse(url))


class Broken:
    """A connection that a library lost, and whose waiting calls it cancelled."""

    is_open = True

    async def publish(self, message: cloudevent.Message) -> None:
        raise asyncio.CancelledError(message.id)

    async def close(self) -> None: ...


async def broken(*_: Any, **__: Any) -> Broken:
    return Broken()


async def test_what_a_library_cancels_is_a_failure_and_no_cancellation() -> None:
    publish = Publish(url="nats://broker")
    publish._library = broken

    with pytest.raises(Unconfirmed, match="ended before it confirmed"):
        await publish(make_event())


async def test_closing_what_was_never_opened_is_fine() -> None:
    await Publish(url="nats://broker").close()
