from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.store.engine import Store
from orchestrator.store.tables import metadata

from . import invariants
from .world import World


@pytest.fixture
def open_store() -> Iterator[Callable[..., Store]]:
    """Open stores that are let go at the end of the test."""
    opened: list[Store] = []

    def open_one(url: str, **options: Any) -> Store:
        opened.append(Store(url, **options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.dispose()


@pytest.fixture
def store(store_url: str, open_store: Callable[..., Store]) -> Store:
    return open_store(store_url)


@pytest.fixture
def sqlite_world(sqlite_url: str, open_store: Callable[..., Store]) -> Callable[..., World]:
    return lambda **functions: World(open_store(sqlite_url), **functions)


@pytest.fixture
def world(store: Store) -> Callable[..., World]:
    """Make a world of the workflow functions given by name."""
    return lambda **functions: World(store, **functions)


# --- one database for all tests of a module -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_store(shared_url: str) -> Iterator[Store]:
    store = Store(shared_url)
    yield store
    store.dispose()


@pytest.fixture
def lives(shared_store: Store) -> Iterator[Callable[..., World]]:
    """Make a world, as ``world`` does, in the module's database; what it leaves there is checked, and removed."""
    yield lambda **functions: World(shared_store, **functions)
    try:
        invariants.check(shared_store)
    finally:
        with shared_store.begin("empty") as connection:
            for table in metadata.sorted_tables:
                connection.execute(table.delete())


@pytest.fixture
def another_process(shared_url: str, open_store: Callable[..., Store]) -> Callable[[World], World]:
    """Return a world as a process of its own sees it."""
    return lambda world: world.elsewhere(open_store(shared_url, migrate=False))
