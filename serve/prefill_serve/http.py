"""What goes over the wire: requests, answers and errors of the endpoint."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from prefill_router.config import StrictModel
from prefill_router.corpus import Prompt, check_messages
from prefill_router.decision import Policy
from prefill_router.errors import UserError


class Message(StrictModel):
    role: str = Field(min_length=1)
    content: str


class RouteRequest(StrictModel):
    """A prompt, bare or as messages, and what the caller wants of the decision."""

    prompt: str | None = Field(None, min_length=1, description="A bare prompt; or give messages")
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(None, description="A conversation")
    tolerance: float | None = Field(None, ge=0.0, le=1.0, description="Give up at most this much P(correct)")
    allowed: list[str] | None = Field(None, min_length=1, description="Targets to choose from")
    max_cost_usd: float | None = Field(None, ge=0.0, description="No target that is expected to cost more")
    min_p: float | None = Field(None, ge=0.0, le=1.0, description="No target with a lower P(correct)")

    def to_prompt(self) -> Prompt:
        """Raises UserError unless exactly one of prompt and messages was given, and the messages are a conversation."""
        if (self.prompt is None) == (self.messages is None):
            raise UserError("give either prompt or messages")
        if self.prompt is not None:
            return self.prompt
        return check_messages([message.model_dump() for message in self.messages or []], "request")

    def to_policy(self) -> Policy:
        return Policy(self.tolerance, self.allowed, self.max_cost_usd, self.min_p)


class RouteResponse(StrictModel):
    """The decision, and the estimates behind it by target."""

    target: str
    p_correct: dict[str, float]
    expected_output_tokens: dict[str, float]
    expected_cost_usd: dict[str, float]
    input_tokens: int
    is_truncated: bool
    router_version: str


class Health(StrictModel):
    status: str
    router_version: str
    encoder: str
    targets: list[str]


def error_body(message: str, code: str) -> dict[str, Any]:
    """An error in the shape of the OpenAI API."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
