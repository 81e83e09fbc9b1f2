"""A process that starts and enqueues in a transaction of its own, and is killed before its commit or right after it.

``python -m tests.runtime.committing {before,after} <instance> <path>``
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from celery import signals
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from tests.runtime.app import app, orchestrator, tasks


def die(**_kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(point: str, name: str, path: str) -> None:
    if point == "after":
        signals.before_task_publish.connect(die)
    with Session(create_engine(os.environ["TEST_STORE"])) as session:
        session.execute(text("INSERT INTO own_order (name) VALUES (:name)"), {"name": name})
        orchestrator.start(app.tasks[f"{tasks}.doubles"].s(4), instance_id=name, session=session)
        orchestrator.enqueue(app.tasks[f"{tasks}.note"].s(path, name), session=session)
        session.flush()
        if point == "before":
            die()
        session.commit()


if __name__ == "__main__":
    main(*sys.argv[1:])
