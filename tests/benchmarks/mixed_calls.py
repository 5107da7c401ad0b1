"""Calls of every kind by both official clients, across protocols, while upstreams fail in every way they can.

    python tests/benchmarks/mixed_calls.py --router ROUTER

One target speaks Anthropic's protocol, the other OpenAI's, and each of their answers fails with `--rate`. What a call
got is compared with what its upstream received and said, text and arguments of tools byte for byte; upstreams' bills
and the gateway's own count are compared too. Prints how the calls of each client ended as a JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import openai

sys.path.insert(0, str(Path(__file__).parents[1]))

from gateway import Gateway, write_pool
from messages_protocol import read_messages
from openai_protocol import Answer, answer, read_chat, read_responses
from upstream import Call, Fault, Upstream

PROTOCOLS = {"big": {"protocol": "anthropic", "responses": False}, "small": {"protocol": "openai"}}
TIMEOUT_S, PATIENCE_S, CONCURRENCY = 5.0, 60.0, 24
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
# Quotes, escapes, a line end of some parsers, letters of four bytes, and one made of several code points.
WORDS = ["Straße", "漢字", "🎉", "\\", '"', "\u2028", "<tag>", "e\u0301", "👩‍👩‍👧", "{}", "\t", "data:", "[DONE]"]
FUNCTION = {"name": "weather", "description": "The weather", "parameters": SCHEMA}
TOOL = {"name": "weather", "description": "The weather", "input_schema": SCHEMA}
HARMLESS = (None, Fault.SLOW_HEAD, Fault.SLOW_CHUNKS)  # in time all the same
READERS = {"messages": read_messages, "completions": read_chat, "responses": read_responses}

Got = tuple[str, list[str]]  # the text, and the arguments of each tool that is called
Ask = Callable[[Any, str, str], Awaitable[Got]]  # a client, the model and the text


@dataclass
class Ends:
    """How the calls of one client ended."""

    calls: int = 0
    answered: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # before any token, by status and code
    broken: int = 0  # after some
    longest_s: float = 0.0
    recorded: int = 0  # by the gateway
    billed_and_failed: int = 0  # attempts whose upstream bills an answer that it did not deliver
    billed_twice: int = 0  # calls with several answers that were billed and delivered
    differing: list[str] = field(default_factory=list)


# --- OpenAI's client -------------------------------------------------------------------------------------------------


def _said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def _called(message: Any) -> list[str]:
    return [call.function.arguments for call in message.tool_calls or ()]


async def chat(client: openai.AsyncOpenAI, model: str, text: str, **fields: Any) -> Got:
    made = await client.chat.completions.create(model=model, messages=_said(text), **fields)
    return made.choices[0].message.content or "", _called(made.choices[0].message)


async def chat_stream(client: openai.AsyncOpenAI, model: str, text: str, **fields: Any) -> Got:
    said, arguments = "", dict[int, str]()
    async for chunk in await client.chat.completions.create(model=model, messages=_said(text), stream=True, **fields):
        for choice in chunk.choices:
            said += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    return said, list(arguments.values())


async def chat_tools(client: openai.AsyncOpenAI, model: str, text: str) -> Got:
    return await chat(client, model, f"weather {text}", tools=[{"type": "function", "function": FUNCTION}])


async def chat_tools_stream(client: openai.AsyncOpenAI, model: str, text: str) -> Got:
    return await chat_stream(client, model, f"weather {text}", tools=[{"type": "function", "function": FUNCTION}])


async def response(client: openai.AsyncOpenAI, _model: str, text: str) -> Got:
    return (await client.responses.create(model="auto", input=text)).output_text, []


async def response_stream(client: openai.AsyncOpenAI, _model: str, text: str) -> Got:
    said = ""
    async for event in await client.responses.create(model="auto", input=text, stream=True):
        if event.type == "response.output_text.delta":
            said += event.delta
        if event.type in ("error", "response.failed"):
            raise openai.APIError("failed midway", None, body=None)  # type: ignore[arg-type]
    return said, []


# --- Anthropic's client ----------------------------------------------------------------------------------------------


def _parts(message: anthropic.types.Message) -> Got:
    text = "".join(block.text for block in message.content if block.type == "text")
    return text, [json.dumps(block.input) for block in message.content if block.type == "tool_use"]


async def message(client: anthropic.AsyncAnthropic, model: str, text: str, **fields: Any) -> Got:
    return _parts(await client.messages.create(model=model, messages=_said(text), max_tokens=1000, **fields))


async def message_stream(client: anthropic.AsyncAnthropic, model: str, text: str, **fields: Any) -> Got:
    async with client.messages.stream(model=model, messages=_said(text), max_tokens=1000, **fields) as stream:
        return _parts(await stream.get_final_message())


async def message_tools(client: anthropic.AsyncAnthropic, model: str, text: str) -> Got:
    return await message(client, model, f"weather {text}", tools=[TOOL])


async def message_tools_stream(client: anthropic.AsyncAnthropic, model: str, text: str) -> Got:
    return await message_stream(client, model, f"weather {text}", tools=[TOOL])


OPENAI: Sequence[Ask] = (chat, chat_stream, chat_tools, chat_tools_stream, response, response_stream)
ANTHROPIC: Sequence[Ask] = (message, message_stream, message_tools, message_tools_stream)


# --- both ------------------------------------------------------------------------------------------------------------


async def asked(client: Any, asks: Sequence[Ask], texts: Sequence[str], rng: random.Random) -> tuple[Ends, list[Any]]:
    """Sends each text, so many at once; returns how the calls ended, and what each got, or None."""
    ends, gate = Ends(calls=len(texts)), asyncio.Semaphore(CONCURRENCY)
    kinds = [(rng.choice(asks), rng.choice(["auto", "auto", "big", "small"])) for _ in texts]

    async def send(text: str, ask: Ask, model: str) -> Got | None:
        async with gate:
            began = time.monotonic()
            try:
                got = await asyncio.wait_for(ask(client, model, text), PATIENCE_S)
                ends.answered += 1
                return got
            except (openai.APIStatusError, anthropic.APIStatusError) as error:
                if error.status_code == 200:  # an error event within a stream
                    ends.broken += 1
                else:
                    body: Any = error.body or {}
                    why = f"{error.status_code} {body.get('error', body).get('code')}"
                    ends.refused[why] = ends.refused.get(why, 0) + 1
            except (openai.APIError, anthropic.APIError):
                ends.broken += 1
            finally:
                ends.longest_s = max(ends.longest_s, time.monotonic() - began)
        return None

    async with client:
        return ends, await asyncio.gather(*(send(text, *kind) for text, kind in zip(texts, kinds, strict=True)))


def _answer_of(call: Call, name: str) -> Answer:
    """What the upstream says to a request without a fault."""
    return answer(name, READERS[call.path.rpartition("/")[2]](call.body), 0)


def _last_text(call: Call) -> str:
    return READERS[call.path.rpartition("/")[2]](call.body).last_user_text


def compare(ends: Ends, texts: Sequence[str], got: Sequence[Got | None], upstreams: dict[str, Upstream]) -> None:
    """Counts what upstreams billed, and answers that are not what an upstream that received the text said."""
    received: dict[str, list[tuple[str, Call]]] = {}
    for name, upstream in upstreams.items():
        for call in upstream.completions:
            received.setdefault(_last_text(call).removeprefix("weather "), []).append((name, call.wait()))
    for text, answered in zip(texts, got, strict=True):
        came = received.get(text, [])
        billed = [call.fault in HARMLESS for _, call in came if call.billed is not None]
        ends.billed_and_failed += billed.count(False)
        ends.billed_twice += billed.count(True) > 1
        if answered is None:
            continue
        said = [_answer_of(call, name) for name, call in came]
        said_text, arguments = answered
        if not any(
            each.text == said_text
            and [json.loads("".join(pieces)) for _, pieces in each.calls] == list(map(json.loads, arguments))
            for each in said
        ):
            ends.differing.append(f"{text!r}: {answered}, but {said}")


def run(
    router: str, num_calls: int, rate: float, seed: int, folder: Path, faults: Sequence[Fault] = tuple(Fault)
) -> dict[str, Ends]:
    """How the calls of each client ended."""
    rng, found = random.Random(seed), {}
    with ExitStack() as stack:
        upstreams = {name: stack.enter_context(Upstream(name, models=(f"{name}-1",))) for name in PROTOCOLS}
        ways = {name: {"upstream": {**way, "timeout_s": TIMEOUT_S}} for name, way in PROTOCOLS.items()}
        pool = write_pool(folder / "pool.toml", upstreams, **ways)
        gateway = stack.enter_context(Gateway(router=router, pool=pool))
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
        for kind, client, asks in (
            ("openai", openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", **options), OPENAI),
            ("anthropic", anthropic.AsyncAnthropic(base_url=gateway.url, **options), ANTHROPIC),
        ):
            for number, upstream in enumerate(upstreams.values()):
                upstream.calls.clear()
                upstream.faults(*faults, rate=rate, seed=seed + number)
            texts = [f"{kind} {n} {' '.join(rng.choices(WORDS, k=rng.randint(1, 12)))}." for n in range(num_calls)]
            ends, got = asyncio.run(asked(client, asks, texts, rng))
            compare(ends, texts, got, upstreams)
            gateway.settle(num_calls * (len(found) + 1))
            ends.recorded = gateway.stats()["calls"] - num_calls * len(found)
            found[kind] = ends
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", required=True)
    parser.add_argument("--calls", type=int, default=2_000, help="of each client")
    parser.add_argument("--rate", type=float, default=0.2, help="of answers that fail")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.router, given.calls, given.rate, given.seed, Path(folder))
    sys.stdout.write(json.dumps({name: asdict(ends) for name, ends in found.items()}) + "\n")


if __name__ == "__main__":
    main()
