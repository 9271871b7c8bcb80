"""Refusal to status code, in one place: every error answer is problem+json (RFC 9457)."""

import json
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from app.errors import AppError, Gone, InvalidCursor, NotAllowed, NotFound, NotYet, TooMany
from app.store.session import DatabaseError
from app.telemetry import described, get_logger

log = get_logger("api")

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


def answer(
    status: int, detail: str, *, headers: dict[str, str] | None = None, **more: object
) -> Response:
    """Answer with a problem document."""
    return Response(
        problem(status, detail, **more),
        status,
        headers=headers,
        media_type="application/problem+json",
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
    log.warning("request.failed", error=type(error).__name__)
    return answer(503, "The database does not answer in time.", headers={"Retry-After": "5"})


def _defect(_: Request, error: Exception) -> Response:
    log.error("request.crashed", **described(error))
    return answer(500, "The service failed; its log says where.")
