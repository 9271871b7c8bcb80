"""The transaction: what a batch of events does to the database, statement by statement."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from uuid import UUID

from app.events.identity import Relation
from app.intake.ledger import Judged, Ledger, claims_of_news
from app.intake.projection import Fact, Interested, Projection
from app.intake.submission import Submission
from app.store import batches, deliveries, envelopes, events
from app.store.batches import Changes
from app.store.envelopes import EnvelopeKey
from app.store.events import Claim
from app.store.session import Connection


async def record(
    connection: Connection,
    batch: Sequence[Submission],
    *,
    interested: Interested,
    now: datetime,
) -> Projection:
    """Write everything that `batch` means; the caller commits, and only then answers.

    Locks are taken in the one order of this service: identities, sorted; then envelopes,
    sorted, never waiting for one that is held; then the rest. Raises `EnvelopesBusy`.
    """
    judged = await judge(connection, batch)
    conflicts = await claim_conflicts(connection, judged)
    keys = {key for j in judged if (key := j.submission.envelope_key) and not j.is_settled}
    apart = named_apart(judged)
    held = await envelopes.lock(connection, keys | apart)
    # Whoever holds one of these may be about to erase it. There is a contradiction only now and
    # then, and a wait that ends soon: the batch is halved, and what waits goes to a lane.
    held |= await envelopes.wait(connection, apart - held.keys())
    projection = Projection(held, interested, now)
    for each in judged:
        projection.take(each, conflicts=conflicts)
    await _write(connection, projection)
    return projection


async def record_news(
    connection: Connection,
    batch: Sequence[Submission],
    *,
    interested: Interested,
    now: datetime,
) -> Projection | None:
    """Write what `batch` means if all of it is news, and commit; None if it is not.

    That is nearly every batch, and costs two statements without a lock between them. Raises a
    serialization failure if somebody else was faster with a key or an envelope.
    """
    claims = claims_of_news(batch)
    if claims is None:
        return None
    keys = {key for each in batch if (key := each.envelope_key)}
    held = await batches.read(connection, claims, keys)
    if held is None:
        return None
    projection = Projection(held, interested, now)
    for submission in batch:
        projection.take(Judged(submission, Relation.NEW), conflicts={})
    await batches.write(connection, _changes(claims, projection))
    return projection


def _changes(claims: Mapping[Claim, UUID], projection: Projection) -> Changes:
    return Changes(
        claims=claims,
        envelopes=[held for held in projection.held.values() if held.is_changed],
        events=projection.events,
        bodies=projection.bodies,
        deliveries=projection.deliveries,
    )


def named_apart(judged: Sequence[Judged]) -> set[EnvelopeKey]:
    """Give the envelopes that contradictions name, if they cast doubt on others."""
    return {
        key
        for each in judged
        if each.relation is Relation.CONFLICT
        and (key := each.submission.named_key)
        and key != each.submission.envelope_key
    }


async def judge(
    connection: Connection, batch: Sequence[Submission], *, is_stored: bool = False
) -> list[Judged]:
    """Claim the keys of all, and decide which are new.

    What is stored already sees its own new claims among those that are known.
    """
    ledger = Ledger(batch)
    known = await events.claim(connection, ledger.wanted)
    if is_stored:
        own = {submission.event_id for submission in batch}
        known = {claim: each for claim, each in known.items() if each.event_id not in own}
    ledger.learn(known)
    judged = []
    for submission in batch:
        if (event_id := ledger.lacks_content_of(submission)) is not None:
            ledger.learn_content(event_id, await events.read_content(connection, event_id))
        judged.append(ledger.judge(submission))
    await events.repoint(connection, ledger.misassigned(known))
    await events.disown(connection, ledger.unassigned(known))
    return judged


async def claim_conflicts(connection: Connection, judged: Sequence[Judged]) -> dict[UUID, UUID]:
    """Give, for each contradiction that was seen before, the event that holds it.

    That is the event itself if an earlier try, whose answer was lost, had committed.
    """
    claims: dict[Claim, UUID] = {}
    claimed: dict[UUID, Claim] = {}
    for each in judged:
        if each.relation is Relation.CONFLICT:
            claim = _conflict_claim(each)
            claimed[each.submission.event_id] = claim
            claims.setdefault(claim, each.submission.event_id)
    if not claims:
        return {}
    known = await events.claim(connection, claims)
    first = {claim: known[claim].event_id if claim in known else claims[claim] for claim in claims}
    return {
        mine: first[claim]
        for mine, claim in claimed.items()
        if claim in known or first[claim] != mine
    }


def _conflict_claim(judged: Judged) -> Claim:
    assert judged.original is not None  # a contradiction contradicts something
    submission = judged.submission
    return conflict_claim(submission.account, judged.original, submission.content)


def conflict_claim(account: str, original: UUID, content: str) -> Claim:
    """Give the key of a contradiction: the same one again is no news."""
    return account, f"conflict:{original.hex}:{content}"


async def _write(connection: Connection, projection: Projection) -> None:
    await envelopes.write(connection, projection.held.values())
    await events.add(connection, projection.events, projection.bodies)
    if projection.deliveries:
        await deliveries.enqueue(connection, projection.deliveries)
    if projection.copies:
        await events.count_copies(connection, projection.copies, at=projection.now)


__all__ = [
    "Fact",
    "claim_conflicts",
    "conflict_claim",
    "judge",
    "named_apart",
    "record",
    "record_news",
]
