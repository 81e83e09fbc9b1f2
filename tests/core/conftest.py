from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from .host import FakeHost
from .past import Past

# derandomized: a run that fails here fails everywhere; the storm is what looks for news
settings.register_profile(
    "core", max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile(
    "core-storm", max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile(os.environ.get("CORE_PROFILE", "core"))


@pytest.fixture
def host() -> FakeHost:
    """A host that knows the tasks of a small shop."""
    host = FakeHost()
    for name in ("reserve", "release", "charge", "refund", "ship", "recall", "mail", "work", "undo"):
        host.task(name)
    for name in ("deliver", "invoice"):
        host.task(name, is_workflow=True)
    return host


@pytest.fixture
def past(host: FakeHost) -> Past:
    return Past(host)
