"""The traffic of a fault run: the same for the same seed, and as unpleasant as senders are."""

from collections import Counter, defaultdict

import pytest

from tests.faults.traffic import SAYS, WINDOW, Expected, Kind, Sending, Traffic


def sendings(seed: int = 1, events: int = 1000) -> list[Sending]:
    return list(Traffic(seed, events).sendings())


class TestTraffic:
    def test_is_the_same_for_the_same_seed(self) -> None:
        """A failure that nobody can see again helps nobody."""
        assert sendings(seed=1) == sendings(seed=1)
        assert sendings(seed=1) != sendings(seed=2)

    @pytest.mark.parametrize("events", [1, 7, 1000])
    def test_has_as_many_events_as_were_asked_for(self, events: int) -> None:
        originals = [s for s in sendings(events=events) if s.kind is Kind.ORIGINAL]

        assert sorted(s.number for s in originals) == list(range(events))

    def test_sends_a_fifth_once_more_in_each_way(self) -> None:
        kinds = Counter(s.kind for s in sendings(events=10_000))

        assert pytest.approx(1000, rel=0.2) == kinds[Kind.COPY]
        assert pytest.approx(500, rel=0.2) == kinds[Kind.REBUILT]
        assert pytest.approx(500, rel=0.2) == kinds[Kind.ALIAS]

    def test_a_copy_has_the_bytes_of_its_original_and_others_have_not(self) -> None:
        sent = sendings()
        originals = {s.number: s.body for s in sent if s.kind is Kind.ORIGINAL}

        assert all(
            (s.body == originals[s.number]) is (s.kind in {Kind.ORIGINAL, Kind.COPY}) for s in sent
        )

    def test_no_two_events_have_one_body(self) -> None:
        numbers = defaultdict(set)
        for sending in sendings():
            numbers[sending.body].add(sending.number)

        assert all(len(found) == 1 for found in numbers.values())

    def test_events_come_out_of_order_but_not_from_everywhere(self) -> None:
        numbers = [s.number for s in sendings(events=5000) if s.kind is Kind.ORIGINAL]

        assert sorted(numbers) != numbers
        assert all(number < place + WINDOW + 1 for place, number in enumerate(numbers))

    def test_has_several_accounts_and_every_type(self) -> None:
        sent = sendings()

        assert {"default", "beta"} == {s.account for s in sent}
        assert {*SAYS, "envelope.viewed", "contract.extracted"} == {s.type for s in sent}


class TestExpected:
    def test_a_status_is_the_furthest_that_was_said(self) -> None:
        expected = Expected.of(Traffic(1, 1000))
        said = defaultdict(set)
        for sending in sendings():
            said[sending.account, sending.envelope_id].add(sending.type)

        assert said.keys() == expected.statuses.keys()
        assert all(
            ("envelope.signed" in types) is (expected.statuses[envelope] == "signed")
            for envelope, types in said.items()
        )

    def test_every_body_leads_to_its_event(self) -> None:
        expected = Expected.of(Traffic(1, 1000))

        assert all(expected.numbers[s.digest] == s.number for s in sendings())
        assert len(sendings()) == expected.sendings
        assert 1000 == len(expected.types) == sum(expected.lengths.values())
