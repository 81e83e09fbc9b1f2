"""What lines of the log are about, in attributes of their records: for whoever formats lines as JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from orchestrator.store.history import HistoryRow, StepKey


def about(what: HistoryRow | StepKey | str, attempt: int | None = None) -> dict[str, Any]:
    """Return the ``extra`` of a line about a step, one attempt of it, or an instance that is named by its id."""
    if isinstance(what, str):
        return {"instance_id": what}
    extra: dict[str, Any] = {"instance_id": what.instance_id, "run": what.run, "seq": what.seq}
    if isinstance(what, HistoryRow):
        attempt = attempt or what.attempt
    return extra if attempt is None else {**extra, "attempt": attempt}


class AboutStarts(logging.Filter):
    """Has Celery say of a workflow's start task what is to be known: to Celery it is one whose result is ignored."""

    def __init__(self, is_workflow: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_workflow = is_workflow

    def filter(self, record: logging.LogRecord) -> bool:
        told = record.args
        if isinstance(told, dict) and told.get("description") == "ignored" and self._is_workflow(str(told.get("name"))):
            record.args = {**told, "description": "goes on as an instance"}
        return True
