"""A call of a target with a prompt: its request, its worst-case cost and its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prefill_router.common.usage import Usage, read_usage
from prefill_router.corpus.reader import Message, Prompt, content_hash
from prefill_router.policy.pool import Target
from prefill_router.upstreams.request_bodies import request_body
from prefill_router.upstreams.translation.messages_requests import messages_request
from prefill_router.upstreams.translation.untranslatable import Untranslatable

_TEMPLATE_TOKENS = 64  # an upstream may add so many to a prompt
_MESSAGE_TOKENS = 16  # and so many to each of its messages


@dataclass(frozen=True)
class Asked:
    """Request parameters, the same for every target."""

    max_output_tokens: int
    temperature: float | None = None
    seed: int | None = None


def call_key(content: str, target: str, asked: Asked) -> str:
    """Returns the key of a call, from its prompt's content hash: prompt ids may change, paid answers stay valid."""
    return hashlib.sha256(json.dumps([content, target, asdict(asked)]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TargetCall:
    prompt_id: str
    prompt: Prompt
    target: Target
    asked: Asked

    @property
    def key(self) -> str:
        """The same for every attempt, so that an upstream can use it as an idempotency key."""
        return call_key(content_hash(self.prompt), self.target.name, self.asked)

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def max_input_tokens(self) -> int:
        """An upper bound on input tokens for any tokenizer, as a token is at least one byte."""
        num_bytes = sum(len(message["content"].encode()) for message in self.messages)
        num_bytes += self.target.upstream.max_added_tokens if self.target.upstream is not None else 0
        return num_bytes + _TEMPLATE_TOKENS + _MESSAGE_TOKENS * len(self.messages)

    @property
    def worst(self) -> Spent:
        """The worst-case cost, if the upstream respects the limit on output tokens."""
        usd = self.target.most_cost(self.max_input_tokens, self.asked.max_output_tokens)
        return Spent(usd, self.max_input_tokens + self.asked.max_output_tokens)

    @property
    def path(self) -> str:
        """The path below the upstream's base URL."""
        assert self.target.upstream is not None
        return "/chat/completions" if self.target.upstream.protocol == "openai" else "/messages"

    def body(self) -> bytes:
        """The request's body. Raises Untranslatable if the upstream's protocol cannot ask for all of it."""
        assert self.target.upstream is not None
        upstream = self.target.upstream
        fields: dict[str, Any] = {
            "messages": self.messages,
            upstream.limit_field: self.asked.max_output_tokens,
        }
        for name in ("temperature", "seed"):
            if (value := getattr(self.asked, name)) is not None:
                fields[name] = value
        if upstream.protocol == "anthropic":
            fields, dropped = messages_request(fields)
            if dropped:
                raise Untranslatable(", ".join(dropped))
        return json.dumps(request_body(self.target, fields)).encode()


@dataclass(frozen=True)
class Spent:
    """Money and tokens."""

    usd: float = 0.0
    tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.usd + other.usd, self.tokens + other.tokens)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.usd - other.usd, self.tokens - other.tokens)

    def beyond(self, limit: Spent) -> Spent:
        """Returns the excess over a limit, 0 if below it."""
        return Spent(max(0.0, self.usd - limit.usd), max(0, self.tokens - limit.tokens))

    def fits(self, limit: Spent) -> bool:
        return self.usd <= limit.usd and self.tokens <= limit.tokens


@dataclass(frozen=True)
class TargetAnswer:
    """A target's answer. Token counts are None without a usage, or if it has no output for a text.

    The worst case then counts as spent.
    """

    text: str
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int
    latency_s: float
    cache_write_tokens: int = 0
    cache_write_long_tokens: int = 0

    @property
    def is_counted(self) -> bool:
        """Whether the upstream reported the answer's tokens."""
        return self.input_tokens is not None and self.output_tokens is not None

    def spent(self, call: TargetCall) -> Spent:
        if self.input_tokens is None or self.output_tokens is None:
            return call.worst
        cache = self.cached_tokens, self.cache_write_tokens, self.cache_write_long_tokens
        usd = call.target.cost(*Usage(self.input_tokens, self.output_tokens, *cache))
        return Spent(usd, self.input_tokens + self.output_tokens)


def parse_answer(body: Mapping[str, Any], latency_s: float) -> TargetAnswer | None:
    """Reads the answer from the body of a chat completion; returns None if there is none."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return None
    text, reason = message.get("content") or message.get("refusal") or "", choices[0].get("finish_reason")
    usage = read_usage(body.get("usage"))
    if usage is None or (text and not usage.output_tokens):
        counts: dict[str, Any] = {"input_tokens": None, "output_tokens": None, "cached_tokens": 0}
    else:
        counts = usage._asdict()
    return TargetAnswer(
        text=text if isinstance(text, str) else json.dumps(text),
        finish_reason=reason if isinstance(reason, str) else None,
        latency_s=latency_s,
        **counts,
    )
