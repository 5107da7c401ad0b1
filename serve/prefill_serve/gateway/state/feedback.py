"""Feedback on the answer to a call: the request model, its errors, and its state in the ledger."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel
from prefill_serve.wire import EXAMPLE_ID


class UnknownRequest(UserError):  # noqa: N818 - an answer, not a fault
    """Feedback on an unknown request."""


class ConflictingFeedback(UserError):  # noqa: N818 - an answer, not a fault
    """The request has different feedback, which is final."""


class FeedbackDisabled(UserError):  # noqa: N818 - an answer, not a fault
    """The endpoint has no folder for feedback."""


_NOT_NULL = {"not": {"type": "null"}}
_EXACTLY_ONE: list[Any] = [
    {"required": [way], "properties": {way: _NOT_NULL, other: {"type": "null"}}}
    for way, other in (("correct", "score"), ("score", "correct"))
]


class Feedback(StrictModel):
    """Whether the answer to a request was correct."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": _EXACTLY_ONE, "examples": [{"request_id": EXAMPLE_ID, "correct": True}]}
    )

    request_id: str = Field(min_length=1, description="The answer's header x-request-id")
    correct: bool | None = Field(None, description="Whether the answer was correct; or give a score")
    score: float | None = Field(None, ge=0.0, le=1.0, description="Degree of correctness")
    output_tokens: int | None = Field(None, ge=0, lt=1 << 31, description="Length of the answer [the upstream's usage]")

    @model_validator(mode="after")
    def _one(self) -> Feedback:
        if (self.correct is None) == (self.score is None):
            raise ValueError("give exactly one of correct and score")
        return self

    @property
    def value(self) -> float:
        return self.score if self.score is not None else float(bool(self.correct))


class StoredFeedback:
    """Feedback on a call; `written` completes once it is durable. Bound to one event loop."""

    def __init__(self, value: float, output_tokens: int | None) -> None:
        self.value, self.output_tokens = value, output_tokens
        self.written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
