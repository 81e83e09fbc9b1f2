"""What a process remembers between passes: what is new is all that it reads, and a function goes on where it stands."""

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
    started.coordinator.memory.most_live = 2
    for name in ("a", "b", "c"):
        started.start("buy", name, instance_id=f"order-{name}")
    assert ended == ["a"]
    for name in ("b", "a"):
        started.at(f"order-{name}").run(0, succeeds())
    assert started.workflows.went_on == 1
    assert ended == ["a", "b", "a"]


def test_where_none_is_kept_a_replay_reads_what_is_new_all_the_same(world: Worlds) -> None:
    started = world(buy=lambda ctx: [ctx.run(step("work", number), compensate=False) for number in range(40)] and None)
    started.coordinator.memory.most_live = 0
    read = count_rows_read(started)
    started.start("buy")
    for seq in range(40):
        started.run(seq, succeeds())
    assert (started.status(), started.workflows.went_on) == (Status.COMPLETED, 0)
    assert max(read) == 1


def count_rows_read(world: World) -> list[int]:
    """Return a list that every pass adds to: how many records it looked at."""
    read: list[int] = []
    load_rows = world.coordinator._load_rows

    def counting(*args: Any) -> Any:
        rows = load_rows(*args)
        read.append(len(rows))
        return rows

    world.coordinator._load_rows = counting  # type: ignore[method-assign, assignment]
    return read


def test_a_long_history_is_not_read_again(world: Worlds) -> None:
    started = world(buy=lambda ctx: [ctx.run(step("work", number), compensate=False) for number in range(40)] and None)
    started.start("buy")
    read = count_rows_read(started)
    for seq in range(40):
        started.run(seq, succeeds())
    assert started.status() is Status.COMPLETED
    assert (len(read), max(read)) == (40, 1)


@pytest.mark.parametrize("most_live", [0, 100])
def test_messages_and_cancellations_come_to_what_is_remembered(world: Worlds, most_live: int) -> None:
    def workflow(ctx: Context) -> list[Any]:
        got = []
        for _ in range(3):
            got.append(ctx.receive("news"))
            ctx.run(step("work"), compensate=step("undo"))
        ctx.receive("more")
        return got

    started = world(buy=workflow)
    started.coordinator.memory.most_live = most_live
    started.start("buy")
    for number in range(3):
        started.send("news", number)
        started.wake()
        started.go_on()
        started.run(2 * number + 1, succeeds())
    started.cancel("changed my mind")
    started.go_on()
    started.run_all(succeeds())
    assert started.status() is Status.CANCELLED
    assert started.states()[-3:] == ["undo succeeded"] * 3


def test_what_an_operator_did_about_a_compensation_is_seen(world: Worlds) -> None:
    def workflow(ctx: Context) -> None:
        try:
            with ctx.saga():
                ctx.run(step("reserve"), compensate=step("release"))
                ctx.run(step("charge"), compensate=False)
        except Exception:
            ctx.run(step("work"), compensate=False)

    started = world(buy=workflow)
    started.start("buy")
    started.run(0, succeeds("r-0"))
    started.run(1, FAILS)
    started.run(2, FAILS)  # release
    before = started.instance.not_undone
    started.operator.skip_compensation(started.instance, 2, "sent by post")
    started.run(3, succeeds())
    assert (started.status(), bool(before), started.instance.not_undone) == (Status.COMPLETED, True, None)


def test_what_is_remembered_is_bounded_by_its_size(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.runtime.remembered.MOST_CHARACTERS", 1000)
    started = world(buy=buy)
    read = count_rows_read(started)
    for name in ("a", "b"):
        started.start("buy", instance_id=f"order-{name}")
        started.run(0, succeeds("x" * 600))
    read.clear()
    for name in ("b", "a"):
        started.at(f"order-{name}").run(1, succeeds("y"))
    assert read == [1, 2]  # of the older one all is read again
