"""Ids of traces and spans that every process finds by itself, and an SDK's tracer that takes them.

Nobody has to be told them: they are derived from what names an instance or a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opentelemetry.trace import Tracer

#: The ids of the trace and of the span that is being started.
_planned: ContextVar[tuple[int, int] | None] = ContextVar("orchestrator_planned_ids", default=None)


def trace_id(instance_id: str, generation: str) -> int:
    return _number(f"trace:{instance_id}:{generation}", 16)


def instance_span_id(instance_id: str, generation: str) -> int:
    return _number(f"instance:{instance_id}:{generation}", 8)


def attempt_span_id(idempotency_key: str, attempt: int) -> int:
    return _number(f"attempt:{idempotency_key}:{attempt}", 8)


def child_span_id(idempotency_key: str) -> int:
    """Return the id of the span of a step that is an instance: the parent of that instance's own span."""
    return _number(f"child:{idempotency_key}", 8)


def _number(name: str, size: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:size], "big") or 1


@contextmanager
def planned(trace: int, span: int) -> Iterator[None]:
    """Have spans that are started inside the block given these ids."""
    token = _planned.set((trace, span))
    try:
        yield
    finally:
        _planned.reset(token)


def take_planned_ids(tracer: Tracer) -> None:
    """Let an SDK's tracer, which is ours alone, take ids that are planned; doing it twice is doing it once."""
    own = getattr(tracer, "id_generator", None)
    if own is not None and not isinstance(own, _PlannedIds):
        tracer.id_generator = _PlannedIds(own)  # type: ignore[attr-defined]


class _PlannedIds:
    """An SDK's generator of ids, unless ids are planned."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def generate_trace_id(self) -> int:
        ids = _planned.get()
        return int(self._own.generate_trace_id()) if ids is None else ids[0]

    def generate_span_id(self) -> int:
        ids = _planned.get()
        return int(self._own.generate_span_id()) if ids is None else ids[1]

    def is_trace_id_random(self) -> bool:
        return bool(getattr(self._own, "is_trace_id_random", bool)())
