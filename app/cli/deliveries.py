"""`deliveries`: what is owed to callbacks, and what an operator may do about it."""

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from app.cli.terminal import actor, notes, print_json, print_table, read_id, with_database
from app.dispatch import control
from app.dispatch.control import Page
from app.settings import Settings
from app.store.session import Database

app = typer.Typer(
    no_args_is_help=True, help="See what is owed to callbacks; try it again, or give it up."
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
    filters = {"callback": callback, "envelope_id": envelope, "account": account}

    async def read(database: Database, _: Settings) -> Page:
        return await control.list_deliveries(database, state=state, limit=limit, **filters)

    page = with_database(read)
    if as_json:
        print_json([asdict(each) for each in page.items])
    elif page.items:
        _show(page)
    elif state or any(filters.values()):
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
def retry(delivery_id: DeliveryId) -> None:
    """Try a delivery again now, with a fresh round of attempts.

    Example: [b]python -m app deliveries retry 019…[/b]
    """
    id_ = read_id(delivery_id, "a delivery")

    async def act(database: Database, _: Settings) -> None:
        await control.retry(database, id_, actor=actor())

    with_database(act)
    typer.echo(f"{id_} is due now")


@app.command()
def discard(
    delivery_id: DeliveryId,
    *,
    reason: Annotated[str, typer.Option(help="Why; it is kept in the audit.")],
) -> None:
    """Owe a delivery no longer: the callback will never see it.

    Example: [b]python -m app deliveries discard 019… --reason "sent by hand"[/b]
    """
    id_ = read_id(delivery_id, "a delivery")
    if not reason.strip():
        raise typer.BadParameter("say why: whoever finds this later will ask")

    async def act(database: Database, _: Settings) -> None:
        await control.discard(database, id_, reason=reason.strip(), actor=actor())

    with_database(act)
    typer.echo(f"{id_} is discarded")
