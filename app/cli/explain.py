"""`events explain`: everything that happened to one envelope, for eyes."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from app.cli.terminal import cell, notes, print_fields, print_json, with_database
from app.settings import Settings
from app.store.session import Database
from app.store.sight import Sight
from app.upkeep import explain as recorder
from app.upkeep.explain import Story

WIDEST = max(map(len, recorder.KINDS))


def explain(
    envelope_id: Annotated[str, typer.Argument(help="The envelope, by its id.")],
    *,
    account: Annotated[
        str | None, typer.Option(help="Whose it is, if two accounts have this id.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=recorder.LARGEST_PAGE, help="At most so many events.")
    ] = recorder.LARGEST_PAGE,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every field.")] = False,
) -> None:
    """Tell what happened to an envelope: events, deliveries, attempts, who did what.

    Of each event it is said what it changed, or why it changed nothing.

    Example: [b]python -m app events explain env_1[/b]
    """
    sight = Sight(None if account is None else (account,))

    async def read(database: Database, _: Settings) -> Story:
        return await recorder.explain(database, envelope_id, sight=sight, limit=limit)

    story = with_database(read)
    if as_json:
        print_json(_plain(story))
    else:
        _show(story)


def _plain(story: Story) -> dict[str, Any]:
    return {
        "envelope_id": story.envelope_id,
        "account": story.account,
        "envelope": None if story.envelope is None else _mapping(story.envelope),
        "items": [_flat(asdict(entry)) for entry in story.entries],
        "is_complete": story.is_complete and story.next_after is None,
    }


def _mapping(row: Any) -> dict[str, Any]:
    return dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's public way


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    about = entry.pop("about")
    return {**entry, **about}


def _show(story: Story) -> None:
    known = {} if story.envelope is None else _mapping(story.envelope)
    print_fields({"envelope_id": story.envelope_id, "account": story.account, **known})
    typer.echo()
    # No table, which would cut a long sentence at the edge of the terminal.
    for entry in story.entries:
        typer.echo(f"{cell(entry.at)}  {entry.kind.ljust(WIDEST)}  {cell(entry.summary)}")
    if story.next_after is not None or not story.is_complete:
        notes.print("there is more: --limit, or the API, which tells all of it page by page")
