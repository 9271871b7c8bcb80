"""Which errors blame the data, and which the moment."""

import ssl

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from app.store.session import blames_data, is_disconnect, sqlstate


class _WithCode(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.sqlstate = code


def wrapped(error: BaseException) -> DBAPIError:
    return DBAPIError("INSERT", (), error)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(wrapped(_WithCode("22021")), id="22-data"),
        pytest.param(wrapped(_WithCode("23505")), id="23-integrity"),
        pytest.param(_WithCode("54000"), id="54-limits"),
        pytest.param(asyncpg.DataError("argument"), id="driver-refuses-an-argument"),
        pytest.param(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogate"), id="surrogate"),
        pytest.param(OverflowError(), id="beyond-64-bits"),
        pytest.param(ValueError(), id="no-json"),
    ],
)
def test_these_blame_the_data(error: BaseException) -> None:
    assert blames_data(error)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(wrapped(_WithCode("40001")), id="40-serialisation"),
        pytest.param(wrapped(_WithCode("55P03")), id="55-lock-timeout"),
        pytest.param(wrapped(_WithCode("53300")), id="53-too-many-connections"),
        pytest.param(wrapped(_WithCode("57P01")), id="57-shutdown"),
        pytest.param(ConnectionResetError(), id="reset"),
        pytest.param(TimeoutError(), id="late"),
        pytest.param(PoolTimeoutError(), id="no-free-connection"),
        # Both are ValueErrors as well; quarantine would punish the event for them.
        pytest.param(ssl.SSLCertVerificationError(), id="certificate"),
        pytest.param(wrapped(ssl.SSLCertVerificationError()), id="certificate-wrapped"),
        pytest.param(asyncpg.exceptions.ClientConfigurationError("sslmode"), id="wrong-url"),
        pytest.param(LookupError(), id="defect"),
    ],
)
def test_these_do_not(error: BaseException) -> None:
    assert not blames_data(error)


def test_a_code_that_is_no_text_is_no_code() -> None:
    error = ValueError()
    error.sqlstate = 42  # type: ignore[attr-defined]

    assert sqlstate(error) is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        asyncpg.ConnectionDoesNotExistError(),
        asyncpg.InternalClientError("in the middle of an answer"),
        TimeoutError(),
    ],
)
def test_a_lost_connection_is_known_as_such(error: BaseException) -> None:
    assert is_disconnect(error)
