"""Undoing: in reverse, past failures, with effects that came too late named, and what an operator does about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import RetryPolicy, errors
from orchestrator.core.context import Context
from orchestrator.core.records import Kind, Outcome, State
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.operator import Operator
from orchestrator.store import instances
from orchestrator.store.instances import Status

from .world import FAILS, World, step, succeeds

Worlds = Callable[..., World]


class Bell:
    """Takes what is to be published, in place of a broker."""

    def __init__(self, world: World) -> None:
        self.world = world

    def deliver(self, outbox: Outbox) -> None:
        self.world.publish(outbox)


def operator_of(world: World) -> Operator:
    return Operator(world.coordinator, Bell(world))  # type: ignore[arg-type]


def buy(ctx: Context) -> Any:
    ctx.run(step("reserve"), compensate=step("release"))
    ctx.run(step("charge"), compensate=step("refund"))
    return ctx.run(step("ship"), compensate=False)


def failed_shipment(world: Worlds) -> World:
    """An order whose shipment failed: first the charge is refunded, as 3, then the reservation released, as 4."""
    started = world(buy=buy)
    started.start("buy")
    started.run(0, succeeds("r-1"))
    started.run(1, succeeds("c-1"))
    started.run(2, FAILS)
    return started


def not_undone(world: World) -> list[tuple[int, int, str]]:
    entries = json.loads(world.instance.not_undone or "[]")
    return [(entry["seq"], entry["undoes"], entry["name"]) for entry in entries]


def test_a_failed_shipment_refunds_then_releases(world: Worlds) -> None:
    started = failed_shipment(world)
    assert started.status() is Status.COMPENSATING
    assert [(row.kind, row.undoes, row.arguments) for row in started.rows()[3:]] == [
        (Kind.COMPENSATION, 1, '{"args":["c-1"],"kwargs":{}}')
    ]
    started.run(3, succeeds())
    assert (started.row(4).undoes, started.row(4).arguments) == (0, '{"args":["r-1"],"kwargs":{}}')
    started.run(4, succeeds())
    assert (started.status(), not_undone(started)) == (Status.COMPENSATED, [])
    started.clock.advance(60)
    with started.store.read("look") as connection:
        assert len(instances.list_due_finishes(connection, started.clock(), 10)) == 1


def test_a_compensation_that_fails_is_named_and_the_rest_still_run(world: Worlds) -> None:
    started = failed_shipment(world)
    started.run(3, FAILS)
    started.run(4, succeeds())
    assert started.status() is Status.COMPENSATION_FAILED
    assert not_undone(started) == [(3, 1, "refund")]


# --- effects that come too late -----------------------------------------------------------------------------------


def given_up_and_undone(world: Worlds) -> tuple[World, Any]:
    """An order whose charge was given up, and undone with the rest."""
    started = world(buy=lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    started.start("buy")
    given_up = started.take(0)
    started.lose(given_up)
    started.run(0, FAILS)
    started.advance()
    return started, given_up


def test_an_effect_that_comes_after_its_undo_turns_compensated_into_compensation_failed(world: Worlds) -> None:
    started, given_up = given_up_and_undone(world)
    started.run(1, succeeds())
    assert started.status() is Status.COMPENSATED
    for _ in range(2):
        assert not started.end(given_up, succeeds("c-1"))
    assert started.status() is Status.COMPENSATION_FAILED
    assert not_undone(started) == [(1, 0, "refund")]
    assert "took effect after its compensation had begun" in (started.instance.not_undone or "")
    assert started.row(0).outcome is Outcome.UNKNOWN


def cancelled_and_undone(world: Worlds) -> tuple[World, Any]:
    """An order that was cancelled while the worker was away that charged it."""
    started = world(buy=lambda ctx: ctx.run(step("charge"), compensate=step("refund")))
    started.start("buy")
    given_up = started.take(0)
    started.cancel()
    started.advance()
    started.lose(given_up)
    started.advance()
    return started, given_up


def test_an_effect_that_comes_after_its_undo_turns_cancelled_into_compensation_failed(world: Worlds) -> None:
    started, given_up = cancelled_and_undone(world)
    started.run(1, succeeds())
    assert started.status() is Status.CANCELLED
    started.end(given_up, succeeds("c-1"))
    assert (started.status(), not_undone(started)) == (Status.COMPENSATION_FAILED, [(1, 0, "refund")])


@pytest.mark.parametrize("comes_late", [True, False])
def test_what_was_cancelled_is_cancelled_when_an_operator_has_repaired_it(world: Worlds, comes_late: bool) -> None:
    started, given_up = cancelled_and_undone(world)
    started.run(1, succeeds() if comes_late else FAILS)
    if comes_late:
        started.end(given_up, succeeds("c-1"))
    assert started.status() is Status.COMPENSATION_FAILED
    operator_of(started).retry_compensation(started.instance, 1)
    started.run(-1, succeeds())
    assert (started.status(), not_undone(started)) == (Status.CANCELLED, [])


def test_what_declined_to_be_cancelled_and_failed_is_compensated_by_a_repair(world: Worlds) -> None:
    def workflow(ctx: Context) -> None:
        try:
            ctx.run(step("charge"), compensate=step("refund"))
            ctx.receive("never")
        except errors.WorkflowCancelled:
            pass
        ctx.run(step("ship"), compensate=False)

    started = world(buy=workflow)
    started.start("buy")
    started.run(0, succeeds("c-1"))
    started.cancel()
    started.advance()
    started.run(2, FAILS)
    started.run(3, FAILS)
    assert started.status() is Status.COMPENSATION_FAILED
    operator_of(started).skip_compensation(started.instance, 0, "refunded by hand")
    assert started.status() is Status.COMPENSATED


def test_an_effect_that_comes_while_its_undo_runs_is_kept_to_the_end(world: Worlds) -> None:
    started, given_up = given_up_and_undone(world)
    undoing = started.take(1)
    started.end(given_up, succeeds("c-1"))
    assert not_undone(started) == [(1, 0, "refund")]
    started.end(undoing, succeeds())
    assert started.status() is Status.COMPENSATION_FAILED


def test_an_effect_that_comes_before_its_undo_begins_is_undone_by_it(world: Worlds) -> None:
    started, given_up = given_up_and_undone(world)
    started.end(given_up, succeeds("c-1"))
    started.run(1, succeeds())
    assert (started.status(), not_undone(started)) == (Status.COMPENSATED, [])


def test_an_attempt_that_failed_after_it_was_given_up_names_nothing(world: Worlds) -> None:
    started, given_up = given_up_and_undone(world)
    started.run(1, succeeds())
    started.end(given_up, FAILS)
    assert (started.status(), not_undone(started)) == (Status.COMPENSATED, [])
    assert len(json.loads(started.row(0).strays or "")) == 1


# --- operators ----------------------------------------------------------------------------------------------------


def failed_refund(world: Worlds) -> World:
    started = failed_shipment(world)
    started.run(3, FAILS)
    started.run(4, succeeds())
    assert started.status() is Status.COMPENSATION_FAILED
    return started


@pytest.mark.parametrize("named_by", [3, 1], ids=["its-own-seq", "the-step-it-undoes"])
def test_a_repeated_compensation_that_succeeds_completes_the_undoing(world: Worlds, named_by: int) -> None:
    started = failed_refund(world)
    operator_of(started).retry_compensation(started.instance, named_by)
    repeated = started.row(-1)
    assert (repeated.name, repeated.undoes, repeated.arguments) == ("refund", 1, started.row(3).arguments)
    assert started.published[-1] == (-1, 1)
    with pytest.raises(errors.InvalidOperation, match="is being repeated already"):
        operator_of(started).retry_compensation(started.instance, named_by)
    started.run(-1, succeeds())
    assert (started.status(), not_undone(started)) == (Status.COMPENSATED, [])
    assert started.row(3).resolution == "undone by the repeated compensation -1"
    with pytest.raises(errors.InvalidOperation, match="has been dealt with"):
        operator_of(started).retry_compensation(started.instance, named_by)


def test_a_repeated_compensation_that_fails_may_be_repeated_again(world: Worlds) -> None:
    started = failed_refund(world)
    for seq in (-1, -2):
        operator_of(started).retry_compensation(started.instance, 3)
        started.run(seq, FAILS)
        assert (started.status(), not_undone(started)) == (Status.COMPENSATION_FAILED, [(3, 1, "refund")])


def test_a_compensation_that_waits_for_its_next_attempt_is_tried_now(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.compensate(step("refund"), retry=RetryPolicy())
        return ctx.run(step("ship"), compensate=False)

    started = world(buy=workflow)
    started.start("buy")
    started.run(1, FAILS)
    started.run(2, FAILS)
    assert (started.row(2).state, started.published[-1]) == (State.SCHEDULED, (2, 1))
    operator_of(started).retry_compensation(started.instance, 2)
    assert started.published[-1] == (2, 3)
    assert started.claim(2, dispatch=2) is None
    started.run(2, succeeds())
    assert started.status() is Status.COMPENSATED


def test_a_skipped_compensation_is_taken_as_dealt_with(world: Worlds) -> None:
    started = failed_refund(world)
    operator_of(started).skip_compensation(started.instance, 1, "refunded by hand\0 \ud800")
    assert (started.status(), not_undone(started)) == (Status.COMPENSATED, [])
    assert (started.row(3).resolution or "").startswith("skipped: refunded by hand")


def test_a_compensation_that_is_skipped_while_the_rest_runs_leaves_nothing_to_do(world: Worlds) -> None:
    started = failed_shipment(world)
    operator_of(started).skip_compensation(started.instance, 3, "refunded by hand")
    assert (started.row(3).outcome, started.claim(3, dispatch=1)) == (Outcome.FAILED, None)
    started.advance()
    started.run(4, succeeds())
    assert (started.status(), not_undone(started)) == (Status.COMPENSATED, [])


def test_what_runs_has_succeeded_or_does_not_exist_is_refused_to_the_operator(world: Worlds) -> None:
    started = failed_shipment(world)
    operator = operator_of(started)
    running = started.take(3)
    for act in (operator.retry_compensation, lambda i, s: operator.skip_compensation(i, s, "why")):
        with pytest.raises(errors.InvalidOperation, match="wait until its attempt has ended"):
            act(started.instance, 3)
    started.end(running, succeeds())
    with pytest.raises(errors.InvalidOperation, match="has succeeded"):
        operator.retry_compensation(started.instance, 1)
    with pytest.raises(errors.InvalidOperation, match="has no compensation 2"):
        operator.skip_compensation(started.instance, 2, "why")
    with pytest.raises(errors.InvalidOperation, match="needs a reason"):
        operator.skip_compensation(started.instance, 3, " ")
