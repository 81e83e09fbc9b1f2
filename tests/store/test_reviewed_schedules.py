"""Schedules that a reader of the code found to lose something, each played once on every store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Connection, exc

from orchestrator import Context, Orchestrator, errors
from orchestrator.core.records import Failed
from orchestrator.runtime import settling
from orchestrator.runtime.passes import WorkflowOptions
from orchestrator.store.instances import Status
from orchestrator.store.past import as_history

from .world import FAILS, World, step, succeeds

Worlds = Callable[..., World]

# --- passes -------------------------------------------------------------------------------------------------------


def test_a_store_that_is_away_during_a_pass_is_not_the_workflows_failure(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Celery("shop", broker="memory://")
    orchestrator = Orchestrator(app, store=sqlite_url)

    @orchestrator.workflow(name="asks")
    def asks(ctx: Context) -> bool:
        try:
            return ctx.send("somebody", "channel", 1, missing="ignore")
        except BaseException:
            raise ValueError("out of stock") from None

    orchestrator.start(asks.s(), instance_id="order-1")
    instance = orchestrator.find_instance("order-1")
    assert instance is not None
    decision, _live = orchestrator.workflows.decide(instance, as_history(instance, []))
    assert not isinstance(decision.ending, Failed)

    @contextmanager
    def is_away(_purpose: str) -> Iterator[Connection]:
        raise exc.OperationalError("SELECT", {}, Exception("too many clients"))
        yield

    monkeypatch.setattr(orchestrator.store, "read", is_away)
    with pytest.raises(exc.OperationalError):
        orchestrator.workflows.decide(instance, as_history(instance, []))


def test_a_task_that_nobody_knows_blocks_though_the_workflow_catches_it(lives: Worlds) -> None:
    def workflow(ctx: Context) -> None:
        try:
            ctx.run(step("legacy"))
        except errors.InvalidInput:
            ctx.run(step("charge"))

    started = lives(buy=workflow)
    started.start("buy")
    assert (started.status(), started.states()) == (Status.BLOCKED, [])
    started.workflows.host.task("legacy")
    started.lifecycle.resume(started.instance)
    started.go_on()
    assert started.states() == ["legacy scheduled"]


def test_a_map_goes_on_that_a_cancellation_was_declined_in(lives: Worlds) -> None:
    def workflow(ctx: Context) -> str:
        with suppress(errors.WorkflowCancelled):
            ctx.map(step("work"), [1, 2, 3], concurrency=1)
        return "declined"

    started = lives(fan=workflow)
    started.start("fan")
    attempt = started.take(0)
    started.cancel()  # its pass is owed, and made after the item has failed
    started.end(attempt, FAILS)
    started.go_on()
    assert [str(row.outcome or row.state) for row in started.rows()] == ["failed", "scheduled", "held"]
    for seq in (1, 2):
        started.run(seq, succeeds())
        started.go_on()
    assert started.status() is Status.FAILED


# --- recur --------------------------------------------------------------------------------------------------------


def twice(ctx: Context, run: int = 0) -> str:
    """Two runs, each with a scope that fails, and whose compensation may fail."""
    try:
        with ctx.saga():
            name, undoing = ("reserve", "release") if run == 0 else ("charge", "refund")
            ctx.run(step(name), compensate=step(undoing))
            ctx.run(step("ship"))
    except (errors.StepFailed, errors.CompensationFailed):
        pass
    if run == 0:
        ctx.recur(1)
    return "ok"


def test_what_earlier_runs_have_not_undone_is_listed_and_repaired_as_theirs(lives: Worlds) -> None:
    first = lives(twice=twice)
    first.start("twice")
    for outcome in (succeeds("shelf"), FAILS, FAILS):
        first.run(len([row for row in first.rows() if row.outcome]), outcome)
        first.go_on()
    second = first.at("order-1")
    for outcome in (succeeds("paid"), FAILS, succeeds()):
        second.run(len([row for row in second.rows() if row.outcome]), outcome)
        second.go_on()
    listed = settling.list_not_undone(second.instance)
    assert [(entry.run, entry.seq, entry.name) for entry in listed] == [(0, 2, "release")]
    second.operator.retry_compensation(second.instance, 2)
    assert [row.name for row in first.rows() if row.seq < 0] == ["release"]
    assert [row.name for row in second.rows() if row.seq < 0] == []
    first.run(-1, succeeds())
    assert settling.list_not_undone(second.instance) == []


def test_a_fork_of_a_recurred_instance_hears_what_its_origin_has_subscribed_to(lives: Worlds) -> None:
    def workflow(ctx: Context, run: int = 0) -> Any:
        if run == 0:
            ctx.subscribe("prices")
            ctx.recur(1)
        return ctx.receive("prices")

    origin = lives(listen=workflow)
    origin.start("listen")
    origin.go_on()
    origin.forks.fork(origin.instance, 0, "fork", False)
    fork = origin.at("fork")
    fork.go_on()
    origin.publish(origin.publish_message("prices", 5))
    origin.go_on()
    fork.go_on()
    assert (origin.at("order-1").result(), fork.result()) == (5, 5)


# --- what somebody else has -----------------------------------------------------------------------------------------


def test_what_terminating_settled_is_not_shared_with_a_fork(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        reserved = ctx.start(step("reserve"), compensate=step("release"))
        ctx.run(step("charge"), compensate=step("refund"))
        ctx.run(step("ship"))
        return reserved.get()

    started = lives(buy=workflow)
    started.start("buy")
    started.run(1, succeeds())
    started.lifecycle.terminate(started.instance, "stop")
    with pytest.raises(errors.InvalidOperation, match=r"step 0 \(reserve\) of order-1 had not settled there"):
        started.forks.fork(started.instance, 2, "fork", True)


def test_what_is_competed_for_goes_back_from_who_is_cancelled(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.subscribe("jobs", mode="competing")
        return ctx.receive("jobs")

    first = lives(work=workflow)
    first.start("work", instance_id="order-1")
    first.start("work", instance_id="order-2")
    first, second = first.at("order-1"), first.at("order-2")
    first.cancel()  # whoever is about to be told of something else wins nothing
    first.publish_message("jobs", 7)
    second.publish(second.postman.hand_out("jobs"))
    second.go_on()
    assert (first.status(), second.result()) == (Status.CANCELLED, 7)


def test_what_was_won_and_not_received_goes_back_at_the_end(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.subscribe("jobs", mode="competing")
        return ctx.receive("jobs")

    started = lives(work=workflow)
    started.start("work", instance_id="order-1")
    first = started.at("order-1")
    first.publish_message("jobs", 7)
    first.publish(first.postman.hand_out("jobs"))
    assert first.instance.mail == 1
    started.start("work", instance_id="order-2")
    second = started.at("order-2")
    first.lifecycle.terminate(first.instance, None)
    second.publish(second.postman.hand_out("jobs"))
    second.go_on()
    assert second.result() == 7


def test_a_child_that_left_something_behind_is_not_replaced(lives: Worlds) -> None:
    def parent(ctx: Context) -> None:
        ctx.run(step("kid"))

    def kid(ctx: Context) -> None:
        ctx.run(step("reserve"), compensate=step("release"))
        ctx.run(step("work"))

    started = lives(parent=parent, kid=kid)
    started.workflows.declared = WorkflowOptions(parks=True)
    started.start("parent")
    started.go_on()
    child = started.child(0)
    child.run(0, succeeds())
    child.lifecycle.terminate(child.instance, "stop")
    started.go_on()
    with pytest.raises(errors.InvalidOperation, match="is TERMINATED: what it did would be forgotten"):
        started.lifecycle.resume(started.instance)
    assert started.status() is Status.BLOCKED


def test_a_send_whose_answer_was_lost_is_received_once(lives: Worlds) -> None:
    started = lives(listen=lambda ctx: [ctx.receive("pay") for _ in range(2)])
    started.start("listen")
    begin, answers = started.store.begin, iter((False, True))

    @contextmanager
    def loses_an_answer(purpose: str, *, locks_late: bool = False) -> Iterator[Connection]:
        with begin(purpose, locks_late=locks_late) as connection:
            yield connection
        if purpose == "send" and not next(answers, True):
            raise exc.OperationalError("COMMIT", {}, Exception("server closed the connection"))

    started.store.begin = loses_an_answer  # type: ignore[method-assign]
    try:
        assert started.send("pay", 10)
    finally:
        started.store.begin = begin  # type: ignore[method-assign]
    started.send("pay", 20)
    started.go_on()
    assert started.result() == [10, 20]
