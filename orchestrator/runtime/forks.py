"""Forks: a new instance that shares the beginning of another one's history, and goes on from there.

What is shared has to be whole: every step in it had settled when the first record that is not shared was asked for.
Else the new instance would wait for an outcome that only its origin gets.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import uuid
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection

from orchestrator import errors
from orchestrator.core.calls.values import seed_of
from orchestrator.core.records import Kind, Outcome, Role, State
from orchestrator.runtime import running
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.runtime.inputs import check_instance_id
from orchestrator.runtime.starter import Starter
from orchestrator.store import history, instances, mailbox
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance, Status
from orchestrator.store.mailbox import Mail
from orchestrator.store.past import as_history

#: What its own clock or mailbox settles: left open, the new instance settles it anew.
_WAITS = (Kind.TIMER, Kind.RECEIVE)
_UNDOES = (Kind.COMPENSATION, Kind.UNDO)
_DISPATCHED = (Kind.STEP, Kind.CHILD, *_UNDOES)

_PATIENCE_SECONDS = 10.0


class Forks:
    """Begins instances from the history of others."""

    def __init__(self, coordinator: Coordinator, starter: Starter) -> None:
        self.coordinator = coordinator
        self.starter = starter

    def fork(self, origin: Instance, seq: int, instance_id: str | None, owns_compensations: bool) -> WorkflowHandle:
        """Record a fork of ``origin`` and publish its start; see ``WorkflowHandle.fork``."""
        running.refuse_inside_passes("fork()")
        new_id = check_instance_id(instance_id) if instance_id is not None else str(uuid.uuid4())
        if owns_compensations and origin.status is not Status.TERMINATED:
            raise errors.InvalidOperation(
                f"{origin.id} is {origin.status} and undoes its steps itself; only a TERMINATED instance gives its "
                "compensations away"
            )
        generation = secrets.token_hex(8)

        def once() -> None:
            with self.coordinator.store.begin("fork") as connection:
                # child before parent; what is shared of an instance that was terminated does not change any more
                children = _lock_children(connection, origin, seq) if owns_compensations else []
                locked = instances.lock_instance(connection, origin.id)
                if locked is None or locked.generation != origin.generation:
                    raise errors.UnknownInstance(origin.id)
                existing = instances.find_instance(connection, new_id)
                if existing is None or existing.generation != generation:
                    self._record(connection, locked, seq, new_id, generation, owns_compensations)
                    for child in children:
                        # who may have to undo it keeps it from being purged
                        adopted = {"parent_id": new_id, "parent_generation": generation, "parent_run": 0}
                        instances.update_instance(connection, child, adopted)
                # else the answer to the COMMIT before was lost: it has been recorded

        self.coordinator.store.retrying(once, patience_seconds=_PATIENCE_SECONDS)
        return self.starter.publish(new_id, generation, origin.workflow, origin.input, {})

    def _record(
        self, connection: Connection, origin: Instance, seq: int, new_id: str, generation: str, owns: bool
    ) -> None:
        rows = [row for row in history.load_rows(connection, origin.id, origin.run) if row.seq >= 0]
        mail = mailbox.load_taken(connection, origin.id, origin.run)
        last_order = _last_order(origin, rows, seq)
        shared = [_shared(row, last_order) for row in rows[:seq]]
        undone = {row.undoes for row in shared if row.kind in _UNDOES}
        if owns:
            owned = [row for row in shared if row.compensation is not None and row.seq not in undone]
            _give_away(connection, origin, owned, new_id)
        values = self._values(origin, shared, seq, last_order)
        values["mail"] = sum(each.taken_order is not None and each.taken_order <= last_order for each in mail)
        now = self.coordinator.clock()
        is_new = instances.insert_instance(
            connection,
            instance_id=new_id,
            generation=generation,
            workflow=origin.workflow,
            queue=origin.queue,
            arguments=origin.input,
            request=None,
            now=now,
            pass_due_at=self.coordinator.later(self.coordinator.settings.publish_grace),
            values=values,
        )
        if not is_new:
            raise errors.InstanceExists(new_id, "")
        copies = [_copy(row, new_id, generation, owns or row.seq in undone) for row in shared]
        history.insert_rows(connection, copies)
        mailbox.copy_taken(connection, [m.id for m in mail if _is_before(m, last_order)], new_id, generation, seq)
        fork = instances.find_instance(connection, new_id)
        assert fork is not None
        # what earlier runs have subscribed to holds
        earlier = history.list_subscribing(connection, origin.id, origin.run)
        for channel, mode in _subscriptions([*earlier, *shared]).items():
            mailbox.subscribe(connection, fork, channel, mode, now)

    def _values(self, origin: Instance, shared: list[HistoryRow], seq: int, last_order: int) -> dict[str, Any]:
        """Return what the new instance takes over from its origin besides records."""
        values: dict[str, Any] = {
            # not ``started_at``: at its first pass it begins like any instance, with a deadline of its own
            "status": Status.RUNNING,
            "run_started_at": origin.run_started_at or origin.started_at or origin.created_at,
            "next_seq": seq,
            "next_order": last_order + 1,
            "passed_order": last_order,
            "last_at": origin.last_at,
            "parks": origin.parks,
            "is_past_pivot": any(r.role is Role.PIVOT and r.outcome is Outcome.SUCCEEDED for r in shared),
            "seeds": json.dumps(_seeds(origin, seq)),
            "forked_from": origin.id,
        }
        if origin.cancel_order is not None and origin.cancel_order <= last_order:
            names = ("cancel_order", "cancel_at", "cancel_reason")
            values |= {name: getattr(origin, name) for name in names}
        if origin.deadline_order is not None and origin.deadline_order <= last_order:
            values |= {name: getattr(origin, name) for name in ("deadline_order", "deadline_passed_at")}
        return values


def _seeds(origin: Instance, seq: int) -> list[tuple[int, str]]:
    """Return what the shared history was drawn from: the origin may be a fork, and share some of it with its own."""
    seeds: list[tuple[int, str]] = []
    for until, seed in json.loads(origin.seeds) if origin.seeds else []:
        seeds.append((min(until, seq), seed))
        if until >= seq:
            return seeds
    return [*seeds, (seq, seed_of(as_history(origin, ())))]


def _last_order(origin: Instance, rows: list[HistoryRow], seq: int) -> int:
    """Return the last event that had been delivered when record ``seq`` was asked for; refuse what cannot be shared."""
    if not 0 <= seq <= len(rows):
        raise errors.InvalidOperation(f"{origin.id} has {len(rows)} records; it cannot be forked at {seq}")
    if seq == len(rows):
        passed_order = origin.passed_order or 0
        if origin.undo_order is not None and origin.undo_order <= passed_order:
            raise errors.InvalidOperation(f"the undo of {origin.id} has begun; fork it before that")
        return passed_order
    if rows[seq].kind in _UNDOES:
        raise errors.InvalidOperation(f"{origin.id} was undoing when record {seq} was asked for; fork it before that")
    return rows[seq].after_order


def _shared(row: HistoryRow, last_order: int) -> HistoryRow:
    """Return a record as it was when ``last_order`` had been delivered, or refuse: it had not settled yet."""
    # without an order it was settled as it was recorded, or by the end of its instance, of which no pass knew
    at_once = row.settled_order is None and row.kind not in _DISPATCHED
    is_before = at_once or (row.settled_order is not None and row.settled_order <= last_order)
    is_settled = row.state is State.SETTLED and is_before
    is_closed = row.late_order is None or row.late_order <= last_order
    if row.kind in _WAITS and (not is_settled or row.outcome is Outcome.WITHDRAWN):
        # of what was withdrawn nobody can say when; if it was before, the replay withdraws it again
        due_at = row.timeout_at if row.kind is Kind.TIMER else None
        reset = {"state": State.SCHEDULED, "outcome": None, "settled_order": None, "settled_at": None, "result": None}
        return row.changed({**reset, "due_at": due_at, "awaited": None})
    if not (is_settled and is_closed):
        raise errors.InvalidOperation(
            f"step {row.seq} ({row.name}) of {row.instance_id} had not settled there; a fork could not wait for it: "
            "fork at another record"
        )
    return row


def _lock_children(connection: Connection, origin: Instance, seq: int) -> list[Instance]:
    """Lock the children of the shared records whose compensations are given away."""
    rows = history.load_rows(connection, origin.id, origin.run)
    ids = [r.child_id for r in rows if 0 <= r.seq < seq and r.compensation is not None and r.child_id is not None]
    found = [instances.lock_instance(connection, child_id) for child_id in sorted(ids)]
    return [c for c in found if c is not None and c.parent_generation == origin.generation]


def _give_away(connection: Connection, origin: Instance, owned: list[HistoryRow], new_id: str) -> None:
    """Note to whom the compensations of steps belong: undone by two forks, they would be undone twice."""
    for row in owned:
        if row.resolution is not None:
            raise errors.InvalidOperation(
                f"compensations of {origin.id} belong to another: step {row.seq} ({row.name}): {row.resolution}"
            )
        history.note_on_row(connection, row, {"resolution": f"its compensation belongs to the fork {new_id}"})


def _copy(row: HistoryRow, instance_id: str, generation: str, keeps_compensation: bool) -> dict[str, Any]:
    kept = {} if keeps_compensation else {"compensation": None, "inherits_compensation": False}
    own: dict[str, Any] = {"instance_id": instance_id, "generation": generation, "run": 0}
    own |= {"awaited": None, "wake": None}
    if row.kind not in _UNDOES:
        own["resolution"] = None
    return {**dataclasses.asdict(row), **own, **kept}


def _is_before(mail: Mail, last_order: int) -> bool:
    return mail.taken_order is not None and mail.taken_order <= last_order


def _subscriptions(shared: Iterable[HistoryRow]) -> dict[str, str]:
    """Return channel and mode of what the shared history has subscribed to."""
    held: dict[str, str] = {}
    for row in shared:
        if row.kind is Kind.SUBSCRIBE:
            held[row.name] = row.message_options.get("mode", "broadcast")
        elif row.kind is Kind.UNSUBSCRIBE:
            held.pop(row.name, None)
    return held
