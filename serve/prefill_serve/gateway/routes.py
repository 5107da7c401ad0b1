"""The gateway's paths: chat completions and responses in the way of OpenAI, models, stats and feedback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import Field

from prefill_router.common.validation import StrictModel
from prefill_serve.endpoint import Endpoint
from prefill_serve.gateway.openai_calls import Call, ChatCall, ResponsesCall
from prefill_serve.gateway.proxy import Caller, Proxy, Relay
from prefill_serve.gateway.state.accounts import Stats
from prefill_serve.gateway.state.call_ledger import CallLedger, Feedback
from prefill_serve.middleware.gate import HUNG_UP
from prefill_serve.wire import ROUTED_NAMES

_SESSION = "x-session-id"
_HEADERS = {
    "x-router-selected-model": "The target that answers",
    "x-router-p-correct": "Its P(correct), where the call was routed",
    "x-router-version": "The router's, where the call was routed",
}
_ANSWER: dict[str, Any] = {
    "description": "The target's own answer; `model` is its name",
    "content": {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "string"}},
    },
    "headers": {name: {"description": what, "schema": {"type": "string"}} for name, what in _HEADERS.items()},
}


class Model(StrictModel):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "prefill-router"


class ModelList(StrictModel):
    """What `model` may be in a call."""

    object: str = "list"
    data: list[Model]


class Recorded(StrictModel):
    """An outcome is kept."""

    request_id: str
    is_new: bool = Field(description="False where the same was recorded before")


def gateway_routes(endpoint: Endpoint, ledger: CallLedger, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """Routes around an endpoint; `errors` documents how they refuse."""
    proxy = Proxy(endpoint, ledger)
    endpoint.on_routed = proxy.note_routed

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await proxy.close()

    routes = APIRouter(lifespan=lifespan)

    async def answer(call: Call, http: Request) -> Response:
        caller = Caller(http.state.holder, http.state.request_id, http.headers.get(_SESSION))
        return await _unless_gone(http, proxy.answer(call, caller))

    answers: dict[int | str, dict[str, Any]] = {**errors, 200: _ANSWER}

    @routes.post("/v1/chat/completions", responses=answers, tags=["gateway"], openapi_extra=_body("messages"))
    async def chat_completions(http: Request) -> Response:
        """A chat completion by the target that the router chooses, or that `model` names.

        All fields go to the target's upstream but `tolerance`, `models`, `max_cost_usd` and `min_p_correct`, which are
        the router's. Calls with the same `x-session-id`, or the same history, stay with their target.
        """
        return await answer(ChatCall.read(await http.body()), http)

    @routes.post("/v1/responses", responses=answers, tags=["gateway"], openapi_extra=_body("input"))
    async def responses(http: Request) -> Response:
        """As chat completions, for targets whose upstreams have the Responses API."""
        return await answer(ResponsesCall.read(await http.body()), http)

    @routes.get("/v1/models", responses=errors, tags=["gateway"])
    async def models() -> ModelList:
        """ "auto", "routed", and the targets that can answer."""
        targets = endpoint.now.primary.router.pool.targets
        names = [target.name for target in targets if target.upstream is not None]
        return ModelList(data=[Model(id=name) for name in [*ROUTED_NAMES, *names]])

    @routes.get("/v1/stats", responses=errors, tags=["gateway"])
    async def stats(http: Request) -> Stats:
        """What calls cost, were expected to cost, and would have cost on one target.

        The caller's own calls; with the key of an administrator, and without keys, those of all callers.
        """
        holder = http.state.holder
        return await ledger.stats(None if endpoint.now.settings.is_admin(holder) else holder)

    @routes.post("/v1/feedback", responses=errors, tags=["gateway"])
    async def feedback(given: Feedback, http: Request) -> Recorded:
        """Says whether an answer was right. Once this is acknowledged it is kept; to repeat it changes nothing.

        Only the caller of a request can judge it. Where a caller gave several requests one id, it is the latest.
        """
        return Recorded(request_id=given.request_id, is_new=await ledger.feedback(given, http.state.holder))

    return routes


def _body(required: str) -> dict[str, Any]:
    """What of a call is read here; the rest is the upstream's to judge."""
    fields = {
        "model": {"type": "string", "default": ROUTED_NAMES[0], "description": "Or a target's name"},
        "stream": {"type": ["boolean", "null"]},
        "tolerance": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "models": {"type": ["array", "null"], "items": {"type": "string", "minLength": 1}, "minItems": 1},
        "max_cost_usd": {"type": ["number", "null"], "minimum": 0},
        "min_p_correct": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    }
    schema = {"type": "object", "required": [required], "properties": fields}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _unless_gone(http: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """The answer; or, once the caller has hung up, the end of all work on it."""

    async def hung_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, gone = asyncio.ensure_future(answering), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return Response(status_code=HUNG_UP)
    except asyncio.CancelledError:
        if work.done() and not work.cancelled() and work.exception() is None:
            answer = work.result()
            if isinstance(answer, Relay):  # it holds a place at its upstream, and is not paid for
                answer.abandon()
        raise
    finally:
        for task in (gone, work):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await gone
