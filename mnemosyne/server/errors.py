"""Errors as clients of OpenAI's API read them."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

INVALID, NOT_FOUND, OVERLOADED, FAILED = (
    "invalid_request_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
)


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: *name* must *rule*, got *value*; *remedy*.
        kind: ``error.type``.
        param: the field that is wrong.
        code: for programs, such as ``model_not_found``.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = headers or {}

    def body(self) -> bytes:
        return msgspec.json.encode(error_object(str(self), self.kind, self.param, self.code))


def error_object(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error, alone or as an event of a stream."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(error: ValueError) -> ApiError:
    """A refusal of our own, whose first word is the field."""
    name = re.match(r"[\w.\[\]]+", str(error))
    return ApiError(400, str(error), param=name[0] if name else None)


def too_much(message: str, retry_after_s: float, *, status: int = 429) -> ApiError:
    """Make an error that passes: the client may come again."""
    seconds = max(1, math.ceil(retry_after_s))
    return ApiError(
        status,
        message,
        kind=OVERLOADED if status == 429 else FAILED,
        code="overloaded",
        headers={"Retry-After": str(seconds)},
    )
