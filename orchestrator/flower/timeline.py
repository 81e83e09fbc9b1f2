"""The bars of a timeline: what is known of when a record waited, was retried, and ran.

A record keeps when it was asked for, when its message was last sent, when its last attempt began, and when it was
settled.  When earlier attempts began and ended is not kept: the time that they and the pauses between them took is one
bar, which says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.core.records import Kind, State
from orchestrator.flower import words
from orchestrator.runtime.descriptions import HistoryEntry

#: What is settled by the clock, by somebody else's message or by another instance, not by a worker that runs it.
_AWAITED = {
    Kind.TIMER: ("waiting", "waiting for the timer"),
    Kind.RECEIVE: ("waiting", "waiting for the message"),
    Kind.CHILD: ("running", "the child, under way"),
    Kind.UNDO: ("running", "the child, being undone"),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of a record's time; ``left`` and ``width`` are percent of the timeline."""

    kind: str
    left: float
    width: float
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """A record, and its bars."""

    entry: HistoryEntry
    bars: tuple[Bar, ...]
    took: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """Records on one scale."""

    lines: tuple[Line, ...]
    begins_at: datetime | None
    ends_at: datetime | None


def draw(entries: Sequence[HistoryEntry], now: datetime) -> Timeline:
    """Draw records from when the first of them was asked for to when the last one was settled, or ``now``."""
    if not entries:
        return Timeline((), None, None)
    begins_at = min(entry.scheduled_at for entry in entries)
    ends_at = max(_end(entry, now) for entry in entries)
    span = max((ends_at - begins_at).total_seconds(), 0.001)

    def place(stretch: tuple[str, datetime, datetime, str]) -> Bar:
        kind, since, until, what = stretch
        left = 100 * (since - begins_at).total_seconds() / span
        width = 100 * (until - since).total_seconds() / span
        return Bar(kind, round(left, 3), round(width, 3), f"{what}: {words.duration(until - since)}")

    return Timeline(
        tuple(
            Line(
                entry, tuple(map(place, _stretches(entry, now))), words.duration(_end(entry, now) - entry.scheduled_at)
            )
            for entry in entries
        ),
        begins_at,
        ends_at,
    )


def _end(entry: HistoryEntry, now: datetime) -> datetime:
    # by another process's clock it may be later than now
    return max(entry.scheduled_at, now if entry.settled_at is None else entry.settled_at)


def _stretches(entry: HistoryEntry, now: datetime) -> list[tuple[str, datetime, datetime, str]]:
    end = _end(entry, now)
    begin = entry.scheduled_at
    awaited = _AWAITED.get(Kind(entry.kind))
    if awaited is not None:
        bar, what = awaited
        return [(bar, begin, end, what)]
    if entry.attempts == 0 or entry.started_at is None:
        return [("waiting", begin, end, "waiting for a worker")] if end > begin else []
    started_at = min(max(entry.started_at, begin), end)
    is_running = entry.state not in (State.SCHEDULED, State.HELD)
    if not is_running:  # between two attempts: of the last one only the beginning is known
        return [("retrying", begin, end, f"{attempts(entry)}, and waiting for the next")]
    what = "waiting for a worker" if entry.attempts == 1 else f"waiting, and {attempts(entry, last=False)}"
    before = ("waiting" if entry.attempts == 1 else "retrying", begin, started_at, what)
    ran = ("running", started_at, end, "running" if entry.attempts == 1 else f"attempt {entry.attempts} running")
    return [stretch for stretch in (before, ran) if stretch[2] - stretch[1] > timedelta(0)]


def attempts(entry: HistoryEntry, *, last: bool = True) -> str:
    """Say how many attempts there were, and how many were lost with their workers."""
    count = entry.attempts if last else entry.attempts - 1
    text = f"{count} attempt" if count == 1 else f"{count} attempts"
    return f"{text} ({entry.lost} lost)" if entry.lost else text
