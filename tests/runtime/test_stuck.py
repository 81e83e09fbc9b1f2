"""What ``stuck`` finds, on each kind of store; workers are rows here, and their work is done by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, signature
from sqlalchemy import event, insert, update

from orchestrator import Context, Orchestrator, RetryPolicy, WorkflowHandle, errors
from orchestrator.core.attempts import AttemptFailed, AttemptLost, AttemptSucceeded, Ended
from orchestrator.runtime.stuck import Reason, Stuck, find_stuck
from orchestrator.store import claiming, history, instances, tables, workers
from orchestrator.store.claiming import Claimant
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance
from orchestrator.store.workers import Worker
from tests.core.host import failure

FAILS = AttemptFailed(failure(RuntimeError, "the gateway does not answer\nand goes on saying so"))
SLOWLY = RetryPolicy(initial_interval=timedelta(minutes=10), jitter=0)
WORKER = Worker("worker-1", "one@host", 1, "0", 1, datetime.now(UTC), datetime.now(UTC), (), (), ("celery",))


class Shop:
    """An app, and workers that only say that they are there."""

    def __init__(self, url: str, heartbeat_limit: float = 600.0) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.orchestrator = Orchestrator(self.app, store=url, heartbeat_limit=heartbeat_limit)
        self.now = datetime.now(UTC)
        self.orchestrator.coordinator.clock = lambda: self.now
        self.orchestrator.executing.note_beat("worker-1")
        app = self.orchestrator.app
        app.task(name="charge", shared=False)(charge)
        self.orchestrator.activity(retry=SLOWLY)(app.task(name="refund", shared=False)(refund))
        for function in (forgotten, buy, ask, ask_for_a_while, ask_two, pay_elsewhere, pays_later, mistyped):
            self.orchestrator.workflow(name=function.__name__)(function)
        self.orchestrator.workflow(name="parked", park=True)(parked)

    def add_worker(self, **values: Any) -> None:
        own = {"workflows": tuple(self.orchestrator.workflows.names()), "tasks": ("charge", "refund")} | values
        own = {"beat_at": datetime.now(UTC), **own}
        with self.orchestrator.store.begin("add-worker") as connection:
            workers.insert_worker(connection, replace(WORKER, **own))

    def start(self, name: str, instance_id: str = "order-1") -> WorkflowHandle:
        """Start an instance and make its first pass."""
        handle = self.orchestrator.start(self.app.tasks[name].s(), instance_id=instance_id)
        self.advance(handle)
        return handle

    def advance(self, handle: WorkflowHandle) -> None:
        self.orchestrator.coordinator.advance(handle.id, self.find(handle).generation)

    def find(self, handle: WorkflowHandle) -> Instance:
        found = self.orchestrator.find_instance(handle.id)
        assert found is not None
        return found

    def take(self, handle: WorkflowHandle, seq: int) -> HistoryRow:
        """Claim a step."""
        store = self.orchestrator.store
        with store.begin("claim") as connection:
            instance = instances.find_instance(connection, handle.id)
            assert instance is not None
            (row,) = [each for each in history.load_rows(connection, handle.id, instance.run) if each.seq == seq]
            claimant = Claimant("worker-1", 1)
            taken = claiming.claim(connection, row.key, row.name, row.dispatch, claimant, self.now, None)
        assert taken is not None
        return taken.row

    def end(self, handle: WorkflowHandle, seq: int, ended: Ended) -> None:
        row = self.take(handle, seq)
        self.orchestrator.coordinator.end_attempt(row.key, row.attempt, ended)

    def find_stuck(self, **options: Any) -> list[Stuck]:
        return list(find_stuck(self.orchestrator, **options).findings)

    def find_one(self, **options: Any) -> Stuck:
        (found,) = self.find_stuck(**options)
        return found


def charge(order: str) -> str:
    return order


def refund(charge_id: str | None) -> None: ...


def buy(ctx: Context) -> None:
    ctx.run(signature("charge", args=("a",)), compensate=signature("refund"))
    ctx.run(signature("charge", args=("b",)))


def parked(ctx: Context) -> None:
    ctx.run(signature("charge", args=("a",)))


def forgotten(_ctx: Context) -> None: ...


def ask(ctx: Context) -> None:
    ctx.receive("paid")


def ask_two(ctx: Context) -> None:
    ctx.wait(ctx.message("paid"), ctx.timer(10**6))


def ask_for_a_while(ctx: Context) -> None:
    ctx.receive("paid", timeout=10**6)


def pay_elsewhere(ctx: Context) -> None:
    ctx.run(signature("charge", args=("a",), queue="far away"), timeout=60)


def pays_later(ctx: Context) -> None:
    ctx.run(signature("charge", args=("a",), countdown=3600))


def mistyped(_ctx: Context) -> None:
    raise NameError("nmae")


@contextmanager
def opened(url: str, heartbeat_limit: float = 600.0) -> Iterator[Shop]:
    shop = Shop(url, heartbeat_limit)
    yield shop
    shop.orchestrator.store.dispose()
    shop.app.close()


@pytest.fixture
def shop(sqlite_url: str) -> Iterator[Shop]:
    with opened(sqlite_url) as shop:
        yield shop


@pytest.fixture
def any_shop(store_url: str) -> Iterator[Shop]:
    """A shop on each kind of store in turn."""
    with opened(store_url) as shop:
        yield shop


def test_what_goes_on_is_not_stuck(shop: Shop) -> None:
    shop.add_worker()
    shop.start("buy", "scheduled")
    running = shop.start("buy", "running")
    shop.take(running, 0)
    shop.start("ask", "waiting")
    shop.start("ask_for_a_while", "with-a-timeout")
    assert find_stuck(shop.orchestrator).findings == ()


def test_steps_and_passes_that_wait_while_no_worker_is_alive_are_one_finding_each(shop: Shop) -> None:
    shop.start("buy")
    assert (shop.find_one().reason, shop.find_one().mend) == (Reason.NO_WORKER, ("worker",))
    assert "1 step waits" in shop.find_one().why
    shop.orchestrator.start(shop.app.tasks["ask"].s(), instance_id="order-2")
    assert [each.reason for each in shop.find_stuck()] == [Reason.NO_WORKER, Reason.NO_WORKER]


def test_what_waits_for_its_time_does_not_wait_for_a_worker(any_shop: Shop) -> None:
    shop = any_shop
    shop.orchestrator.start(shop.app.tasks["ask"].s().set(countdown=3600), instance_id="begins-later")
    shop.start("pays_later", "has-begun")
    assert shop.find_stuck() == []
    shop.now += timedelta(hours=2)
    assert [each.why for each in shop.find_stuck()] == [
        f"no worker is alive, and 1 {what} waits for one" for what in ("step", "instance")
    ]


def test_a_worker_that_was_killed_and_that_nobody_gave_up_is_not_alive(sqlite_url: str) -> None:
    with opened(sqlite_url) as shop:
        shop.add_worker(beat_at=shop.now - timedelta(seconds=30))
        shop.start("buy")
        assert shop.find_stuck() == []
    with opened(sqlite_url, heartbeat_limit=1.0) as shop:
        assert shop.find_one().reason is Reason.NO_WORKER


def test_a_queue_that_nobody_serves_is_named(shop: Shop) -> None:
    shop.add_worker()
    shop.start("pay_elsewhere")
    found = shop.find_one()
    assert (found.reason, found.instance_id, found.seq, found.name) == (Reason.QUEUE_UNSERVED, "order-1", 0, "charge")
    assert "'far away'" in found.why
    assert found.mend == ("worker", "--queues", "far away")
    shop.add_worker(incarnation="worker-2", queues=("far away",))
    assert shop.find_stuck() == []


def test_a_task_that_no_worker_of_its_queue_has_is_named(shop: Shop) -> None:
    shop.add_worker(tasks=("refund",))
    shop.add_worker(incarnation="elsewhere", queues=("far away",))
    shop.start("buy")
    found = shop.find_one()
    assert (found.reason, found.name) == (Reason.TASK_UNREGISTERED, "charge")
    assert "'celery'" in found.why


def test_a_pass_whose_workflow_nobody_serves_is_named(shop: Shop) -> None:
    shop.add_worker(workflows=("ask",))
    shop.orchestrator.start(shop.app.tasks["buy"].s(), instance_id="order-1")
    found = shop.find_one()
    assert (found.reason, found.workflow, found.mend) == (
        Reason.WORKFLOW_UNSERVED,
        "buy",
        ("worker", "--queues", "celery"),
    )


def test_a_pass_that_was_published_time_and_again_is_named(shop: Shop) -> None:
    shop.add_worker()
    shop.orchestrator.start(shop.app.tasks["buy"].s(), instance_id="order-1")
    assert shop.find_stuck() == []
    with shop.orchestrator.store.begin("spoil") as connection:
        connection.execute(update(tables.instance).values(pass_publications=6))
    assert shop.find_one().reason is Reason.PASS_UNMADE


def test_a_blocked_step_is_named_with_its_error(shop: Shop) -> None:
    shop.add_worker()
    handle = shop.start("parked")
    shop.end(handle, 0, FAILS)
    found = shop.find_one()
    assert (found.reason, found.seq, found.mend) == (Reason.BLOCKED_STEP, 0, ("orchestrator", "resume", "order-1"))
    assert "the gateway does not answer" in found.why
    assert "fail-step 0" in found.why
    assert "parks" in found.why


def test_code_that_is_wrong_is_told_from_code_that_nobody_has(shop: Shop) -> None:
    shop.add_worker()
    shop.start("mistyped")
    found = shop.find_one()
    assert (found.reason, found.mend) == (Reason.BLOCKED_CODE, ("orchestrator", "resume", "order-1"))
    assert "NameError: nmae" in found.why
    with shop.orchestrator.store.begin("stop") as connection:
        workers.mark_dead(connection, "worker-1", None, shop.now)
    assert shop.find_one().reason is Reason.BLOCKED_UNREGISTERED


def test_passes_that_never_came_back_are_told_apart(shop: Shop) -> None:
    shop.add_worker()
    handle = shop.orchestrator.start(shop.app.tasks["buy"].s(), instance_id="order-1")
    with shop.orchestrator.store.begin("spoil") as connection:
        connection.execute(update(tables.instance).values(pass_attempts=3))
    shop.now += timedelta(hours=1)
    shop.advance(handle)
    assert handle.instance_status == "BLOCKED"
    assert shop.find_one().reason is Reason.BLOCKED_PASSES


def undoing(shop: Shop) -> WorkflowHandle:
    """An instance that has to undo its first step."""
    shop.add_worker()
    handle = shop.start("buy")
    shop.end(handle, 0, AttemptSucceeded('"paid"'))
    shop.end(handle, 1, FAILS)
    assert handle.instance_status == "COMPENSATING"
    return handle


def test_a_compensation_whose_next_attempt_is_far_away_is_named(shop: Shop) -> None:
    handle = undoing(shop)
    assert shop.find_stuck() == []
    shop.end(handle, 2, FAILS)
    found = shop.find_one()
    assert (found.reason, found.seq) == (Reason.COMPENSATION_RETRIED, 2)
    assert found.mend == ("orchestrator", "retry-compensation", "order-1", "2")
    assert "has failed once, last with builtins.RuntimeError: the gateway does not answer; its next" in found.why
    shop.orchestrator.get("order-1").retry_compensation(2)
    assert shop.find_stuck() == []


def test_what_could_not_be_undone_is_named_until_somebody_deals_with_it(shop: Shop) -> None:
    handle = undoing(shop)
    row = shop.take(handle, 2)
    with shop.orchestrator.store.begin("hurry") as connection:
        history.note_on_row(connection, row, {"retry": '{"max_attempts":1}'})
    shop.orchestrator.coordinator.end_attempt(row.key, row.attempt, FAILS)
    assert handle.instance_status == "COMPENSATION_FAILED"
    found = shop.find_one()
    assert (found.reason, found.seq, found.name) == (Reason.NOT_UNDONE, 2, "refund")
    assert found.mend == ("orchestrator", "retry-compensation", "order-1", "2")
    handle.skip_compensation(2, "by hand")
    assert shop.find_stuck() == []


def test_a_wait_for_a_message_without_a_timeout_counts_from_an_age_on(shop: Shop) -> None:
    shop.add_worker()
    for name in ("ask", "ask_two", "ask_for_a_while"):
        shop.start(name, name)
    shop.now += timedelta(minutes=30)
    assert shop.find_stuck() == []
    found = shop.find_one(older_than=timedelta(minutes=10))
    assert (found.reason, found.instance_id, found.name) == (Reason.MESSAGE_AWAITED, "ask", "paid")
    assert found.mend == ("orchestrator", "send", "ask", "paid", "MESSAGE")
    shop.orchestrator.send("ask", "paid", 1)
    assert shop.find_stuck(older_than=timedelta(minutes=10)) == []


def test_attempts_that_no_timeout_will_end_count_from_an_age_on(shop: Shop) -> None:
    shop.add_worker()
    endless, past = shop.start("buy", "endless"), shop.start("pay_elsewhere", "past")
    shop.take(endless, 0)
    timed = shop.take(past, 0)
    shop.now += timedelta(minutes=30)
    found = shop.find_one(older_than=timedelta(minutes=10))
    assert (found.reason, found.instance_id) == (Reason.ATTEMPT_LONG, "endless")
    assert found.mend == ("control", "terminate", "SIGTERM", "endless:0:0:1")
    shop.orchestrator.coordinator.time_out(timed.key)
    reasons = {each.instance_id: each.reason for each in shop.find_stuck(older_than=timedelta(minutes=10))}
    assert reasons == {"endless": Reason.ATTEMPT_LONG, "past": Reason.ATTEMPT_PAST_TIMEOUT}


def test_what_cannot_be_delivered_is_named(shop: Shop) -> None:
    own = {"due_at": shop.now, "created_at": shop.now}
    with shop.orchestrator.store.begin("spoil") as connection:
        for attempts in (2, 3):
            number = f"n{attempts}"
            finish = {"instance_id": number, "generation": "g", "attempts": attempts, "due_at": shop.now}
            connection.execute(insert(tables.finish), finish)
            connection.execute(
                insert(tables.outbox), {"task_id": number, "signature": "{}", "attempts": attempts, **own}
            )
            notice = {
                "id": f"notice-{attempts}",
                "instance_id": number,
                "signal": "s",
                "payload": "{}",
                "attempts": attempts,
            }
            connection.execute(insert(tables.notice), {**notice, **own})
    found = shop.find_stuck()
    assert [(each.reason, each.instance_id) for each in found] == [
        (Reason.END_UNTOLD, "n3"),
        (Reason.TASK_UNPUBLISHED, None),
        (Reason.SIGNAL_UNTOLD, "n3"),
    ]
    assert shop.find_stuck(workflow="buy") == []


def test_a_workflow_and_a_limit_narrow_what_is_found(shop: Shop) -> None:
    shop.add_worker()
    for number in range(3):
        shop.start("mistyped", f"m{number}")
    shop.end(shop.start("parked", "p"), 0, FAILS)
    assert {each.instance_id for each in shop.find_stuck(workflow="parked")} == {"p"}
    assert len(shop.find_stuck()) == 4
    report = find_stuck(shop.orchestrator, limit=2)
    assert (len(report.findings), report.is_complete) == (2, False)
    assert find_stuck(shop.orchestrator, limit=4).is_complete
    with pytest.raises(errors.InvalidOperation, match="limit"):
        find_stuck(shop.orchestrator, limit=0)


def spoil(shop: Shop, number: int) -> None:
    """Add one of everything that can be stuck."""
    shop.end(shop.start("parked", f"parked-{number}"), 0, FAILS)
    shop.start("mistyped", f"mistyped-{number}")
    shop.start("ask", f"ask-{number}")
    shop.take(shop.start("buy", f"long-{number}"), 0)
    shop.start("pay_elsewhere", f"unserved-{number}")
    shop.orchestrator.start(shop.app.tasks["forgotten"].s(), instance_id=f"unmade-{number}")
    for name in (f"retried-{number}", f"undone-{number}"):
        handle = shop.start("buy", name)
        shop.end(handle, 0, AttemptSucceeded('"paid"'))
        shop.end(handle, 1, FAILS)
        row = shop.take(handle, 2)
        with shop.orchestrator.store.begin("hurry") as connection:
            if name == f"undone-{number}":
                history.note_on_row(connection, row, {"retry": '{"max_attempts":1}'})
        shop.orchestrator.coordinator.end_attempt(row.key, row.attempt, FAILS)
    with shop.orchestrator.store.begin("spoil") as connection:
        finish = {"instance_id": f"untold-{number}", "generation": "g", "attempts": 5, "due_at": shop.now}
        connection.execute(insert(tables.finish), finish)


def test_all_of_it_is_found_on_every_store_by_as_many_queries_however_many_there_are(any_shop: Shop) -> None:
    shop = any_shop
    shop.add_worker(workflows=("buy", "parked", "ask", "mistyped", "pay_elsewhere"))
    shop.orchestrator.store.prepare()
    engine = shop.orchestrator.store._engine
    assert engine is not None
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    def find(count: int) -> int:
        statements.clear()
        found = shop.find_stuck(older_than=timedelta(seconds=1))
        asked = len(statements)
        by_instance = {each.instance_id: each.reason for each in found}
        for number in range(count):
            own = {k.partition("-")[0]: v for k, v in by_instance.items() if k and k.endswith(f"-{number}")}
            assert own == {
                "parked": Reason.BLOCKED_STEP,
                "mistyped": Reason.BLOCKED_CODE,
                "ask": Reason.MESSAGE_AWAITED,
                "long": Reason.ATTEMPT_LONG,
                "unserved": Reason.QUEUE_UNSERVED,
                "unmade": Reason.WORKFLOW_UNSERVED,
                "retried": Reason.COMPENSATION_RETRIED,
                "undone": Reason.NOT_UNDONE,
                "untold": Reason.END_UNTOLD,
            }
        assert len(found) == 9 * count
        return asked

    spoil(shop, 0)
    shop.now += timedelta(seconds=10)
    few = find(1)
    for number in range(1, 4):
        spoil(shop, number)
    shop.now += timedelta(seconds=10)
    assert find(4) == few


def test_lost_attempts_are_the_pollers_matter(shop: Shop) -> None:
    shop.add_worker()
    handle = shop.start("buy")
    shop.end(handle, 0, AttemptLost(failure(Exception, "gone")))
    assert shop.find_stuck() == []
