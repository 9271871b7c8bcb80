"""When the dispatch loop claims again."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.dispatch.engine import Engine
from app.dispatch.options import DispatchOptions
from app.store.session import Database, DatabaseAddress


async def test_one_claim_serves_all_that_end_within_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While most places are taken, each call that ends must not cost a claim of its own."""
    database = Database(DatabaseAddress(f"sqlite:///{tmp_path}/receiver.db"))
    engine = Engine(database, [], options=DispatchOptions(), worker="worker")
    full = SimpleNamespace(free=0, running={"slow": 1})
    monkeypatch.setattr(engine.crew, "load", lambda _: full)

    engine._gather()
    engine._gather()

    assert not engine._work.is_set()
    await asyncio.wait_for(engine._work.wait(), 10)
    assert not engine._is_gathering
    engine.crew.close(1)
