"""What ``decide()`` is given of an instance, made of the rows that the store has."""

from __future__ import annotations

import json
from collections.abc import Iterable

from orchestrator import codec
from orchestrator.core.records import (
    AttemptEnded,
    CancelRequested,
    Compensation,
    Event,
    Failure,
    History,
    Kind,
    MessageTaken,
    Record,
    Settled,
    UndoRequested,
)
from orchestrator.store.history import HistoryRow
from orchestrator.store.instances import Instance


def as_history(instance: Instance, rows: Iterable[HistoryRow], messages: Iterable[MessageTaken] = ()) -> History:
    """Return what ``decide()`` is given: records by ``seq``, and the inbox by ``order``."""
    return make_history(instance, *as_news(instance, rows, messages))


def as_news(
    instance: Instance, rows: Iterable[HistoryRow], messages: Iterable[MessageTaken], after_order: int = 0
) -> tuple[list[Record], list[Event]]:
    """Return ``rows``, which are by ``seq``, as records, and what came in after ``after_order``."""
    records: list[Record] = []
    inbox: list[Event] = [*messages, *_requests(instance)]
    for row in rows:
        if row.seq < 0:
            continue
        records.append(_record(row))
        inbox += _events(row)
    return records, sorted((event for event in inbox if event.order > after_order), key=lambda event: event.order)


def make_history(instance: Instance, records: Iterable[Record], inbox: Iterable[Event]) -> History:
    """Return the history of the present run of an instance."""
    return History(
        instance.id,
        instance.generation,
        instance.run,
        instance.run_started_at or instance.started_at or instance.created_at,
        tuple(records),
        tuple(inbox),
        instance.passed_order,
        tuple((until, seed) for until, seed in json.loads(instance.seeds)) if instance.seeds else (),
    )


def _requests(instance: Instance) -> list[Event]:
    """Return what came in for the instance as a whole."""
    events: list[Event] = []
    if instance.cancel_order is not None and instance.cancel_at is not None:
        events.append(CancelRequested(instance.cancel_order, instance.cancel_at, instance.cancel_reason))
    if instance.deadline_order is not None and instance.deadline_passed_at is not None:
        events.append(CancelRequested(instance.deadline_order, instance.deadline_passed_at, is_deadline=True))
    if instance.undo_order is not None and instance.undo_at is not None:
        events.append(UndoRequested(instance.undo_order, instance.undo_at))
    return events


def _record(row: HistoryRow) -> Record:
    return Record(
        row.seq,
        row.kind,
        row.name,
        row.scope,
        row.undoes,
        row.after_order,
        row.state,
        row.outcome,
        row.result,
        codec.load(Failure, row.failure) if row.failure else None,
        row.is_timed_out,
        row.late_outcome,
        row.late_result,
        codec.load(Compensation, row.compensation) if row.compensation else None,
        row.arguments,
        row.attempt,
        row.is_in_doubt,
        row.is_foreign,
        row.key.idempotency_key,
        row.child_id,
    )


def _events(row: HistoryRow) -> list[Event]:
    events: list[Event] = []
    if row.kind is Kind.RECEIVE:  # what came in is the message
        return events
    if row.settled_order is not None and row.settled_at is not None:
        events.append(Settled(row.settled_order, row.settled_at, row.seq))
    if row.late_order is not None and row.late_at is not None:
        events.append(AttemptEnded(row.late_order, row.late_at, row.seq))
    return events
