"""Passes: decided by the workflow's code, counted before they are made, refused where the code does not match."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy import Connection

from orchestrator import codec
from orchestrator.core.live import CannotGoOn, LivePass
from orchestrator.core.records import Broken, Decision, Event, History, Kind, Record, Recurred, State, Waiting
from orchestrator.runtime import decisions, requests, settling
from orchestrator.runtime.change import Change, Outbox
from orchestrator.runtime.logs import about
from orchestrator.runtime.offering import Offer, take_up
from orchestrator.runtime.remembered import Remembered
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.transactions import Clock, Transactions, utc_now
from orchestrator.store import history, instances, mailbox, workers
from orchestrator.store.engine import Store, is_transient
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status
from orchestrator.store.mailbox import Mail
from orchestrator.store.past import as_news, make_history
from orchestrator.store.workers import Worker

if TYPE_CHECKING:
    from orchestrator.runtime.observing import Observers

logger = logging.getLogger("orchestrator")

T = TypeVar("T")


class Workflows(Protocol):
    """How the coordinator runs workflow code, where it is registered."""

    def knows(self, workflow: str) -> bool: ...

    def names(self) -> list[str]: ...

    def options(self, workflow: str) -> WorkflowOptions: ...

    def decide(self, instance: Instance, history: History) -> tuple[Decision, LivePass | None]: ...

    def go_on(
        self, live: LivePass, instance: Instance, records: Sequence[Record], events: Sequence[Event]
    ) -> Decision: ...


@dataclass(frozen=True, slots=True)
class WorkflowOptions:
    """What ``@orchestrator.workflow`` was given besides what Celery knows."""

    parks: bool = False
    deadline: timedelta | None = None


class Passes(Transactions):
    """Makes the passes of instances; the only caller of ``decide()``."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        workflows: Workflows,
        incarnation: Callable[[], str],
        clock: Clock = utc_now,
        observers: Observers | None = None,
    ) -> None:
        super().__init__(store, settings, clock, observers)
        self.workflows = workflows
        self.incarnation = incarnation

    def make_pass(self, connection: Connection, instance: Instance, change: Change, *, inline: bool) -> None:
        """Decide on what ``change`` makes of the instance, and add what follows to it; or leave the pass owed."""
        if not inline or not self.workflows.knows(instance.workflow):
            settling.owe_pass(instance, change, self.later(self.settings.publish_grace))
            return
        change.has_pass = True
        seen = instance.changed(change.instance)
        known = self.memory.take(instance)
        rows = self._load_rows(connection, instance, change, 0 if known is None else known.mark)
        after = 0 if known is None else known.order
        messages = [each.event for each in _load_mail(connection, seen, after)]
        records, events = as_news(seen, rows.values(), messages, after)
        past = make_history(seen, records, events)
        if known is not None:
            past = make_history(seen, (*known.records, *records), (*known.inbox, *events))
        decision, live = self._timed(seen, change, lambda: self._decide(seen, past, known, records, events))
        mail = _load_mail(connection, seen) if isinstance(decision.ending, Recurred) else []
        decisions.apply_decision(self, connection, seen, rows, mail, decision, change)
        if change.ends and instance.run == 0 and instance.forked_from is None:  # else other runs may have subscribed
            asked_before = any(record.kind is Kind.SUBSCRIBE for record in past.records)
            change.may_have_subscribed = asked_before or bool(change.subscriptions)
        if isinstance(decision.ending, Waiting):
            stands = live is not None and live.is_waiting
            self.memory.keep(seen, known, past, rows, decision, live if stands else None, change)

    def _decide(
        self,
        seen: Instance,
        past: History,
        known: Remembered | None,
        records: Sequence[Record],
        events: Sequence[Event],
    ) -> tuple[Decision, LivePass | None]:
        """Go on from where the last pass of this process stands, else run the function from the top."""
        if known is not None and known.live is not None:
            with suppress(CannotGoOn):
                return self.workflows.go_on(known.live, seen, records, events), known.live
        decision, live = self.workflows.decide(seen, past)
        if live is not None:
            self.memory.watch(live)
        return decision, live

    def _load_rows(
        self, connection: Connection, instance: Instance, change: Change, from_seq: int
    ) -> dict[int, HistoryRow]:
        """Return the records of a run from one on, as ``change`` leaves them, by ``seq``."""
        rows = {row.seq: row for row, _ in change.rows.values() if row.seq >= from_seq}
        if instance.version == 0 and instance.next_seq == 0:  # nothing has ever been written to it
            rows = {}
        elif from_seq == 0:  # those of an operator, too
            rows = {row.seq: row for row in history.load_rows(connection, instance.id, instance.run)}
        elif len(rows) < instance.next_seq - from_seq:
            loaded = history.load_rows(connection, instance.id, instance.run, from_seq=from_seq)
            rows = {row.seq: row for row in loaded}
        for row, values in change.rows.values():
            rows[row.seq] = rows.get(row.seq, row).changed(values)
        return dict(sorted(rows.items()))

    def _timed(self, instance: Instance, change: Change, decide: Callable[[], T]) -> T:
        begun_at = time.monotonic()
        decided = decide()
        if self.observers is not None:
            # told with the rest after the commit: here the instance may be locked
            seconds = time.monotonic() - begun_at
            change.outbox.notices += self.observers.note_pass(instance, seconds, instance.next_seq)
        return decided

    def begin(self, instance_id: str, generation: str, offer: Offer | None, *, is_counted: bool) -> Outbox:
        """Make the first pass of an instance, at its first message; it may have been made, or may not be due.

        It is not counted before it is made: if it ends its process the message comes again, which ``advance`` is for.
        ``is_counted``: it was counted when the instance was recorded.  ``offer`` is as for ``advance``.
        """
        is_first = False

        def look(connection: Connection) -> Instance | None:
            nonlocal is_first
            found = instances.find_instance(connection, instance_id)
            is_first = found is not None and self._is_untouched(found)
            return found if is_first else None

        outbox = self._make_owed(instance_id, generation, offer, look, lambda: is_counted or is_first)
        return outbox if is_counted or is_first else self.advance(instance_id, generation, offer)

    def _is_untouched(self, instance: Instance) -> bool:
        """Tell whether nothing has happened to an instance, nor has anybody asked for its first pass again."""
        asked_for_at, now = instance.pass_due_at, self.clock()
        if instance.version > 0 or instance.pass_publications > 0:
            return False
        if asked_for_at is None or asked_for_at < self.later(self.settings.publish_grace / 2):
            return False
        may_begin = instance.may_pass and instance.may_begin(now) and not requests.has_expired(instance, now)
        return may_begin and self.workflows.knows(instance.workflow)

    def advance(self, instance_id: str, generation: str, offer: Offer | None = None) -> Outbox:
        """Make the pass that an instance owes.  A second message for the same pass finds nothing to do.

        ``offer``: if it is the first one, the first step may be claimed in the same commit.
        """
        begun, outbox = self._count_pass(instance_id, generation)
        if begun is None or begun.pass_due_at is None:
            return outbox
        return self._make_owed(instance_id, generation, offer)

    def _make_owed(
        self,
        instance_id: str,
        generation: str,
        offer: Offer | None,
        look: Callable[[Connection], Instance | None] | None = None,
        may_be_made: Callable[[], bool] = lambda: True,
    ) -> Outbox:
        def prepare(connection: Connection, instance: Instance) -> Change | None:
            if offer is not None:
                offer.withdraw()  # what an earlier try announced was rolled back
            if not may_be_made() or instance.pass_due_at is None or not instance.may_pass:
                return None
            change = Change()
            self.make_pass(connection, instance, change, inline=True)
            if offer is not None and instance.next_seq == 0 and instance.run == 0:
                take_up(change, offer, max(self.clock(), instance.last_at))
            return change

        try:
            return self.transact("advance", instance_id, generation, prepare, decides=lambda: True, look=look)
        except Exception as error:
            if is_transient(error):
                raise
            logger.exception("%s: what its pass decided cannot be written", instance_id, extra=about(instance_id))
            return self._refuse_for(instance_id, generation, error)

    def _refuse_for(self, instance_id: str, generation: str, error: Exception) -> Outbox:
        reason = settling.explain(Broken(codec.describe_error(error)))

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            if instance.pass_due_at is None or not instance.may_pass:
                return None
            change = Change()
            self.refuse(connection, instance, reason, change)
            return change

        return self.transact("refuse", instance_id, generation, prepare)

    def let_go(self, change: Change, held: HistoryRow) -> None:
        """Dispatch a record that its map has held back."""
        raise NotImplementedError

    def refuse(self, connection: Connection, instance: Instance, reason: str, change: Change) -> None:
        """The code of this incarnation does not match: let the others have their turn, block when all have refused."""
        refused = sorted({*self.list_refused(instance), self.incarnation()})
        change.instance.update(refused=json.dumps(refused), blocked=reason)
        serving = {w.incarnation for w in workers.list_workers(connection) if _serves(w, instance)}
        if serving - set(refused):
            # not published at once: this process would be the first to take the message
            change.instance.update(pass_due_at=self.later(self.settings.poll_interval), pass_publications=0)
        else:
            change.instance.update(status=Status.BLOCKED, pass_due_at=None)

    def _pass_on(self, connection: Connection, instance: Instance, change: Change) -> None:
        """Have the message sent again for a worker that has the code, or block: there is none."""
        if any(_serves(worker, instance) for worker in workers.list_workers(connection)):
            polls = max(1, instance.pass_publications)
            change.instance = {"pass_due_at": self.later(self.settings.poll_interval * polls)}
            return
        reason = (
            f"no live worker has the workflow {instance.workflow} and serves its queue; it goes on when one is started"
        )
        self.refuse(connection, instance, reason, change)

    @staticmethod
    def list_refused(instance: Instance) -> list[str]:
        return list(json.loads(instance.refused)) if instance.refused else []

    def _count_pass(self, instance_id: str, generation: str) -> tuple[Instance | None, Outbox]:
        """Count a pass before it is made; at the cap the instance is blocked: running its code kills the process."""
        found: Instance | None = None

        def prepare(connection: Connection, instance: Instance) -> Change | None:
            nonlocal found
            found = None
            is_owed = instance.pass_due_at is not None and instance.may_pass
            if not is_owed:
                return None
            change = Change()
            if requests.has_expired(instance, self.clock()):
                requests.expire(self, instance, change)
                return change
            if not instance.may_begin(self.clock()):
                return None  # whatever rang the bell: its eta has not come
            if not self.workflows.knows(instance.workflow):
                self._pass_on(connection, instance, change)
                return change
            if self.incarnation() in self.list_refused(instance):
                self.refuse(connection, instance, instance.blocked or "", change)
                return change
            cap = self.settings.max_pass_attempts
            if instance.pass_attempts >= cap and settling.may_be_passing(instance, self.clock()):
                return None
            change.instance = settling.count_attempt(instance, cap, self.later(self.settings.publish_grace))
            found = instance.changed(change.instance)
            return change

        outbox = self.transact("count-pass", instance_id, generation, prepare)
        return found, outbox

    def first_dispatch(
        self, timeout_seconds: float | None, options: Mapping[str, Any], *, is_foreign: bool = False
    ) -> dict[str, Any]:
        """Return the columns of a record that may be claimed from now on, or from its countdown or eta."""
        now = self.clock()
        begins_at = now
        if options.get("eta") is not None:
            begins_at = options["eta"]
        elif options.get("countdown"):
            begins_at = now + timedelta(seconds=float(options["countdown"]))
        is_now = begins_at <= now
        publish_at = self._next_publication(now, is_foreign) if is_now else begins_at
        # that of a foreign step goes with its message: nobody here is told when it begins
        expires_at = None if is_foreign and is_now else _expiry(options.get("expires"), now)
        timeout_at = None if timeout_seconds is None else max(begins_at, now) + timedelta(seconds=timeout_seconds)
        return {
            "state": State.SCHEDULED,
            "publications": 1 if is_now else 0,
            "dispatched_at": now if is_now else None,
            "publish_at": publish_at,
            "expires_at": expires_at,
            "timeout_at": timeout_at,
            "due_at": earliest(publish_at, expires_at, timeout_at),
        }

    def _next_publication(self, now: datetime, is_foreign: bool) -> datetime | None:
        """Return when a message just published is doubted; that of a foreign step, which nobody claims, never is."""
        return None if is_foreign else now + timedelta(seconds=self.settings.publish_grace)


def _load_mail(connection: Connection, instance: Instance, after_order: int = 0) -> list[Mail]:
    return mailbox.load_taken(connection, instance.id, instance.run, after_order) if instance.mail else []


def earliest(*moments: datetime | None) -> datetime | None:
    return min((moment for moment in moments if moment is not None), default=None)


def _serves(worker: Worker, instance: Instance) -> bool:
    """Tell whether a worker has the workflow's code and is sent its passes."""
    has_code = instance.workflow in worker.workflows
    return has_code and (instance.queue is None or not worker.queues or instance.queue in worker.queues)


def _expiry(expires: Any, now: datetime) -> datetime | None:
    if expires is None or isinstance(expires, datetime):
        return expires
    return now + timedelta(seconds=float(expires))
