"""Times, values and statuses as people read them."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, tzinfo
from typing import Any

from orchestrator.core.records import Outcome, State
from orchestrator.store.instances import Status

#: How much of a value is shown among others; a page of its own shows all of it.
SHOWN_CHARACTERS = 4000

#: Colours of Bootstrap, by what they mean.
_COLOURS: dict[str, str] = {
    **dict.fromkeys((Status.COMPLETED, Outcome.SUCCEEDED), "success"),
    **dict.fromkeys((Status.RUNNING, State.RUNNING), "info"),
    **dict.fromkeys((Status.COMPENSATING, Status.COMPENSATED, Status.CANCELLED, Outcome.UNKNOWN), "warning"),
    **dict.fromkeys((Status.FAILED, Status.COMPENSATION_FAILED, Status.BLOCKED, Outcome.FAILED), "danger"),
}

MEANINGS = {
    Status.PENDING: "Recorded; no worker has taken it up yet.",
    Status.RUNNING: "Has something to do, or to wait for.",
    Status.COMPENSATING: "Is being undone.",
    Status.COMPLETED: "Returned.",
    Status.FAILED: "Raised, and there was nothing to undo.",
    Status.COMPENSATED: "All of what was done has been undone.",
    Status.COMPENSATION_FAILED: "Some of what was done could not be undone: somebody has to look.",
    Status.CANCELLED: "Cancelled, or past its deadline, and undone.",
    Status.TERMINATED: "Stopped where it stood; nothing was undone.",
    Status.BLOCKED: "Waits for somebody, or for a deploy.",
}


def badge(name: object) -> str:
    """Return the CSS class of a badge for a status, state or outcome."""
    return f"text-bg-{_COLOURS.get(str(name), 'secondary')}"


def duration(length: timedelta) -> str:
    """Say how long something took, in its two largest units."""
    seconds = max(0.0, length.total_seconds())
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def instant(at: datetime | None, zone: tzinfo) -> str:
    """Say when, in the time zone of the Celery app."""
    return "" if at is None else at.astimezone(zone).strftime("%Y-%m-%d %H:%M:%S %Z")


def value(of: Any, limit: int | None = SHOWN_CHARACTERS) -> str:
    """Return a plain JSON value as indented text, cut after ``limit`` characters."""
    text = json.dumps(of, indent=2, ensure_ascii=False, default=str)
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit]}\n… ({len(text) - limit:,} more characters)"


def stray(ended: str) -> str:
    """Say what an attempt came to that had been given up."""
    return "may have taken effect" if ended == Outcome.UNKNOWN else ended


def attribute(of: Any) -> str:
    """Return the value of an attribute as it is typed to search for it."""
    return of if isinstance(of, str) else json.dumps(of, ensure_ascii=False)


def is_cut(of: Any) -> bool:
    return len(json.dumps(of, indent=2, ensure_ascii=False, default=str)) > SHOWN_CHARACTERS


def short(name: str) -> str:
    """Return the last part of a task's name."""
    return name.rpartition(".")[2]
