"""``handle.undo()``: running the compensations of an instance that has completed."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Broken, Diverged, Outcome, Undone, Waiting, Wake

from .host import FakeHost
from .past import Past, asks, plan, result_of, waits_for


def order(host: FakeHost, *more: str) -> Any:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        for name in more:
            ctx.run(host.tasks[name].s())
        return "done"

    return workflow


def ordered(past: Past) -> Past:
    past.asked("reserve", compensation=plan("release")).succeeded(0)
    return past.asked("charge", compensation=plan("refund")).succeeded(1)


def test_what_has_completed_is_undone_as_a_failure_undoes_it(past: Past, host: FakeHost) -> None:
    workflow = order(host)
    assert result_of(ordered(past).decide(workflow)) == "done"
    decision = past.undo().decide(workflow)
    assert (asks(decision), decision.records[0].after_order) == (["compensation refund of 1"], 3)
    assert decision.ending == Waiting(1, {2: Wake.COUNT}, is_compensating=True)
    assert asks(past.undoing(1, "refund").succeeded(2).decide(workflow)) == ["compensation release of 0"]
    ending = past.undoing(0, "release").succeeded(3).decide(workflow).ending
    assert isinstance(ending, Undone)
    assert ending.failure.type == "orchestrator.errors.WorkflowUndone"


def test_what_could_not_be_undone_is_named(past: Past, host: FakeHost) -> None:
    ordered(past).undo().undoing(1, "refund").failed(2).undoing(0, "release").succeeded(3)
    decision = past.decide(order(host))
    assert isinstance(decision.ending, Undone)
    assert [entry.undoes for entry in decision.not_undone] == [1]


def test_undoing_what_left_nothing_to_undo_is_done_at_once(past: Past) -> None:
    assert isinstance(past.undo().decide(lambda ctx: "done").ending, Undone)


def test_asking_twice_undoes_once(past: Past, host: FakeHost) -> None:
    ordered(past).undo().undo().undoing(1, "refund").undo().succeeded(2).undoing(0, "release").succeeded(3)
    assert isinstance(past.decide(order(host)).ending, Undone)


@pytest.mark.parametrize("kept", ["commit", "pivot"])
def test_what_was_committed_stays_done(past: Past, host: FakeHost, kept: str) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        if kept == "commit":
            ctx.commit()
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s(), pivot=kept == "pivot")

    decision = ordered(past).undo().decide(workflow)
    assert asks(decision) == (["compensation refund of 1"] if kept == "commit" else [])


def test_a_step_in_doubt_that_was_taken_on_is_undone(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        except errors.StepUnknown as error:
            ctx.accept(error)

    past.asked("charge", compensation=plan("refund")).unknown(0)
    assert result_of(past.decide(workflow)) is None
    assert asks(past.undo().decide(workflow)) == ["compensation refund of 0"]


def test_an_attempt_that_is_still_alive_is_waited_for(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        step = ctx.start(host.tasks["charge"].s(), compensate=host.tasks["refund"].s(), timeout=5)
        ctx.accept(step)

    past.asked("charge", compensation=plan("refund")).running(0).timed_out(0)
    assert result_of(past.decide(workflow)) is None
    assert past.undo().decide(workflow).ending == Waiting(1, {0: Wake.CLOSED}, is_compensating=True, draining=(0,))
    assert asks(past.ended_late(0, Outcome.SUCCEEDED, "c-1").decide(workflow)) == ["compensation refund of 0"]


def test_what_came_in_between_is_passed_over(past: Past, host: FakeHost) -> None:
    ordered(past).message("a").cancel().deadline().undo()
    assert asks(past.decide(order(host))) == ["compensation refund of 1"]


def test_it_cannot_be_cancelled(past: Past, host: FakeHost) -> None:
    ordered(past).undo().undoing(1, "refund").cancel()
    assert past.decide(order(host)).ending == Waiting(1, {2: Wake.COUNT}, is_compensating=True)


@pytest.mark.parametrize("more", [("mail",), ("sleep",)])
def test_code_that_asks_for_more_than_it_did_when_it_completed_has_diverged(
    past: Past, host: FakeHost, more: tuple[str, ...]
) -> None:
    host.task("sleep")
    ending = ordered(past).undo().decide(order(host, *more)).ending
    assert ending == Diverged(2, "nothing more", f"step {more[0]}")


def test_code_that_waits_for_more_than_it_did_when_it_completed_has_diverged(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        timer = ctx.timer(60)
        ctx.run(host.tasks["reserve"].s())
        timer.get()

    past.timer().asked("reserve").succeeded(1).undo()
    assert past.decide(workflow).ending == Diverged(2, "nothing more", "a wait")


def test_code_that_fails_where_it_completed_undoes_nothing_of_its_own_accord(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        order(host)(ctx)
        raise LookupError

    assert isinstance(ordered(past).undo().decide(workflow).ending, Diverged | Broken)


def test_children_are_undone_with_their_parent(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["deliver"].s())
        ctx.start(host.tasks["invoice"].s(), on_parent_end="leave")

    past.child("deliver").succeeded(0).child("invoice", compensation=None).running(1)
    decision = past.undo().decide(workflow)
    assert (asks(decision), waits_for(decision)) == (["undo deliver of 0"], [2])
