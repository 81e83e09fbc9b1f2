"""A cluster for the tests of a module, with one worker that runs the module's own tasks and workflows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.cluster import Cluster


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, valkey_url: str
) -> Iterator[Cluster]:
    """A worker whose tasks are those of the test's module; ``KEEPS_RESULTS`` and ``SETTINGS`` there configure it."""
    folder, module = tmp_path_factory.mktemp("cluster"), request.module
    cluster = Cluster(
        folder,
        f"sqlite:///{folder}/store.db",
        valkey_url,
        tasks=module.__name__,
        celery={"result_backend": valkey_url} if getattr(module, "KEEPS_RESULTS", False) else None,
        settings=getattr(module, "SETTINGS", None),
    )
    try:
        cluster.start_worker().wait_ready()
        yield cluster
    finally:
        cluster.close()
