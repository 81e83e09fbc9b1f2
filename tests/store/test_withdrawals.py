"""Withdrawing what has not begun: never what a worker claimed between the pass's read and its commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import Kind, Outcome, State
from orchestrator.store.instances import Status

from .locks import before_statement
from .world import DOUBTS, FAILS, World, step, succeeds

Worlds = Callable[..., World]


def two_at_once(ctx: Context) -> Any:
    ctx.start(step("reserve"), compensate=step("release"))
    return ctx.run(step("charge"), compensate=False)


def test_a_step_that_never_began_is_withdrawn_and_not_undone(world: Worlds) -> None:
    started = world(buy=two_at_once)
    started.start("buy")
    started.run(1, FAILS)
    assert started.states() == ["reserve withdrawn", "charge failed"]
    assert started.status() is Status.FAILED
    assert started.claim(0, dispatch=1) is None


def test_a_claim_that_slips_into_the_pass_has_it_decided_again(world: Worlds) -> None:
    started = world(buy=two_at_once)
    started.start("buy")
    failing = started.take(1)
    slipped: list[Any] = []
    started.workflows.during_pass = lambda: slipped.append(started.claim(0, dispatch=1))
    started.workflows.passes.clear()
    started.end(failing, FAILS)
    assert slipped[0] is not None
    assert len(started.workflows.passes) == 2
    # its attempt is drained: whatever it does will be undone
    assert started.states() == ["reserve running", "charge failed"]
    assert started.row(0).is_draining
    assert started.status() is Status.COMPENSATING
    started.end(slipped[0], succeeds("r-1"))
    undoing = started.run(2, succeeds())
    assert (undoing.name, undoing.arguments) == ("release", '{"args":["r-1"],"kwargs":{}}')
    assert started.status() is Status.COMPENSATED


def test_a_claim_that_slips_into_a_timeout_keeps_its_claim(world: Worlds) -> None:
    started = world(buy=lambda ctx: ctx.run(step("charge"), timeout=60, compensate=step("refund")))
    started.start("buy")
    started.clock.advance(60)
    slipped: list[Any] = []

    def claim_once(sql: str) -> None:
        if not slipped and "UPDATE orchestrator_history" in sql:
            slipped.append(None)
            slipped[0] = started.claim(0, dispatch=1)

    if started.store.is_sqlite:
        pytest.skip("who writes keeps all others out")
    before_statement(started.store, claim_once)
    started.time_out(0)  # it reads again, and decides again
    assert slipped[0] is not None
    assert started.row(0).state is State.TIMED_OUT
    assert started.end(slipped[0], succeeds())


def test_a_held_item_that_is_let_go_and_withdrawn_at_once_is_not_published(world: Worlds) -> None:
    def workflow(ctx: Context) -> None:
        ctx.map(step("work"), range(3), concurrency=1, compensate=False)

    started = world(map=workflow)
    started.start("map")
    started.run(0, FAILS)
    assert started.states() == ["work failed", "work withdrawn", "work withdrawn"]
    assert started.published == [(0, 1)]


@pytest.mark.parametrize("ended", [succeeds("r-1"), DOUBTS], ids=["succeeds", "doubts"])
def test_what_is_in_flight_is_drained_before_anything_is_undone(world: Worlds, ended: Any) -> None:
    started = world(buy=two_at_once)
    started.start("buy")
    running = started.take(0)
    started.run(1, FAILS)
    assert [row.kind for row in started.rows()] == [Kind.STEP, Kind.STEP]
    assert started.row(0).is_draining
    started.end(running, ended)
    assert started.row(2).name == "release"


def test_what_is_lost_while_it_drains_is_unknown_at_once(world: Worlds) -> None:
    started = world(buy=two_at_once)
    started.start("buy")
    running = started.take(0)
    started.run(1, FAILS)
    started.lose(running)
    assert (started.row(0).outcome, started.row(0).lost) == (Outcome.UNKNOWN, 1)
    # after a lost attempt the pass is a message of its own
    assert started.passes_owed == 1
    started.advance()
    assert started.row(2).arguments == '{"args":[null],"kwargs":{}}'


def test_what_drains_is_not_tried_again(world: Worlds) -> None:
    started = world(buy=two_at_once)
    started.start("buy")
    running = started.take(0)
    started.run(1, FAILS)
    released, outbox = started.coordinator.release(
        running.key, running.attempt, delay_seconds=0, failure=None, values={}
    )
    assert (released, outbox.steps) == (False, [])
    assert started.row(0).state is State.RUNNING
    assert started.end(running, FAILS)
    assert started.status() is Status.FAILED


def test_a_step_that_lost_an_attempt_is_unknown_when_it_is_withdrawn(world: Worlds) -> None:
    started = world(buy=two_at_once)
    started.start("buy")
    started.lose(started.take(0))
    assert started.row(0).state is State.SCHEDULED
    started.run(1, FAILS)
    assert started.row(0).outcome is Outcome.UNKNOWN
    assert started.row(2).undoes == 0
