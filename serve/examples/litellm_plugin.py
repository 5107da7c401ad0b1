"""LiteLLM's proxy asks the router which of its models to call.

Copy this file beside the proxy's config, and add to that:

    model_list:
      - model_name: auto      # answers while the router does not
        litellm_params: {model: openai/gpt-5-mini}
      - model_name: big       # other names are those of the router's pool
        litellm_params: {model: anthropic/claude-opus-4-5}
    litellm_settings:
      callbacks: litellm_plugin.router

Chats, responses and messages for the model `auto` then go to the target that `POST /v1/route` selects, under the
constraints of the call: `tolerance`, `models`, `max_cost_usd`, `min_p_correct`. Other calls are left alone: name a
model to continue a `previous_response_id`. A key of the proxy that may use `auto` may get any of the models.

The router delays a call by at most PREFILL_ROUTER_TIMEOUT_S, 0.5 s. If it fails or takes longer, `auto` answers, and
it is not asked again for 5 s. The id of a routed call, for feedback, is in the proxy's header `x-litellm-call-id`.
"""

import asyncio
import logging
import os
import time
from typing import Any

import httpx
from litellm.integrations.custom_logger import CustomLogger

MODEL = "auto"
PAUSE_S = 5.0
CALLS = ("completion", "acompletion", "responses", "aresponses", "anthropic_messages", "aanthropic_messages")
CONSTRAINTS = ("tolerance", "models", "max_cost_usd", "min_p_correct")
CONVERSATION = ("messages", "system", "input", "instructions")

log = logging.getLogger("prefill_router")


class PrefillRouter(CustomLogger):
    """Replaces the model `auto` of a call by the target that the router selects."""

    def __init__(self) -> None:
        super().__init__()
        key = os.environ.get("PREFILL_ROUTER_KEY")
        self.url = os.environ.get("PREFILL_ROUTER_URL", "http://127.0.0.1:8000").rstrip("/") + "/v1/route"
        self.timeout_s = float(os.environ.get("PREFILL_ROUTER_TIMEOUT_S", "0.5"))
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.asks_again_s = 0.0  # time.monotonic()
        self.http = httpx.AsyncClient(timeout=None)  # the whole request has a limit below

    async def async_pre_call_hook(self, user_api_key_dict: Any, cache: Any, data: dict, call_type: str) -> dict:  # noqa: ARG002
        if data.get("model") != MODEL or call_type not in CALLS:
            return data
        wants = {name: data.pop(name) for name in CONSTRAINTS if name in data}
        if time.monotonic() >= self.asks_again_s:
            body = {name: data[name] for name in CONVERSATION if data.get(name) is not None} | wants
            data["model"] = await self.selected(body, data.get("litellm_call_id")) or MODEL
        return data

    async def selected(self, body: dict, call_id: str | None) -> str | None:
        """The target for a request; None if the router does not answer in time or has none."""
        headers = self.headers | ({"x-request-id": call_id} if call_id else {})
        try:
            asked = self.http.post(self.url, json=body, headers=headers)
            response = await asyncio.wait_for(asked, self.timeout_s)
        except (httpx.HTTPError, TimeoutError) as error:
            return self.paused(f"{type(error).__name__} {error}")
        if response.status_code >= 500:
            return self.paused(f"status {response.status_code}")
        if response.status_code != 200:
            log.warning("the router refused a call, %s answers: %s", MODEL, response.text[:500])
            return None
        return response.json()["selected_model"]

    def paused(self, reason: str) -> None:
        log.warning("the router failed, %s answers for %g s: %s", MODEL, PAUSE_S, reason)
        self.asks_again_s = time.monotonic() + PAUSE_S


router = PrefillRouter()
