"""Structured logging: which step a line of a task's own logger is about."""

from __future__ import annotations

import logging

from orchestrator.runtime.current import current_step

__all__ = ["StepContext"]


class StepContext(logging.Filter):
    """Add ``instance_id``, ``run``, ``seq`` and ``attempt`` of the running step to every record; drop none.

    Goes on a handler, and so sees the records of all loggers.  Outside of a step, and where a record has such an
    attribute of its own, nothing is added.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes, and let the record pass."""
        step = current_step()
        if step is not None and not hasattr(record, "instance_id"):
            record.instance_id, record.run = step.instance_id, step.run
            record.seq, record.attempt = step.seq, step.attempt
        return True
