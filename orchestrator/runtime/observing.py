"""Telling observers what was committed: receivers of signals, monitors of Celery's events, the log.

What receivers have to be told is written down in the same transaction as the change itself, and deleted once they were
told; after a crash between the two a thread of any worker tells them.  Monitors and the log are told once, or never.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import signals
from orchestrator.errors import StoreUnreachable
from orchestrator.runtime.change import Change
from orchestrator.runtime.deferring import Deferred
from orchestrator.runtime.instrumentation import Instrumentation
from orchestrator.runtime.monitoring import Monitor
from orchestrator.runtime.notices import Notice, list_notices, notice_of, notice_started
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.transactions import Clock
from orchestrator.store import instances, notices
from orchestrator.store.engine import Store
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance
from orchestrator.store.notices import OwedNotice

logger = logging.getLogger("orchestrator")

#: How much is told before it is noted that it was.
BATCH = 200
#: What nobody takes is kept for so long.
KEPT_FOR = timedelta(days=1)
#: Between two attempts at one notice: its receivers end the process that tells them.
BACKOFF, LONGEST_SECONDS = 4, 3600.0
#: Notices are forgotten so many at a time: on SQLite everybody waits for a transaction.
FORGOTTEN_AT_ONCE = 500

_SIGNALS = {name: getattr(signals, name) for name in signals.__all__}
#: Told by the process that it happened in, or not at all.
_UNWRITTEN = ("replay_slow",)


class Observers:
    """Tells whoever wants to know."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        monitor: Monitor,
        clock: Clock,
        instrumentation: Callable[[], Instrumentation] = Instrumentation,
    ) -> None:
        self.store = store
        self.settings = settings
        self.monitor = monitor
        self.clock = clock
        self._instrumentation = instrumentation
        self.deferred = Deferred()
        self._after: OwedNotice | None = None

    @property
    def instrumentation(self) -> Instrumentation:
        """What is told of things while they happen."""
        return self._instrumentation()

    # --- inside of the transaction ----------------------------------------------------------------------------------

    def note(self, connection: Connection, instance: Instance, change: Change, now: datetime) -> list[Notice]:
        """Write down what receivers have to be told of ``change``; return all that there is to tell."""
        if not self._is_anybody_there():
            return []
        return self._write(connection, list_notices(instance, change, now, scheduled=self._wants_scheduled()), now)

    def note_claim(self, connection: Connection, row: HistoryRow, now: datetime) -> list[Notice]:
        """Do the same for an attempt that begins."""
        workflow = ""
        if self._is_owed("step_started", row.name):
            found = instances.find_instance(connection, row.instance_id)
            workflow = found.workflow if found is not None else ""
        elif not logger.isEnabledFor(logging.INFO):
            return []
        return self._write(connection, [notice_started(row, workflow, now)], now)

    def note_pass(self, instance: Instance, seconds: float, records: int) -> list[Notice]:
        """Return what there is to tell of a pass; it is not written down: if this process dies, it is made again."""
        self.instrumentation.note_pass(instance.workflow, seconds)
        if seconds < self.settings.slow_replay:
            return []
        arguments = {"seconds": seconds, "records": records}
        return [notice_of("replay_slow", instance, self.clock(), arguments)]

    def _write(self, connection: Connection, found: list[Notice], now: datetime) -> list[Notice]:
        told: list[Notice] = []
        owed: list[dict[str, Any]] = []
        later = now + timedelta(seconds=self.settings.publish_grace)
        for each in found:
            if not self._is_owed(each.signal, each.sender):
                told.append(each)
                continue
            numbered = each.numbered(_new_id(now, len(owed)))
            is_told_here = _SIGNALS[each.signal].has_listeners(each.sender)
            owed.append(_row(numbered, now, later if is_told_here else now))
            told.append(numbered)
        notices.insert_notices(connection, owed)
        return told

    def _is_owed(self, signal: str, sender: str) -> bool:
        return self.settings.signals == "always" or bool(_SIGNALS[signal].has_listeners(sender))

    @property
    def owes_notices(self) -> bool:
        """Whether anything may have to be written down for receivers, in the transaction that it is about."""
        return self.settings.signals == "always" or any(signal.receivers for signal in _SIGNALS.values())

    def _is_anybody_there(self) -> bool:
        return self.owes_notices or logger.isEnabledFor(logging.WARNING) or self.monitor.is_listening

    def _wants_scheduled(self) -> bool:
        """Tell whether anybody wants to know of each step that is to be run: a map has ten thousand of them."""
        signal = _SIGNALS["step_scheduled"]
        return self.settings.signals == "always" or bool(signal.receivers) or logger.isEnabledFor(logging.DEBUG)

    # --- after the commit -------------------------------------------------------------------------------------------

    def tell(self, told: list[Notice]) -> None:
        """Tell of what was committed, or leave it to a thread that may.  What goes wrong here has no effect on it."""
        if not self.deferred.take_over(told):
            self._tell_all(told)

    def tell_deferred(self) -> None:
        """Tell what other threads have left to this one."""
        self._tell_all(self.deferred.pop_all())

    def _tell_all(self, told: list[Notice]) -> None:
        for start in range(0, len(told), BATCH):
            part = told[start : start + BATCH]
            try:
                self._tell(part)
            except Exception:  # a handler of the log, the broker, the store: it was committed, and must not fail for it
                logger.exception("observers could not be told of %s", part[0].instance_id, extra=_about(part[0]))

    def _tell(self, told: Sequence[Notice]) -> None:
        done = []
        for each in told:
            _log(each)
            if _SIGNALS[each.signal].has_listeners(each.sender) and (each.id is not None or each.signal in _UNWRITTEN):
                self._send(each)
                done += [each.id] if each.id is not None else []
        try:
            if done:
                self._delete(done)
        finally:  # last: receivers need not wait for a broker that is away
            for each in told:
                self.monitor.tell(each)

    def _send(self, each: Notice) -> None:
        _SIGNALS[each.signal].send(
            sender=each.sender,
            app=self.monitor.app,
            instance_id=each.instance_id,
            generation=each.generation,
            workflow=each.workflow,
            run=each.run,
            at=each.at,
            notice_id=each.id,
            **each.arguments,
        )

    def _delete(self, done: list[str]) -> None:
        try:
            with self.store.begin("told") as connection:
                notices.delete_notices(connection, done)
        except (SQLAlchemyError, StoreUnreachable) as error:
            logger.warning("receivers of signals may be told again: %r", error)

    # --- in the thread of a worker ----------------------------------------------------------------------------------

    def tell_due(self) -> bool:
        """Tell of what the process that brought it about did not: it died, or it had no receivers.

        Returns whether there may be more to tell.
        """
        listened = [name for name, signal in _SIGNALS.items() if signal.receivers and name not in _UNWRITTEN]
        if not listened:
            return False
        now = self.clock()
        with self.store.read("due-notices") as connection:
            due = notices.list_due_notices(connection, listened, now, BATCH, self._after)
        # from there on the next time: what nobody here has receivers for must not stand in the way of the rest
        self._after = due[-1] if len(due) == BATCH else None
        has_told = False
        for owed in due:
            notice = _read(owed)
            # to take it for the process that does have receivers would be to keep it from being told there
            if not _SIGNALS[owed.signal].has_listeners(notice.sender):
                continue
            grace = min(self.settings.publish_grace * BACKOFF**owed.attempts, LONGEST_SECONDS)
            with self.store.begin("take-notice") as connection:
                taken = notices.take_notice(connection, owed, self.clock() + timedelta(seconds=grace))
            if taken:
                self._send(notice)
                self._delete([owed.id])
                has_told = True
        return has_told and self._after is not None

    def forget(self) -> None:
        """Forget what nobody has taken for a day."""
        before, forgotten = self.clock() - KEPT_FOR, 0
        while True:
            with self.store.read("forget-notices") as connection:
                old = notices.list_old_notices(connection, before, FORGOTTEN_AT_ONCE)
            if not old:
                break
            with self.store.begin("forget-notices") as connection:
                notices.delete_notices(connection, old)
            forgotten += len(old)
        if forgotten:
            logger.warning("%d notices were forgotten: no worker has receivers for them", forgotten)


def _new_id(now: datetime, index: int) -> str:
    return f"{int(now.timestamp() * 1_000_000):014x}{index:06x}{secrets.token_hex(6)}"


def _row(each: Notice, now: datetime, due_at: datetime) -> dict[str, Any]:
    payload = {
        "sender": each.sender,
        "workflow": each.workflow,
        "run": each.run,
        "generation": each.generation,
        "at": each.at.isoformat(),
        "arguments": each.arguments,
    }
    return {
        "id": each.id,
        "instance_id": each.instance_id,
        "signal": each.signal,
        "payload": json.dumps(payload),
        "created_at": now,
        "due_at": due_at,
    }


def _read(owed: OwedNotice) -> Notice:
    told = json.loads(owed.payload)
    return Notice(
        owed.signal,
        told["sender"],
        owed.instance_id,
        told["generation"],
        told["workflow"],
        told["run"],
        datetime.fromisoformat(told["at"]),
        told["arguments"],
        id=owed.id,
    )


# --- the log ------------------------------------------------------------------------------------------------------

_WARNINGS = frozenset({"instance_blocked", "step_lost", "compensation_failed", "replay_slow"})
_IN_WORDS = {"seq", "kind", "task_id"}


def _log(each: Notice) -> None:
    """Write a line; what it is about is in the record's attributes, for whoever formats lines as JSON."""
    level = logging.WARNING if each.signal in _WARNINGS else logging.INFO
    if each.signal == "step_scheduled":  # a map has ten thousand of them
        level = logging.DEBUG
    if not logger.isEnabledFor(level):
        return
    told = {name: value for name, value in each.arguments.items() if value is not None}
    # a LogRecord has a ``message`` of its own
    extra = {("error_message" if name == "message" else name): value for name, value in told.items()}
    what = each.signal.replace("_", " ")
    subject = f"{each.instance_id} {each.sender}"
    if "seq" in told:
        subject = f"{each.instance_id} step {told['seq']} {each.sender}"
    details = ", ".join(f"{name}={value}" for name, value in told.items() if name not in _IN_WORDS)
    details = details and f" ({details})"
    logger.log(level, "%s: %s%s", what, subject, details, extra={**_about(each), **extra})


def _about(each: Notice) -> dict[str, Any]:
    about = {"instance_id": each.instance_id, "run": each.run, "signal": each.signal}
    return {**about, "workflow": each.workflow} if each.workflow else about
