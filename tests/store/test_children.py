"""Children: begun once, heard of in the transaction that ends them, undone with their parent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Kind, Outcome, State
from orchestrator.store import instances
from orchestrator.store.instances import Status
from orchestrator.store.tables import history, instance

from .locks import before_commit, lose_answer
from .test_settling import lost_answer
from .world import FAILS, World, at_once, join, step, succeeds

Worlds = Callable[..., World]


def ordering(ctx: Context) -> Any:
    return ctx.run(step("charge"), compensate=step("refund"))


def parent(ctx: Context, count: int = 1) -> Any:
    results = ctx.gather(*(step("ordering") for _ in range(count)))
    ctx.run(step("ship"))
    return results


def with_children(lives: Worlds, count: int = 1, workflow: Callable[..., Any] = parent) -> World:
    """A parent whose children have begun, each with a step that can be claimed."""
    started = lives(parent=workflow, ordering=ordering)
    started.start("parent", count)
    started.go_on()
    return started


def run_everything(started: World, ended: Any = None) -> None:
    """Run every step of every instance until nothing is left."""
    for _ in range(50):
        started.go_on()
        with started.store.read("look") as connection:
            kinds = history.c.kind.in_((Kind.STEP, Kind.COMPENSATION))
            statement = select(history.c.instance_id, history.c.seq).where(kinds, history.c.state == State.SCHEDULED)
            found = connection.execute(statement.limit(1)).first()
        if found is None:
            return
        started.at(found[0]).run(found[1], ended or succeeds("done"))
    raise AssertionError("there is always another step")


# --- beginning ----------------------------------------------------------------------------------------------------


def test_a_child_is_begun_once_whoever_starts_it(lives: Worlds, another_process: Callable[[World], World]) -> None:
    started = lives(parent=parent, ordering=ordering)
    started.start("parent")
    others = [another_process(started) for _ in range(4)]
    at_once(*(lambda other=other: other.start_child(0) for other in others * 2))
    assert (started.begun, started.row(0).attempt, started.row(0).state) == (
        [started.row(0).child_id],
        1,
        State.RUNNING,
    )
    child = started.child(0).instance
    assert (child.parent_id, child.parent_seq, child.root_id, child.status) == ("order-1", 0, "order-1", Status.PENDING)


def test_a_child_whose_beginning_was_not_answered_is_begun_once(lives: Worlds) -> None:
    started = lives(parent=parent, ordering=ordering)
    started.start("parent")
    lose_answer(started.store, lost_answer(), "start-child")
    started.start_child(0)
    run_everything(started)
    assert started.result() == ["done"]


def test_a_child_whose_id_is_taken_fails_its_step_and_leaves_the_other_alone(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.run(step("ordering").set(task_id="taken"))

    started = lives(parent=workflow, ordering=ordering)
    started.start("ordering", instance_id="taken")
    started.start("parent", instance_id="order-1")
    started.go_on()
    assert (started.row(0).outcome, started.status()) == (Outcome.FAILED, Status.FAILED)
    assert "taken" in (started.row(0).failure or "")
    assert started.at("taken").status() is Status.RUNNING


# --- ending -------------------------------------------------------------------------------------------------------


def test_a_child_and_its_parents_record_end_in_one_transaction(lives: Worlds) -> None:
    started = with_children(lives)
    child = started.child(0)
    attempt = child.take(0)
    seen: list[Any] = []

    def look() -> None:
        # nobody sees the one without the other: this is before the commit, and what follows after it
        with started.store.read("look") as connection:
            statuses = connection.execute(select(instance.c.status).order_by(instance.c.id)).scalars().all()
        seen.append((statuses, started.row(0).state))

    before_commit(started.store, look, "settle")
    child.end(attempt, succeeds("c-1"))
    assert seen == [([Status.RUNNING] * 2, State.RUNNING)]
    assert (child.status(), started.row(0).outcome, started.row(0).result) == (
        Status.COMPLETED,
        Outcome.SUCCEEDED,
        '"c-1"',
    )
    assert started.instance.pass_due_at is not None


def test_8_children_that_end_at_once_are_counted_each(lives: Worlds, another_process: Callable[[World], World]) -> None:
    started = with_children(lives, 8)
    children = [started.child(seq) for seq in range(8)]
    attempts = [child.take(0) for child in children]
    others = [another_process(child) for child in children]
    at_once(*(lambda o=o, a=a: o.end(a, succeeds(a.instance_id)) for o, a in zip(others, attempts, strict=True)))
    assert started.instance.waiting == 0
    started.go_on()
    started.run(8, succeeds())
    assert started.result() == [child.instance_id for child in children]
    assert sorted(row.settled_order or 0 for row in started.rows()[:8]) == list(range(1, 9))


def test_children_that_end_while_their_parent_is_cancelled_are_undone_or_cancelled(
    lives: Worlds, another_process: Callable[[World], World]
) -> None:
    started = with_children(lives, 6)
    children = [started.child(seq) for seq in range(6)]
    attempts = [child.take(0) for child in children]
    others = [another_process(child) for child in children]
    canceller = another_process(started)

    def cancel() -> None:
        canceller.cancel()
        canceller.go_on()

    at_once(cancel, *(lambda o=o, a=a: o.end(a, succeeds()) for o, a in zip(others, attempts, strict=True)))
    run_everything(started)
    assert started.status() is Status.CANCELLED
    for child in children:
        # it had completed, and was undone; or it was cancelled while its step was under way
        assert (child.states(), child.status()) in [
            (["charge succeeded", "refund succeeded"], Status.COMPENSATED),
            (["charge succeeded", "refund succeeded"], Status.CANCELLED),
        ]


@pytest.mark.storm
@pytest.mark.parametrize("turn", range(20))
def test_children_that_end_while_their_parent_is_cancelled_again_and_again(
    lives: Worlds, another_process: Callable[[World], World], turn: int
) -> None:
    test_children_that_end_while_their_parent_is_cancelled_are_undone_or_cancelled(lives, another_process)


def test_a_parent_does_not_wait_for_its_childs_lock(lives: Worlds, another_process: Callable[[World], World]) -> None:
    started = with_children(lives)
    if started.store.is_sqlite:
        pytest.skip("whoever writes keeps all others out")
    child, canceller = started.child(0), another_process(started)
    with started.store.begin("hold") as connection:
        instances.lock_instance(connection, child.instance_id)
        # the pass that drains sends the child its cancellation, under the lock of the parent
        canceller.cancel()
        thread = threading.Thread(target=canceller.advance, daemon=True)
        thread.start()
        join([thread])
    run_everything(started)
    assert (started.status(), child.status()) == (Status.CANCELLED, Status.CANCELLED)


# --- undone with the parent ---------------------------------------------------------------------------------------


def test_a_parent_that_is_undone_has_its_children_undo_themselves(lives: Worlds) -> None:
    started = with_children(lives, 2)
    for seq in (1, 0):
        started.child(seq).run(0, succeeds(f"c-{seq}"))
    started.go_on()
    started.run(2, FAILS)
    started.go_on()
    assert [(row.kind, row.undoes, row.state) for row in started.rows()[3:]] == [(Kind.UNDO, 1, State.SCHEDULED)]
    assert started.child(1).status() is Status.COMPENSATING
    assert started.child(0).status() is Status.COMPLETED  # one after the other
    run_everything(started)
    assert started.status() is Status.COMPENSATED
    assert [started.child(seq).states() for seq in (0, 1)] == [["charge succeeded", "refund succeeded"]] * 2


@pytest.mark.parametrize("state", ["unstarted", "pending", "running", "claimed", "completed"])
def test_cancelling_the_parent_cancels_or_undoes_its_child_however_far_it_is(lives: Worlds, state: str) -> None:
    started = lives(parent=parent, ordering=ordering)
    started.start("parent")
    attempt = None
    if state != "unstarted":
        started.start_child(0)
    if state not in ("unstarted", "pending"):
        started.go_on()
    if state in ("claimed", "completed"):
        attempt = started.child(0).take(0)
    if state == "completed":
        assert attempt is not None
        started.child(0).end(attempt, succeeds("c-1"))
        attempt = None
    started.cancel()
    started.go_on()
    if attempt is not None:
        assert started.status() is Status.COMPENSATING
        started.child(0).end(attempt, succeeds("c-1"))
    run_everything(started)
    assert started.status() is Status.CANCELLED
    if state == "unstarted":
        assert (started.row(0).outcome, started.begun) == (Outcome.WITHDRAWN, [])
        return
    child = started.child(0)
    assert child.status() is (Status.COMPENSATED if state == "completed" else Status.CANCELLED)
    effects = [name for name in child.states() if not name.endswith("withdrawn")]
    assert effects == ([] if attempt is None and state != "completed" else ["charge succeeded", "refund succeeded"])


def test_a_child_that_fails_raises_in_its_parent_and_needs_no_undoing(lives: Worlds) -> None:
    started = with_children(lives)
    started.child(0).run(0, FAILS)
    started.go_on()
    assert (started.status(), started.states()) == (Status.FAILED, ["ordering failed"])


def test_a_cancelled_child_raises_in_its_parent(lives: Worlds) -> None:
    started = with_children(lives)
    started.child(0).cancel()
    run_everything(started)
    assert (started.row(0).outcome, started.status()) == (Outcome.FAILED, Status.FAILED)


def child_not_undone(lives: Worlds) -> World:
    """A parent that is COMPENSATION_FAILED, because a compensation of its completed child failed."""
    started = with_children(lives)
    started.child(0).run(0, succeeds("c-1"))
    started.go_on()
    started.run(1, FAILS)
    started.go_on()
    started.child(0).run(1, FAILS)
    started.go_on()
    assert started.child(0).status() is Status.COMPENSATION_FAILED
    assert started.status() is Status.COMPENSATION_FAILED
    return started


def test_a_child_that_was_not_undone_is_repaired_first_and_its_parent_after_it(lives: Worlds) -> None:
    started = child_not_undone(lives)
    started.operator.retry_compensation(started.instance, 0)
    started.go_on()
    assert (started.row(-1).outcome, started.status()) == (Outcome.FAILED, Status.COMPENSATION_FAILED)
    child = started.child(0)
    child.operator.retry_compensation(child.instance, 0)
    child.run(-1, succeeds())
    assert child.status() is Status.COMPENSATED
    started.operator.retry_compensation(started.instance, 0)
    started.go_on()
    assert (started.row(-2).outcome, started.status()) == (Outcome.SUCCEEDED, Status.COMPENSATED)


def test_a_child_that_was_terminated_makes_its_undone_parent_compensation_failed(lives: Worlds) -> None:
    started = with_children(lives)
    child = started.child(0)
    child.lifecycle.terminate(child.instance, None)
    run_everything(started)
    assert (started.row(0).outcome, started.status()) == (Outcome.UNKNOWN, Status.COMPENSATION_FAILED)
    started.operator.skip_compensation(started.instance, 0, "looked at by hand")
    assert started.status() is Status.COMPENSATED


def test_a_child_that_is_terminated_while_it_is_undone_is_told_to_its_parent(lives: Worlds) -> None:
    started = with_children(lives)
    started.child(0).run(0, succeeds("c-1"))
    started.go_on()
    started.run(1, FAILS)
    started.go_on()
    child = started.child(0)
    with started.store.begin("finished") as connection:
        instances.delete_finish(connection, child.instance_id, child.generation)
    assert child.status() is Status.COMPENSATING
    child.lifecycle.terminate(child.instance, "enough")
    started.go_on()
    assert (child.status(), started.status()) == (Status.TERMINATED, Status.COMPENSATION_FAILED)
    with started.store.read("look") as connection:
        finishes = instances.list_due_finishes(connection, started.clock().replace(year=2100), 10)
    assert [finish[0] for finish in finishes] == ["order-1"]  # Celery has been told of the child's result already


def test_an_operators_undo_of_a_child_serves_its_parent_as_well(lives: Worlds) -> None:
    started = with_children(lives)
    child = started.child(0)
    child.run(0, succeeds("c-1"))
    child.lifecycle.undo(child.instance)
    started.go_on()
    started.run(1, FAILS)
    run_everything(started)
    assert (child.states(), child.status()) == (["charge succeeded", "refund succeeded"], Status.COMPENSATED)
    assert started.status() is Status.COMPENSATED


def test_terminating_the_parent_terminates_what_has_begun_and_begins_no_more(lives: Worlds) -> None:
    started = lives(parent=parent, ordering=ordering)
    started.start("parent", 2)
    started.start_child(0)
    started.lifecycle.terminate(started.instance, None)
    started.start_child(1)
    started.go_on()
    assert (started.status(), started.child(0).status()) == (Status.TERMINATED, Status.TERMINATED)
    assert started.begun == [started.row(0).child_id]


# --- left alone, late, and of another run -------------------------------------------------------------------------


def leaving(ctx: Context, timeout: float | None = None) -> Any:
    ctx.start(step("ordering"), on_parent_end="leave", timeout=timeout)
    return ctx.run(step("work"))


def test_a_detached_child_goes_on_without_its_parent(lives: Worlds) -> None:
    started = with_children(lives, 0, lambda ctx, _count: leaving(ctx))
    started.run(1, FAILS)
    started.go_on()
    assert started.status() is Status.FAILED
    assert started.child(0).status() is Status.RUNNING
    run_everything(started)
    assert (started.child(0).status(), started.row(0).outcome) == (Status.COMPLETED, Outcome.SUCCEEDED)


def test_the_timeout_of_a_detached_child_does_not_stay_due_when_its_parent_has_ended(lives: Worlds) -> None:
    started = with_children(lives, 0, lambda ctx, _count: leaving(ctx, 60))
    started.run(1, succeeds())
    assert started.status() is Status.COMPLETED
    started.clock.advance(60)
    started.settle_due()
    assert (started.row(0).state, started.row(0).due_at) == (State.RUNNING, None)
    run_everything(started)
    assert started.child(0).status() is Status.COMPLETED


def test_a_child_that_does_not_end_in_time_is_cancelled_and_undone(lives: Worlds) -> None:
    started = with_children(lives, 0, lambda ctx, _count: ctx.run(step("ordering"), timeout=60))
    attempt = started.child(0).take(0)
    started.clock.advance(60)
    started.settle_due()
    started.go_on()
    assert (started.row(0).outcome, started.row(0).state) == (Outcome.UNKNOWN, State.TIMED_OUT)
    started.child(0).end(attempt, succeeds("late"))
    run_everything(started)
    assert started.child(0).status() is Status.CANCELLED
    assert (started.row(0).late_outcome, started.status()) == (Outcome.FAILED, Status.COMPENSATED)


def test_a_child_of_an_earlier_run_changes_nothing_of_the_present_one(lives: Worlds) -> None:
    def recurring(ctx: Context, number: int) -> Any:
        if number == 0:
            ctx.start(step("ordering"), on_parent_end="leave")
            ctx.recur(1)
        return ctx.run(step("work"))

    started = with_children(lives, 0, recurring)
    first, second = started, started.at("order-1")
    assert (second.run_number, second.instance.waiting) == (1, 1)
    before = second.instance
    first.child(0).run(0, succeeds("late"))
    after = second.instance
    assert (first.row(0).outcome, first.row(0).settled_order) == (Outcome.SUCCEEDED, None)
    assert (after.waiting, after.next_order, after.pass_due_at) == (before.waiting, before.next_order, None)
    second.run(0, succeeds("done"))
    assert second.result() == "done"


def test_a_map_of_children_begins_as_many_at_a_time_and_undoes_as_many(lives: Worlds) -> None:
    def workflow(ctx: Context, count: int) -> Any:
        ctx.map(step("item"), range(count), concurrency=2)
        ctx.run(step("ship"))

    started = lives(parent=workflow, item=lambda ctx, _item: ordering(ctx))
    started.start("parent", 4)
    for seq in range(4):
        started.go_on()
        assert len(started.begun) == min(4, 2 + seq)
        started.child(seq).run(0, succeeds())
    started.go_on()
    started.run(4, FAILS)
    started.go_on()
    assert [row.state for row in started.rows()[5:]] == [State.SCHEDULED] * 2 + [State.HELD] * 2
    run_everything(started)
    assert started.status() is Status.COMPENSATED
    assert [started.child(seq).status() for seq in range(4)] == [Status.COMPENSATED] * 4


def test_a_child_past_its_pivot_is_waited_for(lives: Worlds) -> None:
    def no_return(ctx: Context) -> Any:
        ctx.run(step("charge"), pivot=True, compensate=step("refund"))
        return ctx.run(step("work"))

    started = lives(parent=parent, ordering=no_return)
    started.start("parent")
    started.go_on()
    child = started.child(0)
    child.run(0, succeeds())
    started.cancel()
    started.go_on()
    assert (started.status(), child.status()) == (Status.COMPENSATING, Status.RUNNING)
    with pytest.raises(errors.InvalidOperation, match="pivot"):
        child.cancel()
    run_everything(started)
    assert (child.status(), started.status()) == (Status.COMPENSATED, Status.CANCELLED)
