"""Cancelling and terminating: wherever an instance stands, it is undone once, and has one status."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator import RetryPolicy, errors
from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State
from orchestrator.store import due, instances
from orchestrator.store.instances import Status

from .locks import lose_answer
from .test_settling import lost_answer
from .world import FAILS, Scripted, World, at_once, step, succeeds

Worlds = Callable[..., World]

FAR = datetime(2100, 1, 1, tzinfo=UTC)


def buy(ctx: Context) -> Any:
    ctx.run(step("reserve"), compensate=step("release"))
    return ctx.run(step("charge"), compensate=step("refund"))


def reserved(lives: Worlds, then: Callable[[Context], Any]) -> World:
    """An instance that has reserved, and then waits for something."""

    def workflow(ctx: Context) -> Any:
        ctx.run(step("reserve"), compensate=step("release"))
        return then(ctx)

    started = lives(buy=workflow)
    started.start("buy")
    started.run(0, succeeds("r-1"))
    return started


def check_undone_once(started: World, status: Status = Status.CANCELLED) -> None:
    started.run_all()
    assert started.status() is status
    assert [name for name in started.states() if name.startswith("release")] == ["release succeeded"]
    with started.store.read("look") as connection:
        assert len(instances.list_due_finishes(connection, FAR, 10)) == 1


# --- where it stands ----------------------------------------------------------------------------------------------


def test_what_has_not_had_its_first_pass_begins_nothing(lives: Worlds) -> None:
    started = lives(buy=buy)
    started.record("buy")
    started.cancel("not wanted")
    started.go_on()
    assert (started.status(), started.instance.cancel_reason) == (Status.CANCELLED, "not wanted")
    assert (started.states(), started.published) == (["reserve withdrawn"], [])


def test_a_step_that_has_not_begun_is_withdrawn(lives: Worlds) -> None:
    started = reserved(lives, lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    started.cancel()
    check_undone_once(started)
    assert started.states() == ["reserve succeeded", "charge withdrawn", "release succeeded"]


def test_a_cancellation_that_waits_for_the_pivot_is_raised_as_soon_as_that_fails(lives: Worlds) -> None:
    def pivots(ctx: Context) -> Any:
        ctx.start(step("charge"), pivot=True)
        return ctx.run(step("ship"), compensate=step("recall"))

    started = reserved(lives, pivots)
    shipping = started.take(2)
    started.cancel()
    started.go_on()
    assert "release scheduled" not in started.states()
    started.run(1, FAILS)  # nothing waits for it, but the cancellation does
    assert started.row(2).is_draining
    assert started.end(shipping, succeeds("t-1"))
    check_undone_once(started)
    assert [name for name in started.states() if name.startswith("recall")] == ["recall succeeded"]


def test_a_step_under_way_is_drained_and_undone(lives: Worlds) -> None:
    started = reserved(lives, lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    attempt = started.take(1)
    started.cancel()
    started.go_on()
    assert (started.status(), started.row(1).is_draining, len(started.rows())) == (Status.COMPENSATING, True, 2)
    started.cancel("again")
    started.go_on()
    started.end(attempt, succeeds("c-1"))
    check_undone_once(started)
    assert started.states()[2:] == ["refund succeeded", "release succeeded"]


WAITS: dict[str, Callable[[Context], Any]] = {
    "timer": lambda ctx: ctx.sleep(3600),
    "receive": lambda ctx: ctx.receive("paid"),
    "receive with a timeout": lambda ctx: ctx.receive("paid", timeout=60),
    "wait": lambda ctx: ctx.wait(ctx.message("paid"), ctx.timer(60), timeout=30),
    "gather": lambda ctx: ctx.gather(step("work", 1), step("work", 2)),
    "map": lambda ctx: ctx.map(step("work"), range(4), concurrency=2, compensate=step("undo")),
}


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_for_anything_is_given_up(lives: Worlds, wait: str) -> None:
    started = reserved(lives, WAITS[wait])
    started.cancel()
    check_undone_once(started)
    assert {row.state for row in started.rows()} == {State.SETTLED}
    with started.store.read("look") as connection:
        assert due.list_due_records(connection, FAR, 10) == []


def test_in_a_map_what_is_held_is_withdrawn_and_what_is_done_is_undone(lives: Worlds) -> None:
    started = reserved(lives, WAITS["map"])
    started.run(1, succeeds())
    attempt = started.take(2)
    started.cancel()
    started.go_on()
    assert started.states()[1:] == ["work succeeded", "work running", "work withdrawn", "work withdrawn"]
    started.end(attempt, succeeds())
    check_undone_once(started)
    assert [row.undoes for row in started.rows()[5:]] == [2, 1, 0]


def test_of_a_failure_and_a_cancellation_the_first_decides(lives: Worlds) -> None:
    started = reserved(lives, lambda ctx: ctx.gather(step("charge"), step("work")))
    attempt = started.take(1)
    started.run(2, succeeds())
    started.cancel()
    started.end(attempt, FAILS)
    check_undone_once(started, Status.CANCELLED)


def test_while_it_drains_or_is_undone_a_cancellation_changes_nothing(lives: Worlds) -> None:
    started = reserved(lives, lambda ctx: ctx.gather(step("charge"), step("work"), return_exceptions=False))
    attempt = started.take(1)
    started.run(2, FAILS)
    started.end(attempt, succeeds())
    assert started.status() is Status.COMPENSATING
    started.cancel()
    check_undone_once(started, Status.COMPENSATED)


def test_what_has_just_ended_cannot_be_cancelled_but_twice_is_once(lives: Worlds) -> None:
    started = lives(buy=buy)
    started.start("buy")
    started.run(0, succeeds())
    started.run(1, succeeds("c-1"))
    with pytest.raises(errors.InvalidOperation, match="COMPLETED"):
        started.cancel()
    started.instance_id = "order-1"
    started.start("buy", instance_id="order-2")
    started.cancel()
    started.go_on()
    started.cancel()
    assert started.status() is Status.CANCELLED


def test_an_instance_that_no_code_matches_is_cancelled_when_one_does(lives: Worlds) -> None:
    started = reserved(lives, lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    changed = started.coordinator_of(
        "worker-1", workflows=Scripted({"buy": lambda ctx: ctx.run(step("ship"))}, ("ship",))
    )
    started.end(started.take(1), succeeds("c-1"), coordinator=changed)
    assert started.status() is Status.BLOCKED
    started.cancel()
    started.go_on()
    assert started.status() is Status.BLOCKED
    started.lifecycle.resume(started.instance)
    started.run_all()
    # the outcome came first, so it had returned before it was cancelled
    assert started.status() is Status.COMPLETED


def test_a_cancellation_that_is_declined_lets_the_workflow_return(lives: Worlds) -> None:
    def then(ctx: Context) -> Any:
        try:
            ctx.sleep(3600)
        except errors.WorkflowCancelled as cancelled:
            return [cancelled.reason, ctx.run(step("work"))]

    started = reserved(lives, then)
    started.cancel("too slow")
    started.run_all()
    assert started.result() == ["too slow", 2]


def test_a_cancellation_whose_answer_was_lost_is_one(lives: Worlds) -> None:
    started = reserved(lives, WAITS["timer"])
    lose_answer(started.store, lost_answer(), "cancel")
    started.cancel()
    check_undone_once(started)


# --- concurrently -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(3))
def test_cancelling_at_once_with_the_end_has_one_outcome(
    lives: Worlds, another_process: Callable[[World], World], turn: int
) -> None:
    started = lives(buy=buy)
    first, second = another_process(started), another_process(started)
    for number in range(3):
        started.start("buy", instance_id=f"order-{number}")
        started.run(0, succeeds())
        attempt = started.take(1)
        for each in (first, second):
            each.instance_id = started.instance_id

        def cancel() -> bool:
            try:
                second.cancel()
            except errors.InvalidOperation:
                return False
            return True

        held, was_cancelled = at_once(functools.partial(first.end, attempt, succeeds()), cancel)
        assert held
        started.run_all()
        if was_cancelled:
            assert started.states()[2:] == ["refund succeeded", "release succeeded"]
            assert started.status() is Status.CANCELLED
        else:
            assert (started.status(), started.states()[2:]) == (Status.COMPLETED, [])


def test_8_that_cancel_at_once_cancel_once(lives: Worlds, another_process: Callable[[World], World]) -> None:
    started = reserved(lives, WAITS["gather"])
    others = [another_process(started) for _ in range(4)]
    at_once(*(other.cancel for other in others * 2))
    check_undone_once(started)


# --- terminating --------------------------------------------------------------------------------------------------


def test_terminating_stops_everything_and_undoes_nothing(lives: Worlds) -> None:
    started = reserved(lives, WAITS["map"])
    attempt = started.take(1)
    started.lifecycle.terminate(started.instance, "enough")
    assert started.status() is Status.TERMINATED
    assert started.states() == ["reserve succeeded", "work running", *["work withdrawn"] * 3]
    assert started.end(attempt, succeeds())
    started.run_all()
    assert (started.status(), len(started.rows())) == (Status.TERMINATED, 5)
    started.lifecycle.terminate(started.instance, "twice is once")


def test_the_timeout_of_what_a_terminated_instance_left_behind_does_not_stay_due(lives: Worlds) -> None:
    started = reserved(lives, lambda ctx: ctx.run(step("charge"), timeout=60, compensate=step("refund")))
    attempt = started.take(1)
    started.lifecycle.terminate(started.instance, None)
    started.clock.advance(60)
    started.settle_due()
    with started.store.read("look") as connection:
        assert due.list_due_records(connection, started.clock(), 10) == []
    assert started.end(attempt, succeeds())


@pytest.mark.parametrize("end", ["lost", "fails", "asks for a retry"])
def test_what_was_under_way_when_its_instance_was_terminated_is_not_tried_again(lives: Worlds, end: str) -> None:
    started = reserved(lives, lambda ctx: ctx.run(step("charge"), retry=RetryPolicy(max_attempts=5)))
    attempt = started.take(1)
    started.lifecycle.terminate(started.instance, None)
    if end == "asks for a retry":
        given: Any = {"delay_seconds": 0, "failure": None, "values": {}}
        assert not started.coordinator.release(attempt.key, attempt.attempt, **given)[0]
    if end == "lost":
        started.lose(attempt)
    else:
        started.end(attempt, FAILS)
    assert (started.row(1).state, started.row(1).attempt, started.open_steps()) == (State.SETTLED, 1, [])


def test_of_a_foreign_step_that_was_published_nobody_can_say_that_it_never_began(lives: Worlds) -> None:
    started = reserved(lives, lambda ctx: ctx.run(step("charge"), foreign=True, timeout=60))
    started.lifecycle.terminate(started.instance, None)
    assert started.row(1).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("status", [Status.BLOCKED, Status.COMPENSATING])
def test_terminating_a_blocked_or_compensating_instance_ends_it(lives: Worlds, status: Status) -> None:
    started = reserved(lives, lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    if status is Status.BLOCKED:
        changed = Scripted({"buy": lambda ctx: ctx.run(step("ship"))}, ("ship",))
        started.end(started.take(1), FAILS, coordinator=started.coordinator_of("worker-1", workflows=changed))
    else:
        started.run(1, FAILS)
    assert started.status() is status
    started.lifecycle.terminate(started.instance, None)
    assert started.status() is Status.TERMINATED
