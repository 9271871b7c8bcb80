"""`publish` against real brokers: private instances, which are killed, frozen and restarted."""

import asyncio
import json
import socket
import ssl
import sys
import threading
import uuid
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import aio_pika
import psutil
import pytest
import trustme
from confluent_kafka import Consumer, Message, TopicPartition
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, StreamConfig
from redis.asyncio import Redis as RedisClient

from app.callbacks import Callbacks, Event
from app.callbacks.publish import BrokerAway, NotPublished, Publish, Refused, Unconfirmed
from app.callbacks.testing import Done, deliver, make_event
from app.errors import GiveUp
from tests.brokers import PASSWORD, Broker, EncryptedNats, Kafka, Nats, RabbitMQ, Redis, running
from tests.faults.proxy import Proxy

LIMIT = timedelta(seconds=10)
SHORT = timedelta(seconds=1)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Received:
    """A message, as the other side has it."""

    id: str
    content_type: str
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document


class Reader:
    """Who reads what we publish; `to` is a place of its own for each test."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.to = f"test-{uuid.uuid4().hex}"
        self._made: list[Publish] = []

    def publish(self, **changes: Any) -> Publish:
        made = Publish(**{"url": self.broker.url, "to": self.to, "limit": LIMIT, **changes})
        self._made.append(made)
        return made

    async def close(self) -> None:
        for each in self._made:
            await each.close()

    async def prepare(self) -> None:
        """Make what takes the messages."""

    async def read(self) -> list[Received]:
        raise NotImplementedError


R = TypeVar("R", bound=Reader)


class NatsReader(Reader):
    async def prepare(self, **options: Any) -> None:
        async with self._connection() as client:
            config = StreamConfig(name=self.to, subjects=[f"{self.to}.>"], **options)
            await client.jetstream().add_stream(config)

    async def read(self) -> list[Received]:
        async with self._connection() as client:
            stream = client.jetstream()
            state = (await stream.stream_info(self.to)).state
            messages = [await stream.get_msg(self.to, seq + 1) for seq in range(state.messages)]
        return [
            Received(headers["Nats-Msg-Id"], headers["Content-Type"], message.data or b"")
            for message in messages
            if (headers := message.headers)
        ]

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Client]:
        client = Client()
        await client.connect(self.broker.url)
        async with client:
            yield client


class RabbitReader(Reader):
    async def prepare(self, arguments: Mapping[str, Any] | None = None) -> None:
        async with await aio_pika.connect(self.broker.url) as connection:
            channel = await connection.channel()
            exchange = await channel.declare_exchange(self.to, "topic", durable=True)
            queue = await channel.declare_queue(
                self.to, durable=True, arguments=dict(arguments or {})
            )
            await queue.bind(exchange, "envelope.*")

    async def read(self) -> list[Received]:
        received = []
        async with await aio_pika.connect(self.broker.url) as connection:
            queue = await (await connection.channel()).get_queue(self.to)
            while (message := await queue.get(fail=False)) is not None:
                content_type = message.content_type or ""
                received.append(Received(message.message_id or "", content_type, message.body))
        return received


class RedisReader(Reader):
    async def read(self) -> list[Received]:
        async with RedisClient.from_url(self.broker.url) as client:
            entries: Any = await client.xrange(self.to)
        return [
            Received(entry[b"id"].decode(), entry[b"content-type"].decode(), entry[b"event"])
            for _, entry in entries
        ]


READERS: dict[type[Broker], type[Reader]] = {
    Nats: NatsReader,
    RabbitMQ: RabbitReader,
    Redis: RedisReader,
}


@pytest.fixture(name="nats", scope="module")
def _nats() -> Iterator[Nats]:
    with running(Nats) as nats:
        yield nats


@pytest.fixture(name="rabbitmq", scope="module")
def _rabbitmq() -> Iterator[RabbitMQ]:
    with running(RabbitMQ) as rabbitmq:
        yield rabbitmq


@pytest.fixture(name="redis", scope="module")
def _redis() -> Iterator[Redis]:
    with running(Redis) as redis:
        yield redis


@pytest.fixture(name="broker", params=["nats", "rabbitmq", "redis"])
def _broker(request: pytest.FixtureRequest) -> Broker:
    broker: Broker = request.getfixturevalue(request.param)
    return broker


@pytest.fixture(name="reader")
async def _reader(broker: Broker) -> AsyncIterator[Reader]:
    reader = READERS[type(broker)](broker)
    await reader.prepare()
    yield reader
    await reader.close()


@pytest.fixture(name="silence", autouse=True)
def _silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing in here may make a library write to the log."""
    yield
    lines = [each.getMessage() for each in caplog.get_records("call")]
    # What asyncio says when an encrypted connection of the library of NATS ends.
    assert [] == [line for line in lines if "eof_received" not in line]


@contextmanager
def frozen(broker: Broker) -> Iterator[None]:
    broker.suspend()
    try:
        yield
    finally:
        broker.resume()


@asynccontextmanager
async def killed(broker: Broker) -> AsyncIterator[None]:
    await asyncio.to_thread(broker.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(broker.start)


@asynccontextmanager
async def closing(publish: Publish) -> AsyncIterator[Publish]:
    try:
        yield publish
    finally:
        await publish.close()


@asynccontextmanager
async def reading(reader: R) -> AsyncIterator[R]:
    try:
        yield reader
    finally:
        await reader.close()


@asynccontextmanager
async def forwarded(port: int, target: tuple[str, int]) -> AsyncIterator[None]:
    """Let what connects to `port` reach `target`."""
    async with Proxy(target, port=port):
        yield


@asynccontextmanager
async def encrypted(authority: trustme.CA, reader: Reader) -> AsyncIterator[str]:
    """Give the URL of a broker behind a wire that encrypts."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with Proxy(("127.0.0.1", reader.broker.port), tls=context) as wire:
        url = reader.broker.url.replace(f":{reader.broker.port}", f":{wire.port}")
        yield url.replace("://", "s://")


async def elsewhere(publish: Publish, *events: Event) -> None:
    """Publish on an event loop of another thread, which ends afterwards."""

    async def run() -> None:
        for event in events:
            await publish(event)

    await asyncio.to_thread(asyncio.run, run())


class TestEveryBroker:
    async def test_an_event_arrives_as_a_cloudevent(self, reader: Reader) -> None:
        event = make_event("envelope.signed", envelope_id="env 7/ü")

        await reader.publish(source="https://receiver.example")(event)

        (received,) = await reader.read()
        assert (event.delivery_id, "application/cloudevents+json") == (
            received.id,
            received.content_type,
        )
        assert ("1.0", event.delivery_id, "https://receiver.example", "env 7/ü") == tuple(
            received.event[name] for name in ("specversion", "id", "source", "subject")
        )
        assert "signed" == received.event["data"]["status"]

    async def test_it_is_a_callback(self, reader: Reader) -> None:
        callbacks = Callbacks()
        callbacks.on("envelope.*", name="publish")(reader.publish())

        verdicts = await deliver(callbacks, make_event())

        assert {"publish": Done()} == verdicts
        assert 1 == len(await reader.read())

    async def test_many_at_once_are_all_confirmed(self, reader: Reader) -> None:
        events = [make_event(envelope_id=f"env_{number}") for number in range(50)]
        publish = reader.publish()

        await asyncio.gather(*map(publish, events))

        assert {event.delivery_id for event in events} == {each.id for each in await reader.read()}

    async def test_a_killed_broker_fails_all_that_wait_and_is_used_again(
        self, reader: Reader
    ) -> None:
        publish = reader.publish()
        await publish(first := make_event())

        reader.broker.suspend()
        calls = [asyncio.create_task(publish(make_event())) for _ in range(5)]
        await asyncio.wait(calls, timeout=0.2)
        async with killed(reader.broker):
            failures = await asyncio.gather(*calls, return_exceptions=True)
            with pytest.raises(BrokerAway) as last_failure:
                await publish(make_event())
        await publish(second := make_event())

        assert [True] * 5 == [isinstance(failure, NotPublished) for failure in failures]
        for text in map(str, [*failures, last_failure.value]):
            assert f"at 127.0.0.1:{reader.broker.port}" in text
            assert PASSWORD not in text
        # Those in between may be there, too: what is lost is the confirmation.
        ids = {each.id for each in await reader.read()}
        assert {first.delivery_id, second.delivery_id} <= ids

    async def test_a_broker_that_restarted_meanwhile_costs_no_attempt(self, reader: Reader) -> None:
        publish = reader.publish()
        await publish(make_event())

        async with killed(reader.broker):
            pass
        await publish(make_event())

        assert 2 == len(await reader.read())

    async def test_a_broker_that_says_nothing_is_a_failure_in_time(self, reader: Reader) -> None:
        publish = reader.publish(limit=SHORT)
        await publish(make_event())

        with frozen(reader.broker):
            with pytest.raises(Unconfirmed, match="did not confirm"):
                await publish(make_event())
            with pytest.raises(NotPublished):
                await publish(make_event())
        await reader.publish(limit=LIMIT)(make_event())
        await publish(event := make_event())

        assert event.delivery_id in {each.id for each in await reader.read()}

    async def test_each_event_loop_has_a_connection_of_its_own(self, reader: Reader) -> None:
        publish = reader.publish()
        events = [make_event() for _ in range(6)]

        await publish(events[0])
        await asyncio.gather(
            elsewhere(publish, *events[1:3]), elsewhere(publish, *events[3:5]), publish(events[5])
        )

        assert {event.delivery_id for event in events} == {each.id for each in await reader.read()}

    async def test_a_loop_that_blocks_does_not_hold_up_another(self, reader: Reader) -> None:
        publish = reader.publish()
        is_blocking, may_end = threading.Event(), threading.Event()

        async def block() -> None:
            await publish(make_event())
            is_blocking.set()
            may_end.wait(30)

        blocked = asyncio.create_task(asyncio.to_thread(asyncio.run, block()))
        await asyncio.to_thread(is_blocking.wait, 30)
        await publish(make_event())
        may_end.set()
        await blocked

        assert 2 == len(await reader.read())

    async def test_a_call_that_is_cut_off_does_not_disturb_the_others(self, reader: Reader) -> None:
        publish = reader.publish()
        cut = asyncio.create_task(publish(make_event()))
        others = [asyncio.create_task(publish(make_event())) for _ in range(5)]

        await asyncio.sleep(0)
        cut.cancel()
        outcomes = await asyncio.gather(cut, *others, return_exceptions=True)

        assert isinstance(outcomes[0], asyncio.CancelledError)
        assert [None] * 5 == outcomes[1:]

    async def test_a_wrong_password_is_a_failure_that_does_not_tell_it(
        self, reader: Reader
    ) -> None:
        url = reader.broker.url.replace(PASSWORD, "not-the%20secret")

        with pytest.raises(BrokerAway) as failure:
            await reader.publish(url=url)(make_event())

        assert "secret" not in str(failure.value)
        assert f"at 127.0.0.1:{reader.broker.port}" in str(failure.value)


class TestNats:
    async def test_a_second_attempt_is_stored_once(self, nats: Nats) -> None:
        async with reading(NatsReader(nats)) as reader:
            await reader.prepare()
            event = make_event()

            await reader.publish()(event)
            await reader.publish()(event)

            assert [event.delivery_id] == [each.id for each in await reader.read()]

    async def test_no_stream_is_a_failure_that_says_how_to_make_one(self, nats: Nats) -> None:
        async with reading(NatsReader(nats)) as reader:
            publish = reader.publish()

            with pytest.raises(Refused, match="nats stream add") as failure:
                await publish(make_event())
            await reader.prepare()
            await publish(make_event())

            assert f"{reader.to}.envelope.signed" in str(failure.value)
            assert 1 == len(await reader.read())

    async def test_a_full_stream_is_a_failure(self, nats: Nats) -> None:
        async with reading(NatsReader(nats)) as reader:
            await reader.prepare(max_msgs=1, discard=DiscardPolicy.NEW)
            publish = reader.publish()

            await publish(make_event())

            with pytest.raises(Refused, match="maximum messages exceeded"):
                await publish(make_event())

    async def test_a_message_that_is_too_large_is_given_up(self, nats: Nats) -> None:
        async with reading(NatsReader(nats)) as reader:
            await reader.prepare()

            with pytest.raises(GiveUp, match="max_payload"):
                await reader.publish()(make_event(data={"note": "x" * 1_100_000}))

    async def test_a_subject_that_is_not_permitted_is_a_failure_at_once(self, nats: Nats) -> None:
        async with reading(NatsReader(nats)) as reader:
            with pytest.raises(Unconfirmed, match="permissions violation"):
                await reader.publish(to="denied")(make_event())

    async def test_a_server_without_encryption_gets_no_password(self, nats: Nats) -> None:
        async with reading(NatsReader(nats)) as reader:
            url = nats.url.replace("nats://", "tls://")

            with pytest.raises(BrokerAway, match="does not encrypt"):
                await reader.publish(url=url)(make_event())

    async def test_the_second_of_two_servers_is_enough(self, nats: Nats) -> None:
        async with reading(NatsReader(nats)) as reader:
            await reader.prepare()
            url = nats.url.replace("127.0.0.1", "127.0.0.1:1,127.0.0.1")

            await reader.publish(url=url)(make_event())

            assert 1 == len(await reader.read())


class TestRabbitMQ:
    """In one class, so that few workers start a RabbitMQ: it takes seconds."""

    async def test_no_queue_is_a_failure_until_one_is_bound(self, rabbitmq: RabbitMQ) -> None:
        async with reading(RabbitReader(rabbitmq)) as reader:
            publish = reader.publish()

            with pytest.raises(Refused, match="no queue is bound to the exchange"):
                await publish(make_event())
            await reader.prepare()
            await publish(event := make_event())

            assert [event.delivery_id] == [each.id for each in await reader.read()]

    async def test_a_full_queue_is_a_failure(self, rabbitmq: RabbitMQ) -> None:
        limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
        async with reading(RabbitReader(rabbitmq)) as reader:
            await reader.prepare(limits)
            publish = reader.publish()

            await publish(make_event())

            with pytest.raises(Refused, match="a queue is full"):
                await publish(make_event())

    async def test_an_exchange_of_another_type_is_a_failure(self, rabbitmq: RabbitMQ) -> None:
        async with reading(RabbitReader(rabbitmq)) as reader:
            async with await aio_pika.connect(rabbitmq.url) as connection:
                await (await connection.channel()).declare_exchange(reader.to, "fanout")

            with pytest.raises(Refused, match="name another one in PUBLISH_TO"):
                await reader.publish()(make_event())

    async def test_a_virtual_host_that_is_not_there_is_a_failure(self, rabbitmq: RabbitMQ) -> None:
        async with reading(RabbitReader(rabbitmq)) as reader:
            publish = reader.publish(url=f"{rabbitmq.url}/nowhere")

            with pytest.raises(BrokerAway, match="virtual host 'nowhere'"):
                await publish(make_event())

    async def test_messages_are_kept_through_a_restart(self, rabbitmq: RabbitMQ) -> None:
        async with reading(RabbitReader(rabbitmq)) as reader:
            await reader.prepare()
            await reader.publish()(make_event())

            async with await aio_pika.connect(rabbitmq.url) as connection:
                queue = await (await connection.channel()).get_queue(reader.to)
                message = await queue.get()

        assert aio_pika.DeliveryMode.PERSISTENT == message.delivery_mode
        assert ("envelope.signed", "ai.atlaswork.envelope.signed") == (
            message.routing_key,
            message.type,
        )


class TestRedis:
    async def test_a_key_that_is_no_stream_is_a_failure(self, redis: Redis) -> None:
        async with reading(RedisReader(redis)) as reader:
            async with RedisClient.from_url(redis.url) as client:
                await client.set(reader.to, "taken")

            with pytest.raises(Unconfirmed, match="WRONGTYPE"):
                await reader.publish()(make_event())

    async def test_another_database_is_another_place(self, redis: Redis) -> None:
        async with reading(RedisReader(redis)) as reader:
            await reader.publish(url=f"{redis.url}/3")(make_event())

            assert [] == await reader.read()


class KafkaReader:
    """Reads a topic of the mock cluster from its beginning."""

    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka
        self.to = f"test-{uuid.uuid4().hex}"

    def publish(self, **changes: Any) -> Publish:
        return Publish(**{"url": self.kafka.url, "to": self.to, "limit": LIMIT, **changes})

    async def read(self, count: int) -> list[Message]:
        return await asyncio.to_thread(self._read, count)

    def _read(self, count: int) -> list[Message]:
        consumer = Consumer({"bootstrap.servers": self.kafka.servers, "group.id": "test"})
        try:
            partitions = consumer.list_topics(self.to, timeout=10).topics[self.to].partitions
            consumer.assign([TopicPartition(self.to, number, 0) for number in partitions])
            return consumer.consume(count, timeout=20)
        finally:
            consumer.close()


@pytest.fixture(name="kafka", scope="module")
def _kafka() -> Iterator[Kafka]:
    with Kafka() as kafka:
        yield kafka


class TestKafka:
    async def test_an_event_arrives_as_a_cloudevent(self, kafka: Kafka) -> None:
        reader = KafkaReader(kafka)
        async with closing(reader.publish()) as publish:
            await publish(event := make_event(envelope_id="env 7/ü"))

        (message,) = await reader.read(1)
        document = json.loads(message.value() or b"")
        headers = dict(message.headers() or [])
        assert "env 7/ü".encode() == message.key()
        assert b"application/cloudevents+json" == headers["content-type"]
        assert event.delivery_id.encode() == headers["ce_id"]
        assert event.delivery_id == document["id"]
        assert b"ai.atlaswork.envelope.signed" == headers["ce_type"]

    async def test_the_events_of_an_envelope_stay_in_order(self, kafka: Kafka) -> None:
        reader = KafkaReader(kafka)
        events = [make_event(envelope_id=f"env_{number % 3}") for number in range(30)]

        async with closing(reader.publish()) as publish:
            for event in events:
                await publish(event)

        messages = await reader.read(30)
        for envelope_id in ("env_0", "env_1", "env_2"):
            of_envelope = [each for each in messages if envelope_id.encode() == each.key()]
            assert 1 == len({message.partition() for message in of_envelope})
            assert [event.delivery_id for event in events if event.envelope_id == envelope_id] == [
                json.loads(message.value() or b"")["id"] for message in of_envelope
            ]

    async def test_each_event_loop_has_a_connection_of_its_own(self, kafka: Kafka) -> None:
        reader = KafkaReader(kafka)
        async with closing(reader.publish()) as publish:
            await asyncio.gather(
                elsewhere(publish, make_event(), make_event()),
                elsewhere(publish, make_event()),
                publish(make_event()),
            )

        assert 4 == len(await reader.read(4))

    async def test_nobody_there_is_a_failure_and_somebody_later_is_used(self, kafka: Kafka) -> None:
        reader = KafkaReader(kafka)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        async with closing(reader.publish(url=f"kafka://127.0.0.1:{port}")) as publish:
            with pytest.raises(BrokerAway, match=f"at 127.0.0.1:{port} cannot be used"):
                await publish(make_event())
            async with forwarded(port, kafka.address):
                await publish(make_event())

        assert 1 == len(await reader.read(1))

    async def test_a_cluster_that_dies_under_way_is_a_failure(self) -> None:
        with Kafka() as kafka:
            publish = KafkaReader(kafka).publish(limit=timedelta(seconds=3))
            await publish(make_event())

        async with closing(publish):
            with pytest.raises(NotPublished):
                await publish(make_event())
            with pytest.raises(BrokerAway):
                await publish(make_event())

    async def test_a_message_that_is_too_large_is_given_up(self, kafka: Kafka) -> None:
        reader = KafkaReader(kafka)
        async with closing(reader.publish()) as publish:
            await publish(make_event())

            with pytest.raises(GiveUp, match=r"max\.message\.bytes"):
                await publish(make_event(data={"note": "x" * 70_000_000}))
            await publish(make_event())

        assert 2 == len(await reader.read(2))


@pytest.fixture(name="authority")
def _authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """Whom everybody trusts, as if it were one of the system's authorities."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return authority


class TestEncryption:
    async def test_nats_proves_who_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with running(EncryptedNats) as nats:
            monkeypatch.setenv("SSL_CERT_FILE", str(nats.authority))
            async with reading(NatsReader(nats)) as reader:
                await reader.prepare()

                await reader.publish()(make_event())

                assert 1 == len(await reader.read())

    async def test_nats_that_a_stranger_vouches_for_is_refused(self) -> None:
        with running(EncryptedNats) as nats:
            async with reading(NatsReader(nats)) as reader:
                with pytest.raises(BrokerAway, match="CERTIFICATE_VERIFY_FAILED"):
                    await reader.publish()(make_event())

    async def test_redis_and_rabbitmq_prove_who_they_are(
        self, authority: trustme.CA, redis: Redis, rabbitmq: RabbitMQ
    ) -> None:
        for reader in (RedisReader(redis), RabbitReader(rabbitmq)):
            await reader.prepare()
            async with encrypted(authority, reader) as url, reading(reader):
                await reader.publish(url=url)(make_event())

                assert 1 == len(await reader.read())

    async def test_one_that_a_stranger_vouches_for_is_refused(
        self, redis: Redis, rabbitmq: RabbitMQ
    ) -> None:
        for reader in (RedisReader(redis), RabbitReader(rabbitmq)):
            async with encrypted(trustme.CA(), reader) as url, reading(reader):
                with pytest.raises(BrokerAway, match="CERTIFICATE_VERIFY_FAILED"):
                    await reader.publish(url=url)(make_event())


class TestHarness:
    def test_without_the_program_its_tests_are_not_run(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CI", raising=False)

        with (
            pytest.raises(pytest.skip.Exception, match="not run: install nowhere"),
            running(Nowhere),
        ):
            pass

    def test_under_ci_they_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CI", "true")

        with pytest.raises(pytest.fail.Exception, match="install nowhere"), running(Nowhere):
            pass

    @pytest.mark.usefixtures("nats")
    async def test_brokers_end_with_tests_that_are_killed(self) -> None:
        program = "from tests.brokers import Nats; print(Nats().pid, flush=True); input()"
        tests = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdin=PIPE, stdout=PIPE, cwd=ROOT
        )
        assert tests.stdout is not None
        broker = psutil.Process(int(await tests.stdout.readline()))

        tests.kill()
        await tests.wait()

        await asyncio.to_thread(broker.wait, 30)


class Nowhere(Broker):
    program = package = "nowhere"
