"""The Celery app that the tests' worker processes run; all it is told comes through environment variables."""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

from celery import Celery

from orchestrator import Orchestrator
from tests.runtime import crashing

tasks = os.environ.get("TEST_TASKS", "tests.runtime.workflows")
app = Celery("tests.runtime", broker=os.environ["TEST_BROKER"])
app.conf.update(
    task_default_queue=os.environ.get("TEST_QUEUE", "celery"),
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_hijack_root_logger=False,
    imports=[tasks],
    **json.loads(os.environ.get("TEST_CELERY", "{}")),
)
settings: dict[str, Any] = {
    "heartbeat_limit": 1.5,
    "poll_interval": 0.2,
    "publish_grace": 3.0,
    **json.loads(os.environ.get("TEST_SETTINGS", "{}")),
}
orchestrator = Orchestrator(app, store=os.environ["TEST_STORE"], **settings)
# what a module of tasks registers beside them
getattr(importlib.import_module(tasks), "register", lambda _orchestrator: None)(orchestrator)
crashing.install(app, os.environ.get("TEST_CRASHES"))
