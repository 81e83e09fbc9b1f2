"""What metrics tell that nothing in this process has counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from orchestrator.otel.metrics import Metrics


def told_of(metrics: InMemoryMetricReader) -> list[float]:
    data = metrics.get_metrics_data()
    points = [
        point
        for resource in (data.resource_metrics if data is not None else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "orchestrator.due.age"
        for point in metric.data.data_points
    ]
    return [point.value for point in points]  # type: ignore[union-attr]


def test_how_long_work_has_been_due_is_told_without_asking_the_store() -> None:
    """Where the SDK holds its lock for as long as a query takes, a process that is forked then never exports."""
    reader = InMemoryMetricReader()
    worker: Any = SimpleNamespace(executing=SimpleNamespace(is_worker=True))  # no store
    metrics = Metrics(worker, MeterProvider([reader]))
    assert told_of(reader) == []
    metrics.note_due(3.5)
    assert told_of(reader) == [3.5]
    metrics.note_due(None)
    assert told_of(reader) == []


def test_a_pool_process_does_not_tell_what_its_parent_saw() -> None:
    reader = InMemoryMetricReader()
    worker: Any = SimpleNamespace(executing=SimpleNamespace(is_worker=False))
    metrics = Metrics(worker, MeterProvider([reader]))
    metrics.note_due(3.5)
    assert told_of(reader) == []
