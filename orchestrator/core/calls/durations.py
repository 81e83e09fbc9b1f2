"""Durations and instants as workflow code gives them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from orchestrator import errors

Seconds = float | timedelta


def read_seconds(duration: Seconds, what: str) -> float:
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise errors.ContextMisused(f"{what} is {duration!r}; give seconds or a timedelta")
    if not 0 <= seconds < 10**10:
        raise errors.ContextMisused(f"{what} is {duration!r}; it cannot be negative or endless")
    return float(seconds)


def check_instant(instant: object, what: str) -> datetime:
    """Return an instant in UTC; a datetime without a time zone names none."""
    if not isinstance(instant, datetime) or instant.tzinfo is None:
        raise errors.ContextMisused(f"{what} is {instant!r}; give a datetime with a time zone")
    return instant.astimezone(UTC)
