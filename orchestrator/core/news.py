"""Whether what has come in since follows from what a pass that stands at a wait has decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from orchestrator.core.passes import Pass
from orchestrator.core.records import Decision, Event, Record, Settled, State, UndoRequested


class CannotGoOn(RuntimeError):
    """A live pass cannot go on; the whole history is to be replayed instead.  Never seen by workflow code."""


def check_news(current: Pass, last: Decision, changed: Sequence[Record], events: Iterable[Event]) -> list[Event]:
    """Return those of ``events`` that are yet to be delivered, or refuse news that cannot be of this pass's history.

    ``last`` is what the pass decided last.  It was written, or the pass would not have been asked to go on: so it is
    among what has come in, and nothing else is where it should be.
    """
    news = {record.seq: record for record in changed}
    _check_records(current, changed)
    for seq in _written(last):
        if seq not in news or news[seq].state is not State.SETTLED:
            raise CannotGoOn(f"record {seq} was settled by its last decision, and has not come in so")
    for seq in range(len(current.recorded), len(current.nodes)):
        if seq not in news:
            raise CannotGoOn(f"record {seq} was asked for by its last decision, and has not come in")
    return list(_undelivered(current, news, events))


def _written(last: Decision) -> Iterator[int]:
    """Yield the records that a decision has settled."""
    yield from (new.seq for new in last.records if new.outcome is not None)
    yield from (withdrawal.seq for withdrawal in last.withdrawals)
    yield from (receipt.seq for receipt in last.receipts)


def _check_records(current: Pass, changed: Iterable[Record]) -> None:
    next_seq = len(current.recorded)
    for record in changed:
        if record.seq > next_seq:
            raise CannotGoOn(f"record {next_seq} has not come in, but {record.seq}, which is after it")
        next_seq += record.seq == next_seq
        if record.seq < len(current.nodes):
            _check_record(current, record)


def _check_record(current: Pass, record: Record) -> None:
    node = current.nodes[record.seq]
    known, is_recorded = node.record, record.seq < len(current.recorded)
    if is_recorded and current.recorded[record.seq] == record:
        return
    asked = (known.kind, known.name, known.scope, known.undoes, known.after_order)
    if asked != (record.kind, record.name, record.scope, record.undoes, record.after_order):
        raise CannotGoOn(f"record {record.seq} is not what it has asked for there, {known.kind} {known.name}")
    if node.is_settled and record.outcome is not node.outcome:
        raise CannotGoOn(f"record {record.seq} has another outcome than it knows of")
    if known.result is not None and record.result != known.result:
        raise CannotGoOn(f"record {record.seq} has another result than it knows of")


def _undelivered(current: Pass, news: dict[int, Record], events: Iterable[Event]) -> Iterator[Event]:
    order = current.order
    for event in events:
        if isinstance(event, UndoRequested):
            raise CannotGoOn("what it did is to be undone, so it has completed elsewhere")
        if event.order <= current.order and _is_own(current, event):
            continue
        if event.order <= order:
            raise CannotGoOn(f"event {event.order} comes after {order}")
        order = event.order
        if isinstance(event, Settled):
            _check_settled(current, news, event)
        yield event


def _is_own(current: Pass, event: Event) -> bool:
    """Tell whether an event is of a withdrawal that the pass has decided on, so that it knows of it."""
    return isinstance(event, Settled) and event.seq < len(current.nodes) and current.nodes[event.seq].is_settled


def _check_settled(current: Pass, news: dict[int, Record], event: Settled) -> None:
    seq = event.seq
    record = news.get(seq) or (current.recorded[seq] if seq < len(current.recorded) else None)
    if record is None or record.outcome is None:
        raise CannotGoOn(f"event {event.order} settles record {seq}, whose outcome has not come in")
