"""``ctx.wait``, timers, and the order in which a replay delivers what came in."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import Broken, Outcome, StartTimer, State, Waiting, Wake

from .driver import STARTED_AT
from .host import FakeHost, group
from .past import Past, asks, failure_of, plan, result_of


def first_of_two(host: FakeHost, timeout: float | None = None) -> Any:
    def workflow(ctx: Context) -> Any:
        handles = [ctx.start(host.tasks["work"].s(n)) for n in (0, 1)]
        done, pending = ctx.wait(*handles, timeout=timeout)
        ctx.run(host.tasks["mail"].s())
        return [[handles.index(handle) for handle in done], [handles.index(handle) for handle in pending]]

    return workflow


def test_wait_wants_count_of_its_handles(past: Past, host: FakeHost) -> None:
    assert past.decide(first_of_two(host)).ending == Waiting(1, {0: Wake.COUNT, 1: Wake.COUNT})


def test_wait_tells_what_has_settled_from_what_has_not(past: Past, host: FakeHost) -> None:
    past.asked("work").asked("work").succeeded(1)
    assert asks(past.decide(first_of_two(host))) == ["step mail"]
    past.asked("mail").succeeded(2).succeeded(0)
    assert result_of(past.decide(first_of_two(host))) == [[1], [0]]


def test_wait_does_not_see_what_settled_after_it_was_satisfied(past: Past, host: FakeHost) -> None:
    # both had settled when the pass began: the second is delivered in a later wait, here and on every replay
    past.asked("work").asked("work").succeeded(1).succeeded(0)
    decision = past.decide(first_of_two(host))
    assert decision.records[0].after_order == 1


def test_wait_never_raises_for_a_failure_but_an_unseen_one_fails_the_scope(past: Past, host: FakeHost) -> None:
    past.asked("work").asked("work").failed(0)
    assert asks(past.decide(first_of_two(host))) == ["step mail"]
    past.asked("mail").succeeded(2).succeeded(1)
    assert failure_of(past.decide(first_of_two(host))).failure.message.startswith("step 0 ")


def test_wait_with_a_timeout_ends_by_its_timer_alone(past: Past, host: FakeHost) -> None:
    decision = past.decide(first_of_two(host, timeout=60))
    assert asks(decision) == ["step work", "step work", "timer timer"]
    assert decision.records[2].command == StartTimer("", seconds=60.0)
    assert decision.ending == Waiting(1, {0: Wake.COUNT, 1: Wake.COUNT, 2: Wake.ALONE})
    past.asked("work").asked("work").timer().settled(2, Outcome.SUCCEEDED)
    decision = past.decide(first_of_two(host, timeout=60))
    assert asks(decision) == ["step mail"]
    assert decision.withdrawals == ()


def test_a_timer_ends_a_wait_for_more_than_one_too(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handles = [ctx.start(host.tasks["work"].s(n)) for n in (0, 1)]
        done, pending = ctx.wait(*handles, count=2, timeout=60)
        ctx.set_progress(f"{len(done)} done, {len(pending)} pending")

    past.asked("work").asked("work").timer().settled(2, Outcome.SUCCEEDED)
    assert past.decide(workflow).progress == "0 done, 2 pending"


def test_a_wait_that_is_satisfied_withdraws_its_timer_without_an_event(past: Past, host: FakeHost) -> None:
    past.asked("work").asked("work").timer().succeeded(0)
    decision = past.decide(first_of_two(host, timeout=60))
    (withdrawal,) = decision.withdrawals
    assert (withdrawal.seq, withdrawal.outcome, withdrawal.event) == (2, Outcome.WITHDRAWN, None)
    # and the replay of that history withdraws nothing again
    past.change(2, state=State.SETTLED, outcome=Outcome.WITHDRAWN).asked("mail")
    assert past.decide(first_of_two(host, timeout=60)).withdrawals == ()


def test_a_wait_that_is_satisfied_at_once_records_its_timer_as_withdrawn(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.start(host.tasks["work"].s())
        handle.get()
        ctx.wait(handle, timeout=5)
        return "done"

    decision = past.asked("work").succeeded(0).decide(workflow)
    assert asks(decision) == ["timer timer"]
    assert (decision.records[0].outcome, decision.records[0].event) == (Outcome.WITHDRAWN, None)
    assert result_of(decision) == "done"
    past.timer(state=State.SETTLED, outcome=Outcome.WITHDRAWN)
    assert result_of(past.decide(workflow)) == "done"


def test_a_timer_that_fired_too_late_changes_nothing(past: Past, host: FakeHost) -> None:
    past.asked("work").asked("work").timer().succeeded(0).settled(2, Outcome.SUCCEEDED)
    past.asked("mail", after_order=1).succeeded(3).succeeded(1)
    assert result_of(past.decide(first_of_two(host, timeout=60))) == [[0], [1]]


@pytest.mark.parametrize("count", [0, 3, -1])
def test_wait_refuses_a_count_it_could_never_reach(past: Past, host: FakeHost, count: int) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.wait(host.tasks["work"].s(), host.tasks["work"].s(), count=count)

    assert isinstance(past.decide(workflow).ending, Broken)


def test_a_handle_given_twice_counts_once(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        first, second = ctx.start(host.tasks["work"].s()), ctx.start(host.tasks["work"].s())
        done, _ = ctx.wait(first, first, second, count=2)
        return len(done)

    past.asked("work").asked("work").succeeded(0)
    assert past.decide(workflow).ending == Waiting(1, {1: Wake.COUNT})
    assert result_of(past.succeeded(1).decide(workflow)) == 2


def test_a_group_is_waited_for_with_gather_only(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.wait(ctx.start(group(host.tasks["work"].s(), host.tasks["work"].s())))

    assert isinstance(past.decide(workflow).ending, Broken)


def test_sleep_is_a_timer(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.sleep(timedelta(hours=1))
        return ctx.now().isoformat()

    decision = past.decide(workflow)
    assert decision.records[0].command == StartTimer("", seconds=3600.0)
    past.timer().settled(0, Outcome.SUCCEEDED)
    assert result_of(past.decide(workflow)) == (STARTED_AT + timedelta(minutes=1)).isoformat()


def test_a_timer_is_a_handle_among_others(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        step, timer = ctx.start(host.tasks["work"].s()), ctx.timer(5)
        done, _ = ctx.wait(step, timer)
        return [done == [timer], ctx.gather(step, timer)]

    past.asked("work").timer().settled(1, Outcome.SUCCEEDED)
    assert past.decide(workflow).ending == Waiting(1, {0: Wake.COUNT})
    assert result_of(past.succeeded(0, 3).decide(workflow)) == [True, [3, None]]


def test_a_timer_nobody_waits_for_does_not_hold_the_workflow_back(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.timer(3600)
        return "done"

    assert result_of(past.decide(workflow)) == "done"


def test_events_are_delivered_one_at_a_time_and_only_inside_a_wait(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        handles = [ctx.start(host.tasks["work"].s(n)) for n in range(3)]
        seen = []
        for handle in handles:
            handle.get()
            seen.append([other.ready() for other in handles])
        return seen

    past.asked("work").asked("work").asked("work").succeeded(2).succeeded(0).succeeded(1)
    assert result_of(past.decide(workflow)) == [[True, False, True], [True, True, True], [True, True, True]]


def test_a_group_handle_tells_its_first_failure_and_is_cancelled_as_a_whole(past: Past, host: FakeHost) -> None:
    told = []

    def workflow(ctx: Context) -> Any:
        pair = ctx.start(group(host.tasks["charge"].s(), host.tasks["ship"].s()), compensate=host.tasks["refund"].s())
        ctx.run(host.tasks["reserve"].s())
        told.append(pair.error)
        pair.cancel()

    past.asked("charge", compensation=plan("refund")).asked("ship", compensation=plan("refund")).asked("reserve")
    past.failed(1, OSError, "no van").succeeded(0, "c-1").succeeded(2)
    decision = past.decide(workflow)
    assert isinstance(told[0], OSError)
    assert asks(decision) == ["compensation refund of 0"]
