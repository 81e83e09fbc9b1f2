"""Transactions on an instance: prepared from what was read, written under its lock, repeated when that no longer holds.

On SQLite, where a write transaction stops everybody else, a change that runs workflow code is prepared outside of it,
and the instance's version tells at the commit whether what was read still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from orchestrator.runtime import settling
from orchestrator.runtime.change import Change, Outbox, Report
from orchestrator.runtime.instrumentation import Instrumentation
from orchestrator.runtime.remembered import Memory
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.writing import Locking, write
from orchestrator.store import instances
from orchestrator.store.claiming import Held
from orchestrator.store.engine import Conflict, Store
from orchestrator.store.instances import Instance
from orchestrator.store.prepared import may_run_alone

if TYPE_CHECKING:
    from orchestrator.runtime.observing import Observers

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Transactions:
    """Changes instances, one transaction for each change."""

    def __init__(
        self, store: Store, settings: Settings, clock: Clock = utc_now, observers: Observers | None = None
    ) -> None:
        self.store = store
        self.settings = settings
        self.clock = clock
        self.observers = observers
        self.memory = Memory(settings.live_passes)
        #: Tells whether anything follows the end of an instance; else nothing is written down for it.
        self.owes_telling: Callable[[Instance], bool] = lambda _instance: True

    @property
    def instrumentation(self) -> Instrumentation:
        """What is told of things while they happen."""
        return Instrumentation() if self.observers is None else self.observers.instrumentation

    def transact(
        self,
        purpose: str,
        instance_id: str,
        generation: str,
        prepare: Callable[[Connection, Instance], Change | None],
        patience_seconds: float | None = None,
        on_error: Callable[[BaseException], None] | None = None,
        decides: Callable[[], bool] = lambda: False,
        look: Callable[[Connection], Instance | None] | None = None,
    ) -> Outbox:
        """Prepare and write a change of one instance; repeat both when anything it was built on has changed.

        ``on_error`` is told of what went wrong, if it was not merely that.  ``decides`` tells whether ``prepare`` is
        going to run workflow code, which may take its time.  ``look`` returns the instance as it may be without a lock,
        or as somebody has read it: most often it is still so, and need not be read again.
        """
        tried: Change | None = None

        def prepare_once(connection: Connection, instance: Instance) -> tuple[Change | None, Outbox]:
            nonlocal tried
            if tried is not None and settling.is_written(connection, instance, tried):
                # the answer to the COMMIT before was lost: all of it is in the store already
                return None, tried.outbox
            tried = prepare(connection, instance)
            return tried, Outbox()

        def once() -> Outbox:
            nonlocal tried, look
            try:
                if look is not None:
                    looking, look = look, None
                    with suppress(Conflict), self.memory.using():
                        outbox = self._prepared_unlocked(purpose, generation, looking, prepare_once)
                        if outbox is not None:
                            return outbox
                    tried = None
                with self.memory.using():
                    return run()
            except Conflict:
                tried = None  # rolled back for certain: what looks like it was written by another
                raise
            except Exception as error:
                if on_error is not None:
                    on_error(error)
                raise

        def run() -> Outbox:
            if self.store.is_sqlite and decides():
                return self._prepared_outside(purpose, instance_id, generation, prepare_once)
            with self.store.begin(purpose) as connection:
                instance = instances.lock_instance(connection, instance_id)
                if instance is None or instance.generation != generation:
                    return Outbox()
                change, outbox = prepare_once(connection, instance)
                return outbox if change is None else self._write(connection, instance, change)

        patience = self.settings.store_patience if patience_seconds is None else patience_seconds
        return self.store.retrying(once, patience_seconds=patience)

    def _prepared_unlocked(
        self,
        purpose: str,
        generation: str,
        look: Callable[[Connection], Instance | None],
        prepare: Callable[[Connection, Instance], tuple[Change | None, Outbox]],
    ) -> Outbox | None:
        """Write a change of an instance that is locked by that write, if it is as it was read; ``None``: it was not.

        What else is read comes after the instance, so it cannot be older; if it is newer the instance has changed.
        """
        with self.store.begin(purpose, locks_late=True) as connection:
            read = look(connection)
            if read is None or read.generation != generation:
                return None
            change, outbox = prepare(connection, read)
            if change is None:
                return outbox
            self._leave_untold(change)
            is_alone = change.is_plain and may_run_alone(connection) and not self.owes_notices
            if not is_alone:
                self.store.lock_late(connection)
            return self._write(connection, read, change, Locking.ALONE if is_alone else Locking.LATE)

    @property
    def owes_notices(self) -> bool:
        """Whether something may have to be written down for receivers beside a change."""
        return self.observers is not None and self.observers.owes_notices

    def _prepared_outside(
        self,
        purpose: str,
        instance_id: str,
        generation: str,
        prepare: Callable[[Connection, Instance], tuple[Change | None, Outbox]],
    ) -> Outbox:
        with self.store.read(purpose) as connection:
            instance = instances.find_instance(connection, instance_id)
            if instance is None or instance.generation != generation:
                return Outbox()
            change, outbox = prepare(connection, instance)
        if change is None:
            return outbox
        with self.store.begin(purpose) as connection:
            locked = instances.lock_instance(connection, instance_id)
            if locked is None or (locked.generation, locked.version) != (generation, instance.version):
                raise Conflict
            return self._write(connection, locked, change)

    def _write(
        self, connection: Connection, instance: Instance, change: Change, locking: Locking = Locking.FIRST
    ) -> Outbox:
        now = self.clock()
        self._leave_untold(change)
        # before it is written: that may commit it, and what goes wrong after it would leave it so, and nobody told
        if self.observers is not None:
            change.outbox.notices += self.observers.note(connection, instance, change, now)
            if change.outbox.handed is not None:
                change.outbox.notices += self.observers.note_claim(connection, change.outbox.handed.row, now)
        if change.outbox.handed is not None:
            left = instance.changed({**change.instance, "version": instance.version + 1})
            change.outbox.handed = Held(change.outbox.handed.row, left if left.waiting <= 1 else None)
        write(connection, instance, change, now, self.settings.publish_grace, locking)
        if change.report is not None:
            # child before parent: whoever holds a parent's lock never waits for a child's
            change.outbox.extend(self._report(connection, change.report))
        return change.outbox

    def _leave_untold(self, change: Change) -> None:
        """Write nothing down for the end of an instance that nobody is to be told of."""
        if change.outbox.ended is not None and not self.owes_telling(change.outbox.ended):
            change.outbox.ended = None

    def _report(self, connection: Connection, report: Report) -> Outbox:
        parent = instances.lock_instance(connection, report.key.instance_id)
        if parent is None or parent.generation != report.key.generation:
            return Outbox()
        change = self.settle_report(connection, parent, report)
        return Outbox() if change is None else self._write(connection, parent, change)

    def settle_report(self, connection: Connection, parent: Instance, report: Report) -> Change | None:
        """Return what the end of a child makes of its parent."""
        raise NotImplementedError

    def later(self, seconds: float) -> datetime:
        return self.clock() + timedelta(seconds=seconds)
