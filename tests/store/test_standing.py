"""Passes that go on from where the one before stood: what a process keeps, and when it lets go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.core.context import Context
from orchestrator.store.engine import Store
from orchestrator.store.instances import Status

from .world import FAILS, World, step, succeeds

Worlds = Callable[..., World]


def buy(ctx: Context) -> Any:
    reservation = ctx.run(step("reserve"), compensate=step("release"))
    payment = ctx.run(step("charge", reservation), compensate=step("refund"))
    return ctx.run(step("ship", payment), compensate=False)


def test_the_next_pass_goes_on_and_asks_for_what_follows(world: Worlds) -> None:
    started = world(buy=buy)
    started.start("buy")
    for seq in range(3):
        started.run(seq, succeeds(f"r-{seq}"))
    assert (started.status(), started.result()) == (Status.COMPLETED, "r-2")
    assert (len(started.workflows.passes), started.workflows.went_on) == (4, 3)


def test_what_fails_is_undone_from_where_it_stands(world: Worlds) -> None:
    started = world(buy=buy)
    started.start("buy")
    started.run(0, succeeds("r-0"))
    started.run(1, succeeds("r-1"))
    started.run(2, FAILS)
    started.run_all(succeeds())
    assert started.status() is Status.COMPENSATED
    assert started.states()[3:] == ["refund succeeded", "release succeeded"]
    assert started.workflows.went_on == len(started.workflows.passes) - 1


def test_processes_that_make_passes_in_turn_each_catch_up(
    world: Worlds, store_url: str, open_store: Callable[..., Store]
) -> None:
    started = world(buy=lambda ctx: [ctx.run(step("work", number), compensate=step("undo")) for number in range(9)])
    other = started.elsewhere(open_store(store_url))
    started.start("buy")
    for seq in range(9):
        (other if seq % 3 else started).run(seq, succeeds(seq))
    assert started.result() == list(range(9))
    # each of the two has begun from the top once
    assert started.workflows.went_on == len(started.workflows.passes) - 2


def test_a_pass_that_was_rolled_back_is_replayed(sqlite_world: Worlds) -> None:
    started = sqlite_world(fan=lambda ctx: ctx.wait(*(step("work", n) for n in range(3)), count=2) and "done")
    started.start("fan")
    started.run(0, succeeds())
    first, second = started.take(1), started.take(2)
    started.workflows.during_pass = lambda: started.end(second, succeeds())
    assert started.end(first, succeeds())
    assert started.result() == "done"


def test_what_an_interrupted_pass_has_done_to_the_function_is_forgotten(world: Worlds) -> None:
    ended: list[str] = []

    def workflow(ctx: Context) -> str:
        try:
            ctx.run(step("reserve"), compensate=False)
            ctx.run(step("charge"), compensate=False)
        finally:
            ended.append("let go")
        return "done"

    started = world(buy=workflow)
    started.start("buy")
    row = started.take(0)
    assert ended == []  # it stands

    def die() -> None:
        raise SystemExit(1)

    started.workflows.during_pass = die
    with pytest.raises(SystemExit):
        started.end(row, succeeds())
    assert ended == ["let go"]
    assert started.end(row, succeeds())
    started.run(1, succeeds())
    assert started.result() == "done"


def test_as_many_are_kept_as_the_setting_says_and_the_oldest_is_let_go(world: Worlds) -> None:
    ended: list[str] = []

    def workflow(ctx: Context, name: str) -> None:
        try:
            ctx.run(step("work"), compensate=False)
        finally:
            ended.append(name)

    started = world(buy=workflow)
    started.coordinator.live.most = 2
    for name in ("a", "b", "c"):
        started.start("buy", name, instance_id=f"order-{name}")
    assert ended == ["a"]
    for name in ("b", "a"):
        started.at(f"order-{name}").run(0, succeeds())
    assert started.workflows.went_on == 1
    assert ended == ["a", "b", "a"]


def test_none_is_kept_where_the_setting_says_so(world: Worlds) -> None:
    started = world(buy=buy)
    started.coordinator.live.most = 0
    started.start("buy")
    started.run_all()
    assert (started.status(), started.workflows.went_on) == (Status.COMPLETED, 0)


def test_a_long_history_is_not_read_again(world: Worlds) -> None:
    started = world(buy=lambda ctx: [ctx.run(step("work", number), compensate=False) for number in range(40)] and None)
    started.start("buy")
    read: list[int] = []
    go_on = started.workflows.go_on

    def counting(live: Any, instance: Any, rows: list[Any], mail: Any, after_order: int) -> Any:
        read.append(len(rows))
        return go_on(live, instance, rows, mail, after_order)

    started.workflows.go_on = counting  # type: ignore[method-assign]
    for seq in range(40):
        started.run(seq, succeeds())
    assert started.status() is Status.COMPLETED
    assert (len(read), max(read)) == (40, 1)
