"""`events`: what Atlas said, what it changed, and who was told."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from uuid import UUID

import typer

from app.cli import drift, explain
from app.cli.terminal import (
    READ_LIMIT,
    actor,
    cell,
    notes,
    print_fields,
    print_json,
    print_table,
    read_id,
    with_database,
)
from app.dispatch import replay
from app.dispatch.replay import Redelivery
from app.errors import NotFound
from app.events.lifecycle import Effect
from app.intake.reproject import Reprojected, Result
from app.intake.reproject import reproject as apply_again
from app.settings import Settings
from app.store import deliveries
from app.store import events as rows
from app.store.deliveries import Delivery
from app.store.session import Database

app = typer.Typer(
    no_args_is_help=True, help="See what Atlas said, and what came of it; apply or owe it again."
)
app.command()(explain.explain)
app.command()(drift.drift)


@app.command("list")
def list_(
    *,
    envelope: Annotated[str | None, typer.Option(help="Only those of this envelope.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="Only those of this type.")] = None,
    effect: Annotated[Effect | None, typer.Option(help="Only those with this effect.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every field.")] = False,
) -> None:
    """List events, newest first.

    What could not be understood: [b]python -m app events list --effect quarantined[/b]
    """

    async def read(database: Database, _: Settings) -> Sequence[Any]:
        async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
            return await rows.page(
                connection, envelope_id=envelope, event_type=type_, effect=effect, limit=limit + 1
            )

    # One more than is shown, to know whether there is one.
    found = with_database(read)
    if as_json:
        print_json([_plain(row) for row in found[:limit]])
    elif found:
        _show_list(found[:limit])
        if len(found) > limit:
            notes.print("there are more: --limit, or a filter")
    elif envelope or type_ or effect:
        notes.print("no events match; leave out a filter to see others")
    else:
        notes.print("no events yet; send one: python -m app trigger envelope.signed")


def _plain(row: Any) -> dict[str, Any]:
    return dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's public way


def _show_list(found: Sequence[Any]) -> None:
    print_table(
        ["ID", "RECEIVED", "TYPE", "ENVELOPE", "ACCOUNT", "EFFECT", "STATUS", "COPIES"],
        [
            (
                row.id,
                row.received_at,
                row.type,
                row.envelope_id,
                row.account,
                row.effect,
                row.status,
                row.copies,
            )
            for row in found
        ],
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """One event with everything that came of it."""

    event: Any
    body: bytes | None
    deliveries: Sequence[Delivery]
    attempts: Sequence[Any]


@app.command()
def show(
    event_id: Annotated[str, typer.Argument(help="Our id of the event, as the door answered it.")],
    *,
    body: Annotated[
        bool, typer.Option("--body", help="Print the bytes as received, and nothing else.")
    ] = False,
) -> None:
    """Show one event: what it changed, how often it came, who was told.

    With [b]--body[/b] the bytes as received go to the output. They may hold links
    that sign a document for whoever follows them, so the audit notes it.

    Example: [b]python -m app events show 019…[/b]
    """
    id_ = read_id(event_id, "an event")

    async def read(database: Database, _: Settings) -> Shown:
        return await _read(database, id_, is_body_wanted=body)

    found = with_database(read)
    if body:
        _print_body(found.body)
    else:
        _show(found)


async def _read(database: Database, event_id: UUID, *, is_body_wanted: bool) -> Shown:
    async with database.begin(limit=READ_LIMIT, is_reading=not is_body_wanted) as connection:
        event = await rows.get(connection, event_id)
        if event is None:
            raise NotFound(f"there is no event {event_id} here")
        if is_body_wanted:
            await deliveries.audit(
                connection,
                actor=actor(),
                action="body.read",
                subject=f"event:{event_id}",
                details={},
            )
        body = await rows.read_body(connection, event_id)
        owed = await deliveries.page(connection, filters={"event_id": event_id}, limit=1000)
        attempts = await deliveries.attempts_of(connection, [each.id for each in owed])
        return Shown(event, body, owed, attempts)


def _print_body(body: bytes | None) -> None:
    if body is None:
        raise NotFound("the bytes of this event are no longer kept: pruned, or erased")
    notes.print(f"the raw body as received, {len(body)} bytes; it may hold links that sign")
    sys.stdout.buffer.write(body)
    sys.stdout.buffer.flush()
    if sys.stdout.isatty():
        typer.echo()


def _show(found: Shown) -> None:
    kept = "no longer kept" if found.body is None else f"{len(found.body)} bytes kept (--body)"
    print_fields({**_described(found.event), "body": kept})
    typer.echo()
    if not found.deliveries:
        typer.echo("owed to no callback")
        return
    print_table(
        ["DELIVERY", "CALLBACK", "STATE", "TRIES", "DUE", "SETTLED", "LAST ERROR"],
        [
            (d.id, d.callback, d.state, d.attempts, d.due_at, d.settled_at, d.last_error)
            for d in found.deliveries
        ],
    )
    if found.attempts:
        typer.echo()
        _show_attempts(found)


def _show_attempts(found: Shown) -> None:
    callbacks = {each.id: each.callback for each in found.deliveries}
    print_table(
        ["TRY", "CALLBACK", "STARTED", "FINISHED", "VERDICT", "WORKER", "ERROR"],
        [
            (
                each.number,
                callbacks[each.delivery_id],
                each.started_at,
                each.finished_at,
                each.verdict,
                each.worker,
                each.error,
            )
            for each in found.attempts
        ],
    )


def _described(event: Any) -> dict[str, object]:
    copies = f"{event.copies}, the last at {cell(event.last_copy_at)}" if event.copies else "none"
    return {
        "event_id": event.id,
        "type": event.type,
        "account": event.account,
        "envelope_id": event.envelope_id,
        "atlas_event_id": event.atlas_event_id,
        "received_at": event.received_at,
        "occurred_at": event.occurred_at,
        "sequence": event.sequence,
        "effect": event.effect,
        "reason": event.reason,
        "original_id": event.original_id,
        "status": event.status,
        "version": event.version,
        "degraded": ", ".join(event.degraded) if event.degraded else None,
        "copies": copies,
        "key": event.key_label,
    }


EventId = Annotated[str, typer.Argument(help="Our id of the event, as the list shows it.")]


@app.command()
def redispatch(
    event_id: EventId,
    *,
    callback: Annotated[
        str | None, typer.Option(help="Only to this one; else to all that ask for it now.")
    ] = None,
) -> None:
    """Owe an event to callbacks once more, also if they are done with it.

    Each delivery is a new one, with an idempotency key of its own, and the callback can
    see that it is a replay.

    Example: [b]python -m app events redispatch 019… --callback onboarding[/b]
    """
    id_ = read_id(event_id, "an event")

    async def act(database: Database, _: Settings) -> list[Redelivery]:
        to = None if callback is None else [callback]
        return await replay.redispatch(database, id_, to=to, actor=actor())

    print_table(
        ["DELIVERY", "CALLBACK", "GENERATION"],
        [(each.id, each.callback, each.generation) for each in with_database(act)],
    )


@app.command()
def reproject(
    event_id: EventId,
    *,
    accept: Annotated[
        bool, typer.Option("--accept", help="Take the word of a conflict, whatever was said.")
    ] = False,
) -> None:
    """Read the bytes of an event anew, and apply what they say to its envelope.

    For one in quarantine, after an update that understands it; for one of which values
    were lost; and with [b]--accept[/b] for one that contradicts another: then its word
    counts, and the status of the envelope may go down.

      python -m app events reproject 019…

      python -m app events reproject 019… --accept
    """
    id_ = read_id(event_id, "an event")

    async def act(database: Database, _: Settings) -> Reprojected:
        return await apply_again(database, id_, is_accepted=accept, actor=actor())

    done = with_database(act)
    typer.echo(f"{id_}: {_RESULTS[done.result].format(original=done.original)}")
    print_fields(
        {
            "type": done.type,
            "envelope_id": done.envelope_id,
            "effect": done.effect if done.effect == done.was else f"{done.was} → {done.effect}",
            "owed to": ", ".join(done.owed) or "nobody new",
        }
    )


_RESULTS = {
    Result.RECORDED: "understood, and recorded",
    Result.DUPLICATE: "understood: a copy of {original}",
    Result.CONFLICT: "understood: it contradicts {original}; nothing was applied",
    Result.REFRESHED: "applied again; its envelope has changed",
    Result.UNCHANGED: "applied again; its envelope says all of it already",
    Result.ACCEPTED: "accepted; it overrules {original}",
}
