"""Lines of the log say in attributes of their records which instance and step they are about."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

from celery import shared_task
from celery.signals import after_setup_logger

from orchestrator import Context, Orchestrator, shared_workflow
from orchestrator.logs import StepContext
from tests.runtime.cluster import Cluster, wait_until

ATTRIBUTES = ("instance_id", "workflow", "run", "seq", "attempt", "signal", "order")


class ToFile(logging.Handler):
    """A line for each record, from all processes."""

    def emit(self, record: logging.LogRecord) -> None:
        told = {name: getattr(record, name) for name in ATTRIBUTES if hasattr(record, name)}
        line = json.dumps({"logger": record.name, "line": record.getMessage(), **told})
        with (folder() / "lines").open("a") as file:
            file.write(f"{line}\n")


def folder() -> Path:
    return Path(os.environ["TEST_CRASHES"]).parent


def register(_orchestrator: Orchestrator) -> None:
    """Set up the log of the workers."""

    def set_up(**_kwargs: Any) -> None:
        handler = ToFile()
        handler.addFilter(StepContext())
        logging.getLogger().addHandler(handler)

    after_setup_logger.connect(set_up, weak=False)


@shared_task
def pay() -> None:
    logging.getLogger("shop").warning("paying")


@shared_task
def dies_once(mark: str) -> None:
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)


@shared_workflow
def pays(ctx: Context) -> None:
    ctx.logger.warning("begins", extra={"order": 42})
    ctx.run(pay)
    ctx.logger.warning("ends")


@shared_workflow
def loses(ctx: Context, mark: str) -> None:
    ctx.run(dies_once.s(mark))


def lines_of(cluster: Cluster, instance_id: str, logger: str) -> list[dict[str, Any]]:
    file = cluster.folder / "lines"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line.get("instance_id") == instance_id and line["logger"] == logger]


def test_lines_of_a_workflow_and_of_its_tasks_name_their_instance(cluster: Cluster) -> None:
    handle = cluster.run("pays")
    assert lines_of(cluster, handle.id, "orchestrator.workflow") == [
        {
            "logger": "orchestrator.workflow",
            "line": "begins",
            "instance_id": handle.id,
            "workflow": f"{__name__}.pays",
            "run": 0,
            "order": 42,
        },
        {
            "logger": "orchestrator.workflow",
            "line": "ends",
            "instance_id": handle.id,
            "workflow": f"{__name__}.pays",
            "run": 0,
        },
    ]
    (line,) = lines_of(cluster, handle.id, "shop")
    assert line == {"logger": "shop", "line": "paying", "instance_id": handle.id, "run": 0, "seq": 0, "attempt": 1}


def test_the_line_about_a_start_task_says_that_the_workflow_goes_on(cluster: Cluster) -> None:
    handle = cluster.task("pays").delay()
    cluster.wait_status(handle)
    wait_until(lambda: f"[{handle.id}] goes on as an instance" in cluster.logs(), "the end of its start task")
    assert f"[{handle.id}] ignored" not in cluster.logs()
    wait_until(lambda: f"instance started: {handle.id} {__name__}.pays\n" in cluster.logs(), "its own line")


def test_our_own_lines_name_instance_step_and_attempt(cluster: Cluster) -> None:
    handle = cluster.run("pays")
    wait_until(lambda: len(lines_of(cluster, handle.id, "orchestrator")) >= 4, "the lines of its life")
    lines = {
        (line["signal"], line.get("seq"), line.get("attempt")) for line in lines_of(cluster, handle.id, "orchestrator")
    }
    assert lines == {
        ("instance_started", None, None),
        ("step_started", 0, 1),
        ("step_settled", 0, 1),
        ("instance_ended", None, None),
    }


def test_a_line_about_a_lost_attempt_names_it(cluster: Cluster) -> None:
    handle = cluster.run("loses", str(cluster.folder / "mark"))
    lost = [line for line in lines_of(cluster, handle.id, "orchestrator") if "lost an attempt" in line["line"]]
    assert [(line["run"], line["seq"], line["attempt"]) for line in lost] == [(0, 0, 1)]


def test_nothing_is_added_outside_of_a_step() -> None:
    record = logging.makeLogRecord({"msg": "plain"})
    assert StepContext().filter(record) and not hasattr(record, "instance_id")
