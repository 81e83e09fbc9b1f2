"""Histories written out by hand, for tests that give one to ``decide`` and look at what it asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from orchestrator.core.context import Context
from orchestrator.core.records import (
    AttemptEnded,
    Broken,
    CancelRequested,
    Compensation,
    Completed,
    Decision,
    Event,
    Failed,
    History,
    Kind,
    MessageTaken,
    Outcome,
    Record,
    Settled,
    State,
    UndoRequested,
    Waiting,
)
from orchestrator.core.replay import decide

from .driver import STARTED_AT
from .host import FakeHost, failure

Workflow = Callable[[Context], Any]


@dataclass(slots=True)
class Past:
    """A history in the making: ask for records, let them settle, and ``decide``."""

    host: FakeHost = field(default_factory=FakeHost)
    records: list[Record] = field(default_factory=list)
    inbox: list[Event] = field(default_factory=list)
    seen_order: int | None = None
    run: int = 1
    seeds: tuple[tuple[int, str], ...] = ()

    def asked(self, name: str, kind: Kind = Kind.STEP, **fields: Any) -> Past:
        """Add a record that was asked for at this point."""
        order = self.inbox[-1].order if self.inbox else 0
        fields = {"scope": "", "after_order": order, **fields}
        if kind is Kind.STEP:
            fields.setdefault("arguments", '{"args":[],"kwargs":{}}')
        self.records.append(Record(len(self.records), kind, name, **fields))
        return self

    def timer(self, **fields: Any) -> Past:
        return self.asked("timer", Kind.TIMER, **fields)

    def receive(self, channel: str, **fields: Any) -> Past:
        return self.asked(channel, Kind.RECEIVE, **fields)

    def child(self, name: str, **fields: Any) -> Past:
        itself = Compensation(name, passes="nothing", is_child=True)
        fields = {"child_id": f"order-1:1:{len(self.records)}~g1", "compensation": itself, **fields}
        return self.asked(name, Kind.CHILD, **fields)

    def undoing_child(self, seq: int, **fields: Any) -> Past:
        return self.asked(self.records[seq].name, Kind.UNDO, undoes=seq, **fields)

    def undoing(self, seq: int, name: str, **fields: Any) -> Past:
        return self.asked(name, Kind.COMPENSATION, undoes=seq, **fields)

    def change(self, seq: int, **fields: Any) -> Past:
        self.records[seq] = replace(self.records[seq], **fields)
        return self

    def running(self, *seqs: int) -> Past:
        for seq in seqs:
            self.change(seq, state=State.RUNNING, attempt=1)
        return self

    def settled(self, seq: int, outcome: Outcome, **fields: Any) -> Past:
        self.change(seq, **{"state": State.SETTLED, "outcome": outcome, **fields})
        self.inbox.append(Settled(len(self.inbox) + 1, self._now(), seq))
        return self

    def succeeded(self, seq: int, result: Any = None) -> Past:
        return self.settled(seq, Outcome.SUCCEEDED, result=json.dumps(result), attempt=1)

    def failed(self, seq: int, error: type[BaseException] = RuntimeError, message: str = "no") -> Past:
        return self.settled(seq, Outcome.FAILED, failure=failure(error, message), attempt=1)

    def unknown(self, seq: int) -> Past:
        return self.settled(seq, Outcome.UNKNOWN, failure=failure(OSError, "lost"), attempt=1, in_doubt=True)

    def withdrawn(self, seq: int) -> Past:
        return self.settled(seq, Outcome.WITHDRAWN)

    def fired(self, seq: int) -> Past:
        return self.settled(seq, Outcome.SUCCEEDED)

    def stopped(self, *seqs: int) -> Past:
        """Withdraw timers and receives, as the end of their wait does."""
        for seq in seqs:
            self.change(seq, state=State.SETTLED, outcome=Outcome.WITHDRAWN)
        return self

    def got(self, seq: int, message: Any) -> Past:
        """Note the message that a receive got."""
        return self.change(seq, state=State.SETTLED, outcome=Outcome.SUCCEEDED, result=json.dumps(message))

    def message(self, channel: str, message: Any = None) -> Past:
        self.inbox.append(MessageTaken(len(self.inbox) + 1, self._now(), channel, json.dumps(message)))
        return self

    def cancel(self, reason: str | None = None) -> Past:
        self.inbox.append(CancelRequested(len(self.inbox) + 1, self._now(), reason))
        return self

    def deadline(self) -> Past:
        self.inbox.append(CancelRequested(len(self.inbox) + 1, self._now(), is_deadline=True))
        return self

    def undo(self) -> Past:
        self.inbox.append(UndoRequested(len(self.inbox) + 1, self._now()))
        return self

    def timed_out(self, seq: int) -> Past:
        """Settle a step by its timeout, its attempt still alive."""
        return self.settled(
            seq, Outcome.UNKNOWN, state=State.TIMED_OUT, timed_out=True, failure=failure(TimeoutError, "too long")
        )

    def ended_late(self, seq: int, outcome: Outcome | None, result: Any = None) -> Past:
        late = json.dumps(result) if outcome is Outcome.SUCCEEDED else None
        self.change(seq, state=State.SETTLED, late_outcome=outcome, late_result=late)
        self.inbox.append(AttemptEnded(len(self.inbox) + 1, self._now(), seq))
        return self

    def _now(self) -> Any:
        return STARTED_AT + timedelta(minutes=len(self.inbox) + 1)

    def history(self) -> History:
        records, inbox = tuple(self.records), tuple(self.inbox)
        return History("order-1", "g1", self.run, STARTED_AT, records, inbox, self.seen_order, self.seeds)

    def decide(self, workflow: Workflow) -> Decision:
        return decide(workflow, (), {}, self.history(), self.host)


def plan(name: str, *args: Any, **fields: Any) -> Compensation:
    """Return a compensation as it is recorded with a step."""
    return Compensation(name, json.dumps({"args": list(args), "kwargs": {}}), **fields)


def asks(decision: Decision) -> list[str]:
    """Return what a decision asks for, in words: ``step pay``, ``compensation refund of 1``, ``timer timer``."""
    return [
        f"{new.command.kind} {new.command.name}" + ("" if new.command.undoes is None else f" of {new.command.undoes}")
        for new in decision.records
    ]


def arguments(decision: Decision, index: int = 0) -> Any:
    """Return the positional arguments of what a decision asks for."""
    command: Any = decision.records[index].command
    return json.loads(command.arguments)["args"]


def waits_for(decision: Decision) -> list[int]:
    assert isinstance(decision.ending, Waiting), decision.ending
    return sorted(decision.ending.wakes)


def result_of(decision: Decision) -> Any:
    assert isinstance(decision.ending, Completed), decision.ending
    return json.loads(decision.ending.result)


def failure_of(decision: Decision) -> Failed:
    assert isinstance(decision.ending, Failed), decision.ending
    return decision.ending


def stops(decision: Decision) -> list[int]:
    """Return the timers and receives that a decision withdraws, those asked for in the same pass included."""
    fresh = [new.seq for new in decision.records if new.outcome is Outcome.WITHDRAWN and new.event is None]
    return sorted([*fresh, *(entry.seq for entry in decision.withdrawals if entry.event is None)])


def withdraws(decision: Decision) -> list[int]:
    """Return the steps and children that a decision withdraws, those asked for in the same pass included."""
    fresh = [new.seq for new in decision.records if new.event is not None]
    return sorted([*fresh, *(entry.seq for entry in decision.withdrawals if entry.event is not None)])


def receives(decision: Decision) -> dict[int, int]:
    """Return the orders of the messages that are received in this pass, by the receive that gets them."""
    fresh = {new.seq: new.message_order for new in decision.records if new.message_order is not None}
    return {**fresh, **{receipt.seq: receipt.message.order for receipt in decision.receipts}}


def refusal_of(decision: Decision) -> str:
    """Return why a call was refused: the instance blocks until a deploy mends it."""
    assert isinstance(decision.ending, Broken), decision.ending
    return decision.ending.failure.message
