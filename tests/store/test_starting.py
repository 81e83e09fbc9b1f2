"""Recording an instance from a call, over connections that are lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import exc, text

from orchestrator.runtime.starter import IfPurged, NewInstance, Starter
from orchestrator.store.engine import Store

from .locks import lose_answer
from .world import World

OpenStore = Callable[..., Store]
Worlds = Callable[..., World]

NEW = NewInstance("order-1", "g1", "one", None, "{}", "{}")
IF_PURGED = pytest.mark.parametrize("if_purged", [IfPurged.FORGET, IfPurged.CANNOT_BE])
OWN_SESSION = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT CONNECTION_ID()"}
END_SESSION = {"postgresql": "SELECT pg_terminate_backend(:number)", "mysql": "KILL :number"}


def start(world: World, new: NewInstance, if_purged: IfPurged) -> bool:
    starter = Starter(world.coordinator, None, None, None)  # type: ignore[arg-type]
    return starter._insert_surely(new, None, if_purged)


def end_session(store: Store, other: Store) -> None:
    """End the connection that ``store`` uses next, as a server does that is started again."""
    with store.read("look") as connection:
        number = connection.execute(text(OWN_SESSION[store.backend])).scalar_one()
    with other.begin("end") as connection:
        connection.execute(text(END_SESSION[store.backend]), {"number": number})


@pytest.mark.parametrize("databases", OWN_SESSION, indirect=True)
@IF_PURGED
def test_a_connection_that_died_meanwhile_fails_no_start(
    world: Worlds, open_store: OpenStore, store_url: str, if_purged: IfPurged
) -> None:
    shop, second_store = world(), open_store(store_url)
    assert start(shop, NEW, if_purged)
    end_session(shop.store, second_store)
    assert start(shop, replace(NEW, instance_id="order-2"), if_purged)
    end_session(shop.store, second_store)
    assert not start(shop, replace(NEW, generation="g2"), if_purged)


def test_a_start_whose_commit_was_not_answered_finds_its_own_instance(world: Worlds) -> None:
    shop = world()
    lost = exc.OperationalError("COMMIT", {}, ConnectionError("lost"), connection_invalidated=True)
    lose_answer(shop.store, lost, "start")
    assert start(shop, NEW, IfPurged.FORGET)
    lose_answer(shop.store, lost, "start")
    assert not start(shop, replace(NEW, generation="g2"), IfPurged.FORGET)
