"""`trigger`: send a signed webhook, as Atlas would, and say what became of it."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.progress import track

from app.cli.sample import (
    PREFIX,
    TYPES,
    Assignment,
    Json,
    assign,
    encode,
    ids_of,
    make_sample,
    mark_as_test,
    read_assignment,
)
from app.cli.target import Target, choose_target
from app.cli.terminal import fail, notes, printable
from app.errors import ConfigError
from app.events.signature import sign
from app.settings import read_settings

if TYPE_CHECKING:
    import httpx2

# Atlas waits as long.
PATIENCE = 10.0
MANY = 20

_MEANINGS = {
    401: "the service does not know the key {key}: it runs with other settings, or was started "
    "before they changed, or the key has expired there (`python -m app keys`)",
    404: "no door is there: webhooks go to /webhooks/atlas, or /webhooks/atlas/ACCOUNT",
    405: "this is no door: webhooks go to /webhooks/atlas, or /webhooks/atlas/ACCOUNT",
    413: "the body is larger than MAX_BODY_BYTES of the service",
    503: "the service did not know the event to be on disk in time, so Atlas would send it again: "
    "look at {origin}/readyz and at its log",
}
_OUTCOMES = {
    "recorded": "a new event",
    "duplicate": "known already; the first one's id",
    "conflict": "contradicts an event of the same identity: kept, not applied",
    "quarantined": "genuine, but not understood: kept, not applied",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the events are to look like."""

    event_type: str
    envelope_id: str | None
    assignments: Sequence[Assignment]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request."""

    status: int
    outcome: str | None
    event_id: str | None
    seconds: float


def trigger(
    event: Annotated[str, typer.Argument(help=f"One of {', '.join(TYPES)}; or any other name.")],
    *,
    url: Annotated[
        str, typer.Option(help="The door to send to.")
    ] = "http://127.0.0.1:8000/webhooks/atlas",
    account: Annotated[
        str | None, typer.Option(help="Send to the door of this account, signed with its key.")
    ] = None,
    key_label: Annotated[str | None, typer.Option(help="Sign with the key of this label.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="path=value in the body; JSON or text. May be repeated."),
    ] = None,
    envelope: Annotated[str | None, typer.Option(help="The envelope's id; else a new one.")] = None,
    duplicate: Annotated[
        bool, typer.Option("--duplicate", help="Send the same bytes twice.")
    ] = False,
    times: Annotated[int, typer.Option(min=1, max=100_000, help="Send so many events.")] = 1,
    yes: Annotated[
        bool, typer.Option("--yes", help="Send to another machine than this one.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print the request instead of sending it.")
    ] = False,
) -> None:
    """Send a signed webhook, as Atlas would, and say what became of it.

    It signs with the key of the settings, so the service must run with the same.
    Ids begin with "trigger-", and the event is marked as a test. On another machine both
    are so whatever --set and --envelope say.

    For example:

      python -m app trigger envelope.signed

      python -m app trigger envelope.sent --envelope trigger-7

      python -m app trigger envelope.signed --envelope trigger-7 --duplicate

      python -m app trigger envelope.declined --set reason="Wrong price"

      python -m app trigger contract.extracted --set metadata.external_id=crm-7

      python -m app trigger envelope.viewed --times 500
    """
    target = choose_target(read_settings(), url=url, account=account, key_label=key_label)
    recipe = Recipe(event, envelope, [read_assignment(text) for text in assignments or ()])
    if event not in TYPES:
        notes.print(f"note: Atlas is not known to send {printable(event)!r}; any name is recorded")
    if show:
        for _ in range(times):
            _print_request(target, make_body(recipe, is_remote=target.is_remote))
        return
    if target.is_remote and not yes:
        raise ConfigError(
            f"{target.origin} is not this machine: say --yes if it really is to get an event "
            "that never happened"
        )
    bodies = (make_body(recipe, is_remote=target.is_remote) for _ in range(times))
    if times == 1:
        _send_one(target, next(bodies), copies=2 if duplicate else 1)
    else:
        _send_many(target, bodies, times=times, copies=2 if duplicate else 1)


def make_body(recipe: Recipe, *, is_remote: bool) -> bytes:
    """Make the bytes of one event; what leaves this machine always says that it is made up."""
    sample = make_sample(recipe.event_type, envelope_id=recipe.envelope_id, at=datetime.now(UTC))
    assign(sample, recipe.assignments)
    if is_remote:
        _require_own_ids(sample)
        mark_as_test(sample)
    return encode(sample)


def _require_own_ids(sample: Json) -> None:
    """Refuse what could be taken for an event, or change an envelope, that Atlas knows."""
    for name, value in ids_of(sample):
        if not (isinstance(value, str) and value.startswith(PREFIX)):
            raise ConfigError(
                f"on another machine every id must begin with {PREFIX!r}, "
                f"and {name} is {repr(value)[:80]}"
            )


def _print_request(target: Target, body: bytes) -> None:
    typer.echo(f"POST {target.url}")
    typer.echo("Content-Type: application/json")
    typer.echo(f"X-Atlas-Signature: {sign(body, target.key.secret)}")
    typer.echo()
    typer.echo(body)


def _send_one(target: Target, body: bytes, *, copies: int) -> None:
    with _client() as client:
        answers = [_post(client, target, body) for _ in range(copies)]
    for answer in answers:
        meaning = _OUTCOMES.get(answer.outcome or "", "")
        typer.echo(
            f"{answer.status}  {answer.outcome or '-'}  {answer.event_id or '-'}  "
            f"{answer.seconds * 1000:.0f} ms" + (f"  ({meaning})" if meaning else "")
        )
    _require_success(target, answers)
    _print_next_steps(target, body, answers[-1])


def _send_many(target: Target, bodies: Iterator[bytes], *, times: int, copies: int) -> None:
    shown: Iterable[bytes] = bodies
    if times >= MANY and notes.is_terminal:
        shown = track(bodies, description="sending", total=times, console=notes, transient=True)
    with _client() as client:
        answers = [_post(client, target, body) for body in shown for _ in range(copies)]
    counted = Counter(f"{a.status} {a.outcome or '-'}" for a in answers)
    for what, count in sorted(counted.items()):
        typer.echo(f"{what}: {count}")
    took = sorted(a.seconds * 1000 for a in answers)
    typer.echo(
        f"each took {took[len(took) // 2]:.1f} ms at the median, {took[-1]:.1f} ms at most; "
        f"{len(took) / (sum(took) / 1000):.0f} a second, one after the other"
    )
    _require_success(target, answers)


def _client() -> "httpx2.Client":
    # The other verbs do not wait until it is loaded.
    import httpx2  # noqa: PLC0415

    # No proxy of the environment, and no redirect: a webhook goes where it is sent, or nowhere.
    return httpx2.Client(trust_env=False, follow_redirects=False, timeout=PATIENCE)


def _post(client: "httpx2.Client", target: Target, body: bytes) -> Answer:
    import httpx2  # noqa: PLC0415

    headers = {
        "Content-Type": "application/json",
        "X-Atlas-Signature": sign(body, target.key.secret),
    }
    started = time.perf_counter()
    try:
        response = client.post(target.url, content=body, headers=headers)
    except httpx2.TimeoutException:
        fail(f"{target.origin} did not answer within {PATIENCE:.0f} s; Atlas would try again later")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        fail(
            f"{target.origin} cannot be reached ({type(error).__name__}); is the service running? "
            "`make run` starts it, and --url names another place"
        )
    seconds = time.perf_counter() - started
    receipt = _receipt(response)
    return Answer(response.status_code, receipt.get("outcome"), receipt.get("event_id"), seconds)


def _receipt(response: "httpx2.Response") -> dict[str, Any]:
    try:
        receipt = response.json()
    except ValueError:
        return {}
    return receipt if isinstance(receipt, dict) else {}


def _require_success(target: Target, answers: Sequence[Answer]) -> None:
    for answer in answers:
        if answer.status != 200:  # noqa: PLR2004  # the one status that means: on disk
            fail(explain(answer.status, target))
        if answer.outcome not in _OUTCOMES:
            fail(f"{target.origin} answered 200, but not as this service does")


def explain(status: int, target: Target) -> str:
    """Say what an answer other than 200 means, and what to do."""
    meaning = _MEANINGS.get(status, "this service does not answer so; what listens there?")
    text = meaning.format(key=repr(target.key.label), origin=target.origin)
    return f"{target.origin} answered {status}: {text}"


def _print_next_steps(target: Target, body: bytes, answer: Answer) -> None:
    if target.is_remote:
        return
    envelope_id = json.loads(body).get("envelope_id")
    notes.print(f"\nwhat came of it:   python -m app events show {answer.event_id}")
    if isinstance(envelope_id, str) and answer.outcome != "quarantined":
        path = f"/api/envelope/{quote(envelope_id, safe='')}/status"
        notes.print(f'where it stands:   curl -H "Authorization: Bearer $TOKEN" {target.api}{path}')
        notes.print("                   ($TOKEN: one of API_TOKENS)")
