"""OpenTelemetry traces, by option: without an exporter a span costs next to nothing."""

from __future__ import annotations

from opentelemetry import trace

from prefill_router.common.errors import UserError

tracer = trace.get_tracer("prefill_router")


def export_traces(endpoint: str) -> None:
    """Sends spans to an OTLP collector, as http://localhost:4318/v1/traces. Raises UserError without its package."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UserError("traces: install opentelemetry-exporter-otlp-proto-http, or prefill-router[traces]") from None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "prefill-router"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    trace.set_tracer_provider(provider)
