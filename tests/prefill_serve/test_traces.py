"""Spans of a request, as an OTLP collector receives them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

# A process of its own: what exports spans is set once in each.
_ASK = """
import sys
from opentelemetry import trace
from starlette.testclient import TestClient
from prefill_serve.api import create_api
from prefill_serve.endpoint import Endpoint
from prefill_serve.gateway.state.call_ledger import (LocalLedger)
from prefill_serve.settings import Settings
from prefill_serve.traces import export_traces

router, collector = sys.argv[1:]
export_traces(collector)
endpoint = Endpoint()
with TestClient(create_api(endpoint, LocalLedger()), "http://127.0.0.1") as client:
    client.portal.call(endpoint.configure, Settings(router=router, open=True))
    headers = {"x-request-id": "r1", "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    client.post("/v1/route", json={"prompt": "what is one"}, headers=headers).raise_for_status()
trace.get_tracer_provider().force_flush()
"""


class Collector:
    def __init__(self) -> None:
        received = self.received = list[ExportTraceServiceRequest]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def spans(self) -> list[Span]:
        scopes = [s for request in self.received for resource in request.resource_spans for s in resource.scope_spans]
        return [span for scope in scopes for span in scope.spans]


def ancestors(span: Span, spans: dict[str, Span]) -> set[bytes]:
    """FastAPI adds spans in between."""
    by_id = {each.span_id: each for each in spans.values()}
    found = set()
    while (parent := by_id.get(span.parent_span_id)) is not None:
        found.add(parent.span_id)
        span = parent
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


def test_a_request_goes_on_with_its_callers_trace_and_shows_its_phases(router: str, collector: Collector) -> None:
    subprocess.run([sys.executable, "-c", _ASK, router, collector.url], check=True, timeout=120)
    spans = {span.name: span for span in collector.spans()}
    request = spans["request"]
    attributes = {a.key: a.value.string_value or a.value.int_value for a in request.attributes}
    assert attributes == {"http.route": "/v1/route", "http.response.status_code": 200, "id": "r1"}
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.trace_id.hex() for span in spans.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    assert request.span_id in ancestors(spans["tokenize"], spans) & ancestors(spans["read"], spans)
    assert {a.key for a in spans["read"].attributes} >= {"queue_s", "encode_s", "head_s"}
