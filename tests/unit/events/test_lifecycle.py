"""What events do to their envelope, in whatever order they come."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.events.lifecycle import (
    BLANK,
    IMPLIED_STATUS,
    MILESTONES,
    STATUSES,
    TERMINAL,
    Effect,
    Envelope,
    project,
    refresh,
)
from app.events.parties import furthest_of
from app.events.payload import Event, Party, parse

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
NOON = NOW

ADA = Party("ada@example.com", "Ada", "Signer", 1)
BOB = Party("bob@example.com", "Bob", "Signer", 2)


def pairs_of(names: Iterable[str]) -> list[tuple[str, str]]:
    return list(itertools.combinations(sorted(names), 2))


def make_event(name: str = "envelope.sent", **fields: Any) -> Event:
    return Event(type=name, envelope_id="env_1", **fields)


def after(*events: Event) -> Envelope:
    """The envelope after `events`, received one second apart."""
    envelope = BLANK
    for second, event in enumerate(events):
        envelope, _ = project(envelope, event, received_at=NOW + timedelta(seconds=second))
    return envelope


def effects(*events: Event) -> list[str]:
    seen = []
    envelope = BLANK
    for event in events:
        envelope, effect = project(envelope, event, received_at=NOW)
        seen.append(effect.value)
    return seen


def in_both_orders(one: Event, other: Event) -> Envelope:
    forth, back = after(one, other), after(other, one)
    assert without_our_times(forth) == without_our_times(back)
    return forth


def without_our_times(envelope: Envelope) -> Envelope:
    ours: dict[str, Any] = dict.fromkeys(envelope.marks.get("ours", ()))
    return replace(envelope, **ours)


def signed(party: Party) -> Party:
    return replace(party, status="signed")


class TestTheTables:
    """Said once more, in words of the sender: a slip in a table is a slip in every envelope."""

    @pytest.mark.parametrize(
        "status, names",
        [
            ("draft", {"created", "detecting", "review"}),
            ("pending", {"sent", "in_progress"}),
            ("expired", {"expired"}),
            ("voided", {"voided"}),
            ("declined", {"declined"}),
            ("signed", {"signed"}),
        ],
    )
    def test_these_events_mean_that_status(self, status: str, names: set[str]) -> None:
        implying = {name for name, implied in IMPLIED_STATUS.items() if implied == status}

        assert {f"envelope.{name}" for name in names} == implying

    def test_these_events_are_milestones(self) -> None:
        passed = [
            "created",
            "sent",
            "viewed",
            "signed",
            "declined",
            "voided",
            "expired",
            "extracted",
        ]
        own = {f"envelope.{name}": f"{name}_at" for name in passed}

        assert {**own, "contract.extracted": "extracted_at"} == MILESTONES

    def test_these_are_the_words_for_effects_that_databases_hold(self) -> None:
        words = ["applied", "refreshed", "stale", "milestone", "unknown", "conflict", "quarantined"]

        assert words == list(Effect)


class TestTheStatus:
    @pytest.mark.parametrize("name, status", sorted(IMPLIED_STATUS.items()))
    def test_each_event_of_the_life_cycle_implies_one(self, name: str, status: str) -> None:
        assert status == after(make_event(name)).status

    @pytest.mark.parametrize("one, other", pairs_of(IMPLIED_STATUS))
    def test_it_is_the_largest_that_was_said(self, one: str, other: str) -> None:
        largest = max(IMPLIED_STATUS[one], IMPLIED_STATUS[other], key=STATUSES.index)

        assert largest == in_both_orders(make_event(one), make_event(other)).status

    def test_a_word_may_say_more_than_the_name(self) -> None:
        assert "signed" == after(make_event("envelope.sent", status="signed")).status
        assert "pending" == after(make_event("envelope.sent", status="draft")).status

    @pytest.mark.parametrize("name", ["envelope.viewed", "contract.extracted", "envelope.archived"])
    def test_other_events_never_touch_it(self, name: str) -> None:
        event = make_event(name, status="signed", status_word="signed")

        assert after(event).status is None
        assert "pending" == in_both_orders(event, make_event("envelope.sent")).status

    def test_an_unknown_word_is_kept_beside_it(self) -> None:
        early = make_event("envelope.sent", status_word="queued", occurred_at=NOON)
        late = make_event(
            "envelope.sent", status_word="snoozed", occurred_at=NOON + timedelta(seconds=1)
        )

        envelope = in_both_orders(early, late)

        assert ("pending", "snoozed") == (envelope.status, envelope.status_word)

    def test_a_known_word_is_not(self) -> None:
        event = make_event("envelope.sent", status="pending", status_word="in_progress")

        assert after(event).status_word is None


class TestAStatusOfALaterRelease:
    """One that runs beside this one, or ran before it, may have stored what is not known here."""

    @pytest.mark.parametrize("name", sorted(IMPLIED_STATUS))
    def test_never_goes_back(self, name: str) -> None:
        before = replace(after(make_event("envelope.sent")), status="reviewed")

        envelope, effect = project(before, make_event(name), received_at=NOW)

        assert "reviewed" == envelope.status
        assert not envelope.disputed
        assert Effect.STALE is effect

    def test_of_a_party_does_not_either(self) -> None:
        known = {"@ada": "notarised", "@bob": "viewed"}

        furthest = furthest_of(known, ["@ada", "@bob"], (signed(ADA), signed(BOB)))

        assert {"@ada": "notarised", "@bob": "signed"} == furthest


class TestADispute:
    @pytest.mark.parametrize("one, other", pairs_of(TERMINAL))
    def test_two_different_ends_are_one(self, one: str, other: str) -> None:
        envelope = in_both_orders(make_event(f"envelope.{one}"), make_event(f"envelope.{other}"))

        assert envelope.disputed
        assert max(one, other, key=STATUSES.index) == envelope.status

    def test_one_event_may_contradict_itself(self) -> None:
        assert after(make_event("envelope.voided", status="signed")).disputed
        assert after(make_event("envelope.signed", status="voided")).disputed

    def test_a_third_voice_does_not_settle_it(self) -> None:
        voices = [make_event(f"envelope.{name}") for name in ("signed", "voided", "signed")]

        assert all(after(*order).disputed for order in itertools.permutations(voices))

    def test_the_same_end_twice_is_none(self) -> None:
        assert not after(make_event("envelope.signed"), make_event("envelope.signed")).disputed
        assert not after(make_event("envelope.sent"), make_event("envelope.signed")).disputed


class TestMilestones:
    @pytest.mark.parametrize("name, column", sorted(MILESTONES.items()))
    def test_each_has_a_time_of_its_own(self, name: str, column: str) -> None:
        envelope = after(make_event(name, occurred_at=NOON - timedelta(hours=1)))

        assert getattr(envelope, column) == NOON - timedelta(hours=1)
        assert "ours" not in envelope.marks

    def test_without_one_it_is_that_of_the_first_receipt(self) -> None:
        envelope = after(make_event("envelope.viewed"), make_event("envelope.viewed"))

        assert (NOW, ["viewed_at"]) == (envelope.viewed_at, envelope.marks["ours"])

    def test_the_earliest_counts(self) -> None:
        first = make_event("envelope.viewed", occurred_at=NOON - timedelta(hours=2))
        second = make_event("envelope.viewed", occurred_at=NOON - timedelta(hours=1))

        assert first.occurred_at == in_both_orders(first, second).viewed_at

    def test_atlas_own_time_beats_ours_even_when_it_is_later(self) -> None:
        own = make_event("envelope.viewed", occurred_at=NOON + timedelta(minutes=4))

        envelope = in_both_orders(own, make_event("envelope.viewed"))

        assert own.occurred_at == envelope.viewed_at
        assert not envelope.marks.get("ours")


class TestTheContext:
    def test_it_follows_the_event_that_is_further_along(self) -> None:
        sent = make_event("envelope.sent", metadata={"a": 1}, external_id="old", is_test=True)
        done = make_event("envelope.signed", metadata={"b": 2}, external_id="new", is_test=False)

        envelope = in_both_orders(sent, done)

        assert ({"b": 2}, "new", False) == (
            envelope.metadata,
            envelope.external_id,
            envelope.is_test,
        )

    def test_among_equals_it_follows_atlas_clock(self) -> None:
        early = make_event(metadata={"z": 1}, occurred_at=NOON)
        late = make_event(metadata={"a": 1}, occurred_at=NOON + timedelta(microseconds=1))

        assert {"a": 1} == in_both_orders(early, late).metadata

    def test_a_microsecond_later_is_later(self) -> None:
        first = make_event(reason="z", metadata={"a": 2}, occurred_at=NOON)
        then = make_event(metadata={"a": 1}, occurred_at=NOON + timedelta(microseconds=1))

        assert {"a": 1} == in_both_orders(first, then).metadata

    @pytest.mark.parametrize(
        "names",
        [
            pytest.param(("created", "viewed", "signed"), id="viewed-is-as-far-as-sent"),
            pytest.param(("declined", "extracted"), id="extracted-is-as-far-as-signed"),
        ],
    )
    def test_an_event_beside_the_life_cycle_has_a_place_in_it(self, names: tuple[str, ...]) -> None:
        """Whoever is further along is believed, even if it was said earlier."""
        earlier = itertools.count()
        events = [
            make_event(
                f"envelope.{name}",
                metadata={"said": name},
                occurred_at=NOON - timedelta(hours=next(earlier)),
            )
            for name in names
        ]

        for one, other in itertools.pairwise(events):
            assert other.metadata == in_both_orders(one, other).metadata

    def test_what_atlas_read_from_a_contract_is_as_far_as_signed(self) -> None:
        declined = make_event("envelope.declined", metadata={"a": 2}, occurred_at=NOON)
        read = make_event("contract.extracted", metadata={"a": 1}, occurred_at=NOON - timedelta(1))

        assert {"a": 1} == in_both_orders(declined, read).metadata

    def test_in_which_order_a_database_gives_keys_back_does_not_matter(self) -> None:
        larger = make_event(metadata={"a": 3, "b": 0}, occurred_at=NOON)
        smaller = make_event(metadata={"b": 1, "a": 2}, occurred_at=NOON)

        assert larger.metadata == after(larger, smaller).metadata

    def test_who_names_no_parties_is_as_one_of_whom_nobody_has_signed(self) -> None:
        silent = make_event(metadata={"a": 1}, occurred_at=NOON, fields_version=2)
        telling = make_event(
            metadata={"a": 2}, occurred_at=NOON, fields_version=3, parties=(ADA, BOB)
        )

        assert {"a": 2} == in_both_orders(silent, telling).metadata

    def test_a_time_beats_no_time(self) -> None:
        timed = make_event(metadata={"a": 1}, occurred_at=datetime(1, 1, 1, tzinfo=UTC))

        assert {"a": 1} == in_both_orders(timed, make_event(metadata={"z": 1})).metadata

    def test_at_one_instant_it_follows_the_signatures_and_then_the_fields(self) -> None:
        one = make_event(metadata={"z": 1}, parties=(ADA,), fields_version=9)
        two = make_event(metadata={"a": 1}, parties=(signed(ADA),), fields_version=1)
        newer = make_event(metadata={"b": 1}, parties=(signed(ADA),), fields_version=2)

        assert {"a": 1} == in_both_orders(one, two).metadata
        assert {"b": 1} == in_both_orders(two, newer).metadata

    def test_where_nothing_else_differs_the_larger_text_stands(self) -> None:
        envelope = in_both_orders(make_event(external_id="apples"), make_event(external_id="pears"))

        assert "pears" == envelope.external_id

    @pytest.mark.parametrize("nothing", [{"metadata": {}}, {"metadata": None}, {"extraction": []}])
    def test_nothing_replaces_nothing(self, nothing: dict[str, Any]) -> None:
        sent = make_event("envelope.sent", metadata={"a": 1}, extraction={"b": 2})

        envelope = in_both_orders(sent, make_event("envelope.signed", **nothing))

        assert ({"a": 1}, {"b": 2}) == (envelope.metadata, envelope.extraction)

    def test_each_column_goes_its_own_way(self) -> None:
        envelope = in_both_orders(
            make_event("envelope.sent", tenant="acme", metadata={"a": 1}),
            make_event("envelope.signed", external_id="x", metadata={"b": 1}),
        )

        assert ("acme", "x", {"b": 1}) == (
            envelope.tenant,
            envelope.external_id,
            envelope.metadata,
        )

    def test_why_it_was_declined_and_why_voided_are_two_reasons(self) -> None:
        envelope = in_both_orders(
            make_event("envelope.declined", reason="price"),
            make_event("envelope.voided", reason="expired offer"),
        )

        assert ("price", "expired offer") == (envelope.decline_reason, envelope.void_reason)
        assert after(make_event("envelope.sent", reason="fun")).decline_reason is None

    def test_the_fields_version_only_rises(self) -> None:
        envelope = in_both_orders(
            make_event("envelope.sent", fields_version=7),
            make_event("envelope.signed", fields_version=3),
        )

        assert 7 == envelope.fields_version

    def test_unknown_events_fill_what_is_empty_and_no_more(self) -> None:
        envelope = in_both_orders(
            make_event("envelope.archived", tenant="acme", external_id="z", occurred_at=NOON),
            make_event("envelope.created", external_id="a"),
        )

        assert ("acme", "a") == (envelope.tenant, envelope.external_id)

    def test_a_date_in_the_future_does_not_freeze_it(self) -> None:
        """Read as no time at all, so it loses to every honest one."""
        body = '{"event":"envelope.sent","envelope_id":"e","external_id":"%s","timestamp":"%s"}'
        poisoned = parse((body % ("z", "2036-07-01T12:00:00Z")).encode(), received_at=NOW)
        honest = parse((body % ("a", "2026-07-01T12:00:00Z")).encode(), received_at=NOW)

        assert "a" == in_both_orders(poisoned, honest).external_id


class TestTheParties:
    def test_the_newer_list_replaces_the_whole(self) -> None:
        sent = make_event("envelope.sent", parties=(ADA, BOB))
        done = make_event("envelope.signed", parties=(BOB,))

        assert (BOB,) == in_both_orders(sent, done).parties

    def test_an_empty_list_replaces_nothing(self) -> None:
        sent = make_event("envelope.sent", parties=(ADA,))

        assert (ADA,) == in_both_orders(sent, make_event("envelope.signed", parties=())).parties

    def test_nobody_ever_falls_back(self) -> None:
        early = make_event(parties=(signed(ADA), BOB), occurred_at=NOON)
        late = make_event(
            parties=(replace(ADA, status="pending"), BOB), occurred_at=NOON + timedelta(1)
        )

        assert (signed(ADA), BOB) == in_both_orders(early, late).parties

    def test_who_left_the_list_is_not_forgotten(self) -> None:
        events = [
            make_event(parties=(signed(ADA),), occurred_at=NOON),
            make_event(parties=(BOB,), occurred_at=NOON + timedelta(1)),
            make_event(parties=(BOB, ADA), occurred_at=NOON + timedelta(2)),
        ]

        for order in itertools.permutations(events):
            assert (BOB, signed(ADA)) == after(*order).parties

    def test_an_address_is_one_however_it_is_written(self) -> None:
        shouting = replace(ADA, email="ADA@EXAMPLE.COM")
        early = make_event(parties=(signed(ADA),), occurred_at=NOON)
        late = make_event(parties=(shouting,), occurred_at=NOON + timedelta(1))

        assert (signed(shouting),) == in_both_orders(early, late).parties

    @pytest.mark.parametrize("party", [Party(order=3), Party(name="somebody")])
    def test_without_an_address_the_place_in_the_list_counts(self, party: Party) -> None:
        early = make_event(parties=(ADA, signed(party)), occurred_at=NOON)
        late = make_event(parties=(ADA, party), occurred_at=NOON + timedelta(1))

        assert (ADA, signed(party)) == in_both_orders(early, late).parties

    def test_who_signs_in_three_roles_is_three_parties(self) -> None:
        roles = tuple(replace(ADA, role=role, order=order) for order, role in enumerate("abc"))

        envelope = after(make_event(parties=(signed(roles[0]), *roles[1:])))

        assert (1, 3, ADA.email) == (
            envelope.signed_count,
            envelope.total,
            envelope.next_signer_email,
        )

    def test_lists_of_one_instant_are_told_apart_by_who_is_in_them(self) -> None:
        one = make_event(parties=(ADA, replace(BOB, status="viewed")))
        other = make_event(parties=(BOB, replace(ADA, status="pending")))

        envelope = in_both_orders(one, other)

        assert (replace(BOB, status="viewed"), replace(ADA, status="pending")) == envelope.parties


class TestTheCounts:
    def test_without_known_parties_there_are_none(self) -> None:
        envelope = after(make_event("envelope.signed"))

        assert (None, None, None) == (
            envelope.signed_count,
            envelope.total,
            envelope.next_signer_email,
        )

    def test_signed_means_that_everybody_has(self) -> None:
        sent = make_event("envelope.sent", parties=(signed(ADA), BOB))

        envelope = in_both_orders(sent, make_event("envelope.signed"))

        assert (2, 2, None) == (
            envelope.signed_count,
            envelope.total,
            envelope.next_signer_email,
        )

    @pytest.mark.parametrize(
        "parties, email",
        [
            ((BOB, ADA), ADA.email),
            ((signed(ADA), BOB), BOB.email),
            ((replace(ADA, status="declined"), BOB), BOB.email),
            ((replace(ADA, order=None), BOB), BOB.email),
            ((signed(ADA), signed(BOB)), None),
            ((Party(order=1), BOB), None),
        ],
    )
    def test_next_is_the_first_who_has_not(
        self, parties: tuple[Party, ...], email: str | None
    ) -> None:
        assert email == after(make_event(parties=parties)).next_signer_email

    @pytest.mark.parametrize("name", ["envelope.created", "envelope.declined", "envelope.voided"])
    def test_nobody_is_next_unless_it_is_pending(self, name: str) -> None:
        envelope = after(make_event(name, parties=(ADA,)))

        assert (0, 1, None) == (
            envelope.signed_count,
            envelope.total,
            envelope.next_signer_email,
        )


class TestTheEffect:
    def test_what_raises_the_status_is_applied(self) -> None:
        assert ["applied"] * 3 == effects(
            make_event("envelope.created"),
            make_event("envelope.sent"),
            make_event("envelope.signed"),
        )

    def test_what_comes_too_late_is_stale(self) -> None:
        assert ["applied", "stale"] == effects(
            make_event("envelope.signed"), make_event("envelope.sent", tenant="acme")
        )

    def test_an_equal_is_applied_if_it_brings_something(self) -> None:
        sent = make_event("envelope.sent", occurred_at=NOON)

        assert ["applied", "stale", "applied"] == effects(sent, sent, replace(sent, tenant="acme"))

    @pytest.mark.parametrize(
        "name, effect",
        [
            ("envelope.viewed", Effect.MILESTONE),
            ("contract.extracted", Effect.MILESTONE),
            ("envelope.archived", Effect.UNKNOWN),
            ("ping", Effect.UNKNOWN),
        ],
    )
    def test_what_is_beside_the_life_cycle_says_so(self, name: str, effect: Effect) -> None:
        assert [effect] == effects(make_event(name))

    def test_a_word_that_says_more_than_the_name_counts(self) -> None:
        declined = make_event("envelope.declined")
        signed_after_all = make_event("envelope.sent", status="signed")

        assert ["applied", "applied"] == effects(declined, signed_after_all)


class TestADuplicate:
    def test_that_knows_when_it_happened_is_believed(self) -> None:
        first = after(make_event("envelope.sent"))
        later = NOON + timedelta(hours=1)

        known = refresh(first, make_event("envelope.sent", occurred_at=later), received_at=NOW)

        assert later == known.sent_at

    def test_brings_what_the_first_did_not_know(self) -> None:
        first = make_event("envelope.signed")
        richer = make_event("envelope.signed", metadata={"a": 1}, parties=(signed(ADA),))

        envelope = refresh(after(first), richer, received_at=NOW + timedelta(hours=2))

        assert ("signed", {"a": 1}, 1, NOW) == (
            envelope.status,
            envelope.metadata,
            envelope.signed_count,
            envelope.signed_at,
        )

    def test_of_the_first_event_changes_nothing_hours_after_the_last(self) -> None:
        created, done = make_event("envelope.created"), make_event("envelope.signed")
        envelope = after(created, done)

        assert envelope is refresh(envelope, created, received_at=NOW + timedelta(hours=2))


instants = st.sampled_from(
    [
        None,
        "2026-07-01T10:00:00Z",
        "2026-07-01T12:00:00+02:00",
        "2026-07-01T10:00:00.001Z",
        "2026-07-01T10:00:00.001000Z",
        "2026-07-01T10:00:00.000001Z",
        1_782_900_000,
        1_782_900_000_001,
        "0001-01-01T00:00:00Z",
        "2036-01-01T00:00:00Z",
    ]
)
people = st.fixed_dictionaries(
    {},
    optional={
        "email": st.sampled_from(["ada@example.com", "ADA@example.com", "bob@example.com"]),
        "name": st.sampled_from(["Ada", "Bob"]),
        "order": st.integers(1, 3),
        "status": st.sampled_from(["waiting", "pending", "viewed", "declined", "signed", "odd"]),
    },
)
bodies = st.fixed_dictionaries(
    {
        "envelope_id": st.just("env_1"),
        "event": st.sampled_from([*IMPLIED_STATUS, *MILESTONES, "envelope.archived"]),
        "timestamp": instants,
    },
    optional={
        "status": st.sampled_from([*STATUSES, "in_progress", "archived", "snoozed"]),
        "parties": st.lists(people, max_size=3),
        "metadata": st.dictionaries(st.sampled_from("ab"), st.integers(0, 2), max_size=2),
        "external_id": st.sampled_from("xy"),
        "reason": st.sampled_from(["", "because", "why not"]),
        "is_test": st.booleans(),
        "fields_status": st.sampled_from(["pending", "ready"]),
        "fields_version": st.integers(0, 3),
        "extracted_data": st.sampled_from([{}, {"amount": 1}, {"amount": 2}, [1]]),
    },
)
events = bodies.map(lambda body: parse(json.dumps(body).encode(), received_at=NOW))


class TestEveryOrder:
    @given(st.data(), st.lists(events, min_size=1, max_size=6))
    @settings(deadline=None, max_examples=200)
    def test_of_events_and_their_duplicates_ends_in_one_row(
        self, data: st.DataObject, story: list[Event]
    ) -> None:
        shuffled = data.draw(st.permutations([*story, *story]))

        assert without_our_times(after(*story)) == without_our_times(after(*shuffled))

    @given(st.lists(events, min_size=1, max_size=6))
    @settings(deadline=None, max_examples=100)
    def test_only_ever_raises_the_status(self, story: list[Event]) -> None:
        ranks = [-1]
        for length in range(1, len(story) + 1):
            status = after(*story[:length]).status
            ranks.append(-1 if status is None else STATUSES.index(status))

        assert sorted(ranks) == ranks

    @given(st.lists(events, min_size=1, max_size=3))
    @settings(deadline=None, max_examples=60)
    def test_leaves_marks_that_survive_being_stored(self, story: list[Event]) -> None:
        envelope = after(*story)
        stored = replace(envelope, marks=json.loads(json.dumps(envelope.marks)))

        assert stored == envelope
        assert project(stored, story[0], received_at=NOW) == project(
            envelope, story[0], received_at=NOW
        )

    def test_of_the_whole_life_ends_in_one_row(self) -> None:
        life = [
            make_event("envelope.created"),
            make_event("envelope.sent", parties=(ADA, BOB)),
            make_event("envelope.viewed", parties=(replace(ADA, status="viewed"), BOB)),
            make_event("envelope.declined", reason="price"),
            make_event("envelope.signed", parties=(signed(ADA), signed(BOB))),
            make_event("contract.extracted", extraction={"amount": 1}),
        ]

        rows = [without_our_times(after(*order)) for order in itertools.permutations(life)]

        assert all(row == rows[0] for row in rows)
        assert "signed" == asdict(rows[0])["status"]
