"""A Celery app of other people's, whose worker does not have this package."""

from __future__ import annotations

import os
import sys

from celery import Celery

app = Celery("elsewhere", broker=os.environ["TEST_BROKER"])
app.conf.update(task_default_queue="elsewhere", worker_hijack_root_logger=False)


@app.task(name="elsewhere.answer")
def answer(question: str) -> str:
    assert "orchestrator" not in sys.modules
    return f"{question}? 42"


@app.task(name="elsewhere.refuse")
def refuse() -> None:
    raise RuntimeError("no")
