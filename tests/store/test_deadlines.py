"""Deadlines: the same path as a cancellation, by the clock."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.runtime.passes import WorkflowOptions
from orchestrator.store import instances
from orchestrator.store.instances import Status

from .locks import lose_answer
from .test_settling import lost_answer
from .world import World, at_once, step, succeeds

Worlds = Callable[..., World]


def buy(ctx: Context, **options: Any) -> Any:
    ctx.run(step("reserve"), compensate=step("release"), **options)
    return ctx.run(step("charge"), compensate=step("refund"))


def due_in_a_minute(lives: Worlds, workflow: Callable[..., Any] = buy) -> World:
    started = lives(buy=workflow)
    started.workflows.declared = WorkflowOptions(deadline=timedelta(minutes=1))
    started.start("buy")
    return started


def count_past_deadline(started: World) -> int:
    with started.store.read("look") as connection:
        return len(instances.list_past_deadline(connection, started.clock(), 10))


def test_the_deadline_counts_from_the_start_and_undoes_like_a_cancellation(lives: Worlds) -> None:
    started = lives(buy=buy)
    started.workflows.declared = WorkflowOptions(deadline=timedelta(minutes=1))
    started.record("buy")
    started.clock.advance(30)
    started.advance()
    started.run(0, succeeds())
    started.clock.advance(29)
    started.pass_deadlines()
    assert started.instance.deadline_order is None
    started.clock.advance(1)
    started.pass_deadlines()
    started.run_all()
    assert started.states() == ["reserve succeeded", "charge withdrawn", "release succeeded"]
    assert (started.status(), count_past_deadline(started)) == (Status.CANCELLED, 0)


def test_a_deadline_and_a_cancellation_at_once_are_one_undo(
    lives: Worlds, another_process: Callable[[World], World]
) -> None:
    started = due_in_a_minute(lives)
    started.run(0, succeeds())
    started.clock.advance(60)
    first, second = another_process(started), another_process(started)
    at_once(first.pass_deadlines, second.cancel, first.pass_deadlines, second.cancel)
    started.run_all()
    assert started.states() == ["reserve succeeded", "charge withdrawn", "release succeeded"]
    assert started.status() is Status.CANCELLED


def test_past_the_pivot_the_deadline_is_ignored(lives: Worlds) -> None:
    started = due_in_a_minute(lives, lambda ctx: buy(ctx, pivot=True))
    started.run(0, succeeds())
    started.clock.advance(60)
    started.pass_deadlines()
    assert count_past_deadline(started) == 0
    started.run_all()
    assert started.status() is Status.COMPLETED


def test_who_catches_the_deadline_knows_it_for_one_and_may_return(lives: Worlds) -> None:
    def patient(ctx: Context) -> Any:
        try:
            ctx.sleep(3600)
        except errors.WorkflowCancelled as cancelled:
            return cancelled.is_deadline

    started = due_in_a_minute(lives, patient)
    started.clock.advance(60)
    started.pass_deadlines()
    started.go_on()
    assert started.result() is True


def test_what_has_ended_has_no_deadline_any_more(lives: Worlds) -> None:
    started = due_in_a_minute(lives)
    started.run_all()
    started.clock.advance(60)
    assert count_past_deadline(started) == 0
    started.publish(started.coordinator.pass_deadline("order-1", started.generation))
    assert started.status() is Status.COMPLETED


def test_a_deadline_while_it_is_undone_changes_nothing(lives: Worlds) -> None:
    started = due_in_a_minute(lives)
    started.run(0, succeeds())
    started.cancel()
    started.go_on()
    assert started.status() is Status.COMPENSATING
    started.clock.advance(60)
    started.pass_deadlines()
    started.run_all()
    assert started.states() == ["reserve succeeded", "charge withdrawn", "release succeeded"]


@pytest.mark.parametrize("is_delivered", [True, False])
def test_a_deadline_holds_over_all_runs(lives: Worlds, is_delivered: bool) -> None:
    def again(ctx: Context, number: int) -> Any:
        ctx.receive("more")
        ctx.recur(number + 1)

    started = lives(again=again)
    started.workflows.declared = WorkflowOptions(deadline=timedelta(minutes=1))
    started.start("again", 0)
    started.send("more")
    if is_delivered:
        started.go_on()
        assert started.instance.run == 1
    started.clock.advance(60)
    started.wake()
    started.pass_deadlines()
    started.go_on()
    assert started.status() is Status.CANCELLED


def test_a_deadline_whose_answer_was_lost_is_one(lives: Worlds) -> None:
    started = due_in_a_minute(lives)
    started.clock.advance(60)
    lose_answer(started.store, lost_answer(), "deadline")
    started.pass_deadlines()
    started.run_all()
    assert started.status() is Status.CANCELLED
