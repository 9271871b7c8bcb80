"""`events drift`: what was never seen in events before."""

from collections.abc import Sequence
from typing import Annotated

import typer

from app.cli.terminal import READ_LIMIT, notes, print_json, print_table, with_database
from app.settings import Settings
from app.store import shapes
from app.store.session import Database
from app.store.shapes import Known, Shape
from app.store.sight import Sight

_AT_ONCE = 1000


def drift(
    *,
    type_: Annotated[str | None, typer.Option("--type", help="Only of this type.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also what was learned at first.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=10000, help="At most so many.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List fields and status words that were new in a type of events known well by then.

    Atlas may have begun to send something that nobody here reads yet. Only names are
    kept, and no values.

      python -m app events drift

      python -m app events drift --type envelope.signed --all
    """

    async def read(database: Database, _: Settings) -> Sequence[Shape]:
        return await _read(database, type_, is_all=everything, limit=limit + 1)

    found = with_database(read)
    if as_json:
        print_json([shape._asdict() for shape in found[:limit]])
    elif found:
        print_table(
            ["FIRST SEEN", "EVENT", "TYPE", "KIND", "WHAT"],
            [(s.first_seen_at, s.event_id, s.type, s.kind, s.path) for s in found[:limit]],
        )
    else:
        notes.print("nothing new; --all lists what is known")
    if len(found) > limit:
        notes.print("there are more: --limit, or --type")


async def _read(
    database: Database, of_type: str | None, *, is_all: bool, limit: int
) -> list[Shape]:
    found: list[Shape] = []
    after: Known | None = None
    while len(found) < limit:
        async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
            page = await shapes.page(
                connection, Sight(None), of_type=of_type, after=after, limit=_AT_ONCE
            )
        found += [shape for shape in page if is_all or shape.is_drift]
        if len(page) < _AT_ONCE:
            break
        after = Known(*page[-1][:3])
    return found[:limit]
