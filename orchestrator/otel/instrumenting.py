"""Connecting an orchestrator to OpenTelemetry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from celery.signals import before_task_publish
from celery.utils.dispatch import Signal
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from orchestrator import signals
from orchestrator.core.records import Outcome
from orchestrator.otel.lineage import Lineages
from orchestrator.otel.metrics import Metrics
from orchestrator.otel.tracing import Tracing
from orchestrator.runtime.inputs import is_workflow
from orchestrator.runtime.instrumentation import Instrumentation
from orchestrator.runtime.logs import about
from orchestrator.store.history import HistoryRow

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from orchestrator.runtime.app import Orchestrator

logger = logging.getLogger("orchestrator")


def instrument(
    orchestrator: Orchestrator,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Send traces and metrics of what an orchestrator does to OpenTelemetry.

    Goes beside the app, so that every process calls it: workers, and those that start instances.  Without providers
    the global ones are used, also when they are set later.  Each trace is an instance, across all workers; a span may
    be exported twice, under the same ids, when a process died.  Doing it twice is doing it once.
    """
    if isinstance(orchestrator.instrumentation, OpenTelemetry):
        return
    own = OpenTelemetry(orchestrator, tracer_provider, meter_provider)
    orchestrator.instrumentation = own
    own.connect()


class OpenTelemetry(Instrumentation):
    """Takes up what happens in the process, and what signals tell."""

    def __init__(
        self, orchestrator: Orchestrator, tracers: TracerProvider | None, meters: MeterProvider | None
    ) -> None:
        self._app = orchestrator.app
        self._tracing = Tracing(Lineages(orchestrator), tracers)
        self._metrics = Metrics(orchestrator, meters)

    @contextmanager
    def attempt(self, row: HistoryRow) -> Iterator[None]:
        try:
            self._metrics.note_attempt(row)
            self._tracing.begin(row)
        except Exception:  # a sampler or processor of the user's: nothing may depend on being observed
            logger.exception("no span for an attempt of step %d of %s", row.seq, row.instance_id, extra=about(row))
        try:
            yield
        finally:
            try:
                self._tracing.end(row)
            except Exception:
                logger.exception("no span for an attempt of step %d of %s", row.seq, row.instance_id, extra=about(row))

    def body(self, row: HistoryRow) -> AbstractContextManager[object]:
        return self._tracing.body(row)

    def note_pass(self, workflow: str, seconds: float) -> None:
        self._metrics.note_pass(workflow, seconds)

    def note_due(self, seconds: float | None) -> None:
        self._metrics.note_due(seconds)

    def carry(self) -> dict[str, str]:
        carried: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carried)
        return carried

    # --- signals ------------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        self._on(signals.instance_started, self._metrics.on_instance_started)
        self._on(signals.instance_ended, self._metrics.on_instance_ended)
        self._on(signals.instance_ended, self._tracing.on_instance_ended)
        self._on(signals.step_retried, self._on_retried)
        self._on(signals.step_lost, self._on_lost)
        self._on(signals.step_settled, self._on_settled)
        self._on(signals.compensation_settled, self._on_compensation_settled)
        before_task_publish.connect(self._before_publish, weak=False)

    def _on(self, signal: Signal, do: Callable[..., None]) -> None:
        def receive(app: Any, **told: Any) -> None:
            if app is self._app:  # signals are of the process, which may have several apps
                do(**told)

        signal.connect(receive, weak=False)

    def _on_retried(self, **told: Any) -> None:
        self._tracing.on_attempt_ended(outcome="retried", **told)

    def _on_lost(self, **told: Any) -> None:
        self._metrics.on_lost(**told)
        self._tracing.on_attempt_ended(outcome="lost", **told)

    def _on_settled(self, **told: Any) -> None:
        self._metrics.on_settled(**told)
        self._tracing.on_attempt_ended(**told)

    def _on_compensation_settled(self, **told: Any) -> None:
        if told["outcome"] != Outcome.SUCCEEDED:
            self._metrics.on_compensation_failed(**told)
        self._on_settled(**told)

    def _before_publish(
        self, sender: object = None, headers: MutableMapping[str, Any] | None = None, **_more: Any
    ) -> None:
        """Have the start message of a workflow tell in what it was sent; its instance keeps that."""
        if headers is not None and "traceparent" not in headers and is_workflow(self._app.tasks.get(sender)):
            headers.update(self.carry())
