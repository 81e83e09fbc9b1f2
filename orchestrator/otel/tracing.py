"""Spans: of an instance, of each attempt of its steps and compensations, of the steps that are instances themselves.

An attempt has its span in the process that runs it, around its body; it ends when the attempt is settled, which is told
by a signal.  What no process is left to end (a lost attempt), or no process runs (an instance), is made of the signal
alone.  Signals come at least once, so a span may be exported twice: under the same ids.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery.exceptions import Retry
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace import TracerProvider as ApiTracerProvider

from orchestrator._version import __version__
from orchestrator.core.records import Kind
from orchestrator.otel import ids
from orchestrator.otel.lineage import Lineage, Lineages
from orchestrator.runtime.dispatch import task_id_of
from orchestrator.store.history import HistoryRow, StepKey

#: Steps that no process runs.
_INSTANCES = (Kind.CHILD, Kind.UNDO)


@dataclass(slots=True)
class OpenAttempt:
    """An attempt that this process runs."""

    span: Span
    error: BaseException | None = None
    ended_at: int | None = None  # its body, in nanoseconds


class Tracing:
    """Makes the spans."""

    def __init__(self, lineages: Lineages, provider: ApiTracerProvider | None) -> None:
        self._lineages = lineages
        self._provider = provider
        self._open: dict[tuple[str, int], OpenAttempt] = {}

    # --- in the process that runs an attempt ------------------------------------------------------------------------

    def begin(self, row: HistoryRow) -> None:
        """Begin the span of an attempt that was claimed."""
        key = (row.key.idempotency_key, row.attempt)
        lineage = self._lineages.find(row.instance_id, row.generation)
        task_id = task_id_of(row.key, row.dispatch)
        about = _about_step(row.key, lineage.workflow, str(row.kind), row.attempt, task_id, row.undoes)
        around = trace.get_current_span().get_span_context()  # of who instruments Celery itself
        links = [Link(around)] if around.is_valid else []
        span_id = ids.attempt_span_id(*key)
        span = self._start(row.name, lineage, span_id, lineage.span_id, about, time.time_ns(), links)
        self._open[key] = OpenAttempt(span)

    def end(self, row: HistoryRow) -> None:
        """End the span of an attempt, if nothing has that was told of its settlement."""
        self._end_open((row.key.idempotency_key, row.attempt), None, None, None)

    @contextmanager
    def body(self, row: HistoryRow) -> Iterator[None]:
        """Have the span of an attempt be the current one while its body runs."""
        opened = self._open.get((row.key.idempotency_key, row.attempt))
        if opened is None:
            yield
            return
        opened.error = None
        try:
            with trace.use_span(opened.span, record_exception=False, set_status_on_exception=False):
                yield
        except BaseException as error:
            opened.error = error.exc if isinstance(error, Retry) and error.exc is not None else error
            raise
        finally:
            opened.ended_at = time.time_ns()

    def _end_open(self, key: tuple[str, int], outcome: str | None, error_type: str | None, message: str | None) -> bool:
        """End the span of an attempt that this process runs, or return ``False``."""
        opened = self._open.pop(key, None)
        if opened is None:
            return False
        span = opened.span
        if outcome is not None:
            span.set_attribute("orchestrator.outcome", outcome)
        if isinstance(opened.error, Exception):
            span.record_exception(opened.error, timestamp=opened.ended_at)
            span.set_status(Status(StatusCode.ERROR, str(opened.error)))
        elif error_type is not None:
            _record_failure(span, error_type, message, opened.ended_at)
        span.end(opened.ended_at)
        return True

    # --- by signals -------------------------------------------------------------------------------------------------

    def on_attempt_ended(
        self,
        sender: str,
        instance_id: str,
        generation: str,
        run: int,
        at: datetime,
        seq: int,
        kind: str,
        attempt: int,
        task_id: str,
        undoes: int | None,
        seconds: float | None,
        outcome: str,
        error_type: str | None,
        message: str | None,
        **_more: Any,
    ) -> None:
        """Export the span of an attempt that has ended, or of the last one of a step that has settled."""
        key = StepKey(instance_id, generation, run, seq)
        own = (key.idempotency_key, attempt)
        if self._end_open(own, outcome, error_type, message) or (seconds is None and kind not in _INSTANCES):
            return  # in the second case none ever began
        lineage = self._lineages.find(instance_id, generation)
        is_instance = kind == Kind.CHILD
        span_id = ids.child_span_id(key.idempotency_key) if is_instance else ids.attempt_span_id(*own)
        about = _about_step(key, lineage.workflow, kind, attempt, task_id, undoes)
        about["orchestrator.outcome"] = outcome
        ended_at = _nanoseconds(at)
        begun_at = ended_at - int((seconds or 0.0) * 1e9)
        span = self._start(sender, lineage, span_id, lineage.span_id, about, begun_at)
        if error_type is not None:
            _record_failure(span, error_type, message, ended_at)
        span.end(ended_at)

    def on_instance_ended(
        self,
        instance_id: str,
        generation: str,
        workflow: str,
        run: int,
        at: datetime,
        status: str,
        seconds: float,
        again: bool,
        error_type: str | None,
        message: str | None,
        **_more: Any,
    ) -> None:
        """Export the span of an instance, when it ends for the first time."""
        if again:
            return
        lineage = self._lineages.find(instance_id, generation)
        about = {
            "orchestrator.instance_id": instance_id,
            "orchestrator.workflow": workflow,
            "orchestrator.run": run,
            "orchestrator.status": status,
        }
        links = [Link(lineage.started_by)] if lineage.started_by is not None else []
        ended_at = _nanoseconds(at)
        begun_at = ended_at - int(seconds * 1e9)
        span = self._start(workflow, lineage, lineage.span_id, lineage.parent_span_id, about, begun_at, links)
        if status != "COMPLETED":
            _record_failure(span, error_type or status, message, ended_at)
        span.end(ended_at)

    # --- spans ------------------------------------------------------------------------------------------------------

    def _start(
        self,
        name: str,
        lineage: Lineage,
        span_id: int,
        parent_span_id: int | None,
        about: dict[str, Any],
        begun_at: int,
        links: Sequence[Link] = (),
    ) -> Span:
        tracer = self._tracer()
        context = Context()
        if parent_span_id is not None:
            flags = self._flags(tracer, lineage)
            parent = SpanContext(lineage.trace_id, parent_span_id, is_remote=True, trace_flags=flags)
            context = trace.set_span_in_context(NonRecordingSpan(parent), context)
        kind = SpanKind.INTERNAL if span_id == lineage.span_id else SpanKind.CONSUMER
        with ids.planned(lineage.trace_id, span_id):
            return tracer.start_span(name, context, kind, about, links, begun_at)

    def _tracer(self) -> trace.Tracer:
        # not kept: the provider may be set after this was made, in a pool process, or never
        provider = self._provider or trace.get_tracer_provider()
        tracer = provider.get_tracer("orchestrator", __version__)
        ids.take_planned_ids(tracer)
        return tracer

    @staticmethod
    def _flags(tracer: trace.Tracer, lineage: Lineage) -> TraceFlags:
        """Tell whether the span at the top of a trace is going to be sampled; it is exported last of all."""
        sampler: Any = getattr(tracer, "sampler", None)
        if sampler is None:
            return TraceFlags(TraceFlags.SAMPLED)
        is_sampled = sampler.should_sample(Context(), lineage.trace_id, lineage.workflow).decision.is_sampled()
        return TraceFlags(TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT)


def _about_step(
    key: StepKey, workflow: str, kind: str, attempt: int, task_id: str, undoes: int | None
) -> dict[str, Any]:
    about = {
        "orchestrator.instance_id": key.instance_id,
        "orchestrator.workflow": workflow,
        "orchestrator.run": key.run,
        "orchestrator.seq": key.seq,
        "orchestrator.kind": kind,
        "orchestrator.attempt": attempt,
        "orchestrator.task_id": task_id,
        "orchestrator.idempotency_key": key.idempotency_key,
    }
    return about if undoes is None else {**about, "orchestrator.undoes": undoes}


def _record_failure(span: Span, error_type: str, message: str | None, at: int | None) -> None:
    """Record an exception of which only the name is left."""
    span.add_event("exception", {"exception.type": error_type, "exception.message": message or ""}, at)
    span.set_status(Status(StatusCode.ERROR, message or error_type))


def _nanoseconds(at: datetime) -> int:
    return int(at.timestamp() * 1e9)
