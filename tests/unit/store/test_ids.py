"""Our own ids: UUIDv7."""

import time
from uuid import RFC_4122

from app.store.ids import first_id_at, new_id


def test_an_id_is_a_version_7() -> None:
    made = new_id()

    assert (7, RFC_4122) == (made.version, made.variant)


def test_ids_are_all_different() -> None:
    assert 10_000 == len({new_id() for _ in range(10_000)})


def test_ids_sort_by_the_time_they_were_made() -> None:
    before = first_id_at(time.time() - 0.01)
    made = new_id()

    assert before < made < first_id_at(time.time() + 0.01)


def test_before_1970_there_is_a_first_id_too() -> None:
    assert first_id_at(-1) == first_id_at(0) < new_id()
