"""Cancellation and deadlines: where they are raised, where they wait, and what they come to."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State, Waiting, Wake

from .host import FakeHost
from .past import Past, asks, failure_of, plan, receives, refusal_of, result_of, stops, waits_for, withdraws


def charging(host: FakeHost, then: Any) -> Any:
    """Return a workflow that charges, and then does what is cancelled."""

    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        return then(ctx)

    return workflow


def charged(past: Past) -> Past:
    return past.asked("charge", compensation=plan("refund")).succeeded(0)


# --- where it is raised -----------------------------------------------------------------------------------------------


def test_a_cancelled_workflow_undoes_as_a_failed_one_does_and_says_that_it_was_cancelled(
    past: Past, host: FakeHost
) -> None:
    workflow = charging(host, lambda ctx: ctx.run(host.tasks["mail"].s()))
    charged(past).asked("mail").running(1).cancel("out of stock")
    decision = past.decide(workflow)
    assert decision.ending == Waiting(1, {1: Wake.CLOSED}, is_compensating=True, draining=(1,))
    past.succeeded(1)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]
    failed = failure_of(past.undoing(0, "refund").succeeded(2).decide(workflow))
    assert (failed.is_cancelled, failed.undone, failed.failure.message) == (True, True, "out of stock")
    assert failed.failure.type == "orchestrator.errors.WorkflowCancelled"


def test_a_failed_workflow_does_not_say_that_it_was_cancelled(past: Past, host: FakeHost) -> None:
    assert failure_of(
        past.asked("mail").failed(0).decide(lambda ctx: ctx.run(host.tasks["mail"].s()))
    ).is_cancelled is (False)


def test_a_workflow_that_is_cancelled_before_its_first_pass_begins_nothing(past: Past, host: FakeHost) -> None:
    decision = past.cancel().decide(charging(host, lambda ctx: None))
    (new,) = decision.records
    assert (new.outcome, withdraws(decision)) == (Outcome.WITHDRAWN, [0])
    assert new.event is not None
    assert new.event.order == 2
    assert failure_of(decision).is_cancelled


@pytest.mark.parametrize(
    ("wait", "kinds", "withdrawn"),
    [
        (lambda ctx, host: ctx.sleep(60), ["timer"], [1]),
        (lambda ctx, host: ctx.receive("paid"), ["receive"], [1]),
        (lambda ctx, host: ctx.receive("paid", timeout=60), ["receive", "timer"], [1, 2]),
        (lambda ctx, host: ctx.wait(ctx.message("paid"), timeout=60), ["receive", "timer"], [2]),
        (lambda ctx, host: ctx.message("paid").get(), ["receive"], []),
        (lambda ctx, host: ctx.timer(60).get(), ["timer"], []),
    ],
    ids=["sleep", "receive", "receive with timeout", "wait with timeout", "message", "timer"],
)
def test_the_wait_that_is_interrupted_withdraws_its_own_timer_and_receive_and_no_handle(
    past: Past, host: FakeHost, wait: Any, kinds: list[str], withdrawn: list[int]
) -> None:
    charged(past)
    for kind in kinds:
        past.timer() if kind == "timer" else past.receive("paid")
    decision = past.cancel().decide(charging(host, lambda ctx: wait(ctx, host)))
    assert (stops(decision), asks(decision)) == (withdrawn, ["compensation refund of 0"])
    # in the pass that asks for them too
    past.records[1:] = []
    assert stops(past.decide(charging(host, lambda ctx: wait(ctx, host)))) == withdrawn


def test_an_interrupted_wait_withdraws_nothing_twice(past: Past, host: FakeHost) -> None:
    charged(past).receive("paid").timer().cancel().stopped(1, 2)
    decision = past.decide(charging(host, lambda ctx: ctx.receive("paid", timeout=60)))
    assert (stops(decision), asks(decision)) == ([], ["compensation refund of 0"])


@pytest.mark.parametrize(
    "wait",
    [
        lambda ctx, host: ctx.gather(host.tasks["mail"].s(), host.tasks["mail"].s()),
        lambda ctx, host: ctx.map(host.tasks["mail"].s(), [1, 2]),
        lambda ctx, host: ctx.map(host.tasks["mail"].s(), [1, 2], on_failure="collect"),
    ],
    ids=["gather", "map", "collect"],
)
def test_the_steps_of_an_interrupted_wait_are_withdrawn_or_drained(past: Past, host: FakeHost, wait: Any) -> None:
    decision = past.asked("mail").running(0).asked("mail").cancel().decide(lambda ctx: wait(ctx, host))
    assert (withdraws(decision), waits_for(decision)) == ([1], [0])
    assert isinstance(decision.ending, Waiting)
    assert decision.ending.draining == (0,)
    past.withdrawn(1).succeeded(0)
    assert failure_of(past.decide(lambda ctx: wait(ctx, host))).is_cancelled


def test_a_cancellation_in_a_nested_scope_undoes_that_and_then_the_rest(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s(), compensate=host.tasks["release"].s())
        with ctx.saga():
            ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
            ctx.sleep(60)

    past.asked("reserve", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(1).timer(scope="1.").cancel()
    assert asks(past.decide(workflow)) == ["compensation refund of 1"]
    past.stopped(2).undoing(1, "refund", scope="1.").succeeded(3)
    assert asks(past.decide(workflow)) == ["compensation release of 0"]
    assert failure_of(past.undoing(0, "release").succeeded(4).decide(workflow)).is_cancelled


@pytest.mark.parametrize("nested", [True, False])
def test_what_a_scope_waits_for_at_its_end_is_cancelled_too(past: Past, host: FakeHost, nested: bool) -> None:
    def workflow(ctx: Context) -> Any:
        if not nested:
            ctx.start(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
            return "done"
        with ctx.saga():
            ctx.start(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        return "done"

    scope = "1." if nested else ""
    past.asked("charge", scope=scope, compensation=plan("refund")).running(0).cancel()
    assert waits_for(past.decide(workflow)) == [0]
    assert asks(past.succeeded(0).decide(workflow)) == ["compensation refund of 0"]
    assert failure_of(past.undoing(0, "refund", scope=scope).succeeded(1).decide(workflow)).is_cancelled


def test_a_cancellation_that_came_after_all_was_done_comes_too_late(past: Past, host: FakeHost) -> None:
    assert result_of(charged(past).cancel().decide(charging(host, lambda ctx: "done"))) == "done"


def test_a_cancellation_is_not_raised_where_nothing_waits(past: Past, host: FakeHost) -> None:
    def then(ctx: Context) -> Any:
        ctx.local(len, [])
        ctx.publish("news", 1)
        return ctx.now().minute

    assert result_of(charged(past).cancel().decide(charging(host, then))) == 1


def test_the_time_of_a_cancellation_is_a_time_like_that_of_an_outcome(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.sleep(600)
        except errors.WorkflowCancelled:
            return ctx.now().minute

    assert result_of(past.timer().message("a").cancel().decide(workflow)) == 2


# --- where it waits ---------------------------------------------------------------------------------------------------


def retrying(host: FakeHost, calls: list[str] | None = None) -> Any:
    """Return a workflow that tries another way once what it has done first is undone."""

    def workflow(ctx: Context) -> Any:
        try:
            with ctx.saga():
                ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
                ctx.run(host.tasks["ship"].s())
        except errors.StepFailed:
            pass
        if calls is not None:
            calls.append("went on")
        ctx.run(host.tasks["mail"].s())

    return workflow


@pytest.mark.parametrize("when", ["draining", "compensating"])
def test_a_cancellation_while_a_scope_is_undone_waits_for_that(past: Past, host: FakeHost, when: str) -> None:
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0).asked("ship", scope="1.").failed(1)
    if when == "draining":
        past.cancel()
    past.undoing(0, "refund", scope="1.")
    if when == "compensating":
        past.cancel()
    decision = past.decide(retrying(host))
    assert decision.ending == Waiting(1, {2: Wake.COUNT})
    calls: list[str] = []
    decision = past.succeeded(2).decide(retrying(host, calls))
    # raised before the step is asked for, which would only be withdrawn again
    assert (calls, decision.records, failure_of(decision).is_cancelled) == (["went on"], (), True)


def test_a_drain_that_is_under_way_is_not_interrupted(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.map(host.tasks["work"].s(), [1, 2])
        except errors.StepFailed:
            return ctx.sleep(60)

    past.asked("work").asked("work").running(1).failed(0).cancel()
    assert waits_for(past.decide(workflow)) == [1]
    decision = past.succeeded(1).decide(workflow)
    assert (decision.records, failure_of(decision).is_cancelled) == ((), True)


@pytest.mark.parametrize(
    "call",
    [
        lambda ctx, host: ctx.run(host.tasks["mail"].s()),
        lambda ctx, host: ctx.gather(host.tasks["mail"].s()),
        lambda ctx, host: ctx.wait(host.tasks["mail"].s(), timeout=5),
        lambda ctx, host: ctx.map(host.tasks["mail"].s(), [1]),
        lambda ctx, host: ctx.sleep(5),
        lambda ctx, host: ctx.receive("a", timeout=5),
        lambda ctx, host: ctx.recur(),
    ],
    ids=["run", "gather", "wait", "map", "sleep", "receive", "recur"],
)
def test_a_call_that_would_wait_raises_what_is_due_before_it_asks_for_anything(
    past: Past, host: FakeHost, call: Any
) -> None:
    def workflow(ctx: Context) -> Any:
        step = ctx.start(host.tasks["charge"].s())
        step.cancel()
        try:
            call(ctx, host)
        except errors.WorkflowCancelled:
            return "cancelled"

    past.asked("charge").running(0).cancel().succeeded(0)
    decision = past.decide(workflow)
    assert (result_of(decision), decision.records) == ("cancelled", ())


@pytest.mark.parametrize("way", ["get", "scope"])
def test_a_wait_for_what_is_there_already_raises_what_is_due_too(past: Past, host: FakeHost, way: str) -> None:
    raised_at: list[str] = []

    def workflow(ctx: Context) -> Any:
        done = ctx.start(host.tasks["mail"].s())
        done.get()
        try:
            with ctx.saga():
                ctx.start(host.tasks["charge"].s()).cancel()
                if way == "get":
                    done.get()
                raised_at.append("scope")
        except errors.WorkflowCancelled:
            return raised_at or ["get"]

    past.asked("mail").succeeded(0).asked("charge", scope="1.").running(1).cancel().succeeded(1)
    assert result_of(past.decide(workflow)) == [way]


def test_the_end_of_the_workflow_raises_what_is_due(past: Past, host: FakeHost) -> None:
    past.asked("charge").running(0).cancel().succeeded(0)
    assert failure_of(past.decide(lambda ctx: ctx.start(host.tasks["charge"].s()).cancel())).is_cancelled


def test_a_cancellation_while_the_workflow_is_undone_changes_nothing(past: Past, host: FakeHost) -> None:
    workflow = charging(host, lambda ctx: ctx.run(host.tasks["ship"].s()))
    charged(past).asked("ship").failed(1).undoing(0, "refund").cancel()
    assert past.decide(workflow).ending == Waiting(1, {2: Wake.COUNT}, is_compensating=True)
    failed = failure_of(past.succeeded(2).decide(workflow))
    assert (failed.is_cancelled, failed.undone) == (False, True)


# --- catching it ------------------------------------------------------------------------------------------------------


def test_catching_it_and_returning_declines_it(past: Past, host: FakeHost) -> None:
    def then(ctx: Context) -> Any:
        try:
            ctx.sleep(60)
        except errors.WorkflowCancelled as error:
            return [str(error), error.is_deadline, ctx.run(host.tasks["mail"].s())]

    workflow = charging(host, then)
    decision = charged(past).timer().cancel("why").decide(workflow)
    assert (asks(decision), stops(decision)) == (["step mail"], [1])
    assert result_of(past.stopped(1).asked("mail").succeeded(2, 5).decide(workflow)) == ["why", False, 5]


def test_an_exception_handler_around_a_step_does_not_decline_it(past: Past, host: FakeHost) -> None:
    def then(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["mail"].s())
        except Exception:
            return "declined"

    charged(past).asked("mail").cancel()
    assert asks(past.decide(charging(host, then))) == ["compensation refund of 0"]


def test_a_cleanup_step_may_run_before_it_is_undone(past: Past, host: FakeHost) -> None:
    def then(ctx: Context) -> Any:
        try:
            ctx.sleep(60)
        finally:
            ctx.run(host.tasks["mail"].s())

    charged(past).timer().cancel()
    assert asks(past.decide(charging(host, then))) == ["step mail"]
    past.stopped(1).asked("mail").succeeded(2)
    assert asks(past.decide(charging(host, then))) == ["compensation refund of 0"]


def test_what_was_going_on_when_it_was_declined_goes_on(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        steps = [ctx.start(host.tasks["work"].s(n)) for n in (1, 2)]
        try:
            ctx.gather(*steps)
        except errors.WorkflowCancelled:
            return ctx.gather(*steps)

    past.asked("work").asked("work").cancel()
    decision = past.decide(workflow)
    assert (withdraws(decision), waits_for(decision)) == ([], [0, 1])
    assert result_of(past.succeeded(0, 1).succeeded(1, 2).decide(workflow)) == [1, 2]


def test_a_message_after_a_declined_cancellation_is_received_by_the_next_receive(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            return ctx.receive("a")
        except errors.WorkflowCancelled:
            return [ctx.receive("a")]

    decision = past.receive("a").cancel().message("a", 1).decide(workflow)
    assert (result_of(decision), receives(decision), stops(decision)) == ([1], {1: 2}, [0])


# --- more than one ----------------------------------------------------------------------------------------------------


def test_each_request_is_raised_once_and_the_second_can_interrupt_a_cleanup(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        told = []
        for _ in range(3):
            try:
                ctx.run(host.tasks["mail"].s())
            except errors.WorkflowCancelled as error:
                told.append([str(error), error.is_deadline])
        return told

    past.asked("mail").cancel("why").asked("mail").deadline().asked("mail")
    assert waits_for(past.decide(workflow)) == [2]
    told = result_of(past.succeeded(2).succeeded(0).succeeded(1).decide(workflow))
    assert told == [["why", False], ["its deadline has passed", True]]


def test_two_requests_in_one_shielded_wait_are_raised_as_one(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["charge"].s()).cancel()
        told = []
        for _ in range(2):
            try:
                ctx.run(host.tasks["mail"].s())
            except errors.WorkflowCancelled as error:
                told.append(str(error))
        return told

    past.asked("charge").running(0).cancel("first").cancel("second").succeeded(0)
    past.asked("mail").succeeded(1)
    assert result_of(past.decide(workflow)) == ["first"]


def test_a_deadline_cancels_and_says_so(past: Past) -> None:
    failed = failure_of(past.timer().deadline().decide(lambda ctx: ctx.sleep(60)))
    assert (failed.is_cancelled, failed.failure.message) == (True, "its deadline has passed")


# --- of a failure and a cancellation, the first decides ---------------------------------------------------------------


def test_a_failure_while_a_cancellation_goes_out_is_part_of_that(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.sleep(60)
        finally:
            ctx.run(host.tasks["mail"].s())

    past.timer().cancel().stopped(0).asked("mail").failed(1)
    failed = failure_of(past.decide(workflow))
    assert (failed.is_cancelled, failed.failure.type) == (True, "builtins.RuntimeError")


@pytest.mark.parametrize("at_once", [True, False])
def test_an_error_of_one_s_own_made_from_a_cancellation_is_part_of_it(past: Past, at_once: bool) -> None:
    def workflow(ctx: Context) -> Any:
        cancelled = None
        try:
            ctx.sleep(60)
        except errors.WorkflowCancelled as error:
            cancelled = error
            if at_once:
                raise LookupError("gone") from KeyError("mug")
        raise LookupError("gone") from cancelled

    assert failure_of(past.timer().cancel().decide(workflow)).is_cancelled


def test_a_scope_that_was_cancelled_and_could_not_be_undone_is_still_cancelled(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
            ctx.sleep(60)

    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0).timer(scope="1.").cancel().stopped(1)
    decision = past.undoing(0, "refund", scope="1.").failed(2).decide(workflow)
    assert (failure_of(decision).is_cancelled, len(decision.not_undone)) == (True, 1)


def test_a_failure_that_was_raised_first_decides(past: Past, host: FakeHost) -> None:
    workflow = charging(host, lambda ctx: ctx.gather(host.tasks["ship"].s(), host.tasks["mail"].s()))
    charged(past).asked("ship").asked("mail").failed(1).failed(2).cancel().undoing(0, "refund").succeeded(3)
    assert failure_of(past.decide(workflow)).is_cancelled is False


def test_a_cancellation_that_was_delivered_first_decides(past: Past, host: FakeHost) -> None:
    workflow = charging(host, lambda ctx: ctx.run(host.tasks["ship"].s()))
    charged(past).asked("ship").running(1).cancel().failed(1).undoing(0, "refund").succeeded(2)
    assert failure_of(past.decide(workflow)).is_cancelled is True


def test_an_error_that_is_its_own_cause_is_looked_at_once(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["mail"].s())
        except errors.StepFailed as error:
            raise error from error

    assert failure_of(past.asked("mail").failed(0).decide(workflow)).is_cancelled is False


def test_a_typo_in_what_catches_it_blocks(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.sleep(60)
        except errors.WorkflowCancelled:
            ctx.sleeep(60)  # type: ignore[attr-defined]

    assert "sleeep" in refusal_of(past.timer().cancel().decide(workflow))


# --- what blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "in_doubt", "outcome"),
    [(1, False, Outcome.FAILED), (1, True, Outcome.UNKNOWN), (0, False, Outcome.WITHDRAWN)],
)
def test_a_step_that_blocks_is_withdrawn_when_its_scope_drains(
    past: Past, host: FakeHost, attempt: int, in_doubt: bool, outcome: Outcome
) -> None:
    past.asked("mail", state=State.BLOCKED, attempt=attempt, in_doubt=in_doubt, foreign=True).cancel()
    decision = past.decide(lambda ctx: ctx.run(host.tasks["mail"].s(), foreign=True, timeout=5))
    (withdrawal,) = decision.withdrawals
    assert (withdrawal.state, withdrawal.attempt, withdrawal.outcome) == (State.BLOCKED, attempt, outcome)
    assert failure_of(decision).is_cancelled
