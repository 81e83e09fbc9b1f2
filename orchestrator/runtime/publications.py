"""Publishing what is due to be published, again where nothing came of it, and settling what the clock has overtaken.

Each time is taken on by a conditional UPDATE that commits the next one first; so many pollers share the work, and
the message is sent with no lock held.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Protocol

from kombu.exceptions import KombuError

from orchestrator.core.records import Failure, Kind, State
from orchestrator.runtime import kept
from orchestrator.runtime.backlogs import Rations, is_doubted
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import Dispatcher
from orchestrator.runtime.passes import earliest
from orchestrator.runtime.settings import Settings
from orchestrator.store import due, history, instances
from orchestrator.store.due import DueRecord
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Status

#: How many records of each kind one poll takes on; a backlog is worked off without flooding the broker.
BATCH = 200
#: So many of a backlog one poll looks at, and so many it puts off in one transaction.
BACKLOG, PUT_OFF_AT_ONCE = 10_000, 500
#: A lost publication is suspected after so long, if the queue is empty.
EARLY_SECONDS = 2.0
#: Between publications of one record: four times as long each, at most a day.
BACKOFF, LONGEST_SECONDS = 4, 86400.0


def backoff_seconds(settings: Settings, publications: int) -> float:
    """Return how long a publication is waited for before the next one."""
    return float(min(LONGEST_SECONDS, settings.publish_grace * BACKOFF**publications))


class HowFull(Protocol):
    """Who knows whether queues are empty."""

    def is_empty(self, name: str | None) -> bool: ...


class Publications:
    """What is to be published, by record and by pass."""

    def __init__(self, coordinator: Coordinator, dispatcher: Dispatcher, queues: HowFull) -> None:
        self.coordinator = coordinator
        self.store = coordinator.store
        self.settings = coordinator.settings
        self.dispatcher = dispatcher
        self.queues = queues
        interval, grace = self.settings.poll_interval, self.settings.publish_grace
        self._rations = Rations(timedelta(seconds=interval), timedelta(seconds=grace))
        self._early_at = time.monotonic()

    # --- records ----------------------------------------------------------------------------------------------------

    def settle_due_records(self) -> None:
        """Settle what timed out or expired, publish what is to be claimed from now on."""
        now = self.coordinator.clock()
        records = self._list_due(now, BATCH)
        if len(records) == BATCH and any(is_doubted(record, now) for record in records):
            records = self._list_due(now, BACKLOG)  # what is due besides must not wait behind it
        doubted = [record for record in records if is_doubted(record, now)]
        suspected = {record.key for record in doubted}
        for record in [record for record in records if record.key not in suspected][:BATCH]:
            self.settle_due(record, now)
        again, put_off = self._ration(doubted, now)
        for record in again:
            self.settle_due(record, now)
        self._put_off(put_off)

    def _list_due(self, now: datetime, limit: int) -> list[DueRecord]:
        with self.store.read("due-records") as connection:
            return due.list_due_records(connection, now, limit)

    def _ration(
        self, doubted: list[DueRecord], now: datetime
    ) -> tuple[list[DueRecord], list[tuple[DueRecord, datetime]]]:
        """Return which messages are sent again, and which are doubted later, and when."""
        again, put_off = [], []
        for queue, records in self._by_queue(doubted).items():
            if self.queues.is_empty(queue):
                again += records[:BATCH]
            else:
                now_again, later = self._rations.divide(queue, records, now)
                again += now_again
                put_off += later
        return again, put_off

    def _by_queue(self, records: list[DueRecord]) -> dict[str | None, list[DueRecord]]:
        queues: dict[tuple[str, str | None], str | None] = {}  # many go where the others do
        found: dict[str | None, list[DueRecord]] = {}
        for record in records:
            kind = (record.name, record.options)
            if kind not in queues:
                queues[kind] = self.dispatcher.queue_of(record)
            found.setdefault(queues[kind], []).append(record)
        return found

    def _put_off(self, records: list[tuple[DueRecord, datetime]]) -> None:
        # in the order in which passes write records, so that neither waits for the other
        records = sorted(records, key=lambda each: (each[0].key.instance_id, each[0].key.run, each[0].key.seq))
        for first in range(0, len(records), PUT_OFF_AT_ONCE):
            with self.store.begin("put-off") as connection:
                due.put_off_publications(connection, records[first : first + PUT_OFF_AT_ONCE])

    def settle_due(self, record: DueRecord, now: datetime) -> None:
        """Do what the clock has to do at one record."""
        moment = earliest(record.timeout_at, record.expires_at)
        if moment is not None and moment <= now:
            self.dispatcher.deliver(self.coordinator.time_out(record.key))
        elif record.state is State.SCHEDULED:
            self._publish(record)

    def _publish(self, listed: DueRecord | HistoryRow) -> None:
        with self.store.read("publish") as connection:
            row = history.find_row(connection, listed.key)
        if row is None or row.state is not State.SCHEDULED or (row.is_foreign and row.publications > 0):
            return
        if (row.due_at, row.publications) != (listed.due_at, listed.publications):
            return  # another poller had it meanwhile
        is_step = row.kind is not Kind.CHILD  # a child is started by whoever gets to it, not by a worker that claims it
        is_capped = is_step and row.publications >= self.settings.max_publications
        if is_capped and self.queues.is_empty(self.dispatcher.queue_of(row)):
            reason = f"its message was published {row.publications} times and never led to a claim"
            failure = Failure("orchestrator.errors.NeverClaimed", ("builtins.Exception",), reason)
            self.dispatcher.deliver(self.coordinator.give_up_publishing(row, failure))
            return
        now = self.coordinator.clock()
        again = now + timedelta(seconds=backoff_seconds(self.settings, row.publications))
        due_at = earliest(again, row.timeout_at, row.expires_at)
        assert due_at is not None
        # the next time is committed first, and the message is published with no lock held
        with self.store.begin("publish") as connection:
            taken = due.postpone_publication(connection, row, again, due_at, row.dispatched_at or now)
        if not taken:
            return
        try:
            following = self.dispatcher.send_out(row)
        except (OSError, KombuError):
            # a broker that is away must not make it look as if the message came and was never claimed
            soon = now + timedelta(seconds=self.settings.publish_grace)
            with self.store.begin("publish") as connection:
                due.take_back_publication(connection, row, soon, earliest(soon, row.timeout_at, row.expires_at))
            raise
        if following is not None:
            self.dispatcher.deliver(following)

    # --- early, and passes ------------------------------------------------------------------------------------------

    def publish_early(self) -> None:
        """Publish again before the grace has passed what should be in a queue that is empty."""
        if time.monotonic() - self._early_at < EARLY_SECONDS:
            return
        self._early_at = time.monotonic()
        now = self.coordinator.clock()
        grace = timedelta(seconds=self.settings.publish_grace)
        with self.store.read("unclaimed") as connection:
            rows = due.list_published_once(connection, now + grace - timedelta(seconds=EARLY_SECONDS), BATCH)
            # what waits for its eta has been published by nobody
            early = now + grace - timedelta(seconds=EARLY_SECONDS)
            owed = instances.list_owed_passes(connection, early, BATCH, begun_by=now)
        for row in rows:
            if self.queues.is_empty(self.dispatcher.queue_of(row)):
                self._publish(row)
        for each in owed:
            if each.pass_publications <= 1 and self.queues.is_empty(each.queue):
                self._publish_pass(each)

    def publish_owed_passes(self) -> None:
        """Ring the bell again for passes that nobody made."""
        now = self.coordinator.clock()
        with self.store.read("owed-passes") as connection:
            owed = instances.list_owed_passes(connection, now, BATCH)
        for each in owed:
            self._publish_pass(each)

    def _publish_pass(self, owed: instances.OwedPass) -> None:
        again = self.coordinator.clock() + timedelta(seconds=backoff_seconds(self.settings, owed.pass_publications))
        with self.store.begin("publish-pass") as connection:
            taken = instances.postpone_pass(connection, owed, again)
        if not taken:
            return
        try:
            if not self._publish_start(owed):
                self.dispatcher.republish_pass(owed)
        except (OSError, KombuError):
            soon = self.coordinator.clock() + timedelta(seconds=self.settings.publish_grace)
            with self.store.begin("publish-pass") as connection:
                instances.take_back_pass(connection, owed, again, soon)
            raise

    def _publish_start(self, owed: instances.OwedPass) -> bool:
        """Publish the start task of an instance whose time to begin has come, or whose message may be lost.

        Once: where nobody knows the workflow, it is the message about the pass that tells.
        """
        if owed.pass_publications > 0:
            return False
        with self.store.read("unbegun") as connection:
            instance = instances.find_instance(connection, owed.instance_id)
        if instance is None or instance.generation != owed.generation or instance.status is not Status.PENDING:
            return False
        start = kept.read(instance.request).start
        if start is None:
            return False
        own = (instance.id, instance.generation, instance.workflow, instance.input)
        self.dispatcher.publish_start(*own, start.options)
        return True
