"""The example project of docs/examples/django as its users run it: a server, a real worker, and requests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, make_url, text

from tests.brokers import embedded_valkey, free_port
from tests.servers import Databases
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "django"
ORDER = {"customer": "ada", "sku": "tea", "quantity": 2, "card": "visa", "address": "12 Main St"}

#: What the tests have otherwise than the example: another database, and less patience.
SETTINGS = """
from proj.settings import *

DATABASES["default"] |= {database!r}
CELERY_ORCHESTRATOR_POLL_INTERVAL = 0.2
CELERY_ORCHESTRATOR_HEARTBEAT_LIMIT = 3
CELERY_ORCHESTRATOR_PUBLISH_GRACE = 1
"""

#: Ends its process when the order has been committed and nothing has been sent.
KILLED = """
import os, signal
from django.db import transaction
from django.test import Client
def die(): os.kill(os.getpid(), signal.SIGKILL)
with transaction.atomic():
    transaction.on_commit(die)
    Client().post("/orders/", {order!r}, "application/json")
"""


class Project:
    """A copy of the example, migrated, with its processes."""

    def __init__(self, folder: Path, broker: str, database: dict[str, Any]) -> None:
        self.folder = folder
        shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.sqlite3"))
        (folder / "proj" / "test_settings.py").write_text(SETTINGS.format(database=database))
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DJANGO_SETTINGS_MODULE": "proj.test_settings",
            "BROKER_URL": broker,
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}")

    def manage(self, *arguments: str) -> str:
        command = [sys.executable, "manage.py", *arguments]
        ended = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def start(self, *arguments: str) -> None:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
        self.processes.append(process)

    def start_server(self) -> None:
        self.start("manage.py", "runserver", "--noreload", str(self.port))

    def start_worker(self, *options: str) -> None:
        self.start("-m", "celery", "-A", "proj", "worker", "--loglevel=INFO", "--concurrency=2", *options)

    def is_answering(self) -> bool:
        try:
            return self.client.get("/").status_code == 404
        except httpx.TransportError:
            return False

    def log(self) -> str:
        return (self.folder / "log").read_text()[-6000:]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)
        self.client.close()

    # --- as a customer --------------------------------------------------------------------------------------------

    def place(self, **changes: Any) -> httpx.Response:
        return self.client.post("/orders/", json={**ORDER, **changes})

    def status(self, order_id: str) -> dict[str, str]:
        found: dict[str, str] = self.client.get(f"/orders/{order_id}/").json()
        return found

    def wait_status(self, order_id: str, wanted: dict[str, str]) -> None:
        wait_until(
            lambda: self.status(order_id) == wanted,
            f"{order_id} being {wanted} (it is {self.status(order_id)})\n{self.log()}",
        )


class Shop:
    """The project, and a look into its database."""

    def __init__(self, project: Project, url: str) -> None:
        self.project = project
        self.engine = create_engine(url)

    def rows(self, query: str) -> list[Any]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(query))]

    def count(self) -> tuple[int, int]:
        """Return how many orders and how many instances there are."""
        ((orders,),) = self.rows("SELECT COUNT(*) FROM orders_order")
        ((instances,),) = self.rows("SELECT COUNT(*) FROM orchestrator_instance")
        return orders, instances

    def payments(self, order_id: str) -> list[Any]:
        return self.rows(f"SELECT cents, is_refunded FROM orders_payment WHERE key LIKE '%{order_id}%'")


@pytest.fixture(scope="module")
def shop(postgresql_databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    # on SQLite the page about Django is played, and the example's README.md
    folder = tmp_path_factory.mktemp("django") / "project"
    url = postgresql_databases.create(migrated=False)
    parsed = make_url(url)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parsed.database,
        "USER": parsed.username,
        "PASSWORD": parsed.password or "",
        "HOST": parsed.host,
        "PORT": parsed.port,
        "OPTIONS": {},
        "TEST": {"NAME": f"{parsed.database}_test"},
    }
    with embedded_valkey() as broker:
        project = Project(folder, broker, database)
        shop = Shop(project, url)
        try:
            project.manage("migrate")
            project.start_server()
            project.start_worker()
            wait_until(project.is_answering, "the server")
            wait_until(lambda: " ready." in project.log(), f"the worker\n{project.log()}")
            with shop.engine.begin() as connection:
                connection.execute(text("INSERT INTO orders_item (sku, cents, available) VALUES ('tea', 450, 1000)"))
            yield shop
        finally:
            project.close()
            shop.engine.dispose()
            postgresql_databases.drop(url)


def test_an_order_is_paid_and_shipped(shop: Shop) -> None:
    placed = shop.project.place()
    assert placed.status_code == 202, shop.project.log()
    order_id = placed.json()["id"]
    shop.project.wait_status(order_id, {"status": "shipped", "checkout": "COMPLETED"})
    assert shop.payments(order_id) == [(900, False)]


def test_an_order_that_cannot_be_shipped_is_undone(shop: Shop) -> None:
    before = shop.rows("SELECT available FROM orders_item")
    order_id = shop.project.place(address="nowhere").json()["id"]
    shop.project.wait_status(order_id, {"status": "cancelled", "checkout": "COMPENSATED"})
    assert shop.payments(order_id) == [(900, True)]
    assert shop.rows("SELECT available FROM orders_item") == before


def test_an_order_whose_block_is_rolled_back_leaves_nothing(shop: Shop) -> None:
    before = shop.count()
    refused = shop.project.place(customer="greedy", quantity=500)
    assert (refused.status_code, refused.json()) == (422, {"error": "limit exceeded"})
    # whatever had been sent would have come by now
    order_id = shop.project.place(card="declined").json()["id"]
    shop.project.wait_status(order_id, {"status": "cancelled", "checkout": "COMPENSATED"})
    assert shop.count() == (before[0] + 1, before[1] + 1)


def test_an_order_whose_process_ends_at_the_commit_is_shipped(shop: Shop) -> None:
    command = [sys.executable, "manage.py", "shell", "-c", KILLED.format(order={**ORDER, "customer": "killed"})]
    ended = subprocess.run(
        command, cwd=shop.project.folder, env=shop.project.environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    ((order_id,),) = shop.rows("SELECT id FROM orders_order WHERE customer = 'killed'")
    shop.project.wait_status(str(uuid.UUID(str(order_id))), {"status": "shipped", "checkout": "COMPLETED"})


def test_an_order_that_is_shipped_can_not_be_cancelled(shop: Shop) -> None:
    order_id = shop.project.place().json()["id"]
    shop.project.wait_status(order_id, {"status": "shipped", "checkout": "COMPLETED"})
    assert shop.project.client.post(f"/orders/{order_id}/cancel/").status_code == 409


def test_the_tests_of_the_example_pass(shop: Shop) -> None:
    assert "Ran 4 tests" in shop.project.manage("test", "--parallel=1")
