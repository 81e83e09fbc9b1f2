"""Incarnations and heartbeats."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import exc

from orchestrator.core.context import Context
from orchestrator.store import workers

from .world import World, at_once, step

Worlds = Callable[..., World]


def one_step(ctx: Context) -> Any:
    return ctx.run(step("charge"))


@pytest.fixture
def shop(world: Worlds) -> World:
    return world(pay=one_step)


def beats(shop: World) -> dict[str, int]:
    with shop.store.read("beats") as connection:
        return workers.list_beats(connection)


def beat(shop: World, incarnation: str) -> bool:
    with shop.store.begin("beat") as connection:
        return workers.beat(connection, incarnation, shop.clock())


def test_a_worker_comes_back_as_it_was_recorded(shop: World) -> None:
    with shop.store.read("look") as connection:
        [worker] = workers.list_workers(connection)
    assert (worker.incarnation, worker.workflows, worker.queues) == ("worker-1", ("pay",), ())
    assert set(worker.tasks) >= {"charge", "refund"}
    assert worker.started_at == shop.clock()


def test_a_heartbeat_is_a_counter_and_none_is_lost(shop: World) -> None:
    at_once(*[lambda: shop.store.retrying(lambda: beat(shop, "worker-1"), patience_seconds=20)] * 8)
    assert beats(shop) == {"worker-1": 8}


def test_a_worker_that_has_beaten_since_it_was_looked_at_is_not_given_up(shop: World) -> None:
    seen = beats(shop)["worker-1"]
    assert beat(shop, "worker-1")
    with shop.store.begin("give-up") as connection:
        assert not workers.mark_dead(connection, "worker-1", seen, shop.clock())
        assert workers.mark_dead(connection, "worker-1", seen + 1, shop.clock())
        assert not workers.mark_dead(connection, "worker-1", seen + 1, shop.clock())
    assert beats(shop) == {}
    assert not beat(shop, "worker-1")


def test_a_dead_worker_is_forgotten_when_it_holds_no_claim(shop: World) -> None:
    shop.start("pay")
    for name in ("worker-2", "worker-3"):
        shop.hire(name)
    shop.take(0, by="worker-2")
    for name in ("worker-2", "worker-3"):
        shop.fire(name)
    for days, forgotten in ((0, set[str]()), (1, {"worker-3"})):
        with shop.store.begin("forget") as connection:
            workers.forget_workers(connection, shop.clock() + timedelta(days=days))
        assert {name for name in ("worker-2", "worker-3") if can_be_hired(shop, name)} == forgotten


def can_be_hired(shop: World, name: str) -> bool:
    try:
        shop.hire(name)
    except exc.IntegrityError:
        return False
    return True
