"""Built in: keeps the PDF of every signed envelope. `CALLBACKS=app.callbacks.archive:callbacks`.

The link to it is asked from Atlas anew for each attempt, since links expire. The file is
taken only if it is a PDF of at most `ARCHIVE_MAX_BYTES`, and stored under a name that is made
of digests; then its name, digest and size are written to the envelope, in the transaction
that ends the delivery. Envelopes that are tests are kept like others: a test should go the
whole way.

A signed document never changes. Should Atlas give other content all the same, both files are
kept, the envelope names the newer, and a warning is logged. A replay of the event puts a file
back that was lost.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, Protocol

from pydantic import SecretStr

from app.atlas.client import ApiKey, Atlas, AtlasError, AtlasRefused, EnvelopeUnknown
from app.callbacks import Callbacks, Event, GiveUp, RetryLater
from app.callbacks.shelf import Draft, Shelf, open_shelf, stem_of
from app.errors import AppError, ConfigError
from app.outbound import TooLarge
from app.store.archives import Archive, is_erased, record_archive
from app.telemetry import get_logger

# Longer than the question, the download and the disk together.
TIMEOUT = timedelta(minutes=6)

log = get_logger("archive")


class KeyMissing(AppError):
    """No key of the account may be used to call Atlas; the text says what to set."""


class KeyLike(Protocol):
    """What is read of a key in `ATLAS_API_KEYS`."""

    @property
    def key(self) -> SecretStr: ...
    @property
    def use(self) -> Collection[str]: ...
    @property
    def not_after(self) -> datetime | None: ...


class ArchiveSettings(Protocol):
    """The settings that this callback reads."""

    @property
    def archive_url(self) -> str: ...
    @property
    def archive_max_bytes(self) -> int: ...
    @property
    def atlas_base_url(self) -> str: ...
    @property
    def forward_allow(self) -> Sequence[str]: ...
    @property
    def database_schema(self) -> str: ...
    @property
    def keys(self) -> Mapping[str, Sequence[KeyLike]]: ...


class Archiver:
    """Fetches the signed PDF of an envelope and puts it on a shelf.

    `keys` are those of each account with which Atlas may be called; `schema` is where the
    service has its tables on PostgreSQL.
    """

    def __init__(
        self,
        *,
        atlas: Atlas,
        shelf: Shelf,
        keys: Mapping[str, Sequence[ApiKey]],
        max_bytes: int,
        schema: str | None = None,
    ) -> None:
        self._atlas = atlas
        self._shelf = shelf
        self._keys = keys
        self._max_bytes = max_bytes
        self._schema = schema

    async def __call__(self, event: Event, session: Any) -> None:
        """Keep the PDF, then write down where it is."""
        if event.envelope_id is None:
            raise GiveUp("the event names no envelope")
        if event.envelope is not None and event.envelope.erased_at is not None:
            # What a person had erased is not brought back, and that is no failure.
            await self._forgo(event, event.envelope_id)
            return
        archive = await self._keep(event, event.envelope_id)
        # The transaction begins with the first use of the session: everything slow is over.
        # Whoever erases writes that down first and removes files then, so nothing is left over
        # by an attempt that was under way.
        if await is_erased(
            session, schema=self._schema, account=event.account, envelope_id=event.envelope_id
        ):
            await self._forgo(event, event.envelope_id)
            return
        is_new = await record_archive(
            session,
            schema=self._schema,
            account=event.account,
            envelope_id=event.envelope_id,
            archive=archive,
        )
        _tell(event, archive, is_new=is_new)

    async def _forgo(self, event: Event, envelope_id: str) -> None:
        """Keep nothing; an attempt before this one may have died over its file."""
        await self._shelf.remove(stem_of(event.account, envelope_id, event.received_at))
        log.info("document.skipped", **_about(event), reason="erased")

    async def _keep(self, event: Event, envelope_id: str) -> Archive:
        url, key = await self._link(event, envelope_id)
        async with self._shelf.draft() as draft:
            try:
                await self._atlas.download(url, draft.write, key=key, max_bytes=self._max_bytes)
            except TooLarge:
                raise GiveUp(
                    f"the document is larger than ARCHIVE_MAX_BYTES, {self._max_bytes}; "
                    "nothing of it is kept"
                ) from None
            except AtlasError as error:
                raise _postponed(error) from error
            if not is_pdf(draft):
                raise GiveUp("what Atlas linked to is not a complete PDF; nothing of it is kept")
            name = _name(event, envelope_id, draft.sha256)
            await self._shelf.keep(draft, name)
        return Archive(name, draft.sha256, draft.size, at=datetime.now(UTC))

    async def _link(self, event: Event, envelope_id: str) -> tuple[str, ApiKey]:
        """Ask Atlas for the link, with the first key that it takes."""
        failure: AppError = KeyMissing(
            f"no key of the account {event.account} may be used to call Atlas: give it one in "
            'ATLAS_API_KEYS whose `use` has "call" and whose `not_after` is not over'
        )
        for key, tenant in product(self._valid_keys(event.account), _scopes(event.tenant)):
            try:
                envelope = await self._atlas.get(envelope_id, key=key, tenant=tenant)
            except (AtlasRefused, EnvelopeUnknown) as error:
                failure = error
            except AtlasError as error:
                raise _postponed(error) from error
            else:
                if envelope.pdf_url is None:
                    raise RetryLater("Atlas has no link to the signed PDF yet")
                return envelope.pdf_url, key
        raise failure

    def _valid_keys(self, account: str) -> Iterator[ApiKey]:
        now = datetime.now(UTC)
        return (key for key in self._keys.get(account, ()) if key.is_valid(at=now))


def callbacks(settings: ArchiveSettings) -> Callbacks:
    """Make the callback that the settings ask for; raises `ConfigError`."""
    atlas = Atlas(settings.atlas_base_url, allow=settings.forward_allow)
    archiver = Archiver(
        atlas=atlas,
        shelf=open_shelf(settings.archive_url),
        keys=_calling_keys(settings, atlas),
        max_bytes=settings.archive_max_bytes,
        schema=settings.database_schema,
    )
    made = Callbacks()
    made.on("envelope.signed", name="archive", timeout=TIMEOUT)(archiver)
    return made


def _calling_keys(settings: ArchiveSettings, atlas: Atlas) -> Mapping[str, Sequence[ApiKey]]:
    keys = {
        account: [
            key
            for spec in specs
            if "call" in spec.use
            and atlas.may_send(key := ApiKey(spec.key.get_secret_value(), spec.not_after))
        ]
        for account, specs in settings.keys.items()
    }
    if not any(keys.values()):
        raise ConfigError(
            "no key may be used to call Atlas, so no PDF could be fetched: set ATLAS_API_KEY to "
            "one from Atlas' dashboard (one that begins with local_ was made here and never leaves)"
        )
    return keys


def is_pdf(draft: Draft) -> bool:
    """Whether it begins and ends as a PDF does; one that was cut off does not end so."""
    return b"%PDF-" in draft.head and b"%%EOF" in draft.tail


def _scopes(tenant: str | None) -> Sequence[str | None]:
    # A key that is no platform's may not name a tenant, and what an event says of its tenant
    # may be the sender's own word for it: then the key alone has to do.
    return (None,) if tenant is None else (tenant, None)


def _postponed(error: AtlasError) -> Exception:
    """Wait as long as Atlas asks for, if it does."""
    return error if error.retry_after is None else RetryLater(str(error), after=error.retry_after)


def _name(event: Event, envelope_id: str, digest: str) -> str:
    """Make the name of the file; the same in every attempt, and free of what strangers wrote."""
    known = event.envelope
    if known is not None and known.archive_name and known.archive_sha256 == digest:
        return known.archive_name
    return f"{stem_of(event.account, envelope_id, event.received_at)}{digest[:16]}.pdf"


def _tell(event: Event, archive: Archive, *, is_new: bool) -> None:
    about = {**_about(event), "name": archive.name, "bytes": archive.size}
    before = event.envelope.archive_name if event.envelope else None
    if is_new and before is not None:
        log.warning("document.replaced", **about, before=before)
    else:
        log.info("document.archived", **about, is_new=is_new)


def _about(event: Event) -> dict[str, str | None]:
    return {
        "event_id": event.id,
        "event_type": event.type,
        "envelope_id": event.envelope_id,
        "fields_status": event.envelope.fields_status if event.envelope else None,
    }
