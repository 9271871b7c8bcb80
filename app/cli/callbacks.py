"""`callbacks`: who is owed what, and whether it is given to them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from app.cli.terminal import (
    actor,
    cell,
    notes,
    print_json,
    print_table,
    read_reason,
    uninterrupted,
    with_database,
)
from app.dispatch import control
from app.dispatch.control import CallbackStatus
from app.settings import Settings
from app.store.deliveries import DEAD, PARKED, PENDING, RUNNING
from app.store.session import Database

app = typer.Typer(
    no_args_is_help=True,
    help="See which callbacks there are; hold what is owed to one, or forget it.",
)

Name = Annotated[str, typer.Argument(help="The callback's name, as the list shows it.")]


@app.command("list")
def list_(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every field.")] = False,
) -> None:
    """List every callback that was ever loaded, and what is owed to it.

    Example: [b]python -m app callbacks list[/b]
    """

    async def read(database: Database, _: Settings) -> list[CallbackStatus]:
        return await control.list_callbacks(database)

    found = with_database(read)
    if as_json:
        print_json([_plain(each) for each in found])
    elif found:
        _show(found)
    else:
        notes.print("no callbacks: name a module in CALLBACKS, and start `serve` or `work`")


def _plain(status: CallbackStatus) -> dict[str, object]:
    return {
        **asdict(status.registered.subscription),
        "first_seen_at": status.registered.first_seen_at,
        "last_seen_at": status.registered.last_seen_at,
        "is_served": status.registered.is_served,
        "paused_at": status.flow.paused_at,
        "pause_reason": status.pause_reason,
        "open_until": status.flow.open_until,
        "counts": dict(status.counts),
    }


def _show(found: Sequence[CallbackStatus]) -> None:
    print_table(
        ["NAME", "WANTS", "SERVED", "OWED", "RUNNING", "DEAD", "PARKED", "FLOW"],
        [
            (
                status.registered.subscription.name,
                _wants(status),
                status.registered.is_served,
                *(status.counts.get(state, 0) for state in (PENDING, RUNNING, DEAD, PARKED)),
                _flow(status),
            )
            for status in found
        ],
    )


def _wants(status: CallbackStatus) -> str:
    subscription = status.registered.subscription
    account = f" of {subscription.account}" if subscription.account else ""
    return " ".join(subscription.patterns) + account


def _flow(status: CallbackStatus) -> str:
    if status.flow.paused_at is not None:
        why = f": {status.pause_reason}" if status.pause_reason else ""
        return f"paused since {cell(status.flow.paused_at)}{why}"
    if status.flow.open_until is not None:
        return f"breaker open until {cell(status.flow.open_until)}"
    return "flows"


@app.command()
def pause(
    name: Name, *, reason: Annotated[str, typer.Option(help="Why; it is kept in the audit.")]
) -> None:
    """Give a callback nothing more: what is owed to it gathers, and nothing is lost.

    Calls under way come to their end.

    Example: [b]python -m app callbacks pause onboarding --reason "CRM is moving"[/b]
    """
    why = read_reason(reason)

    async def act(database: Database, _: Settings) -> bool:
        return await control.pause(database, name, reason=why, actor=actor())

    is_changed = with_database(act)
    typer.echo(f"{name} is paused" if is_changed else f"{name} was paused already")


@app.command()
def resume(name: Name) -> None:
    """Give a callback what is owed to it; also if its breaker stopped that.

    Example: [b]python -m app callbacks resume onboarding[/b]
    """

    async def act(database: Database, _: Settings) -> bool:
        return await control.resume(database, name, actor=actor())

    is_changed = with_database(act)
    typer.echo(f"{name} is given its events" if is_changed else f"nothing held {name}")


@app.command()
def forget(
    name: Name, *, reason: Annotated[str, typer.Option(help="Why; it is kept in the audit.")]
) -> None:
    """Take a callback that no process serves off the list: nothing is owed to it any more.

    What waits for it is discarded, its dead letters stay. A callback that is registered
    under this name later begins anew.

    Example: [b]python -m app callbacks forget onboarding --reason "it is called crm now"[/b]
    """
    why = read_reason(reason)

    async def act(database: Database, _: Settings) -> int:
        return await control.forget(database, name, reason=why, actor=actor())

    discarded = uninterrupted(lambda: with_database(act), "what is left waits")
    typer.echo(f"{name} is forgotten, and {discarded} deliveries to it are discarded")
