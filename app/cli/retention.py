"""`prune` and `erase`: what is kept, and what is not kept any longer."""

import sys
from datetime import timedelta
from functools import partial
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from app.callbacks.shelf import open_shelf, remove_documents
from app.cli.terminal import (
    Step,
    actor,
    fail,
    follow,
    notes,
    print_fields,
    print_table,
    printable,
    uninterrupted,
    with_database,
)
from app.errors import ConfigError
from app.settings import Duration, Settings
from app.store.session import Database, Limits
from app.upkeep import erasure, pruning
from app.upkeep.erasure import Erased, RemoveFiles, Search, Traces
from app.upkeep.pruning import Pruned
from app.wiring import worker_name

# To count bodies is to read the index of all of them; to forget terms, all of those.
_PATIENT = Limits(statement=timedelta(seconds=50))
_DURATION: TypeAdapter[timedelta] = TypeAdapter(Duration)

_WHY = {
    "owed": "owed to a callback",
    "dead": "dead letters",
    "parked": "parked for a callback that nobody serves",
    "quarantined": "in quarantine",
    "conflicting": "of a conflict, or of a disputed envelope",
    "own": "of events that the service said about itself",
    "busy": "just changed by somebody else",
}


def prune(
    *,
    older_than: Annotated[
        str | None,
        typer.Option(help="How long ago it was received: 90d, 12h. Else BODY_RETENTION."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count; change nothing.")] = False,
) -> None:
    """Empty the bodies of old events; the events stay, and so does what recognises a copy.

    What is owed, dead, parked, in quarantine or contested keeps its body. It goes a few
    at a time, so that webhooks are not held up; Ctrl-C stops it, and the same command
    goes on.

      python -m app prune --older-than 90d --dry-run

      python -m app prune --older-than 90d
    """
    age = None if older_than is None else _read_age(older_than)

    async def act(database: Database, settings: Settings) -> Pruned:
        chosen = age or settings.body_retention
        if chosen is None:
            raise ConfigError(
                "nobody has said how long bodies are kept: say --older-than 90d, or set "
                "BODY_RETENTION=90d"
            )
        steps = pruning.prune(database, chosen, holder=worker_name(), is_dry=dry_run)
        return await follow(steps, lambda step: Step(step.seen, step.total))

    done = uninterrupted(
        lambda: with_database(act, limits=_PATIENT), "what was emptied stays empty"
    )
    _show_pruned(done, is_dry=dry_run)


def _read_age(text: str) -> timedelta:
    try:
        return _DURATION.validate_python(text)
    except ValidationError:
        raise typer.BadParameter(
            f"{printable(text)[:80]!r} is no length of time: 90d, 12h or 30min"
        ) from None


def _show_pruned(done: Pruned, *, is_dry: bool) -> None:
    what = "would be emptied" if is_dry else "emptied"
    typer.echo(f"{done.emptied} bodies {what}, {sum(done.skipped.values())} kept")
    if done.skipped:
        print_table(["KEPT", "BODIES"], [(_WHY[why], n) for why, n in sorted(done.skipped.items())])


def erase(
    *,
    envelope: Annotated[str | None, typer.Option(help="The envelope's id.")] = None,
    email: Annotated[str | None, typer.Option(help="An e-mail address, in full.")] = None,
    account: Annotated[str | None, typer.Option(help="Only in this account.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show; change nothing.")] = False,
) -> None:
    """Erase the personal data of an envelope, or every trace of an e-mail address.

    Ids, types, status and times stay, so that a copy is still known as one. An address
    erases each envelope that mentions it, whole. It cannot be taken back. If it is cut
    off, the same command goes on.

      python -m app erase --envelope env_1 --dry-run

      python -m app erase --email ada@example.com
    """
    _require_one(envelope, email)
    if not (yes or dry_run or sys.stdin.isatty()):
        raise typer.BadParameter("there is no terminal to ask at: say --yes, or --dry-run")

    async def act(database: Database, settings: Settings) -> Erased | None:
        search = (
            await erasure.of_envelope(database, envelope, account)
            if envelope is not None
            else erasure.of_address(email or "", account)
        )
        remove = partial(remove_documents, open_shelf(settings.archive_url))
        found = await follow(
            erasure.find(database, search), lambda step: Step(step.seen, step.total, "looked at")
        )
        return await _erase(database, search, found, remove, is_dry=dry_run, is_certain=yes)

    done = uninterrupted(lambda: with_database(act, limits=_PATIENT), "what is erased stays so")
    if done is not None:
        _show_erased(done, is_dry=dry_run)


def _require_one(envelope: str | None, email: str | None) -> None:
    if (envelope is None) == (email is None):
        raise typer.BadParameter("name one: --envelope, or --email")
    if email is not None and not _is_address(email.strip()):
        raise typer.BadParameter("that is no e-mail address: give it in full")


def _is_address(text: str) -> bool:
    name, at, host = text.rpartition("@")
    return bool(name and at and host) and not any(c.isspace() for c in text)


async def _erase(
    database: Database,
    search: Search,
    found: Traces,
    remove: RemoveFiles,
    *,
    is_dry: bool,
    is_certain: bool,
) -> Erased | None:
    """Show what would be touched, ask, and do it; None if there is nothing, or nobody agrees."""
    if found.is_empty:
        typer.echo("nothing was found")
        return None

    async def run(*, is_dry: bool) -> Erased:
        steps = erasure.erase(
            database, search, found, actor=actor(), remove_files=remove, is_dry=is_dry
        )
        return await follow(steps, lambda step: Step(step.done, step.total))

    if is_dry:
        _show_envelopes(found)
        return await run(is_dry=True)
    if not is_certain:
        _show_envelopes(found)
        _show_erased(await run(is_dry=True), is_dry=True)
        if not typer.confirm("Erase all of this? It cannot be taken back"):
            notes.print("nothing was erased")
            return None
    return await run(is_dry=False)


def _show_envelopes(found: Traces) -> None:
    if found.envelopes:
        print_table(["ACCOUNT", "ENVELOPE"], sorted(found.envelopes))
        typer.echo()


def _show_erased(done: Erased, *, is_dry: bool) -> None:
    touched = {place: count for place, count in sorted(done.counts.items()) if count}
    typer.echo("would be erased:" if is_dry else "erased:")
    print_fields(touched or {"nothing": "all of it was erased before"})
    if done.failures:
        for failure in done.failures:
            notes.print(failure)
        fail("not everything is gone: put that right, and say the same again")
