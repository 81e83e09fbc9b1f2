"""What Django's settings say of the store, and what workflows have of Celery's tasks for Django."""

from __future__ import annotations

import time
from typing import Any

import pytest
from celery import Celery
from django.conf import settings as django_settings
from django.test.utils import override_settings
from sqlalchemy import make_url

from orchestrator import Context, Orchestrator, errors
from orchestrator.runtime.django_store import url_of
from tests.runtime.django_project import Django
from tests.runtime.test_django_connection import Shop


def entry(engine: str, **own: Any) -> dict[str, Any]:
    return {"ENGINE": f"django.db.backends.{engine}", **own}


URLS = {
    "a file": (
        entry("sqlite3", NAME="/srv/shop.sqlite3", OPTIONS={"timeout": 20}),
        "sqlite+pysqlite:////srv/shop.sqlite3",
    ),
    "a server": (
        entry("postgresql", NAME="shop", USER="ann", PASSWORD="p:/@ä", HOST="db", PORT="5433"),
        "postgresql+psycopg://ann:p%3A%2F%40%C3%A4@db:5433/shop",
    ),
    "a socket": (
        entry("postgresql", NAME="shop", HOST="/run/postgresql", PORT=5433),
        "postgresql+psycopg:///shop?host=%2Frun%2Fpostgresql&port=5433",
    ),
    "several hosts": (
        entry("postgresql", NAME="shop", HOST="a,b", PORT="5433,5434"),
        "postgresql+psycopg:///shop?host=a%2Cb&port=5433%2C5434",
    ),
    "a service": (
        entry("postgresql", OPTIONS={"service": "shop", "pool": {"min_size": 2}, "server_side_binding": True}),
        "postgresql+psycopg://?service=shop",
    ),
    "a role": (
        entry("postgresql", NAME="shop", OPTIONS={"assume_role": "owner", "options": "-c x=1", "sslmode": "require"}),
        "postgresql+psycopg:///shop?options=-c+x%3D1+-c+role%3Downer&sslmode=require",
    ),
    "mysql": (
        entry("mysql", NAME="shop", USER="ann", HOST="db", OPTIONS={"charset": "utf8mb4", "ssl": {"ca": "/ca.pem"}}),
        "mysql+pymysql://ann@db/shop?ssl_ca=%2Fca.pem",
    ),
    "mysql by a socket": (
        entry("mysql", NAME="shop", HOST="/run/mysqld.sock", OPTIONS={"read_default_file": "/my.cnf"}),
        "mysql+pymysql:///shop?read_default_file=%2Fmy.cnf&unix_socket=%2Frun%2Fmysqld.sock",
    ),
}


@pytest.mark.parametrize("name", URLS)
def test_the_url_is_what_django_connects_to(name: str) -> None:
    settings, url = URLS[name]
    with Django({}, databases={"other": settings}):
        assert make_url(url_of("other")) == make_url(url)


@pytest.mark.parametrize(
    ("alias", "message"),
    [
        ("memory", "SQLite database 'memory' of Django is in memory"),
        ("missing", r"no settings.DATABASES\['missing'\]"),
        ("dummy", "the ENGINE of .* is 'django.db.backends.dummy'; a store can be on sqlite3, postgresql and mysql"),
    ],
)
def test_databases_that_cannot_be_the_store_are_named(alias: str, message: str) -> None:
    databases = {"memory": entry("sqlite3", NAME="file:m?mode=memory&cache=shared"), "dummy": entry("dummy")}
    with Django({}, databases=databases), pytest.raises(errors.ConfigurationError, match=message):
        url_of(alias)


@pytest.mark.parametrize("setting", ["django", "django:default", "django:other"])
def test_the_store_is_the_database_that_the_settings_of_django_name(store_url: str, setting: str) -> None:
    alias = setting.partition(":")[2] or "default"
    own = {"CELERY_ORCHESTRATOR_STORE": setting, "CELERY_ORCHESTRATOR_MAX_LOST": 7, "CELERY_BROKER_URL": "memory://"}
    with Django({alias: store_url}) as django, override_settings(**own):
        app = Celery("shop", set_as_current=False)
        app.config_from_object(django_settings, namespace="CELERY")
        orchestrator = Orchestrator(app)
        workflow = orchestrator.workflow(checkout)
        assert orchestrator.settings.max_lost == 7
        with django.atomic(alias):
            orchestrator.start(workflow.s("a"), instance_id="a", session=django.connections[alias])
        assert [each.instance_id for each in orchestrator.list()] == ["a"]
        assert orchestrator.store.url == make_url(url_of(alias))
        orchestrator.store.dispose()
        app.close()


@pytest.mark.parametrize("mode", ["IMMEDIATE", "DEFERRED"])
def test_an_sqlite_file_that_is_locked_by_the_callers_own_block_is_not_waited_for(sqlite_url: str, mode: str) -> None:
    own = {"CELERY_ORCHESTRATOR_STORE": "django", "CELERY_BROKER_URL": "memory://"}
    options = {"transaction_mode": mode}
    with Django({"default": sqlite_url}, options=options) as django, override_settings(**own):
        app = Celery("shop", set_as_current=False)
        app.config_from_object(django_settings, namespace="CELERY")
        orchestrator = Orchestrator(app)
        workflow = orchestrator.workflow(checkout)
        handle = orchestrator.start(workflow.s("a"), instance_id="a")
        with django.connection.cursor() as cursor:
            cursor.execute("CREATE TABLE own_order (name VARCHAR(100))")
        began_at = time.monotonic()
        with django.atomic():
            if mode == "DEFERRED":  # which locks nothing until it writes
                orchestrator.start(workflow.s("b"), instance_id="b")
                with django.connection.cursor() as cursor:
                    cursor.execute("INSERT INTO own_order VALUES ('a')")
            for write in (lambda: orchestrator.start(workflow.s("c")), handle.cancel):
                with pytest.raises(errors.InvalidOperation, match=r"inside of transaction\.atomic"):
                    write()
            orchestrator.start(workflow.s("d"), instance_id="d", session=django.connection)
        handle.cancel()
        assert time.monotonic() - began_at < 20
        assert {"a", "d"} <= {each.instance_id for each in orchestrator.list()}
        orchestrator.store.dispose()
        app.close()


def checkout(ctx: Context, order: str) -> None:
    pass


# --- delay_on_commit ----------------------------------------------------------------------------------------------


def test_workflows_have_what_celerys_tasks_have_under_django(sqlite_url: str) -> None:
    with Django({"default": sqlite_url}) as django:
        shop = Shop(sqlite_url, django)
        with django.atomic():
            shop.checkout.delay_on_commit("a")
            shop.checkout.apply_async_on_commit(("b",), task_id="b", countdown=1)
            assert shop.published() == []
        assert [each for each in shop.published() if each == "b"] == ["b"]
        with pytest.raises(LookupError), django.atomic():
            shop.checkout.delay_on_commit("c")
            raise LookupError
        assert shop.published() == []
        shop.checkout.delay_on_commit("d")  # in autocommit mode, at once
        assert len(shop.published()) == 1
        shop.app.close()


def test_bad_input_is_refused_before_the_commit(sqlite_url: str) -> None:
    with Django({"default": sqlite_url}) as django:
        shop = Shop(sqlite_url, django)
        with pytest.raises(errors.InputMismatch), django.atomic():
            shop.checkout.delay_on_commit()
        shop.app.close()
