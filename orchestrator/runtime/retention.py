"""Retention: purging instances that ended long ago, when asked to, and by the workers themselves.

In many short transactions: nobody who needs a store that is being purged has to wait for long.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from orchestrator import errors
from orchestrator.runtime.descriptions import read_statuses
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.transactions import Clock, utc_now
from orchestrator.store import purging
from orchestrator.store.engine import Store
from orchestrator.store.instances import Status
from orchestrator.store.purging import Criteria, Ended

logger = logging.getLogger("orchestrator")

#: How many instances, and how many of their records, one transaction deletes; an instance goes as a whole.
BATCH, BATCH_RECORDS = 100, 2000
#: A worker looks for what may go once a minute, and lets the rest of its poller's work have its turn.
SWEEP_EVERY_SECONDS, TURN_SECONDS = 60.0, 0.25
CALL_PATIENCE_SECONDS, TURN_PATIENCE_SECONDS = 10.0, 1.0

FINAL = tuple(status for status in Status if status.is_final)
#: What goes by itself; one that could not be undone waits for a person, however long.
UNATTENDED = tuple(status for status in FINAL if status is not Status.COMPENSATION_FAILED)


class Retention:
    """Purges instances."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now) -> None:
        self.store = store
        self.settings = settings
        self.clock = clock
        self._after: Ended | None = None
        self._next_at = time.monotonic()

    def purge(self, older_than: timedelta | datetime, statuses: str | Iterable[str] | None) -> int:
        """Purge all that may go; see ``Orchestrator.purge``."""
        criteria = Criteria(_read_instant(older_than, self.clock()), _read_final(statuses))
        total = 0
        # parents first: with each round that purged some, their children may go
        while count := self._sweep(criteria):
            total += count
        return total

    def count(self, older_than: timedelta | datetime, statuses: str | Iterable[str] | None) -> int:
        """Return how many instances ``purge`` would delete if nothing changed until then."""
        criteria = Criteria(_read_instant(older_than, self.clock()), _read_final(statuses))
        parents: dict[str, str | None] = {}
        after: Ended | None = None
        while True:
            page, found = self.store.retrying(
                functools.partial(self._find_done_with, criteria, after), patience_seconds=CALL_PATIENCE_SECONDS
            )
            parents |= found
            if len(page) < BATCH:
                return sum(_goes(each, parents) for each in parents)
            after = page[-1]

    def _find_done_with(self, criteria: Criteria, after: Ended | None) -> tuple[list[Ended], dict[str, str | None]]:
        with self.store.read("count-purgeable") as connection:
            page = purging.list_ended(connection, criteria, after, BATCH)
            ids = [each.instance_id for each in page]
            return page, dict(purging.list_done_with(connection, criteria, ids)) if ids else {}

    def purge_expired(self) -> None:
        """Purge what is past the retention set, for a moment; the next call goes on from there."""
        retention = self.settings.retention
        if retention is None or time.monotonic() < self._next_at:
            return
        criteria = Criteria(self.clock() - retention, UNATTENDED, keeps_not_undone=True)
        until = time.monotonic() + TURN_SECONDS
        total, self._after = self._purge_page(criteria, self._after, TURN_PATIENCE_SECONDS)
        while self._after is not None and time.monotonic() < until:
            count, self._after = self._purge_page(criteria, self._after, TURN_PATIENCE_SECONDS)
            total += count
        if self._after is None:
            self._next_at = time.monotonic() + min(SWEEP_EVERY_SECONDS, retention.total_seconds())
        if total:
            logger.info("purged %d instances that ended more than %s ago", total, retention)

    def _sweep(self, criteria: Criteria) -> int:
        """Go once through all that is old enough; return how many were purged."""
        total, after = self._purge_page(criteria, None, CALL_PATIENCE_SECONDS)
        while after is not None:
            count, after = self._purge_page(criteria, after, CALL_PATIENCE_SECONDS)
            total += count
        return total

    def _purge_page(self, criteria: Criteria, after: Ended | None, patience_seconds: float) -> tuple[int, Ended | None]:
        """Purge what may go of the next ``BATCH``; return how many, and where to go on (``None``: it was the last)."""

        def find() -> tuple[list[Ended], dict[str, int]]:
            with self.store.read("find-purgeable") as connection:
                page = purging.list_ended(connection, criteria, after, BATCH)
                ids = [each.instance_id for each in page]
                return page, purging.list_purgeable(connection, criteria, ids) if ids else {}

        page, sizes = self.store.retrying(find, patience_seconds=patience_seconds)
        count = sum(self._purge_batch(criteria, batch, patience_seconds) for batch in _batches(sizes))
        return count, page[-1] if len(page) == BATCH else None

    def _purge_batch(self, criteria: Criteria, batch: list[str], patience_seconds: float) -> int:
        def once() -> int:
            with self.store.begin("purge") as connection:
                return purging.purge_instances(connection, criteria, batch, self.clock())

        return self.store.retrying(once, patience_seconds=patience_seconds)


def _goes(instance_id: str, parents: Mapping[str, str | None]) -> bool:
    """Tell whether all the ancestors of an instance that are there go as well."""
    each: str | None = instance_id
    while each is not None:
        if each not in parents:
            return False
        each = parents[each]
    return True


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Divide instances so that no transaction deletes too many records: on SQLite everybody waits for it."""
    batch: list[str] = []
    records = 0
    for instance_id, size in sizes.items():
        if batch and records + size > BATCH_RECORDS:
            yield batch
            batch, records = [], 0
        batch.append(instance_id)
        records += size
    if batch:
        yield batch


def _read_instant(older_than: object, now: datetime) -> datetime:
    """Return the instant before which an instance must have ended."""
    match older_than:
        case datetime() if older_than.tzinfo is None:
            raise errors.NaiveDatetime("older_than", older_than)
        case datetime():
            return older_than
        case timedelta() if older_than >= timedelta(0):
            # nothing ended before there were dates
            return now - min(older_than, now - datetime.min.replace(tzinfo=UTC))
    raise errors.InvalidOperation(
        f"older_than is {older_than!r}; give a timedelta of zero or more, or an aware datetime"
    )


def _read_final(statuses: str | Iterable[str] | None) -> tuple[Status, ...]:
    found = read_statuses(statuses)
    if found is None:
        return FINAL
    for status in found:
        if not status.is_final:
            raise errors.InvalidOperation(
                f"{status} is no status in which an instance has ended; only those are purged: {', '.join(FINAL)}"
            )
    return tuple(found)
