"""What the bench fills a database with: whoever asks must know what is there."""

from pathlib import Path

from tests.bench.filling import CHUNK, Filling, chunks, envelope
from tests.bench.large import room

FILLING = Filling(envelopes=1_000, events=5_000)


class TestFilling:
    def test_ids_of_events_sort_by_time(self) -> None:
        ids = [FILLING.event(number) for number in range(FILLING.events)]

        assert sorted(ids) == ids
        assert {7} == {id_.version for id_ in ids}

    def test_the_envelopes_of_two_numbers_are_two(self) -> None:
        assert 1_000 == len({envelope(number) for number in range(1_000)})

    def test_an_envelope_was_updated_by_the_last_of_its_events(self) -> None:
        first, last = FILLING.updated_at(0), FILLING.updated_at(999)

        assert first < last
        assert FILLING.began < first.timestamp() * 1e6

    def test_every_number_is_in_one_chunk(self) -> None:
        cut = list(chunks(2 * CHUNK + 1))

        assert [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK + 1)] == cut


class TestRoom:
    def test_what_fits_is_not_refused(self, tmp_path: Path) -> None:
        assert room(tmp_path, Filling(1, 1)) is None

    def test_a_disk_that_is_too_small_is_named_with_what_is_needed(self, tmp_path: Path) -> None:
        refusal = room(tmp_path, Filling(10**12, 10**12))

        assert refusal is not None
        assert str(tmp_path) in refusal
        assert "--scratch" in refusal
