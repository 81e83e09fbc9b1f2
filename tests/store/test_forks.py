"""Forks: what is shared is whole, is not run again, and is not undone twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Kind
from orchestrator.runtime.retention import Retention
from orchestrator.store import instances
from orchestrator.store.instances import Status
from orchestrator.store.tables import subscription

from .locks import lose_answer
from .test_children import ordering, run_everything
from .test_settling import lost_answer
from .world import FAILS, World, step, succeeds

Worlds = Callable[..., World]


def buy(ctx: Context) -> Any:
    drawn = [str(ctx.uuid4()), ctx.random()]
    ctx.run(step("reserve"), compensate=step("release"))
    drawn += [str(ctx.uuid4()), ctx.random()]
    ctx.run(step("charge", drawn), compensate=step("refund"))
    drawn += [str(ctx.uuid4()), ctx.random()]
    ctx.run(step("ship", drawn), compensate=step("recall"))
    return drawn


def fork(world: World, seq: int, instance_id: str = "fork", *, owns: bool = False) -> World:
    world.forks.fork(world.instance, seq, instance_id, owns)
    return world.at(instance_id)


def started_with(lives: Worlds, workflow: Callable[..., Any], **functions: Callable[..., Any]) -> World:
    started = lives(buy=workflow, **functions)
    started.start("buy")
    return started


def test_a_fork_whose_answer_was_lost_is_one(lives: Worlds) -> None:
    started = terminated(lives)
    lose_answer(started.store, lost_answer(), "fork")
    forked = fork(started, 2, owns=True)
    forked.run_all()
    assert forked.status() is Status.COMPLETED
    with pytest.raises(errors.InstanceExists):
        fork(started, 0)


# --- what is shared -----------------------------------------------------------------------------------------------


def test_what_is_settled_is_shared_and_the_rest_runs_anew(lives: Worlds) -> None:
    started = started_with(lives, buy)
    started.run_all()
    forked = fork(started, 1)
    assert (forked.status(), forked.states()) == (Status.RUNNING, ["reserve succeeded"])
    forked.run_all()
    assert (forked.states(), forked.status()) == (started.states(), Status.COMPLETED)
    assert forked.row(0).attempt == 1
    assert started.rows()[0].generation != forked.rows()[0].generation


def test_what_was_drawn_in_the_shared_part_stays_and_later_draws_are_ones_own(lives: Worlds) -> None:
    started = started_with(lives, buy)
    started.run_all()
    forked = fork(started, 2)
    forked.run_all()
    origin, other = started.result(), forked.result()
    assert origin[:4] == other[:4]
    assert set(origin[4:]).isdisjoint(other[4:])


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 2)])
def test_a_fork_of_a_fork_keeps_what_was_drawn_before_either(lives: Worlds, first: int, second: int) -> None:
    started = started_with(lives, buy)
    started.run_all()
    forked = fork(started, first)
    forked.run_all()
    twice = fork(forked, second, "twice")
    twice.run_all()
    origin, middle, last = started.result(), forked.result(), twice.result()
    assert last[: 2 * second] == middle[: 2 * second]
    assert last[: 2 * min(first, second)] == origin[: 2 * min(first, second)]
    assert set(last[2 * second :]).isdisjoint(middle)


def test_a_fork_at_the_end_returns_the_same(lives: Worlds) -> None:
    started = started_with(lives, lambda ctx: ctx.run(step("charge")))
    started.run(0, succeeds("c-1"))
    forked = fork(started, 1)
    forked.go_on()
    assert forked.result() == "c-1"


def test_where_a_step_had_not_settled_a_fork_is_refused_and_leaves_nothing(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        slow = ctx.start(step("charge"))
        ctx.run(step("reserve"))
        ctx.run(step("ship"))
        return slow.get()

    started = started_with(lives, workflow)
    started.run(1, succeeds())
    started.run(2, succeeds())
    started.run(0, succeeds())
    for seq in (1, 2):
        with pytest.raises(errors.InvalidOperation, match="had not settled"):
            fork(started, seq)
    with pytest.raises(errors.InvalidOperation, match="3 records"):
        fork(started, 4)
    fork(started, 3).go_on()
    with pytest.raises(errors.InstanceExists):
        fork(started, 0)


def test_receives_and_timers_that_were_open_are_the_forks_own(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        first = ctx.receive("a")
        timer, second = ctx.timer(60), ctx.message("a")
        ctx.run(step("work"))
        done, _ = ctx.wait(timer, second)
        return [first, len(done), second.get()]

    started = started_with(lives, workflow)
    for number in (1, 2):
        started.send("a", number)
    started.go_on()
    started.run(3, succeeds())
    started.go_on()
    assert started.result() == [1, 1, 2]
    forked = fork(started, 3)
    assert [row.outcome for row in forked.rows()] == ["succeeded", None, None]
    started.clock.advance(60)
    started.settle_due()
    forked.run_all()
    assert forked.status() is Status.RUNNING  # the origin had not been told of its second message there
    forked.send("a", "own")
    forked.run_all()
    assert forked.result() == [1, 1, "own"]


def test_a_message_that_the_shared_part_was_told_of_and_did_not_receive_is_there_for_the_fork(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        first = ctx.receive("a")
        ctx.run(step("work"))
        return [first, ctx.receive("b"), ctx.run(step("charge"))]

    started = started_with(lives, workflow)
    started.send("b", 2)
    started.send("a", 1)
    started.run_all()
    forked = fork(started, 2)
    forked.run_all()
    assert (started.result()[:2], forked.result()[:2]) == ([1, 2], [1, 2])
    assert fork(started, 1, "earlier").instance.mail == 2


def test_subscriptions_of_the_shared_part_hold(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.subscribe("news")
        ctx.subscribe("gone")
        ctx.unsubscribe("gone")
        ctx.run(step("work"))
        ctx.subscribe("later", mode="competing")
        return ctx.receive("news")

    started = started_with(lives, workflow)
    started.run_all()
    forked = fork(started, 4)
    with started.store.read("look") as connection:
        columns = (subscription.c.channel, subscription.c.mode)
        held = connection.execute(select(*columns).where(subscription.c.instance_id == "fork")).all()
    assert [tuple(row) for row in held] == [("news", "broadcast")]
    started.publish_message("news", "heard")
    forked.run_all()
    assert (started.result(), forked.result()) == ("heard", "heard")


def test_what_was_sent_and_performed_is_not_sent_and_performed_again(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.send("listener", "a", 1)
        made = ctx.local(len, "abc")
        return [made, ctx.run(step("work"))]

    started = lives(buy=workflow, listen=lambda ctx: [ctx.receive("a"), ctx.receive("a")])
    started.start("listen", instance_id="listener")
    started.start("buy", instance_id="order-1")
    started.run_all()
    fork(started, 2).run_all()
    assert started.workflows.host.performed == ["len"]
    assert started.at("listener").status() is Status.RUNNING


# --- compensations ------------------------------------------------------------------------------------------------


def test_a_fork_undoes_its_own_steps_alone(lives: Worlds) -> None:
    started = started_with(lives, buy)
    started.run_all()
    forked = fork(started, 1)
    forked.go_on()
    forked.run(1, succeeds())
    forked.run(2, FAILS)
    forked.run_all()
    assert [row.undoes for row in forked.rows() if row.kind is Kind.COMPENSATION] == [1]
    assert (forked.status(), started.status()) == (Status.COMPENSATED, Status.COMPLETED)
    with pytest.raises(errors.InvalidOperation, match="only a TERMINATED instance"):
        fork(started, 1, "owner", owns=True)


def test_a_nested_scope_that_was_undone_in_the_shared_part_is_replayed(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            with ctx.saga():
                ctx.run(step("reserve"), compensate=step("release"))
                ctx.run(step("charge"))
        except errors.StepFailed:
            return ctx.run(step("ship"), compensate=step("recall"))

    started = started_with(lives, workflow)
    started.run(0, succeeds())
    started.run(1, FAILS)
    with pytest.raises(errors.InvalidOperation):
        fork(started, 3)
    started.run(2, succeeds())
    with pytest.raises(errors.InvalidOperation, match="was undoing"):
        fork(started, 2)
    forked = fork(started, 3)
    forked.run_all()
    assert forked.states() == ["reserve succeeded", "charge failed", "release succeeded", "ship succeeded"]
    assert forked.status() is Status.COMPLETED


def test_where_the_undo_of_a_completed_instance_began_it_cannot_be_forked(lives: Worlds) -> None:
    started = started_with(lives, lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    started.run_all()
    started.lifecycle.undo(started.instance)
    started.run_all()
    assert started.status() is Status.COMPENSATED
    with pytest.raises(errors.InvalidOperation, match="undo"):
        fork(started, 2)
    forked = fork(started, 0)
    forked.run_all()
    assert forked.status() is Status.COMPLETED


def terminated(lives: Worlds, workflow: Callable[..., Any] = buy, **functions: Callable[..., Any]) -> World:
    """An instance that was terminated when all but its last step had been run."""
    started = started_with(lives, workflow, **functions)
    started.go_on()
    while not started.open_steps() or started.row(started.open_steps()[0]).name != "ship":
        run_next(started)
    started.lifecycle.terminate(started.instance, None)
    return started


def run_next(started: World) -> None:
    for row in started.rows():
        if row.kind is Kind.CHILD and row.outcome is None:
            child = started.at(row.child_id or "")
            child.run(child.open_steps()[0], succeeds())
            started.go_on()
            return
    started.run(started.open_steps()[0], succeeds())
    started.go_on()


def test_a_fork_that_owns_the_compensations_undoes_what_it_shares(lives: Worlds) -> None:
    forked = fork(terminated(lives), 2, owns=True)
    forked.go_on()
    forked.run(2, FAILS)
    forked.run_all()
    assert [row.undoes for row in forked.rows() if row.kind is Kind.COMPENSATION] == [1, 0]
    assert forked.status() is Status.COMPENSATED


def test_compensations_are_given_away_once(lives: Worlds) -> None:
    started = terminated(lives)
    fork(started, 1, owns=True).go_on()
    for seq in (1, 2):
        with pytest.raises(errors.InvalidOperation, match="belong to another"):
            fork(started, seq, "second", owns=True)
    fork(started, 2, "third").run_all()


def test_a_fork_that_owns_the_compensations_has_the_children_undo_themselves(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(step("ordering"))
        ctx.run(step("ship"))

    started = terminated(lives, workflow, ordering=ordering)
    child = started.child(0)
    assert child.status() is Status.COMPLETED
    forked = fork(started, 1, owns=True)
    forked.go_on()
    forked.run(1, FAILS)
    run_everything(started)
    assert child.status() is Status.COMPENSATED
    assert (forked.status(), started.status()) == (Status.COMPENSATED, Status.TERMINATED)
    assert json.loads(forked.row(2).result or "0") is None


def test_a_fork_that_owns_the_compensations_keeps_the_children_that_it_may_have_to_undo(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(step("ordering"))
        ctx.run(step("ship"))

    started = terminated(lives, workflow, ordering=ordering)
    child = started.child(0)
    forked = fork(started, 1, owns=True)
    forked.go_on()
    retention = Retention(started.store, started.settings, started.clock)
    for owner in (started, child):
        with started.store.begin("finished") as connection:
            instances.delete_finish(connection, owner.instance_id, owner.generation)
    started.clock.advance(1)
    assert retention.purge(timedelta(0), None) == 1
    forked.run(1, FAILS)
    run_everything(forked)
    assert (forked.status(), child.status()) == (Status.COMPENSATED, Status.COMPENSATED)
    with started.store.begin("finished") as connection:
        instances.delete_finish(connection, forked.instance_id, forked.generation)
    started.clock.advance(1)
    assert retention.purge(timedelta(0), None) == 2
