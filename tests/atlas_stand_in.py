"""A server that answers as Atlas does: envelopes under /api, documents under links of their own.

It speaks HTTP on loopback, remembers what it was asked, and misbehaves if it is told to.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

KEY = "atlas_live_the-key-of-these-tests"
# Stands in every link, and must never stand in a text, a name or a row.
LINK_TOKEN = "link-canary-0123456789"
PDF = b"%PDF-1.7\n1 0 obj << /Type /Catalog >> endobj\ntrailer << >>\nstartxref\n9\n%%EOF\n"

PROGRESS = ("status", "signed_count", "total", "next_signer_email", "sign_url")


@dataclass(frozen=True)
class Asked:
    """One request, as it arrived."""

    target: str
    headers: Mapping[str, str]

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class Reply:
    """One answer; `length` is what it claims, and without one it ends with the connection."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None

    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += [] if self.length is None else [f"Content-Length: {self.length}"]
        return "\r\n".join([*lines, "", ""]).encode()


def said(value: Any, *, status: int = 200, **headers: str) -> Reply:
    """An answer in JSON."""
    body = json.dumps(value).encode()
    return Reply(body, status, headers, length=len(body))


def document(content: bytes) -> Reply:
    return Reply(content, headers={"Content-Type": "application/pdf"}, length=len(content))


class AtlasStandIn:
    """What this Atlas knows, and what it was asked."""

    def __init__(self) -> None:
        self.port = 0
        self.keys = {KEY}
        self.envelopes: dict[str, Any] = {}
        self.documents: dict[str, Reply] = {}
        # Given instead of what is known, as long as there are any.
        self.replies: list[Reply] = []
        self.asked: list[Asked] = []
        # Called before an answer leaves.
        self.on_asked: Callable[[Asked], object] = lambda _: None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.origin}/api"

    def link(self, name: str) -> str:
        return f"{self.origin}/documents/{name}?token={LINK_TOKEN}"

    def sign(self, envelope_id: str, content: bytes = PDF, **fields: Any) -> None:
        """Let an envelope be signed by all parties, and its document be there."""
        number = len(self.documents)
        self.documents[f"/documents/{number}"] = document(content)
        self.envelopes[envelope_id] = {
            "envelope_id": envelope_id,
            "status": "signed",
            "signed_pdf_url": self.link(str(number)),
            **fields,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            asked = await _read(reader)
            self.asked.append(asked)
            reply = self._reply(asked)
            self.on_asked(asked)
            writer.write(reply.head() + reply.body)
            await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    def _reply(self, asked: Asked) -> Reply:
        if asked.path in self.documents:
            return self.documents[asked.path]
        if self.replies:
            return self.replies.pop(0)
        if asked.headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
            return said({"code": "unauthorized", "message": "no"}, status=401)
        return self._known(asked)

    def _known(self, asked: Asked) -> Reply:
        if asked.path == "/api/envelopes":
            return said({"items": self._found(dict(parse_qsl(urlsplit(asked.target).query)))})
        name = asked.path.removeprefix("/api/envelope/")
        envelope = self.envelopes.get(unquote(name.removesuffix("/status")))
        if envelope is None:
            return said({"code": "not_found", "message": "no"}, status=404)
        if name.endswith("/status"):
            return said({field: envelope.get(field) for field in PROGRESS})
        return said(envelope)

    def _found(self, wanted: Mapping[str, str]) -> list[Any]:
        return [
            envelope
            for envelope in self.envelopes.values()
            if all(envelope.get(name) == value for name, value in wanted.items())
        ]


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    request, *lines = head.strip().split("\r\n")
    fields = (line.partition(":") for line in lines)
    return Asked(
        urlsplit(request.split(" ")[1])._replace(scheme="", netloc="").geturl(),
        {name.lower(): value.strip() for name, _, value in fields},
    )


@asynccontextmanager
async def atlas_stand_in() -> AsyncIterator[AtlasStandIn]:
    stand_in = AtlasStandIn()
    server = await asyncio.start_server(stand_in.serve, "127.0.0.1", 0)
    stand_in.port = server.sockets[0].getsockname()[1]
    try:
        yield stand_in
    finally:
        server.close()
