"""Sleeping until an instant, and timers as handles; durations are tried in ``test_waiting.py``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import Outcome, Settled, StartTimer, State, Waiting, Wake

from .driver import STARTED_AT
from .host import FakeHost
from .past import Past, asks, refusal_of, result_of, stops, waits_for

NOON = STARTED_AT + timedelta(hours=1)


def until(instant: Any) -> Any:
    def workflow(ctx: Context) -> Any:
        ctx.sleep_until(instant)
        return ctx.now().isoformat()

    return workflow


def test_sleeping_until_an_instant_is_a_timer_for_it(past: Past) -> None:
    decision = past.decide(until(NOON))
    assert decision.records[0].command == StartTimer("", at=NOON)
    assert decision.ending == Waiting(1, {0: Wake.COUNT})


def test_an_instant_of_another_zone_is_recorded_in_utc(past: Past) -> None:
    command: Any = past.decide(until(NOON.astimezone(timezone(timedelta(hours=5))))).records[0].command
    assert (command.at, command.at.tzinfo) == (NOON, UTC)


@pytest.mark.parametrize("early", [timedelta(0), timedelta(days=1)])
def test_an_instant_that_has_passed_fires_as_it_is_recorded(past: Past, early: timedelta) -> None:
    decision = past.decide(until(STARTED_AT - early))
    (new,) = decision.records
    assert (new.outcome, new.event, asks(decision)) == (Outcome.SUCCEEDED, None, ["timer timer"])
    assert result_of(decision) == STARTED_AT.isoformat()
    past.timer(state=State.SETTLED, outcome=Outcome.SUCCEEDED)
    assert result_of(past.decide(until(STARTED_AT - early))) == STARTED_AT.isoformat()


def test_whether_an_instant_has_passed_is_told_by_what_was_delivered_not_by_the_clock(
    past: Past, host: FakeHost
) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.start(host.tasks["mail"].s())
        ctx.run(host.tasks["work"].s())
        ctx.sleep_until(STARTED_AT + timedelta(minutes=2))

    # the mail was sent at the third minute, but that is not delivered before the sleep begins
    past.asked("mail").asked("work").succeeded(1).succeeded(0)
    past.inbox[1] = Settled(2, STARTED_AT + timedelta(minutes=3), 0)
    assert waits_for(past.decide(workflow)) == [2]


@pytest.mark.parametrize("instant", [STARTED_AT - timedelta(days=1), NOON])
def test_a_deploy_that_changes_the_instant_changes_no_timer_that_was_recorded(past: Past, instant: datetime) -> None:
    waiting = past.timer().decide(until(instant))
    assert (waits_for(waiting), waiting.records) == ([0], ())
    assert result_of(past.fired(0).decide(until(instant))) == (STARTED_AT + timedelta(minutes=1)).isoformat()


@pytest.mark.parametrize("instant", [STARTED_AT - timedelta(days=1), NOON])
def test_a_deploy_that_changes_the_instant_does_not_wait_for_a_timer_that_fired_at_once(
    past: Past, instant: datetime
) -> None:
    past.timer(state=State.SETTLED, outcome=Outcome.SUCCEEDED).message("a")
    assert result_of(past.decide(until(instant))) == STARTED_AT.isoformat()


@pytest.mark.parametrize("instant", [datetime(2024, 5, 1, 13), "noon", None])  # noqa: DTZ001
def test_an_instant_without_a_time_zone_is_refused(past: Past, instant: Any) -> None:
    assert "time zone" in refusal_of(past.decide(until(instant)))


@pytest.mark.parametrize("until", [datetime(2024, 5, 1, 13), -1, float("nan"), "60"])  # noqa: DTZ001
def test_a_timer_refuses_what_no_clock_can_show(past: Past, until: Any) -> None:
    assert refusal_of(past.decide(lambda ctx: ctx.timer(until)))


def test_a_timer_for_an_instant_is_a_handle_among_others(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        step, timer = ctx.start(host.tasks["work"].s()), ctx.timer(NOON)
        done, _ = ctx.wait(step, timer)
        return [done == [timer], timer.ready(), step.ready()]

    assert past.decide(workflow).ending == Waiting(1, {0: Wake.COUNT, 1: Wake.COUNT})
    past.asked("work").timer().fired(1)
    assert waits_for(past.decide(workflow)) == [0]
    assert result_of(past.succeeded(0).decide(workflow)) == [True, True, False]


def test_a_timer_for_an_instant_that_has_passed_is_ready_at_once(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        step, timer = host.tasks["work"].s(), ctx.timer(STARTED_AT)
        return [timer.ready(), timer.get(), [len(part) for part in ctx.wait(step, timer)]]

    decision = past.decide(workflow)
    assert (asks(decision), waits_for(decision)) == (["timer timer", "step work"], [1])
    past.timer(state=State.SETTLED, outcome=Outcome.SUCCEEDED).asked("work").succeeded(1)
    assert result_of(past.decide(workflow)) == [True, None, [1, 1]]


def test_a_timer_that_is_cancelled_is_withdrawn_once_and_without_an_event(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        timer = ctx.timer(NOON)
        ctx.run(host.tasks["work"].s())
        timer.cancel()
        timer.cancel()
        return timer.ready()

    past.timer().asked("work").succeeded(1)
    decision = past.decide(workflow)
    assert (stops(decision), result_of(decision)) == ([0], True)
    assert stops(past.stopped(0).decide(workflow)) == []


def test_a_timer_that_is_cancelled_is_no_failure_for_a_gather(past: Past) -> None:
    def workflow(ctx: Context) -> Any:
        timer = ctx.timer(60)
        timer.cancel()
        return [timer.get(), ctx.gather(timer), ctx.gather(timer, return_exceptions=True)]

    assert result_of(past.decide(workflow)) == [None, [None], [None]]


def test_a_timer_that_fired_before_it_was_cancelled_is_left_as_it_is(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        timer = ctx.timer(60)
        ctx.run(host.tasks["work"].s())
        timer.cancel()

    # fired, but after what the workflow waited for: the timer has settled in the store, and not yet for the workflow
    past.timer().asked("work").succeeded(1).fired(0)
    assert stops(past.decide(workflow)) == []
