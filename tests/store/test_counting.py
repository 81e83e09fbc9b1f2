"""Counting what a wait is for: one pass when the last of it has settled, and no settlement lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.core.records import State
from orchestrator.store.engine import Store
from orchestrator.store.instances import Status

from .locks import before_commit, before_statement, count_waiting
from .world import FAILS, World, at_once, join, step, succeeds, wait_until

Worlds = Callable[..., World]


def gather(count: int) -> Callable[[Context], Any]:
    return lambda ctx: ctx.gather(*(step("work", number) for number in range(count)))


def test_of_8_that_settle_at_once_exactly_one_makes_the_pass(
    world: Worlds, store_url: str, open_store: Callable[..., Store]
) -> None:
    started = world(fan=gather(8))
    started.start("fan")
    rows = [started.take(seq) for seq in range(8)]
    # processes of their own: nothing is shared but the database
    coordinators = [started.coordinator_of("worker-1", open_store(store_url)) for _ in rows]
    for coordinator in coordinators:
        with coordinator.store.read("warm-up"):
            pass
    started.workflows.passes.clear()
    held = at_once(
        *(
            lambda row=row, own=own: started.end(row, succeeds(row.seq), coordinator=own)
            for row, own in zip(rows, coordinators, strict=True)
        )
    )
    assert held == [True] * 8
    assert (started.status(), started.instance.result) == (Status.COMPLETED, "[0,1,2,3,4,5,6,7]")
    assert sorted(row.settled_order or 0 for row in started.rows()) == list(range(1, 9))
    # a pass that is rolled back for a conflict (SQLite, outside of the lock) is made again; else there is just one
    assert len(started.workflows.passes) == 1 or started.store.is_sqlite


def test_whoever_waits_for_the_lock_sees_what_the_one_before_it_committed(
    world: Worlds, store_url: str, open_store: Callable[..., Store]
) -> None:
    started = world(fan=gather(2))
    started.start("fan")
    rows = [started.take(seq) for seq in range(2)]
    second_store = open_store(store_url)
    second = started.coordinator_of("worker-1", second_store)
    asks = threading.Event()
    before_statement(second_store, lambda sql: asks.set() if "FOR UPDATE" in sql or "IMMEDIATE" in sql else None)
    follower = threading.Thread(target=lambda: started.end(rows[1], succeeds(1), coordinator=second), daemon=True)

    def let_the_second_come() -> None:
        asks.clear()
        follower.start()
        wait_until(asks.is_set, "the second asks for the lock")
        if not started.store.is_sqlite:
            wait_until(lambda: count_waiting(started.store) > 0, "the second waits for the lock")

    before_commit(started.store, let_the_second_come, "settle")
    started.end(rows[0], succeeds(0))
    join([follower])
    assert (started.status(), started.instance.result) == (Status.COMPLETED, "[0,1]")


def test_only_the_last_of_a_gather_replays(world: Worlds) -> None:
    started = world(fan=gather(5))
    started.start("fan")
    for seq in (3, 0, 4, 1):
        started.run(seq, succeeds(seq))
        assert len(started.workflows.passes) == 1
    assert started.instance.waiting == 1
    started.run(2, succeeds(2))
    assert len(started.workflows.passes) == 2
    assert started.instance.result == "[0,1,2,3,4]"


def test_a_step_that_timed_out_and_ends_later_is_counted_once(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        handles = [ctx.start(step("work"), timeout=60, compensate=False), ctx.start(step("work"), compensate=False)]
        ctx.gather(*handles, return_exceptions=True)

    started = world(fan=workflow)
    started.start("fan")
    late, running = started.take(0), started.take(1)
    started.clock.advance(60)
    started.time_out(0)
    assert started.instance.waiting == 1
    started.end(late, succeeds())
    assert (started.instance.waiting, len(started.workflows.passes)) == (1, 1)
    started.end(running, succeeds())
    assert started.status() is Status.COMPLETED


def test_what_nobody_waits_for_yet_is_counted_by_nobody(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        early, late = ctx.start(step("work", 1)), ctx.start(step("work", 2))
        first = early.get()
        return [first, late.get()]

    started = world(two=workflow)
    started.start("two")
    started.run(1, succeeds("late"))
    assert (len(started.workflows.passes), started.instance.waiting) == (1, 1)
    started.run(0, succeeds("early"))
    assert started.instance.result == '["early","late"]'


def test_the_first_to_come_ends_a_wait_for_one(world: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        handles = [ctx.start(step("work", number)) for number in range(3)]
        done, pending = ctx.wait(*handles)
        ctx.gather(*pending)
        return [handles.index(handle) for handle in done]

    started = world(race=workflow)
    started.start("race")
    started.run(1, succeeds())
    assert started.instance.waiting == 2
    started.run(0, succeeds())
    started.run(2, succeeds())
    assert started.instance.result == "[1]"


# --- maps ---------------------------------------------------------------------------------------------------------


def lanes(concurrency: int, count: int, on_failure: Any = "stop", **options: Any) -> Callable[[Context], Any]:
    def workflow(ctx: Context) -> Any:
        results = ctx.map(
            step("work"), range(count), concurrency=concurrency, on_failure=on_failure, compensate=False, **options
        )
        return [result if isinstance(result, int) else None for result in results]

    return workflow


def count_open(world: World) -> int:
    return sum(row.state in (State.SCHEDULED, State.RUNNING) for row in world.rows())


def test_a_map_lets_the_next_item_go_in_the_transaction_that_settles_one(world: Worlds) -> None:
    started = world(map=lanes(2, 5))
    started.start("map")
    assert started.published == [(0, 1), (1, 1)]
    for settled, follower in ((1, 2), (0, 3), (2, 4)):
        started.run(settled, succeeds(settled))
        assert started.published[-1] == (follower, 1)
        assert count_open(started) == 2
    assert len(started.workflows.passes) == 1
    started.run(3, succeeds(3))
    started.run(4, succeeds(4))
    assert started.instance.result == "[0,1,2,3,4]"
    assert len(started.workflows.passes) == 2


def test_4_that_settle_at_once_let_4_others_go(world: Worlds, store_url: str, open_store: Callable[..., Store]) -> None:
    started = world(map=lanes(4, 12))
    started.start("map")
    for _ in range(3):
        rows = [started.take(row.seq) for row in started.rows() if row.state is State.SCHEDULED]
        assert len(rows) == 4
        at_once(*(lambda row=row: started.end(row, succeeds(row.seq)) for row in rows))
    assert started.status() is Status.COMPLETED


def test_a_failed_item_stops_the_map_and_withdraws_what_was_held(world: Worlds) -> None:
    started = world(map=lanes(2, 4))
    started.start("map")
    running = started.take(1)
    started.run(0, FAILS)
    assert started.states() == ["work failed", "work running", "work withdrawn", "work withdrawn"]
    started.end(running, succeeds(1))
    assert started.status() is Status.FAILED


def test_after_a_failure_nothing_is_let_go_while_the_pass_is_owed(world: Worlds) -> None:
    started = world(map=lanes(2, 4))
    started.start("map")
    running, failing = started.take(0), started.take(1)
    elsewhere = started.coordinator_of("worker-2", workflows=type(started.workflows)({}, ()))
    started.end(failing, FAILS, coordinator=elsewhere)
    started.end(running, succeeds(0), coordinator=elsewhere)
    assert started.states() == ["work succeeded", "work failed", "work held", "work held"]
    started.advance()
    assert started.states() == ["work succeeded", "work failed", "work withdrawn", "work withdrawn"]


def test_a_collecting_map_goes_on_after_failures(world: Worlds) -> None:
    started = world(map=lanes(1, 3, "collect"))
    started.start("map")
    started.run(0, FAILS)
    started.run(1, succeeds(1))
    started.run(2, FAILS)
    assert started.instance.result == "[null,1,null]"


def test_an_item_that_times_out_and_ends_later_lets_one_other_go(world: Worlds) -> None:
    started = world(map=lanes(1, 4, "collect", timeout=60))
    started.start("map")
    running = started.take(0)
    started.clock.advance(60)
    started.time_out(0)
    assert started.states() == ["work unknown", "work scheduled", "work held", "work held"]
    started.end(running, succeeds(0))
    assert started.states() == ["work unknown", "work scheduled", "work held", "work held"]


@pytest.mark.parametrize("width", [1, 2])
def test_a_map_is_undone_as_many_at_a_time(world: Worlds, width: int) -> None:
    def workflow(ctx: Context) -> None:
        ctx.map(step("work"), range(3), concurrency=width, compensate=step("undo"))
        ctx.run(step("charge"))

    started = world(map=workflow)
    started.start("map")
    for seq in range(3):
        started.run(seq, succeeds(seq))
    started.run(3, FAILS)
    for seq, order in ((4, 2), (5, 1), (6, 0)):
        assert count_open(started) == min(width, 7 - seq)
        assert started.run(seq, succeeds()).undoes == order
    assert started.status() is Status.COMPENSATED
