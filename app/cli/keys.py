"""`keys`: which API key still proves webhooks genuine, so that a rotation can be finished."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from app.cli.terminal import READ_LIMIT, actor, ago, cell, notes, print_table, with_database
from app.errors import ConfigError
from app.events.signature import Key
from app.settings import Settings
from app.store import keys as rows
from app.store.session import Database, Limits
from app.wiring import verification_keys

# Atlas repeats a webhook for less than three hours; a day without a match is no pause of theirs.
QUIET = timedelta(days=1)
_LIMITS = Limits(lock=timedelta(seconds=10), statement=timedelta(hours=1))
_ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

app = typer.Typer(no_args_is_help=False)


@dataclass(frozen=True, slots=True)
class Usage:
    """A key as operators see it; the key itself is nowhere in it."""

    label: str
    account: str
    fingerprint: str
    is_configured: bool
    last_match_at: datetime | None
    not_after: datetime | None = None

    def verdict(self, now: datetime) -> str:
        """Say whether the key can be withdrawn."""
        is_quiet = self.last_match_at is None or now - self.last_match_at > QUIET
        if not self.is_configured:
            return "withdrawn" if is_quiet else "withdrawn here, but it matched lately"
        if self.not_after is not None and self.not_after < now:
            return "expired: refused since " + cell(self.not_after)
        if self.last_match_at is None:
            return "never matched"
        return "unused since " + cell(self.last_match_at) if is_quiet else "still in use"


@app.callback(invoke_without_command=True)
def keys(context: typer.Context) -> None:
    """List every key: whose it is, and when it last proved a webhook genuine.

    To change a key without losing a webhook: add the new one beside the old one
    in [b]ATLAS_API_KEYS[/b] and restart; make envelopes with the new one; wait until
    the old one is unused and the envelopes made with it are closed; take it out.

      python -m app keys
    """
    if context.invoked_subcommand is not None:
        return

    async def read(database: Database, settings: Settings) -> list[Usage]:
        async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
            return combine(verification_keys(settings), await rows.page(connection))

    found = with_database(read)
    if not found:
        notes.print("no keys: set ATLAS_API_KEY or ATLAS_API_KEYS (`make run` makes one)")
        return
    _show(found, datetime.now(UTC))


def combine(configured: Iterable[Key], known: Iterable[Any]) -> list[Usage]:
    """Bring together the keys of the settings and those that the database has seen."""
    recorded: Mapping[str, Any] = {row.fingerprint: row for row in known}
    usages = {
        key.fingerprint: Usage(
            key.label,
            key.account,
            key.fingerprint,
            is_configured=True,
            last_match_at=getattr(recorded.get(key.fingerprint), "last_match_at", None),
            not_after=key.not_after,
        )
        for key in configured
    }
    for row in recorded.values():
        old = Usage(
            row.label,
            row.account,
            row.fingerprint,
            is_configured=False,
            last_match_at=row.last_match_at,
        )
        usages.setdefault(row.fingerprint, old)
    return sorted(usages.values(), key=lambda u: (u.account, not u.is_configured, u.label))


def _show(found: Iterable[Usage], now: datetime) -> None:
    print_table(
        ["LABEL", "ACCOUNT", "FINGERPRINT", "CONFIGURED", "LAST MATCH", "AGO", "VERDICT"],
        [
            (
                usage.label,
                usage.account,
                usage.fingerprint,
                usage.is_configured,
                usage.last_match_at or "never",
                ago(usage.last_match_at, now) if usage.last_match_at else "",
                usage.verdict(now),
            )
            for usage in found
        ],
    )


@app.command()
def rename(
    old: Annotated[str, typer.Argument(help="The label as the database knows it.")],
    new: Annotated[str, typer.Argument(help="The label as it is to be.")],
) -> None:
    """Give an account another label, in every table, in one transaction.

    First stop the replicas that run with the old label: they would go on
    recording under it. Meanwhile webhooks are answered 503 or not at all,
    and Atlas sends them again.

    Example: [b]python -m app keys rename default acme[/b]
    """
    if not _ACCOUNT.fullmatch(new):
        raise ConfigError(
            f"{new[:64]!r} cannot stand in a URL: letters, digits, '.', '_' and '-', at most 64"
        )

    async def move(database: Database, _: Settings) -> dict[str, int]:
        async with database.begin(limit=_LIMITS.statement) as connection:
            return await rows.rename(connection, old, new, actor=actor(), at=datetime.now(UTC))

    moved = with_database(move, limits=_LIMITS)
    counts = ", ".join(f"{count} {table}" for table, count in moved.items() if count)
    typer.echo(f"{old} is {new} now: {counts}")
    notes.print(
        f"name {new!r} in ATLAS_API_KEYS, in the accounts of API_TOKENS, in callbacks with "
        "account=, and in webhook URLs that end with the label; then start the replicas"
    )
