"""Message brokers of our own: NATS, Redis and RabbitMQ, started from the system's programs.

Each one is a private instance on a free port of the loopback, with its data in a temporary
directory: whatever else runs on this machine is neither used nor stopped. Kafka is the
cluster that librdkafka has inside. A broker that is not installed is a failure under
`CI=true`, and reported as not run elsewhere.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NoReturn, Self, TypeVar

import pytest
import trustme
from confluent_kafka import Producer

from tests.postgres import free_port

USER = "receiver"
PASSWORD = "correct-horse-battery"
START_DEADLINE = 60.0
# RabbitMQ's own program first: Debian's wrapper insists on the user and the directories of
# the system's instance. The other two are not on the path of every user.
PATH = f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}:/usr/local/sbin:/usr/sbin"

# Kills what was started if the tests are killed themselves: the end of a pipe tells.
WILL = """
read _
for pid in "$1"/*.pid; do kill -KILL "-$(cat "$pid")"; done
sleep 1
rm -rf "$1"
"""


class Broker:
    """One broker and its data directory; both are gone after `close`."""

    program: ClassVar[str]
    package: ClassVar[str]
    scheme: ClassVar[str]
    # What to send to it, and what its answer begins with once it works.
    greeting: ClassVar[bytes]
    answer: ClassVar[bytes]

    def __init__(self) -> None:
        self._path = find(self.program, self.package)
        self._home = Path(tempfile.mkdtemp(prefix=f"atlas-receiver-{self.package}-"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        self._will = self._leave_a_will()
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"{self.scheme}://{USER}:{PASSWORD}@127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._processes["broker"].pid

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        return {}

    def start(self) -> None:
        """Start the broker, on the data and the port it had before."""
        self._spawn("broker", self.command())
        deadline = time.monotonic() + START_DEADLINE
        while not self._answers():
            if self._processes["broker"].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.program} did not start:\n{self._said('broker')}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill the broker at once, as a crash would; it can be started again."""
        self._end("broker")

    def suspend(self) -> None:
        """Freeze the broker: connections stay open, nobody answers."""
        process = self._processes["broker"]
        os.killpg(process.pid, signal.SIGSTOP)
        # The signal stops one thread, which stops the others: until its turn comes, on a busy
        # machine, they would go on answering.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let a frozen broker go on where it was."""
        os.killpg(self._processes["broker"].pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill the broker and remove everything it wrote."""
        for name in list(self._processes):
            self._end(name)
        with self._will as will:
            will.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self._home / f"{name}.log").open("wb") as log:
            self._processes[name] = process = subprocess.Popen(
                command,
                cwd=self._home,
                env={"PATH": PATH, "HOME": str(self._home), **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: it is killed with its children, and no Ctrl-C gets there.
                start_new_session=True,
            )
        (self._home / f"{name}.pid").write_text(str(process.pid))

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(START_DEADLINE)
        (self._home / f"{name}.pid").unlink()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.settimeout(1)
            probe.connect(("127.0.0.1", self.port))
            probe.sendall(self.greeting)
            return probe.recv(64).startswith(self.answer)
        return False

    def _said(self, name: str) -> str:
        return (self._home / f"{name}.log").read_text(errors="replace")[-4000:]

    def _leave_a_will(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["/bin/sh", "-c", WILL, "will", str(self._home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


class Nats(Broker):
    """NATS with JetStream; nobody may publish below the subject `denied`."""

    program = package = "nats-server"
    scheme = "nats"
    greeting = b""
    answer = b"INFO "

    def command(self) -> list[str]:
        configuration = self._home / "nats.conf"
        configuration.write_text("\n".join(self.configuration()))
        return [self._path, "--config", str(configuration)]

    def configuration(self) -> list[str]:
        user = f'user: {USER}, password: "{PASSWORD}"'
        permissions = 'permissions: { publish: { deny: "denied.>" } }'
        return [
            f"listen: 127.0.0.1:{self.port}",
            f'jetstream {{ store_dir: "{self._home / "data"}" }}',
            f"authorization {{ users: [ {{ {user}, {permissions} }} ] }}",
        ]


class EncryptedNats(Nats):
    """The same with a certificate, which the authority in `authority` has signed."""

    scheme = "tls"

    def configuration(self) -> list[str]:
        self.authority = self._home / "authority.pem"
        key, certificate = self._home / "key.pem", self._home / "certificate.pem"
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(str(self.authority))
        issued.private_key_pem.write_to_path(str(key))
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        return [
            *super().configuration(),
            f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}',
        ]


class Redis(Broker):
    """Redis, which writes every command to its file before it answers."""

    program = package = "redis-server"
    scheme = "redis"
    greeting = b"PING\r\n"
    answer = b"-NOAUTH"

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": PASSWORD,
            "dir": str(self._home),
            "appendonly": "yes",
            "appendfsync": "always",
        }
        return [self._path, *(word for name in options for word in (f"--{name}", options[name]))]


class RabbitMQ(Broker):
    """RabbitMQ: a node with a name, a cookie and a port mapper of its own."""

    program = package = "rabbitmq-server"
    scheme = "amqp"
    greeting = b"AMQP\x00\x00\x09\x01"
    answer = b"\x01\x00\x00"

    def __init__(self) -> None:
        self._mapper_port, self._node_port = free_port(), free_port()
        super().__init__()

    def command(self) -> list[str]:
        return [self._path]

    def start(self) -> None:
        # Erlang would start this one by itself, and leave it behind.
        if "mapper" not in self._processes:
            options = ["-port", str(self._mapper_port), "-address", "127.0.0.1"]
            self._spawn("mapper", [find("epmd", "erlang-base"), *options])
        super().start()

    def environment(self) -> Mapping[str, str]:
        home = self._home
        return {
            # Become the node at once, instead of a shell that looks after it.
            "RUNNING_UNDER_SYSTEMD": "true",
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._node_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 "
                f'-rabbit default_user <<"{USER}">> -rabbit default_pass <<"{PASSWORD}">>'
            ),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(home / "node"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
            # Nothing of the system's own instance.
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(home / "none"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "none.config"),
        }


class Missing(Exception):
    """A program that the tests need is not installed."""


def find(program: str, package: str) -> str:
    found = shutil.which(program, path=PATH)
    if found is None:
        raise Missing(f"install {package} ({program} was not found)")
    return found


B = TypeVar("B", bound=Broker)


@contextmanager
def running(kind: type[B]) -> Iterator[B]:
    """A broker for tests; without its program they fail under CI and are skipped elsewhere."""
    try:
        broker = kind()
    except Missing as missing:
        _not_run(str(missing))
    with broker:
        yield broker


def _not_run(remedy: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(remedy, pytrace=False)
    pytest.skip(f"not run: {remedy}")


class Kafka:
    """The mock cluster of librdkafka: it speaks the real protocol, and keeps nothing."""

    def __init__(self) -> None:
        options = {"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0}
        self._owner: Producer | None = Producer(options)
        (broker,) = self._owner.list_topics(timeout=START_DEADLINE).brokers.values()
        self.address = (broker.host, broker.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The cluster lives as long as the client that it was made with.
        self._owner = None

    @property
    def servers(self) -> str:
        host, port = self.address
        return f"{host}:{port}"

    @property
    def url(self) -> str:
        return f"kafka://{self.servers}"
