"""Instances that are to begin later: whatever rings the bell for them before."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta

from orchestrator.core.context import Context
from orchestrator.store import instances
from orchestrator.store.instances import Status

from .world import World, step, succeeds

Worlds = Callable[..., World]

GRACE = timedelta(seconds=30)


def buy(ctx: Context) -> None:
    ctx.run(step("reserve"))


def record(world: World, begins_at: datetime) -> None:
    with world.store.begin("start") as connection:
        assert instances.insert_instance(
            connection,
            instance_id=world.instance_id,
            generation=world.generation,
            workflow="buy",
            queue=None,
            arguments=json.dumps({"args": [], "kwargs": {}}),
            request=None,
            now=world.clock(),
            pass_due_at=begins_at,
            values={"run_started_at": begins_at},
        )


def owed_early(world: World) -> list[str]:
    """Return whose passes would be published before their grace has passed, were their queues empty."""
    with world.store.read("look") as connection:
        owed = instances.list_owed_passes(connection, world.clock() + GRACE, 10, begun_by=world.clock())
        return [each.instance_id for each in owed]


def test_no_bell_makes_an_instance_begin_before_its_eta(lives: Worlds) -> None:
    world = lives(buy=buy)
    eta = world.clock() + timedelta(seconds=20)
    record(world, eta)
    assert owed_early(world) == []
    world.advance()
    assert (world.instance.status, world.instance.pass_due_at, world.instance.pass_attempts) == (Status.PENDING, eta, 0)
    world.clock.advance(20)
    assert owed_early(world) == [world.instance_id]
    world.advance()
    world.run(0, succeeds("r1"))
    assert world.instance.status is Status.COMPLETED


def test_what_has_begun_is_published_early_whatever_its_run_says(lives: Worlds) -> None:
    world = lives(buy=buy)
    record(world, world.clock())
    world.advance()
    with world.store.begin("spoil") as connection:
        later = world.clock() + timedelta(hours=1)  # as after a clock that went wrong
        instances.update_instance(
            connection, world.instance, {"run_started_at": later, "pass_due_at": world.clock() + GRACE / 2}
        )
    assert owed_early(world) == [world.instance_id]
