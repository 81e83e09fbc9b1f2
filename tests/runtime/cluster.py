"""Real workers in processes of their own, and conditions to wait for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from celery import Celery

from orchestrator import Orchestrator, WorkflowHandle
from orchestrator.store import history, instances
from orchestrator.store.history import HistoryRow
from tests.processes import cold_process, warm_process
from tests.runtime import crashing, workflows
from tests.runtime.effects import Effects
from tests.waiting import wait_until

__all__ = ["Cluster", "WorkerProcess", "wait_until", "workflows"]

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "COMPENSATED", "FAILED", "COMPENSATION_FAILED", "CANCELLED", "TERMINATED")


class WorkerProcess:
    """A ``celery worker``, and what it logs; one with an app of its own ``module`` is without this package."""

    def __init__(
        self,
        cluster: Cluster,
        arguments: tuple[str, ...],
        log: Path,
        module: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        launcher = "celery" if module is None else "tests.runtime.isolated"
        command = [
            *("-m", launcher, "-A", module or cluster.module, "worker", "--loglevel=INFO"),
            *("--without-mingle", "--without-gossip", f"--hostname={uuid.uuid4().hex[:8]}@test"),
            *arguments,
        ]
        own = {**cluster.environment, **(environment or {})}
        log.touch()
        start = warm_process if module is None else cold_process
        self.process = start(command, ROOT, own, log)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Whether it has said that it takes messages."""
        return " ready." in self.log.read_text()

    def wait_ready(self) -> WorkerProcess:
        wait_until(lambda: self.is_ready or not self.is_running, f"a worker ({self.log})")
        assert self.is_running, self.log.read_text()[-3000:]
        return self

    def signal(self, number: int) -> None:
        """Send a signal to the worker and its pool processes."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        if self.is_running:
            self.signal(signal.SIGKILL)
        self.process.wait(timeout=20)

    def stop(self, seconds: float = 20.0) -> None:
        if self.is_running:
            self.process.terminate()
            try:
                self.process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                self.kill()


class Cluster:
    """A store, a broker, the outside world, and any number of workers."""

    module = "tests.runtime.app"

    def __init__(
        self,
        folder: Path,
        store: str,
        broker: str,
        *,
        settings: dict[str, Any] | None = None,
        celery: dict[str, Any] | None = None,
        tasks: str = "tests.runtime.workflows",
    ) -> None:
        self.folder = folder
        self.tasks = tasks
        self.crashes = folder / "crashes"
        self.crashes.mkdir(parents=True, exist_ok=True)
        self.queue = f"test-{uuid.uuid4().hex[:12]}"
        self.effects = Effects(folder / "effects.db")
        self.workers: list[WorkerProcess] = []
        self.environment = {
            **os.environ,
            "TEST_TASKS": tasks,
            "TEST_STORE": store,
            "TEST_BROKER": broker,
            "TEST_QUEUE": self.queue,
            "TEST_EFFECTS": self.effects.path,
            "TEST_CRASHES": str(self.crashes),
            "TEST_SETTINGS": json.dumps(settings or {}),
            "TEST_CELERY": json.dumps(celery or {}),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "default",
        }
        self.app = Celery("client", broker=broker)
        self.app.conf.update(task_default_queue=self.queue, **(celery or {}))
        own = {"heartbeat_limit": 1.5, "poll_interval": 0.2, "publish_grace": 3.0, **(settings or {})}
        self.orchestrator = Orchestrator(self.app, store=store, **own)

    # --- workers --------------------------------------------------------------------------------------------------

    def start_worker(
        self,
        *arguments: str,
        pool: str = "prefork",
        concurrency: int = 2,
        module: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> WorkerProcess:
        log = self.folder / f"worker-{len(self.workers)}.log"
        options = (f"--pool={pool}", f"--concurrency={concurrency}", *arguments)
        worker = WorkerProcess(self, options, log, module, environment)
        self.workers.append(worker)
        return worker

    def supervise(self) -> bool:
        """Start the last worker again if it has ended, as whoever runs Celery does: a lost broker can end one."""
        if not self.workers[-1].is_running:
            self.start_worker()
        return True

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        if self.environment["TEST_BROKER"].startswith("amqp"):
            with self.app.connection_for_write() as connection, connection.channel() as channel:
                channel.queue_delete(self.queue)
        self.orchestrator.store.dispose()
        self.app.close()

    def logs(self) -> str:
        return "\n".join(worker.log.read_text() for worker in self.workers)

    def run_elsewhere(self, *arguments: str, code: str | None = None, seconds: float = 60.0) -> str:
        """Run ``celery``, or a script whose ``app`` is other people's, in a process that does not have this package."""
        script = ["-c", f"from tests.runtime.elsewhere import app\n{code}"] if code is not None else []
        command = [sys.executable, "-m", "tests.runtime.isolated", *script, *arguments]
        own = {**self.environment, "TEST_ELSEWHERE": self.queue}
        ended = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=seconds, check=False)
        assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}\n{self.logs()[-3000:]}"
        return ended.stdout

    # --- instances ------------------------------------------------------------------------------------------------

    def task(self, name: str) -> Any:
        """Return a task or workflow of the module of tasks, as the client knows it."""
        return self.app.tasks[f"{self.tasks}.{name}"]

    def start(self, workflow: str, *args: Any, instance_id: str | None = None, **options: Any) -> WorkflowHandle:
        """Start a workflow of the module of tasks, durably."""
        signature = self.task(workflow).s(*args).set(**options)
        return self.orchestrator.start(signature, instance_id=instance_id or f"{workflow}-{uuid.uuid4().hex[:8]}")

    def run(self, workflow: str, *args: Any) -> WorkflowHandle:
        """Start a workflow and wait until it has ended, or is blocked."""
        handle = self.start(workflow, *args)
        self.wait_status(handle, *ENDED, "BLOCKED")
        return handle

    def wait_history(self, handle: WorkflowHandle, records: int) -> None:
        wait_until(lambda: len(handle.history()) >= records, f"{handle.id} having {records} records")

    def list_rows(self, handle: WorkflowHandle) -> list[HistoryRow]:
        """Return the records of the present run as the store has them."""
        with self.orchestrator.store.read("test") as connection:
            instance = instances.find_instance(connection, handle.id)
            return [] if instance is None else history.load_rows(connection, handle.id, instance.run)

    def wait_effect(self, handle: WorkflowHandle, name: str, what: str = "effect") -> None:
        wait_until(lambda: name in self.effects.names(handle.id, what), f"{handle.id} having {name} ({what})")

    def plan_crash(self, instance: str, who: str, point: str, seq: int | None) -> None:
        crashing.plan(self.crashes, instance, who, point, seq)

    def wait_status(self, handle: WorkflowHandle, *statuses: str, seconds: float = 30.0) -> str:
        wanted = statuses or ENDED
        return wait_until(
            lambda: handle.instance_status if handle.instance_status in wanted else "",
            f"{handle.id} being {wanted} (it is {handle.instance_status})\n{self.logs()[-6000:]}",
            seconds,
        )
