"""A Celery app of other people's, whose processes do not have this package (``isolated``)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

app = Celery("elsewhere", broker=os.environ["TEST_BROKER"])
app.conf.update(
    task_default_queue="elsewhere",
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
    **json.loads(os.environ.get("TEST_CELERY", "{}")),
)
app.conf.task_default_queue = os.environ.get("TEST_ELSEWHERE", "elsewhere")


@app.task(name="elsewhere.answer")
def answer(question: str) -> str:
    assert "orchestrator" not in sys.modules
    return f"{question}? 42"


@app.task(name="elsewhere.refuse")
def refuse() -> None:
    raise RuntimeError("no")


@app.task(name="elsewhere.tries", bind=True, autoretry_for=(RuntimeError,), max_retries=2, retry_backoff=False)
def tries(self: Task, path: str, succeeds: bool) -> str:
    """Fail twice, and the third time as well unless it is to succeed."""
    self.default_retry_delay = 0
    with Path(path).open("a") as file:
        file.write("tried\n")
    if not succeeds or self.request.retries < 2:
        raise RuntimeError("not yet")
    return f"after {self.request.retries} retries"


@app.task(name="elsewhere.dies")
def dies() -> None:
    """Be killed, as by the kernel when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="elsewhere.takes_its_time")
def takes_its_time(path: str) -> str:
    with Path(path).open("a") as file:
        file.write("begun\n")
    time.sleep(60)
    return "late"


@app.task(name="elsewhere.makes_something")
def makes_something(path: str) -> Any:
    with Path(path).open("a") as file:
        file.write("made\n")
    return object()
