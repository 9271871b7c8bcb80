"""`deliveries`: what is owed to callbacks, and what an operator may do about it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import typer

from app.cli.terminal import (
    Step,
    actor,
    fail,
    follow,
    notes,
    print_fields,
    print_json,
    print_table,
    read_id,
    read_moment,
    read_reason,
    uninterrupted,
    with_database,
)
from app.dispatch import control, failures, replay
from app.dispatch.control import Found, Page
from app.dispatch.failures import Progress
from app.dispatch.replay import Backfilled
from app.settings import Settings
from app.store.failures import Cause, Group
from app.store.session import Database, Limits
from app.store.sight import Sight

# How the list of causes writes that there is no fingerprint.
NO_FINGERPRINT = "-"
# To count what is dead by its cause is to read all of it.
_PATIENT = Limits(statement=timedelta(seconds=30))

app = typer.Typer(
    no_args_is_help=True, help="See what is owed to callbacks; owe it again, or give it up."
)


class State(StrEnum):
    """Where a delivery stands."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    DISCARDED = "discarded"
    PARKED = "parked"


DeliveryId = Annotated[str, typer.Argument(help="The delivery's id, as the list shows it.")]


@app.command("list")
def list_(
    *,
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    callback: Annotated[str | None, typer.Option(help="Only those of this callback.")] = None,
    envelope: Annotated[str | None, typer.Option(help="Only those of this envelope.")] = None,
    account: Annotated[str | None, typer.Option(help="Only those of this account.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every field.")] = False,
) -> None:
    """List deliveries, newest first.

    Those that wait for a person: [b]python -m app deliveries list --state dead[/b]
    """

    async def read(database: Database, _: Settings) -> Page:
        return await control.list_deliveries(
            database,
            state=state,
            callback=callback,
            envelope_id=envelope,
            sight=Sight(None if account is None else (account,)),
            limit=limit,
        )

    page = with_database(read)
    if as_json:
        print_json([asdict(each) for each in page.items])
    elif page.items:
        _show(page)
    elif state or callback or envelope or account:
        notes.print("no deliveries match; leave out a filter to see others")
    else:
        notes.print(
            "no deliveries yet: one comes of every event that a callback named in CALLBACKS "
            "asked for"
        )


def _show(page: Page) -> None:
    print_table(
        ["ID", "STATE", "TRIES", "CALLBACK", "EVENT", "ENVELOPE", "DUE", "LAST ERROR"],
        [
            (
                each.id,
                each.state,
                each.attempts,
                each.callback,
                each.event_type,
                each.envelope_id,
                each.due_at,
                each.last_error,
            )
            for each in page.items
        ],
    )
    if page.next_cursor is not None:
        notes.print("there are more: --limit, or a filter")


@app.command()
def show(
    delivery_id: DeliveryId,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every field.")] = False,
) -> None:
    """Show one delivery, and every attempt at it.

    Example: [b]python -m app deliveries show 019…[/b]
    """
    id_ = read_id(delivery_id, "a delivery")

    async def read(database: Database, _: Settings) -> Found:
        return await control.find(database, id_)

    found = with_database(read)
    if as_json:
        listed = {"tries": _plain(found.attempts), "acts": _plain(found.acts)}
        print_json({**asdict(found.delivery), **listed})
        return
    print_fields({k: v for k, v in asdict(found.delivery).items() if k != "spent"})
    if found.attempts:
        typer.echo()
        _show_attempts(found.attempts)
    if found.acts:
        typer.echo()
        _show_acts(found.acts)


def _plain(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(row._mapping) for row in rows]  # noqa: SLF001  # SQLAlchemy's public way


def _show_attempts(attempts: Sequence[Any]) -> None:
    print_table(
        ["TRY", "STARTED", "FINISHED", "VERDICT", "WORKER", "ERROR"],
        [
            (
                each.number,
                each.started_at,
                each.finished_at,
                each.verdict,
                each.worker,
                each.error,
            )
            for each in attempts
        ],
    )


def _show_acts(acts: Sequence[Any]) -> None:
    print_table(
        ["ACT", "AT", "BY", "WHY"],
        [(each.action, each.at, each.actor, (each.details or {}).get("reason")) for each in acts],
    )


@app.command("failures")
def failures_(
    *,
    callback: Annotated[str | None, typer.Option(help="Only those of this callback.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many causes.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every field.")] = False,
) -> None:
    """List what deliveries died of: one line for each cause, the latest first.

    What died of the same error, at the same place, in the same callback, for the same
    type of event has one fingerprint. Mend the cause, then try all of it again:
    [b]python -m app deliveries retry --group FINGERPRINT[/b]
    """

    async def read(database: Database, _: Settings) -> list[Group]:
        return await failures.list_groups(database, callback=callback, limit=limit)

    found = with_database(read, limits=_PATIENT)
    if as_json:
        print_json([asdict(each) for each in found])
    elif found:
        _show_groups(found)
    else:
        notes.print("nothing is dead: nobody has to look at anything")


def _show_groups(found: Sequence[Group]) -> None:
    print_table(
        ["FINGERPRINT", "CALLBACK", "EVENT", "COUNT", "FIRST", "LAST", "ONE OF THEM", "ITS ERROR"],
        [
            (
                each.fingerprint or NO_FINGERPRINT,
                each.callback,
                each.event_type,
                each.count,
                each.first_at,
                each.last_at,
                each.delivery_id,
                each.error,
            )
            for each in found
        ],
    )


Selected = Annotated[
    str | None, typer.Argument(help="One delivery, by its id.", metavar="DELIVERY_ID")
]
GroupOption = Annotated[
    str | None,
    typer.Option(
        "--group", help="All that died of one cause: its fingerprint, or - with --callback."
    ),
]
CallbackOption = Annotated[
    str | None, typer.Option(help="With --group -: whose dead letters without a fingerprint.")
]
Rate = Annotated[float, typer.Option(min=0.01, max=10_000, help="At most so many a second.")]


def _choose(delivery_id: str | None, group: str | None, callback: str | None) -> UUID | Cause:
    """Read what a person named: one delivery, or one cause."""
    if (delivery_id is None) == (group is None):
        raise typer.BadParameter("name one delivery, or a whole cause with --group")
    if (group == NO_FINGERPRINT) != (callback is not None):
        raise typer.BadParameter("--callback goes with --group -, and only with that")
    if delivery_id is not None:
        return read_id(delivery_id, "a delivery")
    return Cause(None, callback) if group == NO_FINGERPRINT else Cause(group)


@app.command()
def retry(
    delivery_id: Selected = None,
    *,
    group: GroupOption = None,
    callback: CallbackOption = None,
    rate: Rate = failures.RATE,
) -> None:
    """Try a delivery again now, with a fresh round of attempts; or all of one cause.

    A whole cause is tried again a few at a time, oldest first, and that stops by itself
    if the failures return; what was not tried stays dead. Ctrl-C stops it, too, and the
    same command goes on. The idempotency keys stay what they were.

      python -m app deliveries retry 019…

      python -m app deliveries retry --group 3f6c… --rate 20
    """
    match _choose(delivery_id, group, callback):
        case UUID() as id_:
            with_database(lambda database, _: control.retry(database, id_, actor=actor()))
            typer.echo(f"{id_} is due now")
        case cause:
            _retry_group(cause, rate)


def _retry_group(cause: Cause, rate: float) -> None:
    async def act(database: Database, _: Settings) -> Progress:
        steps = failures.retry_group(database, cause, actor=actor(), rate=rate)
        return await follow(steps, _step)

    last = uninterrupted(lambda: with_database(act, limits=_PATIENT), "what is left stays dead")
    typer.echo(
        f"{last.retried} of {last.total} tried again: {last.done} done, {last.failed} failed "
        f"again, {last.waiting} due; {last.total - last.retried} still dead"
    )
    if last.stopped is not None:
        fail(f"stopped: {last.stopped}")


def _step(progress: Progress) -> Step:
    text = f"{progress.done} done, {progress.failed} failed again, {progress.waiting} waiting"
    return Step(progress.retried, progress.total, text)


@app.command()
def discard(
    delivery_id: Selected = None,
    *,
    group: GroupOption = None,
    callback: CallbackOption = None,
    reason: Annotated[str, typer.Option(help="Why; it is kept in the audit.")],
) -> None:
    """Owe a delivery no longer: the callback will never see it; or all of one cause.

    python -m app deliveries discard 019… --reason "sent by hand"

    python -m app deliveries discard --group 3f6c… --reason "test data"
    """
    chosen = _choose(delivery_id, group, callback)
    why, who = read_reason(reason), actor()

    async def act(database: Database, _: Settings) -> str:
        if isinstance(chosen, UUID):
            await control.discard(database, chosen, reason=why, actor=who)
            return f"{chosen} is discarded"
        count = await failures.discard_group(database, chosen, reason=why, actor=who)
        return f"{count} are discarded"

    typer.echo(uninterrupted(lambda: with_database(act), "what is left stays dead"))


@app.command()
def backfill(
    name: Annotated[str, typer.Argument(help="The callback that is to be given the past.")],
    *,
    since: Annotated[str, typer.Option(help="From when: 2026-07-01, 2026-07-01T09:30Z, 7d, 12h.")],
    until: Annotated[str | None, typer.Option(help="Up to when; now, if not said.")] = None,
    rate: Rate = replay.RATE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count, by type.")] = False,
) -> None:
    """Owe a callback past events that it asks for and was never owed: for one that is new.

    They become due one after the other, and what arrives meanwhile goes between them.
    Ctrl-C stops it; the same command goes on where it was.

      python -m app deliveries backfill onboarding --since 30d --dry-run

      python -m app deliveries backfill onboarding --since 30d --rate 20
    """
    now = datetime.now(UTC)
    first = read_moment(since, now)
    end = now if until is None else read_moment(until, now)

    async def count(database: Database, _: Settings) -> Mapping[str, int]:
        return await replay.count_backfill(database, name, since=first, until=end)

    async def act(database: Database, _: Settings) -> Backfilled:
        steps = replay.backfill(database, name, since=first, until=end, rate=rate, actor=actor())
        return await follow(steps, lambda step: Step(step.owed, step.total))

    if dry_run:
        counts = with_database(count)
        print_table(["EVENT", "COUNT"], [*counts.items(), ("all", sum(counts.values()))])
        return
    last = uninterrupted(lambda: with_database(act), "what is left is not owed yet")
    typer.echo(f"{last.owed} of {last.total} are owed to {name} now")
