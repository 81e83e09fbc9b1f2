"""``undo()``: the compensations of an instance that had completed, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import State
from orchestrator.store import instances
from orchestrator.store.instances import Status

from .locks import lose_answer
from .test_settling import lost_answer
from .world import FAILS, World, at_once, step, succeeds

Worlds = Callable[..., World]


def buy(ctx: Context) -> Any:
    ctx.run(step("reserve"), compensate=step("release"))
    ctx.run(step("charge"), compensate=step("refund"))
    return "bought"


def bought(lives: Worlds, workflow: Callable[..., Any] = buy) -> World:
    started = lives(buy=workflow)
    started.start("buy")
    started.run_all()
    assert started.result() == "bought"
    return started


def undo(started: World) -> None:
    started.lifecycle.undo(started.instance)


def test_a_completed_instance_is_undone_in_reverse_and_celery_is_not_told_twice(lives: Worlds) -> None:
    started = bought(lives)
    with started.store.begin("finished") as connection:
        instances.delete_finish(connection, "order-1", started.generation)
    undo(started)
    assert (started.status(), started.instance.ended_at) == (Status.COMPENSATING, None)
    started.run_all()
    assert started.states()[2:] == ["refund succeeded", "release succeeded"]
    assert (started.status(), started.instance.not_undone) == (Status.COMPENSATED, None)
    with started.store.read("look") as connection:
        assert instances.list_due_finishes(connection, started.clock().replace(year=2100), 10) == []


def test_undoing_twice_and_by_8_at_once_undoes_once(lives: Worlds, another_process: Callable[[World], World]) -> None:
    started = bought(lives)
    others = [another_process(started) for _ in range(4)]
    at_once(*(lambda other=other: undo(other) for other in others * 2))
    undo(started)
    started.run_all()
    undo(started)
    assert started.states()[2:] == ["refund succeeded", "release succeeded"]
    assert started.status() is Status.COMPENSATED


def test_undoing_whose_answer_was_lost_undoes_once(lives: Worlds) -> None:
    started = bought(lives)
    lose_answer(started.store, lost_answer(), "undo")
    undo(started)
    started.run_all()
    assert (len(started.rows()), started.status()) == (4, Status.COMPENSATED)


def test_what_could_not_be_undone_is_named_and_repaired(lives: Worlds) -> None:
    started = bought(lives)
    undo(started)
    started.go_on()
    started.run(2, FAILS)
    started.run_all()
    assert started.status() is Status.COMPENSATION_FAILED
    assert '"name": "refund"' in (started.instance.not_undone or "")
    started.operator.retry_compensation(started.instance, 1)
    started.run(-1, succeeds())
    assert (started.status(), started.instance.not_undone) == (Status.COMPENSATED, None)


def test_messages_timers_and_a_declined_cancellation_in_the_history_are_no_obstacle(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(step("reserve"), compensate=step("release"))
        try:
            ctx.sleep(60)
        except errors.WorkflowCancelled:
            ctx.receive("paid")
        ctx.sleep(30)
        ctx.run(step("charge"), compensate=step("refund"))
        return "bought"

    started = lives(buy=workflow)
    started.start("buy")
    started.run(0, succeeds())
    started.cancel()
    started.go_on()
    started.send("paid", 1)
    started.send("unread", 2)
    started.go_on()
    started.clock.advance(30)
    started.settle_due()
    started.go_on()
    started.send("paid", "unread as well")
    started.run_all()
    assert started.result() == "bought"
    undo(started)
    started.send("paid", "to nobody any more")
    started.run_all()
    assert [row.undoes for row in started.rows() if row.undoes is not None] == [4, 0]
    assert started.status() is Status.COMPENSATED


def test_a_late_attempt_of_an_accepted_step_is_drained_before_it_is_undone(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(step("charge"), timeout=60, compensate=step("refund"))
        except errors.StepTimedOut as error:
            ctx.accept(error)
        return "bought"

    started = lives(buy=workflow)
    started.start("buy")
    attempt = started.take(0)
    started.clock.advance(60)
    started.settle_due()
    started.go_on()
    assert (started.result(), started.row(0).state) == ("bought", State.TIMED_OUT)
    undo(started)
    started.go_on()
    assert started.states() == ["charge unknown"]
    started.end(attempt, succeeds("late"))
    assert started.row(1).arguments == '{"args":["late"],"kwargs":{}}'
    started.run_all()
    assert started.status() is Status.COMPENSATED


@pytest.mark.parametrize("status", [Status.RUNNING, Status.CANCELLED, Status.FAILED])
def test_only_what_has_completed_can_be_undone(lives: Worlds, status: Status) -> None:
    started = lives(buy=lambda ctx: ctx.run(step("charge")))
    started.start("buy")
    if status is Status.CANCELLED:
        started.cancel()
    elif status is Status.FAILED:
        started.run(0, FAILS)
    started.go_on()
    assert started.status() is status
    with pytest.raises(errors.InvalidOperation, match=status):
        undo(started)


def test_a_cancellation_or_termination_of_the_undo(lives: Worlds) -> None:
    started = bought(lives)
    undo(started)
    started.cancel()
    started.go_on()
    assert started.status() is Status.COMPENSATING
    started.run(2, succeeds())
    started.lifecycle.terminate(started.instance, None)
    assert (started.status(), started.states()[3:]) == (Status.TERMINATED, ["release withdrawn"])
