"""Eager mode: no worker, no broker, and the same outcomes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import TimeoutError as CeleryTimeout
from sqlalchemy import create_engine, text, update
from sqlalchemy.orm import Session

from orchestrator import Context, Orchestrator, OrchestratorError, RetryPolicy, WorkflowFailed, current_step, errors
from orchestrator.runtime import eager
from orchestrator.store import workers
from orchestrator.store.tables import worker
from orchestrator.store.workers import Worker


class Shop(SimpleNamespace):
    """An app whose broker is not there, its tasks, and what they did."""

    app: Celery
    orchestrator: Orchestrator
    done: list[str]


class Refused(Exception):
    pass


@pytest.fixture
def shop() -> Iterator[Shop]:
    app = Celery("eager", broker="redis://127.0.0.1:1", backend="redis://127.0.0.1:1", set_as_current=False)
    app.conf.task_always_eager = True
    shop = make_shop(app, Orchestrator(app))
    yield shop
    app.close()


def make_shop(app: Celery, orchestrator: Orchestrator) -> Shop:
    done: list[str] = []
    tries: dict[str, int] = {}

    @app.task(shared=False, name="do")
    def do(name: str) -> str:
        done.append(name)
        return name

    @app.task(shared=False, name="undo")
    def undo(result: str | None) -> None:
        done.append(f"undo {result}")

    @app.task(shared=False, name="refuse")
    def refuse(name: str) -> None:
        raise Refused(name)

    @app.task(shared=False, bind=True, name="flaky", max_retries=3, default_retry_delay=3600)
    def flaky(self: Any, name: str, failures: int) -> str:
        tries[name] = tries.get(name, 0) + 1
        if tries[name] <= failures:
            raise self.retry(exc=Refused(name))
        return f"{name} after {tries[name]}"

    @app.task(shared=False, name="begins")
    def begins(name: str) -> str:
        """A step that starts another workflow, and waits for it."""
        assert current_step() is not None
        return str(completes.delay(name).get(timeout=5))

    @orchestrator.workflow(name="completes")
    def completes(ctx: Context, name: str) -> str:
        return str(ctx.run(do.s(name), compensate=undo))

    @orchestrator.workflow(name="undoes")
    def undoes(ctx: Context) -> None:
        ctx.gather(*(ctx.start(do.s(name), compensate=undo) for name in "abc"))
        ctx.run(refuse.s("no courier"))

    @orchestrator.workflow(name="is_long")
    def is_long(ctx: Context, count: int) -> int:
        return sum(len(ctx.run(do.s("x"))) for _ in range(count))

    @orchestrator.workflow(name="sleeps")
    def sleeps(ctx: Context) -> float:
        before = ctx.now()
        ctx.sleep(timedelta(days=30))
        ctx.run(do.s("late"))
        return (ctx.now() - before).total_seconds()

    @orchestrator.workflow(name="retries")
    def retries(ctx: Context) -> str:
        policy = RetryPolicy(max_attempts=2, initial_interval=timedelta(hours=1))
        first = ctx.run(flaky.s("own", 2))
        ctx.run(refuse.s("twice"), retry=policy, optional=True)
        return str(first)

    @orchestrator.workflow(name="receives")
    def receives(ctx: Context, timeout: float | None) -> str:
        ctx.run(do.s("first"))
        return str(ctx.receive("paid", timeout=timeout))

    @orchestrator.workflow(name="recurs")
    def recurs(ctx: Context, left: int) -> str:
        ctx.sleep(60)
        if left:
            ctx.recur(left - 1)
        return "over"

    @orchestrator.workflow(name="parent")
    def parent(ctx: Context) -> str:
        child = ctx.run(completes.s("child"))
        ctx.sleep(60)
        return f"{child} {ctx.run(begins.s('nested'))}"

    @orchestrator.workflow(name="mistaken")
    def mistaken(ctx: Context) -> None:
        ctx.run(do.s("a"), compensate=undo)
        undefined  # type: ignore[name-defined] # noqa: B018, F821 - the typo of a deploy

    @orchestrator.workflow(name="asks_elsewhere")
    def asks_elsewhere(ctx: Context) -> None:
        ctx.run(app.signature("elsewhere"), foreign=True, timeout=60)

    @orchestrator.workflow(name="hurries", deadline=timedelta(hours=1))
    def hurries(ctx: Context) -> None:
        ctx.run(do.s("a"), compensate=undo)
        ctx.receive("never")

    local = {name: value for name, value in locals().items() if not name.startswith("_")}
    return Shop(**local)


def test_a_workflow_runs_to_its_end_at_once(shop: Shop) -> None:
    handle = shop.completes.delay("a")
    assert (handle.state, handle.instance_status, handle.result) == ("SUCCESS", "COMPLETED", "a")
    assert handle.get() == "a"
    assert [entry.outcome for entry in handle.history()] == ["succeeded"]
    assert [each.instance_id for each in shop.orchestrator.list()] == [handle.id]
    assert shop.orchestrator.start(shop.completes.s("b"), instance_id="b").get(timeout=1) == "b"
    assert shop.orchestrator.start(shop.completes.s("b"), instance_id="b").get() == "b"
    assert shop.done == ["a", "b"]


def test_a_failure_undoes_in_reverse(shop: Shop) -> None:
    handle = shop.undoes.delay()
    assert handle.instance_status == "COMPENSATED"
    assert shop.done == ["a", "b", "c", "undo c", "undo b", "undo a"]
    with pytest.raises(WorkflowFailed, match="no courier"):
        handle.get()
    with pytest.raises(Refused):
        handle.get()


def test_what_fails_is_raised_where_celery_is_told_to(shop: Shop) -> None:
    shop.app.conf.task_eager_propagates = True
    with pytest.raises(Refused, match="no courier"):
        shop.undoes.delay()
    with pytest.raises(Refused, match="no courier"):
        shop.undoes.apply()
    assert shop.done[-1] == "undo a"


def test_length_does_not_recurse(shop: Shop) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(list_frames()) + 180)  # less than one frame for each step
    try:
        assert shop.is_long.delay(200).get() == 200
        assert shop.recurs.delay(200).get() == "over"
    finally:
        sys.setrecursionlimit(limit)


def list_frames() -> list[Any]:
    frame, frames = sys._getframe(), []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    return frames


def test_links_from_workflow_to_workflow_do_not_recurse(shop: Shop) -> None:
    first = shop.completes.s("0")
    last = first
    for number in range(1, 120):
        following = shop.completes.si(str(number))
        last.link(following)
        last = following
    first.apply_async()
    assert shop.done == [str(number) for number in range(120)]


def test_time_is_skipped(shop: Shop) -> None:
    assert shop.sleeps.delay().get() == pytest.approx(30 * 86400, abs=60)
    assert shop.retries.delay().get() == "own after 3"


def test_what_nobody_runs_times_out(shop: Shop) -> None:
    handle = shop.asks_elsewhere.delay()
    assert handle.instance_status == "FAILED"
    with pytest.raises(TimeoutError):
        handle.get()


def test_a_message_may_be_sent_before_its_timeout_passes(shop: Shop) -> None:
    handle = shop.receives.delay(3600.0)
    assert (handle.state, shop.done) == ("STARTED", ["first"])
    handle.send("paid", "cash")
    assert handle.get() == "cash"
    forgotten = shop.receives.delay(3600.0)
    with pytest.raises(TimeoutError):  # whoever waits for it lets the time pass
        forgotten.get()


def test_what_cannot_end_says_so(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = shop.receives.delay(None)
    with pytest.raises(errors.EagerModeStuck, match=r"it waits for a message on 'paid'; send one"):
        handle.get()
    handle.cancel("enough")
    assert handle.instance_status == "CANCELLED"
    with pytest.raises(errors.EagerModeStuck, match=r"BLOCKED.*NameError"):
        shop.mistaken.delay().get()
    monkeypatch.setattr(eager, "MOST_SKIPS", 20)
    with pytest.raises(errors.EagerModeStuck, match="after 20 timers it still goes on"):
        shop.recurs.delay(10**9)


def test_a_deadline_passes_while_it_is_waited_for(shop: Shop) -> None:
    handle = shop.hurries.delay()
    assert handle.instance_status == "RUNNING"
    with pytest.raises(Exception, match="deadline"):
        handle.get()
    assert (handle.instance_status, shop.done) == ("CANCELLED", ["a", "undo a"])


def test_children_and_workflows_that_steps_start_run_too(shop: Shop) -> None:
    assert shop.parent.delay().get() == "child nested"
    assert shop.done == ["child", "nested"]


def test_a_completed_instance_is_undone(shop: Shop) -> None:
    handle = shop.completes.delay("a")
    handle.undo()
    assert (handle.instance_status, shop.done) == ("COMPENSATED", ["a", "undo a"])


def test_canvas(shop: Shop) -> None:
    assert chain(shop.do.s("a"), shop.completes.s(), shop.do.s()).delay().get() == "a"
    assert group(shop.completes.s("a"), shop.do.s("b")).delay().get() == ["a", "b"]

    @shop.app.task(shared=False, name="join")
    def join(results: list[str]) -> str:
        return "+".join(results)

    @shop.orchestrator.workflow(name="joins")
    def joins(ctx: Context, results: list[str]) -> str:
        return str(ctx.run(join.s(results)))

    assert chord([shop.completes.s("a"), shop.do.s("b")], joins.s()).delay().get() == "a+b"
    shop.done.clear()
    shop.completes.apply_async(("a",), link=shop.do.si("linked"))
    assert shop.done == ["a", "linked"]


def test_a_transactional_step_commits_what_it_writes_with_its_result(shop: Shop) -> None:
    @shop.orchestrator.activity(transactional=True)
    @shop.app.task(shared=False, name="book")
    def book(name: str, fails: bool, session: Session) -> str:
        session.execute(text("CREATE TABLE IF NOT EXISTS booked (name TEXT)"))
        session.execute(text("INSERT INTO booked VALUES (:name)"), {"name": name})
        if fails:
            raise Refused(name)
        return name

    @shop.orchestrator.workflow(name="books")
    def books(ctx: Context, name: str, fails: bool) -> str:
        return str(ctx.run(book.s(name, fails)))

    assert books.delay("a", False).get() == "a"
    assert books.delay("b", True).instance_status == "FAILED"
    with shop.orchestrator.current.store.read("test") as connection:
        assert connection.execute(text("SELECT name FROM booked")).scalars().all() == ["a"]


def test_apply_runs_here_though_others_do_not() -> None:
    app = Celery("lazy", broker="redis://127.0.0.1:1", set_as_current=False)
    shop = make_shop(app, Orchestrator(app))
    result = shop.sleeps.apply()
    assert (result.state, result.get()) == ("SUCCESS", pytest.approx(30 * 86400, abs=60))
    failed = shop.undoes.apply()
    assert failed.state == "FAILURE"
    with pytest.raises(Refused):
        failed.get()
    with pytest.raises(errors.EagerModeStuck):
        shop.receives.apply((None,))
    with pytest.raises(OrchestratorError):  # no store is configured: only apply() makes one
        shop.orchestrator.list()
    app.close()


def test_it_refuses_to_run_beside_workers(sqlite_url: str) -> None:
    app = Celery("beside", broker="redis://127.0.0.1:1", set_as_current=False)
    shop = make_shop(app, Orchestrator(app, store=sqlite_url, heartbeat_limit=15))
    store = shop.orchestrator.store
    live = Worker("w", "celery@shop", 1, "1", 1, datetime.now(UTC), datetime.now(UTC), (), (), ("celery",))
    with store.begin("hire") as connection:
        workers.insert_worker(connection, live)
    app.conf.task_always_eager = True
    calls: list[Callable[[], Any]] = [
        lambda: shop.completes.delay("a"),
        lambda: shop.completes.apply(("a",)),
        lambda: shop.orchestrator.start(shop.completes.s("a")),
    ]
    for call in calls:
        with pytest.raises(errors.ConfigurationError, match=r"workers live on .*: celery@shop; run eagerly"):
            call()
    assert len(shop.orchestrator.list()) == 0
    app.conf.task_always_eager = False
    theirs = shop.orchestrator.start(shop.sleeps.s(), instance_id="theirs")  # no broker: a poller would publish it
    app.conf.task_always_eager = True
    theirs.cancel("to be done by a worker")
    with pytest.raises(CeleryTimeout):
        theirs.get(timeout=0.1)
    assert (theirs.instance_status, theirs.history(), shop.done) == ("PENDING", [], [])
    with store.begin("kill") as connection:  # killed last, it was given up by nobody, but does not beat
        connection.execute(update(worker).values(beat_at=datetime.now(UTC) - timedelta(minutes=1)))
    assert shop.completes.delay("a").get() == "a"
    shop.orchestrator.close()
    app.close()


def test_threads_wait_for_one_another(shop: Shop) -> None:
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(shop.completes.delay, map(str, range(24))))
    assert [handle.state for handle in handles] == ["SUCCESS"] * 24
    assert sorted(shop.done) == sorted(map(str, range(24)))


def test_what_an_interrupted_run_leaves_is_not_done_by_the_next_one(shop: Shop) -> None:
    @shop.app.task(shared=False, name="interrupted")
    def interrupted() -> None:
        raise KeyboardInterrupt

    @shop.orchestrator.workflow(name="interrupts")
    def interrupts(ctx: Context) -> None:
        ctx.gather(interrupted, shop.do.s("left"))

    with pytest.raises(KeyboardInterrupt):
        interrupts.delay()
    assert shop.completes.delay("next").get() == "next"
    assert shop.done == ["next"]


def test_a_store_that_is_configured_keeps_what_ran(sqlite_url: str) -> None:
    app = Celery("kept", broker="redis://127.0.0.1:1", set_as_current=False)
    app.conf.task_always_eager = True
    shop = make_shop(app, Orchestrator(app, store=sqlite_url))
    handle = shop.completes.delay("a")
    app.conf.task_always_eager = False
    assert handle.get(timeout=1) == "a"
    engine = create_engine(sqlite_url)
    app.conf.task_always_eager = True
    with Session(engine) as session:
        shop.orchestrator.start(shop.completes.s("never"), session=session)
        session.rollback()
        handle = shop.orchestrator.start(shop.completes.s("committed"), session=session)
        assert shop.done == ["a"]
        session.commit()
    assert (handle.state, shop.done) == ("SUCCESS", ["a", "committed"])
    shop.orchestrator.store.dispose()
    engine.dispose()
    app.close()
