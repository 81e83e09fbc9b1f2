"""What is undone when a workflow fails: which steps, in which order, with which arguments."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import (
    Compensation,
    Kind,
    Outcome,
    RegisterCompensation,
    RunCompensation,
    ScheduleStep,
    State,
    Waiting,
    Wake,
)
from orchestrator.core.retry import RetryPolicy

from .host import FakeHost
from .past import Past, arguments, asks, failure_of, plan, result_of


class Refused(Exception):
    pass


def order(host: FakeHost, **settings: Any) -> Any:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s("mug"), compensate=host.tasks["release"].s("why"), **settings)
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        raise Refused("sold out")

    return workflow


def ordered(past: Past, **fields: Any) -> Past:
    past.asked("reserve", **{"compensation": plan("release", "why"), **fields}).succeeded(0, {"id": "r-1"})
    return past.asked("charge", compensation=plan("refund")).succeeded(1, "c-1")


def test_a_failure_undoes_the_last_started_step_first(past: Past, host: FakeHost) -> None:
    decision = ordered(past).decide(order(host))
    assert asks(decision) == ["compensation refund of 1"]
    assert decision.ending == Waiting(1, {2: Wake.COUNT}, is_compensating=True)


def test_a_compensation_begins_when_the_one_before_it_has_ended(past: Past, host: FakeHost) -> None:
    decision = ordered(past).undoing(1, "refund").succeeded(2).decide(order(host))
    assert asks(decision) == ["compensation release of 0"]
    assert decision.records[0].after_order == 3


def test_a_compensation_gets_the_recorded_result_before_its_own_arguments(past: Past, host: FakeHost) -> None:
    decision = ordered(past).undoing(1, "refund").succeeded(2).decide(order(host))
    assert arguments(decision) == [{"id": "r-1"}, "why"]


def test_an_undone_workflow_fails_with_its_own_error(past: Past, host: FakeHost) -> None:
    ordered(past).undoing(1, "refund").succeeded(2).undoing(0, "release").succeeded(3)
    decision = past.decide(order(host))
    failed = failure_of(decision)
    assert (failed.failure.message, failed.undone, decision.not_undone) == ("sold out", True, ())


def test_a_failure_with_nothing_to_undo_says_so(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())

    decision = past.asked("charge", compensation=plan("refund")).failed(0).decide(workflow)
    assert (failure_of(decision).undone, decision.not_undone) == (False, ())


def test_a_failed_compensation_is_listed_and_the_others_still_run(past: Past, host: FakeHost) -> None:
    ordered(past).undoing(1, "refund").failed(2, OSError, "bank closed")
    decision = past.decide(order(host))
    assert asks(decision) == ["compensation release of 0"]
    decision = past.undoing(0, "release").succeeded(3).decide(order(host))
    assert failure_of(decision).undone
    (entry,) = decision.not_undone
    assert (entry.seq, entry.undoes, entry.name, entry.message) == (2, 1, "refund", "builtins.OSError: bank closed")


def test_a_compensation_nobody_knows_the_end_of_is_listed(past: Past, host: FakeHost) -> None:
    ordered(past).undoing(1, "refund").settled(2, Outcome.UNKNOWN)
    past.undoing(0, "release").succeeded(3)
    assert [entry.message for entry in past.decide(order(host)).not_undone] == ["unknown"]


@pytest.mark.parametrize(
    ("outcome", "undone"),
    [
        (Outcome.SUCCEEDED, True),
        (Outcome.UNKNOWN, True),
        (Outcome.FAILED, False),
        (Outcome.WITHDRAWN, False),
    ],
)
def test_what_took_effect_or_may_have_is_undone(past: Past, host: FakeHost, outcome: Outcome, undone: bool) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.wait(ctx.start(host.tasks["charge"].s()))
        raise Refused

    past.asked("charge", compensation=plan("refund")).settled(0, outcome, result="1")
    assert asks(past.decide(workflow)) == (["compensation refund of 0"] if undone else [])


def test_always_undoes_a_failed_step_too(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.run(host.tasks["charge"].s())

    past.asked("charge", compensation=plan("refund", always=True)).failed(0)
    decision = past.decide(workflow)
    assert (asks(decision), arguments(decision)) == (["compensation refund of 0"], [None])


def test_always_does_not_undo_what_never_began(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.start(host.tasks["charge"].s())
        raise Refused

    decision = past.asked("charge", compensation=plan("refund", always=True)).decide(workflow)
    assert (asks(decision), decision.withdrawals[0].outcome) == ([], Outcome.WITHDRAWN)


# --- what a compensation is given -----------------------------------------------------------------------------------


def undoing_one(past: Past, host: FakeHost, compensation: Compensation, **fields: Any) -> Any:
    def workflow(ctx: Context) -> Any:
        ctx.wait(ctx.start(host.tasks["charge"].s()))
        raise Refused

    past.asked("charge", compensation=compensation, arguments='{"args":[5],"kwargs":{"card":"x"}}', **fields)
    return workflow


def test_an_immutable_signature_gets_no_result(past: Past, host: FakeHost) -> None:
    workflow = undoing_one(past, host, plan("refund", "order-1", passes="nothing"))
    assert arguments(past.succeeded(0, "c-1").decide(workflow)) == ["order-1"]


def test_pass_step_gets_all_of_the_step(past: Past, host: FakeHost) -> None:
    workflow = undoing_one(past, host, plan("refund", "order-1", passes="step"), idempotency_key="key-0")
    decision = past.timed_out(0).ended_late(0, Outcome.SUCCEEDED, "c-9").decide(workflow)
    assert arguments(decision) == [
        {
            "call": {"args": [5], "kwargs": {"card": "x"}},
            "result": "c-9",
            "outcome": "unknown",
            "late_outcome": "succeeded",
            "name": "charge",
            "idempotency_key": "key-0",
        },
        "order-1",
    ]


def test_the_late_result_goes_to_the_compensation_of_a_timed_out_step(past: Past, host: FakeHost) -> None:
    workflow = undoing_one(past, host, plan("refund"))
    decision = past.timed_out(0).decide(workflow)
    assert decision.ending == Waiting(1, {0: Wake.CLOSED}, is_compensating=True, draining=(0,))
    decision = past.ended_late(0, Outcome.SUCCEEDED, "c-9").decide(workflow)
    assert arguments(decision) == ["c-9"]


@pytest.mark.parametrize("late", [None, Outcome.FAILED])
def test_a_timed_out_step_that_never_said_what_it_did_passes_none(
    past: Past, host: FakeHost, late: Outcome | None
) -> None:
    workflow = undoing_one(past, host, plan("refund"))
    assert arguments(past.timed_out(0).ended_late(0, late).decide(workflow)) == [None]


def test_the_bytes_of_a_result_go_in_as_they_were_recorded(past: Past, host: FakeHost) -> None:
    workflow = undoing_one(past, host, plan("refund"))
    past.settled(0, Outcome.SUCCEEDED, result='{"cents": 1.10, "k":"é"}')
    command = past.decide(workflow).records[0].command
    assert isinstance(command, RunCompensation)
    assert command.arguments == '{"args":[{"cents": 1.10, "k":"é"}],"kwargs":{}}'


def test_a_compensation_keeps_its_options_and_retry_policy(past: Past, host: FakeHost) -> None:
    retry = RetryPolicy(max_attempts=9)
    workflow = undoing_one(past, host, plan("refund", options={"queue": "money"}, retry=retry))
    command = past.succeeded(0).decide(workflow).records[0].command
    assert isinstance(command, RunCompensation)
    assert (command.options, command.retry, command.kind) == ({"queue": "money"}, retry, Kind.COMPENSATION)


# --- where compensations come from ----------------------------------------------------------------------------------


def recorded(past: Past, step: Any) -> ScheduleStep:
    command = past.decide(step).records[0].command
    assert isinstance(command, ScheduleStep)
    return command


def test_a_registered_compensation_is_recorded_with_the_step(past: Past, host: FakeHost) -> None:
    task = host.task("pay", compensation=plan("refund"))
    command = recorded(past, lambda ctx: ctx.run(task))
    assert (command.compensation, command.inherits_compensation) == (plan("refund"), True)


def test_a_call_s_own_compensation_replaces_the_registered_one(past: Past, host: FakeHost) -> None:
    task = host.task("pay", compensation=plan("refund"))
    command = recorded(past, lambda ctx: ctx.run(task, compensate=host.tasks["recall"]))
    assert command.compensation is not None
    assert (command.compensation.name, command.compensation.passes) == ("recall", "result")
    assert not command.inherits_compensation


def test_false_opts_out_of_compensation(past: Past, host: FakeHost) -> None:
    task = host.task("pay", compensation=plan("refund"))
    command = recorded(past, lambda ctx: ctx.run(task, compensate=False))
    assert (command.compensation, command.inherits_compensation) == (None, False)


def test_the_compensation_that_the_claim_added_is_used(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["charge"].s())
        raise Refused

    # asked for without one; the worker that claimed it knew better
    past.asked("charge", compensation=plan("refund")).succeeded(0)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]


@pytest.mark.parametrize("immutable", [True, False])
def test_a_compensation_registered_by_hand_gets_just_its_own_arguments(
    past: Past, host: FakeHost, immutable: bool
) -> None:
    task = host.tasks["undo"]

    def workflow(ctx: Context) -> Any:
        ctx.compensate(task.si("file-1") if immutable else task.s("file-1"))
        raise Refused

    decision = past.decide(workflow)
    assert asks(decision) == ["registration undo", "compensation undo of 0"]
    assert decision.records[0].outcome is Outcome.SUCCEEDED
    assert arguments(decision, 1) == ["file-1"]
    command = decision.records[0].command
    assert isinstance(command, RegisterCompensation)
    # and from what was recorded a replay makes the same
    past.asked("undo", Kind.REGISTRATION, state=State.SETTLED, compensation=command.compensation)
    past.change(0, outcome=Outcome.SUCCEEDED)
    assert arguments(past.decide(workflow)) == ["file-1"]


def test_a_compensation_registered_by_hand_is_undone_in_its_place(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s())
        ctx.compensate(host.tasks["undo"].s())
        ctx.run(host.tasks["charge"].s())
        raise Refused

    past.asked("reserve", compensation=plan("release")).succeeded(0)
    past.asked("undo", Kind.REGISTRATION, state=State.SETTLED, compensation=plan("undo", passes="nothing"))
    past.change(1, outcome=Outcome.SUCCEEDED)
    past.asked("charge", compensation=plan("refund")).succeeded(2)
    past.undoing(2, "refund").succeeded(3).undoing(1, "undo").succeeded(4)
    assert asks(past.decide(workflow)) == ["compensation release of 0"]


# --- committing -----------------------------------------------------------------------------------------------------


def test_what_was_done_before_a_commit_stays_done(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s())
        ctx.commit()
        ctx.run(host.tasks["charge"].s())
        raise Refused

    past.asked("reserve", compensation=plan("release")).succeeded(0)
    past.asked("charge", compensation=plan("refund")).succeeded(1)
    assert asks(past.decide(workflow)) == ["compensation refund of 1"]
    past.undoing(1, "refund").succeeded(2)
    assert past.decide(workflow).not_undone == ()


def test_a_step_that_had_not_settled_at_a_commit_keeps_its_compensation(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["reserve"].s())
        ctx.commit()
        raise Refused

    past.asked("reserve", compensation=plan("release")).succeeded(0)
    assert asks(past.decide(workflow)) == ["compensation release of 0"]


def test_a_step_in_doubt_at_a_commit_keeps_its_compensation(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.wait(ctx.start(host.tasks["reserve"].s()))
        ctx.commit()
        raise Refused

    past.asked("reserve", compensation=plan("release")).unknown(0)
    assert asks(past.decide(workflow)) == ["compensation release of 0"]


def test_a_commit_in_a_nested_scope_covers_those_around_it(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s())
        with ctx.saga():
            handle = ctx.start(host.tasks["charge"].s())
            handle.get()
            ctx.commit()
        raise Refused

    past.asked("reserve", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(1)
    assert asks(past.decide(workflow)) == []


def test_the_result_of_a_committed_step_holds_though_its_scope_was_undone(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            with ctx.saga():
                handle = ctx.start(host.tasks["charge"].s())
                handle.get()
                ctx.commit()
                raise Refused
        except Refused:
            return handle.get()

    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0, "c-1")
    assert result_of(past.decide(workflow)) == "c-1"
