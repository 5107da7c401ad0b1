"""Optional OpenTelemetry traces. Without an exporter a span costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from opentelemetry import propagate, trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Scope

from prefill_router.common.errors import UserError

tracer = trace.get_tracer("prefill_router")


def request_span(scope: Scope) -> AbstractContextManager[trace.Span]:
    """The span of a request, below its caller's span and above FastAPI's; none unless spans are exported."""
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return nullcontext(trace.INVALID_SPAN)
    return _request_span(scope)


@contextmanager
def _request_span(scope: Scope) -> Iterator[trace.Span]:
    with tracer.start_as_current_span("request", propagate.extract(Headers(scope=scope))) as span:
        propagate.inject(MutableHeaders(scope=scope))
        yield span


def export_traces(endpoint: str) -> None:
    """Exports spans to an OTLP collector URL. Raises UserError if the exporter package is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UserError("traces: the OTLP exporter is missing: pip install prefill-router[traces]") from None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "prefill-router"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    trace.set_tracer_provider(provider)
