"""Judges what an upstream did: failures, which its circuit breaker counts, and refusals, which it does not."""

from __future__ import annotations

import httpx

from prefill_router.common.redaction import redacted
from prefill_router.policy.pool import Target
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_router.upstreams.transport import UnreadableAnswer, is_passing, retry_after_s
from prefill_serve.gateway.breaker import Breaker
from prefill_serve.gateway.openai_calls import Body
from prefill_serve.gateway.refusals import refusal_reason
from prefill_serve.gateway.upstream_attempt import Attempt
from prefill_serve.gateway.upstream_errors import error_answer, error_message, refusal_body
from prefill_serve.gateway.upstream_failures import UpstreamFailure, UpstreamRefusal


class FailureJudge:
    """Maps errors of one target's upstream to failures and refusals."""

    def __init__(self, target: Target, breaker: Breaker) -> None:
        assert target.upstream is not None
        self.target, self.upstream, self.breaker = target, target.upstream, breaker

    def failure(
        self,
        attempt: Attempt,
        reason: str,
        message: str,
        status: int = 502,
        retry_after_s: float = 0.0,
        said: str | None = None,
    ) -> UpstreamFailure:
        """Counts a failure in the breaker and returns it; `said` is the upstream's message."""
        self.breaker.fail(attempt.caller, retry_after_s)
        return self._failed(reason, message, status, retry_after_s, said)

    def untranslatable(self, attempt: Attempt, error: Untranslatable) -> UpstreamFailure:
        """The failure of an answer that cannot be expressed in the caller's protocol."""
        return self.failure(attempt, "malformed", "gave an answer that cannot be translated", said=str(error))

    def _failed(
        self, reason: str, message: str, status: int = 502, retry_after_s: float = 0.0, said: str | None = None
    ) -> UpstreamFailure:
        said = None if said is None else redacted(said, self.upstream.key)
        return UpstreamFailure(reason, f"{self.target.name}: {message}", status, retry_after_s, said=said)

    def of_exception(self, attempt: Attempt, error: Exception) -> UpstreamFailure:
        # The transport's connect and write timeouts are connection failures.
        if isinstance(error, TimeoutError | httpx.ReadTimeout):
            return self.failure(attempt, "timeout", f"did not answer within {self.upstream.timeout_s:g} s", 504)
        if isinstance(error, UnreadableAnswer):
            return self.failure(attempt, "too_large", str(error))
        return self.failure(attempt, "connection", "the connection failed")

    def of_status(self, attempt: Attempt, response: httpx.Response, content: bytes) -> UpstreamFailure:
        """Maps an error status; the breaker counts it unless the caller's request or the pool caused it."""
        status, answer = response.status_code, error_answer(content)
        if (refused := self.refusal(status, answer)) is not None:
            return refused
        reason, message, said = f"status_{status}", f"answered {status}", error_message(answer)
        if 400 <= status < 500 and not is_passing(status):  # a wrong key or model name, from the pool or the caller
            self.breaker.doubt()
            failure = self._failed(reason, message, said=said)
            failure.may_pass = False
            return failure
        after_s = retry_after_s(response.headers.get("retry-after")) or 0.0
        return self.failure(attempt, reason, message, status if status in (429, 503, 504) else 502, after_s, said)

    def refusal(self, status: int, answer: Body) -> UpstreamRefusal | None:
        """The refusal of a request; None if the upstream failed, or refused a field that the target sets itself."""
        why = refusal_reason(status, answer)
        if why is None or (why.kind == "parameter" and why.name in self.upstream.extra_body):
            return None
        content = refusal_body(status, answer, self.target.name, self.upstream.key, is_too_long=why.kind == "too_long")
        return UpstreamRefusal(self.target.name, status, content, why)

    def early_refusal(self, attempt: Attempt, answer: Body) -> UpstreamRefusal | None:
        """The refusal in an error that was sent with status 200, as proxies do: its code is the status."""
        error = answer.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        refused = self.refusal(code, answer) if isinstance(code, int) else None
        attempt.is_billable = attempt.is_billable and refused is None
        return refused
