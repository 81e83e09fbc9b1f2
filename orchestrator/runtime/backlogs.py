"""Which messages of a backlog are sent again, and when the others are doubted again.

What a queue holds is late and not lost, and a backlog must not be answered with more messages; but one that is lost
must not wait for the backlog to end.  Most queues hand out what came first, so the message that has waited longest is
the likeliest to be lost.  Only a few are sent again at a time, and each of the others has its turn as if they were
worked off like that, or when it has waited twice as long.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from orchestrator.core.records import Kind, State
from orchestrator.store.due import DueRecord

#: So many messages are sent again into one queue in one interval between polls.
SENT_AGAIN = 20


def is_doubted(record: DueRecord, now: datetime) -> bool:
    """Tell whether a message was sent and nobody has claimed its step, and nothing else is due."""
    is_over = any(at is not None and at <= now for at in (record.timeout_at, record.expires_at))
    is_published = record.state is State.SCHEDULED and record.publications > 0
    return record.kind in (Kind.STEP, Kind.COMPENSATION) and is_published and not is_over


class Rations:
    """Rations what is sent again, queue by queue."""

    def __init__(self, interval: timedelta, grace: timedelta) -> None:
        self._interval = interval
        self._grace = grace
        self._left: dict[str | None, tuple[int, datetime]] = {}  # and until when that is so

    def divide(
        self, queue: str | None, doubted: Collection[DueRecord], now: datetime
    ) -> tuple[list[DueRecord], list[tuple[DueRecord, datetime]]]:
        """Return, of what is doubted in a queue, what is sent again now, and when each of the others is doubted again.

        What was sent again already comes after what was not: its latest message is younger than it is.
        """
        left, until = self._left.get(queue, (0, now))
        if not now < until <= now + self._interval:  # also where the clock was put back
            left, until = SENT_AGAIN, now + self._interval
        by_age = sorted(doubted, key=lambda each: (each.publications, each.dispatched_at or now, each.key.seq))
        again, others = by_age[:left], by_age[left:]
        self._left[queue] = (left - len(again), until)
        put_off = []
        for rank, record in enumerate(others, SENT_AGAIN):
            age = now - (record.dispatched_at or now)
            put_off.append((record, now + min(self._interval * (rank // SENT_AGAIN), max(self._grace, age))))
        return again, put_off
