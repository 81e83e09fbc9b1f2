"""Children: how they are started, cancelled, undone, left alone."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.calls.plans import LONGEST_ID
from orchestrator.core.context import Context
from orchestrator.core.records import (
    Compensation,
    Diverged,
    History,
    Kind,
    Outcome,
    Role,
    RunCompensation,
    StartChild,
    State,
    UndoChild,
    Waiting,
    Wake,
)
from orchestrator.core.replay import decide
from orchestrator.core.retry import RetryPolicy

from .driver import STARTED_AT
from .host import FakeHost, group
from .past import Past, arguments, asks, failure_of, plan, refusal_of, result_of, waits_for, withdraws


class Refused(Exception):
    pass


def delivering(host: FakeHost, **settings: Any) -> Any:
    """Return a workflow that fails once its child has completed."""

    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["deliver"].s("mug"), **settings)
        raise Refused("no such street")

    return workflow


# --- starting ---------------------------------------------------------------------------------------------------------


def test_a_workflow_s_signature_starts_a_child(past: Past, host: FakeHost) -> None:
    command: Any = past.decide(delivering(host, timeout=60)).records[0].command
    assert isinstance(command, StartChild)
    assert (command.name, command.timeout_seconds, command.is_detached, command.role) == ("deliver", 60, False, None)
    assert arguments(past.decide(delivering(host))) == ["mug"]
    assert command.compensation == Compensation("deliver", passes="nothing", is_child=True)


def test_a_child_is_waited_for_and_returns_its_result(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.run(host.tasks["deliver"].s())

    assert past.decide(workflow).ending == Waiting(1, {0: Wake.COUNT})
    assert result_of(past.child("deliver").succeeded(0, "at the door").decide(workflow)) == "at the door"


def test_a_child_that_failed_raises_step_failed_in_its_parent(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["deliver"].s())
        except errors.StepFailed as error:
            return [error.name, isinstance(error, LookupError)]

    assert result_of(past.child("deliver").failed(0, LookupError).decide(workflow)) == ["deliver", True]


def test_each_child_has_an_id_of_its_own_made_of_its_parent_s(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.local(len, [])
        pair = ctx.start(group(host.tasks["deliver"].s(), host.tasks["mail"].s(), host.tasks["deliver"].s()))
        single = ctx.start(host.tasks["invoice"].s())
        ctx.gather(pair, host.tasks["deliver"].s(), single, host.tasks["work"].s(), host.tasks["deliver"].s())

    decision = past.decide(workflow)
    ids = {new.seq: new.command.child_id for new in decision.records if isinstance(new.command, StartChild)}
    assert ids == {seq: f"order-1:1:{seq}~g1" for seq in (1, 3, 4, 5, 7)}


def test_the_children_of_a_map_have_ids_of_their_own_too(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.map(host.tasks["deliver"].s(), ["a", "b", "c"], concurrency=2)

    commands: Any = [new.command for new in past.decide(workflow).records]
    assert [command.child_id for command in commands] == [f"order-1:1:{seq}~g1" for seq in range(3)]
    assert [(command.lane, command.held) for command in commands] == [(0, False), (0, False), (0, True)]


def test_a_child_keeps_the_id_that_its_signature_asks_for(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(host.tasks["deliver"].s().set(task_id="parcel-7"))
        ctx.set_progress(child.instance_id)

    decision = past.decide(workflow)
    command: Any = decision.records[0].command
    assert (command.child_id, decision.progress) == ("parcel-7", "parcel-7")


@pytest.mark.parametrize(("length", "is_kept"), [(150, True), (LONGEST_ID, False)])
def test_an_id_that_would_be_too_long_is_shortened_the_same_way_each_time(
    host: FakeHost, length: int, is_kept: bool
) -> None:
    history = History("x" * length, "g1", 1, STARTED_AT)
    ids = []
    for _ in range(2):
        decision = decide(delivering(host), (), {}, history, host)
        command: Any = decision.records[0].command
        ids.append(command.child_id)
    assert ids[0] == ids[1]
    assert len(ids[0]) <= LONGEST_ID
    assert ids[0].startswith("x") == is_kept


def test_the_handle_of_a_child_has_the_id_that_was_recorded(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(host.tasks["deliver"].s())
        child.get()
        return [child.instance_id, child.name, child.seq]

    past.child("deliver", child_id="origin:1:0~g0").succeeded(0)
    assert result_of(past.decide(workflow)) == ["origin:1:0~g0", "deliver", 0]


def test_a_worker_that_does_not_know_a_workflow_takes_it_for_what_history_says(past: Past, host: FakeHost) -> None:
    past.child("deliver").succeeded(0, 5)
    host.tasks["deliver"].is_workflow = False
    assert result_of(past.decide(lambda ctx: ctx.run(host.tasks["deliver"].s()))) == 5


def test_a_task_where_history_has_a_child_is_divergence(past: Past, host: FakeHost) -> None:
    past.child("deliver")
    assert isinstance(past.decide(lambda ctx: ctx.run(host.tasks["mail"].s())).ending, Diverged)
    past.records[0] = past.asked("deliver").records.pop()
    ending = past.decide(lambda ctx: ctx.run(host.tasks["deliver"].s())).ending
    assert isinstance(ending, Diverged)


@pytest.mark.parametrize(
    "settings",
    [
        {"foreign": True, "timeout": 5},
        {"on_parent_end": "wait"},
        {"on_parent_end": "leave", "compensate": "refund"},
    ],
)
def test_what_no_child_can_have_is_refused(past: Past, host: FakeHost, settings: dict[str, Any]) -> None:
    if "compensate" in settings:
        settings = {**settings, "compensate": host.tasks["refund"].s()}
    decision = past.decide(lambda ctx: ctx.run(host.tasks["deliver"].s(), **settings))
    assert refusal_of(decision)


def test_a_child_is_not_retried(past: Past, host: FakeHost) -> None:
    decision = past.decide(lambda ctx: ctx.run(host.tasks["deliver"].s(), retry=RetryPolicy()))
    assert "neither retried nor foreign" in refusal_of(decision)


def test_a_task_cannot_be_left_alone(past: Past, host: FakeHost) -> None:
    assert "is a task" in refusal_of(past.decide(lambda ctx: ctx.run(host.tasks["mail"].s(), on_parent_end="leave")))


# --- undoing ----------------------------------------------------------------------------------------------------------


def test_a_child_that_completed_is_undone_by_its_own_compensations(past: Past, host: FakeHost) -> None:
    decision = past.child("deliver").succeeded(0).decide(delivering(host))
    assert decision.records[0].command == UndoChild("deliver", "", 0, "order-1:1:0~g1")
    assert decision.ending == Waiting(1, {1: Wake.COUNT}, is_compensating=True)
    failed = failure_of(past.undoing_child(0).succeeded(1).decide(delivering(host)))
    assert (failed.undone, failed.failure.message) == (True, "no such street")


def test_a_child_that_cannot_be_undone_is_named(past: Past, host: FakeHost) -> None:
    decision = past.child("deliver").succeeded(0).undoing_child(0).failed(1).decide(delivering(host))
    (entry,) = decision.not_undone
    assert (entry.seq, entry.undoes, entry.name) == (1, 0, "deliver")


@pytest.mark.parametrize("outcome", ["failed", "unknown"])
def test_only_a_child_that_may_have_done_something_is_undone(past: Past, host: FakeHost, outcome: str) -> None:
    past.child("deliver")
    decision = (past.failed(0) if outcome == "failed" else past.unknown(0)).decide(delivering(host))
    assert asks(decision) == ([] if outcome == "failed" else ["undo deliver of 0"])


def test_a_child_without_compensation_is_not_undone(past: Past, host: FakeHost) -> None:
    new = past.decide(delivering(host, compensate=False)).records[0]
    assert getattr(new.command, "compensation", "") is None
    past.child("deliver", compensation=None).succeeded(0)
    assert failure_of(past.decide(delivering(host, compensate=False))).undone is False


@pytest.mark.parametrize("registered", [True, False])
def test_a_child_with_a_compensation_of_its_own_is_undone_by_that(past: Past, host: FakeHost, registered: bool) -> None:
    if registered:
        host.tasks["deliver"].compensation = plan("recall")
    workflow = delivering(host, **({} if registered else {"compensate": host.tasks["recall"].s()}))
    command: Any = past.decide(workflow).records[0].command
    assert (command.compensation.name, command.compensation.is_child) == ("recall", False)
    decision = past.child("deliver", compensation=command.compensation).succeeded(0, "p-1").decide(workflow)
    assert isinstance(decision.records[0].command, RunCompensation)
    assert (asks(decision), arguments(decision)) == (["compensation recall of 0"], ["p-1"])


def test_the_children_of_a_map_are_undone_as_many_at_a_time_as_they_ran(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.map(host.tasks["deliver"].s(), ["a", "b", "c"], concurrency=2)
        raise Refused

    for _ in range(3):
        past.child("deliver")
    commands: Any = [new.command for new in past.succeeded(0).succeeded(1).succeeded(2).decide(workflow).records]
    assert [(command.undoes, command.lane, command.held) for command in commands] == [
        (2, 3, False), (1, 3, False), (0, 3, True)
    ]  # fmt: skip


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_a_child_in_flight_is_cancelled_when_its_scope_drains(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["deliver"].s())
        ctx.start(host.tasks["mail"].s())
        ctx.run(host.tasks["charge"].s())

    past.child("deliver").asked("mail").asked("charge").running(0, 1).failed(2)
    decision = past.decide(workflow)
    assert (decision.cancels, withdraws(decision)) == ((0,), [])
    assert decision.ending == Waiting(2, {0: Wake.CLOSED, 1: Wake.CLOSED}, is_compensating=True, draining=(0, 1))
    past.failed(0).succeeded(1)
    assert failure_of(past.decide(workflow)).failure.message.startswith("step 2 (charge)")


def test_a_child_that_completed_all_the_same_is_undone(past: Past, host: FakeHost) -> None:
    workflow = delivering(host)
    past.child("deliver").running(0).cancel()
    assert past.decide(workflow).cancels == (0,)
    assert asks(past.succeeded(0).decide(workflow)) == ["undo deliver of 0"]
    assert past.decide(workflow).cancels == ()


@pytest.mark.parametrize("state", [State.SCHEDULED, State.HELD])
def test_a_child_that_has_not_begun_is_withdrawn(past: Past, host: FakeHost, state: State) -> None:
    decision = past.child("deliver", state=state).cancel().decide(delivering(host))
    assert (decision.cancels, withdraws(decision)) == ((), [0])
    assert failure_of(decision).is_cancelled


def test_a_child_that_timed_out_is_cancelled_and_waited_for(past: Past, host: FakeHost) -> None:
    workflow = delivering(host, timeout=60)
    past.child("deliver").running(0).timed_out(0)
    decision = past.decide(workflow)
    assert (decision.cancels, decision.ending) == (
        (0,), Waiting(1, {0: Wake.CLOSED}, is_compensating=True, draining=(0,))
    )  # fmt: skip
    assert asks(past.ended_late(0, Outcome.SUCCEEDED).decide(workflow)) == ["undo deliver of 0"]


def test_a_handle_cancels_its_child_and_undoes_it(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(host.tasks["deliver"].s())
        child.cancel()
        try:
            child.get()
        except errors.StepUndone:
            return "undone"

    assert past.child("deliver").running(0).decide(workflow).cancels == (0,)
    assert asks(past.succeeded(0).decide(workflow)) == ["undo deliver of 0"]
    assert result_of(past.undoing_child(0).succeeded(1).decide(workflow)) == "undone"


def test_a_wait_that_is_not_a_drain_cancels_no_child(past: Past, host: FakeHost) -> None:
    assert past.child("deliver").running(0).decide(delivering(host)).cancels == ()


# --- left alone -------------------------------------------------------------------------------------------------------


def leaving(host: FakeHost, then: Any = lambda ctx, child: "done") -> Any:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(host.tasks["deliver"].s(), on_parent_end="leave")
        return then(ctx, child)

    return workflow


def detached(past: Past) -> Past:
    return past.child("deliver", compensation=None).running(0)


def test_a_detached_child_is_not_waited_for(past: Past, host: FakeHost) -> None:
    decision = past.decide(leaving(host))
    command: Any = decision.records[0].command
    assert (result_of(decision), command.is_detached, command.compensation) == ("done", True, None)


def fail(ctx: Context, child: Any) -> None:
    raise Refused


@pytest.mark.parametrize("settled", [True, False])
def test_a_detached_child_is_neither_cancelled_nor_undone(past: Past, host: FakeHost, settled: bool) -> None:
    detached(past)
    if settled:
        past.succeeded(0)
    decision = past.decide(leaving(host, fail))
    assert (failure_of(decision).undone, decision.cancels, asks(decision)) == (False, (), [])


def test_the_failure_of_a_detached_child_fails_nothing_unless_it_is_asked_for(past: Past, host: FakeHost) -> None:
    def wait(ctx: Context, child: Any) -> Any:
        ctx.run(host.tasks["mail"].s())
        return child.ready()

    detached(past).asked("mail").failed(0).succeeded(1)
    assert result_of(past.decide(leaving(host, wait))) is True
    past.records[1:], past.inbox[1:] = [], []
    assert failure_of(past.decide(leaving(host, lambda ctx, child: child.get()))).failure.message.startswith("step 0")


def test_a_detached_child_can_be_waited_for_and_cancelled_by_hand(past: Past, host: FakeHost) -> None:
    assert waits_for(detached(past).decide(leaving(host, lambda ctx, child: child.get()))) == [0]
    decision = past.decide(leaving(host, lambda ctx, child: child.cancel()))
    assert (decision.cancels, waits_for(decision)) == ((0,), [0])


def test_a_detached_child_does_not_hold_a_nested_scope_or_the_next_run_back(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.start(host.tasks["deliver"].s(), on_parent_end="leave")
        return "done"

    past.child("deliver", scope="1.", compensation=None).running(0)
    assert result_of(past.decide(workflow)) == "done"


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "role"), [({"pivot": True}, Role.PIVOT), ({"optional": True}, Role.OPTIONAL)])
def test_a_child_may_be_the_pivot_or_optional(past: Past, host: FakeHost, settings: dict[str, Any], role: Role) -> None:
    command: Any = past.decide(delivering(host, **settings)).records[0].command
    assert (command.kind, command.role) == (Kind.CHILD, role)
