"""A transaction on a file runs to its end on a thread, or is undone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from app.store.file_writer import FileWriter


@pytest.fixture(name="writer")
async def _writer(tmp_path: Path) -> AsyncIterator[FileWriter]:
    writer = FileWriter(create_engine(f"sqlite:///{tmp_path}/a.db"))
    await writer.run(lambda connection: connection.exec_driver_sql("CREATE TABLE said (word)"))
    yield writer
    await writer.close()


async def say(connection: Any) -> None:
    await connection.execute(text("INSERT INTO said VALUES ('yes')"))


async def say_and_fail(connection: Any) -> None:
    await say(connection)
    raise ValueError


async def say_and_wait(connection: Any) -> None:
    await say(connection)
    await asyncio.sleep(0)


async def said(connection: Any) -> list[Any]:
    return list((await connection.exec_driver_sql("SELECT word FROM said")).scalars())


class TestATransaction:
    async def test_is_committed(self, writer: FileWriter) -> None:
        await writer.run(say)

        assert ["yes"] == await writer.run(said)

    async def test_that_fails_is_undone(self, writer: FileWriter) -> None:
        with pytest.raises(ValueError):  # noqa: PT011  # it says nothing
            await writer.run(say_and_fail)

        assert [] == await writer.run(said)

    async def test_that_waits_for_anything_else_is_undone(self, writer: FileWriter) -> None:
        """Nobody runs a loop on that thread: it would wait for ever."""
        with pytest.raises(RuntimeError, match="waited for something else"):
            await writer.run(say_and_wait)

        assert [] == await writer.run(said)

    async def test_goes_on_after_a_close(self, writer: FileWriter) -> None:
        await writer.close()
        await writer.run(say)

        assert ["yes"] == await writer.run(said)
