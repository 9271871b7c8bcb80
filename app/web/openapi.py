"""The door in OpenAPI, by hand: it is no route, but it is part of the contract."""

from typing import Any

_PROBLEM = {
    "application/problem+json": {
        "schema": {
            "type": "object",
            "properties": {
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
            },
        }
    }
}
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
        }
    }
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
    "schema": {"type": "string"},
}
_REFUSALS = {
    "400": "The request is incomplete or malformed",
    "401": "Not proven to be from Atlas; nothing is stored",
    "405": "POST only",
    "413": "The body is too large",
    "415": "The body has a content encoding",
    "503": "Not known to be durable in time; send it again after `Retry-After`",
}


def _operation(operation_id: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    refusals = {
        code: {"description": text, "content": _PROBLEM} for code, text in _REFUSALS.items()
    }
    return {
        "tags": ["webhooks"],
        "summary": "Take one signed event from Atlas",
        "description": "A 200 means: committed, on disk. Content type is ignored.",
        "operationId": operation_id,
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        "responses": {
            "200": {"description": "The event is durable", "content": _RECEIPT},
            **refusals,
        },
    }


def describe_door(document: dict[str, Any]) -> dict[str, Any]:
    """Add the door's two paths to an OpenAPI document."""
    document["paths"]["/webhooks/atlas"] = {"post": _operation("receive", [_SIGNATURE])}
    document["paths"]["/webhooks/atlas/{account}"] = {
        "post": _operation("receive_for_account", [_ACCOUNT, _SIGNATURE])
    }
    return document
