"""The store as it is: to look at without changing its schema, which any other first use would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.runtime.settings import Settings
from orchestrator.store.engine import Store


@contextmanager
def unmigrated_store(settings: Settings) -> Iterator[Store]:
    """Open the store that is set, whatever its schema.  Raises ``ConfigurationError`` where none is set."""
    store = Store(settings.require_store(), idle_limit_seconds=settings.heartbeat_limit, migrate=False)
    try:
        yield store
    finally:
        store.dispose()
