from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.store.engine import Store

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
