"""Firing timers: as many at a time as fall due together, and their passes published afterwards.

A timer is nobody's but its instance's: what it comes to is reckoned in memory under the locks of a whole batch of
instances and written by a few statements, so that a storm of them is over in seconds.  No workflow code is run.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kombu.exceptions import KombuError

from orchestrator.core.records import Outcome
from orchestrator.runtime import settling
from orchestrator.runtime.coordinator import POLLER_PATIENCE_SECONDS
from orchestrator.runtime.transactions import Transactions
from orchestrator.store import instances, timers
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance
from orchestrator.store.timers import FiredInstance

#: So many timers are fired in one transaction: their instances are locked as long as it takes.
BATCH = 500
#: So many batches are fired before the other parts of the poller have their turn.
MOST_BATCHES = 40
#: So many passes are remembered until they are published; those of a greater storm the poller finds in the store.
MOST_UNPUBLISHED = 50_000


@dataclass(frozen=True, slots=True)
class Owed:
    """A pass that is to be published."""

    instance_id: str
    generation: str
    queue: str | None


class Timers:
    """Fires what is due, and remembers which passes are to be published for it."""

    def __init__(self, transactions: Transactions) -> None:
        self.transactions = transactions
        self.store = transactions.store
        self._unpublished: deque[Owed] = deque(maxlen=MOST_UNPUBLISHED)

    def fire(self) -> None:
        """Fire the timers that are due, but for those of instances that somebody else is changing."""
        passed_over: set[str] = set()
        for _ in range(MOST_BATCHES):
            with self.store.read("due-timers") as connection:
                due = timers.list_due_instances(connection, self.transactions.clock(), BATCH, passed_over)
            if due:
                # a poller beside this one fires the timers of what it has locked: the next batch is another
                passed_over |= set(due) - self.fire_timers_of(sorted(set(due)))
            if len(due) < BATCH:
                return

    def fire_timers_of(self, instance_ids: list[str]) -> set[str]:
        """Fire what is due in these instances, a batch at most; return those of them that could be locked."""
        locked, fired = self.store.retrying(
            lambda: self._fire_batch(instance_ids), patience_seconds=POLLER_PATIENCE_SECONDS
        )
        owing = [each.left for each in fired if each.owes_pass]
        self._unpublished.extend(Owed(each.id, each.generation, each.queue) for each in owing)
        return locked

    def _fire_batch(self, instance_ids: list[str]) -> tuple[set[str], list[FiredInstance]]:
        with self.store.begin("fire-timers") as connection:
            locked = {each.id: each for each in instances.lock_free_instances(connection, instance_ids)}
            # read again: before they were locked another poller may have fired them, or a pass withdrawn them
            now = self.transactions.clock()
            rows = timers.list_due_timers(connection, locked.keys(), now, BATCH)
            due_at = self.transactions.later(self.transactions.settings.publish_grace)
            fired = [fire_timers(locked[name], own, now, due_at) for name, own in _by_instance(rows).items()]
            timers.settle_timers(connection, fired)
            timers.update_instances(connection, fired)
        return set(locked), fired

    # --- publishing, with nothing locked ----------------------------------------------------------------------------

    @property
    def has_unpublished(self) -> bool:
        return bool(self._unpublished)

    def publish(self, publish: Callable[[str, str, str | None], None], seconds: float) -> None:
        """Publish passes for so long: a broker that is slow must not keep the next timers waiting.

        Where it is away, what is left is for the poller to find among the passes that are owed.
        """
        until = time.monotonic() + seconds
        while self._unpublished and time.monotonic() < until:
            owed = self._unpublished.popleft()
            try:
                publish(owed.instance_id, owed.generation, owed.queue)
            except (OSError, KombuError):
                self._unpublished.clear()
                raise


def _by_instance(rows: Iterable[HistoryRow]) -> dict[str, list[HistoryRow]]:
    own: dict[str, list[HistoryRow]] = defaultdict(list)
    for row in rows:
        own[row.instance_id].append(row)
    return own


def fire_timers(locked: Instance, rows: Iterable[HistoryRow], now: datetime, pass_due_at: datetime) -> FiredInstance:
    """Return what an instance and its timers come to when ``rows`` fire in this order."""
    fired: list[tuple[HistoryRow, int | None]] = []
    seen, waiting, order, is_complete = locked, locked.waiting, locked.next_order, False
    for row in rows:
        if locked.status.is_final or (row.generation, row.run) != (locked.generation, locked.run):
            # its end should have withdrawn it: left as it is, it would be due for ever
            fired.append((row, None))
            continue
        if waiting != seen.waiting:
            seen = seen.changed({"waiting": waiting})
        waiting = settling.count_down(seen, row, {"outcome": Outcome.SUCCEEDED}, is_closed=True)
        is_complete = is_complete or (waiting == 0 and seen.waiting > 0)
        fired.append((row, order))
        order += 1
    values: dict[str, Any] = {"waiting": waiting, "next_order": order}
    if order > locked.next_order:
        values["last_at"] = max(now, locked.last_at)
    owes_pass = is_complete and locked.may_pass
    if owes_pass:
        values |= {"pass_due_at": pass_due_at, "pass_publications": 1}
    return FiredInstance(locked, locked.changed(values), tuple(fired), owes_pass)
