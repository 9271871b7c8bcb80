"""`rebuild`: compute envelopes anew from what was said of them, and see where they differ."""

import json
import shlex
from datetime import timedelta
from typing import Annotated

import typer

from app.cli.terminal import (
    Step,
    actor,
    follow,
    notes,
    print_table,
    printable,
    uninterrupted,
    with_database,
)
from app.settings import Settings
from app.store.envelopes import EnvelopeKey
from app.store.session import Database, Limits
from app.upkeep.comparison import Difference
from app.upkeep.rebuilding import Chosen, Progress
from app.upkeep.rebuilding import rebuild as compute

# To count envelopes is to read the index of all of them.
_PATIENT = Limits(statement=timedelta(seconds=50))
# How many differences are shown, and how much of a value; the rest is counted.
MOST, LONGEST = 1000, 120


def rebuild(
    *,
    envelope: Annotated[str | None, typer.Option(help="Only the one with this id.")] = None,
    account: Annotated[str | None, typer.Option(help="Only those of this account.")] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="ACCOUNT/ID", help="Go on behind this one, as an earlier run said."),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Let the envelopes say what their events say.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object in a line for each difference.")
    ] = False,
) -> None:
    """Compute envelopes anew from their stored events, and print where they differ.

    Nothing is changed without [b]--apply[/b]; with it a status may go down, each envelope
    that changes gets an event [b]receiver.rebuilt[/b], and the audit notes it. Ends with 1 if
    there are differences that are not applied. Where bytes are no longer kept, it goes on
    from what the envelope says already; what was erased is left alone.

      python -m app rebuild

      python -m app rebuild --envelope env_1 --apply
    """
    shown = _Shown(as_json=as_json)
    chosen = Chosen(envelope_id=envelope, account=account, after=_place(after))

    async def act(database: Database, _: Settings) -> Progress:
        run = compute(database, chosen, actor=actor(), is_applied=apply)
        return await follow(run, shown.take)

    try:
        last = uninterrupted(lambda: with_database(act, limits=_PATIENT), "nothing is half done")
    except BaseException:
        shown.end()
        shown.say_where()
        raise
    shown.end()
    _conclude(last, is_applied=apply)


def _place(text: str | None) -> EnvelopeKey | None:
    """Read where an earlier run was stopped."""
    if text is None:
        return None
    account, slash, envelope_id = text.partition("/")
    if not slash:
        raise typer.BadParameter("--after wants an account and an envelope's id: acme/env_1")
    return account, envelope_id


class _Shown:
    """What was found so far: lines of JSON at once, a table at the end."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._rows: list[Difference] = []
        self._more = 0
        self._last: EnvelopeKey | None = None

    def take(self, progress: Progress) -> Step:
        for each in progress.found:
            self._show(each)
        self._last = progress.last
        text = f"{progress.different} different" if progress.different else ""
        return Step(progress.done, progress.total, text)

    def _show(self, difference: Difference) -> None:
        if self._as_json:
            typer.echo(json.dumps(_plain(difference), default=str))
        elif len(self._rows) < MOST:
            self._rows.append(difference)
        else:
            self._more += 1

    def end(self) -> None:
        """Print the table."""
        if self._rows:
            print_table(
                ["ENVELOPE", "ACCOUNT", "COLUMN", "IS", "WOULD BE"],
                [
                    (
                        each.envelope_id,
                        each.account,
                        each.column,
                        _cut(each.is_now),
                        _cut(each.would_be),
                    )
                    for each in self._rows
                ],
            )
        if self._more:
            notes.print(f"and {self._more} more: --json prints all of them")

    def say_where(self) -> None:
        """Say where to go on, if this was not the end."""
        if self._last is not None:
            place = shlex.quote("/".join(self._last))
            notes.print(f"--after {printable(place)} leaves out what was compared")


def _plain(difference: Difference) -> dict[str, object]:
    return {
        "account": difference.account,
        "envelope_id": difference.envelope_id,
        "column": difference.column,
        "is": difference.is_now,
        "would_be": difference.would_be,
    }


def _cut(value: object) -> object:
    if isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    return value[:LONGEST] if isinstance(value, str) else value


def _conclude(last: Progress, *, is_applied: bool) -> None:
    typer.echo(
        f"{last.done} of {last.total} compared: {last.different} different, "
        f"{last.applied} applied, {last.from_row} from the row, {last.erased} erased"
    )
    if last.from_row:
        notes.print("from the row: not all of the bytes are kept, or understood today")
    if last.busy:
        notes.print(f"{last.busy} were changed or held by others all the time: run it again")
    if last.busy or last.different > last.applied:
        if last.different and not is_applied:
            notes.print("nothing was changed; --apply lets the envelopes say what their events say")
        raise typer.Exit(1)
