"""Instances in a store, made without a worker, and Flower with pages about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from orchestrator import Orchestrator
from orchestrator.store import tables
from orchestrator.store.engine import Store
from tests.servers import Databases
from tests.store.world import World

from .serving import Site, serving


@pytest.fixture(scope="module")
def store_url(sqlite_files: Databases) -> Iterator[str]:
    url = sqlite_files.create()
    yield url
    sqlite_files.drop(url)


@pytest.fixture(scope="module")
def orchestrator(store_url: str) -> Iterator[Orchestrator]:
    """An orchestrator as Flower's process has it; nobody takes what it publishes."""
    app = Celery("shop", broker="memory://")
    orchestrator = Orchestrator(app, store=store_url)
    yield orchestrator
    orchestrator.store.dispose()
    app.close()


@pytest.fixture(scope="module")
def site(orchestrator: Orchestrator) -> Iterator[Site]:
    with serving(orchestrator) as site:
        yield site


@pytest.fixture(scope="module")
def worlds(store_url: str) -> Iterator[Callable[..., World]]:
    """Make instances of the workflow functions given by name, and run their steps by hand."""
    store = Store(store_url)

    def make(**functions: Callable[..., Any]) -> World:
        with store.begin("forget") as connection:  # a world has one worker, by one name
            connection.execute(tables.worker.delete())
        return World(store, **functions)

    yield make
    store.dispose()
