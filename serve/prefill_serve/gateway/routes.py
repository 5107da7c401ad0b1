"""The gateway's HTTP paths: OpenAI's chat completions, responses and models; Anthropic's messages; stats, feedback."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import Field

from prefill_router.common.errors import UserError
from prefill_router.common.validation import StrictModel
from prefill_serve.endpoint import Endpoint
from prefill_serve.gateway.active_call import Caller
from prefill_serve.gateway.chat_calls import ChatCall
from prefill_serve.gateway.messages_calls import MessagesCall, TokenCountCall
from prefill_serve.gateway.openai_calls import ROUTER_FIELDS, Call
from prefill_serve.gateway.proxy import Proxy
from prefill_serve.gateway.relay import Relay
from prefill_serve.gateway.responses_calls import ResponsesCall
from prefill_serve.gateway.session_ids import session_id
from prefill_serve.gateway.state.accounts import Stats
from prefill_serve.gateway.state.call_ledger import CallLedger
from prefill_serve.gateway.state.feedback import Feedback
from prefill_serve.http_errors import MessagesErrorResponse
from prefill_serve.middleware.gate import HUNG_UP
from prefill_serve.wire import QUESTION, REQUEST_ID, ROUTED_NAMES, RouteRequest

CALL_PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")  # whose functions take a request alone
_Errors = dict[int | str, dict[str, Any]]
_ROUTE_FIELDS = RouteRequest.model_json_schema()["properties"]
_HEADERS = {
    "x-router-selected-model": "The target that answers",
    "x-router-conversation": "Whether the conversation kept its target or moved, and why, unless the call begins one",
    "x-router-p-correct": "Its P(correct), if the call was routed",
    "x-router-left-out": "Fields of the call that were not sent, as the target's model was seen to refuse them",
    "x-router-version": "The router's version, if the call was routed",
    "x-router-dropped": "Fields that the target's protocol lacks",
    "x-router-excluded": "Targets whose protocol cannot express the call, and why",
    "x-router-missing-encoders": "Encoders that failed, if the call was routed without one, separated by commas",
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
    """Values of `model` in a call."""

    object: str = "list"
    data: list[Model]


class Recorded(StrictModel):
    """Confirms that an outcome is stored."""

    request_id: str
    is_new: bool = Field(description="False if the same feedback was recorded before")


def gateway_routes(endpoint: Endpoint, ledger: CallLedger, errors: _Errors) -> APIRouter:
    """Returns the gateway's routes; `errors` documents their error responses."""
    proxy = Proxy(endpoint, ledger)
    endpoint.on_routed = proxy.record_decision

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await proxy.close()

    routes = APIRouter(lifespan=lifespan)
    _add_openai_calls(routes, proxy, errors)
    _add_anthropic_calls(routes, proxy, errors)
    _add_state(routes, endpoint, ledger, errors)
    return routes


def _add_openai_calls(routes: APIRouter, proxy: Proxy, errors: _Errors) -> None:
    answers: _Errors = {**errors, 200: _ANSWER}

    @routes.post("/v1/chat/completions", responses=answers, tags=["gateway"], openapi_extra=_body(_CHAT))
    async def chat_completions(http: Request) -> Response:
        """Answer a chat completion with the target that the router chooses, or that `model` names.

        All fields are passed to the target's upstream except the router's own: `tolerance`, `models`, `max_cost_usd`
        and `min_p_correct`. Calls of one session, or with the same history, keep their target.
        """
        return await _answer(proxy, ChatCall.read(await http.body()), http)

    @routes.post("/v1/responses", responses=answers, tags=["gateway"], openapi_extra=_body(_RESPONSE))
    async def responses(http: Request) -> Response:
        """Same as chat completions, for targets whose upstreams have the Responses API.

        Such upstreams have `responses = true` in the pool. Where none has, use `/v1/chat/completions`.
        """
        return await _answer(proxy, ResponsesCall.read(await http.body()), http)


def _add_anthropic_calls(routes: APIRouter, proxy: Proxy, errors: _Errors) -> None:
    messages_errors = {status: {**error, "model": MessagesErrorResponse} for status, error in errors.items()}
    messages_answers: _Errors = {**messages_errors, 200: _ANSWER}

    @routes.post("/v1/messages", responses=messages_answers, tags=["gateway"], openapi_extra=_body(_MESSAGE))
    async def messages(http: Request) -> Response:
        """Same as chat completions, in Anthropic's protocol.

        Targets whose upstreams speak OpenAI's are asked by a translation: `x-router-dropped` names the fields that they
        do not get, `x-router-excluded` the targets that could not be asked for this call.
        """
        call = MessagesCall.read(await http.body())
        response = await _answer(proxy, replace(call, headers=_anthropic_headers(http)), http)
        response.headers["request-id"] = http.state.request_id
        return response

    @routes.post("/v1/messages/count_tokens", responses=messages_errors, tags=["gateway"], openapi_extra=_body(_CHAT))
    async def count_tokens(http: Request) -> Response:
        """Count the input tokens of a message.

        The upstream of the named target counts, or the first of Anthropic's protocol. Without one, the count is an
        estimate by the encoder's tokenizer, and the answer has the header `x-router-estimated`.
        """
        call = replace(TokenCountCall.read(await http.body()), headers=_anthropic_headers(http))
        caller = Caller(http.state.caller, http.state.request_id)
        return await unless_disconnected(http, proxy.count_tokens(call, caller))


def _add_state(routes: APIRouter, endpoint: Endpoint, ledger: CallLedger, errors: _Errors) -> None:
    @routes.get("/v1/models", responses=errors, tags=["gateway"])
    async def models() -> ModelList:
        """List "auto", "routed", and the targets that can answer."""
        targets = endpoint.now.primary.router.pool.targets
        names = [target.name for target in targets if target.upstream is not None]
        return ModelList(data=[Model(id=name) for name in [*ROUTED_NAMES, *names]])

    @routes.get("/v1/stats", responses=errors, tags=["gateway"])
    async def stats(http: Request) -> Stats:
        """Actual and expected cost of calls, and the expected cost of using a single target.

        Covers the caller's own calls, or those of all callers for administrators and for endpoints without keys.
        """
        caller, now = http.state.caller, endpoint.now
        found = await ledger.stats(None if now.settings.is_admin(caller) else caller)
        return found.model_copy(update={"price_sources": now.primary.router.pool.price_sources})

    @routes.post("/v1/feedback", responses=errors, tags=["gateway"])
    async def feedback(given: Feedback, http: Request) -> Recorded:
        """Report whether an answer was correct. It is stored before the response is sent; repeating it changes nothing.

        Needs `serve --feedback`. `request_id` is the header `x-request-id` of the answer, which a request may choose.

        Only the caller of a request can give feedback on it. If a caller reused a request id, it applies to the latest.
        """
        return Recorded(request_id=given.request_id, is_new=await ledger.feedback(given, http.state.caller))


async def _answer(proxy: Proxy, call: Call, http: Request) -> Response:
    caller = Caller(http.state.caller, http.state.request_id, session_id(http.headers, call.body))
    return await unless_disconnected(http, proxy.answer(call, caller))


def _anthropic_headers(http: Request) -> dict[str, str]:
    """Version and beta features, which an upstream needs to read the body, unless they are for this connection only."""
    here = {name.strip().lower() for name in ",".join(http.headers.getlist("connection")).split(",")}
    names = [name for name in ("anthropic-version", "anthropic-beta") if name in http.headers and name not in here]
    for name in names:
        if not re.fullmatch(r"[ -~]*", http.headers[name]):
            raise UserError(f"{name}: must be printable ASCII")
    return {name: http.headers[name] for name in names}


_TURNS = [{"role": "user", "content": QUESTION}]
_CHAT = {"model": ROUTED_NAMES[0], "messages": _TURNS}
_MESSAGE = {**_CHAT, "max_tokens": 256}
_RESPONSE = {"model": ROUTED_NAMES[0], "input": QUESTION}


def _body(example: dict[str, Any]) -> dict[str, Any]:
    """The documented fields of a call, with an example; the upstream validates the rest."""
    (required,) = {"messages", "input"} & set(example)
    fields = {
        "model": {
            "type": "string",
            "default": ROUTED_NAMES[0],
            "description": "Lets the router choose, or names a target",
        },
        "stream": {"type": ["boolean", "null"]},
        **{name: _ROUTE_FIELDS[name] for name in ROUTER_FIELDS},
    }
    schema = {"type": "object", "required": [required], "properties": fields}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}, "parameters": [REQUEST_ID]}


async def unless_disconnected(http: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """Returns the answer, or cancels all work on it once the caller disconnects."""

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
            if isinstance(answer, Relay):  # it occupies its upstream and is not charged yet
                answer.abandon()
        raise
    finally:
        for task in (gone, work):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await gone
