"""``ctx.recur``: ending one run and beginning the next."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Decision, Diverged, Outcome, Recurred, State, Waiting, Wake

from .driver import Shell
from .host import FakeHost
from .past import Past, asks, failure_of, plan, receives, refusal_of, result_of, waits_for


def input_of(decision: Decision) -> Any:
    assert isinstance(decision.ending, Recurred), decision.ending
    return json.loads(decision.ending.arguments)


def test_the_next_run_gets_other_input(past: Past) -> None:
    decision = past.message("a").decide(lambda ctx: ctx.recur(5, mug="blue"))
    assert input_of(decision) == {"args": [5], "kwargs": {"mug": "blue"}}
    assert decision.ending == Recurred('{"args":[5],"kwargs":{"mug":"blue"}}', 0)


def test_what_a_run_has_seen_is_told_by_the_order_of_the_last_event(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.run(host.tasks["work"].s())
        ctx.recur()

    decision = past.asked("work").succeeded(0).message("a").cancel().decide(workflow)
    assert isinstance(decision.ending, Recurred)
    assert decision.ending.order == 1


def test_nothing_that_follows_has_any_effect(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.recur(1)
        except BaseException:
            ctx.run(host.tasks["work"].s())
        finally:
            ctx.recur(2)

    decision = past.decide(workflow)
    assert (input_of(decision), decision.records) == ({"args": [1], "kwargs": {}}, ())


def test_input_that_cannot_be_encoded_is_refused_before_anything_is_waited_for(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.start(host.tasks["work"].s())
        ctx.recur({1})

    assert "cannot be encoded" in refusal_of(past.asked("work").decide(workflow))


# --- what it waits for ------------------------------------------------------------------------------------------------


def starting(host: FakeHost, **settings: Any) -> Any:
    def workflow(ctx: Context) -> None:
        ctx.start(host.tasks["work"].s(), **settings)
        ctx.recur()

    return workflow


def test_it_waits_for_what_is_open(past: Past, host: FakeHost) -> None:
    assert past.decide(starting(host)).ending == Waiting(1, {0: Wake.COUNT})
    assert input_of(past.asked("work").succeeded(0).decide(starting(host)))


def test_it_waits_for_attempts_that_outlived_their_timeout_and_withdraws_none(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.accept(ctx.start(host.tasks["work"].s(), timeout=5))
        ctx.recur()

    decision = past.asked("work").running(0).timed_out(0).decide(workflow)
    assert decision.ending == Waiting(1, {0: Wake.CLOSED})
    assert input_of(past.ended_late(0, Outcome.SUCCEEDED).decide(workflow))


@pytest.mark.parametrize("is_timed_out", [True, False])
def test_it_can_be_cancelled_while_it_waits(past: Past, host: FakeHost, is_timed_out: bool) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.accept(ctx.start(host.tasks["work"].s(), timeout=5))
            ctx.recur()
        except errors.WorkflowCancelled:
            return "cancelled"

    past.asked("work").running(0)
    past.timed_out(0).cancel() if is_timed_out else past.cancel().succeeded(0)
    decision = past.decide(workflow)
    assert result_of(decision) == "cancelled"


def test_timers_receives_and_detached_children_do_not_hold_it_back(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.timer(60)
        ctx.message("a")
        ctx.start(host.tasks["deliver"].s(), on_parent_end="leave")
        ctx.recur()

    assert input_of(past.decide(workflow))


def test_a_failure_that_nobody_saw_is_raised_there(past: Past, host: FakeHost) -> None:
    assert failure_of(past.asked("work").failed(0).decide(starting(host))).failure.message.startswith("step 0")


def test_a_step_in_doubt_is_undone_first(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        try:
            ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        except errors.StepUnknown:
            ctx.commit()
        ctx.recur()

    past.asked("charge", compensation=plan("refund")).unknown(0)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]
    past.undoing(0, "refund")
    assert input_of(past.succeeded(1).decide(workflow))


def test_a_cancellation_while_a_step_in_doubt_is_undone_is_not_lost_on_the_next_run(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["charge"].s(), compensate=host.tasks["refund"].s(), optional=True)
        ctx.recur()

    past.asked("charge", compensation=plan("refund")).unknown(0).undoing(0, "refund").cancel()
    assert waits_for(past.decide(workflow)) == [1]
    assert failure_of(past.succeeded(1).decide(workflow)).is_cancelled


def test_a_cancellation_that_is_due_is_raised_before_anything_is_refused(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        ctx.start(host.tasks["mail"].s()).cancel()
        ctx.recur()

    past.asked("charge", compensation=plan("refund")).succeeded(0).asked("mail").running(1).cancel().succeeded(1)
    assert asks(past.decide(workflow)) == ["compensation refund of 0"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_it_is_refused_inside_a_nested_scope(past: Past) -> None:
    def workflow(ctx: Context) -> None:
        with ctx.saga():
            ctx.recur()

    assert "inside saga()" in refusal_of(past.decide(workflow))


@pytest.mark.parametrize("commits", [True, False])
def test_it_is_refused_while_compensations_are_registered(past: Past, host: FakeHost, commits: bool) -> None:
    def workflow(ctx: Context) -> None:
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        if commits:
            ctx.commit()
        ctx.recur()

    decision = past.asked("charge", compensation=plan("refund")).succeeded(0).decide(workflow)
    if commits:
        assert input_of(decision)
    else:
        assert "would forget 1 compensation(s), the first for step 0 (charge)" in refusal_of(decision)


def test_it_is_refused_before_it_waits_where_that_is_known(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
        ctx.start(host.tasks["work"].s())
        ctx.recur()

    assert refusal_of(past.asked("charge", compensation=plan("refund")).succeeded(0).asked("work").decide(workflow))


def test_it_is_refused_for_what_was_open_and_turns_out_to_need_undoing(past: Past, host: FakeHost) -> None:
    workflow = starting(host, compensate=host.tasks["undo"].s())
    past.asked("work", compensation=plan("undo"))
    assert waits_for(past.decide(workflow)) == [0]
    assert "step 0 (work)" in refusal_of(past.succeeded(0).decide(workflow))


def test_a_failed_step_has_no_compensation_to_forget(past: Past, host: FakeHost) -> None:
    workflow = starting(host, compensate=host.tasks["undo"].s(), optional=True)
    assert input_of(past.asked("work", compensation=plan("undo")).failed(0).decide(workflow))


def test_a_compensation_registered_by_hand_is_not_forgotten_either(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.compensate(host.tasks["undo"].si())
        ctx.recur()

    assert "would forget" in refusal_of(past.decide(workflow))


def test_asking_for_less_than_history_holds_is_divergence(past: Past) -> None:
    assert isinstance(past.asked("work").decide(lambda ctx: ctx.recur()).ending, Diverged)


# --- runs together ----------------------------------------------------------------------------------------------------


def test_messages_that_were_not_received_are_there_for_the_next_run(host: FakeHost) -> None:
    def workflow(ctx: Context, seen: tuple[Any, ...] = ()) -> Any:
        if len(seen) < 3:
            ctx.recur([*seen, ctx.receive("a")])
        return seen

    shell = Shell(workflow, host)
    for message in (1, 2, 3):
        shell.send("a", message)
        shell.send("b", message)
    assert result_of(shell.run()) == [1, 2, 3]
    assert [len(run.rows) for run in shell.runs()] == [1, 1, 1, 0]
    assert [[(event.order, event.channel) for event in run.inbox] for run in shell.runs()][-1] == [  # type: ignore[union-attr]
        (1, "b"), (2, "b"), (3, "b")
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_a_cancellation_that_was_not_delivered_is_there_for_the_next_run(host: FakeHost, seed: int) -> None:
    def workflow(ctx: Context, number: int = 1) -> Any:
        if number == 2:
            ctx.sleep(60)
        ctx.recur(number + 1)

    shell = Shell(workflow, host, seed=seed)
    shell.request("cancel")
    assert failure_of(shell.run()).is_cancelled
    assert shell.number == 2


def test_random_numbers_differ_from_one_run_to_the_next(host: FakeHost) -> None:
    def workflow(ctx: Context, drawn: tuple[str, ...] = ()) -> Any:
        if len(drawn) < 2:
            ctx.recur([*drawn, str(ctx.uuid4("key"))])
        return drawn

    assert len(set(result_of(Shell(workflow, host).run()))) == 2


def test_a_message_that_was_received_is_not_there_again(past: Past) -> None:
    def workflow(ctx: Context) -> None:
        ctx.receive("a")
        ctx.recur()

    decision = past.receive("a").message("a", 1).message("a", 2).decide(workflow)
    assert (receives(decision), input_of(decision)) == ({0: 1}, {"args": [], "kwargs": {}})
    assert past.records[0].state is State.SCHEDULED
