"""Turns exceptions into error responses, and documents them."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from prefill_router.common.errors import UserError
from prefill_serve.endpoint import NoTarget, NotReady, TooLong, UnknownTarget
from prefill_serve.gateway.planner import NoUpstream, UnknownAnswer
from prefill_serve.gateway.state.call_ledger import LedgerUnavailable
from prefill_serve.gateway.state.feedback import ConflictingFeedback, FeedbackDisabled, UnknownRequest
from prefill_serve.http_errors import ErrorResponse, Refusal
from prefill_serve.middleware.gate import HUNG_UP, phrase
from prefill_serve.scheduler import Overloaded
from prefill_serve.wire import in_plain_words

log = logging.getLogger("ray.serve")

_RETRY = {"description": "Seconds to wait before the next try", "schema": {"type": "integer"}}
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is malformed"},
    401: {"model": ErrorResponse, "description": "The bearer key is missing or invalid"},
    403: {"model": ErrorResponse, "description": "Forbidden for this caller, Host header, or web page"},
    404: {"model": ErrorResponse, "description": "Unknown target, request or response"},
    408: {"model": ErrorResponse, "description": "The body took too long to arrive"},
    409: {"model": ErrorResponse, "description": "No target meets the constraints"},
    413: {"model": ErrorResponse, "description": "The body or the prompt is too long"},
    415: {"model": ErrorResponse, "description": "The content type is not JSON"},
    429: {
        "model": ErrorResponse,
        "description": "The queue is full, or a hard budget limit is reached",
        "headers": {"Retry-After": _RETRY},
    },
    500: {"model": ErrorResponse, "description": "Internal error, or the request crashed two replicas"},
    502: {"model": ErrorResponse, "description": "No upstream gave a usable answer"},
    504: {"model": ErrorResponse, "description": "No upstream answered in time"},
    503: {
        "model": ErrorResponse,
        "description": "Not ready; the message says what the endpoint waits for",
        "headers": {"Retry-After": _RETRY},
    },
}
_OF_USERS: dict[type[UserError], tuple[int, str]] = {
    TooLong: (413, "prompt_too_long"),
    UnknownTarget: (404, "model_not_found"),
    NoTarget: (409, "no_target"),
    NoUpstream: (404, "no_upstream"),
    FeedbackDisabled: (404, "no_feedback"),
    UnknownRequest: (404, "request_not_found"),
    ConflictingFeedback: (409, "other_feedback"),
    UnknownAnswer: (404, "response_not_found"),
}


def refusal_of(error: Exception) -> Refusal:
    """The HTTP response for an exception."""
    if isinstance(error, Overloaded):
        after = {"retry-after": str(math.ceil(error.retry_after_s))}
        return Refusal(429, str(error), "overloaded", headers=after)
    if isinstance(error, NotReady):
        message = f"not ready: {error}: try again in a few seconds"
        return Refusal(503, message, "not_ready", headers={"retry-after": "2"})
    if isinstance(error, LedgerUnavailable):
        message = "the ledger is unavailable: try again in a few seconds"
        return Refusal(503, message, "ledger_away", headers={"retry-after": "2"})
    if isinstance(error, ClientDisconnect):
        return Refusal(HUNG_UP, "the caller closed the connection", "hung_up")
    if isinstance(error, UserError):
        status, code = _OF_USERS.get(type(error), (400, "invalid_request"))
        return Refusal(status, str(error), code)
    log.exception("request failed", exc_info=error)
    return Refusal(500, "internal error: see the endpoint's log for this request id", "internal_error")


def error_response(request: Request, error: Exception) -> Response:
    """The response to a request that raised an exception."""
    path = request.url.path
    if isinstance(error, Refusal):
        return error.response_at(path)
    if isinstance(error, HTTPException):
        status = error.status_code
        message = f"{request.method} {path}: {phrase(status)}" if status in (404, 405) else error.detail
        return Refusal(status, message, phrase(status).replace(" ", "_"), headers=error.headers).response_at(path)
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part != "body")
        if problem["type"] == "json_invalid":
            reason, position = problem["ctx"]["error"], int(key) + 1
            message = f"the body is not valid JSON: {reason} at character {position:,}"
            return Refusal(400, message, "invalid_request").response_at(path)
        message = f"{key}: {in_plain_words(problem)}" if key else f"the body: {in_plain_words(problem)}"
        return Refusal(400, message, "invalid_request", key or None).response_at(path)
    return refusal_of(error).response_at(path)


def add_error_handlers(api: FastAPI) -> None:
    """Makes `api` answer every exception by `error_response`."""

    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    for kind in (
        UserError,
        Overloaded,
        NotReady,
        LedgerUnavailable,
        ClientDisconnect,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        api.add_exception_handler(kind, on_error)
