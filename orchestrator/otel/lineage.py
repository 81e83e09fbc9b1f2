"""Where an instance stands among traces: in which one, below which span, and what it was started by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kombu.utils.functional import LRUCache
from opentelemetry import trace
from opentelemetry.trace import SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.errors import StoreUnreachable
from orchestrator.otel import ids
from orchestrator.runtime import kept
from orchestrator.store import instances
from orchestrator.store.history import StepKey
from orchestrator.store.instances import Instance

if TYPE_CHECKING:
    from orchestrator.runtime.app import Orchestrator

#: Of so many instances a process remembers it; the store is asked once for each.
REMEMBERED = 2000


@dataclass(frozen=True, slots=True)
class Lineage:
    """What of an instance never changes.  ``parent``: the span of the step that it is."""

    workflow: str
    trace_id: int
    span_id: int
    parent_span_id: int | None = None
    started_by: SpanContext | None = None


class Lineages:
    """Finds them in the store."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._known: LRUCache = LRUCache(limit=REMEMBERED)  # type: ignore[no-untyped-call]

    def find(self, instance_id: str, generation: str) -> Lineage:
        """Return the lineage of an instance; of one that is purged, or cannot be asked for, one without relatives."""
        known: Lineage | None = self._known.get((instance_id, generation))
        if known is not None:
            return known
        try:
            with self._orchestrator.current.store.read("lineage") as connection:
                instance = instances.find_instance(connection, instance_id)
        except (SQLAlchemyError, StoreUnreachable):
            instance = None
        span_id = ids.instance_span_id(instance_id, generation)
        if instance is None or instance.generation != generation:
            return Lineage("", ids.trace_id(instance_id, generation), span_id)
        found = self._lineage(instance, span_id)
        self._known[instance_id, generation] = found
        return found

    def _lineage(self, instance: Instance, span_id: int) -> Lineage:
        started_by = _started_by(instance)
        if instance.parent_id is None or instance.parent_generation is None:
            own = ids.trace_id(instance.id, instance.generation)
            return Lineage(instance.workflow, own, span_id, started_by=started_by)
        parent = self.find(instance.parent_id, instance.parent_generation)
        above = None
        if instance.parent_run is not None and instance.parent_seq is not None:
            key = StepKey(instance.parent_id, instance.parent_generation, instance.parent_run, instance.parent_seq)
            above = ids.child_span_id(key.idempotency_key)
        return Lineage(instance.workflow, parent.trace_id, span_id, above, started_by)


def _started_by(instance: Instance) -> SpanContext | None:
    context = TraceContextTextMapPropagator().extract(kept.read(instance.request).request)
    found = trace.get_current_span(context).get_span_context()
    return found if found.is_valid else None
