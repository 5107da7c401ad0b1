"""A call as an upstream of either protocol is asked for it, and how the upstream's answer becomes the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from prefill_router.upstreams.translation.answer_streams import ChatStream, MessagesStream, StreamTranslator
from prefill_router.upstreams.translation.chat_requests import chat_request
from prefill_router.upstreams.translation.messages_requests import ANSWER_TOKENS, messages_request
from prefill_router.upstreams.translation.untranslatable import Untranslatable
from prefill_router.upstreams.translation.whole_answers import chat_answer, messages_answer
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.messages_calls import MessagesCall
from prefill_serve.gateway.openai_calls import ROUTER_FIELDS, Body, Call, positive_int


@dataclass(frozen=True)
class TranslatedCall:
    """A call for one protocol. Without `answer` and `stream` it is the caller's own, and nothing is translated."""

    call: Call
    dropped: Sequence[str] = ()  # fields of the caller's request that the upstream does not get
    answer: Callable[[Body], Body] | None = None
    stream: Callable[[], StreamTranslator] | None = None


def translated(call: Call, protocol: str) -> TranslatedCall:
    """Translates a call for an upstream. Raises Untranslatable."""
    if call.protocol == protocol:
        return TranslatedCall(call)
    body = {name: value for name, value in call.body.items() if name not in ROUTER_FIELDS}
    if isinstance(call, ChatCall):
        request = messages_request(body)
        asked = MessagesCall(request.body, call.answer_tokens or ANSWER_TOKENS)
        stream = partial(ChatStream, has_usage=call.wants_usage)
        return TranslatedCall(asked, request.dropped, chat_answer, stream)
    if type(call) is MessagesCall:
        limit = positive_int(body.pop("max_tokens", None)) or call.answer_tokens
        if limit is None:
            raise Untranslatable("max_tokens: not a positive integer")
        request = chat_request(body)
        dropped = [*request.dropped, *(name for name in call.headers if name == "anthropic-beta")]
        return TranslatedCall(ChatCall(request.body, limit), dropped, messages_answer, MessagesStream)
    raise Untranslatable(f"POST /v1{call.path}")
