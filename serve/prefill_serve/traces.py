"""Optional OpenTelemetry traces. Without an exporter a span costs next to nothing."""

from __future__ import annotations

from opentelemetry import trace

from prefill_router.common.errors import UserError

tracer = trace.get_tracer("prefill_router")


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
