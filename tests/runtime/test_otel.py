"""Traces and metrics of real workers: the tree of spans, which no process has seen whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import shared_task
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from orchestrator import Context, Orchestrator, RetryPolicy, current_step, shared_workflow, signals
from orchestrator.otel import instrument
from tests.runtime.cluster import Cluster, wait_until

SETTINGS = {"publish_grace": 1.0}
OTHER_QUEUE = f"{os.environ.get('TEST_QUEUE', 'celery')}-other"


def folder() -> Path:
    return Path(os.environ["TEST_CRASHES"]).parent


def write_line(name: str, told: dict[str, Any]) -> None:
    with (folder() / name).open("a") as file:
        file.write(f"{json.dumps({**told, 'pid': os.getpid(), 'parent_pid': os.getppid()})}\n")


class ToFile(SpanExporter):
    """A line for each span, from all processes."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            context = span.get_span_context()
            assert context is not None
            told = {
                "name": span.name,
                "trace": context.trace_id,
                "span": context.span_id,
                "parent": span.parent.span_id if span.parent else None,
                "attributes": dict(span.attributes or {}),
                "status": span.status.status_code.name,
                "exceptions": [dict(event.attributes or {}) for event in span.events if event.name == "exception"],
                "links": [link.context.span_id for link in span.links],
                "start": span.start_time,
                "end": span.end_time,
            }
            write_line("spans", told)
        return SpanExportResult.SUCCESS


class MetricsToFile(MetricExporter):
    """A line for each data point, whenever it is exported."""

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_more: Any) -> MetricExportResult:
        for resource in metrics_data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        told = {"metric": metric.name, "attributes": dict(point.attributes or {})}
                        value = getattr(point, "value", getattr(point, "count", None))
                        write_line("metrics", {**told, "value": value})
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 30_000, **_more: Any) -> None:
        pass


tracers = TracerProvider()


def register(orchestrator: Orchestrator) -> None:
    """Instrument the workers."""
    tracers.add_span_processor(SimpleSpanProcessor(ToFile()))
    meters = MeterProvider([PeriodicExportingMetricReader(MetricsToFile(), export_interval_millis=200)])
    instrument(orchestrator, tracers, meters)


@shared_task
def pay() -> str:
    trace.get_current_span().set_attribute("shop.card", "visa")
    with tracers.get_tracer("shop").start_as_current_span("POST /charges"):
        return "charge"


@shared_task
def refund(_charge: str | None) -> None:
    pass


@shared_task
def stumble() -> None:
    step = current_step()
    assert step is not None
    if step.attempt == 1:
        raise LookupError("not yet")


@shared_task
def refuse() -> None:
    raise ValueError("nobody is there")


@shared_workflow
def inner(ctx: Context) -> None:
    ctx.run(pay, compensate=refund)


@shared_workflow
def outer(ctx: Context) -> None:
    ctx.run(pay.s().set(queue=OTHER_QUEUE), compensate=refund)
    ctx.run(inner.s())
    ctx.run(stumble, retry=RetryPolicy(max_attempts=2, initial_interval=timedelta(milliseconds=1)))
    ctx.run(refuse)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Cluster]:
    """Two workers, each with a queue of its own."""
    folder = tmp_path_factory.mktemp("otel")
    cluster = Cluster(folder, f"sqlite:///{folder}/store.db", valkey_url, tasks=__name__, settings=SETTINGS)
    try:
        cluster.start_worker("-Q", cluster.queue)
        cluster.start_worker("-Q", f"{cluster.queue}-other", concurrency=1)
        for worker in cluster.workers:
            worker.wait_ready()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def instrumented_client(cluster: Cluster) -> Iterator[TracerProvider]:
    """The process of the tests is instrumented as a web server is."""
    before = {name: list(getattr(signals, name).receivers) for name in signals.__all__}
    own = TracerProvider()
    own.add_span_processor(SimpleSpanProcessor(InMemorySpanExporter()))
    instrument(cluster.orchestrator, own)
    yield own
    for name, receivers in before.items():
        getattr(signals, name).receivers[:] = receivers
        getattr(signals, name).sender_receivers_cache.clear()


def read_lines(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    file = cluster.folder / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def spans_of(cluster: Cluster, instance_id: str) -> list[dict[str, Any]]:
    """Return the spans of the trace of an instance, when the instance's own is among them."""

    def find() -> list[dict[str, Any]]:
        spans = read_lines(cluster, "spans")
        own = [span for span in spans if span["attributes"].get("orchestrator.status") and _about(span) == instance_id]
        return [span for span in spans if own and span["trace"] == own[0]["trace"]]

    found: list[dict[str, Any]] = wait_until(find, f"the trace of {instance_id}\n{cluster.logs()[-3000:]}")
    return found


def _about(span: dict[str, Any]) -> object:
    return span["attributes"].get("orchestrator.instance_id")


def tree_of(spans: list[dict[str, Any]], parent: int | None = None) -> list[Any]:
    """Return names and outcomes below a span, by their start."""
    children = sorted((span for span in spans if span["parent"] == parent), key=lambda span: span["start"])
    return [
        (
            span["name"].rpartition(".")[2],
            span["attributes"].get("orchestrator.status") or span["attributes"].get("orchestrator.outcome"),
            tree_of(spans, span["span"]),
        )
        for span in children
    ]


def test_a_trace_is_an_instance_across_workers_and_children(
    cluster: Cluster, instrumented_client: TracerProvider
) -> None:
    with instrumented_client.get_tracer("web").start_as_current_span("POST /orders") as request:
        handle = cluster.start("outer")
    cluster.wait_status(handle, "COMPENSATED")
    wait_until(lambda: len(spans_of(cluster, handle.id)) == 13, f"all spans: {tree_of(spans_of(cluster, handle.id))}")
    spans = spans_of(cluster, handle.id)
    (top,) = tree_of(spans)
    assert top[:2] == ("outer", "COMPENSATED")
    call: tuple[Any, ...] = ("POST /charges", None, [])
    inner_steps = [("pay", "succeeded", [call]), ("refund", "succeeded", [])]
    # the undoing of the child is a record of its parent, and its compensation one of the child's own
    assert top[2][:5] == [
        ("pay", "succeeded", [call]),
        ("inner", "succeeded", [("inner", "COMPLETED", inner_steps)]),
        ("stumble", "retried", []),
        ("stumble", "succeeded", []),
        ("refuse", "failed", []),
    ]
    assert sorted(top[2][5:]) == [("inner", "succeeded", []), ("refund", "succeeded", [])]
    assert len({span["span"] for span in spans}) == len(spans) == 13

    root, first = (next(span for span in spans if span["name"].endswith(name)) for name in ("outer", ".pay"))
    assert root["links"] == [request.get_span_context().span_id]
    created_at = handle.describe().created_at.timestamp()
    assert abs(root["start"] / 1e9 - created_at) < 0.001 and root["end"] >= max(s["start"] for s in spans)
    assert (root["status"], root["exceptions"][0]["exception.type"]) == ("ERROR", "builtins.ValueError")
    key = f"{handle.id}:{cluster.list_rows(handle)[0].generation}:0:0"
    assert first["attributes"] == {
        "orchestrator.instance_id": handle.id,
        "orchestrator.workflow": f"{__name__}.outer",
        "orchestrator.run": 0,
        "orchestrator.seq": 0,
        "orchestrator.kind": "step",
        "orchestrator.attempt": 1,
        "orchestrator.task_id": f"{handle.id}:0:0:1",
        "orchestrator.idempotency_key": key,
        "orchestrator.outcome": "succeeded",
        "shop.card": "visa",
    }
    failed = next(span for span in spans if span["name"].endswith("refuse"))
    assert failed["status"] == "ERROR" and "nobody is there" in failed["exceptions"][0]["exception.stacktrace"]
    assert {span["parent_pid"] for span in spans} == {worker.pid for worker in cluster.workers}


def test_an_attempt_that_was_lost_is_told_by_who_found_it(cluster: Cluster) -> None:
    cluster.plan_crash("loses", "child", "claim:after-commit", 0)
    handle = cluster.start("inner", instance_id="loses")
    cluster.wait_status(handle, "COMPLETED")
    wait_until(lambda: len(spans_of(cluster, "loses")) == 4, "all spans")
    lost, settled = sorted(
        (s for s in spans_of(cluster, "loses") if s["name"].endswith("pay")), key=lambda s: s["start"]
    )
    assert (lost["attributes"]["orchestrator.outcome"], lost["attributes"]["orchestrator.attempt"]) == ("lost", 1)
    assert lost["exceptions"][0]["exception.type"] == "orchestrator.errors.AttemptLost"
    assert (settled["attributes"]["orchestrator.attempt"], settled["status"]) == (2, "UNSET")
    assert lost["parent"] == settled["parent"] and lost["pid"] != settled["pid"]


def test_what_sent_the_start_message_is_linked(cluster: Cluster, instrumented_client: TracerProvider) -> None:
    with instrumented_client.get_tracer("web").start_as_current_span("POST /orders") as request:
        handle = cluster.task("inner").delay()
    (root,) = (span for span in spans_of(cluster, handle.id) if span["attributes"].get("orchestrator.status"))
    assert root["links"] == [request.get_span_context().span_id]


def test_metrics_are_exported(cluster: Cluster) -> None:
    handle = cluster.run("outer")
    assert handle.instance_status == "COMPENSATED"
    name = f"{__name__}.outer"
    wanted = [
        ("orchestrator.instance.started", {"orchestrator.workflow": name}),
        ("orchestrator.instance.ended", {"orchestrator.workflow": name, "orchestrator.status": "COMPENSATED"}),
        ("orchestrator.step.wait", {"orchestrator.task": f"{__name__}.pay"}),
        ("orchestrator.pass.duration", {"orchestrator.workflow": name}),
        ("orchestrator.due.age", {}),
    ]
    for task, kind, outcome in (("pay", "step", "succeeded"), ("refuse", "step", "failed"), ("inner", "child", None)):
        about = {"orchestrator.task": f"{__name__}.{task}", "orchestrator.kind": kind}
        wanted.append(("orchestrator.step.duration", {**about, "orchestrator.outcome": outcome or "succeeded"}))
    for each in wanted:
        wait_until(
            lambda each=each: each in [(m["metric"], m["attributes"]) for m in read_lines(cluster, "metrics")],  # type: ignore[misc]
            f"{each}: {sorted({m['metric'] for m in read_lines(cluster, 'metrics')})}",
        )
    # of the store as a whole the workers' own processes tell, and not each process of their pools
    workers = {worker.pid for worker in cluster.workers}

    def list_telling() -> set[int]:
        return {line["pid"] for line in read_lines(cluster, "metrics") if line["metric"] == "orchestrator.due.age"}

    wait_until(lambda: list_telling() >= workers, "both workers telling of the store")
    assert list_telling() == workers
