"""Logs: one canonical line per fact, as JSON, or for the eyes on a terminal.

The name of a line is `noun.past-participle` and constant; everything else is a field.
Secrets, signatures, sign URLs, bodies and e-mail addresses are never among them.

A call with the field `each`, several sets of fields, writes a line for each of them, all at
once: of many facts that become true together, most of what a line costs is paid once.
"""

import json
import logging
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, BinaryIO

import structlog
from pydantic_core import PydanticSerializationError, to_json
from structlog.typing import EventDict, Processor

# Names the request that is being answered, in every line that is written meanwhile.
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_ONE: Iterable[Mapping[str, Any]] = ({},)

_encode = json.JSONEncoder(ensure_ascii=True, default=str, separators=(",", ":")).encode


def get_logger(name: str) -> Any:
    """Give the logger of one part of the service."""
    return structlog.get_logger(part=name)


@contextmanager
def answering(request_id: str) -> Iterator[None]:
    """Put this id into every line that is written meanwhile, also by tasks begun meanwhile."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def configure(*, level: str = "INFO", form: str = "auto", stream: BinaryIO | None = None) -> None:
    """Set up logging for the process; `form` is `json`, `pretty` or `auto` (by the terminal)."""
    target = stream or sys.stdout.buffer
    is_pretty = form == "pretty" or (form == "auto" and target.isatty())
    threshold = logging.getLevelNamesMapping()[level]
    structlog.configure(
        processors=_processors(is_pretty=is_pretty),
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: Lines(target),
        cache_logger_on_first_use=True,
    )
    _adopt_standard_logging(threshold)


def _processors(*, is_pretty: bool) -> list[Processor]:
    if is_pretty:
        stamper = structlog.processors.TimeStamper(fmt="iso", utc=True)
        return [structlog.processors.add_log_level, stamper, _named, _pretty()]
    return [structlog.processors.format_exc_info, _named, _to_json]


def _named(_: Any, __: str, fields: EventDict) -> EventDict:
    request_id = _request_id.get()
    if request_id is not None:
        fields.setdefault("request_id", request_id)
    return fields


def _to_json(_: Any, method: str, fields: EventDict) -> bytes:
    many = fields.pop("each", _ONE)
    shared = {
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "level": "error" if method == "exception" else method,
        "event": fields.pop("event"),
        **fields,
    }
    return b"\n".join([_line({**shared, **own}) for own in many])


def _line(fields: dict[str, Any]) -> bytes:
    # Every control and non-ASCII character is escaped: one record is one line, whatever
    # a sender put into an id.
    try:
        return to_json(fields, ensure_ascii=True, fallback=str)
    except PydanticSerializationError:
        # Half a character, as Python keeps it, is more than the quick way can write.
        return _encode(fields).encode("ascii")


def _pretty() -> Processor:
    console = structlog.dev.ConsoleRenderer(colors=True, pad_event_to=22, repr_native_str=True)

    def render(logger: Any, method: str, fields: EventDict) -> bytes:
        many = fields.pop("each", _ONE)
        lines = [console(logger, method, {**fields, **own}) for own in many]
        return "\n".join(lines).encode("utf-8", "backslashreplace")

    return render


class Lines(structlog.BytesLogger):
    """Writes lines; a pipe that is closed or a disk that is full fails no request."""

    def msg(self, message: bytes) -> None:
        """Write what was said in one call, or lose it; of no facts there is no line."""
        if not message:
            return
        with suppress(OSError, ValueError):
            super().msg(message)

    log = debug = info = warn = warning = error = critical = exception = msg


class _Adopted(logging.Handler):
    """Writes what libraries log through the standard library as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log = get_logger(record.name)
        error = record.exc_info[1] if record.exc_info else None
        fields = described(error) if error else {}
        log.log(record.levelno, "library.logged", text=record.getMessage(), **fields)


def _adopt_standard_logging(threshold: int) -> None:
    root = logging.getLogger()
    root.handlers = [_Adopted()]
    root.setLevel(max(threshold, logging.WARNING))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True


def described(error: BaseException) -> dict[str, str]:
    """Name an error and its place; what it says may quote a body or a password."""
    frames = traceback.extract_tb(error.__traceback__)
    place = {"place": f"{frames[-1].filename}:{frames[-1].lineno}"} if frames else {}
    return {"error": type(error).__name__, **place}


class Throttle:
    """Lets so many lines a second pass, and counts the others."""

    def __init__(self, *, per_second: int) -> None:
        self._per_second = per_second
        self._second = 0
        self._passed = 0
        self._suppressed = 0

    def pass_or_count(self) -> int | None:
        """Give how many were held back since the last that passed; None to hold back this."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._passed = second, 0
        if self._passed >= self._per_second:
            self._suppressed += 1
            return None
        self._passed += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
