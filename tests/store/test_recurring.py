"""Runs: each with a history of its own; what was not received or delivered is there for the next one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.store import history, instances
from orchestrator.store.instances import Status
from orchestrator.store.tables import message

from .locks import before_statement, lose_answer
from .test_settling import lost_answer
from .world import World, step, succeeds

Worlds = Callable[..., World]


def again(ctx: Context, number: int, last: int = 3) -> Any:
    ctx.run(step("work", number))
    if number < last:
        ctx.recur(number + 1, last)
    return number


def run_once(started: World) -> World:
    present = started.at("order-1")
    present.run(0, succeeds(present.run_number))
    present.go_on()
    return present.at("order-1")


def test_each_run_has_a_history_of_its_own_and_the_old_ones_stay_as_they_are(lives: Worlds) -> None:
    started = lives(again=again)
    started.start("again", 0)
    first_rows: list[Any] = []
    for number in range(3):
        assert started.at("order-1").run_number == number
        run_once(started)
        first_rows.append(started.rows())
    run_once(started)
    assert first_rows[0] == first_rows[1] == first_rows[2]
    assert started.at("order-1").result() == 3
    with started.store.read("look") as connection:
        runs = instances.list_runs(connection, "order-1")
        assert [len(history.load_rows(connection, "order-1", number)) for number in range(4)] == [1] * 4
    assert [(run[0], run[1]) for run in runs] == [
        (0, '{"args": [0], "kwargs": {}}'),
        (1, '{"args":[1,3],"kwargs":{}}'),
        (2, '{"args":[2,3],"kwargs":{}}'),
    ]


def test_a_late_settlement_for_an_old_run_changes_nothing(lives: Worlds) -> None:
    started = lives(again=again)
    started.start("again", 0)
    lost = started.take(0)
    started.lose(lost)
    started.run(0, succeeds())
    started.go_on()
    before = started.at("order-1").instance
    assert not started.end(lost, succeeds("late"))
    after = started.at("order-1").instance
    assert (after.next_order, after.waiting, after.status) == (before.next_order, before.waiting, Status.RUNNING)
    assert started.claim(0, dispatch=1) is None


def reading(ctx: Context, run: int, received: list[Any]) -> Any:
    if run == 2:
        return received
    got = [ctx.receive("a")]
    return ctx.recur(run + 1, [*received, *got])


def test_messages_that_were_not_received_are_there_for_the_next_run_in_their_order(lives: Worlds) -> None:
    started = lives(read=reading)
    started.record("read", 0, [])
    for number in range(4):
        started.send("b" if number == 1 else "a", number)
    started.wake()
    started.advance()
    present = started.at("order-1")
    assert (present.run_number, present.instance.mail, present.instance.next_order) == (1, 3, 4)
    with started.store.read("look") as connection:
        columns = (message.c.run, message.c.taken_order, message.c.received_seq)
        rows = connection.execute(select(*columns).order_by(message.c.id)).all()
    assert [tuple(row) for row in rows] == [(0, 1, 0), (1, 1, None), (1, 2, None), (1, 3, None)]
    started.go_on()
    assert started.result() == [0, 2]


def test_a_message_that_comes_while_the_run_ends_is_there_for_the_next_one(lives: Worlds) -> None:
    started = lives(read=reading)
    started.start("read", 0, [])
    started.send("a", "first")
    started.wake()
    started.workflows.during_pass = lambda: started.send("a", "second")
    started.go_on()
    assert started.result() == ["first", "second"]


def test_a_cancellation_that_was_not_delivered_is_raised_in_the_next_run(lives: Worlds) -> None:
    def workflow(ctx: Context, run: int) -> Any:
        if run == 0:
            ctx.receive("go")
            ctx.recur(1)
        ctx.run(step("reserve"), compensate=step("release"))
        return ctx.sleep(60)

    started = lives(recur=workflow)
    started.start("recur", 0)
    started.send("go")
    started.wake()
    started.cancel("enough")  # the run that ends has not been told when it does
    started.send("other")
    started.wake()
    started.go_on()
    present = started.at("order-1")
    present.run_all()
    assert present.status() is Status.CANCELLED
    assert present.instance.cancel_reason == "enough"


def test_a_run_that_was_cancelled_and_declined_can_be_cancelled_in_the_next(lives: Worlds) -> None:
    def workflow(ctx: Context, run: int) -> Any:
        try:
            ctx.sleep(60)
        except errors.WorkflowCancelled:
            if run == 0:
                ctx.recur(1)
            return "gave in"

    started = lives(recur=workflow)
    started.start("recur", 0)
    started.cancel()
    started.go_on()
    present = started.at("order-1")
    assert (present.run_number, present.status(), present.instance.cancel_order) == (1, Status.RUNNING, None)
    present.cancel()
    present.go_on()
    assert present.result() == "gave in"


def test_subscriptions_hold_and_timers_of_the_old_run_are_stopped(lives: Worlds) -> None:
    def workflow(ctx: Context, run: int) -> Any:
        if run == 0:
            ctx.subscribe("news")
            ctx.timer(60)
            ctx.message("never")
            ctx.recur(1)
        return ctx.receive("news")

    started = lives(recur=workflow)
    started.start("recur", 0)
    assert [row.due_at for row in started.rows()] == [None] * 3
    started.go_on()
    started.clock.advance(60)
    started.settle_due()
    started.publish_message("news", "heard")
    started.go_on()
    assert started.result() == "heard"


def test_what_is_open_is_waited_for_and_a_registered_compensation_refuses(lives: Worlds) -> None:
    def workflow(ctx: Context, run: int) -> Any:
        if run == 0:
            ctx.start(step("work"), compensate=False)
            ctx.recur(1)
        ctx.run(step("reserve"), compensate=step("release"))
        ctx.recur(2)

    started = lives(recur=workflow)
    started.start("recur", 0)
    assert started.instance.run == 0
    started.run(0, succeeds())
    started.go_on()
    present = started.at("order-1")
    assert present.run_number == 1
    present.run_all()
    assert (present.status(), present.states()) == (Status.BLOCKED, ["reserve succeeded"])
    assert "ctx.commit()" in (present.instance.blocked or "")


def test_a_run_that_began_without_an_answer_has_begun_once(lives: Worlds) -> None:
    started = lives(again=again)
    started.start("again", 0)
    lose_answer(started.store, lost_answer(), "settle")
    started.run(0, succeeds())
    started.go_on()
    assert started.instance.run == 1
    with started.store.read("look") as connection:
        assert len(instances.list_runs(connection, "order-1")) == 1


def run_one(started: World, number: int) -> None:
    started.run_number = number
    started.run(0, succeeds(number))
    started.advance()


def start_with_unread(lives: Worlds, last: int) -> World:
    started = lives(again=again)
    started.start("again", 0, last)
    for _ in range(20):
        started.send("unread")
    started.wake()
    return started


def test_a_pass_reads_no_more_after_many_runs(lives: Worlds) -> None:
    started = start_with_unread(lives, 12)
    statements: list[str] = []
    before_statement(started.store, statements.append)
    counts = []
    for number in range(12):
        statements.clear()
        run_one(started, number)
        counts.append(len(statements))
    assert len(set(counts[1:])) == 1
    started.run_number = 12
    started.run(0, succeeds())
    assert started.result() == 12


@pytest.mark.storm
def test_the_time_of_a_pass_does_not_grow_over_1000_runs(lives: Worlds) -> None:
    started = start_with_unread(lives, 1000)
    hundreds = []
    for hundred in range(0, 1000, 100):
        begun = time.process_time()
        for number in range(hundred, hundred + 100):
            run_one(started, number)
        hundreds.append(time.process_time() - begun)
    assert hundreds[-1] < 1.5 * hundreds[0], f"100 runs took {hundreds}"
