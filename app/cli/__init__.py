"""The command line: `python -m app VERB`."""

import sys

import typer
from rich.console import Console

from app.cli import callbacks, check, deliveries, events, keys, rebuild, retention, serve, trigger
from app.errors import AppError, NotAllowed
from app.store.session import DatabaseError

app = typer.Typer(
    name="app",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Receive Atlas' e-signature webhooks, and look after what came of them.",
)
app.command()(serve.serve)
app.command()(serve.work)
app.command()(serve.migrate)
app.command()(check.check)
app.command()(trigger.trigger)
app.add_typer(callbacks.app, name="callbacks")
app.add_typer(deliveries.app, name="deliveries")
app.add_typer(events.app, name="events")
app.add_typer(keys.app, name="keys")
app.command()(rebuild.rebuild)
app.command()(retention.prune)
app.command()(retention.erase)
app.command()(serve.openapi)


def main() -> None:
    """Run one verb; what goes wrong is said in one line, and is never a traceback."""
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        app()
    except AppError as error:
        errors.print(f"error: {error}")
        sys.exit(1 if isinstance(error, NotAllowed) else 2)
    except DatabaseError as error:
        errors.print(f"error: the database does not answer ({type(error).__name__}); DATABASE_URL")
        sys.exit(3)
