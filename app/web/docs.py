"""The page about the API, and its schema: from this service alone, without the internet.

In production both want a token, as `Bearer`, or as the password that a browser asks for.
"""

import base64
import binascii
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from app.web.deps import Tokens

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="Atlas Receiver", charset="UTF-8"'}
# They come with the package; only these two of its files are shown.
_FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Atlas Receiver: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="stylesheet" href="docs/page.css">
</head>
<body>
<main id="swagger-ui"><p>This page needs JavaScript; <a href="openapi.json">the schema</a>
does not.</p></main>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/page.js"></script>
</body>
</html>
"""
_SCRIPT = """"use strict";
window.ui = SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#swagger-ui",
  presets: [SwaggerUIBundle.presets.apis],
  deepLinking: true,
  docExpansion: "list",
  displayRequestDuration: true,
  // Asks nobody elsewhere whether the schema is valid.
  validatorUrl: null,
  // A token lives no longer than the page.
  persistAuthorization: false,
});
"""
_STYLE = """body { margin: 0; }
.swagger-ui .wrapper { padding: 0 clamp(8px, 3vw, 20px); }
.swagger-ui .opblock .opblock-summary-path { word-break: break-word; }
.swagger-ui :focus-visible { outline: 2px solid #1a4fd6; outline-offset: 2px; }
.swagger-ui table, .swagger-ui pre { display: block; max-width: 100%; overflow-x: auto; }
"""


async def guard(request: Request) -> None:
    """In production, let those in who have a token of scope `read`."""
    state = request.app.state
    if not state.is_production:
        return
    tokens: Tokens = state.tokens
    found = tokens.recognise(_token_of(request.headers.get("authorization", "")))
    if found is None or "read" not in found.scopes:
        raise HTTPException(
            401, "This needs a token of API_TOKENS, for example as a password.", headers=_CHALLENGE
        )


def _token_of(header: str) -> bytes:
    scheme, _, value = header.partition(" ")
    # Starlette reads headers as latin-1; this gives back the bytes that were sent.
    given = value.strip(" \t").encode("latin-1")
    if scheme.lower() != "basic":
        return given if scheme.lower() == "bearer" else b""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


Guard = Annotated[None, Depends(guard)]

router = APIRouter(include_in_schema=False)


# Not asynchronous, so that it runs in a thread: the first time takes long.
@router.get("/openapi.json")
def schema(request: Request, _: Guard) -> JSONResponse:
    """Give the OpenAPI document of this listener."""
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def page(_: Guard) -> HTMLResponse:
    """Show the page."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": POLICY})


@router.get("/docs/page.js")
async def script(_: Guard) -> Response:
    """Start the page: no script stands in it."""
    return Response(_SCRIPT, media_type="text/javascript")


@router.get("/docs/page.css")
async def style(_: Guard) -> Response:
    """Make it fit on a phone, and show where the keyboard is."""
    return Response(_STYLE, media_type="text/css")


@router.get("/docs/{name}")
def part(name: str, _: Guard) -> Response:
    """Give a file of Swagger UI."""
    if name not in _FILES:
        raise HTTPException(404)
    content = files("fastapi_offline").joinpath("static", name).read_bytes()
    kept = {"Cache-Control": "private, max-age=3600"}
    return Response(content, media_type=_FILES[name], headers=kept)
