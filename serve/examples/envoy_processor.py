"""An external processor by which Envoy asks the router where each call goes: `envoy.yaml` beside it is a config for it.

    pip install envoy-data-plane httpx
    PREFILL_ROUTER_DEFAULT=big python envoy_processor.py

A call's `model`, if it is `auto`, becomes the target that `POST /v1/route` selects under the constraints in the call:
`tolerance`, `models`, `max_cost_usd`, `min_p_correct`. Envoy's routes match the header `x-router-selected-model`. If
the router fails or takes longer than PREFILL_ROUTER_TIMEOUT_S, 0.5 s, the target is PREFILL_ROUTER_DEFAULT. Without
this process Envoy answers 500.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator

import httpx
from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption, HeaderValueOptionHeaderAppendAction
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    ExternalProcessorBase,
    HeaderMutation,
    HeadersResponse,
    ProcessingRequest,
    ProcessingResponse,
)
from grpclib.server import Server

CONSTRAINTS = ("tolerance", "models", "max_cost_usd", "min_p_correct")
DEFAULT = os.environ.get("PREFILL_ROUTER_DEFAULT", "big")
PORT = int(os.environ.get("PREFILL_ROUTER_PROCESSOR_PORT", "9002"))
TIMEOUT_S = float(os.environ.get("PREFILL_ROUTER_TIMEOUT_S", "0.5"))
URL = os.environ.get("PREFILL_ROUTER_URL", "http://127.0.0.1:8000") + "/v1/route"
KEY = os.environ.get("PREFILL_ROUTER_KEY")

log = logging.getLogger("prefill_router")


class Processor(ExternalProcessorBase):
    def __init__(self) -> None:
        self.http = httpx.AsyncClient(timeout=None, headers={"authorization": f"Bearer {KEY}"} if KEY else {})

    async def process(self, messages: AsyncIterator[ProcessingRequest]) -> AsyncIterator[ProcessingResponse]:
        async for request in messages:
            if request.request_body is not None:
                routed = await self.routed(request.request_body.body)
                yield ProcessingResponse(request_body=BodyResponse(response=routed))
            else:
                yield ProcessingResponse(request_headers=HeadersResponse(response=CommonResponse()))

    async def routed(self, content: bytes) -> CommonResponse:
        """Changes a call to its target; leaves what is no JSON object unchanged."""
        try:
            body = json.loads(content)
            model = body.get("model", "auto")
        except (ValueError, AttributeError):
            return CommonResponse()
        target = await self.selected(content) if model == "auto" else str(model)
        changed = {name: value for name, value in body.items() if name not in CONSTRAINTS} | {"model": target}
        content = json.dumps(changed).encode()
        headers = {"x-router-selected-model": target, "content-length": str(len(content))}
        return CommonResponse(
            header_mutation=HeaderMutation(set_headers=[header(*each) for each in headers.items()]),
            body_mutation=BodyMutation(body=content),
            clear_route_cache=True,
        )

    async def selected(self, content: bytes) -> str:
        asked = self.http.post(URL, content=content, headers={"content-type": "application/json"})
        try:
            response = await asyncio.wait_for(asked, TIMEOUT_S)
            return str(response.raise_for_status().json()["selected_model"])
        except (httpx.HTTPError, TimeoutError) as error:
            log.warning("no target by the router, %s answers: %s %s", DEFAULT, type(error).__name__, error)
            return DEFAULT


def header(name: str, value: str) -> HeaderValueOption:
    overwrite = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    return HeaderValueOption(header=HeaderValue(key=name, raw_value=value.encode()), append_action=overwrite)


async def main() -> None:
    server = Server([Processor()])
    await server.start("127.0.0.1", PORT)
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
