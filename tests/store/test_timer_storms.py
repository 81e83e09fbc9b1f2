"""Very many timers that are due at the same instant: how long after the first the last of them fires."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select, update

from orchestrator.core.context import Context
from orchestrator.runtime.timers import MOST_BATCHES
from orchestrator.store.tables import history, instance

from .crowds import measure_firing, multiply
from .world import World

Worlds = Callable[..., World]
Storm = Callable[[Worlds, int], World]

#: What is promised of 10,000.
PROMISED_SECONDS = 5.0


def nap(ctx: Context) -> None:
    ctx.sleep(60)


def of_many_instances(world: Worlds, count: int) -> World:
    """One timer each of so many instances."""
    started = world(nap=nap)
    started.start("nap")
    multiply(started.store, "order-1", count)
    return started


def of_one_instance(world: Worlds, count: int) -> World:
    """All of one instance, which waits for all of them."""

    def gather(ctx: Context) -> None:
        ctx.gather(*(ctx.timer(60) for _ in range(count)))

    started = world(gather=gather)
    started.start("gather")
    return started


def of_nothing_alike(world: Worlds, count: int) -> World:
    """One timer each of instances that have come to different points: no two are written by one statement."""
    started = of_many_instances(world, count)
    with started.store.begin("scatter") as connection:
        names = sorted(connection.execute(select(instance.c.id)).scalars())
        for number, name in enumerate(names):
            own = history.c.instance_id == name
            connection.execute(update(history).where(own).values(seq=number % 97))
            connection.execute(update(instance).where(instance.c.id == name).values(next_order=1 + 2 * number))
    return started


def run_clock(world: World) -> None:
    """Let the clock run from the instant at which all are due."""
    world.clock.advance(60)
    due_at, began = world.clock(), time.monotonic()

    def now() -> datetime:
        return due_at + timedelta(seconds=time.monotonic() - began)

    world.coordinator.clock = now


storms = pytest.mark.parametrize("storm", [of_many_instances, of_one_instance, of_nothing_alike])


def fire(world: World) -> float:
    """Fire what is due, as much as one poll takes on; return the seconds that it took."""
    began = time.monotonic()
    world.fire_timers()
    return time.monotonic() - began


@storms
def test_a_thousand_timers_fire_much_faster_than_one_by_one(
    world: Worlds, storm: Storm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are measured on this machine, as busy as it is."""
    started = storm(world, 1000)
    run_clock(started)
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.runtime.timers.BATCH", 1)
        seconds_each = fire(started) / MOST_BATCHES
    rest = 1000 - MOST_BATCHES
    took = fire(started)
    assert measure_firing(started.store)[0] == 1000
    assert took < rest * seconds_each / 3, f"{took:.2f} s, one by one {rest * seconds_each:.2f} s"


@pytest.mark.storm
@storms
def test_ten_thousand_timers_fire_within_the_promised_time(world: Worlds, storm: Storm) -> None:
    started = storm(world, 10_000)
    run_clock(started)
    fire(started)
    count, spread = measure_firing(started.store)
    print(f"{started.store.backend}, {storm.__name__}: {spread.total_seconds():.2f} s")
    assert count == 10_000
    assert spread.total_seconds() < PROMISED_SECONDS
