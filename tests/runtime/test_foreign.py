"""Steps whose task runs in a worker without this package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path, sqlite_url: str, broker_url: str) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, sqlite_url, broker_url)
    cluster.start_worker()
    yield cluster
    cluster.close()


def test_a_foreign_step_is_settled_by_its_callbacks(cluster: Cluster) -> None:
    cluster.start_worker("--queues=elsewhere", module="tests.runtime.elsewhere")
    asked = cluster.start("asks_elsewhere", "elsewhere.answer", ["why"], 30.0)
    assert asked.get(timeout=30) == "why? 42"
    assert [(entry.outcome, entry.attempts) for entry in asked.history()] == [("succeeded", 0)]


def test_a_foreign_step_that_failed_is_unknown_and_undone(cluster: Cluster) -> None:
    cluster.start_worker("--queues=elsewhere", module="tests.runtime.elsewhere")
    asked = cluster.start("asks_elsewhere", "elsewhere.refuse", [], 30.0)
    with pytest.raises(Exception, match="failed in a worker that does not tell how"):
        asked.get(timeout=30)
    assert [(entry.kind, entry.outcome) for entry in asked.history()] == [
        ("step", "unknown"),
        ("compensation", "succeeded"),
    ]


def test_a_foreign_step_that_nobody_runs_is_sent_once_and_times_out(cluster: Cluster) -> None:
    asked = cluster.start("asks_elsewhere", "elsewhere.answer", ["why"], 4.0)  # longer than the grace
    with pytest.raises(TimeoutError):
        asked.get(timeout=30)
    assert [entry.outcome for entry in asked.history()] == ["unknown", "succeeded"]
    with cluster.app.connection_for_write() as connection, connection.channel() as channel:
        assert channel.queue_declare("elsewhere", passive=True).message_count == 1
