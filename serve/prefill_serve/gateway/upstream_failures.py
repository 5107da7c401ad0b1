"""Failures and refusals of calls to upstreams."""

from __future__ import annotations

from prefill_serve.gateway.refusals import RefusalReason


class UpstreamFailure(Exception):  # noqa: N818 - another target may answer
    """An upstream gave no usable answer; `reason` is a short metric label, `may_pass` whether a retry may succeed."""

    may_pass = True

    def __init__(
        self,
        reason: str,
        message: str,
        status: int = 502,
        retry_after_s: float = 0.0,
        said: str | None = None,
    ) -> None:
        """`message` is for the caller; `said`, the upstream's redacted message, is for the log only."""
        super().__init__(message)
        self.reason, self.status, self.retry_after_s, self.said = reason, status, retry_after_s, said

    def for_log(self, request_id: str) -> dict[str, str]:
        """Fields of a log line."""
        said = {} if self.said is None else {"said": self.said}
        return {"route_id": request_id, "reason": str(self), **said}


class UpstreamRefusal(UpstreamFailure):
    """An upstream rejected the caller's request: the response for the caller, with the redacted message."""

    def __init__(self, target: str, status: int, content: bytes, why: RefusalReason) -> None:
        super().__init__(why.kind, f"{target}: refused the request with {status}", status)
        self.content, self.why = content, why
