"""A backlog: messages that wait for longer than anybody doubts them are late, and not lost; few are sent again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import Outcome
from orchestrator.runtime import publications as sending
from orchestrator.runtime.backlogs import SENT_AGAIN
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.publications import Publications
from orchestrator.store import tables
from orchestrator.store.due import DueRecord
from orchestrator.store.history import HistoryRow

from .world import BEGINNING, World, step

Worlds = Callable[..., World]

WIDTH = SENT_AGAIN + 15


class Broker:
    """Whether messages wait in its queues, one for each task, and what was sent to them again."""

    def __init__(self, *, is_empty: bool) -> None:
        self.has_nothing = is_empty
        self.sent: list[int] = []
        self.before_sending: Callable[[], object] | None = None

    def is_empty(self, _name: str | None) -> bool:
        return self.has_nothing

    def queue_of(self, row: HistoryRow | DueRecord) -> str:
        return row.name

    def deliver(self, _outbox: Outbox) -> None:
        """What follows a settlement does not matter here."""

    def send_out(self, row: HistoryRow) -> Outbox | None:
        interruption, self.before_sending = self.before_sending, None
        if interruption is not None:
            interruption()
        self.sent.append(row.seq)
        return None


def publications(started: World, broker: Broker) -> Publications:
    return Publications(started.coordinator, broker, broker)  # type: ignore[arg-type]


def fan_out(ctx: Context, **options: Any) -> Any:
    return ctx.gather(*(ctx.start(step("work", number), **options) for number in range(WIDTH)), return_exceptions=True)


def wide(ctx: Context) -> Any:
    return ctx.gather(*(ctx.start(step("work", number)) for number in range(400)), return_exceptions=True)


def waiting(world: Worlds, function: Callable[..., Any] = fan_out) -> World:
    """Have a backlog whose messages are doubted."""
    started = world(fan=function)
    started.start("fan")
    started.clock.advance(started.settings.publish_grace)
    return started


def test_of_a_backlog_a_few_messages_are_sent_again_and_the_others_each_in_its_turn(world: Worlds) -> None:
    started, broker = waiting(world), Broker(is_empty=False)
    poll = publications(started, broker).settle_due_records
    poll()
    poll()
    assert sorted(broker.sent) == list(range(SENT_AGAIN))
    assert [row.publications for row in started.rows()] == [2] * SENT_AGAIN + [1] * 15
    started.clock.advance(started.settings.poll_interval)
    poll()
    assert sorted(broker.sent) == list(range(WIDTH))


def test_a_backlog_that_does_not_move_is_sent_again_at_a_steady_rate(world: Worlds) -> None:
    """What was lost in a queue that is never empty comes back at that rate."""
    started, broker = waiting(world, wide), Broker(is_empty=False)
    poll = publications(started, broker).settle_due_records
    for polls in range(1, 11):
        poll()
        assert len(set(broker.sent)) == len(broker.sent) == polls * SENT_AGAIN
        started.clock.advance(started.settings.poll_interval)


def test_what_becomes_due_little_by_little_is_rationed_too(world: Worlds) -> None:
    """A poller that is woken by each message of a backlog must not send each of them again."""
    started, broker = waiting(world, wide), Broker(is_empty=False)
    poll = publications(started, broker).settle_due_records
    with started.store.begin("test") as connection:
        for seq in range(200):
            due_at = started.clock() + timedelta(milliseconds=5 * seq)
            connection.execute(tables.history.update().where(tables.history.c.seq == seq).values(due_at=due_at))
    for _ in range(50):
        poll()
        started.clock.advance(0.02)
    assert SENT_AGAIN <= len(broker.sent) <= 2 * SENT_AGAIN


def test_a_message_that_is_lost_does_not_wait_behind_those_of_another_queue(world: Worlds) -> None:
    """One queue has hundreds that nobody takes and that are older; another one is busy, and never empty."""

    def both(ctx: Context) -> Any:
        busy = [ctx.start(step("charge", number)) for number in range(3)]
        return ctx.gather(*(ctx.start(step("work", number)) for number in range(400)), *busy)

    started, broker = waiting(world, both), Broker(is_empty=False)
    younger = started.clock()
    with started.store.begin("test") as connection:
        of_the_busy = tables.history.c.name == "charge"
        connection.execute(tables.history.update().where(of_the_busy).values(dispatched_at=younger))
    publications(started, broker).settle_due_records()
    assert {row.publications for row in started.rows() if row.name == "charge"} == {2}


def test_what_waits_for_long_is_looked_at_ever_more_rarely(world: Worlds) -> None:
    """A message that is lost is at most twice as late as when it was doubted."""
    started, broker = waiting(world, wide), Broker(is_empty=False)
    hour = timedelta(hours=1)
    with started.store.begin("test") as connection:
        old = tables.history.c.seq < 390
        connection.execute(tables.history.update().where(old).values(dispatched_at=BEGINNING - hour))
    coordinator = started.coordinator
    coordinator.settings = started.settings.model_copy(update={"poll_interval": 1e6, "publish_grace": 30.0})
    Publications(coordinator, broker, broker).settle_due_records()  # type: ignore[arg-type]
    assert len(broker.sent) == SENT_AGAIN
    due_at = {row.seq: row.due_at for row in started.rows() if row.seq not in broker.sent}
    grace = timedelta(seconds=30)
    assert {at for seq, at in due_at.items() if seq < 390} == {started.clock() + hour + grace}
    assert {at for seq, at in due_at.items() if seq >= 390} == {started.clock() + grace}


def test_two_pollers_that_see_the_same_backlog_do_not_send_it_twice(world: Worlds) -> None:
    started, broker, other = waiting(world), Broker(is_empty=False), Broker(is_empty=False)
    broker.before_sending = publications(started, other).settle_due_records
    publications(started, broker).settle_due_records()
    assert set(broker.sent).isdisjoint(other.sent)
    assert len(broker.sent) == 1
    assert max(row.publications for row in started.rows()) == 2


def test_a_broker_that_is_away_does_not_keep_a_backlog_from_its_turn(world: Worlds) -> None:
    started, broker = waiting(world), Broker(is_empty=False)

    def fail() -> None:
        raise ConnectionRefusedError

    broker.before_sending = fail
    poll = publications(started, broker).settle_due_records
    with pytest.raises(ConnectionRefusedError):
        poll()
    assert {row.publications for row in started.rows()} == {1}
    started.clock.advance(started.settings.publish_grace)
    poll()
    assert len(broker.sent) == SENT_AGAIN


def test_a_clock_that_is_put_back_does_not_keep_a_backlog_from_its_turn(world: Worlds) -> None:
    started, broker = waiting(world), Broker(is_empty=False)
    poll = publications(started, broker).settle_due_records
    started.clock.advance(3600)
    poll()
    assert len(broker.sent) == SENT_AGAIN
    started.clock.advance(-3600 + started.settings.poll_interval)
    with started.store.begin("test") as connection:
        connection.execute(tables.history.update().values(due_at=started.clock()))
    poll()
    assert sorted({*broker.sent}) == list(range(WIDTH))


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
    assert [row.publications for row in started.at("order-1").rows()].count(2) == SENT_AGAIN
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
    assert len(broker.sent) == 1 + SENT_AGAIN


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
    started = waiting(world, lambda ctx: fan_out(ctx, timeout=30.5))
    publications(started, Broker(is_empty=False)).settle_due_records()
    last = started.row(WIDTH - 1)
    assert last.due_at == last.timeout_at
