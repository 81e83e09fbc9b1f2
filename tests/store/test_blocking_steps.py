"""Steps whose failure blocks their instance: past its pivot, or parked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import RetryPolicy, errors
from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State
from orchestrator.runtime.passes import WorkflowOptions
from orchestrator.store.instances import Status

from .locks import lose_answer
from .test_settling import lost_answer
from .world import DOUBTS, FAILS, Scripted, World, step, succeeds

Worlds = Callable[..., World]

PARKS = WorkflowOptions(parks=True)


def parked(lives: Worlds, workflow: Callable[..., Any], **functions: Callable[..., Any]) -> World:
    started = lives(buy=workflow, **functions)
    started.workflows.declared = PARKS
    started.start("buy")
    return started


def buy(ctx: Context) -> Any:
    ctx.run(step("reserve"), compensate=step("release"))
    return ctx.run(step("charge"), compensate=step("refund"))


def timed(ctx: Context) -> Any:
    return ctx.run(step("charge"), timeout=60, compensate=step("refund"), retry=RetryPolicy(max_attempts=3))


def two_at_once(ctx: Context) -> Any:
    return ctx.gather(ctx.start(step("reserve"), compensate=step("release")), ctx.start(step("charge")))


def blocked_in_time(lives: Worlds) -> tuple[World, Any]:
    """A parked instance whose step did not end in time, and the attempt that goes on."""
    started = parked(lives, timed)
    attempt = started.take(0)
    started.clock.advance(60)
    started.settle_due()
    assert (started.status(), started.row(0).state, started.instance.blocked_steps) == (
        Status.BLOCKED,
        State.RUNNING,
        1,
    )
    return started, attempt


# --- parked -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [FAILS, DOUBTS], ids=["fails", "doubts"])
def test_a_step_that_fails_in_a_parked_workflow_is_left_unsettled_and_given_another_attempt(
    lives: Worlds, ended: Any
) -> None:
    started = parked(lives, buy)
    started.run(0, succeeds("r-1"))
    started.run(1, ended)
    assert (started.status(), started.instance.blocked_steps) == (Status.BLOCKED, 1)
    assert (started.row(1).state, started.row(1).outcome, started.row(1).settled_order) == (State.BLOCKED, None, None)
    assert "step 1 (charge)" in (started.instance.blocked or "")
    started.lifecycle.resume(started.instance)
    row = started.row(1)
    assert (row.state, row.attempt, row.failures, row.dispatch) == (State.SCHEDULED, 1, 0, 2)
    assert (started.status(), started.instance.blocked_steps, started.instance.blocked) == (Status.RUNNING, 0, None)
    assert started.run(1, succeeds("c-1")).attempt == 2
    assert started.result() == "c-1"


def test_a_blocked_step_that_is_failed_raises_and_undoes(lives: Worlds) -> None:
    started = parked(lives, buy)
    started.run(0, succeeds("r-1"))
    started.run(1, FAILS)
    started.lifecycle.fail_step(started.instance, 1)
    assert (started.row(1).outcome, started.status()) == (Outcome.FAILED, Status.RUNNING)
    with pytest.raises(errors.InvalidOperation, match="only a step that blocks"):
        started.lifecycle.fail_step(started.instance, 1)
    started.run_all()
    assert (started.states()[2:], started.status()) == (["release succeeded"], Status.COMPENSATED)


def test_a_step_in_doubt_that_is_failed_is_unknown_and_undone(lives: Worlds) -> None:
    started = parked(lives, buy)
    started.run(0, succeeds("r-1"))
    started.lose(started.take(1))
    started.run(1, FAILS)
    started.lifecycle.fail_step(started.instance, 1)
    assert started.row(1).outcome is Outcome.UNKNOWN
    started.run_all()
    assert started.states()[2:] == ["refund succeeded", "release succeeded"]


def test_a_step_that_was_in_doubt_stays_so_when_it_is_resumed(lives: Worlds) -> None:
    started = parked(lives, buy)
    started.run(0, succeeds("r-1"))
    for _ in range(started.settings.max_lost + 1):
        started.lose(started.take(1))
    assert (started.row(1).state, started.row(1).attempt) == (State.BLOCKED, 4)
    started.lifecycle.resume(started.instance)
    assert (started.row(1).lost, started.row(1).attempt, started.row(1).is_in_doubt) == (0, 4, True)
    started.run(1, FAILS)
    started.lifecycle.fail_step(started.instance, 1)
    assert started.row(1).outcome is Outcome.UNKNOWN
    started.run_all()


def test_several_blocked_steps_are_named_resumed_and_failed_each(lives: Worlds) -> None:
    started = parked(lives, two_at_once)
    started.run(0, FAILS)
    started.run(1, FAILS)
    assert started.instance.blocked_steps == 2
    assert all(f"step {seq} " in (started.instance.blocked or "") for seq in (0, 1))
    started.lifecycle.fail_step(started.instance, 0)
    assert (started.status(), started.instance.blocked_steps) == (Status.BLOCKED, 1)
    assert "step 0 " not in (started.instance.blocked or "")
    started.lifecycle.resume(started.instance)
    assert (started.status(), started.instance.blocked_steps) == (Status.RUNNING, 0)
    started.run(1, succeeds())
    started.run_all()
    assert started.states() == ["reserve failed", "charge succeeded"]
    assert started.status() is Status.FAILED


def test_while_a_step_blocks_the_others_go_on(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(step("charge"))
        ctx.run(step("reserve"))
        ctx.run(step("ship"))
        return handle.get()

    started = parked(lives, workflow)
    started.run(0, FAILS)
    started.run(1, succeeds())
    started.run(2, succeeds())
    assert (started.status(), started.states()) == (
        Status.BLOCKED,
        ["charge blocked", "reserve succeeded", "ship succeeded"],
    )
    started.lifecycle.resume(started.instance)
    started.run(0, succeeds("c-1"))
    assert started.result() == "c-1"


def test_optional_steps_and_collecting_maps_never_block(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(step("charge"), optional=True)
        return len(ctx.map(step("work"), [1, 2], on_failure="collect"))

    started = parked(lives, workflow)
    started.run(0, FAILS)
    started.run(1, FAILS)
    started.run(2, DOUBTS)
    assert started.result() == 2


def test_a_map_that_stops_waits_for_its_blocked_item(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.map(step("work"), range(3), concurrency=1, compensate=step("undo"))

    started = parked(lives, workflow)
    started.run(0, FAILS)
    assert started.states() == ["work blocked", "work held", "work held"]
    started.lifecycle.resume(started.instance)
    started.run_all()
    assert started.result() == [0, 1, 2]


def test_cancelling_a_parked_instance_undoes_it(lives: Worlds) -> None:
    started = parked(lives, buy)
    started.run(0, succeeds("r-1"))
    started.run(1, FAILS)
    started.cancel("no longer wanted")
    started.run_all()
    assert started.states() == ["reserve succeeded", "charge failed", "release succeeded"]
    assert started.status() is Status.CANCELLED


# --- timeouts -----------------------------------------------------------------------------------------------------


def test_an_attempt_that_succeeds_after_the_timeout_that_blocked_settles_its_step(lives: Worlds) -> None:
    started, attempt = blocked_in_time(lives)
    assert started.end(attempt, succeeds("late"))
    assert started.result() == "late"


def test_an_attempt_that_fails_after_the_timeout_that_blocked_leaves_it_blocked(lives: Worlds) -> None:
    started, attempt = blocked_in_time(lives)
    assert started.end(attempt, FAILS)
    assert (started.row(0).state, started.instance.blocked_steps) == (State.BLOCKED, 1)
    started.lifecycle.resume(started.instance)
    timeout_at = started.row(0).timeout_at
    assert timeout_at is not None
    assert timeout_at > started.clock()
    started.run(0, succeeds("again"))
    assert started.result() == "again"


def test_resuming_a_step_whose_attempt_goes_on_waits_as_long_again(lives: Worlds) -> None:
    started, attempt = blocked_in_time(lives)
    started.lifecycle.resume(started.instance)
    assert (started.status(), started.instance.blocked_steps) == (Status.RUNNING, 0)
    assert (started.row(0).attempt, started.row(0).is_timed_out) == (1, False)
    started.settle_due()
    assert started.status() is Status.RUNNING
    started.clock.advance(60)
    started.settle_due()
    assert (started.status(), started.instance.blocked_steps) == (Status.BLOCKED, 1)
    started.end(attempt, succeeds("late"))
    assert started.result() == "late"


def test_failing_a_step_whose_attempt_goes_on_undoes_it_when_that_has_ended(lives: Worlds) -> None:
    started, attempt = blocked_in_time(lives)
    started.lifecycle.fail_step(started.instance, 0)
    assert (started.row(0).state, started.row(0).outcome) == (State.TIMED_OUT, Outcome.UNKNOWN)
    started.go_on()
    assert started.states() == ["charge unknown"]
    started.end(attempt, succeeds("late"))
    assert started.row(1).arguments == '{"args":["late"],"kwargs":{}}'
    started.run_all()
    assert started.status() is Status.COMPENSATED


@pytest.mark.parametrize("ended", [succeeds("late"), FAILS, DOUBTS, None], ids=["succeeds", "fails", "doubts", "lost"])
def test_cancelling_while_a_blocked_attempt_goes_on_drains_it(lives: Worlds, ended: Any) -> None:
    started, attempt = blocked_in_time(lives)
    started.cancel()
    started.go_on()
    assert started.status() is Status.COMPENSATING
    if ended is None:
        started.lose(attempt)
    else:
        started.end(attempt, ended)
    started.run_all()
    assert started.status() is Status.CANCELLED
    assert started.states()[1:] == ([] if ended is FAILS else ["refund succeeded"])


def test_an_attempt_past_the_timeout_that_blocked_is_not_released_for_another(lives: Worlds) -> None:
    started, attempt = blocked_in_time(lives)
    released, _ = started.coordinator.release(attempt.key, attempt.attempt, delay_seconds=0, failure=None, values={})
    assert not released
    assert started.row(0).state is State.RUNNING


def test_a_blocked_step_that_was_never_claimed_in_time_is_withdrawn_when_it_is_failed(lives: Worlds) -> None:
    started = parked(lives, timed)
    started.clock.advance(60)
    started.settle_due()
    assert started.row(0).state is State.BLOCKED
    started.lifecycle.fail_step(started.instance, 0)
    started.go_on()
    assert (started.row(0).outcome, started.status()) == (Outcome.WITHDRAWN, Status.FAILED)


# --- the pivot ----------------------------------------------------------------------------------------------------


def past_pivot(ctx: Context) -> Any:
    ctx.run(step("reserve"), compensate=step("release"))
    ctx.run(step("charge"), pivot=True, compensate=step("refund"))
    return ctx.run(step("ship"), compensate=step("recall"))


def test_past_the_pivot_a_failing_step_blocks_and_cancelling_is_refused(lives: Worlds) -> None:
    started = lives(buy=past_pivot)
    started.start("buy")
    started.run(0, succeeds())
    started.run(1, succeeds())
    assert started.instance.is_past_pivot
    with pytest.raises(errors.InvalidOperation, match="past its pivot"):
        started.cancel()
    started.run(2, FAILS)
    assert started.status() is Status.BLOCKED
    started.lifecycle.fail_step(started.instance, 2)
    started.run_all()
    assert (started.states()[3:], started.status()) == ([], Status.FAILED)


def test_a_pivot_that_fails_undoes_like_any_step_and_one_in_doubt_blocks(lives: Worlds) -> None:
    started = lives(buy=past_pivot)
    started.start("buy")
    started.run(0, succeeds())
    started.run(1, DOUBTS)
    assert (started.status(), started.row(1).state) == (Status.BLOCKED, State.BLOCKED)
    started.lifecycle.resume(started.instance)
    started.run(1, FAILS)  # nobody knows yet what the first attempt did
    assert started.status() is Status.BLOCKED
    started.lifecycle.fail_step(started.instance, 1)
    started.run_all()
    assert (started.states()[2:], started.status()) == (["refund succeeded", "release succeeded"], Status.COMPENSATED)


def test_a_cancellation_that_meets_an_open_pivot_waits_for_it(lives: Worlds) -> None:
    started = lives(buy=past_pivot)
    started.start("buy")
    started.run(0, succeeds())
    attempt = started.take(1)
    started.cancel()
    started.go_on()
    assert (started.status(), started.states()) == (Status.RUNNING, ["reserve succeeded", "charge running"])
    started.end(attempt, succeeds())
    started.run_all()
    assert started.status() is Status.COMPLETED


def test_a_cancellation_is_raised_when_the_pivot_it_waited_for_has_failed(lives: Worlds) -> None:
    started = lives(buy=past_pivot)
    started.start("buy")
    started.run(0, succeeds())
    attempt = started.take(1)
    started.cancel()
    started.go_on()
    started.end(attempt, FAILS)
    started.run_all()
    assert started.states() == ["reserve succeeded", "charge failed", "release succeeded"]
    assert started.status() in (Status.CANCELLED, Status.COMPENSATED)


# --- blocked for its code as well ---------------------------------------------------------------------------------


def refused_and_blocked(lives: Worlds) -> World:
    """An instance with a blocked step whose next pass no code could make."""

    def workflow(ctx: Context) -> Any:
        handle = ctx.start(step("charge"))
        ctx.run(step("reserve"))
        return handle.get()

    started = parked(lives, workflow)
    started.run(0, FAILS)
    changed = Scripted({"buy": lambda ctx: ctx.run(step("ship"))}, ("ship",))
    started.end(started.take(1), succeeds(), coordinator=started.coordinator_of("worker-1", workflows=changed))
    assert (started.status(), started.instance.refused) == (Status.BLOCKED, '["worker-1"]')
    return started


def test_failing_the_blocked_step_does_not_hide_that_no_code_matches(lives: Worlds) -> None:
    started = refused_and_blocked(lives)
    started.lifecycle.fail_step(started.instance, 0)
    assert started.status() is Status.BLOCKED
    started.lifecycle.resume(started.instance)
    started.run_all()
    assert started.status() is Status.FAILED


def test_resuming_gives_both_the_step_and_the_code_another_try(lives: Worlds) -> None:
    started = refused_and_blocked(lives)
    started.lifecycle.resume(started.instance)
    started.run_all()
    assert started.result() == 0


def test_resuming_whose_answer_was_lost_has_resumed(lives: Worlds) -> None:
    started = refused_and_blocked(lives)
    lose_answer(started.store, lost_answer(), "resume")
    started.lifecycle.resume(started.instance)
    assert (started.status(), started.row(0).dispatch) == (Status.RUNNING, 2)
    started.run_all()


def test_resuming_for_the_code_alone_whose_answer_was_lost_has_resumed(lives: Worlds) -> None:
    started = parked(lives, lambda ctx: ctx.run(step("charge")))
    changed = Scripted({"buy": lambda ctx: ctx.run(step("ship"))}, ("ship",))
    started.end(started.take(0), succeeds(), coordinator=started.coordinator_of("worker-1", workflows=changed))
    assert started.status() is Status.BLOCKED
    lose_answer(started.store, lost_answer(), "resume")
    started.lifecycle.resume(started.instance)
    started.go_on()
    assert started.status() is Status.COMPLETED


# --- children -----------------------------------------------------------------------------------------------------


def test_resuming_a_child_that_failed_starts_another(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(step("ordering").set(task_id="c" * 199))
        return [child.get(), child.instance_id]

    started = parked(lives, workflow, ordering=lambda ctx: ctx.run(step("work")))
    started.workflows.declared = WorkflowOptions()
    started.go_on()
    first = started.child(0)
    first.run(0, FAILS)
    assert (started.status(), first.status()) == (Status.BLOCKED, Status.FAILED)
    started.lifecycle.resume(started.instance)
    started.go_on()
    second = started.child(0)
    assert second.instance_id != first.instance_id
    second.run(0, succeeds("made"))
    started.go_on()
    assert started.result() == ["made", second.instance_id]
