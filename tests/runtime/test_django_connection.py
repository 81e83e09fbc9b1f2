"""Starting, sending and enqueueing within Django's own transaction, on each kind of database that Django shares."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, shared_task
from sqlalchemy import insert, make_url, select, text

from orchestrator import Context, Orchestrator, errors, shared_workflow
from orchestrator.runtime.callers import writing
from orchestrator.store import instances
from orchestrator.store.tables import instance, outbox
from tests.runtime.django_project import Django
from tests.servers import Databases
from tests.waiting import wait_until


@shared_task
def note(_text: str) -> None:
    pass


@shared_workflow
def checkout(ctx: Context, order: str) -> None:
    ctx.receive("paid")


class Shop:
    """An orchestrator, and Django with the store's database as its default one."""

    def __init__(self, url: str, django: Django) -> None:
        self.app = Celery("shop", broker="memory://", set_as_current=False)
        self.app.conf.update(
            task_default_queue=f"shop-{uuid.uuid4().hex}", broker_transport_options={"polling_interval": 0.01}
        )
        self.orchestrator = Orchestrator(self.app, store=url)
        self.checkout, self.note = (self.app.tasks[f"{__name__}.{name}"] for name in ("checkout", "note"))
        self.django = django

    def order(self, name: str, session: Any = None) -> None:
        """Do in Django's transaction what belongs together."""
        with self.django.connection.cursor() as cursor:
            cursor.execute("INSERT INTO own_order (name) VALUES (%s)", [name])
        session = self.django.connection if session is None else session
        self.orchestrator.start(self.checkout.s(name), instance_id=name, session=session)

    def own(self) -> list[str]:
        with self.orchestrator.store.read("look") as connection:
            return list(connection.execute(text("SELECT name FROM own_order ORDER BY name")).scalars())

    def started(self) -> list[str]:
        with self.orchestrator.store.read("look") as connection:
            return list(connection.execute(select(instance.c.id).order_by(instance.c.id)).scalars())

    def published(self) -> list[str]:
        """Take the messages that were sent, and return their ids."""
        with self.app.connection_for_read() as connection:
            queue = connection.SimpleQueue(self.app.conf.task_default_queue, no_ack=True)
            return [queue.get_nowait().headers["id"] for _ in range(queue.qsize())]


@pytest.fixture
def shop(store_url: str) -> Iterator[Shop]:
    with Django({"default": store_url}) as django:
        shop = Shop(store_url, django)
        with django.connection.cursor() as cursor:
            cursor.execute(
                "CREATE TABLE own_order (name VARCHAR(100), made_at DATETIME)"
                if not django.is_postgresql
                else "CREATE TABLE own_order (name VARCHAR(100), made_at TIMESTAMPTZ)"
            )
        yield shop
        shop.orchestrator.store.dispose()
        shop.app.close()


# --- commit and rollback ------------------------------------------------------------------------------------------


def test_an_atomic_block_that_commits_starts_what_was_started_in_it(shop: Shop) -> None:
    with shop.django.atomic():
        shop.order("a")
        assert (shop.own(), shop.started(), shop.published()) == ([], [], [])
    assert (shop.own(), shop.started(), shop.published()) == (["a"], ["a"], ["a"])


def test_the_proxy_that_django_calls_connection_is_taken(shop: Shop) -> None:
    from django.db import connection

    with shop.django.atomic():
        shop.order("a", connection)
    assert (shop.started(), shop.published()) == (["a"], ["a"])


def test_an_atomic_block_that_fails_leaves_nothing(shop: Shop) -> None:
    with pytest.raises(LookupError), shop.django.atomic():
        shop.order("a")
        raise LookupError
    assert (shop.own(), shop.started(), shop.published()) == ([], [], [])
    with shop.django.atomic():  # the same id is as new
        shop.order("a")
    assert (shop.own(), shop.started(), shop.published()) == (["a"], ["a"], ["a"])


def test_a_savepoint_takes_with_it_what_was_started_in_it(shop: Shop) -> None:
    with shop.django.atomic():
        with pytest.raises(LookupError), shop.django.atomic():
            shop.order("first")  # before anything else is written
            raise LookupError
        shop.order("b")
        with pytest.raises(LookupError), shop.django.atomic():
            with shop.django.atomic():
                shop.order("c")
            raise LookupError
        with shop.django.atomic():
            shop.order("d")
    assert (shop.own(), shop.started(), shop.published()) == (["b", "d"], ["b", "d"], ["b", "d"])


def test_the_same_id_is_one_instance_and_does_not_break_the_transaction(shop: Shop) -> None:
    with shop.django.atomic():
        shop.order("a")
        shop.order("a")
        with pytest.raises(errors.InstanceExists, match="with other input"):
            shop.orchestrator.start(shop.checkout.s("x"), instance_id="a", session=shop.django.connection)
        shop.order("b")
    with shop.django.atomic():
        shop.order("a")
    assert (shop.own(), shop.started(), shop.published()) == (["a", "a", "a", "b"], ["a", "b"], ["a", "b"])


def test_messages_and_tasks_follow_the_transaction_too(shop: Shop) -> None:
    connection, orchestrator = shop.django.connection, shop.orchestrator
    for name, is_kept in [("kept", True), ("lost", False)]:
        with shop.django.atomic():
            shop.order(name)
            assert orchestrator.send(name, "paid", 1, session=connection)
            orchestrator.publish("news", name, session=connection)
            orchestrator.enqueue(shop.note.s(name), session=connection)
            assert orchestrator.send("nobody", "paid", 1, missing="ignore", session=connection) is False
            if not is_kept:
                shop.django.set_rollback()
        assert len(shop.published()) == (2 if is_kept else 0)  # nobody receives yet who would have to be woken
    assert shop.started() == ["kept"]
    with orchestrator.store.read("look") as store:
        assert store.execute(select(outbox.c.id)).all() == []
        assert store.execute(text("SELECT COUNT(*) FROM orchestrator_message")).scalar() == 1


def test_a_transaction_without_atomic_is_the_callers_to_commit(shop: Shop) -> None:
    shop.django.set_autocommit(False)
    try:
        shop.order("a")
        shop.django.connection.rollback()
        shop.order("b")
        shop.django.connection.commit()
    finally:
        shop.django.connection.rollback()
        shop.django.set_autocommit(True)
    assert (shop.own(), shop.started()) == (["b"], ["b"])
    assert shop.published() == []  # nobody told us: it is the poller's
    with shop.orchestrator.store.read("look") as connection:
        due = instances.find_instance(connection, "b")
    assert due is not None
    assert due.pass_due_at is not None
    assert due.pass_due_at <= datetime.now(UTC)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_outside_of_a_transaction_it_is_refused(shop: Shop) -> None:
    with pytest.raises(
        errors.InvalidOperation, match=r"'default', and no transaction is open .* transaction.atomic\(\)"
    ):
        shop.order("a")
    assert shop.started() == []


def test_a_transaction_that_can_only_be_rolled_back_is_refused(shop: Shop) -> None:
    from django.db.transaction import TransactionManagementError

    with shop.django.atomic():
        shop.django.set_rollback()
        with pytest.raises(TransactionManagementError):
            shop.orchestrator.start(shop.checkout.s("a"), session=shop.django.connection)
    assert shop.started() == []


def test_the_connection_of_another_thread_is_refused(shop: Shop) -> None:
    from django.db import DatabaseError

    raised: list[Exception] = []
    own = shop.django.connection

    def start() -> None:
        try:
            shop.orchestrator.start(shop.checkout.s("a"), session=own)
        except Exception as error:
            raised.append(error)

    with shop.django.atomic():
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    assert isinstance(raised[0], DatabaseError)
    assert "same thread" in str(raised[0])


def test_another_database_is_refused_by_its_name(store_url: str, databases: Databases) -> None:
    other = databases.create()
    with Django({"default": store_url, "other": other}) as django:
        shop, name = Shop(store_url, django), make_url(other).database
        with (
            pytest.raises(errors.InvalidOperation, match=f"on the database '{name}', and the store"),
            django.atomic("other"),
        ):
            shop.orchestrator.start(shop.checkout.s("a"), session=django.connections["other"])
        shop.orchestrator.store.dispose()
    databases.drop(other)


def test_another_kind_of_database_is_refused(sqlite_url: str, postgresql_url: str) -> None:
    with Django({"default": sqlite_url}) as django:
        shop = Shop(postgresql_url, django)
        with pytest.raises(errors.InvalidOperation, match="on a sqlite database, and the store post"), django.atomic():
            shop.orchestrator.start(shop.checkout.s("a"), session=django.connection)


def test_other_things_of_djangos_are_refused_by_their_type(sqlite_url: str) -> None:
    with Django({"default": sqlite_url}) as django:
        from django.core.cache import cache

        shop = Shop(sqlite_url, django)
        for given, name in [(django.connections, "ConnectionHandler"), (cache, "ConnectionProxy")]:
            with pytest.raises(errors.InvalidOperation, match=f"session is a django.*{name}; .* Django's connection"):
                shop.orchestrator.start(shop.checkout.s("a"), session=given)


# --- what django's connections are like -----------------------------------------------------------------------------


def test_instants_are_the_same_by_djangos_connection_whatever_its_time_zone(store_url: str) -> None:
    written = datetime(2024, 7, 1, 12, 30, 0, 123456, tzinfo=UTC)
    zones: list[dict[str, Any]] = [
        {"USE_TZ": True, "TIME_ZONE": "Asia/Kathmandu"},
        {"USE_TZ": False, "TIME_ZONE": "America/Chicago"},
    ]
    for number, settings in enumerate(zones):
        with Django({"default": store_url}, **settings) as django:
            shop, name = Shop(store_url, django), f"order-{number}"
            with django.atomic():
                shop.orchestrator.start(shop.checkout.s("a"), instance_id=name, session=django.connection)
                with writing(django.connection, shop.orchestrator.store) as connection:
                    connection.execute(instance.update().where(instance.c.id == name).values(created_at=written))
                    own = instances.find_instance(connection, name)
                    assert own is not None
                    assert own.created_at == written
                    assert abs(own.last_at - datetime.now(UTC)) < timedelta(minutes=1)
            with shop.orchestrator.store.read("look") as connection:
                assert instances.find_instance(connection, name) == own
            shop.orchestrator.store.dispose()
            shop.app.close()


def test_options_of_djangos_connections_do_not_matter(postgresql_url: str, mysql_url: str) -> None:
    options: list[tuple[str, dict[str, Any]]] = [
        (postgresql_url, {"server_side_binding": True}),
        (postgresql_url, {"isolation_level": 3, "prepare_threshold": 0}),
        (mysql_url, {"isolation_level": "repeatable read"}),
    ]
    for url, own in options:
        with Django({"default": url}, options=own) as django:
            shop = Shop(url, django)
            for _ in range(2):
                with django.atomic():
                    shop.orchestrator.start(shop.checkout.s("ä%s"), instance_id="a", session=django.connection)
                    shop.orchestrator.send("a", "paid", "50 %(x)s", session=django.connection)
            assert shop.started() == ["a"]
            shop.orchestrator.store.dispose()
            shop.app.close()


def test_djangos_connection_stays_as_it_was(shop: Shop) -> None:
    connection = shop.django.connection
    made_at = datetime(2024, 7, 1, 12, tzinfo=UTC)
    connection.force_debug_cursor = True
    with shop.django.atomic():
        shop.order("a")
        assert [query["sql"].split()[0] for query in connection.queries] == ["BEGIN", "INSERT"]
        with connection.cursor() as cursor:
            cursor.execute("UPDATE own_order SET made_at = %s", [made_at])
            cursor.execute("SELECT made_at FROM own_order")
            (found,) = cursor.fetchone()
    assert found.replace(tzinfo=UTC) == made_at
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute("SELECT 12 REGEXP %s", ["1."])  # Django's function takes numbers
            assert cursor.fetchone() == (1,)


def test_a_connection_that_was_closed_is_opened_again(shop: Shop) -> None:
    for name in "ab":
        with shop.django.atomic():
            shop.order(name)
        shop.django.connection.close()
    assert shop.started() == ["a", "b"]


def test_a_database_error_is_djangos_and_breaks_the_transaction_as_its_own_do(shop: Shop) -> None:
    from django.db import DatabaseError

    connection = shop.django.connection
    with shop.django.atomic():
        shop.order("a")
        store = shop.orchestrator.store
        with pytest.raises(DatabaseError), writing(connection, store) as own:
            own.execute(insert(instance), {"id": "b"})  # the other columns cannot be empty
        assert connection.needs_rollback
    assert (shop.own(), shop.started(), shop.published()) == ([], [], [])


def test_what_follows_the_commit_does_not_fail_the_caller(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.app.conf.broker_url = "nonsense://"
    with shop.django.atomic():
        shop.order("a")
    assert shop.started() == ["a"]
    assert "what was to follow a commit failed" in caplog.text


def test_missing_tables_are_made_or_named(empty_store_url: str) -> None:
    with Django({"default": empty_store_url}) as django:
        shop = Shop(empty_store_url, django)
        with django.atomic():
            if django.connection.vendor == "sqlite":
                with pytest.raises(errors.InvalidOperation, match="while no transaction is open"):
                    shop.orchestrator.start(shop.checkout.s("a"), instance_id="a", session=django.connection)
            else:
                shop.orchestrator.start(shop.checkout.s("a"), instance_id="a", session=django.connection)
        shop.orchestrator.list()
        with django.atomic():
            shop.orchestrator.start(shop.checkout.s("a"), instance_id="a", session=django.connection)
        assert shop.started() == ["a"]
        shop.orchestrator.store.dispose()
        shop.app.close()


def test_two_threads_write_by_their_own_connections(shop: Shop) -> None:
    both = threading.Barrier(2) if not shop.orchestrator.store.is_sqlite else None

    def order(name: str) -> None:
        with shop.django.atomic():
            shop.order(name)
            if both is not None:
                both.wait(20)
        shop.django.connection.close()

    threads = [threading.Thread(target=order, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wait_until(lambda: shop.started() == ["a", "b"], "both")
    assert sorted(shop.published()) == ["a", "b"]


def test_django_is_not_imported_without_need(sqlite_url: str) -> None:
    script = f"""
import sys
from celery import Celery
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from orchestrator import Orchestrator
app = Celery(broker="memory://")
orchestrator = Orchestrator(app, store={sqlite_url!r})
@orchestrator.workflow
def nothing(ctx): pass
with Session(create_engine({sqlite_url!r})) as session:
    orchestrator.start(nothing.s(), session=session)
    session.commit()
assert not any(name.startswith("django.db") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
