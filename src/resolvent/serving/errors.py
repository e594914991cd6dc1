"""Errors of the HTTP server, in the JSON form of the OpenAI API."""

import logging
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, DataError, ResolventError
from .requests import DeadlineError, OverloadedError

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """Error that a client gets.

    Attributes:
        status: HTTP status.
        message: thing, value and remedy.
        param: field of the request that is at fault.
        code: name of the error.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an exception."""
    match error:
        case ApiError():
            return error
        case OverloadedError():
            return ApiError(503, str(error), code="overloaded")
        case DeadlineError():
            return ApiError(504, str(error), code="timeout")
        case ValidationError():
            return _validation_error(error)
        case ConfigError() | DataError():
            return ApiError(400, str(error), code="invalid_value")
        case ResolventError():
            return ApiError(500, str(error), code="internal_error")
        case _:
            return ApiError(500, f"unexpected {type(error).__name__}; the server's log has more", code="internal_error")


def _validation_error(error: ValidationError) -> ApiError:
    """Return the first fault of a body."""
    fault = error.errors(include_url=False, include_input=False)[0]
    place = [str(part) for part in fault["loc"]]
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {fault['msg']}", code="invalid_json")
    param = ".".join(place) or None
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field: {param}; leave it out", param=param, code="unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(400, f"the field {param} is missing", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param or 'the body'}: {fault['msg']}", param=param, code="invalid_value")


def logged(error: Exception) -> ApiError:
    """Return the error that a client gets, and log what is no fault of a client."""
    told = api_error(error)
    if told.status == 500:
        _log.error("a request failed", exc_info=error)
    return told
