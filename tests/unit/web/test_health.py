"""Readiness may be asked by anybody, so asking it often must cost nothing."""

import asyncio

import pytest

from app.web.health import Recent


class Counted:
    """A probe that counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None

    async def __call__(self) -> dict[str, str]:
        self.count += 1
        await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error
        return {"database": "ok"}


async def test_everybody_gets_the_answer_of_one_probe() -> None:
    recent = Recent(probe := Counted())

    answers = await asyncio.gather(*(recent() for _ in range(10)), recent())

    assert [{"database": "ok"}] * 11 == [*answers]
    assert {"database": "ok"} == await recent()
    assert 1 == probe.count


async def test_an_old_answer_is_not_given() -> None:
    recent = Recent(probe := Counted(), max_age=0.02)

    await recent()
    await asyncio.sleep(0.05)
    await recent()

    assert 2 == probe.count


async def test_one_who_goes_away_takes_no_answer_from_the_others() -> None:
    recent = Recent(probe := Counted())
    impatient, patient = asyncio.create_task(recent()), asyncio.create_task(recent())
    await asyncio.sleep(0)

    impatient.cancel()

    assert {"database": "ok"} == await patient
    assert 1 == probe.count


async def test_a_failure_is_not_kept() -> None:
    recent = Recent(probe := Counted())
    probe.error = ValueError()
    with pytest.raises(ValueError):  # noqa: PT011  # it has no text
        await recent()
    probe.error = None

    assert {"database": "ok"} == await recent()
