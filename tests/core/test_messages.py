"""Receiving, message handles, sending and publishing: which receive gets which message, and what is asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import (
    Delivery,
    Diverged,
    Kind,
    OpenReceive,
    Outcome,
    PublishMessage,
    SendMessage,
    State,
    Subscribe,
    Unsubscribe,
    Waiting,
    Wake,
)

from .host import FakeHost
from .past import Past, asks, failure_of, receives, refusal_of, result_of, stops, waits_for

# --- receiving --------------------------------------------------------------------------------------------------------


def receive(timeout: float | None = None) -> Any:
    def workflow(ctx: Context) -> Any:
        try:
            return ctx.receive("paid", timeout=timeout)
        except errors.ReceiveTimedOut as error:
            return str(error)

    return workflow


def test_a_receive_waits_for_a_message_on_its_channel(past: Past) -> None:
    decision = past.decide(receive())
    assert decision.records[0].command == OpenReceive("paid", "")
    assert decision.ending == Waiting(1, {0: Wake.COUNT})
    decision = past.receive("paid").message("shipped", 1).message("paid", {"cents": 5}).decide(receive())
    assert (result_of(decision), receives(decision)) == ({"cents": 5}, {0: 2})


def test_a_message_that_came_before_the_first_pass_is_received_as_the_receive_is_recorded(past: Past) -> None:
    decision = past.message("paid", 5).decide(receive())
    (new,) = decision.records
    assert (new.outcome, new.result, new.message_order, new.after_order) == (Outcome.SUCCEEDED, "5", 1, 0)
    assert (decision.receipts, result_of(decision)) == ((), 5)


def test_a_message_that_came_while_another_wait_was_open_is_kept(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.run(host.tasks["work"].s())
        return ctx.receive("paid", timeout=60)

    past.asked("work").message("paid", 5).succeeded(0)
    decision = past.decide(workflow)
    assert (result_of(decision), receives(decision), stops(decision)) == (5, {1: 1}, [2])


def test_a_replay_receives_the_same_and_marks_nothing_again(past: Past) -> None:
    past.receive("paid").message("paid", 5).got(0, 5)
    decision = past.decide(receive())
    assert (result_of(decision), receives(decision)) == (5, {})


def test_messages_of_a_channel_are_received_in_the_order_in_which_they_came(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        return [ctx.receive(channel) for channel in ("a", "b", "a", "a")]

    past.message("a", 1).message("a", 2).message("b", 3).message("a", 4)
    decision = past.decide(workflow)
    assert result_of(decision) == [1, 3, 2, 4]
    assert receives(decision) == {0: 1, 1: 3, 2: 2, 3: 4}


def test_a_message_is_decoded_as_the_type_that_was_asked_for(past: Past) -> None:
    past.message("paid", 5)
    assert result_of(past.decide(lambda ctx: ctx.receive("paid", returns=int))) == 5
    assert result_of(past.decide(lambda ctx: ctx.message("paid", returns=int).get())) == 5


def test_a_message_that_does_not_fit_is_received_and_raised_as_the_sender_s_mistake(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            ctx.receive("paid", returns=str)
        except errors.MessageMismatch as error:
            return [error.channel, ctx.receive("paid")]

    past.message("paid", 5).message("paid", 6)
    assert result_of(past.decide(workflow)) == ["paid", 6]
    failed = failure_of(past.decide(lambda ctx: ctx.receive("paid", returns=str)))
    assert failed.failure.type == "orchestrator.errors.MessageMismatch"


def test_a_gather_that_collects_returns_a_message_that_does_not_fit_in_its_place(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        fits, does_not = ctx.gather(
            ctx.message("a", returns=int), ctx.message("a", returns=str), return_exceptions=True
        )
        return [fits, isinstance(does_not, errors.MessageMismatch)]

    assert result_of(past.message("a", 1).message("a", 2).decide(workflow)) == [1, True]


def test_receiving_with_a_timeout_waits_for_the_message_or_the_timer(past: Past) -> None:
    decision = past.decide(receive(60))
    assert asks(decision) == ["receive paid", "timer timer"]
    assert decision.ending == Waiting(1, {0: Wake.COUNT, 1: Wake.ALONE})


def test_a_message_in_time_withdraws_the_timer(past: Past) -> None:
    decision = past.receive("paid").timer().message("paid", 5).decide(receive(60))
    assert (result_of(decision), receives(decision), stops(decision)) == (5, {0: 1}, [1])


def test_a_receive_that_timed_out_is_withdrawn_and_says_so(past: Past) -> None:
    decision = past.receive("paid").timer().fired(1).decide(receive(60))
    assert (result_of(decision), receives(decision), stops(decision)) == (
        "no message on 'paid' within 60 s", {}, [0]
    )  # fmt: skip


def test_a_message_just_before_the_timer_is_received(past: Past) -> None:
    decision = past.receive("paid").timer().message("paid", 5).fired(1).decide(receive(60))
    # the timer has fired in the store: there is nothing to withdraw
    assert (result_of(decision), receives(decision), stops(decision)) == (5, {0: 1}, [])


def test_a_message_just_after_the_timer_is_kept_for_the_next_receive(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            return ctx.receive("paid", timeout=60)
        except errors.ReceiveTimedOut:
            return ["late", ctx.receive("paid")]

    past.receive("paid").timer().fired(1).message("paid", 5)
    decision = past.decide(workflow)
    assert (result_of(decision), receives(decision), stops(decision)) == (["late", 5], {2: 2}, [0])
    past.stopped(0).receive("paid", after_order=1).got(2, 5)
    assert result_of(past.decide(workflow)) == ["late", 5]


def test_a_receive_that_nobody_caught_timing_out_fails_the_workflow(past: Past) -> None:
    past.receive("paid").timer().fired(1)
    failed = failure_of(past.decide(lambda ctx: ctx.receive("paid", timeout=60)))
    assert failed.failure.type == "orchestrator.errors.ReceiveTimedOut"
    assert "builtins.TimeoutError" in failed.failure.bases


# --- handles ----------------------------------------------------------------------------------------------------------


def first_of(ctx: Context) -> Any:
    paid, refused = ctx.message("paid"), ctx.message("refused")
    done, pending = ctx.wait(paid, refused, timeout=60)
    return [[handle.get() for handle in done], len(pending)]


def test_a_wait_takes_whichever_message_comes(past: Past) -> None:
    assert past.decide(first_of).ending == Waiting(1, {0: Wake.COUNT, 1: Wake.COUNT, 2: Wake.ALONE})
    past.receive("paid").receive("refused").timer().message("refused", "no").message("paid", 5)
    decision = past.decide(first_of)
    assert (result_of(decision), receives(decision), stops(decision)) == ([["no"], 1], {1: 1}, [2])


def test_messages_steps_and_timers_are_waited_for_together(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handles = [ctx.message("paid"), ctx.start(host.tasks["work"].s()), ctx.timer(60)]
        done, _ = ctx.wait(*handles, count=2)
        return [[handles.index(handle) for handle in done], ctx.gather(*handles)]

    past.receive("paid").asked("work").timer().fired(2).message("paid", 5)
    assert past.decide(workflow).ending == Waiting(1, {1: Wake.COUNT})
    assert result_of(past.succeeded(1, 7).decide(workflow)) == [[0, 2], [5, 7, None]]


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("places", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_receive_that_was_opened_first_gets_the_first_message(
    past: Past, places: tuple[int, ...], is_there: bool
) -> None:
    def workflow(ctx: Context) -> Any:
        if is_there:
            ctx.receive("b")
        handles = [ctx.message("a") for _ in places]
        return ctx.gather(*[handles[place] for place in places])

    past.message("a", 0).message("a", 1).message("a", 2).message("b")
    assert result_of(past.decide(workflow)) == list(places)


def test_the_receive_that_is_waited_for_gets_it_before_one_that_was_opened_earlier(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.message("a")
        return ctx.message("a").get()

    decision = past.receive("a").receive("a").message("a", 1).decide(workflow)
    assert (result_of(decision), receives(decision)) == (1, {1: 1})


@pytest.mark.parametrize("came_first", [True, False])
def test_a_handle_that_is_let_go_loses_no_message(past: Past, host: FakeHost, came_first: bool) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.message("a")
        ctx.run(host.tasks["work"].s())
        return ctx.receive("a")

    if came_first:
        past.message("a", 1)
    past.receive("a").asked("work").message("a", 2).succeeded(1)
    assert result_of(past.decide(workflow)) == (1 if came_first else 2)


def test_a_message_that_is_left_over_belongs_to_nobody(past: Past) -> None:
    decision = past.message("a", 1).message("b", 2).decide(lambda ctx: ctx.receive("b"))
    assert receives(decision) == {0: 2}


def test_asking_whether_a_message_is_there_takes_it(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.message("a")
        before = handle.ready()
        ctx.run(host.tasks["work"].s())
        return [before, handle.ready(), handle.ready(), handle.get()]

    past.receive("a").asked("work").message("a", 1).message("a", 2).succeeded(1)
    decision = past.decide(workflow)
    assert (result_of(decision), receives(decision)) == ([False, True, True, 1], {0: 1})


def test_a_wait_that_is_satisfied_already_takes_what_is_there(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        step = ctx.start(host.tasks["work"].s())
        step.get()
        done, _ = ctx.wait(step, ctx.message("a"))
        return len(done)

    assert result_of(past.asked("work").message("a", 1).succeeded(0).decide(workflow)) == 2


def test_a_message_handle_that_is_cancelled_gets_nothing(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.message("a")
        handle.cancel()
        handle.cancel()
        return [handle.ready(), ctx.receive("a")]

    decision = past.receive("a").message("a", 1).decide(workflow)
    assert (result_of(decision), receives(decision), stops(decision)) == ([True, 1], {1: 1}, [0])


@pytest.mark.parametrize("way", ["get", "gather", "collect"])
def test_waiting_for_a_message_that_was_cancelled_is_refused(past: Past, way: str) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.message("a")
        handle.cancel()
        return handle.get() if way == "get" else ctx.gather(handle, return_exceptions=way == "collect")

    assert "nothing will come" in refusal_of(past.decide(workflow))


def test_cancelling_a_message_that_is_there_changes_nothing(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.message("a")
        handle.get()
        handle.cancel()
        return handle.get()

    decision = past.message("a", 1).decide(workflow)
    assert (result_of(decision), stops(decision)) == (1, [])


def test_a_message_in_a_shielded_wait_is_kept(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            with ctx.saga():
                ctx.run(host.tasks["charge"].s(), compensate=host.tasks["refund"].s())
                raise LookupError
        except LookupError:
            return ctx.receive("a")

    past.asked("charge", scope="1.").succeeded(0)
    past.change(0, compensation=host.read_compensation(host.tasks["refund"].s()))
    past.undoing(0, "refund", scope="1.").message("a", 1).succeeded(1)
    assert result_of(past.decide(workflow)) == 1


def test_a_receive_that_nobody_waits_for_does_not_hold_the_workflow_back(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            ctx.message("a")
        return "done"

    decision = past.decide(workflow)
    assert (result_of(decision), decision.records[0].outcome) == ("done", None)


# --- sending ----------------------------------------------------------------------------------------------------------


def send(to: str = "order-2", **settings: Any) -> Any:
    return lambda ctx: ctx.send(to, "paid", {"cents": 5}, **settings)


def test_a_message_that_is_sent_is_recorded_with_what_became_of_it(past: Past, host: FakeHost) -> None:
    host.receivers["order-2"] = Delivery.DELIVERED
    decision = past.decide(send(message_id="m-1"))
    (new,) = decision.records
    assert new.command == SendMessage("paid", "", "order-2", '{"cents":5}', "m-1")
    assert (new.outcome, json.loads(new.result or ""), result_of(decision)) == (Outcome.SUCCEEDED, "delivered", True)


def test_whether_a_message_was_sent_does_not_change_on_a_replay(past: Past, host: FakeHost) -> None:
    past.asked("paid", Kind.SEND, state=State.SETTLED, outcome=Outcome.SUCCEEDED, result='"ended"')
    host.receivers["order-2"] = Delivery.DELIVERED
    decision = past.decide(send(missing="ignore"))
    assert (result_of(decision), decision.records) == (False, ())


@pytest.mark.parametrize(
    ("delivery", "kind"), [(Delivery.UNKNOWN, "UnknownInstance"), (Delivery.ENDED, "InstanceEnded")]
)
def test_sending_to_an_instance_that_is_not_there_raises_unless_told_otherwise(
    past: Past, host: FakeHost, delivery: Delivery, kind: str
) -> None:
    host.receivers["order-2"] = delivery
    assert failure_of(past.decide(send())).failure.type == f"orchestrator.errors.{kind}"
    assert result_of(past.decide(send(missing="ignore"))) is False


def test_a_child_that_the_same_pass_starts_can_be_sent_to(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(host.tasks["deliver"].s())
        return ctx.send(child.instance_id, "address", "here")

    decision = past.decide(workflow)
    assert (asks(decision), waits_for(decision)) == (["child deliver", "send address"], [0])
    assert json.loads(decision.records[1].result or "") == "delivered"


@pytest.mark.parametrize(("state", "is_there"), [(State.SCHEDULED, True), (State.HELD, True), (State.RUNNING, False)])
def test_a_child_that_nobody_has_got_to_starting_can_be_sent_to(
    past: Past, host: FakeHost, state: State, is_there: bool
) -> None:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(host.tasks["deliver"].s())
        ctx.run(host.tasks["mail"].s())
        ctx.set_progress(str(ctx.send(child.instance_id, "address", "here", missing="ignore")))

    # of one that has begun the store knows, as of any other instance
    past.child("deliver", state=state).asked("mail").succeeded(1)
    assert past.decide(workflow).progress == str(is_there)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_child_that_was_withdrawn_before_it_began_cannot_be_sent_to(
    past: Past, host: FakeHost, is_recorded: bool
) -> None:
    def workflow(ctx: Context) -> Any:
        child = ctx.start(host.tasks["deliver"].s())
        child.cancel()
        return ctx.send(child.instance_id, "address", "here", missing="ignore")

    if is_recorded:
        past.child("deliver")
    assert result_of(past.decide(workflow)) is False


def test_publishing_and_subscribing_are_settled_as_they_are_recorded(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.subscribe("news")
        ctx.subscribe("work", mode="competing")
        ctx.publish("news", 1, message_id="m-1")
        ctx.unsubscribe("news")
        return "done"

    decision = past.decide(workflow)
    assert [new.command for new in decision.records] == [
        Subscribe("news", "", "broadcast"),
        Subscribe("work", "", "competing"),
        PublishMessage("news", "", "1", "m-1"),
        Unsubscribe("news", ""),
    ]
    assert {new.outcome for new in decision.records} == {Outcome.SUCCEEDED}
    assert result_of(decision) == "done"
    for new in decision.records:
        past.asked(new.command.name, new.command.kind, state=State.SETTLED, outcome=Outcome.SUCCEEDED)
    assert past.decide(workflow).records == ()


# --- what is refused --------------------------------------------------------------------------------------------------

LONG = "c" * 101


@pytest.mark.parametrize(
    "call",
    [
        lambda ctx: ctx.receive(LONG),
        lambda ctx: ctx.receive(""),
        lambda ctx: ctx.receive(5),
        lambda ctx: ctx.message(LONG),
        lambda ctx: ctx.send("order-2", LONG, 1),
        lambda ctx: ctx.publish(LONG, 1),
        lambda ctx: ctx.subscribe(LONG),
        lambda ctx: ctx.unsubscribe(LONG),
        lambda ctx: ctx.receive("paid", timeout=-1),
        lambda ctx: ctx.receive("paid", timeout="soon"),
        lambda ctx: ctx.send("order-2", "paid", 1, missing="skip"),
        lambda ctx: ctx.send("order-2", "paid", 1, message_id="m" * 201),
        lambda ctx: ctx.publish("paid", 1, message_id=""),
        lambda ctx: ctx.publish("paid", 1, message_id=5),
        lambda ctx: ctx.subscribe("news", mode="both"),
        lambda ctx: ctx.send("order-2", "paid", {1}),
        lambda ctx: ctx.publish("paid", {1}),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_the_call(past: Past, call: Any) -> None:
    decision = past.decide(call)
    assert refusal_of(decision)
    assert decision.records == ()


def test_the_longest_names_are_taken(past: Past, host: FakeHost) -> None:
    host.receivers["order-2"] = Delivery.DELIVERED
    assert result_of(past.decide(lambda ctx: ctx.send("order-2", "c" * 100, 1, message_id="m" * 200))) is True


def test_a_payload_over_the_limit_is_refused(past: Past) -> None:
    failed = failure_of(past.decide(lambda ctx: ctx.publish("paid", "x" * 20_000)))
    assert failed.failure.type == "orchestrator.errors.PayloadTooLarge"


# --- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Kind.RECEIVE, lambda ctx: ctx.receive("other")),
        (Kind.RECEIVE, lambda ctx: ctx.subscribe("paid")),
        (Kind.SEND, lambda ctx: ctx.publish("paid", 1)),
        (Kind.PUBLISH, lambda ctx: ctx.send("order-2", "paid", 1)),
        (Kind.SUBSCRIBE, lambda ctx: ctx.unsubscribe("paid")),
        (Kind.UNSUBSCRIBE, lambda ctx: ctx.subscribe("paid")),
        (Kind.TIMER, lambda ctx: ctx.receive("paid")),
    ],
)
def test_asking_for_something_else_than_history_holds_is_divergence(past: Past, kind: Kind, call: Any) -> None:
    past.asked("paid", kind)
    assert isinstance(past.decide(call).ending, Diverged)


def test_a_timeout_that_was_added_is_divergence_once_something_follows(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> None:
        ctx.receive("paid", timeout=60)
        ctx.run(host.tasks["work"].s())

    past.receive("paid").message("paid", 1).got(0, 1).asked("work")
    assert past.decide(workflow).ending == Diverged(1, "step work", "timer timer")
