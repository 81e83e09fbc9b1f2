"""``ctx.map``: lanes, stopping at the first failure, collecting, and undoing as many at a time."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import Broken, Outcome, RunCompensation, ScheduleStep, State, Waiting, Wake

from .driver import FAILS, SUCCEEDS, Fate, Shell
from .host import FakeHost
from .past import Past, asks, failure_of, plan, result_of


def mapping(host: FakeHost, items: int = 4, **settings: Any) -> Any:
    def workflow(ctx: Context) -> Any:
        results = ctx.map(host.tasks["work"], range(items), compensate=host.tasks["undo"].s(), **settings)
        return ["failed" if isinstance(result, Exception) else result for result in results]

    return workflow


def mapped(past: Past, items: int = 4) -> Past:
    for _ in range(items):
        past.asked("work", compensation=plan("undo"))
    return past


def test_a_map_gives_each_step_its_item_first(past: Past, host: FakeHost) -> None:
    decision = past.decide(lambda ctx: ctx.map(host.tasks["work"].s("rest", key=1), ["a", "b"]))
    commands = [new.command for new in decision.records]
    assert all(isinstance(command, ScheduleStep) for command in commands)
    assert [getattr(command, "arguments", "") for command in commands] == [
        '{"args":["a","rest"],"kwargs":{"key":1}}',
        '{"args":["b","rest"],"kwargs":{"key":1}}',
    ]


def test_a_map_holds_back_all_but_its_concurrency_in_one_lane(past: Past, host: FakeHost) -> None:
    decision = (
        past.asked("mail")
        .succeeded(0)
        .decide(lambda ctx: (ctx.run(host.tasks["mail"]), mapping(host, concurrency=2)(ctx)))
    )
    commands = [new.command for new in decision.records]
    assert [(getattr(c, "lane", None), getattr(c, "held", None)) for c in commands] == [
        (1, False),
        (1, False),
        (1, True),
        (1, True),
    ]


@pytest.mark.parametrize("concurrency", [None, 4, 9])
def test_a_map_within_its_concurrency_needs_no_lane(past: Past, host: FakeHost, concurrency: int | None) -> None:
    commands = [new.command for new in past.decide(mapping(host, concurrency=concurrency)).records]
    assert [(getattr(c, "lane", 0), getattr(c, "held", 0)) for c in commands] == [(None, False)] * 4


def test_a_map_of_nothing_returns_at_once(past: Past, host: FakeHost) -> None:
    assert result_of(past.decide(mapping(host, items=0, concurrency=1))) == []


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"on_failure": "ignore"}])
def test_a_map_refuses_settings_it_does_not_know(past: Past, host: FakeHost, settings: dict[str, Any]) -> None:
    assert isinstance(past.decide(mapping(host, **settings)).ending, Broken)


def test_a_map_that_stops_is_woken_by_a_failure_and_one_that_collects_is_not(past: Past, host: FakeHost) -> None:
    assert past.decide(mapping(host)).ending == Waiting(4, dict.fromkeys(range(4), Wake.FAILURE))
    assert past.decide(mapping(host, on_failure="collect")).ending == Waiting(4, dict.fromkeys(range(4), Wake.COUNT))


def test_the_first_failure_withdraws_what_has_not_begun_and_waits_for_what_has(past: Past, host: FakeHost) -> None:
    workflow = mapping(host, concurrency=2)
    mapped(past).change(2, state=State.HELD).change(3, state=State.HELD).running(1).failed(0)
    decision = past.decide(workflow)
    assert [(entry.seq, entry.outcome) for entry in decision.withdrawals] == [
        (2, Outcome.WITHDRAWN),
        (3, Outcome.WITHDRAWN),
    ]
    assert [entry.event.order for entry in decision.withdrawals if entry.event] == [2, 3]
    assert decision.ending == Waiting(1, {1: Wake.CLOSED}, draining=(1,))
    past.withdrawn(2).withdrawn(3).succeeded(1, "one")
    assert asks(past.decide(workflow)) == ["compensation undo of 1"]
    past.undoing(1, "undo").succeeded(4)
    assert failure_of(past.decide(workflow)).failure.message.startswith("step 0 ")


def test_a_map_that_collects_returns_failures_in_place(past: Past, host: FakeHost) -> None:
    mapped(past, 3).failed(1).succeeded(0, "a").succeeded(2, "c")
    assert result_of(past.decide(mapping(host, 3, on_failure="collect"))) == ["a", "failed", "c"]


def test_a_caught_map_failure_undoes_nothing_by_itself(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            mapping(host, 2)(ctx)
        except errors.StepFailed:
            return "caught"

    assert result_of(mapped(past, 2).succeeded(1).failed(0).decide(workflow)) == "caught"


def test_a_map_is_undone_concurrency_at_a_time_last_started_first(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        mapping(host, 5, concurrency=2)(ctx)
        raise ValueError

    mapped(past, 5)
    for seq in range(5):
        past.succeeded(seq)
    decision = past.decide(workflow)
    commands = [new.command for new in decision.records]
    assert all(isinstance(command, RunCompensation) for command in commands)
    assert [(c.undoes, getattr(c, "lane", None), getattr(c, "held", None)) for c in commands] == [
        (4, 5, False),
        (3, 5, False),
        (2, 5, True),
        (1, 5, True),
        (0, 5, True),
    ]
    assert decision.ending == Waiting(5, dict.fromkeys(range(5, 10), Wake.COUNT), is_compensating=True)


def test_a_map_that_passed_outward_is_still_undone_concurrency_at_a_time(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        with ctx.saga():
            mapping(host, 3, concurrency=2)(ctx)
        raise ValueError

    for _ in range(3):
        past.asked("work", scope="1.", compensation=plan("undo"))
    decision = past.succeeded(0).succeeded(1).succeeded(2).decide(workflow)
    assert [getattr(new.command, "held", None) for new in decision.records] == [False, False, True]


def test_all_the_failures_of_a_stopped_map_count_as_seen(past: Past, host: FakeHost) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            mapping(host, 2)(ctx)
        except errors.StepFailed as failed:
            return failed.seq

    # the second fails while the map drains; the one with the lowest seq is raised
    assert result_of(mapped(past, 2).failed(1).failed(0).decide(workflow)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_map_of_many_takes_two_passes(host: FakeHost, seed: int) -> None:
    shell = Shell(mapping(host, 60, concurrency=7), host, seed=seed)
    shell.run()
    assert len(shell.decisions) == 2


@pytest.mark.parametrize("seed", range(20))
def test_a_lane_moves_on_while_it_is_undone_though_some_of_it_fails(host: FakeHost, seed: int) -> None:
    def workflow(ctx: Context) -> Any:
        mapping(host, 8, concurrency=3)(ctx)
        raise ValueError

    def fate_of(command: Any, undone: Any) -> Fate:
        return FAILS if undone is not None and undone.record.seq % 2 else SUCCEEDS

    decision = Shell(workflow, host, fate_of, seed).run()
    assert [entry.undoes for entry in decision.not_undone] == [7, 5, 3, 1]
