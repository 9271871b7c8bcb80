"""Read `PUBLISH_URL`: which broker, where it listens, and as whom to log in.

No message quotes the URL: it holds a password, and one that cannot be read may hold it in
any place.
"""

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, quote, unquote

from app.callbacks.publish.kinds import KAFKA, SCHEMES, Kind
from app.dispatch import blame
from app.errors import ConfigError

LONGEST_TEXT: Final = 300
LARGEST_PORT: Final = 65535
MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

# No @ behind the host: it would be a password with a / in it that ends there.
_URL = re.compile(
    r"(?P<scheme>[a-z]+)://(?P<place>[^/?#]*)(?P<path>/[^?#@]*)?(\?(?P<query>[^#@]*))?"
)
_ESCAPES = "in a password, write / ? # @ : and % as %2F %3F %23 %40 %3A and %25"
_HOST = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker is, and who we are to it."""

    kind: Kind
    is_encrypted: bool
    hosts: tuple[tuple[str, int], ...]
    # One name without a password may be a token.
    user: str | None = field(repr=False)
    password: str | None = field(repr=False)
    # RabbitMQ's virtual host, or the number of Redis' database.
    path: str
    # How Kafka is to check the password.
    mechanism: str

    def __str__(self) -> str:
        return f"{self.kind.title} at {', '.join(f'{host}:{port}' for host, port in self.hosts)}"

    def describe(self, error: BaseException) -> str:
        """Name an error in a line, without what is secret here."""
        text = blame.describe(error)
        secret = self.password or self.user
        for each in (secret, quote(secret, safe="")) if secret else ():
            text = text.replace(each, "[redacted]")
        return " ".join(text.split())[:LONGEST_TEXT]


def parse(url: str) -> Address:
    """Read a URL; raises `ConfigError`, which names the setting and never the URL."""
    found = _URL.fullmatch(url.strip())
    if found is None or found["scheme"] not in SCHEMES:
        raise ConfigError(
            "PUBLISH_URL names no broker: it begins with "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}, followed by host:port; {_ESCAPES}"
        )
    kind, is_encrypted = SCHEMES[found["scheme"]]
    login, _, places = found["place"].rpartition("@")
    user, colon, password = login.partition(":")
    return Address(
        kind=kind,
        is_encrypted=is_encrypted,
        hosts=_hosts(places, kind, kind.ports[is_encrypted]),
        user=unquote(user) or None,
        password=unquote(password) if colon else None,
        path=_path(unquote(found["path"] or "").removeprefix("/"), kind),
        mechanism=_mechanism(found["query"] or "", kind),
    )


def _hosts(places: str, kind: Kind, port: int) -> tuple[tuple[str, int], ...]:
    names = places.split(",")
    found = [_HOST.fullmatch(name) for name in names]
    hosts = tuple((each["host"].strip("[]"), int(each["port"] or port)) for each in found if each)
    if len(hosts) < len(names) or not all(0 < port <= LARGEST_PORT for _, port in hosts):
        raise ConfigError(
            "PUBLISH_URL needs a host, and a port from 1 to 65535, after the // (or after the @); "
            f"{_ESCAPES}"
        )
    if len(hosts) > 1 and not kind.takes_several_hosts:
        raise ConfigError(f"PUBLISH_URL has several hosts, but a URL of {kind.title} has one")
    return hosts


def _path(path: str, kind: Kind) -> str:
    if not re.fullmatch(kind.path, path):
        raise ConfigError(
            "PUBLISH_URL ends with a path that its broker does not have: RabbitMQ has a virtual "
            "host there, Redis the number of a database, and the name of a subject, a stream or "
            "a topic belongs in PUBLISH_TO"
        )
    return path


def _mechanism(query: str, kind: Kind) -> str:
    options = dict(parse_qsl(query, keep_blank_values=True))
    mechanism = options.pop("mechanism", "PLAIN").upper() if kind is KAFKA else "PLAIN"
    if options or mechanism not in MECHANISMS:
        raise ConfigError(
            "PUBLISH_URL has an option that is not known: the only one is, with kafka:// and "
            f"kafkas://, ?mechanism= and one of {', '.join(MECHANISMS)}"
        )
    return mechanism
