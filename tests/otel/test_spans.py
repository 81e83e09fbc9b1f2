"""Spans that are made of signals alone: their ids, what they say, and whose they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.signals import before_task_publish
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased

from orchestrator import Context, Orchestrator, signals
from orchestrator.core.records import Kind, State
from orchestrator.otel import instrument
from orchestrator.otel.ids import trace_id
from orchestrator.store import instances
from orchestrator.store.history import FRESH, HistoryRow

AT = datetime(2026, 5, 1, 12, tzinfo=UTC)
STEP = {"run": 0, "at": AT, "seq": 0, "kind": "step", "attempt": 1, "undoes": None, "lost": 0}
FINE: dict[str, Any] = {"error_type": None, "message": None}


class Shop:
    """An app that is instrumented, and what it exports."""

    def __init__(self, store: str, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.tracers = TracerProvider(sampler=sampler) if sampler else TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.orchestrator = Orchestrator(self.app, store=store)

        @self.orchestrator.workflow(name="shop.checkout")
        def checkout(ctx: Context) -> None:
            pass

        self.checkout = checkout
        meters = MeterProvider([self.reader])
        for _ in range(2):  # once is enough
            instrument(self.orchestrator, self.tracers, meters)

    def settle(self, instance_id: str, generation: str, **told: Any) -> None:
        self._send(signals.step_settled, "shop.pay", instance_id, generation, **{**STEP, "seconds": 2.0, **told})

    def end(self, instance_id: str, generation: str, **told: Any) -> None:
        about = {"run": 0, "at": AT, "status": "COMPLETED", "seconds": 10.0, "again": False, **FINE, **told}
        self._send(signals.instance_ended, "shop.checkout", instance_id, generation, **about)

    def _send(self, signal: Any, sender: str, instance_id: str, generation: str, **told: Any) -> None:
        about = {"instance_id": instance_id, "generation": generation, "workflow": "shop.checkout"}
        told = {"outcome": "succeeded", "task_id": f"{instance_id}:0:0:1", **FINE, **told} if "seq" in told else told
        told = {"app": self.app, "notice_id": "n", **about, **told}
        for receiver, response in signal.send(sender=sender, **told):
            assert not isinstance(response, Exception), (receiver, response)

    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def count(self, metric: str) -> int:
        data = self.reader.get_metrics_data()
        found = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics] if data else []
        return sum(point.value for m in found if m.name == metric for point in m.data.data_points)  # type: ignore[union-attr, misc]


@pytest.fixture
def shop(sqlite_url: str, disconnected: None) -> Iterator[Shop]:
    shop = Shop(sqlite_url)
    yield shop
    shop.orchestrator.store.dispose()


@pytest.fixture
def disconnected() -> Iterator[None]:
    """Take receivers away again."""
    before = {name: list(getattr(signals, name).receivers) for name in signals.__all__}
    yield
    for name, receivers in before.items():
        getattr(signals, name).receivers[:] = receivers
        getattr(signals, name).sender_receivers_cache.clear()


def ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def test_what_is_told_twice_is_exported_under_the_same_ids(shop: Shop) -> None:
    for _ in range(2):
        shop.settle("order-42", "g")
        shop.end("order-42", "g")
    step, instance, step_again, instance_again = shop.spans()
    assert ids(step) == ids(step_again) and ids(instance) == ids(instance_again)
    assert step.parent is not None and step.parent.span_id == ids(instance)[1]
    assert instance.parent is None and ids(instance)[0] == trace_id("order-42", "g") == ids(step)[0]


def test_spans_take_as_long_as_what_they_tell_of(shop: Shop) -> None:
    shop.settle("order-42", "g", seconds=2.0)
    (span,) = shop.spans()
    ended_at = int(AT.timestamp() * 1e9)
    assert (span.start_time, span.end_time) == (ended_at - 2_000_000_000, ended_at)


def test_another_life_of_an_id_is_another_trace(shop: Shop) -> None:
    shop.end("order-42", "g")
    shop.end("order-42", "h")
    first, second = shop.spans()
    assert ids(first)[0] != ids(second)[0] and ids(first)[1] != ids(second)[1]


def test_what_never_began_has_no_span(shop: Shop) -> None:
    shop.settle("order-42", "g", attempt=0, outcome="withdrawn", seconds=None)
    assert shop.spans() == []


def test_what_ends_again_has_its_span_already_and_is_counted(shop: Shop) -> None:
    shop.end("order-42", "g")
    shop.end("order-42", "g", status="COMPENSATED", again=True, error_type="builtins.ValueError", message="no")
    assert len(shop.spans()) == 1
    assert shop.count("orchestrator.instance.ended") == 2


def test_a_failure_is_recorded_as_an_exception(shop: Shop) -> None:
    shop.settle("order-42", "g", outcome="failed", error_type="shop.CardDeclined", message="insufficient funds")
    (span,) = shop.spans()
    (event,) = span.events
    assert dict(event.attributes or {}) == {
        "exception.type": "shop.CardDeclined",
        "exception.message": "insufficient funds",
    }
    assert (span.status.status_code.name, span.status.description) == ("ERROR", "insufficient funds")


def test_each_app_has_its_own(shop: Shop, sqlite_url: str) -> None:
    other = Shop(sqlite_url)
    shop.end("order-42", "g")
    assert len(shop.spans()) == 1 and other.spans() == []


@pytest.mark.parametrize("starts", ["durably", "by message"])
def test_what_an_instance_was_started_in_is_kept(shop: Shop, starts: str) -> None:
    sent: list[dict[str, Any]] = []

    def note(headers: dict[str, Any], **_more: Any) -> None:
        sent.append(headers)

    before_task_publish.connect(note)
    with shop.tracers.get_tracer("web").start_as_current_span("POST /orders") as request:
        if starts == "durably":
            shop.orchestrator.start(shop.checkout.s(), instance_id="order-42")
        else:
            shop.checkout.apply_async(task_id="order-42")
    expected = f"{request.get_span_context().span_id:016x}"
    assert sent[0]["traceparent"].split("-")[2] == expected
    if starts == "durably":
        with shop.orchestrator.store.read("test") as connection:
            instance = instances.find_instance(connection, "order-42")
        assert instance is not None
        shop.end("order-42", instance.generation)
        (link,) = shop.spans()[-1].links
        assert f"{link.context.span_id:016x}" == expected


def test_a_trace_is_sampled_as_a_whole(sqlite_url: str, disconnected: None) -> None:
    shop = Shop(sqlite_url, ParentBased(TraceIdRatioBased(0.5)))
    for number in range(40):
        shop.settle(f"order-{number}", "g")
        shop.end(f"order-{number}", "g")
    by_trace: dict[int, int] = {}
    for span in shop.spans():
        by_trace[ids(span)[0]] = by_trace.get(ids(span)[0], 0) + 1
    assert set(by_trace.values()) == {2} and 5 < len(by_trace) < 35
    shop.orchestrator.store.dispose()


def test_other_spans_of_the_provider_have_ids_of_their_own(shop: Shop) -> None:
    shop.end("order-42", "g")
    with shop.tracers.get_tracer("orchestrator").start_as_current_span("a"):
        pass
    with shop.tracers.get_tracer("web").start_as_current_span("b"):
        pass
    assert len({ids(span) for span in shop.spans()}) == 3


def test_a_provider_that_samples_nothing_is_no_trouble(sqlite_url: str, disconnected: None) -> None:
    shop = Shop(sqlite_url, ALWAYS_OFF)
    shop.settle("order-42", "g")
    shop.end("order-42", "g")
    assert shop.spans() == []
    shop.orchestrator.store.dispose()


def test_a_store_that_is_away_costs_no_span(disconnected: None) -> None:
    shop = Shop("postgresql+psycopg://nobody@127.0.0.1:1/none")
    begun_at = time.monotonic()
    shop.end("order-42", "g", at=AT + timedelta(seconds=1))
    assert len(shop.spans()) == 1 and time.monotonic() - begun_at < 10


class Broken(Sampler):
    """A part of the user's that does not work."""

    def should_sample(self, *_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("no sampling today")

    def get_description(self) -> str:
        return "broken"


def test_a_provider_that_does_not_work_does_not_keep_steps_from_running(sqlite_url: str, disconnected: None) -> None:
    shop = Shop(sqlite_url, Broken())
    about = {"instance_id": "order-42", "run": 0, "seq": 0, "generation": "g", "kind": Kind.STEP, "name": "shop.pay"}
    columns = {"scope": "", "after_order": 0, "state": State.RUNNING, "scheduled_at": AT}
    row = HistoryRow(**{**FRESH, **about, **columns})
    with shop.orchestrator.instrumentation.attempt(row), shop.orchestrator.instrumentation.body(row):
        ran = True
    assert ran
    shop.orchestrator.store.dispose()
