"""What is written comes back: instants, payloads of any size and content, everything a record holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import delete

from orchestrator import RetryPolicy, codec
from orchestrator.core.context import Context
from orchestrator.core.records import Outcome
from orchestrator.store import history, instances, tables
from orchestrator.store.engine import Store
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Status
from orchestrator.store.past import as_history

from .world import World, step, succeeds

Worlds = Callable[..., World]

TEXTS = {
    "nul": "a\0b",
    "emoji": "\N{PARTY POPPER}\N{FAMILY}",
    "lone surrogate": "\ud800 and \udfff",
    "quotes": 'it\'s "quoted" \\ %s %(x)s :y ? {z}',
    "lines": "a\r\nb\u2028c\x85d",
    "empty": "",
}


def insert_at(store: Store, instance_id: str, at: datetime) -> None:
    with store.begin("start") as connection:
        instances.insert_instance(
            connection,
            instance_id=instance_id,
            generation="g",
            workflow="w",
            queue=None,
            arguments="{}",
            request=None,
            now=at,
            pass_due_at=at,
        )


@pytest.mark.parametrize(
    "at",
    [
        datetime(2024, 5, 1, 12, 0, 0, 1, tzinfo=UTC),
        datetime(2024, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2024, 3, 31, 2, 30, tzinfo=timezone(timedelta(hours=5, minutes=45))),
        datetime(2345, 1, 1, tzinfo=UTC),
    ],
    ids=str,
)
def test_instants_are_exact_to_the_microsecond_and_aware(store: Store, at: datetime) -> None:
    insert_at(store, "order-1", at)
    with store.read("look") as connection:
        found = instances.find_instance(connection, "order-1")
    assert found is not None
    assert (found.created_at, found.created_at.tzinfo) == (at, UTC)


def test_instants_are_compared_in_order_of_time(store: Store) -> None:
    base = datetime(2024, 5, 1, 12, 0, 0, 0, tzinfo=UTC)
    for microseconds in (0, 1, 100000, 999999, 1000000):
        insert_at(store, str(microseconds), base + timedelta(microseconds=microseconds))
    with store.read("look") as connection:
        owed = instances.list_owed_passes(connection, base + timedelta(microseconds=100000), 10)
    assert [each.instance_id for each in owed] == ["0", "1", "100000"]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_arguments_and_results_come_back_as_they_were(world: Worlds, text: str) -> None:
    def echo(ctx: Context, given: str) -> Any:
        return [given, ctx.run(step("work", given))]

    started = world(echo=echo)
    started.start("echo", text)
    row = started.take(0)
    assert json.loads(row.arguments or "") == {"args": [text], "kwargs": {}}
    started.end(row, succeeds(text))
    assert json.loads(started.instance.result or "") == [text, text]


@pytest.mark.parametrize("character", ["x", "\N{PARTY POPPER}"], ids=["ascii", "escaped"])
def test_payloads_of_a_mebibyte_come_back_as_they_were(world: Worlds, character: str) -> None:
    size = len(json.dumps(character)) - 2
    text = character * (1024 * 1024 // size)
    started = world(echo=lambda ctx, given: ctx.run(step("work", given)))
    started.start("echo", text)
    started.run(0, succeeds(text))
    assert (started.status(), json.loads(started.instance.result or "")) == (Status.COMPLETED, text)


def test_a_record_comes_back_as_it_was_inserted(world: Worlds) -> None:
    retry = RetryPolicy(max_attempts=7, initial_interval=timedelta(microseconds=1), stop_on=("shop.CardDeclined",))

    def workflow(ctx: Context) -> Any:
        signature = step("work", 1, queue="slow", priority=3, expires=600)
        with ctx.saga():
            return ctx.run(signature, compensate=step("undo", "x"), retry=retry, timeout=0.1)

    started = world(one=workflow)
    started.start("one")
    row = started.row(0)
    assert (row.name, row.scope, row.after_order, row.timeout_seconds) == ("work", "1.", 0, 0.1)
    assert row.message_options == {"queue": "slow", "priority": 3, "expires": 600}
    assert row.retry_policy == retry
    assert (row.timeout_at, row.expires_at) == (
        started.clock() + timedelta(milliseconds=100),
        started.clock() + timedelta(seconds=600),
    )
    assert codec.decode(row.compensation or "")["name"] == "undo"
    with started.store.read("look") as connection:
        [record] = as_history(started.instance, history.load_rows(connection, "order-1", 0)).records
    assert record.compensation is not None
    assert (record.compensation.name, record.compensation.arguments) == ("undo", '{"args":["x"],"kwargs":{}}')
    assert record.idempotency_key == f"order-1:{started.generation}:0:0"


def test_the_inbox_is_what_came_in_by_order(world: Worlds) -> None:
    started = world(fan=lambda ctx: ctx.gather(*(step("work", n, expires=1) for n in range(3)), return_exceptions=True))
    started.start("fan")
    started.run(2, succeeds())
    started.clock.advance(1)
    started.time_out(0)
    with started.store.read("look") as connection:
        past = as_history(started.instance, history.load_rows(connection, "order-1", 0))
    assert [(event.order, getattr(event, "seq", None)) for event in past.inbox] == [(1, 2), (2, 0)]
    assert [record.outcome for record in past.records] == [Outcome.WITHDRAWN, None, Outcome.SUCCEEDED]


def test_history_is_deleted_with_one_instance_alone(world: Worlds) -> None:
    started = world(one=lambda ctx: ctx.run(step("work")))
    for instance_id in ("order-1", "Order-1"):
        started.start("one", instance_id=instance_id)
    with started.store.begin("purge") as connection:
        connection.execute(delete(tables.history).where(tables.history.c.instance_id == "order-1"))
        assert history.load_rows(connection, "order-1", 0) == []
    assert [row.instance_id for row in started.rows()] == ["Order-1"]


def test_every_field_of_a_row_is_a_column_and_every_fresh_value_a_field() -> None:
    assert set(history.FRESH) < set(HistoryRow.__slots__)
