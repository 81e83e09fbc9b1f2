"""OpenTelemetry: a trace for each instance, across workers, and metrics; needs the extra ``otel``."""

from __future__ import annotations

from orchestrator.otel.instrumenting import instrument

__all__ = ["instrument"]
