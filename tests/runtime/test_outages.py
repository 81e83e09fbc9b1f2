"""The broker or the database goes away, in the middle of work, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StoreUnreachable
from tests.private_servers import PrivatePostgresql, PrivateValkey
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until


def has_done(cluster: Cluster, count: int) -> bool:
    return len(cluster.effects.list_effects(what="effect")) > count


FAST: dict[str, Any] = {"publish_grace": 1.0}


@pytest.fixture
def broker() -> Iterator[PrivateValkey]:
    broker = PrivateValkey()
    yield broker
    broker.stop()


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivatePostgresql]:
    database = PrivatePostgresql(tmp_path_factory.mktemp("postgresql"))
    database.create()
    database.start()
    yield database
    database.stop()


@pytest.fixture
def on_sqlite(tmp_path: Path, sqlite_url: str, broker: PrivateValkey) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, sqlite_url, broker.url, settings=FAST)
    yield cluster
    cluster.close()


def test_a_workflow_started_while_the_broker_is_down_runs_when_it_is_back(
    on_sqlite: Cluster, broker: PrivateValkey
) -> None:
    handle = on_sqlite.start("completes")
    assert handle.instance_status == "PENDING"
    broker.start()
    on_sqlite.start_worker()
    assert handle.get(timeout=30) == ["a", "b", "c"]


def test_a_broker_that_is_down_when_a_step_ends_loses_nothing(
    on_sqlite: Cluster, broker: PrivateValkey, tmp_path: Path
) -> None:
    broker.start()
    on_sqlite.start_worker()
    go = tmp_path / "go"
    handle = on_sqlite.start("waits", str(go))
    wait_until(lambda: "do b" in on_sqlite.effects.names(handle.id), "the second step running")
    broker.stop()
    go.touch()
    # it is settled and what follows it recorded, though nothing can be published
    wait_until(lambda: len(handle.history()) == 3, "the third step being recorded")
    broker.start()
    wait_until(lambda: on_sqlite.supervise() and handle.ready(), "the rest of it", seconds=60)
    assert handle.get(timeout=0) == ["a", "b", "c"]
    assert on_sqlite.effects.names(handle.id) == ["do a", "do b", "do c"]


def test_a_broker_restarted_empty_loses_nothing(on_sqlite: Cluster, broker: PrivateValkey) -> None:
    broker.start()
    handles = [on_sqlite.start("undoes") for _ in range(8)]
    on_sqlite.start_worker()
    wait_until(lambda: len(on_sqlite.effects.list_effects(what="effect")) > 5, "work being under way")
    broker.stop()
    broker.start()
    wait_until(lambda: on_sqlite.supervise() and all(h.ready() for h in handles), "all of them ending", seconds=60)
    for handle in handles:
        assert handle.instance_status == "COMPENSATED"
        assert on_sqlite.effects.names(handle.id) == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]


def test_a_database_restarted_under_load_loses_and_doubles_nothing(
    tmp_path: Path, database: PrivatePostgresql, broker_url: str
) -> None:
    cluster = Cluster(tmp_path, database.url, broker_url, settings=FAST)
    try:
        cluster.start_worker(concurrency=4)
        handles = [cluster.start("undoes") for _ in range(6)] + [cluster.start("works", 6) for _ in range(6)]
        for round_ in range(3):
            seen = len(cluster.effects.list_effects(what="effect"))
            wait_until(partial(has_done, cluster, seen + 4), f"work in round {round_}")
            database.stop()
            database.start()
        for handle in handles:
            status = cluster.wait_status(handle, seconds=60)
            assert status == ("COMPENSATED" if "undoes" in handle.id else "COMPLETED")
            effects = cluster.effects.names(handle.id)
            assert len(effects) == len(set(effects)) == 6, effects
    finally:
        cluster.close()


def test_an_outcome_is_not_lost_while_the_database_is_away_for_longer_than_the_heartbeat_limit(
    tmp_path: Path, database: PrivatePostgresql, broker_url: str
) -> None:
    cluster = Cluster(tmp_path, database.url, broker_url, settings=FAST)
    try:
        cluster.start_worker()
        cluster.start_worker()  # it must not take the other for dead, only because nobody could beat
        go = tmp_path / "go"
        handle = cluster.start("waits", str(go))
        wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the second step running")
        database.stop()
        go.touch()
        wait_until(lambda: "do b" in cluster.effects.names(handle.id, "released"), "its body having ended")
        stopped_for_limit = wait_until(
            lambda: cluster.logs().count("no heartbeat") >= 12, "heartbeats failing for more than the limit"
        )
        assert stopped_for_limit
        database.start()
        assert handle.get(timeout=40) == ["a", "b", "c"]
        assert cluster.effects.names(handle.id) == ["do a", "do b", "do c"]
        assert [(entry.attempts, entry.lost) for entry in handle.history()] == [(1, 0)] * 3
    finally:
        cluster.close()


def test_a_process_that_cannot_settle_gives_the_step_back(
    tmp_path: Path, database: PrivatePostgresql, broker_url: str
) -> None:
    cluster = Cluster(tmp_path, database.url, broker_url, settings={**FAST, "store_patience": 0.5})
    try:
        cluster.start_worker()
        go = tmp_path / "go"
        handle = cluster.start("waits", str(go))
        wait_until(lambda: "do b" in cluster.effects.names(handle.id), "the second step running")
        database.stop()
        go.touch()
        wait_until(lambda: f"[{handle.id}:0:1:1] raised" in cluster.logs(), "the process giving up")
        database.start()
        assert handle.get(timeout=40) == ["a", "b", "c"]
        # nobody could be told of the first attempt, so there was a second
        assert cluster.effects.names(handle.id) == ["do a", "do b", "do b", "do c"]
        assert [(entry.attempts, entry.lost) for entry in handle.history()] == [(1, 0), (2, 1), (1, 0)]
    finally:
        cluster.close()


def test_a_delayed_start_waits_for_the_store(tmp_path: Path, database: PrivatePostgresql, broker_url: str) -> None:
    cluster = Cluster(tmp_path, database.url, broker_url, settings={**FAST, "store_patience": 1.0})
    try:
        cluster.start_worker().wait_ready()
        assert cluster.start("completes").get(timeout=30) == ["a", "b", "c"]
        database.stop()
        handle = cluster.app.tasks["tests.runtime.workflows.completes"].delay()
        wait_until(lambda: f"{handle.id}: the store is away" in cluster.logs(), "the start being put off", seconds=40)
        database.start()
        assert handle.get(timeout=40) == ["a", "b", "c"]
    finally:
        cluster.close()


def test_starting_while_the_database_is_down_says_so(
    tmp_path: Path, database: PrivatePostgresql, broker_url: str
) -> None:
    cluster = Cluster(tmp_path, database.url, broker_url)
    database.stop()
    with pytest.raises(StoreUnreachable, match=r"127\.0\.0\.1.*refused"):
        cluster.start("completes")
    cluster.close()
