"""Settling: what holds the claim decides, once; what was given up is told beside the outcome."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import exc

from orchestrator import RetryPolicy
from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State
from orchestrator.runtime.claims import Claims
from orchestrator.runtime.executing import Executing
from orchestrator.store.instances import Status

from .locks import before_statement, lose_answer
from .world import DOUBTS, FAILS, World, step, succeeds

Worlds = Callable[..., World]


def one_step(ctx: Context, **options: Any) -> Any:
    return ctx.run(step("charge"), **options)


def then_fails(ctx: Context) -> Any:
    ctx.run(step("charge"), compensate=step("refund"))
    return ctx.run(step("ship"), compensate=False)


def started_with(world: Worlds, workflow: Callable[..., Any]) -> World:
    started = world(pay=workflow)
    started.start("pay")
    return started


# --- the fence ----------------------------------------------------------------------------------------------------


def test_an_outcome_is_recorded_with_its_order_and_instant(world: Worlds) -> None:
    started = started_with(world, one_step)
    started.clock.advance(5)
    row = started.run(0, succeeds("c-1"))
    settled = started.row(0)
    assert (settled.state, settled.outcome, settled.result) == (State.SETTLED, Outcome.SUCCEEDED, '"c-1"')
    assert (settled.settled_order, settled.settled_at, settled.attempt) == (1, started.clock(), row.attempt)
    assert (settled.claim_incarnation, settled.due_at) == (None, None)
    assert (started.status(), started.instance.ended_at) == (Status.COMPLETED, started.clock())


def test_outcomes_are_never_earlier_than_the_ones_before(world: Worlds) -> None:
    started = started_with(world, lambda ctx: ctx.gather(step("work"), step("work")))
    started.run(0, succeeds())
    started.clock.advance(-3600)
    started.run(1, succeeds())
    first, second = started.rows()
    assert first.settled_at == second.settled_at


def test_an_attempt_that_was_given_up_settles_nothing(world: Worlds) -> None:
    started = started_with(world, one_step)
    given_up = started.take(0)
    started.lose(given_up)
    retaken = started.take(0)
    assert not started.end(given_up, succeeds("late"))
    assert (started.row(0).state, started.row(0).attempt) == (State.RUNNING, 2)
    assert json.loads(started.row(0).strays or "") == [
        {"attempt": 1, "ended": "succeeded", "at": started.clock().isoformat()}
    ]
    assert started.end(retaken, succeeds("in time"))
    started.advance()
    assert started.instance.result == '"in time"'


@pytest.mark.parametrize("ended", [succeeds("c-1"), FAILS, DOUBTS], ids=["succeeds", "fails", "doubts"])
def test_settling_twice_changes_no_outcome(world: Worlds, ended: Any) -> None:
    started = started_with(world, then_fails)
    row = started.run(0, ended)
    instance, rows = started.instance, started.rows()
    for _ in range(2):
        assert not started.end(row, ended)
    assert dataclasses.replace(started.instance, version=instance.version) == instance
    assert [dataclasses.replace(row, strays=None) for row in started.rows()] == rows
    assert len(json.loads(started.row(0).strays or "")) == 1


def test_an_attempt_that_ends_otherwise_the_second_time_is_told_beside_its_outcome(world: Worlds) -> None:
    started = started_with(world, one_step)
    row = started.run(0, FAILS)
    assert not started.end(row, succeeds())
    assert started.row(0).outcome is Outcome.FAILED
    assert len(json.loads(started.row(0).strays or "")) == 1


def test_another_generation_meets_nothing_of_the_old(world: Worlds) -> None:
    started = started_with(world, one_step)
    row = started.take(0).changed({"generation": "0" * 16})
    assert not started.end(row, succeeds())
    assert started.row(0).state is State.RUNNING


# --- answers that were lost ---------------------------------------------------------------------------------------


def lost_answer() -> Exception:
    return exc.OperationalError("COMMIT", {}, ConnectionError("the connection was lost"))


def test_a_settlement_whose_answer_was_lost_is_known_for_its_own(world: Worlds) -> None:
    started = started_with(world, then_fails)
    row = started.take(0)
    lose_answer(started.store, lost_answer(), "settle")
    assert started.end(row, succeeds("c-1"))
    settled = started.row(0)
    assert (settled.outcome, settled.strays) == (Outcome.SUCCEEDED, None)
    assert started.row(1).state is State.SCHEDULED


def test_a_claim_whose_answer_was_lost_is_known_for_its_own(world: Worlds) -> None:
    started = started_with(world, one_step)
    claims = claims_of(started)
    lose_answer(started.store, lost_answer(), "claim")
    held = claims.claim(started.row(0).key, started.row(0).name, 1, None)
    assert held is not None and held.row.attempt == 1


def test_a_claim_of_another_thread_is_not_taken_for_ones_own(world: Worlds) -> None:
    started = started_with(world, one_step)
    key, claims = started.row(0).key, claims_of(started)
    taken: list[Any] = []

    def claim_first() -> None:
        started.clock.advance(1)
        taken.append(claims.claim(key, started.row(0).name, 1, None))

    # a doubled message: while the one thread tries again after an error, the other claims
    fail_once(started, claim_first)
    assert claims.claim(key, started.row(0).name, 1, None) is None
    assert taken[0] is not None


def test_a_release_whose_answer_was_lost_is_known_for_its_own(world: Worlds) -> None:
    started = started_with(world, one_step)
    row = started.take(0)
    lose_answer(started.store, lost_answer(), "release")
    released, _ = started.coordinator.release(row.key, row.attempt, delay_seconds=30, failure=None, values={})
    assert released
    assert (started.row(0).state, started.row(0).dispatch) == (State.SCHEDULED, 2)


def claims_of(started: World) -> Claims:
    executing = Executing()
    executing.note_beat("worker-1")
    return Claims(started.store, started.settings, executing, started.clock)


def fail_once(started: World, meanwhile: Callable[[], None]) -> None:
    pending = [meanwhile]

    def fails(sql: str) -> None:
        if pending and "UPDATE orchestrator_history" in sql:
            pending.pop()
            raise exc.OperationalError(sql, {}, ConnectionError("the connection was lost"))

    before_statement(started.store, fails)
    retrying = started.store.retrying

    def with_something_meanwhile(function: Callable[[], Any], *, patience_seconds: float) -> Any:
        def once() -> Any:
            try:
                return function()
            except exc.OperationalError:
                meanwhile()
                raise

        started.store.retrying = retrying  # type: ignore[method-assign]
        return retrying(once, patience_seconds=patience_seconds)

    started.store.retrying = with_something_meanwhile  # type: ignore[method-assign]


# --- another attempt ----------------------------------------------------------------------------------------------


def test_a_failed_attempt_is_retried_later_under_a_new_dispatch(world: Worlds) -> None:
    started = started_with(world, lambda ctx: one_step(ctx, retry=RetryPolicy(jitter=0, max_attempts=2)))
    started.run(0, FAILS)
    row = started.row(0)
    assert (row.state, row.dispatch, row.failures, row.publications) == (State.SCHEDULED, 2, 1, 0)
    assert row.due_at is not None and (row.due_at - started.clock()).total_seconds() == 1
    assert started.published == [(0, 1)]
    assert started.claim(0, dispatch=1) is None
    started.run(0, FAILS)
    assert (started.row(0).outcome, started.row(0).failures) == (Outcome.FAILED, 2)


def test_a_released_step_is_claimed_by_its_new_message_only(world: Worlds) -> None:
    started = started_with(world, one_step)
    row = started.take(0)
    values = {"celery_retries": 1, "arguments": '{"args":[2],"kwargs":{}}'}
    released, outbox = started.coordinator.release(row.key, 1, delay_seconds=0, failure=FAILS.failure, values=values)
    assert released
    assert [(step.dispatch, step.celery_retries, step.arguments) for step in outbox.steps] == [
        (2, 1, values["arguments"])
    ]
    assert started.claim(0, dispatch=1) is None
    assert started.take(0).attempt == 2
    assert not started.coordinator.release(row.key, 1, delay_seconds=0, failure=None, values={})[0]


def test_a_step_that_timed_out_is_not_released(world: Worlds) -> None:
    started = started_with(world, lambda ctx: one_step(ctx, timeout=60))
    row = started.take(0)
    started.clock.advance(60)
    started.time_out(0)
    assert not started.coordinator.release(row.key, 1, delay_seconds=0, failure=None, values={})[0]


# --- lost attempts ------------------------------------------------------------------------------------------------


def test_a_lost_attempt_is_followed_by_another_at_most_max_lost_times(world: Worlds) -> None:
    started = started_with(world, lambda ctx: one_step(ctx, compensate=step("refund")))
    for lost in range(1, started.settings.max_lost + 1):
        started.lose(started.take(0))
        assert (started.row(0).state, started.row(0).lost) == (State.SCHEDULED, lost)
        assert started.published[-1] == (0, lost + 1)
    started.lose(started.take(0))
    assert started.row(0).outcome is Outcome.UNKNOWN
    started.advance()
    assert started.row(1).undoes == 0


def test_a_step_that_fails_after_a_lost_attempt_is_unknown(world: Worlds) -> None:
    started = started_with(world, one_step)
    started.lose(started.take(0))
    started.run(0, FAILS)
    assert started.row(0).outcome is Outcome.UNKNOWN


def test_a_step_that_succeeds_after_a_lost_attempt_has_succeeded(world: Worlds) -> None:
    started = started_with(world, one_step)
    started.lose(started.take(0))
    started.run(0, succeeds("c-1"))
    # the pass is a message of its own: were it what kills the process, it would be counted
    assert (started.row(0).outcome, started.instance.status) == (Outcome.SUCCEEDED, Status.RUNNING)
    assert (started.passes_owed, started.instance.pass_publications) == (1, 1)
    started.advance()
    assert started.instance.result == '"c-1"'
