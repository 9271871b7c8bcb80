"""Make `.env` for a laptop: fresh random keys, readable by its owner only.

`make run` calls this each time. What is in the file stays as it is; only names
that are missing, because they are new in this release, are added at its end.
A name that the environment already has needs no line.
"""

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path

from dotenv import dotenv_values

ENV_FILE = Path(__file__).resolve().parents[1] / ".env"

HEADER = """\
# Settings of this checkout, made by `make run` and never committed.
# Yours to edit: lines that are here are not touched again. The environment
# wins over this file. Every setting is explained in .env.example.
"""


@dataclass(frozen=True, slots=True)
class Name:
    """A setting without which there would be nothing to see."""

    name: str
    comment: str
    make: Callable[[], str]
    # Settings that stand for this one: with one of them, it is not missing.
    instead: tuple[str, ...] = ()

    def is_given_by(self, names: Iterable[str]) -> bool:
        return not {self.name, *self.instead}.isdisjoint(names)

    def line(self) -> str:
        return f"\n# {self.comment}\n{self.name}={self.make()}\n"


def _atlas_key() -> str:
    # The prefix says where a key comes from: such a key must never be sent to Atlas.
    return f"local_{secrets.token_hex(32)}"


def _api_tokens() -> str:
    operator = {"tokens": [secrets.token_urlsafe(32)], "scopes": ["read", "operate", "raw"]}
    return f"'{dumps({'local': secrets.token_urlsafe(32), 'operator': operator})}'"


NAMES = (
    Name(
        "ATLAS_API_KEY",
        "Signs the webhooks that `python -m app trigger` sends. Put your Atlas key here.",
        _atlas_key,
        instead=("ATLAS_API_KEY_FILE", "ATLAS_API_KEYS", "ATLAS_API_KEYS_FILE"),
    ),
    Name(
        "API_TOKENS",
        "Who may ask this service: name to bearer token. One may only read, one may do all.",
        _api_tokens,
        instead=("API_TOKENS_FILE",),
    ),
    Name(
        "CALLBACKS",
        "What is called for each event; put your own after it, separated by a comma.",
        lambda: "app.callbacks.audit_log:callbacks",
    ),
)


def make_env(path: Path, environment: Mapping[str, str]) -> list[str]:
    """Add what is missing to the file at `path`; return the names that were added."""
    known = {*dotenv_values(path, interpolate=False), *environment}
    missing = [name for name in NAMES if not name.is_given_by(known)]
    if missing:
        _append(path, "".join(name.line() for name in missing))
    return [name.name for name in missing]


def _append(path: Path, lines: str) -> None:
    # The mode is part of the creation: at no moment can anybody else read it.
    flags = os.O_RDWR | os.O_APPEND
    try:
        file = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        file = os.open(path, flags)
    with os.fdopen(file, "r+b") as env:
        before = env.read()
        start = "" if before else HEADER
        if before and not before.endswith(b"\n"):
            start = "\n"
        env.write(f"{start}{lines}".encode())


def is_open_to_others(path: Path) -> bool:
    return path.exists() and bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def next_steps(port: str) -> str:
    at = f"http://127.0.0.1:{port}"
    elsewhere = "" if port == "8000" else f" --url {at}/webhooks/atlas"
    return f"""\
Try, in another terminal:

  # send a signed webhook, as Atlas would
  .venv/bin/python -m app trigger envelope.signed --envelope first{elsewhere}

  # ask for the state; the token is the one named "local" under API_TOKENS in .env
  TOKEN=$(sed -n 's/^API_TOKENS=.*"local": *"\\([^"]*\\)".*/\\1/p' .env)
  curl -H "Authorization: Bearer $TOKEN" {at}/api/envelope/first
"""


def main() -> None:
    added = make_env(ENV_FILE, os.environ)
    if added:
        print(f"Wrote {', '.join(added)} to .env")
    if is_open_to_others(ENV_FILE):
        print("Others can read .env, and it holds keys: chmod 600 .env")
    print(next_steps(os.environ.get("PORT") or "8000"))


if __name__ == "__main__":
    main()
