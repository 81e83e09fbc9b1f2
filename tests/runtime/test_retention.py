"""Purging while workers run: what is delivered of a purged instance does nothing, and its id may be used again."""

from __future__ import annotations

import functools
import re
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Task, shared_task
from celery.exceptions import Reject
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult
from sqlalchemy import func, select

from orchestrator import Context, WorkflowHandle, current_step, errors, shared_workflow
from orchestrator.runtime import dispatch
from orchestrator.runtime.dispatch import START_HEADER, header_of
from orchestrator.runtime.settings import Settings
from orchestrator.store import history, purging, tables
from orchestrator.store.history import HistoryRow
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do, note, undo, wait_for_file
from tests.waiting import wait_until

ALL = timedelta(0)


@shared_workflow
def completes(ctx: Context, name: str) -> list[str]:
    return [ctx.run(do.s(f"{name} {number}"), compensate=undo.s(name)) for number in range(2)]


@shared_workflow
def waits(ctx: Context, path: str) -> str:
    return str(ctx.run(wait_for_file.s(path, "long")))


@shared_task(bind=True, max_retries=3)
def ends(self: Task, path: str, how: str) -> str:
    """End in one way or another as soon as the file exists: at its first attempt, for later ones succeed."""
    step = current_step()
    assert step is not None
    note(how, "begin")
    wait_until(lambda: Path(path).exists(), f"{path} being made", seconds=60)
    match how if step.attempt == 1 else "succeeds":
        case "fails":
            raise ValueError("too late")
        case "retries":
            raise self.retry(exc=ValueError("too late"), countdown=0)
        case "rejects":
            raise Reject("too late", requeue=True)
    return how


ENDINGS = ("succeeds", "fails", "retries", "rejects")


@shared_workflow
def ends_in_all_ways(ctx: Context, path: str) -> list[str]:
    results: list[str] = ctx.gather(*(ends.s(path, how) for how in ENDINGS))
    return results


# the third store is the matter of the tests of purging itself
@pytest.fixture(params=["sqlite", "postgresql"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, broker_url: str) -> Iterator[Cluster]:
    store_url = request.getfixturevalue(f"{request.param}_url")
    cluster = Cluster(tmp_path, store_url, broker_url, tasks=__name__)
    yield cluster
    cluster.close()


def purge(cluster: Cluster, handle: WorkflowHandle) -> None:
    """Purge an instance as soon as what follows its end has been told."""
    handle.get(timeout=30)
    wait_until(lambda: cluster.orchestrator.purge(older_than=ALL) or not is_there(cluster, handle.id), "the purge")
    assert not is_there(cluster, handle.id)


def is_there(cluster: Cluster, instance_id: str) -> bool:
    return cluster.orchestrator.find_instance(instance_id) is not None


def have_gone(cluster: Cluster, ids: list[str]) -> bool:
    """Tell whether all have done their work, and been purged."""
    done = {effect.instance for effect in cluster.effects.list_effects(what="end") if effect.name.endswith("1")}
    return done >= set(ids) and not any(is_there(cluster, own) for own in ids)


def count_records(cluster: Cluster, instance_id: str) -> int:
    own = select(func.count()).select_from(tables.history).where(tables.history.c.instance_id == instance_id)
    with cluster.orchestrator.store.read("test") as connection:
        return int(connection.execute(own).scalar_one())


def rows_of(cluster: Cluster, instance_id: str) -> list[HistoryRow]:
    with cluster.orchestrator.store.read("test") as connection:
        return history.load_rows(connection, instance_id, 0)


def publish_again(cluster: Cluster, rows: list[HistoryRow]) -> int:
    """Publish every message of an instance's life once more, and what a foreign step's worker would tell."""
    own, generation = rows[0].instance_id, rows[0].generation
    for row in rows:
        cluster.orchestrator.dispatcher.publish_step(row)
        step = header_of(row)
        cluster.app.send_task(dispatch.FOREIGN_SUCCEEDED, ("late",), {"step": step})
        cluster.app.send_task(dispatch.FOREIGN_FAILED, ("late",), {"step": step})
    cluster.orchestrator.dispatcher.publish_advance(own, generation, None)
    task = cluster.task("completes")
    task.apply_async(("first",), task_id=own, headers={START_HEADER: {"generation": generation}})
    task.apply_async(("first",), task_id=own)
    return 3 * len(rows) + 3


def count_done(cluster: Cluster) -> int:
    """Return how many tasks the workers have ended without an error."""
    return len(re.findall(r" (?:succeeded in|ignored|goes on as an instance)", cluster.logs()))


def errors_in(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r": (ERROR|CRITICAL)/", line)]


def test_messages_that_wait_while_their_instance_is_purged_do_nothing(cluster: Cluster) -> None:
    first = cluster.start_worker(concurrency=1)
    handle = cluster.start("completes", "first", instance_id="order-1")
    assert handle.get(timeout=30) == ["first 0", "first 1"]
    rows = rows_of(cluster, "order-1")
    first.stop()
    count = publish_again(cluster, rows)
    purge(cluster, handle)

    effects = cluster.effects.names("order-1")
    second = cluster.start_worker(concurrency=2)
    count += publish_again(cluster, rows)  # and others come while it runs
    wait_until(lambda: count_done(cluster) >= count, f"{count} messages being taken\n{cluster.logs()[-6000:]}")
    assert cluster.start("completes", "other").get(timeout=30) == ["other 0", "other 1"]
    assert cluster.effects.names("order-1") == effects == ["do first 0", "do first 1"]
    assert not is_there(cluster, "order-1")
    assert count_records(cluster, "order-1") == 0
    assert errors_in(cluster.logs()) == []
    assert "order-1 was purged" in second.log.read_text()


def test_a_purged_instance_is_unknown(cluster: Cluster) -> None:
    cluster.start_worker(concurrency=1)
    handle = cluster.start("completes", "first", instance_id="order-1")
    purge(cluster, handle)
    assert (handle.instance_status, handle.state, handle.ready()) == ("PENDING", "PENDING", False)
    tells: list[Any] = [
        handle.describe,
        handle.history,
        lambda: cluster.orchestrator.get("order-1"),
        lambda: handle.retry_compensation(0),
        lambda: handle.skip_compensation(0, "by hand"),
    ]
    for tell in tells:
        with pytest.raises(errors.UnknownInstance, match="order-1"):
            tell()
    with pytest.raises(CeleryTimeoutError):
        handle.get(timeout=0.1)
    assert cluster.orchestrator.purge(older_than=ALL) == 0


def test_a_purged_id_that_is_used_again_finds_nothing_of_the_old(cluster: Cluster) -> None:
    cluster.start_worker(concurrency=2)
    handle = cluster.start("completes", "first", instance_id="order-1")
    handle.get(timeout=30)
    old = rows_of(cluster, "order-1")
    purge(cluster, handle)

    again = cluster.start("completes", "second", instance_id="order-1")
    for row in old:  # each of them would be the one that the new life waits for
        cluster.orchestrator.dispatcher.publish_step(row)
    cluster.orchestrator.dispatcher.publish_advance("order-1", old[0].generation, None)
    assert again.get(timeout=30) == ["second 0", "second 1"]
    assert cluster.effects.names("order-1") == ["do first 0", "do first 1", "do second 0", "do second 1"]
    new = rows_of(cluster, "order-1")
    assert [row.attempt for row in new] == [1, 1]
    assert not {row.key.idempotency_key for row in new} & {row.key.idempotency_key for row in old}
    with cluster.orchestrator.store.read("test") as connection:
        assert not purging.is_purged(connection, "order-1")
    purge(cluster, again)


def test_what_a_stopped_worker_brings_after_the_purge_is_not_recorded(cluster: Cluster, tmp_path: Path) -> None:
    if cluster.orchestrator.store.is_sqlite:
        pytest.skip("a process that is stopped while it writes to SQLite stops everybody")
    frozen = cluster.start_worker(concurrency=4)
    go = tmp_path / "go"
    handle = cluster.start("ends_in_all_ways", str(go))
    wait_until(lambda: len(cluster.effects.names(handle.id, "begin")) == 4, "all of its steps running")
    # the file that effects are noted in is SQLite's too, and would stay locked
    wait_until(lambda: not cluster.effects.holders(), "their beginnings being noted")
    frozen.signal(signal.SIGSTOP)
    cluster.start_worker(concurrency=4)
    wait_until(lambda: len(cluster.effects.names(handle.id, "begin")) == 8, "their second attempts, elsewhere")
    go.touch()
    assert handle.get(timeout=30) == list(ENDINGS)
    purge(cluster, handle)

    frozen.signal(signal.SIGCONT)
    wait_until(lambda: frozen.log.read_text().count("had been given up") == 4, "the stopped worker noticing")
    assert count_records(cluster, handle.id) == 0
    assert not is_there(cluster, handle.id)
    cluster.workers[1].kill()
    assert cluster.start("completes", "other").get(timeout=30) == ["other 0", "other 1"]
    # what the task itself raised, and nothing else
    assert all("too late" in line for line in errors_in(frozen.log.read_text()))


def test_a_start_message_that_comes_after_the_purge_tells_nobody_of_a_failure(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    """Its caller was told of the success; what comes again must not take that back."""
    cluster = Cluster(tmp_path, sqlite_url, broker_url, tasks=__name__, celery={"result_backend": broker_url})
    try:
        worker = cluster.start_worker(concurrency=1)
        link = {"link_error": cluster.task("completes").si("linked")}
        handle = cluster.task("completes").apply_async(("first",), task_id="order-1", **link)
        purge(cluster, handle)
        cluster.task("completes").apply_async(("first",), task_id="order-1", **link)
        wait_until(lambda: "order-1 was purged" in worker.log.read_text(), "the message being dropped")
        assert cluster.start("completes", "other").get(timeout=30) == ["other 0", "other 1"]
        shown = AsyncResult("order-1", app=cluster.app)
        assert (shown.state, shown.result) == ("SUCCESS", ["first 0", "first 1"])
        assert [instance.args for instance in cluster.orchestrator.list()] == [["other"]]
    finally:
        cluster.close()


def test_workers_purge_by_themselves(tmp_path: Path, store_url: str, broker_url: str) -> None:
    cluster = Cluster(tmp_path, store_url, broker_url, tasks=__name__, settings={"retention": 1.0})
    try:
        for _ in range(2):
            cluster.start_worker(concurrency=2)
        go = tmp_path / "go"
        going_on = cluster.start("waits", str(go))
        for life in range(2):  # not only when the workers begin
            ids = [f"order-{life}-{number}" for number in range(5)]
            for own in ids:
                cluster.start("completes", own, instance_id=own)
            wait_until(functools.partial(have_gone, cluster, ids), f"{ids} ending, and being purged")
        assert [instance.instance_id for instance in cluster.orchestrator.list()] == [going_on.id]
        go.touch()
        wait_until(lambda: not is_there(cluster, going_on.id), "the last one ending, and being purged")
        assert "purged" in cluster.logs()
        assert errors_in(cluster.logs()) == []
    finally:
        cluster.close()


@pytest.mark.parametrize("value", [0, -1, "soon", 10**12, timedelta(0)])
def test_a_retention_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="orchestrator_retention"):
        Settings.read({"orchestrator_retention": value}, {})


@pytest.mark.parametrize("value", [90, 90.0, timedelta(seconds=90)])
def test_a_retention_is_seconds_or_a_timedelta(value: Any) -> None:
    assert Settings.read({"orchestrator_retention": value}, {}).retention == timedelta(seconds=90)
