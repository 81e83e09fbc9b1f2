"""What is started and enqueued in the caller's transaction exists if that commits, on every store."""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group, shared_task
from sqlalchemy import Connection, Engine, create_engine, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from orchestrator import Context, Orchestrator, errors, shared_workflow
from orchestrator.runtime.owner import orchestrator_of
from orchestrator.store.tables import outbox
from tests.brokers import free_port
from tests.processes import warm_process
from tests.runtime.cluster import ROOT, Cluster
from tests.waiting import wait_until


@shared_task
def add(left: int, right: int) -> int:
    return left + right


@shared_task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task(bind=True)
def note(self: Any, path: str, *what: Any) -> None:
    request = self.request
    line = [request.id, request.root_id, request.eta, request.expires, request.delivery_info["routing_key"], repr(what)]
    with Path(path).open("a") as notes:
        notes.write(json.dumps(line) + "\n")


@shared_workflow
def doubles(ctx: Context, number: int) -> int:
    return int(ctx.run(add.s(number, number)))


@shared_workflow
def sends(ctx: Context, path: str) -> None:
    orchestrator = orchestrator_of(note.app)
    with Session(create_engine(orchestrator.store.url)) as session:
        orchestrator.enqueue(note.s(path), session=session)
        session.commit()


@dataclass
class Note:
    """What a task noted that it was sent with."""

    id: str
    root_id: str
    eta: str | None
    expires: str | None
    queue: str
    what: str


class Shop:
    """A cluster with a worker, and an application that keeps its orders in the store's database."""

    def __init__(self, cluster: Cluster, engine: Engine) -> None:
        self.cluster = cluster
        self.engine = engine
        self.start, self.enqueue = cluster.orchestrator.start, cluster.orchestrator.enqueue

    def order(self, own: Session | scoped_session[Session] | Connection, name: str, path: Path) -> None:
        """Do in one transaction what belongs together: an order, its checkout, and a note."""
        own.execute(text("INSERT INTO own_order (name) VALUES (:name)"), {"name": name})
        self.start(self.cluster.task("doubles").s(4), instance_id=name, session=own)
        self.enqueue(self.cluster.task("note").s(str(path), name), session=own)

    def exists(self, name: str) -> bool:
        with self.engine.connect() as connection:
            found = connection.execute(text("SELECT name FROM own_order WHERE name = :name"), {"name": name}).scalar()
        return found is not None

    def enqueued(self) -> list[str]:
        with self.cluster.orchestrator.store.read("look") as connection:
            return list(connection.execute(select(outbox.c.task_id)).scalars())

    def assert_done(self, name: str, path: Path) -> None:
        assert self.exists(name)
        assert self.cluster.orchestrator.get(name).get(timeout=20) == 8
        wait_until(lambda: notes(path), f"the note of {name}\n{self.cluster.logs()[-3000:]}")
        wait_until(lambda: not self.enqueued(), "the outbox being empty")
        assert [each.what for each in notes(path)] == [repr((name,))]

    def assert_undone(self, name: str, path: Path) -> None:
        # whatever had been sent would have come by now
        for _ in range(4):
            assert self.cluster.task("add").delay(1, 1).get(timeout=20) == 2
        assert not self.exists(name)
        assert self.cluster.orchestrator.find_instance(name) is None
        assert self.enqueued() == []
        assert notes(path) == []


def notes(path: Path) -> list[Note]:
    return [Note(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def shop(shared_url: str, tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    backend = {"result_backend": valkey_url}
    fast = {"publish_grace": 1.0}
    cluster = Cluster(folder, shared_url, valkey_url, settings=fast, celery=backend, tasks=__name__)
    engine = create_engine(shared_url)
    try:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE own_order (name VARCHAR(100))"))
        cluster.start_worker().wait_ready()
        yield Shop(cluster, engine)
    finally:
        engine.dispose()
        cluster.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notes"


@pytest.fixture
def name() -> str:
    return f"order-{uuid.uuid4().hex[:8]}"


# --- commit and rollback ------------------------------------------------------------------------------------------


def test_a_commit_brings_all_of_it_about(shop: Shop, name: str, path: Path) -> None:
    with Session(shop.engine) as session:
        shop.order(session, name, path)
        assert shop.cluster.orchestrator.find_instance(name) is None
        session.commit()
        assert shop.enqueued() == []  # sent, by the commit itself
    shop.assert_done(name, path)


def test_scoped_sessions_and_connections_are_taken_too(shop: Shop, name: str, path: Path) -> None:
    scoped = scoped_session(sessionmaker(shop.engine))
    shop.order(scoped, name, path)
    scoped.commit()
    scoped.remove()
    shop.assert_done(name, path)
    other, its_path = f"{name}-2", path.with_name("its")
    with shop.engine.begin() as connection:
        shop.order(connection, other, its_path)
    began = time.monotonic()
    shop.assert_done(other, its_path)  # found by the poller
    assert time.monotonic() - began < 10


def test_a_transaction_that_is_given_up_leaves_nothing(shop: Shop, name: str, path: Path) -> None:
    with Session(shop.engine) as session:
        shop.order(session, name, path)
        session.rollback()
    with shop.engine.connect() as connection:
        shop.order(connection, name, path)
        connection.rollback()
    with pytest.raises(LookupError), Session(shop.engine) as session, session.begin():
        shop.order(session, name, path)
        raise LookupError
    shop.assert_undone(name, path)
    with Session(shop.engine) as session, session.begin():  # the same id is as new
        shop.order(session, name, path)
    shop.assert_done(name, path)


def test_a_savepoint_that_is_rolled_back_takes_with_it_what_was_in_it(shop: Shop, name: str, path: Path) -> None:
    # the first thing in its transaction, and again after something else
    inside, its_path = [f"{name}-in", f"{name}-in-2"], path.with_name("inside")
    with Session(shop.engine) as session:
        for each in inside:
            savepoint = session.begin_nested()
            shop.order(session, each, its_path)
            savepoint.rollback()
            session.execute(text("DELETE FROM own_order WHERE name = 'nobody'"))
        with session.begin_nested():
            shop.order(session, name, path)
        session.commit()
    shop.assert_done(name, path)
    for each in inside:
        shop.assert_undone(each, its_path)


def test_a_savepoint_of_the_connection_is_found_out_about(shop: Shop, name: str, path: Path) -> None:
    with Session(shop.engine) as session:
        session.execute(text("DELETE FROM own_order WHERE name = 'nobody'"))
        savepoint = session.connection().begin_nested()  # the session is not told of its end
        shop.order(session, name, path)
        savepoint.rollback()
        session.commit()
    shop.assert_undone(name, path)


# --- the same id twice --------------------------------------------------------------------------------------------


def test_starting_twice_in_a_transaction_is_starting_once(shop: Shop, name: str) -> None:
    task = shop.cluster.task("doubles")
    with Session(shop.engine) as session:
        for _ in range(2):
            assert shop.start(task.s(4), instance_id=name, session=session).id == name
        with pytest.raises(errors.InstanceExists, match="with other input"):
            shop.start(task.s(5), instance_id=name, session=session)
        with pytest.raises(errors.InstanceExists):
            shop.start(task.s(4), instance_id=name, session=session, on_conflict="raise")
        session.commit()
    assert shop.cluster.orchestrator.get(name).get(timeout=20) == 8


def test_an_instance_that_the_transaction_is_too_old_to_see_is_found(shop: Shop, name: str) -> None:
    task = shop.cluster.task("doubles")
    with Session(shop.engine) as session:
        if not shop.cluster.orchestrator.store.is_sqlite:  # there nobody else writes to meanwhile
            session.execute(text("SELECT * FROM own_order"))  # MariaDB's transaction sees what was there by now
        shop.start(task.s(4), instance_id=name)
        assert shop.start(task.s(4), instance_id=name, session=session).id == name
        with pytest.raises(errors.InstanceExists, match="with other input"):
            shop.start(task.s(5), instance_id=name, session=session)
        session.commit()
    assert shop.cluster.orchestrator.get(name).get(timeout=20) == 8


def test_of_two_transactions_that_start_the_same_the_second_waits_for_the_first(shop: Shop, name: str) -> None:
    task, ended = shop.cluster.task("doubles"), []

    def start_too() -> None:
        with Session(shop.engine) as session:
            shop.start(task.s(4), instance_id=name, session=session)
            session.commit()
        ended.append(name)

    with Session(shop.engine) as session:
        shop.start(task.s(4), instance_id=name, session=session)
        second = threading.Thread(target=start_too, daemon=True)
        second.start()
        second.join(0.5)
        assert not ended
        session.commit()
    second.join(20)
    assert ended == [name]
    assert shop.cluster.orchestrator.get(name).get(timeout=20) == 8


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["before", "after"])
def test_a_process_killed_at_its_commit_leaves_all_of_it_or_nothing(
    shop: Shop, name: str, path: Path, point: str
) -> None:
    log = path.with_suffix(".log")
    command = ["-m", "tests.runtime.committing", point, name, str(path)]
    assert warm_process(command, ROOT, shop.cluster.environment, log).wait(60) == -signal.SIGKILL, log.read_text()
    if point == "after":
        assert shop.exists(name)
        shop.assert_done(name, path)
    else:
        shop.assert_undone(name, path)


def test_a_broker_that_is_away_at_the_commit_is_made_up_for(shop: Shop, name: str, path: Path) -> None:
    client = Celery("client", broker=f"redis://127.0.0.1:{free_port()}", set_as_current=False)
    client.conf.update(task_default_queue=shop.cluster.queue, broker_transport_options={"max_retries": 0})
    orchestrator = Orchestrator(client, store=shop.cluster.environment["TEST_STORE"], publish_grace=0.5)
    began = time.monotonic()
    with Session(shop.engine) as session, session.begin():
        orchestrator.start(client.tasks[f"{__name__}.doubles"].s(4), instance_id=name, session=session)
        sent = [
            orchestrator.enqueue(client.tasks[f"{__name__}.note"].s(str(path), n), session=session) for n in range(20)
        ]
    assert time.monotonic() - began < 10  # not each of them has waited for the broker
    assert orchestrator.get(name).get(timeout=20) == 8
    wait_until(lambda: len(notes(path)) == 20, f"the notes\n{shop.cluster.logs()[-3000:]}")
    assert {each.id for each in notes(path)} == {result.id for result in sent}
    orchestrator.store.dispose()
    client.close()


# --- what is sent -------------------------------------------------------------------------------------------------


def test_options_ids_and_times_are_those_of_the_call(shop: Shop, path: Path) -> None:
    note_, linked, other = shop.cluster.task("note"), path.with_name("linked"), f"{shop.cluster.queue}-other"
    shop.cluster.app.control.add_consumer(other, reply=True, timeout=2)
    signature = note_.s(str(path)).set(countdown=1.0, expires=60, queue=other, task_id=path.parent.name)
    signature.link(note_.si(str(linked)))
    before = json.dumps(signature)
    called = datetime.now(UTC)
    with Session(shop.engine) as session:
        result = shop.enqueue(signature, session=session)
        time.sleep(1.5)  # longer than the countdown, and the grace: by the commit it is nobody's own
        session.commit()
    assert (result.id, json.dumps(signature)) == (path.parent.name, before)
    (sent,) = wait_until(lambda: notes(path), "the note")
    wait_until(lambda: notes(linked), "the note of the link")
    assert (sent.id, sent.queue, len(notes(path))) == (result.id, other, 1)
    assert sent.eta is not None
    assert sent.expires is not None
    assert abs(datetime.fromisoformat(sent.eta) - called - timedelta(seconds=1)) < timedelta(seconds=0.5)
    assert abs(datetime.fromisoformat(sent.expires) - called - timedelta(seconds=60)) < timedelta(seconds=0.5)


def test_a_canvas_is_sent_as_one(shop: Shop) -> None:
    add_, total_ = shop.cluster.task("add"), shop.cluster.task("total")
    canvases: list[tuple[Callable[[], Any], Any]] = [
        (lambda: chain(add_.s(1, 2), add_.s(10)), 13),
        (lambda: group(add_.s(n, n) for n in range(3)), [0, 2, 4]),
        (lambda: chord([add_.s(n, n) for n in range(3)], total_.s()), 6),
        (lambda: chain(add_.s(1, 1), group(add_.s(n) for n in range(2)), total_.s(), add_.s(3)), 8),
        (lambda: chain(add_.s(1, 2), shop.cluster.task("doubles").s()), 6),
        (lambda: add_.chunks(zip(range(4), range(4), strict=True), 3), [[0, 2, 4], [6]]),
        (lambda: add_.starmap([(1, 2), (3, 4)]), [3, 7]),
    ]
    with Session(shop.engine) as session:
        results = [shop.enqueue(make(), session=session) for make, _ in canvases]
        session.commit()
    for result, (_, wanted) in zip(results, canvases, strict=True):
        assert result.get(timeout=20) == wanted


def test_all_arguments_are_taken_that_a_message_takes(shop: Shop, path: Path) -> None:
    given = (
        datetime(2024, 5, 1, tzinfo=UTC),
        uuid.UUID(int=7),
        Decimal("1.10"),
        b"\xff\x00",
        "\0 näive 🎉",
        {"a": [1.5]},
    )
    with Session(shop.engine) as session:
        shop.enqueue(shop.cluster.task("note").s(str(path), *given), session=session)
        session.commit()
    (sent,) = wait_until(lambda: notes(path), "the note")
    assert sent.what == repr(given)


@dataclass
class Refused:
    what: Callable[[Shop], Any]
    error: type[Exception]
    match: str


REFUSED = {
    "object": Refused(
        lambda shop: shop.cluster.task("note").s(object()), errors.NotEncodable, "note cannot be encoded"
    ),
    "in a chain": Refused(
        lambda shop: chain(shop.cluster.task("add").s(1, 2), shop.cluster.task("add").s(object())),
        errors.NotEncodable,
        "celery.chain cannot be encoded",
    ),
    "too large": Refused(lambda shop: shop.cluster.task("note").s("x" * 2_000_000), errors.PayloadTooLarge, "bytes"),
    "too few": Refused(lambda shop: shop.cluster.task("add").s(1), errors.InputMismatch, "missing 1 required"),
    "too few in a group": Refused(
        lambda shop: group([shop.cluster.task("add").s(1)]), errors.InputMismatch, "missing 1 required"
    ),
    "workflow": Refused(
        lambda shop: shop.cluster.task("doubles").s(1),
        errors.InvalidOperation,
        r"is a workflow: start it with .*start\(",
    ),
    "task": Refused(lambda shop: shop.cluster.task("add"), errors.InvalidOperation, "takes a signature"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sent_is_refused_at_the_call(shop: Shop, case: str) -> None:
    refused = REFUSED[case]
    with ExitStack() as stack:
        session = stack.enter_context(Session(shop.engine))
        check: AbstractContextManager[Any] = pytest.raises(refused.error, match=refused.match)
        with check:
            shop.enqueue(refused.what(shop), session=session)
        session.commit()
    assert shop.enqueued() == []


def test_a_workflow_function_cannot_enqueue(shop: Shop, path: Path) -> None:
    handle = shop.cluster.run("sends", str(path))
    assert handle.instance_status == "BLOCKED"
    assert "note" in str(handle.describe().blocked)
    assert shop.enqueued() == []
    assert notes(path) == []
