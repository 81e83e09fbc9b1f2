"""The point of no return: what it commits, what it makes of a cancellation; and the roles that steps are given."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Role, State, Waiting, Wake

from .host import FakeHost, group
from .past import Past, asks, failure_of, plan, refusal_of, result_of, waits_for


class Refused(Exception):
    pass


def order(host: FakeHost, then: Any = None) -> Any:
    """Return a workflow that reserves, charges (the pivot), mails, and then does something else."""

    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s(), pivot=True)
        ctx.run(host.tasks["ship"].s(), compensate=host.tasks["recall"].s())
        if then is None:
            raise Refused("no stamps")
        return then(ctx)

    return workflow


def reserved(past: Past) -> Past:
    past.asked("reserve", compensation=plan("release")).succeeded(0)
    return past.asked("charge", compensation=plan("refund"))


# --- roles ------------------------------------------------------------------------------------------------------------


def test_steps_are_recorded_with_their_role(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["charge"].s(), pivot=True)
        ctx.start(host.tasks["mail"].s(), optional=True)
        ctx.start(host.tasks["ship"].s())
        ctx.start(group(host.tasks["work"].s()), optional=True)

    commands: Any = [new.command for new in past.decide(workflow).records]
    assert [command.role for command in commands] == [Role.PIVOT, Role.OPTIONAL, None, Role.OPTIONAL]


@pytest.mark.parametrize(("on_failure", "role"), [("collect", Role.OPTIONAL), ("stop", None)])
def test_a_failure_that_a_map_collects_is_nobody_s_trouble(
    past: Past, host: FakeHost, on_failure: Any, role: Role | None
) -> None:
    decision = past.decide(lambda ctx: ctx.map(host.tasks["work"].s(), [1, 2], on_failure=on_failure))
    commands: Any = [new.command for new in decision.records]
    assert [command.role for command in commands] == [role, role]
    # yet it is returned in place, where that of an optional step would be None
    if on_failure == "collect":
        past.asked("work").asked("work").failed(0).succeeded(1, 5)
        result = past.decide(
            lambda ctx: [
                type(one).__name__ if isinstance(one, Exception) else one
                for one in ctx.map(host.tasks["work"].s(), [1, 2], on_failure="collect")
            ]
        )
        assert result_of(result) == ["RuntimeError", 5]


@pytest.mark.parametrize("way", ["run", "start"])
def test_a_pivot_that_is_optional_or_a_group_is_refused(past: Past, host: FakeHost, way: str) -> None:
    decision = past.decide(lambda ctx: getattr(ctx, way)(host.tasks["charge"].s(), pivot=True, optional=True))
    assert "cannot be optional" in refusal_of(decision)
    decision = past.decide(lambda ctx: getattr(ctx, way)(group(host.tasks["charge"].s()), pivot=True))
    assert "one step, not a group" in refusal_of(decision)


# --- what it commits --------------------------------------------------------------------------------------------------


def test_a_pivot_that_failed_undoes_like_any_step(past: Past, host: FakeHost) -> None:
    assert asks(reserved(past).failed(1).decide(order(host))) == ["compensation release of 0"]


def test_a_pivot_in_doubt_that_an_operator_lets_raise_is_undone_too(past: Past, host: FakeHost) -> None:
    assert asks(reserved(past).unknown(1).decide(order(host))) == ["compensation refund of 1"]


def test_a_pivot_that_succeeded_commits_itself_and_all_before_it(past: Past, host: FakeHost) -> None:
    reserved(past).succeeded(1).asked("ship", compensation=plan("recall")).succeeded(2)
    assert asks(past.decide(order(host))) == ["compensation recall of 2"]
    failed = failure_of(past.undoing(2, "recall").succeeded(3).decide(order(host)))
    assert (failed.undone, failed.failure.message) == (True, "no stamps")


def test_a_child_that_is_the_pivot_commits_all_before_it(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        ctx.run(host.tasks["deliver"].s(), pivot=True)
        raise Refused

    past.asked("reserve", compensation=plan("release")).succeeded(0).child("deliver").succeeded(1)
    assert failure_of(past.decide(workflow)).undone is False


def test_a_pivot_in_a_nested_scope_commits_what_is_around_it(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        with ctx.saga():
            ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s(), pivot=True)
        raise Refused

    past.asked("reserve", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(1)
    assert failure_of(past.decide(workflow)).undone is False


def test_what_was_started_before_the_pivot_and_is_still_going_on_is_committed(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        ctx.run(host.tasks["charge"].s(), pivot=True)
        raise Refused

    past.asked("reserve", compensation=plan("release")).asked("charge").succeeded(1)
    assert asks(past.running(0).decide(workflow)) == []
    assert failure_of(past.succeeded(0).decide(workflow)).undone is False


def test_what_was_started_after_the_pivot_and_before_it_succeeded_is_not_committed(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        pivot = ctx.start(host.tasks["charge"].s(), pivot=True)
        ctx.run(host.tasks["ship"].s(), compensate=host.tasks["recall"].s())
        pivot.get()
        raise Refused

    past.asked("charge").asked("ship", compensation=plan("recall")).succeeded(1).succeeded(0)
    assert asks(past.decide(workflow)) == ["compensation recall of 1"]


def test_a_compensation_registered_by_hand_is_committed_too(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.compensate(host.tasks["release"].si())
        ctx.run(host.tasks["charge"].s(), pivot=True)
        raise Refused

    decision = past.decide(workflow)
    past.asked("release", decision.records[0].command.kind, state=State.SETTLED, compensation=plan("release"))
    past.asked("charge").succeeded(1)
    past.change(0, outcome="succeeded")
    assert failure_of(past.decide(workflow)).undone is False


def test_a_step_in_doubt_from_before_the_pivot_stays_as_it_is(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        except errors.StepUnknown:
            ctx.run(host.tasks["charge"].s(), pivot=True)
        return "done"

    past.asked("reserve", compensation=plan("release")).unknown(0).asked("charge").succeeded(1)
    assert result_of(past.decide(workflow)) == "done"


def test_a_pivot_that_succeeds_while_its_scope_drains_is_not_undone(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        ctx.start(host.tasks["charge"].s(), compensate=host.tasks["refund"].s(), pivot=True)
        raise Refused

    assert waits_for(reserved(past).running(1).decide(workflow)) == [1]
    assert failure_of(past.succeeded(1).decide(workflow)).undone is False


def test_a_step_that_is_being_undone_when_the_pivot_succeeds_is_undone(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        step = ctx.start(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        pivot = ctx.start(host.tasks["charge"].s(), pivot=True)
        step.cancel()
        pivot.get()
        try:
            return step.get()
        except errors.StepUndone:
            return "undone"

    past.asked("reserve", compensation=plan("release")).asked("charge").running(1).succeeded(0, "r-1")
    past.undoing(0, "release").succeeded(1).succeeded(2)
    assert result_of(past.decide(workflow)) == "undone"


# --- cancellation -----------------------------------------------------------------------------------------------------


def test_a_cancellation_while_the_pivot_is_open_waits_for_it(past: Past, host: FakeHost) -> None:
    assert reserved(past).cancel().decide(order(host)).ending == Waiting(1, {1: Wake.COUNT})


def test_a_pivot_that_succeeds_lets_the_cancellation_go(past: Past, host: FakeHost) -> None:
    reserved(past).cancel().succeeded(1).asked("ship").succeeded(2)
    assert result_of(past.decide(order(host, lambda ctx: "done"))) == "done"


def test_a_pivot_that_fails_lets_the_cancellation_through(past: Past, host: FakeHost) -> None:
    reserved(past).cancel().failed(1)
    assert asks(past.decide(order(host))) == ["compensation release of 0"]
    failed = failure_of(past.undoing(0, "release").succeeded(2).decide(order(host)))
    assert (failed.is_cancelled, failed.failure.type) == (True, "orchestrator.errors.WorkflowCancelled")


def test_other_waits_are_not_interrupted_while_the_pivot_is_open(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        pivot = ctx.start(host.tasks["charge"].s(), pivot=True)
        ctx.sleep(60)
        return pivot.get()

    past.asked("charge").timer().cancel()
    assert waits_for(past.decide(workflow)) == [1]
    past.fired(1)
    assert waits_for(past.decide(workflow)) == [0]
    assert result_of(past.succeeded(0, 5).decide(workflow)) == 5


@pytest.mark.parametrize("request_", ["cancel", "deadline"])
def test_a_cancellation_after_the_pivot_is_refused(past: Past, host: FakeHost, request_: str) -> None:
    reserved(past).succeeded(1).asked("ship")
    getattr(past, request_)()
    assert past.decide(order(host)).ending == Waiting(1, {2: Wake.COUNT})
    past.succeeded(2)
    assert result_of(past.decide(order(host, lambda ctx: "done"))) == "done"


def test_a_cancellation_before_the_pivot_begins_is_raised(past: Past, host: FakeHost) -> None:
    past.asked("reserve", compensation=plan("release")).cancel()
    assert waits_for(past.running(0).decide(order(host))) == [0]
    assert asks(past.succeeded(0).decide(order(host))) == ["compensation release of 0"]


def test_a_pivot_that_is_withdrawn_lets_the_cancellation_through(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        pivot = ctx.start(host.tasks["charge"].s(), pivot=True)
        ctx.run(host.tasks["mail"].s())
        pivot.cancel()
        ctx.sleep(60)

    past.asked("charge").asked("mail").cancel().succeeded(1).withdrawn(0)
    decision = past.decide(workflow)
    assert (decision.records, failure_of(decision).is_cancelled) == ((), True)
