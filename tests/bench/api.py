"""The API on one database, running, and somebody beside it who asks."""

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg
import psutil

from tests.bench.asking import AskerProcess, Question, asker
from tests.bench.filling import BEHIND, SCHEMA
from tests.bench.machine import Crowd, cpu_seconds
from tests.bench.measurement import Asked
from tests.bench.processes import python, running, wait_until_ready
from tests.bench.routes import Caller, Route
from tests.postgres import Postgres, free_port

Command = Callable[[int], Sequence[str]]


def as_service(port: int) -> Sequence[str]:
    """Return the command of the API as it is run in production."""
    return python("-m", "app", "serve", "--only", "api", "--port", str(port))


def with_nothing_beside(port: int) -> Sequence[str]:
    """Return the command of the API with an empty route more."""
    return python("-m", "tests.bench.reading_service", "--port", str(port))


def tokens(token: str) -> dict[str, str]:
    """Return the settings that let a token read."""
    return {"API_TOKENS": json.dumps({"bench": {"tokens": [token], "scopes": ["read"]}})}


class Api:
    """One process that answers, and one that asks it."""

    def __init__(
        self, postgres: Postgres, url: str, port: int, token: str, process: psutil.Process
    ) -> None:
        self.url = url
        self.caller = Caller(port, token)
        self._postgres = postgres
        self._port = port
        self._token = token
        self._process = process

    def ask(self, asker: AskerProcess, route: Route, connections: int, seconds: float) -> Asked:
        """Ask for some time, and compare some of the answers with the database."""
        question = Question(self._port, self._token, route.paths, connections, seconds)
        crowd, before = Crowd(), self._used()
        answer = asker.ask(question)
        after = self._used()
        others = crowd.share(sum(after) - sum(before) + answer.own_cpu)
        each = 1e6 / max(1, answer.answered)
        asked = Asked(
            route=route.name,
            connections=connections,
            rate=answer.answered / answer.seconds,
            p50=answer.p50,
            p99=answer.p99,
            cpu=(after[0] - before[0]) * each,
            database_cpu=(after[1] - before[1]) * each,
            load_cpu=answer.own_cpu * each,
            crowd=others,
            answered=answer.answered,
            failures=answer.failures,
        )
        return replace(asked, faults=asyncio.run(self._find_faults(route, asked, answer.samples)))

    def _used(self) -> tuple[float, float]:
        return cpu_seconds([self._process]), cpu_seconds(self._postgres.family())

    async def _find_faults(
        self, route: Route, asked: Asked, samples: Sequence[tuple[str, str]]
    ) -> list[str]:
        told = ", ".join(f"{count} x {name}" for name, count in asked.failures.items())
        faults = [f"{route.name}: not answered with 200: {told}"] if told else []
        connection = await asyncpg.connect(self.url, server_settings={"search_path": SCHEMA})
        try:
            return faults + await route.find_faults(connection, samples)
        finally:
            await connection.close()


@contextmanager
def api(postgres: Postgres, url: str, scratch: Path, command: Command) -> Iterator[Api]:
    """Run the API on a filled database; it is gone at the end."""
    port, token = free_port(), secrets.token_hex(32)
    log = scratch / f"api-{port}.log"
    environment = {"DATABASE_URL": url, "ENV_FILE": "", "LOG_FORMAT": "json", **tokens(token)}
    with running(command(port), environment=environment, log=log) as process:
        wait_until_ready(process, port, log)
        asyncio.run(_require_at_rest(url))
        yield Api(postgres, url, port, token, psutil.Process(process.pid))


async def _require_at_rest(url: str) -> None:
    """Refuse to measure beside a follower that reads the whole feed first."""
    connection = await asyncpg.connect(url, server_settings={"search_path": SCHEMA})
    try:
        behind = [row[0] for row in await connection.fetch(BEHIND)]
    finally:
        await connection.close()
    if behind:
        raise RuntimeError(f"name the followers {behind} in FOLLOWERS of tests/bench/filling.py")


__all__ = ["Api", "api", "as_service", "asker", "tokens", "with_nothing_beside"]
