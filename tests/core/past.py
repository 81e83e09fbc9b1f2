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
    Compensation,
    Completed,
    Decision,
    Event,
    Failed,
    History,
    Kind,
    Outcome,
    Record,
    Settled,
    State,
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
        return History("order-1", "g1", self.run, STARTED_AT, tuple(self.records), tuple(self.inbox), self.seen_order)

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
