"""``compose.yaml`` as it is read, and what its services run, here on the loopback instead of in containers."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import create_engine, text

from tasks.samples import list_orders

ROOT = Path(__file__).parents[1]
OURS = ("worker-1", "worker-2", "flower", "client")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return found


# --- as it is read ------------------------------------------------------------------------------------------------


def test_it_has_the_servers_and_ours(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "redis", *OURS}


def test_nothing_of_ours_starts_before_the_servers_answer(services: dict[str, Any]) -> None:
    for name in OURS:
        conditions = services[name]["depends_on"]
        assert conditions["postgres"] == conditions["redis"] == {"condition": "service_healthy"}, name
    for worker in ("worker-1", "worker-2"):
        assert services["client"]["depends_on"][worker] == {"condition": "service_healthy"}


def test_whatever_is_waited_for_to_be_healthy_has_a_healthcheck(services: dict[str, Any]) -> None:
    waited_for = {name for service in services.values() for name in service.get("depends_on", {})}
    assert waited_for <= {name for name, service in services.items() if "healthcheck" in service}


def test_the_url_of_each_server_names_its_service_and_its_login(services: dict[str, Any]) -> None:
    login = services["postgres"]["environment"]
    user, password, database = (login[f"POSTGRES_{key}"] for key in ("USER", "PASSWORD", "DB"))
    for name in OURS:
        environment = services[name]["environment"]
        assert environment["SHOP_BROKER"] == "redis://redis:6379/0"
        for variable in ("SHOP_STORE", "SHOP_DATABASE"):
            assert environment[variable] == f"postgresql+psycopg://{user}:{password}@postgres:5432/{database}"


def test_each_worker_is_asked_by_its_own_name_whether_it_is_well(services: dict[str, Any]) -> None:
    for name in ("worker-1", "worker-2"):
        assert f"--hostname={name}@shop" in services[name]["command"]
        assert f"--destination={name}@shop" in services[name]["healthcheck"]["test"]


def test_the_image_is_built_from_what_is_there(services: dict[str, Any]) -> None:
    for name in OURS:
        build = services[name]["build"]
        lines = [line.split() for line in build["dockerfile_inline"].splitlines()]
        copied = [source for line in lines if line[0] == "COPY" for source in line[1:-1]]
        assert {"pyproject.toml", "README.md", "LICENSE", "orchestrator", "tasks"} == set(copied)
        assert all((ROOT / build["context"] / source).exists() for source in copied)


def test_flower_shows_workflows_and_asks_who_may_change_them(services: dict[str, Any]) -> None:
    assert services["flower"]["command"][:5] == ["celery", "-A", "tasks.app", "orchestrator", "flower"]
    user, _, password = services["flower"]["environment"]["FLOWER_BASIC_AUTH"].partition(":")
    assert user and password


def test_flower_is_reached_at_the_port_that_it_listens_to(services: dict[str, Any]) -> None:
    assert services["flower"]["ports"] == ["5555:5555"]
    assert "--port=5555" in services["flower"]["command"]


# --- as it runs ---------------------------------------------------------------------------------------------------


class Services:
    """Runs the commands of services as child processes, with this machine's servers in the place of the composed."""

    def __init__(self, services: dict[str, Any], logs: Path, broker_url: str, store_url: str) -> None:
        self.services = services
        self.logs = logs
        self.flower_port = _find_free_port()
        urls = {"SHOP_BROKER": broker_url, "SHOP_STORE": store_url, "SHOP_DATABASE": store_url}
        self._environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        self._urls = urls

    def environment(self, name: str) -> dict[str, str]:
        return {**self._environment, **self.services[name]["environment"], **self._urls}

    def arguments(self, command: list[str]) -> list[str]:
        return [part.replace("5555", str(self.flower_port)) for part in command]

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        with (self.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                self.arguments(self.services[name]["command"]),
                cwd=ROOT,
                env=self.environment(name),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield
            assert process.poll() is None, f"{name} ended by itself:\n{self.log(name)}"
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text()

    def is_healthy(self, name: str) -> bool:
        kind, *command = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        checked = subprocess.run(
            self.arguments(command), cwd=ROOT, env=self.environment(name), capture_output=True, timeout=30
        )
        return checked.returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        _wait(lambda: self.is_healthy(name), lambda: f"{name} is not healthy:\n{self.log(name)}")

    def run(self, name: str, *arguments: str) -> tuple[int, str]:
        ended = subprocess.run(
            [*self.services[name]["command"], *arguments],
            cwd=ROOT,
            env=self.environment(name),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return ended.returncode, ended.stdout


def _find_free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def _wait(condition: Callable[[], bool], complaint: Callable[[], str], patience_seconds: float = 60) -> None:
    deadline = time.monotonic() + patience_seconds
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(0.2)


def _read(url: str, login: str) -> tuple[int, str]:
    basic = base64.b64encode(login.encode()).decode()
    request = urllib.request.Request(url, headers={"Authorization": f"Basic {basic}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.status, response.read().decode()


def test_its_services_run_the_orders_on_postgresql(
    services: dict[str, Any], postgresql_url: str, broker_url: str, tmp_path: Path
) -> None:
    orders = tmp_path / "orders.jsonl"
    orders.write_text("".join(f"{order.model_dump_json()}\n" for order in list_orders()[:10]))
    here = Services(services, tmp_path, broker_url, postgresql_url)
    with here.running("flower"), here.running("worker-1"), here.running("worker-2"):
        here.wait_until_healthy("worker-1")
        here.wait_until_healthy("flower")
        status, output = here.run("client", "--orders", str(orders))
        assert status == 0, output
        assert "10 of 10 ended" in output
        assert "Every order has ended, and the books balance." in output

        login = services["flower"]["environment"]["FLOWER_BASIC_AUTH"]
        status, page = _read(f"http://127.0.0.1:{here.flower_port}/workflows", login)
        assert status == 200
        assert "order-001" in page

        status, page = _read(f"http://127.0.0.1:{here.flower_port}/workers", login)
        assert status == 200
        assert "worker-1@shop" in page
        assert "worker-2@shop" in page

        # ordered again, the orders are the same; and a cent that moved behind the shop's back is found
        _execute(
            postgresql_url,
            "INSERT INTO payments (id, order_id, kind, card_last4, cents)"
            " VALUES ('planted', 'order-001', 'refund', '3035', 1)",
        )
        status, output = here.run("client", "--orders", str(orders))
        assert status == 1, output
        assert "order-001: completed, yet refunded [1]" in output
        assert "This must not happen." in output


def _execute(url: str, statement: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()
