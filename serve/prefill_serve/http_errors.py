"""Error responses, in the shapes of OpenAI's API and of Anthropic's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from prefill_router.common.validation import StrictModel

_MESSAGES = "/v1/messages"


class ErrorDetail(StrictModel):
    message: str
    type: str
    param: str | None = None
    code: str


class ErrorResponse(StrictModel):
    """An error in the shape of the OpenAI API."""

    error: ErrorDetail


class MessagesErrorDetail(StrictModel):
    type: str
    message: str
    code: str | None = None


class MessagesErrorResponse(StrictModel):
    """An error in the shape of Anthropic's API, for calls of its Messages."""

    type: str = "error"
    error: MessagesErrorDetail


class Refusal(HTTPException):
    """An error response, raised as an exception."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.body = error_body(status, message, code, param)

    def response_at(self, path: str) -> Response:
        """The response to a request of `path`: for messages, in the shape of Anthropic's API."""
        body = messages_error(self.status_code, self.body) if path.startswith(_MESSAGES) else self.body
        # json.dumps escapes lone surrogates, which a message may quote from the request.
        return Response(json.dumps(body), self.status_code, self.headers, "application/json")


def error_type(status: int) -> str:
    """The `type` of errors with this status in OpenAI's API."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    detail = ErrorDetail(message=message, type=error_type(status), param=param, code=code)
    return ErrorResponse(error=detail).model_dump()


def messages_error(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """The body of an error in the shape of Anthropic's API, with our code or the upstream's."""
    error = body["error"]
    kind = _MESSAGES_ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
    detail = MessagesErrorDetail(type=kind, message=error["message"], code=error.get("code"))
    return MessagesErrorResponse(error=detail).model_dump()


_MESSAGES_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
