"""Which orchestrator serves a Celery app."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from orchestrator.runtime.app import Orchestrator

_owners: weakref.WeakKeyDictionary[Any, Orchestrator] = weakref.WeakKeyDictionary()


def bind(app: Any, orchestrator: Orchestrator) -> None:
    if app in _owners:
        raise ConfigurationError(f"the Celery app {app.main!r} has an Orchestrator already")
    _owners[app] = orchestrator


def orchestrator_of(app: Any) -> Orchestrator:
    """Return the orchestrator that was made for ``app``."""
    try:
        return _owners[app]
    except KeyError:
        raise ConfigurationError(
            f"the Celery app {app.main!r} has no Orchestrator; make one: Orchestrator(app)"
        ) from None
