"""A client for scripts: `RouterClient().route("What is 17 * 23?").selected_model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx
import tenacity

from prefill_router.common.errors import UserError
from prefill_router.upstreams.transport import retry_after_s
from prefill_serve.wire import BatchItem, BatchResponse, RouteResponse

_BUSY = (429, 503)  # retried; 409 is not: no target meets the constraints
_LONGEST_WAIT_S = 30.0


class RouteError(UserError):
    """An error response of the endpoint."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


class RouterClient:
    """Synchronous client; thread-safe. Retries connection errors, 429 and 503, and honours Retry-After."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout_s: float = 30.0, attempts: int = 5
    ) -> None:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts),
            wait=_wait,
            retry=tenacity.retry_if_exception(_is_retryable),
            reraise=True,
        )

    def route(self, prompt: str | Sequence[Mapping[str, Any]], **wants: Any) -> RouteResponse:
        """Returns the decision for a prompt or messages. `wants` are other request fields, such as `tolerance`.

        Raises RouteError for an error response, httpx.TransportError if the endpoint is unreachable.
        """
        body = {"prompt" if isinstance(prompt, str) else "messages": prompt, **wants}
        return RouteResponse.model_validate_json(self._post("/v1/route", body))

    def route_batch(
        self, prompts: Sequence[str | Sequence[Mapping[str, Any]]], **wants: Any
    ) -> list[RouteResponse | RouteError]:
        """Returns a decision, or the error of a prompt that could not be routed, for each prompt in order."""
        requests = [{"prompt" if isinstance(p, str) else "messages": p, **wants} for p in prompts]
        answer = BatchResponse.model_validate_json(self._post("/v1/route/batch", {"requests": requests}))
        return [item.response or _error(item) for item in answer.results]

    def is_ready(self) -> bool:
        try:
            return self._http.get("/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RouterClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        try:
            return self._retrying(self._post_once, path, body)
        except httpx.ConnectError as error:
            raise httpx.ConnectError(f"no endpoint at {self._http.base_url}: {error}", request=error.request) from error

    def _post_once(self, path: str, body: Mapping[str, Any]) -> bytes:
        response = self._http.post(path, json=body)
        if response.is_success:
            return response.content
        try:
            error = response.json()["error"]
            code, message = str(error["code"]), str(error["message"])
        except (ValueError, LookupError, TypeError):
            code, message = "unknown", response.text[:200]
        raise RouteError(response.status_code, code, message, retry_after_s(response.headers.get("retry-after")))


def _error(item: BatchItem) -> RouteError:
    assert item.error is not None
    return RouteError(item.status, item.error.code, item.error.message)


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, httpx.TransportError) or (isinstance(error, RouteError) and error.status in _BUSY)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked_s = error.retry_after_s if isinstance(error, RouteError) else None
    return min(asked_s or 0.1 * 2**state.attempt_number, _LONGEST_WAIT_S)
