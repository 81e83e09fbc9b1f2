"""What ``doctor`` finds wrong: each fault by itself, and nothing where there is none."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signature
from sqlalchemy import update

from orchestrator import Context, Orchestrator
from orchestrator._version import __version__
from orchestrator.errors import ConfigurationError
from orchestrator.runtime.doctor import Finding, Level, examine
from orchestrator.store import migrations, tables, workers
from orchestrator.store.engine import Store
from orchestrator.store.workers import Worker
from tests.brokers import free_port

Make = Callable[..., Orchestrator]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make an orchestrator of an app with these settings of Celery's.

    Of a worker that beat just now no machine is so slow that it looks silent.
    """
    made: list[Orchestrator] = []

    def one(
        store: str | None, *, broker: str = "memory://", heartbeat_limit: float = 3600.0, **conf: Any
    ) -> Orchestrator:
        app = Celery("shop", broker=broker, set_as_current=False)
        app.conf.update(conf)
        made.append(Orchestrator(app, store=store, heartbeat_limit=heartbeat_limit))
        return made[-1]

    yield one
    for each in made:
        each.app.close()


def add_worker(url: str, **values: Any) -> None:
    now = datetime.now(UTC)
    worker = Worker("w-1", "one@host", 1, __version__, 1, now, now, ("buy",), ("charge",), ())
    store = Store(url)
    with store.begin("add-worker") as connection:
        workers.insert_worker(connection, replace(worker, **values))
    store.dispose()


def wrong(orchestrator: Orchestrator) -> dict[str, Finding]:
    found = [each for each in examine(orchestrator) if each.level is not Level.OK]
    assert all(each.do for each in found)
    return {each.check: each for each in found}


def test_nothing_is_wrong_with_any_store_that_works(store_url: str, make: Make) -> None:
    add_worker(store_url)
    findings = list(examine(make(store_url)))
    assert [each for each in findings if each.level is not Level.OK] == []
    checked = {each.check for each in findings}
    assert {"settings", "serializer", "broker", "store", "isolation", "schema", "writing", "workers"} <= checked
    assert ("database clock" in checked) == (not store_url.startswith("sqlite"))


def test_a_store_that_is_not_set_or_not_there_is_a_problem(make: Make) -> None:
    assert "no store is set" in wrong(make(None))["settings"].what
    away = f"postgresql+psycopg://nobody:secret@127.0.0.1:{free_port()}/none"
    found = wrong(make(away))["store"]
    assert found.level is Level.PROBLEM
    assert "secret" not in found.what


def test_a_setting_that_cannot_be_is_a_problem(sqlite_url: str, make: Make) -> None:
    assert "orchestrator_max_lost" in wrong(make(sqlite_url, orchestrator_max_lost="many"))["settings"].what


def test_the_schema_is_looked_at_and_not_migrated(empty_store_url: str, make: Make) -> None:
    found = wrong(make(empty_store_url))
    assert (found["schema"].level, set(found)) == (Level.PROBLEM, {"schema"})
    store = Store(empty_store_url, migrate=False)
    with store.read("look") as connection:
        assert migrations.find_revision(connection) is None
    store.dispose()


def test_a_broker_that_is_not_there_is_a_problem(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    broker = f"redis://127.0.0.1:{free_port()}/0"
    found = wrong(make(sqlite_url, broker=broker))
    assert (found["broker"].level, set(found)) == (Level.PROBLEM, {"broker"})


def test_without_a_live_worker_nothing_goes_on(sqlite_url: str, make: Make) -> None:
    assert wrong(make(sqlite_url))["workers"].level is Level.PROBLEM
    add_worker(sqlite_url, beat_at=datetime.now(UTC) - timedelta(minutes=5))
    found = wrong(make(sqlite_url, heartbeat_limit=1.0))
    assert (found["workers"].level, found["heartbeat"].level) == (Level.PROBLEM, Level.WARNING)
    assert "one@host" in found["heartbeat"].what


def test_a_worker_whose_clock_is_wrong_is_told_from_one_that_is_gone(
    sqlite_url: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_worker(sqlite_url, beat_at=datetime.now(UTC) + timedelta(minutes=5))

    def beats_meanwhile(_seconds: float) -> None:
        store = Store(sqlite_url)
        with store.begin("beat") as connection:
            workers.beat(connection, "w-1", datetime.now(UTC) + timedelta(minutes=5))
        store.dispose()

    monkeypatch.setattr("orchestrator.runtime.liveness.time.sleep", beats_meanwhile)
    found = wrong(make(sqlite_url, heartbeat_limit=60.0))
    assert set(found) == {"clock of one@host"}
    assert "ahead" in found["clock of one@host"].what


def test_versions_that_differ_are_named(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    add_worker(sqlite_url, incarnation="w-2", version="0.0.1")
    assert "0.0.1" in wrong(make(sqlite_url))["versions"].what


def test_sqlite_is_for_one_host(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    add_worker(sqlite_url, incarnation="w-2", nodename="two@elsewhere")
    assert "elsewhere" in wrong(make(sqlite_url))["store"].what


def test_what_instances_need_and_no_worker_has_is_named(sqlite_url: str, make: Make) -> None:
    orchestrator = make(sqlite_url)
    app = orchestrator.app
    app.task(name="charge", shared=False)(lambda_free)
    app.task(name="ship", shared=False)(lambda_free)
    app.task(name="refund", shared=False)(lambda_free)

    def buy(ctx: Context) -> None:
        ctx.start(signature("charge"), compensate=signature("refund", immutable=True))
        ctx.run(signature("ship"))

    orchestrator.workflow(name="purchase")(buy)
    orchestrator.start(app.tasks["purchase"].s(), instance_id="order-1")
    instance = orchestrator.find_instance("order-1")
    assert instance is not None
    orchestrator.coordinator.advance(instance.id, instance.generation)
    add_worker(sqlite_url)
    found = wrong(orchestrator)
    assert {check: each.level for check, each in found.items()} == dict.fromkeys(
        ("workflows", "tasks", "compensations"), Level.PROBLEM
    )
    assert "purchase" in found["workflows"].what
    assert "ship" in found["tasks"].what
    assert "refund" in found["compensations"].what
    add_worker(sqlite_url, incarnation="w-2", workflows=("purchase",), tasks=("ship", "refund"))
    assert wrong(orchestrator) == {}
    orchestrator.store.dispose()


def lambda_free() -> None: ...


def test_a_compensation_that_is_no_task_is_named(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    orchestrator = make(sqlite_url)
    charge = orchestrator.app.task(name="charge", shared=False)(lambda_free)
    orchestrator.compensates(charge)(lambda_free)
    assert "no task" in wrong(orchestrator)["compensations"].what


def test_two_compensations_of_one_task_are_refused_and_named(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    orchestrator = make(sqlite_url)
    charge, refund, void = (
        orchestrator.app.task(name=name, shared=False)(lambda_free) for name in ("charge", "refund", "void")
    )
    for _ in range(2):  # a module that is loaded twice
        orchestrator.compensates(charge)(refund)
    orchestrator.install()
    orchestrator.compensates(charge)(void)
    with pytest.raises(ConfigurationError, match="both refund and void are registered to undo charge"):
        orchestrator.install()
    assert "both refund and void" in wrong(orchestrator)["compensations"].what


def test_a_compensation_of_another_app_is_named(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    orchestrator = make(sqlite_url)
    charge = orchestrator.app.task(name="charge", shared=False)(lambda_free)
    other = Celery("other", set_as_current=False).task(name="elsewhere.refund", shared=False)(lambda_free)
    orchestrator.compensates(charge)(other)
    assert "elsewhere.refund" in wrong(orchestrator)["compensations"].what


@pytest.mark.parametrize(
    ("conf", "check", "level"),
    [
        ({"task_always_eager": True}, "eager", Level.WARNING),
        ({"accept_content": ["yaml"]}, "serializer", Level.PROBLEM),
        ({"accept_content": ["pickle"], "task_serializer": "pickle"}, "serializer", Level.WARNING),
        ({"result_backend": "rpc://"}, "result backend", Level.WARNING),
        ({"result_backend": "nothing.of:Mine"}, "result backend", Level.PROBLEM),
    ],
    ids=str,
)
def test_settings_of_celery_that_do_harm_are_named(
    sqlite_url: str, make: Make, conf: dict[str, Any], check: str, level: Level
) -> None:
    add_worker(sqlite_url)
    found = wrong(make(sqlite_url, **conf))
    assert (set(found), found[check].level) == ({check}, level)


def test_a_result_backend_that_is_away_is_a_problem(sqlite_url: str, make: Make, tmp_path: Path) -> None:
    add_worker(sqlite_url)
    port = free_port()
    for url in (f"redis://:secret@127.0.0.1:{port}/0", f"db+postgresql+psycopg://a:secret@127.0.0.1:{port}/none"):
        found = wrong(make(sqlite_url, result_backend=url))["result backend"]
        assert (found.level, "secret" in found.what) == (Level.PROBLEM, False)


def test_a_result_backend_that_swallows_what_it_is_sent_is_a_problem(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = wrong(make(sqlite_url, result_backend=f"redis://127.0.0.1:{server.getsockname()[1]}/0"))
    assert "no answer within" in found["result backend"].what


def test_a_result_backend_that_is_there_answers(sqlite_url: str, make: Make, valkey_url: str, tmp_path: Path) -> None:
    add_worker(sqlite_url)
    for url in (valkey_url, f"db+sqlite:///{tmp_path}/results.db"):
        [found] = [each for each in examine(make(sqlite_url, result_backend=url)) if each.check == "result backend"]
        assert (found.level, "answers" in found.what) == (Level.OK, True)


def test_a_late_acknowledgement_that_outlives_the_visibility_timeout_is_named(
    sqlite_url: str, make: Make, valkey_url: str
) -> None:
    add_worker(sqlite_url)
    orchestrator = make(sqlite_url, broker=valkey_url, broker_transport_options={"visibility_timeout": 60})
    orchestrator.app.task(name="long", acks_late=True, time_limit=100, shared=False)(lambda_free)
    orchestrator.app.task(name="short", acks_late=True, time_limit=10, shared=False)(lambda_free)
    found = wrong(orchestrator)
    assert set(found) == {"visibility timeout"}
    assert found["visibility timeout"].what.startswith("long ")


def test_a_schema_of_a_newer_version_is_named(sqlite_url: str, make: Make) -> None:
    add_worker(sqlite_url)
    store = Store(sqlite_url)
    with store.begin("newer") as connection:
        connection.exec_driver_sql(f"UPDATE {tables.VERSION_TABLE} SET version_num = '9999'")
    store.dispose()
    assert "9999" in wrong(make(sqlite_url))["schema"].what


def test_a_store_that_takes_no_writes_is_a_problem(postgresql_url: str, make: Make) -> None:
    add_worker(postgresql_url)
    read_only = f"{postgresql_url}?options=-c%20default_transaction_read_only%3Don"
    assert wrong(make(read_only))["writing"].level is Level.PROBLEM


def test_what_was_written_to_try_the_store_does_not_stay(store_url: str, make: Make) -> None:
    list(examine(make(store_url)))
    store = Store(store_url)
    with store.begin("look") as connection:
        assert connection.execute(update(tables.purged).values(purged_at=datetime.now(UTC))).rowcount == 0
    store.dispose()
