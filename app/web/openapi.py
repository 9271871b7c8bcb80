"""The OpenAPI document: what FastAPI writes of the routes, made complete.

The door is no route, but part of the contract, so it is written by hand. Refusals and
tokens, which are the same everywhere, are written here once for all routes.
"""

from typing import Any, Final

from fastapi.routing import APIRoute

from app.web.errors import MEDIA_TYPE, Problem, problems

TITLE: Final = "Atlas Receiver"
SUMMARY: Final = "Receives Atlas' e-signature webhooks, and answers what became of them."
# In the order in which a reader meets them.
TAGS: Final = {
    "webhooks": "The one door that Atlas knows: `webhook_url`. Signed, not behind a token.",
    "envelopes": "The state of envelopes, under the paths and names that Atlas uses.",
    "events": "What Atlas said: one event, its bytes, and doing it again.",
    "feed": "What happened since a place: one order for all, by long-poll and as a stream.",
    "deliveries": "What is owed to callbacks.",
    "failures": "Dead letters, grouped by cause.",
    "callbacks": "Who is owed events, and whether it is let through.",
    "stats": "Counts and rates over time.",
    "health": "Whether the process lives, and what it counts.",
}
SCHEME: Final = "token"
_OPEN: Final = frozenset({"/livez", "/readyz"})
_METHODS: Final = frozenset({"get", "put", "post", "delete", "patch", "head", "options"})

_RECEIPT = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["outcome", "event_id"],
            "properties": {
                "outcome": {
                    "type": "string",
                    "enum": ["recorded", "duplicate", "conflict", "quarantined"],
                },
                "event_id": {"type": "string", "format": "uuid"},
            },
        },
        "example": {"outcome": "recorded", "event_id": "0199a1b2-7c3d-7e4f-8a5b-6c7d8e9f0a1b"},
    }
}
_EVENT_EXAMPLE = {
    "event": "envelope.signed",
    "envelope_id": "env_1",
    "status": "signed",
    "parties": [{"email": "ada@example.com", "status": "signed"}],
}
_SIGNATURE = {
    "name": "X-Atlas-Signature",
    "in": "header",
    "required": True,
    "description": "`sha256=` and the hex HMAC-SHA256 of the raw body, keyed by the API key.",
    "schema": {"type": "string", "pattern": "^sha256=[0-9A-Fa-f]{64}$"},
}
_ACCOUNT = {
    "name": "account",
    "in": "path",
    "required": True,
    "description": "Only the keys of this account count.",
    "schema": {"type": "string", "minLength": 1, "pattern": "^[^/]+$"},
}
_REFUSALS = {
    "400": "The request is incomplete or malformed",
    "401": "Not proven to be from Atlas; nothing is stored",
    "405": "POST only",
    "413": "The body is too large",
    "415": "The body has a content encoding",
    "503": "Not known to be durable in time; send it again after `Retry-After`",
}
_PROBLEM = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def operation_id(route: APIRoute) -> str:
    """Name a route for programs: by its tag and its function, whatever its path."""
    tag = str(route.tags[0]) if route.tags else "api"
    return f"{tag}_{route.name.strip('_')}"


def complete(document: dict[str, Any], *, has_door: bool) -> dict[str, Any]:
    """Add what all routes share, and the door's two paths if it is there."""
    if has_door:
        _describe_door(document["paths"])
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema()
    document["components"]["securitySchemes"] = {
        SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "description": "A token of `API_TOKENS`. Scopes: `read`, `operate`, `raw`.",
        }
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method in _METHODS:
                _complete_operation(path, operation)
    used = _used_tags(document)
    document["tags"] = [{"name": n, "description": t} for n, t in TAGS.items() if n in used]
    return document


def _complete_operation(path: str, operation: dict[str, Any]) -> None:
    if path in _OPEN:
        operation["security"] = []
    elif "webhooks" not in operation.get("tags", ()):
        operation["security"] = [{SCHEME: []}]
        # A body may be no text at all, and then nobody has looked at its values yet.
        shared = problems(400) if "requestBody" in operation else problems()
        for status, refusal in shared.items():
            operation["responses"].setdefault(str(status), refusal)
    for status, response in operation["responses"].items():
        # FastAPI's own description of a 422 is not what this service answers.
        if status[0] in "45" and path not in _OPEN:
            response["content"] = _PROBLEM
    operation["responses"] = dict(sorted(operation["responses"].items()))


def _used_tags(document: dict[str, Any]) -> set[str]:
    return {
        tag
        for operations in document["paths"].values()
        for method, operation in operations.items()
        if method in _METHODS
        for tag in operation.get("tags", ())
    }


def _describe_door(paths: dict[str, Any]) -> None:
    paths["/webhooks/atlas"] = {"post": _operation("receive", [_SIGNATURE])}
    paths["/webhooks/atlas/{account}"] = {
        "post": _operation("receive_for_account", [_ACCOUNT, _SIGNATURE])
    }


def _operation(name: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    refusals = {
        code: {"description": text, "content": _PROBLEM} for code, text in _REFUSALS.items()
    }
    return {
        "tags": ["webhooks"],
        "summary": "Take one signed event from Atlas",
        "description": "A 200 means: committed, on disk. Content type is ignored.",
        "operationId": f"webhooks_{name}",
        "parameters": parameters,
        "security": [],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"type": "object"}, "example": _EVENT_EXAMPLE}
            },
        },
        "responses": {
            "200": {"description": "The event is durable", "content": _RECEIPT},
            **refusals,
        },
    }
