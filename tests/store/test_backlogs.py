"""A backlog: messages that wait for longer than anybody doubts them are late, and not lost; few are sent again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import Outcome
from orchestrator.runtime import publications as sending
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.publications import DOUBTED_AT_ONCE, Publications
from orchestrator.store import tables
from orchestrator.store.history import HistoryRow

from .world import BEGINNING, World, step

Worlds = Callable[..., World]

WIDTH = DOUBTED_AT_ONCE + 15


class Broker:
    """Whether messages wait in its queue, and what was sent to it again."""

    def __init__(self, *, is_empty: bool) -> None:
        self.has_nothing = is_empty
        self.sent: list[int] = []

    def is_empty(self, _name: str | None) -> bool:
        return self.has_nothing

    def queue_of(self, _row: object) -> str:
        return "celery"

    def deliver(self, _outbox: Outbox) -> None:
        """What follows a settlement does not matter here."""

    def send_out(self, row: HistoryRow) -> Outbox | None:
        self.sent.append(row.seq)
        return None


def publications(started: World, broker: Broker) -> Publications:
    return Publications(started.coordinator, broker, broker)  # type: ignore[arg-type]


def fan_out(ctx: Context, **options: Any) -> Any:
    return ctx.gather(*(ctx.start(step("work", number), **options) for number in range(WIDTH)), return_exceptions=True)


def waiting(world: Worlds, function: Callable[..., Any] = fan_out) -> World:
    """Have a backlog whose messages are doubted."""
    started = world(fan=function)
    started.start("fan")
    started.clock.advance(started.settings.publish_grace)
    return started


def test_of_a_backlog_a_few_messages_are_sent_again_and_the_others_are_put_off(world: Worlds) -> None:
    started, broker = waiting(world), Broker(is_empty=False)
    poll = publications(started, broker).settle_due_records
    poll()
    poll()
    assert sorted(broker.sent) == list(range(DOUBTED_AT_ONCE))
    assert [row.publications for row in started.rows()] == [2] * DOUBTED_AT_ONCE + [1] * 15
    started.clock.advance(started.settings.publish_grace)
    poll()
    assert sorted(broker.sent) == list(range(WIDTH))


def test_of_a_backlog_larger_than_a_batch_the_oldest_of_all_are_sent_again(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was put off time and again, for it was lost, has its turn."""
    started, broker = waiting(world), Broker(is_empty=False)
    monkeypatch.setattr(sending, "BATCH", 5)
    lost = WIDTH - 1
    with started.store.begin("test") as connection:
        own = (tables.history.c.seq == lost,)
        values = {
            "dispatched_at": BEGINNING - timedelta(hours=1),
            "due_at": started.clock(),
        }  # the last by when it is due
        connection.execute(tables.history.update().where(*own).values(**values))
    publications(started, broker).settle_due_records()
    assert broker.sent[0] == lost


def test_where_the_queue_is_empty_all_are_sent_again_at_once(world: Worlds) -> None:
    started, broker = waiting(world), Broker(is_empty=True)
    publications(started, broker).settle_due_records()
    assert sorted(broker.sent) == list(range(WIDTH))


def test_the_oldest_is_sent_again_first(world: Worlds) -> None:
    """It is not behind the others in their queue: its message was lost."""
    started, broker = waiting(world), Broker(is_empty=False)
    started.start("fan", instance_id="older")  # by its name; by its time it is the younger one
    started.clock.advance(started.settings.publish_grace)
    publications(started, broker).settle_due_records()
    assert [row.publications for row in started.at("order-1").rows()].count(2) == DOUBTED_AT_ONCE
    assert {row.publications for row in started.at("older").rows()} == {1}


@pytest.mark.parametrize("batch", [5, 1000])
def test_what_is_published_for_the_first_time_does_not_wait_behind_a_backlog(
    world: Worlds, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(sending, "BATCH", batch)

    def later(ctx: Context) -> Any:
        ctx.start(step("ship").set(countdown=30 * 0.9))
        return fan_out(ctx)

    started, broker = waiting(world, later), Broker(is_empty=False)
    publications(started, broker).settle_due_records()
    assert broker.sent[0] == 0
    assert len(broker.sent) == min(batch, DOUBTED_AT_ONCE + 1)
    started.clock.advance(started.settings.poll_interval)
    publications(started, broker).settle_due_records()
    assert len(broker.sent) <= 1 + DOUBTED_AT_ONCE


def test_a_step_whose_timeout_has_passed_is_not_put_off(world: Worlds) -> None:
    started, broker = waiting(world, lambda ctx: fan_out(ctx, timeout=10)), Broker(is_empty=False)
    publications(started, broker).settle_due_records()
    assert {row.outcome for row in started.rows()} <= {Outcome.WITHDRAWN, Outcome.FAILED}
    assert broker.sent == []


def test_one_that_is_put_off_can_be_claimed(world: Worlds) -> None:
    started, broker = waiting(world), Broker(is_empty=False)
    publications(started, broker).settle_due_records()
    row = started.take(WIDTH - 1)
    assert (row.due_at, row.publish_at) == (None, None)


def test_a_timeout_comes_before_what_was_put_off(world: Worlds) -> None:
    started = waiting(world, lambda ctx: fan_out(ctx, timeout=45))
    publications(started, Broker(is_empty=False)).settle_due_records()
    last = started.row(WIDTH - 1)
    assert last.due_at == last.timeout_at
