"""An upstream that keeps a ledger of its own: what it bills each call, counted apart from prefill_router.

The last user message is a bill as JSON, which the upstream reports in the usage of its API and books:

with BillingUpstream() as upstream:
    ...  # send Bill(prompt=10, text=4, reasoning=6, reasoning_is_apart=True) to upstream.url, for the model "tiered"
    assert upstream.ledger["tiered", "whole"] == Decimal("0.00012")
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from aiohttp import web

from loopback import LoopbackServer

MILLION = 1_000_000
# USD per million tokens: input, output, read from a cache, written to it, written for an hour. Inputs of more tokens
# than a bound cost what is beside it; the last bound that is exceeded counts.
PRICE_LISTS: dict[str, list[tuple[int, str, str, str, str, str]]] = {
    "plain": [(0, "0.15", "0.6", "0.15", "0.15", "0.15")],
    "tiered": [
        (0, "2.5", "15", "0.25", "3.125", "5"),
        (272_000, "5", "22.5", "0.5", "6.25", "10"),
        (400_000, "10", "30", "1", "12.5", "20"),
    ],
    "message": [(0, "3", "15", "0.3", "3.75", "6"), (200_000, "6", "22.5", "0.6", "7.5", "12")],
    "free": [(0, "0", "0", "0", "0", "0")],
}
USD_PER_ANSWER = {"plain": "0.0005"}


@dataclass(frozen=True)
class Bill:
    """Tokens of a call. `prompt` includes those of the cache; `text` is that of each of the `answers`."""

    prompt: int
    text: int
    reasoning: int = 0
    reasoning_is_apart: bool = False  # from the output that is reported, though not from the total
    cached: int = 0
    written: int = 0
    written_1h: int = 0  # of those written, kept for an hour, or 12 hours in a response
    answers: int = 1
    ends: str = "whole"  # "silent": without a usage; "cut": broken off

    def usd(self, model: str) -> Decimal:
        """What the upstream bills, to the last digit."""
        prices = [line for line in PRICE_LISTS[model] if self.prompt > line[0]]
        of_input, of_output, of_read, of_write, of_write_1h = map(Decimal, prices[-1][1:])
        plain = self.prompt - self.cached - self.written
        total = plain * of_input + self.cached * of_read + (self.written - self.written_1h) * of_write
        total += self.written_1h * of_write_1h + (self.text * self.answers + self.reasoning) * of_output
        return total / MILLION + self.answers * Decimal(USD_PER_ANSWER.get(model, "0"))

    def written_out(self) -> str:
        return json.dumps(asdict(self))


class BillingUpstream(LoopbackServer):
    """Answers chat completions, responses and messages; the model is the price list."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger: defaultdict[tuple[str, str], Decimal] = defaultdict(Decimal)  # by model and by how calls ended
        self.calls: Counter[tuple[str, str]] = Counter()

    async def app(self) -> web.Application:
        app = web.Application()
        for path in ("chat/completions", "responses", "messages"):
            app.router.add_post(f"/v1/{path}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bill, model = Bill(**json.loads(_last_text(body))), body["model"]
        self.ledger[model, bill.ends] += bill.usd(model)
        self.calls[model, bill.ends] += 1
        answer = {"completions": _chat, "responses": _response, "messages": _message}[request.path.rpartition("/")[2]]
        whole, events = answer(bill)
        if not body.get("stream"):
            text = json.dumps(whole)
            return web.Response(text=text[:-20] if bill.ends == "cut" else text, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(event)
            await asyncio.sleep(0)
        return response


def _last_text(body: Any) -> str:
    last = body["input"] if isinstance(body.get("input"), str) else body["messages"][-1]["content"]
    return str(last if isinstance(last, str) else last[-1]["text"])


def _event(body: Any) -> bytes:
    kind = f"event: {body['type']}\n" if "type" in body else ""
    return f"{kind}data: {json.dumps(body)}\n\n".encode()


def _totals(bill: Bill, input_name: str, output_name: str) -> dict[str, Any]:
    """A usage as OpenAI and those who speak its protocol report it."""
    made = bill.text * bill.answers
    reported = made if bill.reasoning_is_apart else made + bill.reasoning
    return {
        f"{input_name}_tokens": bill.prompt,
        f"{output_name}_tokens": reported,
        "total_tokens": bill.prompt + made + bill.reasoning,
        f"{input_name}_tokens_details": {
            "cached_tokens": bill.cached,
            "cache_write_tokens": bill.written,
            "cache_write_tokens_details": {"ttl_12h_tokens": bill.written_1h},
        },
        f"{output_name}_tokens_details": {"reasoning_tokens": bill.reasoning},
    }


def _chat(bill: Bill) -> tuple[Any, list[bytes]]:
    usage = _totals(bill, "prompt", "completion") if bill.ends == "whole" else None
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
    said = {"role": "assistant", "content": "words"}
    choices = [{"index": n, "message": said, "finish_reason": "stop"} for n in range(bill.answers)]
    deltas = [[{"index": n, "delta": said, "finish_reason": None}] for n in range(bill.answers)]
    ends = [[{"index": n, "delta": {}, "finish_reason": "stop"}] for n in range(bill.answers)]
    chunks = [{**head, "choices": choice} for choice in deltas + ([] if bill.ends == "cut" else ends)]
    last = [] if usage is None else [{**head, "choices": [], "usage": usage}]
    done = [] if bill.ends == "cut" else [b"data: [DONE]\n\n"]
    return {**head, "choices": choices, "usage": usage}, [*map(_event, chunks + last), *done]


def _response(bill: Bill) -> tuple[Any, list[bytes]]:
    usage = _totals(bill, "input", "output") if bill.ends == "whole" else None
    part = {"type": "output_text", "text": "words", "annotations": []}
    item = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}
    whole = {"id": "r", "object": "response", "status": "completed", "model": "m", "output": [item], "usage": usage}
    events = [{"type": "response.output_text.delta", "delta": "words"}]
    if bill.ends != "cut":
        events.append({"type": "response.completed", "response": whole})
    return whole, list(map(_event, events))


def _message(bill: Bill) -> tuple[Any, list[bytes]]:
    split = {
        "ephemeral_5m_input_tokens": bill.written - bill.written_1h,
        "ephemeral_1h_input_tokens": bill.written_1h,
    }
    of_input = {
        "input_tokens": bill.prompt - bill.cached - bill.written,
        "cache_creation_input_tokens": bill.written,
        "cache_read_input_tokens": bill.cached,
        "cache_creation": split,
    }
    usage = {**of_input, "output_tokens": bill.text + bill.reasoning} if bill.ends == "whole" else None
    head = {"id": "m", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None}
    whole = {**head, "content": [{"type": "text", "text": "words"}], "stop_reason": "end_turn", "usage": usage}
    begun = {**head, "content": [], "stop_reason": None, "usage": {**of_input, "output_tokens": 1}}
    events: list[Any] = [
        {"type": "message_start", "message": begun if usage else {**begun, "usage": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "words"}},
        {"type": "content_block_stop", "index": 0},
    ]
    if bill.ends != "cut":
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        made = {"output_tokens": bill.text + bill.reasoning}  # also after a start without a usage
        events += [{"type": "message_delta", "delta": delta, "usage": made}, {"type": "message_stop"}]
    return whole, list(map(_event, events))
