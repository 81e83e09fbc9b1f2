"""Passes: owed ones, counted ones, refused ones, and what a slow pass is built on."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import State
from orchestrator.store import instances
from orchestrator.store.engine import current_purpose
from orchestrator.store.instances import Status

from .locks import before_statement
from .world import FAILS, Scripted, World, at_once, step, succeeds

Worlds = Callable[..., World]


def buy(ctx: Context) -> Any:
    reservation = ctx.run(step("reserve"), compensate=step("release"))
    return ctx.run(step("charge", reservation), compensate=False)


def changed(ctx: Context) -> Any:
    return ctx.run(step("ship"), compensate=False)


def broken(ctx: Context) -> Any:
    ctx.run(step("reserve"), compensate=step("release"))
    raise TypeError("a typo\0 of \ud800 a deploy")


def owe_blocked(world: World, incarnation: str = "worker-9") -> None:
    with world.store.begin("retry-blocked") as connection:
        instances.owe_blocked_passes(connection, ["buy"], incarnation, world.clock())


# --- owed passes --------------------------------------------------------------------------------------------------


def test_the_first_pass_is_owed_from_the_start_and_made_once(world: Worlds) -> None:
    started = world(buy=buy)
    started.record("buy")
    assert (started.status(), started.instance.pass_due_at) == (Status.PENDING, started.clock())
    for _ in range(2):
        started.advance()
    assert (started.status(), started.instance.pass_due_at) == (Status.RUNNING, None)
    assert len(started.workflows.passes) == 1
    assert started.published == [(0, 1)]


def test_of_8_messages_for_one_pass_one_makes_it(world: Worlds) -> None:
    started = world(buy=buy)
    started.record("buy")
    at_once(*[started.advance] * 8)
    assert started.published == [(0, 1)]
    assert [row.seq for row in started.rows()] == [0]


def test_where_the_workflow_is_not_known_the_pass_is_left_to_others(world: Worlds) -> None:
    started = world(buy=buy)
    started.start("buy")
    row = started.take(0)
    elsewhere = started.coordinator_of("worker-2", workflows=Scripted({}, ()))
    started.end(row, succeeds("r-1"), coordinator=elsewhere)
    assert (started.passes_owed, len(started.rows())) == (1, 1)
    started.advance(elsewhere)
    assert started.instance.pass_attempts == 0
    started.advance()
    assert started.row(1).name == "charge"


def test_passes_that_never_came_back_are_counted_until_the_instance_is_blocked(world: Worlds) -> None:
    started = world(buy=buy)
    started.record("buy")
    crash_passes(started)
    assert (started.status(), started.instance.pass_attempts) == (Status.PENDING, 3)
    started.advance()  # doubled, or redelivered at once: the third pass may be on its way
    assert started.status() is Status.PENDING
    started.clock.advance(started.settings.publish_grace)
    started.advance()
    assert started.status() is Status.BLOCKED
    assert "3 passes were begun and never came back" in (started.instance.blocked or "")
    assert started.rows() == []


def crash_passes(started: World) -> None:
    for _ in range(started.settings.max_pass_attempts):
        started.workflows.during_pass = die
        with pytest.raises(SystemExit):
            started.advance()


def die() -> None:
    raise SystemExit(1)


def test_a_pass_that_came_back_takes_the_count_away(world: Worlds) -> None:
    started = world(buy=buy)
    started.record("buy")
    started.workflows.during_pass = die
    with pytest.raises(SystemExit):
        started.advance()
    started.advance()
    assert (started.status(), started.instance.pass_attempts) == (Status.RUNNING, 0)


# --- the first message --------------------------------------------------------------------------------------------


def recorded(world: Worlds) -> World:
    started = world(buy=buy)
    started.record("buy", grace=started.settings.publish_grace)
    return started


def list_purposes(started: World) -> list[str]:
    """Return what the transactions from now on are for."""
    purposes: list[str] = []
    before_statement(started.store, lambda _statement: purposes.append(current_purpose.get()))
    return purposes


def test_at_a_first_message_the_pass_is_made_without_being_counted_first(world: Worlds) -> None:
    started = recorded(world)
    purposes = list_purposes(started)
    started.begin()
    assert set(purposes) == {"advance"}
    assert (started.status(), started.published) == (Status.RUNNING, [(0, 1)])
    started.begin()  # doubled
    assert (len(started.workflows.passes), started.published) == (1, [(0, 1)])


def test_a_first_pass_that_never_comes_back_is_counted_from_then_on(world: Worlds) -> None:
    started = recorded(world)
    started.workflows.during_pass = die
    with pytest.raises(SystemExit):
        started.begin()
    assert (started.status(), started.instance.pass_attempts, started.rows()) == (Status.PENDING, 0, [])
    crash_passes(started)  # the message comes again
    started.clock.advance(started.settings.publish_grace)
    started.advance()
    assert started.status() is Status.BLOCKED


def ask_again(started: World) -> None:
    """Publish the message of the pass again, as the poller does."""
    with started.store.begin("publish-pass") as connection:
        (owed,) = instances.list_owed_passes(connection, started.clock() + timedelta(days=1), 10)
        assert instances.postpone_pass(connection, owed, started.clock() + timedelta(days=1))


def wait_long(started: World) -> None:
    started.clock.advance(started.settings.publish_grace * 0.6)


@pytest.mark.parametrize("happens", [World.cancel, ask_again, wait_long])
def test_where_anything_has_happened_the_first_pass_is_counted(world: Worlds, happens: Callable[[World], None]) -> None:
    started = recorded(world)
    happens(started)
    purposes = list_purposes(started)
    started.begin()
    assert "count-pass" in purposes
    assert len(started.workflows.passes) == 1


def test_a_first_pass_that_was_counted_with_its_record_is_not_counted_again(world: Worlds) -> None:
    started = recorded(world)
    ask_again(started)
    purposes = list_purposes(started)
    started.begin(is_counted=True)
    assert "count-pass" not in purposes
    assert (started.status(), len(started.workflows.passes)) == (Status.RUNNING, 1)


def test_a_cancellation_within_the_first_pass_is_seen(world: Worlds) -> None:
    started = recorded(world)
    started.workflows.during_pass = started.cancel
    started.begin()
    assert started.instance.cancel_order == 1
    assert (started.status(), len(started.workflows.passes)) == (Status.CANCELLED, 2)


# --- what a pass is built on --------------------------------------------------------------------------------------


def test_a_pass_is_made_again_when_the_instance_changed_while_it_ran(sqlite_world: Worlds) -> None:
    started = sqlite_world(fan=lambda ctx: ctx.wait(*(step("work", n) for n in range(3)), count=2) and "done")
    started.start("fan")
    started.run(0, succeeds())
    first, second = started.take(1), started.take(2)
    started.workflows.passes.clear()
    # outside of the write transaction (SQLite has one for all) another process settles a step: its version tells
    started.workflows.during_pass = lambda: started.end(second, succeeds())
    assert started.end(first, succeeds())
    assert {row.state for row in started.rows()} == {State.SETTLED}
    assert sorted(row.settled_order or 0 for row in started.rows()) == [1, 2, 3]
    assert (started.status(), started.instance.result) == (Status.COMPLETED, '"done"')


def test_a_pass_that_others_overtake_again_and_again_is_left_to_a_message(sqlite_world: Worlds) -> None:
    def fan(ctx: Context) -> str:
        first, *others = [ctx.start(step("work", n)) for n in range(9)]
        first.get()
        ctx.gather(*others)
        return "done"

    started = sqlite_world(fan=fan)
    started.start("fan")
    first, *others = [started.take(seq) for seq in range(9)]

    def overtake() -> None:
        if others:
            started.end(others.pop(), succeeds())
            started.workflows.during_pass = overtake

    started.workflows.during_pass = overtake
    assert started.end(first, succeeds())
    assert started.row(0).state is State.SETTLED  # what it came to does not wait for a moment of rest
    assert (len(others), started.passes_owed) == (6, 1)
    started.workflows.during_pass = None
    started.advance()
    for row in others:
        started.end(row, succeeds())
    started.go_on()
    assert (started.status(), started.instance.result) == (Status.COMPLETED, '"done"')


def test_a_slow_pass_on_sqlite_does_not_stop_the_others(sqlite_world: Worlds) -> None:
    started = sqlite_world(buy=buy)
    started.record("buy")
    started.workflows.during_pass = lambda: started.hire("worker-2")
    started.advance()
    assert started.status() is Status.RUNNING


# --- refusing -----------------------------------------------------------------------------------------------------


def test_code_that_does_not_match_lets_the_others_have_their_turn(world: Worlds) -> None:
    started = world(buy=buy)
    started.start("buy")
    started.hire("worker-2", ["buy"])
    newer = started.coordinator_of("worker-2", workflows=Scripted({"buy": changed}, ("ship",)))
    row = started.take(0)
    started.end(row, succeeds("r-1"), coordinator=newer)
    refused = started.instance
    assert (refused.status, refused.refused) == (Status.RUNNING, '["worker-2"]')
    assert "history has 'step reserve', the workflow asked for 'step ship'" in (refused.blocked or "")
    # the outcome is recorded all the same, and the poller publishes the pass for another
    assert (started.row(0).state, started.passes_owed) == (State.SETTLED, 0)
    assert refused.pass_due_at is not None and refused.pass_due_at > started.clock()
    started.advance(newer)
    assert started.status() is Status.RUNNING
    started.advance()
    assert (started.row(1).name, started.instance.refused, started.instance.blocked) == ("charge", None, None)


def test_an_instance_that_all_have_refused_is_blocked_until_a_new_worker_comes(world: Worlds) -> None:
    started = world(buy=buy)
    started.start("buy")
    started.run(0, succeeds("r-1"))
    started.hire("worker-2", ["buy"])
    row = started.take(1)
    for name in ("worker-1", "worker-2"):
        newer = started.coordinator_of(name, workflows=Scripted({"buy": changed}, ("ship",)))
        if name == "worker-1":
            started.end(row, FAILS, coordinator=newer)
        else:
            started.advance(newer)
    assert started.status() is Status.BLOCKED
    assert json.loads(started.instance.refused or "") == ["worker-1", "worker-2"]
    assert [row.kind for row in started.rows()] == ["step", "step"]
    owe_blocked(started, "worker-2")
    assert started.status() is Status.BLOCKED  # those who have refused do not try again
    started.hire("worker-3", ["buy"])
    owe_blocked(started, "worker-3")
    started.advance()  # worker-1 has refused: it leaves it to others
    assert started.status() is Status.RUNNING
    started.advance(started.coordinator_of("worker-3"))
    assert started.row(2).name == "release"


def test_refusals_are_no_passes_that_never_came_back(world: Worlds) -> None:
    started = world(buy=buy)
    started.start("buy")
    started.lose(started.take(0))
    started.run(0, succeeds("r-1"))
    names = [f"worker-{number}" for number in range(2, 8)]
    for name in names:
        started.hire(name, ["buy"])
    for name in names:
        started.advance(started.coordinator_of(name, workflows=Scripted({"buy": changed}, ("ship",))))
    assert (started.status(), started.instance.pass_attempts) == (Status.RUNNING, 0)
    started.advance()
    assert started.row(1).name == "charge"


def test_a_new_worker_gets_the_full_count_of_tries(world: Worlds) -> None:
    started = world(buy=buy)
    started.hire("worker-2", ["buy"])
    started.record("buy")
    refusing = started.coordinator_of("worker-2", workflows=Scripted({"buy": broken}, ("reserve", "release")))
    started.advance()
    started.lose(started.take(0))
    started.run(0, succeeds("r-1"))
    started.advance(refusing)
    crash_passes(started)
    started.clock.advance(started.settings.publish_grace)
    started.advance()
    assert started.status() is Status.BLOCKED
    started.hire("worker-3", ["buy"])
    owe_blocked(started)
    started.advance(started.coordinator_of("worker-3"))
    assert (started.status(), started.row(1).name) == (Status.RUNNING, "charge")


def test_a_programming_error_blocks_and_undoes_nothing_whatever_it_says(world: Worlds) -> None:
    started = world(buy=broken)
    started.start("buy")
    started.run(0, succeeds("r-1"))
    assert started.status() is Status.BLOCKED
    assert "TypeError: a typo" in (started.instance.blocked or "")
    assert started.states() == ["reserve succeeded"]


def test_progress_and_attributes_are_written_with_the_pass(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        ctx.set_attributes(city="Łódź", gone=None)
        ctx.set_progress("half \0 of \udfff it \N{PARTY POPPER}")
        return ctx.run(step("charge"))

    started = world(buy=workflow)
    started.start("buy")
    with started.store.read("look") as connection:
        assert instances.load_attributes(connection, "order-1") == {"city": "Łódź"}
    assert (started.instance.progress or "").endswith("it \N{PARTY POPPER}")
