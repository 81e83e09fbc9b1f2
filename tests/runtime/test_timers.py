"""Timers of real workers: when they fire, and that what slept goes on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from orchestrator import Context, shared_workflow
from orchestrator.store.engine import Store
from orchestrator.store.tables import history, instance
from tests.runtime.cluster import Cluster, wait_until
from tests.store.crowds import measure_firing, multiply

POLL_SECONDS = 1.0
SETTINGS = {"poll_interval": POLL_SECONDS, "heartbeat_limit": 15.0, "publish_grace": 30.0}


@shared_workflow
def sleeps(ctx: Context) -> None:
    ctx.sleep(3600)


def fall_asleep(cluster: Cluster, count: int, due_at: datetime) -> None:
    """Make so many instances that sleep until ``due_at``."""
    handle = cluster.start("sleeps")
    cluster.wait_history(handle, 1)
    store = cluster.orchestrator.store
    multiply(store, handle.id, count)
    with store.begin("test") as connection:
        connection.execute(update(history).where(history.c.due_at.is_not(None)).values(due_at=due_at))


def count_completed(store: Store) -> int:
    with store.read("look") as connection:
        return int(connection.execute(select(func.count()).where(instance.c.status == "COMPLETED")).scalar_one())


def count_scheduled(store: Store) -> int:
    with store.read("look") as connection:
        return int(connection.execute(select(func.count()).where(history.c.due_at.is_not(None))).scalar_one())


def first_fired_at(store: Store) -> datetime:
    with store.read("look") as connection:
        found: Any = connection.execute(select(func.min(history.c.settled_at, type_=history.c.settled_at.type)))
        first: datetime = found.scalar_one()
    return first


def test_what_slept_until_the_same_instant_wakes_within_a_poll(cluster: Cluster) -> None:
    due_at = datetime.now(UTC) + timedelta(seconds=3)
    fall_asleep(cluster, 100, due_at)
    store = cluster.orchestrator.store
    wait_until(lambda: count_completed(store) == 100, "all of them having ended", 60.0)
    count, spread = measure_firing(store)
    late = first_fired_at(store) - due_at
    assert (count, late >= timedelta(0)) == (100, True)
    # to the promise an allowance for a machine with much else to do
    assert late + spread < timedelta(seconds=POLL_SECONDS + 5.0)


@pytest.fixture
def two_workers(store_url: str, redis_url: str, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path, store_url, redis_url, tasks=__name__, settings=SETTINGS)
    try:
        for worker in [made.start_worker(concurrency=1) for _ in range(2)]:
            worker.wait_ready()
        yield made
    finally:
        made.close()


@pytest.mark.storm
def test_ten_thousand_timers_beside_the_passes_that_they_make_due(two_workers: Cluster) -> None:
    due_at = datetime.now(UTC) + timedelta(seconds=15)
    fall_asleep(two_workers, 10_000, due_at)
    store = two_workers.orchestrator.store
    wait_until(lambda: count_scheduled(store) == 0, "all of them having fired", 120.0)
    count, spread = measure_firing(store)
    late = first_fired_at(store) - due_at
    print(f"{store.backend}: first {late.total_seconds():.2f} s late, last {spread.total_seconds():.2f} s after it")
    assert count == 10_000
    assert (late < timedelta(seconds=POLL_SECONDS), spread < timedelta(seconds=5)) == (True, True)
    # their passes follow, as fast as two workers make them
    wait_until(lambda: count_completed(store) > 1000, "passes being made", 120.0)
