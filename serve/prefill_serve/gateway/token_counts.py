"""Input tokens of a message: counted by an upstream of its protocol, or estimated by the encoder's tokenizer."""

from __future__ import annotations

import json
import logging
from typing import Any

from starlette.responses import Response

from prefill_serve.engine import Engine
from prefill_serve.gateway.active_call import Caller
from prefill_serve.gateway.messages_calls import TokenCountCall
from prefill_serve.gateway.openai_calls import IMAGE_TOKENS, encoded, image_parts
from prefill_serve.gateway.upstream import Channel
from prefill_serve.gateway.upstream_attempt import Attempt
from prefill_serve.gateway.upstream_failures import UpstreamFailure, UpstreamRefusal

log = logging.getLogger("ray.serve")

ESTIMATED = "x-router-estimated"


async def count_tokens(call: TokenCountCall, caller: Caller, channels: dict[str, Channel], engine: Engine) -> Response:
    """Asks the named target's upstream or, for "auto", the first that can count; otherwise estimates."""
    names = channels if call.pinned is None else [call.pinned]
    able = [channels[name] for name in names if channels[name].upstream.protocol == "anthropic"]
    for channel in [channel for channel in able if channel.is_ready][:1]:
        try:
            return _json(await channel.answer(Attempt(call, caller.name)), {})
        except UpstreamRefusal as refused:
            content = call.refusal(refused.status, refused.content)
            return Response(content, refused.status, media_type="application/json")
        except UpstreamFailure as failed:
            log.warning("tokens estimated", extra=failed.for_log(caller.request_id))
    return _json({"input_tokens": await _estimate(call, engine)}, {ESTIMATED: "encoder"})


async def _estimate(call: TokenCountCall, engine: Engine) -> int:
    """Tokens of messages and tools as JSON, by the encoder's tokenizer, and a fixed number for each image."""
    contents = [message.get("content") for message in call.messages]
    images = image_parts(contents)
    said = [[part for part in each if part not in images] if isinstance(each, list) else each for each in contents]
    text = encoded({"messages": said, "tools": call.body.get("tools")}).decode("utf-8", "replace")
    tokens, _ = await engine.tokenize(text)
    return int(next(iter(tokens.values())).full_lengths[0]) + IMAGE_TOKENS * len(images)


def _json(body: dict[str, Any], headers: dict[str, str]) -> Response:
    return Response(json.dumps(body), 200, headers, "application/json")
