"""Calls the hook of LiteLLM's plugin as its proxy does, and prints each call as it leaves the hook."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

sys.path.insert(0, str(Path(__file__).parents[2] / "serve" / "examples"))
os.environ["PREFILL_ROUTER_URL"] = os.environ["PREFILL_ROUTER_URL"].removesuffix("/v1")
os.environ["PREFILL_ROUTER_TIMEOUT_S"] = "120"

import litellm_plugin

QUESTION = "What is 17 * 23?"


async def hook(call_type: str, **data: Any) -> None:
    changed = await litellm_plugin.router.async_pre_call_hook(
        user_api_key_dict=None, cache=None, data=data, call_type=call_type
    )
    print(json.dumps({name: value for name, value in changed.items() if name != "litellm_call_id"}))  # noqa: T201


async def main() -> None:
    of_litellm, ours = (
        list(inspect.signature(logger.async_pre_call_hook).parameters) for logger in (CustomLogger, type(router))
    )
    assert of_litellm == ours
    messages = [{"role": "user", "content": QUESTION}]
    await hook("acompletion", model="auto", messages=messages, stream=True, tolerance=0.1, litellm_call_id="a-1")
    await hook("aresponses", model="auto", input=QUESTION, models=["small"])
    await hook("acompletion", model="other", messages=[], tolerance=0.1)
    await hook("aembedding", model="auto", input=["an embedding"])
    refused = [{"role": "user", "content": "no such target"}]
    await hook("acompletion", model="auto", messages=refused, models=["nobody"])
    router.url = "http://127.0.0.1:9/v1/route"  # the discard port, on which nothing listens
    await hook("aresponses", model="auto", input="a refused connection")
    router.http = None
    await hook("aresponses", model="auto", input="not asked")


router = litellm_plugin.router
if __name__ == "__main__":
    asyncio.run(main())
