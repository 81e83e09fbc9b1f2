"""Scopes: what fails one, how it is drained, nested and parallel ones, steps in doubt at the end of one."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, State, Waiting, Wake

from .host import FakeHost, group
from .past import Past, arguments, asks, failure_of, plan, result_of, waits_for


class Refused(Exception):
    pass


# --- ending -----------------------------------------------------------------------------------------------------------


def test_a_scope_ends_only_when_all_that_was_started_in_it_has_settled(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["mail"].s())
        return "done"

    decision = past.decide(workflow)
    assert (asks(decision), waits_for(decision)) == (["step mail"], [0])
    assert result_of(past.asked("mail").succeeded(0).decide(workflow)) == "done"


def test_a_failure_nobody_saw_fails_its_scope(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["charge"].s())
        ctx.start(host.tasks["mail"].s())
        return "done"

    past.asked("charge", compensation=plan("refund")).succeeded(0).asked("mail").failed(1)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]
    past.undoing(0, "refund").succeeded(2)
    assert failure_of(past.decide(workflow)).failure.message.startswith("step 1 ")


@pytest.mark.parametrize("way", ["get", "error", "gather", "collect"])
def test_a_failure_that_was_seen_does_not_fail_its_scope_again(past: Past, host: FakeHost, way: str) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["mail"].s())
        try:
            match way:
                case "get":
                    handle.get()
                case "error":
                    ctx.wait(handle)
                    assert isinstance(handle.error, errors.StepFailed)
                case "gather":
                    ctx.gather(handle)
                case _:
                    ctx.gather(handle, return_exceptions=True)
        except errors.StepFailed:
            pass
        return "done"

    assert result_of(past.asked("mail").failed(0).decide(workflow)) == "done"


@pytest.mark.parametrize("way", ["gather", "group"])
def test_all_the_failures_of_a_gather_or_group_count_as_seen(past: Past, host: FakeHost, way: str) -> None:
    def workflow(ctx: Context) -> Any:
        steps = [host.tasks["work"].s(), host.tasks["work"].s()]
        try:
            ctx.gather(*steps) if way == "gather" else ctx.run(group(*steps))
        except errors.StepFailed:
            return "done"

    assert result_of(past.asked("work").asked("work").failed(0).failed(1).decide(workflow)) == "done"


# --- draining ---------------------------------------------------------------------------------------------------------


def failing_beside(host: FakeHost) -> Any:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["reserve"].s())
        ctx.start(host.tasks["ship"].s())
        ctx.run(host.tasks["charge"].s())

    return workflow


def test_an_undone_scope_withdraws_what_has_not_begun_and_drains_what_has(past: Past, host: FakeHost) -> None:
    past.asked("reserve", compensation=plan("release")).asked("ship").asked("charge").running(0).failed(2)
    decision = past.decide(failing_beside(host))
    (withdrawal,) = decision.withdrawals
    assert (withdrawal.seq, withdrawal.outcome) == (1, Outcome.WITHDRAWN)
    assert decision.ending == Waiting(1, {0: Wake.CLOSED}, is_compensating=True, draining=(0,))
    decision = past.withdrawn(1).succeeded(0, "r-1").decide(failing_beside(host))
    assert (asks(decision), arguments(decision)) == (["compensation release of 0"], ["r-1"])
    assert decision.records[0].after_order == 3


def test_a_withdrawal_takes_the_next_order_and_what_follows_comes_after_it(past: Past, host: FakeHost) -> None:
    past.asked("reserve", compensation=plan("release")).asked("ship").asked("charge").succeeded(0).failed(2)
    decision = past.decide(failing_beside(host))
    event = decision.withdrawals[0].event
    assert event is not None
    assert (event.order, event.at) == (3, past.inbox[-1].at)
    assert asks(decision) == ["compensation release of 0"]
    assert decision.records[0].after_order == 3


def test_a_step_asked_for_and_withdrawn_in_one_pass_is_recorded_as_withdrawn(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["mail"].s())
        raise Refused

    decision = past.decide(workflow)
    assert decision.withdrawals == ()
    assert decision.records[0].outcome is Outcome.WITHDRAWN
    assert decision.records[0].event is not None
    assert decision.records[0].event.order == 1
    assert not failure_of(decision).undone


def test_a_compensation_waits_for_the_end_of_a_timed_out_attempt(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s())
        ctx.run(host.tasks["charge"].s(), timeout=5)

    past.asked("reserve", compensation=plan("release")).succeeded(0).asked("charge").timed_out(1)
    assert past.decide(workflow).ending == Waiting(1, {1: Wake.CLOSED}, is_compensating=True, draining=(1,))
    assert asks(past.ended_late(1, None).decide(workflow)) == ["compensation release of 0"]


# --- nested -----------------------------------------------------------------------------------------------------------


def two_carriers(host: FakeHost) -> Any:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["reserve"].s())
        for carrier in ("slow", "fast"):
            try:
                with ctx.saga():
                    ctx.run(host.tasks["charge"].s(carrier))
                    return ctx.run(host.tasks["ship"].s(carrier))
            except errors.StepFailed:
                continue
        raise Refused

    return workflow


def refused_once(past: Past) -> Past:
    past.asked("reserve", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(1, "c-1")
    return past.asked("ship", scope="1.").failed(2)


def test_a_nested_scope_undoes_its_own_steps_and_no_others(past: Past, host: FakeHost) -> None:
    decision = refused_once(past).decide(two_carriers(host))
    assert asks(decision) == ["compensation refund of 1"]
    assert decision.records[0].command.scope == "1."
    assert decision.ending == Waiting(1, {3: Wake.COUNT}, is_compensating=False)


def test_a_caught_failure_of_a_nested_scope_leaves_room_for_another_way(past: Past, host: FakeHost) -> None:
    refused_once(past).undoing(1, "refund", scope="1.").succeeded(3)
    decision = past.decide(two_carriers(host))
    assert asks(decision) == ["step charge"]
    assert decision.records[0].command.scope == "2."
    past.asked("charge", scope="2.", compensation=plan("refund")).succeeded(4)
    past.asked("ship", scope="2.").succeeded(5, "parcel")
    assert result_of(past.decide(two_carriers(host))) == "parcel"


def test_the_compensations_of_a_scope_that_ended_well_pass_outward(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.run(host.tasks["reserve"].s())
            with ctx.saga():
                ctx.run(host.tasks["charge"].s())
        raise Refused

    past.asked("reserve", scope="1.", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.1.", compensation=plan("refund")).succeeded(1)
    decision = past.decide(workflow)
    assert asks(decision) == ["compensation refund of 1"]
    assert decision.records[0].command.scope == "1.1."
    past.undoing(1, "refund", scope="1.1.").succeeded(2)
    assert asks(past.decide(workflow)) == ["compensation release of 0"]


def test_each_scope_an_exception_leaves_is_undone_before_the_one_around_it(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.run(host.tasks["reserve"].s())
            with ctx.saga():
                ctx.run(host.tasks["charge"].s())
                raise Refused

    past.asked("reserve", scope="1.", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.1.", compensation=plan("refund")).succeeded(1)
    past.undoing(1, "refund", scope="1.1.").succeeded(2)
    decision = past.decide(workflow)
    assert asks(decision) == ["compensation release of 0"]
    assert decision.records[0].command.scope == "1."


def test_an_unseen_failure_of_a_nested_scope_undoes_it_and_can_be_caught(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            with ctx.saga():
                ctx.run(host.tasks["charge"].s())
                ctx.start(host.tasks["mail"].s())
        except errors.StepFailed as failed:
            return failed.seq

    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0).asked("mail", scope="1.").failed(1)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]
    assert result_of(past.undoing(0, "refund", scope="1.").succeeded(2).decide(workflow)) == 1


def test_a_scope_that_cannot_be_undone_raises_compensation_failed_from_the_original(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            two_carriers(host)(ctx)
        except errors.CompensationFailed as failed:
            assert not isinstance(failed, errors.StepFailed)
            assert isinstance(failed.__cause__, errors.StepFailed)
            return [entry.undoes for entry in failed.not_undone]

    refused_once(past).undoing(1, "refund", scope="1.").failed(3)
    decision = past.decide(workflow)
    # another way is not tried: a StepFailed was caught, and this is none
    assert result_of(decision) == [1]
    assert [entry.undoes for entry in decision.not_undone] == [1]


def test_what_a_caught_nested_scope_left_behind_is_not_forgotten_when_the_workflow_fails(
    past: Past, host: FakeHost
) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            two_carriers(host)(ctx)
        except errors.CompensationFailed:
            raise Refused from None

    refused_once(past).undoing(1, "refund", scope="1.").failed(3).undoing(0, "release").succeeded(4)
    decision = past.decide(workflow)
    assert failure_of(decision).undone
    assert [entry.undoes for entry in decision.not_undone] == [1]


def test_a_handle_of_an_undone_scope_raises_step_undone(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            with ctx.saga():
                handle = ctx.start(host.tasks["charge"].s())
                handle.get()
                raise Refused
        except Refused:
            pass
        try:
            handle.get()
        except errors.StepUndone as undone:
            return [undone.seq, undone.name]

    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(0)
    past.undoing(0, "refund", scope="1.").succeeded(1)
    assert result_of(past.decide(workflow)) == [0, "charge"]


# --- parallel ---------------------------------------------------------------------------------------------------------


def in_parallel(host: FakeHost, inside: bool) -> Any:
    def workflow(ctx: Context) -> Any:
        with ctx.saga(parallel=True):
            ctx.run(host.tasks["reserve"].s())
            ctx.run(host.tasks["charge"].s())
            if inside:
                raise Refused
        raise Refused

    return workflow


@pytest.mark.parametrize("inside", [True, False])
def test_a_parallel_scope_undoes_together_and_loses_that_when_it_passes_outward(
    past: Past, host: FakeHost, inside: bool
) -> None:
    past.asked("reserve", scope="1.", compensation=plan("release")).succeeded(0)
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(1)
    decision = past.decide(in_parallel(host, inside))
    together = ["compensation refund of 1", "compensation release of 0"]
    assert asks(decision) == (together if inside else together[:1])
    assert waits_for(decision) == ([2, 3] if inside else [2])


# --- steps in doubt ---------------------------------------------------------------------------------------------------


def two_providers(host: FakeHost, accepts: str | None = None) -> Any:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["charge"].s("first"))
        try:
            return handle.get()
        except errors.StepFailed as failed:
            if accepts:
                ctx.accept(failed if accepts == "error" else handle)
        return ctx.run(host.tasks["charge"].s("second"))

    return workflow


def charged_twice(past: Past) -> Past:
    past.asked("charge", compensation=plan("refund")).unknown(0)
    return past.asked("charge", compensation=plan("refund")).succeeded(1, "c-2")


def test_a_step_in_doubt_is_undone_when_its_scope_ends_well(past: Past, host: FakeHost) -> None:
    decision = charged_twice(past).decide(two_providers(host))
    assert (asks(decision), arguments(decision)) == (["compensation refund of 0"], [None])
    assert decision.ending == Waiting(1, {2: Wake.COUNT}, is_compensating=False)
    assert result_of(past.undoing(0, "refund").succeeded(2).decide(two_providers(host))) == "c-2"


@pytest.mark.parametrize("accepts", ["error", "handle"])
def test_an_accepted_step_in_doubt_stays(past: Past, host: FakeHost, accepts: str) -> None:
    assert result_of(charged_twice(past).decide(two_providers(host, accepts))) == "c-2"


def test_accepting_a_handle_takes_notice_of_its_doubt(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["charge"].s())
        ctx.wait(handle)
        ctx.accept(handle)
        return "done"

    past.asked("charge", compensation=plan("refund"))
    assert result_of(past.unknown(0).decide(workflow)) == "done"


def test_accepting_a_handle_does_not_hide_a_plain_failure(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.accept(ctx.start(host.tasks["charge"].s()))
        return "done"

    assert not failure_of(past.asked("charge").failed(0).decide(workflow)).undone


def test_an_accepted_step_is_undone_when_its_scope_fails(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        two_providers(host, "error")(ctx)
        raise Refused

    charged_twice(past).undoing(1, "refund").succeeded(2)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]


def test_a_doubt_of_a_nested_scope_is_resolved_at_its_end_not_later(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            two_providers(host)(ctx)
        return ctx.run(host.tasks["ship"].s())

    past.asked("charge", scope="1.", compensation=plan("refund")).unknown(0)
    past.asked("charge", scope="1.", compensation=plan("refund")).succeeded(1)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]
    past.undoing(0, "refund", scope="1.").succeeded(2)
    assert asks(past.decide(workflow)) == ["step ship"]


def test_a_doubt_that_cannot_be_resolved_is_named_and_the_scope_still_ends_well(past: Past, host: FakeHost) -> None:
    decision = charged_twice(past).undoing(0, "refund").failed(2).decide(two_providers(host))
    assert result_of(decision) == "c-2"
    assert [entry.undoes for entry in decision.not_undone] == [0]


def test_a_timed_out_step_is_drained_before_its_doubt_is_resolved(past: Past, host: FakeHost) -> None:
    past.asked("charge", compensation=plan("refund")).timed_out(0)
    past.asked("charge", compensation=plan("refund")).succeeded(1, "c-2")
    assert past.decide(two_providers(host)).ending == Waiting(1, {0: Wake.CLOSED}, draining=(0,))
    past.ended_late(0, Outcome.SUCCEEDED, "c-1")
    assert arguments(past.decide(two_providers(host))) == ["c-1"]


def test_an_optional_step_in_doubt_is_undone_too(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.run(host.tasks["charge"].s(), optional=True)

    past.asked("charge", compensation=plan("refund")).unknown(0)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]


def test_accept_takes_nothing_but_a_step(past: Past) -> None:
    decision = past.decide(lambda ctx: ctx.accept("step 1"))  # type: ignore[arg-type]
    assert "ContextMisused" in str(decision.ending)


def test_a_held_step_is_withdrawn_as_one_that_never_began(past: Past, host: FakeHost) -> None:
    past.asked("reserve", compensation=plan("release"), state=State.HELD).asked("ship").asked("charge").failed(2)
    decision = past.decide(failing_beside(host))
    assert [(entry.seq, entry.state) for entry in decision.withdrawals] == [(0, State.HELD), (1, State.SCHEDULED)]
