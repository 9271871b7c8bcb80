"""Refusal to status code, in one place: every error answer is problem+json (RFC 9457)."""

import json
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app.errors import AppError, Gone, InvalidCursor, NotAllowed, NotFound, NotYet, TooMany
from app.store.session import DatabaseError, sqlstate
from app.telemetry import described, get_logger

log = get_logger("api")

MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """Why a request was not answered as asked (RFC 9457)."""

    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no envelope env_1 here."])


_STATUSES: dict[type[AppError], int] = {
    NotFound: 404,
    NotAllowed: 409,
    Gone: 410,
    InvalidCursor: 422,
    TooMany: 429,
    NotYet: 503,
}


def problem(status: int, detail: str, **more: object) -> bytes:
    """Write one problem document; it never says more than the caller may know."""
    document = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return json.dumps(document).encode()


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe, for OpenAPI, the refusals of a route; those of every route are added."""
    return {
        status: {
            "description": _MEANINGS.get(status, HTTPStatus(status).phrase),
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in sorted({401, 403, 422, 503, *statuses})
    }


_MEANINGS = {
    400: "The body cannot be read",
    401: "No token of API_TOKENS",
    403: "The token has not the scope",
    404: "There is none, or it belongs to an account that this token may not see",
    408: "The body did not arrive in time",
    409: "What is there forbids it, or the request fits more than one",
    410: "It was there, and will not come back",
    422: "The request has values that cannot be used",
    429: "As many as may wait do so already",
    503: "The database does not answer in time, or what was waited for has not come",
}
# PostgreSQL's word for a row that somebody else did not let go in time.
_LOCKED = "55P03"


def answer(
    status: int, detail: str, *, headers: dict[str, str] | None = None, **more: object
) -> Response:
    """Answer with a problem document."""
    return Response(
        problem(status, detail, **more),
        status,
        headers=headers,
        media_type=MEDIA_TYPE,
    )


def install(app: FastAPI) -> None:
    """Make every error of the API a problem document."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    for refusal in _STATUSES:
        app.add_exception_handler(refusal, _refused)
    for kind in DatabaseError:
        app.add_exception_handler(kind, _database)
    app.add_exception_handler(Exception, _defect)


def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # registered for nothing else
    return answer(error.status_code, error.detail, headers=dict(error.headers or {}))


def _validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # registered for nothing else
    problems = [
        {"where": ".".join(str(part) for part in item["loc"]), "what": item["msg"]}
        for item in error.errors()
    ]
    return answer(422, "The request has values that cannot be used.", errors=problems)


def _refused(_: Request, error: Exception) -> Response:
    status = next(code for kind, code in _STATUSES.items() if isinstance(error, kind))
    headers = {"Retry-After": "1"} if status in {429, 503} else None
    return answer(status, str(error), headers=headers)


def _database(_: Request, error: Exception) -> Response:
    code = sqlstate(error)
    log.warning("request.failed", error=type(error).__name__, sqlstate=code)
    if code == _LOCKED:
        text = "Somebody else is just changing what this asks for: ask again."
        return answer(503, text, headers={"Retry-After": "1"})
    return answer(503, "The database does not answer in time.", headers={"Retry-After": "5"})


def _defect(_: Request, error: Exception) -> Response:
    log.error("request.crashed", **described(error))
    return answer(500, "The service failed; its log says where.")
