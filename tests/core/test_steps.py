"""What ``ctx.run``, ``start``, ``gather`` and groups ask for, and what they return."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Broken, Completed, Failure, Outcome, ScheduleStep, State, Waiting, Wake
from orchestrator.core.retry import RetryPolicy

from .host import FakeHost, Signature, group
from .past import Past, arguments, asks, failure_of, plan, result_of, waits_for


def scheduled(past: Past, workflow: Any, index: int = 0) -> ScheduleStep:
    command = past.decide(workflow).records[index].command
    assert isinstance(command, ScheduleStep)
    return command


def test_a_new_instance_schedules_its_first_step_and_waits_for_it(past: Past, host: FakeHost) -> None:
    decision = past.decide(lambda ctx: ctx.run(host.tasks["reserve"].s("mug", quantity=2)))
    assert asks(decision) == ["step reserve"]
    assert decision.records[0].after_order == 0
    assert decision.ending == Waiting(1, {0: Wake.COUNT})
    assert isinstance(decision.records[0].command, ScheduleStep)
    assert decision.records[0].command.arguments == '{"args":["mug"],"kwargs":{"quantity":2}}'


def test_a_recorded_result_is_returned_and_the_next_step_scheduled_after_it(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.run(host.tasks["charge"].s(ctx.run(host.tasks["reserve"].s())))

    decision = past.asked("reserve").succeeded(0, "r-1").decide(workflow)
    assert (asks(decision), arguments(decision)) == (["step charge"], ["r-1"])
    assert decision.records[0].after_order == 1
    assert result_of(past.asked("charge").succeeded(1, {"ok": True}).decide(workflow)) == {"ok": True}


def test_a_step_that_has_not_settled_is_not_asked_for_again(past: Past, host: FakeHost) -> None:
    decision = past.asked("reserve").running(0).decide(lambda ctx: ctx.run(host.tasks["reserve"].s()))
    assert asks(decision) == []
    assert waits_for(decision) == [0]


def test_a_bare_task_is_a_call_without_arguments(past: Past, host: FakeHost) -> None:
    assert scheduled(past, lambda ctx: ctx.run(host.tasks["mail"])).arguments == '{"args":[],"kwargs":{}}'


def test_the_options_of_a_signature_are_recorded(past: Past, host: FakeHost) -> None:
    command = scheduled(past, lambda ctx: ctx.run(host.tasks["mail"].s().set(queue="slow", priority=3)))
    assert command.options == {"queue": "slow", "priority": 3}


def test_a_call_s_own_settings_replace_the_registered_ones(past: Past, host: FakeHost) -> None:
    registered, own = RetryPolicy(max_attempts=2), RetryPolicy(max_attempts=5)
    task = host.task("flaky", retry=registered, timeout_seconds=30.0)
    command = scheduled(past, lambda ctx: ctx.run(task))
    assert (command.retry, command.timeout_seconds) == (registered, 30)
    command = scheduled(past, lambda ctx: ctx.run(task, retry=own, timeout=timedelta(minutes=1)))
    assert (command.retry, command.timeout_seconds) == (own, 60)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), True, "soon"])
def test_a_timeout_that_is_no_duration_is_refused(past: Past, host: FakeHost, timeout: Any) -> None:
    decision = past.decide(lambda ctx: ctx.run(host.tasks["mail"], timeout=timeout))
    assert isinstance(decision.ending, Broken)
    assert "ContextMisused" in decision.ending.failure.type


def test_a_foreign_step_needs_a_timeout(past: Past, host: FakeHost) -> None:
    assert isinstance(past.decide(lambda ctx: ctx.run(host.tasks["mail"], foreign=True)).ending, Broken)
    assert scheduled(past, lambda ctx: ctx.run(host.tasks["mail"], foreign=True, timeout=5)).foreign


def test_started_steps_are_scheduled_in_one_pass(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        first, second = ctx.start(host.tasks["reserve"].s()), ctx.start(host.tasks["charge"].s())
        return [second.get(), first.get()]

    decision = past.decide(workflow)
    assert asks(decision) == ["step reserve", "step charge"]
    assert waits_for(decision) == [1]
    past.asked("reserve").asked("charge").succeeded(0, "a").succeeded(1, "b")
    assert result_of(past.decide(workflow)) == ["b", "a"]


def test_a_handle_is_ready_only_once_a_wait_has_told_the_workflow(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        first, second = ctx.start(host.tasks["reserve"].s()), ctx.start(host.tasks["charge"].s())
        before = first.ready()
        second.get()
        return [before, first.ready()]

    def settle(*seqs: int) -> Past:
        past = Past(host).asked("reserve").asked("charge")
        for seq in seqs:
            past.succeeded(seq)
        return past

    assert result_of(settle(0, 1).decide(workflow)) == [False, True]
    # the second settled first: what came in after it has not been delivered when its wait ends
    assert result_of(settle(1, 0).decide(workflow)) == [False, False]


def test_gather_waits_for_all_and_returns_results_in_the_order_given(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["reserve"].s())
        return ctx.gather(host.tasks["charge"].s(), handle, host.tasks["ship"].s())

    decision = past.decide(workflow)
    assert asks(decision) == ["step reserve", "step charge", "step ship"]
    assert decision.ending == Waiting(3, dict.fromkeys((1, 0, 2), Wake.COUNT))
    past.asked("reserve").asked("charge").asked("ship").succeeded(2, "c").succeeded(0, "a")
    assert past.decide(workflow).ending == Waiting(1, {1: Wake.COUNT})
    assert result_of(past.succeeded(1, "b").decide(workflow)) == ["b", "a", "c"]


def test_gather_raises_the_failure_with_the_lowest_seq_whichever_came_first(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.gather(*(host.tasks["work"].s(n) for n in range(3)))

    past.asked("work").asked("work").asked("work").failed(2, KeyError).succeeded(0).failed(1, ValueError)
    assert failure_of(past.decide(workflow)).failure.message.startswith("step 1 ")


def test_an_optional_failure_does_not_stand_in_for_the_one_gather_raises(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        optional = ctx.start(host.tasks["work"].s(), optional=True)
        first, second = ctx.start(host.tasks["work"].s()), ctx.start(host.tasks["work"].s())
        ctx.gather(second, first, optional)

    past.asked("work").asked("work").asked("work").failed(0).failed(1).failed(2)
    assert failure_of(past.decide(workflow)).failure.message.startswith("step 1 ")


def test_gather_can_return_failures_in_place(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        results = ctx.gather(*(host.tasks["work"].s(n) for n in range(2)), return_exceptions=True)
        return [str(type(result).__name__) for result in results]

    past.asked("work").asked("work").failed(0, ValueError).succeeded(1, 5)
    assert result_of(past.decide(workflow)) == ["ValueError", "int"]


def test_gathering_nothing_waits_for_nothing(past: Past) -> None:
    assert result_of(past.decide(lambda ctx: ctx.gather())) == []


def test_the_members_of_a_group_become_steps(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.run(group(host.tasks["reserve"].s("mug"), host.tasks["reserve"].s("globe")))

    decision = past.decide(workflow)
    assert asks(decision) == ["step reserve", "step reserve"]
    assert [arguments(decision, index) for index in (0, 1)] == [["mug"], ["globe"]]
    past.asked("reserve").asked("reserve").succeeded(1, "b").succeeded(0, "a")
    assert result_of(past.decide(workflow)) == ["a", "b"]


def test_a_group_in_a_gather_returns_a_list_of_its_own(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.gather(group(host.tasks["work"].s(1), host.tasks["work"].s(2)), host.tasks["mail"].s())

    past.asked("work").asked("work").asked("mail").succeeded(0, 1).succeeded(1, 2).succeeded(2, 3)
    assert result_of(past.decide(workflow)) == [[1, 2], 3]


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_a_failed_step_raises_what_the_activity_raised(past: Past, host: FakeHost, error: type[Exception]) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["charge"].s())
        except error as failed:
            assert isinstance(failed, errors.StepFailed)
            return [failed.seq, failed.name, failed.outcome, failed.error_type, failed.message]

    past.asked("charge").failed(0, error, "card declined")
    assert result_of(past.decide(workflow)) == [0, "charge", "failed", f"builtins.{error.__name__}", "card declined"]


def test_the_kinds_of_failure_tell_unknown_timed_out_and_withdrawn_apart(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handles = [ctx.start(host.tasks["work"].s()) for _ in range(4)]
        ctx.wait(*handles, count=4)
        return [[kind.__name__ for kind in KINDS if isinstance(handle.error, kind)] for handle in handles]

    for _ in range(4):
        past.asked("work")
    past.failed(0).unknown(1).timed_out(2).withdrawn(3).ended_late(2, None)
    assert result_of(past.decide(workflow)) == [[], ["StepUnknown"], ["StepTimedOut"], ["StepWithdrawn"]]


KINDS = (errors.StepUnknown, errors.StepTimedOut, errors.StepWithdrawn)


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Outcome.WITHDRAWN, "it never began"),
        (Outcome.UNKNOWN, "nobody can say whether it took effect"),
        (Outcome.FAILED, "it was withdrawn after an attempt that failed"),
    ],
)
def test_a_step_that_ended_without_an_exception_says_why(
    past: Past, host: FakeHost, outcome: Outcome, says: str
) -> None:
    def workflow(ctx: Context) -> None:
        ctx.run(host.tasks["work"].s())

    ended = failure_of(past.asked("work").settled(0, outcome).decide(workflow))
    assert ended.failure.message.endswith(says)


def test_a_timed_out_step_raises_at_once_though_its_attempt_is_alive(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["charge"].s(), timeout=5)
        except TimeoutError:
            ctx.run(host.tasks["mail"].s())

    assert asks(past.asked("charge").timed_out(0).decide(workflow)) == ["step mail"]


def test_a_timeout_before_the_first_attempt_leaves_nothing_to_drain(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.run(host.tasks["charge"].s(), timeout=5)
        except errors.StepTimedOut:
            return "too late"

    timed_out = Failure("orchestrator.errors.StepTimedOut", (), "nobody began it")
    past.asked("charge").settled(0, Outcome.FAILED, failure=timed_out)
    assert result_of(past.decide(workflow)) == "too late"


def test_an_optional_step_that_fails_returns_none(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return [ctx.run(host.tasks["mail"].s(), optional=True)]

    assert result_of(past.asked("mail").failed(0).decide(workflow)) == [None]


def test_an_optional_step_does_not_fail_a_gather_or_its_scope(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["mail"].s(), optional=True)
        ctx.start(host.tasks["mail"].s(), optional=True)
        return ctx.gather(handle, host.tasks["work"].s())

    past.asked("mail").asked("mail").asked("work").failed(0).failed(1).succeeded(2, 1)
    assert result_of(past.decide(workflow)) == [None, 1]


def test_returns_decodes_the_result_and_a_misfit_blocks(past: Past, host: FakeHost) -> None:
    past.asked("work").succeeded(0, 5)
    assert result_of(past.decide(lambda ctx: ctx.run(host.tasks["work"], returns=int))) == 5
    decision = past.decide(lambda ctx: ctx.run(host.tasks["work"], returns=str))
    assert isinstance(decision.ending, Broken)


def test_arguments_may_change_with_a_deploy(past: Past, host: FakeHost) -> None:
    past.asked("work", arguments='{"args":["old"],"kwargs":{}}').succeeded(0, 1)
    assert isinstance(past.decide(lambda ctx: ctx.run(host.tasks["work"].s("new"))).ending, Completed)


# --- refused calls ------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused_by_name(past: Past) -> None:
    decision = past.decide(lambda ctx: ctx.run(Signature("shop.nowhere")))
    assert isinstance(decision.ending, Broken)
    assert "'shop.nowhere'" in decision.ending.failure.message


@pytest.mark.parametrize("way", ["group", "gather", "map"])
def test_a_call_that_is_refused_leaves_nothing_behind(past: Past, host: FakeHost, way: str) -> None:
    good, too_large = "x", "x" * 20_000
    task = host.tasks["work"]

    def workflow(ctx: Context) -> Any:
        try:
            match way:
                case "group":
                    ctx.run(group(task.s(good), task.s(too_large)))
                case "gather":
                    ctx.gather(task.s(good), task.s(too_large))
                case _:
                    ctx.map(task, [good, too_large])
        except errors.PayloadTooLarge:
            return "refused"

    decision = past.decide(workflow)
    assert asks(decision) == []
    assert result_of(decision) == "refused"


def test_a_result_too_large_to_keep_blocks_and_undoes_nothing(past: Past, host: FakeHost) -> None:
    decision = past.asked("work").succeeded(0).decide(lambda ctx: (ctx.run(host.tasks["work"]), "x" * 20_000)[1])
    assert isinstance(decision.ending, Broken)
    assert "PayloadTooLarge" in decision.ending.failure.type


# --- cancelling a handle ------------------------------------------------------------------------------------------


def cancelling(host: FakeHost) -> Any:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        ctx.run(host.tasks["work"].s())
        handle.cancel()
        try:
            handle.get()
        except errors.StepUndone as undone:
            return undone.seq

    return workflow


def begun(past: Past) -> Past:
    return past.asked("charge", compensation=plan("refund")).asked("work")


def test_cancel_withdraws_a_step_that_has_not_begun(past: Past, host: FakeHost) -> None:
    decision = begun(past).succeeded(1).decide(cancelling(host))
    (withdrawal,) = decision.withdrawals
    assert (withdrawal.seq, withdrawal.state, withdrawal.attempt) == (0, State.SCHEDULED, 0)
    assert withdrawal.outcome is Outcome.WITHDRAWN
    assert withdrawal.event is not None
    assert withdrawal.event.order == 2
    assert result_of(decision) == 0


def test_cancel_drains_a_step_that_is_running_and_undoes_it(past: Past, host: FakeHost) -> None:
    decision = begun(past).running(0).succeeded(1).decide(cancelling(host))
    assert decision.ending == Waiting(1, {0: Wake.CLOSED}, draining=(0,))
    decision = past.succeeded(0, "c-1").decide(cancelling(host))
    assert (asks(decision), arguments(decision)) == (["compensation refund of 0"], ["c-1"])
    assert result_of(past.undoing(0, "refund").succeeded(2).decide(cancelling(host))) == 0


def test_cancel_raises_when_the_step_cannot_be_undone(past: Past, host: FakeHost) -> None:
    begun(past).succeeded(0).succeeded(1).undoing(0, "refund").failed(2)
    decision = past.decide(cancelling(host))
    assert failure_of(decision).failure.type == "orchestrator.errors.CompensationFailed"
    assert [entry.undoes for entry in decision.not_undone] == [0]


def test_a_step_between_two_attempts_is_withdrawn_as_failed_or_in_doubt(past: Past, host: FakeHost) -> None:
    begun(past).change(0, attempt=1).succeeded(1)
    assert past.decide(cancelling(host)).withdrawals[0].outcome is Outcome.FAILED
    decision = past.change(0, in_doubt=True).decide(cancelling(host))
    assert decision.withdrawals[0].outcome is Outcome.UNKNOWN
    assert asks(decision) == ["compensation refund of 0"]


def test_a_foreign_step_is_never_withdrawn(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["charge"].s(), foreign=True, timeout=5).cancel()

    decision = past.asked("charge", foreign=True).decide(workflow)
    assert decision.withdrawals == ()
    assert decision.ending == Waiting(1, {0: Wake.CLOSED}, draining=(0,))


def test_a_foreign_step_asked_for_in_the_same_pass_was_never_published(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["charge"].s(), foreign=True, timeout=5)
        raise ValueError

    decision = past.decide(workflow)
    assert decision.records[0].outcome is Outcome.WITHDRAWN
    assert not failure_of(decision).undone


def test_cancelling_twice_undoes_once(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["charge"].s())
        handle.cancel()
        handle.cancel()
        return "done"

    decision = past.asked("charge").decide(workflow)
    assert len(decision.withdrawals) == 1
    assert result_of(decision) == "done"
