"""What a transactional task wrote is there exactly once, wherever its worker was killed; with real workers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, shared_task
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select
from sqlalchemy.orm import Session

from orchestrator import Context, Orchestrator, current_step, shared_workflow
from orchestrator.errors import ConfigurationError
from orchestrator.runtime.dispatch import check_arguments
from tests.runtime import crashing
from tests.runtime.cluster import Cluster
from tests.runtime.effects import Effects
from tests.waiting import wait_until

metadata = MetaData()
#: The user's own: nothing about it would notice a row that is there twice.
entry = Table(
    "entry",
    metadata,
    Column("instance", String(200)),
    Column("name", String(40)),
    Column("attempt", Integer),
    mysql_engine="InnoDB",
)


def write(session: Session, name: str) -> None:
    """Write to the user's table, and be killed before or after it if that is the plan."""
    step = current_step()
    instance, seq, attempt = ("", None, 0) if step is None else (step.instance_id, step.seq, step.attempt)
    crashing.reach("body:before-effect", instance, seq)
    session.execute(insert(entry).values(instance=instance, name=name, attempt=attempt))
    crashing.reach("body:after-effect", instance, seq)


@shared_task
def debit(name: str, *, session: Session) -> str:
    write(session, name)
    return name


@shared_task
def debit_and_commit(name: str, session: Session) -> str:
    write(session, name)
    session.commit()
    return name


@shared_task
def credit(debited: str | None, *, session: Session) -> None:
    write(session, f"undo {debited}")


@shared_task
def debit_and_fail(name: str, *, session: Session) -> None:
    write(session, name)
    session.commit()
    raise ValueError(f"{name} is declined")


@shared_task(bind=True, max_retries=2, default_retry_delay=0)
def debit_at_the_second_try(self: Any, name: str, *, session: Session) -> int:
    write(session, name)
    if self.request.retries == 0:
        raise self.retry()
    return int(self.request.retries)


@shared_task
def debit_and_wait(name: str, path: str, *, session: Session) -> str:
    """Write, then wait for a file."""
    write(session, name)
    Effects(os.environ["TEST_EFFECTS"]).note(name, "begin")
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert time.monotonic() < deadline, f"nobody made {path}"
        time.sleep(0.02)
    return name


def register(orchestrator: Orchestrator) -> None:
    for task in (debit, debit_and_commit, debit_and_fail, debit_at_the_second_try, debit_and_wait, credit):
        orchestrator.activity(transactional=True)(task)


@shared_workflow
def completes(ctx: Context) -> list[str]:
    return [ctx.run(task.s(name)) for task, name in ((debit, "a"), (debit_and_commit, "b"), (debit, "c"))]


@shared_workflow
def undoes(ctx: Context) -> None:
    for name in "abc":
        ctx.run(debit.s(name), compensate=credit.s())
    ctx.run(debit_and_fail.s("d"))


@shared_workflow
def retries(ctx: Context) -> int:
    return int(ctx.run(debit_at_the_second_try.s("a")))


@shared_workflow
def waits(ctx: Context, path: str) -> str:
    return str(ctx.run(debit_and_wait.s("a", path)))


UNDONE = ["a", "b", "c", "undo c", "undo b", "undo a"]


def entries(cluster: Cluster, instance: str) -> list[str]:
    with cluster.orchestrator.store.read("look") as connection:
        return list(connection.scalars(select(entry.c.name).where(entry.c.instance == instance)))


def open_cluster(folder: Path, store: str, broker: str, **options: Any) -> Cluster:
    cluster = Cluster(folder, store, broker, tasks=__name__, **options)
    register(cluster.orchestrator)
    with cluster.orchestrator.store.begin("create") as connection:
        metadata.create_all(connection)
    return cluster


# --- killed -------------------------------------------------------------------------------------------------------

OF_BODY = ("body:before-effect", "body:after-effect", "transactional:before-commit", "transactional:after-commit")
OTHERS = ("message:taken", "claim:before-commit", "claim:after-commit", "message:done")


@dataclass(frozen=True)
class Point:
    """Where an instance of ``workflow`` is hit."""

    workflow: str
    name: str
    seq: int

    @property
    def instance(self) -> str:
        return f"{self.workflow}-{self.name.replace(':', '-')}-{self.seq}"


FEW = [Point("completes", name, 1) for name in OF_BODY]
# the fourth step of the one that undoes raises after its effect, and settles in a transaction of its own
ALL = [
    *(Point("completes", name, seq) for name, seq in product(OF_BODY + OTHERS, (0, 1, 2))),
    *(Point("undoes", name, seq) for name, seq in product(OF_BODY + OTHERS, (4, 5, 6))),
    *(Point("undoes", name, 3) for name in ("body:after-effect", "settle:before-commit", "settle:after-commit")),
]


def run_killed(cluster: Cluster, points: list[Point], who: str, at_once: int) -> None:
    """Run an instance for each point, a few at a time, with a live worker; each is hit once."""
    waiting = list(points)
    running: list[Point] = []
    cluster.start_worker()

    def begin(point: Point, instance: str) -> None:
        cluster.plan_crash(instance, who, point.name, point.seq)
        cluster.start(point.workflow, instance_id=instance)

    def is_over(point: Point) -> bool:
        instance = last_tried(cluster, point)
        if not cluster.orchestrator.get(instance).ready():
            return False
        if instance == point.instance and not crashing.was_reached(cluster.crashes, instance):
            # who was to die at its point had died of another's plan before
            begin(point, again(point))
            return False
        return True

    def are_all_over() -> bool:
        cluster.supervise()
        running[:] = [point for point in running if not is_over(point)]
        while waiting and len(running) < at_once:
            point = waiting.pop(0)
            begin(point, point.instance)
            running.append(point)
        return not running

    wait_until(are_all_over, "all instances", seconds=600)


def again(point: Point) -> str:
    return f"{point.instance}-again"


def last_tried(cluster: Cluster, point: Point) -> str:
    """Return the id of the last instance that was started for a point."""
    is_second = cluster.orchestrator.find_instance(again(point)) is not None
    return again(point) if is_second else point.instance


def check(cluster: Cluster, point: Point) -> None:
    instance = last_tried(cluster, point)
    handle = cluster.orchestrator.get(instance)
    assert crashing.was_reached(cluster.crashes, instance), f"nobody died at {point}"
    assert handle.instance_status == ("COMPLETED" if point.workflow == "completes" else "COMPENSATED")
    # each once; a table has no order, and these were written one after the other
    wanted = ["a", "b", "c"] if point.workflow == "completes" else UNDONE
    assert sorted(entries(cluster, instance)) == sorted(wanted), [(e.seq, e.attempts) for e in handle.history()]


# others die around an instance: it is lost more often than it would be by itself
PATIENT = {"max_lost": 100, "max_pass_attempts": 100, "publish_grace": 1.0, "heartbeat_limit": 1.0}


@pytest.fixture(scope="module")
def cluster(shared_url: str, tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Cluster]:
    """Where an instance was hit at each of a few points, and whose worker lives on."""
    cluster = open_cluster(tmp_path_factory.mktemp("transactional"), shared_url, valkey_url, settings=PATIENT)
    try:
        run_killed(cluster, FEW, "child", at_once=4)
        yield cluster
    finally:
        cluster.close()


@pytest.mark.parametrize("point", [pytest.param(point, id=point.name) for point in FEW])
def test_a_killed_process_leaves_each_effect_once(cluster: Cluster, point: Point) -> None:
    check(cluster, point)


def test_a_body_that_raises_leaves_no_effect_and_the_others_are_undone(cluster: Cluster) -> None:
    handle = cluster.run("undoes")
    assert handle.instance_status == "COMPENSATED"
    assert sorted(entries(cluster, handle.id)) == sorted(UNDONE)


def test_a_body_that_asks_for_a_retry_leaves_the_effect_of_its_last_try(cluster: Cluster) -> None:
    handle = cluster.run("retries")
    assert (handle.get(timeout=0), entries(cluster, handle.id)) == (1, ["a"])


def test_a_plain_message_commits_at_its_end(cluster: Cluster) -> None:
    cluster.task("debit_and_fail").delay("rolled back")
    wait_until(lambda: "rolled back is declined" in cluster.logs(), "the task that fails")
    cluster.task("debit").delay("plain")
    wait_until(lambda: entries(cluster, ""), "the task that commits")
    assert entries(cluster, "") == ["plain"]


@pytest.mark.storm
@pytest.mark.parametrize("acks_late", [False, True], ids=["early-acks", "late-acks"])
@pytest.mark.parametrize("who", ["child", "worker"])
def test_wherever_it_is_killed_each_effect_is_there_once(
    store_url: str, broker_url: str, tmp_path: Path, who: str, acks_late: bool
) -> None:
    options = {"settings": PATIENT, "celery": {"task_acks_late": acks_late}}
    cluster = open_cluster(tmp_path, store_url, broker_url, **options)
    try:
        # a worker takes seconds to begin again: of the points that kill it, early and late acks have half each
        points = ALL if who == "child" else ALL[acks_late::2]
        run_killed(cluster, points, who, at_once=8 if who == "child" else 3)
        for point in points:
            check(cluster, point)
    finally:
        cluster.close()


# --- frozen -------------------------------------------------------------------------------------------------------


def given_up_while_frozen(cluster: Cluster, go: Path) -> None:
    frozen = cluster.start_worker(concurrency=1)
    handle = cluster.start("waits", str(go))
    wait_until(lambda: cluster.effects.list_effects(handle.id), "the body running")
    frozen.signal(signal.SIGSTOP)
    cluster.start_worker(concurrency=1)
    wait_until(lambda: len(cluster.effects.list_effects(handle.id)) == 2, "its second attempt, elsewhere")
    go.touch()
    assert handle.get(timeout=30) == "a"
    frozen.signal(signal.SIGCONT)
    wait_until(lambda: "what it wrote was rolled back" in frozen.log.read_text(), "the stopped worker noticing")
    with cluster.orchestrator.store.read("look") as connection:
        assert list(connection.scalars(select(entry.c.attempt).where(entry.c.instance == handle.id))) == [2]
    assert [(e.attempts, e.strays) for e in handle.history()] == [(2, [])]


def frozen_with_the_store(cluster: Cluster, go: Path) -> None:
    """On SQLite nobody can give up a process that has the only write transaction: all wait for it."""
    frozen = cluster.start_worker(concurrency=1)
    handle = cluster.start("waits", str(go))
    wait_until(lambda: cluster.effects.list_effects(handle.id), "the body running")
    cluster.start_worker(concurrency=1)
    frozen.signal(signal.SIGSTOP)
    time.sleep(2 * 1.5)  # the heartbeat limit, twice
    go.touch()
    frozen.signal(signal.SIGCONT)
    assert handle.get(timeout=30) == "a"
    assert entries(cluster, handle.id) == ["a"]


@pytest.mark.parametrize(
    "databases", ["postgresql", *(pytest.param(n, marks=pytest.mark.storm) for n in ("mysql", "sqlite"))], indirect=True
)
def test_a_process_that_was_frozen_past_the_limit_adds_no_effect(
    store_url: str, broker_url: str, tmp_path: Path
) -> None:
    cluster = open_cluster(tmp_path, store_url, broker_url)
    try:
        story: Callable[[Cluster, Path], None]
        story = frozen_with_the_store if cluster.orchestrator.store.is_sqlite else given_up_while_frozen
        story(cluster, tmp_path / "go")
    finally:
        cluster.close()


# --- declaring and calling ----------------------------------------------------------------------------------------


@pytest.fixture
def orchestrator(sqlite_url: str) -> Iterator[Orchestrator]:
    app = Celery("bank", set_as_current=False)
    app.conf.task_always_eager = True
    orchestrator = Orchestrator(app, store=sqlite_url)
    with orchestrator.store.begin("create") as connection:
        metadata.create_all(connection)
    yield orchestrator
    orchestrator.store.dispose()
    orchestrator.bodies.store.dispose()
    app.close()


def declare(orchestrator: Orchestrator, function: Callable[..., Any], **options: Any) -> Any:
    return orchestrator.activity(transactional=True)(orchestrator.app.task(shared=False, **options)(function))


def pay(name: str, *, session: Session) -> str:
    write(session, name)
    return name


def list_names(orchestrator: Orchestrator) -> list[str]:
    with orchestrator.store.read("look") as connection:
        return list(connection.scalars(select(entry.c.name)))


def test_callers_leave_the_session_out(orchestrator: Orchestrator) -> None:
    task = declare(orchestrator, pay)
    assert not orchestrator.app.finalized
    assert task.delay("before").get() == "before"
    orchestrator.app.finalize()
    assert task.delay("after").get() == "after"
    assert task("called") == "called"
    assert list_names(orchestrator) == ["before", "after", "called"]
    for wrong in ((), ("a", "b")):
        with pytest.raises(TypeError):
            task.delay(*wrong)
    with pytest.raises(TypeError, match="leave it out"):
        check_arguments(task, ("a",), {"session": None})


def test_a_caller_of_the_function_may_give_a_session_of_his_own(orchestrator: Orchestrator) -> None:
    task = declare(orchestrator, pay)
    with orchestrator.store.begin("own") as connection, Session(connection) as session:
        task("mine", session=session)
        session.rollback()
    assert list_names(orchestrator) == []


def test_a_task_declared_after_the_app_was_finalized_is_given_its_session(orchestrator: Orchestrator) -> None:
    orchestrator.app.finalize()
    assert declare(orchestrator, pay)("late") == "late"
    orchestrator.install()
    assert declare(orchestrator, pay).delay("again").get() == "again"
    assert list_names(orchestrator) == ["late", "again"]


def takes_none(name: str) -> None: ...


def takes_it_first(session: Session, name: str) -> None: ...


def takes_any(name: str, **options: Any) -> None: ...


def takes_it_by_position(name: str, session: Session, /) -> None: ...


@pytest.mark.parametrize("function", [takes_none, takes_it_first, takes_any, takes_it_by_position])
def test_a_task_that_takes_no_session_is_refused(orchestrator: Orchestrator, function: Callable[..., Any]) -> None:
    declare(orchestrator, function, name="pay")
    with pytest.raises(ConfigurationError, match="pay is declared transactional"):
        orchestrator.app.finalize()
    with pytest.raises(ConfigurationError, match="pay is declared transactional"):
        orchestrator.install()
