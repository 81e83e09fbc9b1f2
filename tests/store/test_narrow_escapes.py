"""Schedules by which an effect was doubled, lost or stuck before the code was mended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.attempts import AttemptLost
from orchestrator.core.context import Context
from orchestrator.core.records import Failure, Outcome, State
from orchestrator.runtime.executing import Executing, Execution, token_of
from orchestrator.runtime.operator import Operator
from orchestrator.store import due, history, instances, workers
from orchestrator.store.instances import Status
from orchestrator.store.workers import Worker

from .test_compensations import Bell, failed_refund, given_up_and_undone
from .world import FAILS, Scripted, World, step, succeeds

Worlds = Callable[..., World]


def operator_of(world: World) -> Operator:
    return Operator(world.coordinator, Bell(world))  # type: ignore[arg-type]


# --- who executes what --------------------------------------------------------------------------------------------


@pytest.fixture
def executing() -> Iterator[Executing]:
    executing = Executing()
    executing.share()
    yield executing


def test_a_doubled_message_does_not_hide_the_attempt_that_goes_on(executing: Executing) -> None:
    executing.begin(7)
    executing.begin(7)  # another thread of the same process takes the doubled message, and is not given the claim
    executing.end(7)
    assert [execution.token for execution in executing.list_executions()] == [7]
    executing.end(7)
    assert executing.list_executions() == set()


def test_a_pool_process_that_begins_late_does_not_hide_the_others(executing: Executing) -> None:
    executing.become_child(1)  # process 0 is still being initialised
    executing.begin(9)
    assert {execution.token for execution in executing.list_executions()} == {9}


def test_an_attempt_has_a_token_of_its_own(world: Worlds) -> None:
    started = world(buy=lambda ctx: ctx.run(step("charge")))
    started.start("buy")
    key = started.row(0).key
    assert len({token_of(key, 1), token_of(key, 2), Execution(1, token_of(key, 1)).token}) == 2


# --- a settlement and the pass that follows it --------------------------------------------------------------------


def test_what_a_step_came_to_is_kept_when_the_pass_after_it_cannot_be_written(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(step("charge"), compensate=step("refund"))
        return ctx.run(step("ship", countdown="soon"))

    started = world(buy=workflow)
    started.start("buy")
    started.run(0, succeeds("c-1"))
    assert (started.row(0).outcome, started.row(0).attempt) == (Outcome.SUCCEEDED, 1)
    assert started.passes_owed == 1
    started.advance()
    assert started.status() is Status.BLOCKED
    assert "soon" in (started.instance.blocked or "")


def test_an_attempt_that_is_lost_after_it_was_settled_leaves_no_trace(world: Worlds) -> None:
    started = world(buy=lambda ctx: ctx.run(step("charge")))
    started.start("buy")
    row = started.take(0)
    started.end(row, succeeds("c-1"))
    started.end(row, AttemptLost(Failure("orchestrator.errors.AttemptLost", (), "its process ended")))
    assert (started.row(0).outcome, started.row(0).strays) == (Outcome.SUCCEEDED, None)


# --- operators ----------------------------------------------------------------------------------------------------


def test_a_compensation_that_is_skipped_while_it_is_held_does_not_run(world: Worlds) -> None:
    def workflow(ctx: Context) -> None:
        ctx.map(step("work"), [1, 2, 3], concurrency=1, compensate=step("undo"))
        ctx.run(step("ship"))

    started = world(buy=workflow)
    started.start("buy")
    for seq in range(3):
        started.run(seq, succeeds(seq))
    started.run(3, FAILS)
    assert [started.row(seq).state for seq in (4, 5, 6)] == [State.SCHEDULED, State.HELD, State.HELD]
    operator_of(started).skip_compensation(started.instance, 5, "undone by hand")
    assert (started.row(5).state, started.row(5).outcome) == (State.SETTLED, Outcome.FAILED)
    started.run(4, succeeds())
    started.run(6, succeeds())
    started.advance()
    assert started.status() is Status.COMPENSATED


def test_a_message_that_names_another_task_claims_nothing(world: Worlds) -> None:
    started = world(buy=lambda ctx: ctx.run(step("charge")))
    started.start("buy")
    assert started.claim(0, name="refund") is None
    assert started.claim(0, name="charge") is not None


def test_an_effect_after_its_undo_can_be_dealt_with(world: Worlds) -> None:
    started, given_up = given_up_and_undone(world)
    started.run(1, succeeds())
    started.end(given_up, succeeds("c-1"))
    assert started.status() is Status.COMPENSATION_FAILED
    operator_of(started).skip_compensation(started.instance, 1, "refunded by hand")
    assert started.status() is Status.COMPENSATED
    with pytest.raises(errors.InvalidOperation, match="has succeeded"):
        operator_of(started).skip_compensation(started.instance, 1, "again")


def test_a_repeated_compensation_that_expires_does_not_stay_due(world: Worlds) -> None:
    started = failed_refund(world)
    operator_of(started).retry_compensation(started.instance, 3)
    with started.store.begin("test") as connection:
        past = started.clock()
        history.note_on_row(connection, started.row(-1), {"expires_at": past, "due_at": past})
    started.clock.advance(1)
    started.publish(started.coordinator.time_out(started.row(-1).key))
    assert (started.row(-1).state, started.row(-1).due_at) == (State.SETTLED, None)


# --- publications -------------------------------------------------------------------------------------------------


def test_a_publication_that_could_not_be_sent_does_not_count(world: Worlds) -> None:
    started = world(buy=lambda ctx: ctx.run(step("charge")))
    started.start("buy")
    row, later = started.row(0), started.clock()
    with started.store.begin("publish") as connection:
        assert due.postpone_publication(connection, row, later, later, later)
    with started.store.begin("publish") as connection:
        due.take_back_publication(connection, row, later, later)
    assert started.row(0).publications == row.publications


def test_a_worker_that_is_not_sent_the_passes_is_not_waited_for(world: Worlds) -> None:
    def buy(ctx: Context) -> Any:
        return ctx.run(step("charge"))

    started = world(buy=buy)
    started.start("buy")
    with started.store.begin("test") as connection:
        instances.update_instance(connection, started.instance, {"queue": "orders"})
        now = started.clock()
        # the same code, but only for another queue
        other = Worker("worker-2", "node", 1, "0", 0, now, now, ("buy",), (), ("payments",))
        workers.insert_worker(connection, other)
    changed = started.coordinator_of(
        "worker-1", workflows=Scripted({"buy": lambda ctx: ctx.run(step("ship"))}, ("ship",))
    )
    started.end(started.take(0), succeeds("c-1"), coordinator=changed)
    assert started.status() is Status.BLOCKED
