"""The compensation stack: what would be undone, or was, in which order, by what, and how that went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from orchestrator.core.records import Kind, NotUndone, Outcome, State
from orchestrator.flower import words
from orchestrator.runtime.descriptions import Description
from orchestrator.store.instances import Status
from orchestrator.store.reviewing import Brief

UNDOES = (Kind.COMPENSATION, Kind.UNDO)


@dataclass(frozen=True, slots=True)
class Undo:
    """One entry: a step, and what undoes it; ``records`` are those that did, an operator's repetitions last."""

    step: Brief | None
    seq: int
    by: str
    records: tuple[Brief, ...]
    how: str
    colour: str
    message: str | None = None
    may_retry: bool = False
    may_skip: bool = False

    @property
    def last(self) -> Brief | None:
        return self.records[-1] if self.records else None

    @property
    def name(self) -> str:
        """What undoes the step, in words; a child undoes itself."""
        is_child = self.step is not None and self.step.kind is Kind.CHILD
        return f"{words.short(self.by)}'s own undo" if is_child else words.short(self.by)

    @property
    def target(self) -> int:
        """The number by which an operator names it."""
        return self.records[0].seq if self.records else self.seq


@dataclass(frozen=True, slots=True)
class Stack:
    """What was undone, or is being, in its order; what would be, in that order; and what can be said of the latter."""

    undone: tuple[Undo, ...]
    pending: tuple[Undo, ...]
    note: str
    is_cut: bool


def build(description: Description, run: int, briefs: Sequence[Brief], steps: Sequence[Brief], limit: int) -> Stack:
    """Build the stack of a run from its newest records that undo or can be undone, and the steps those undo."""
    known = {brief.seq: brief for brief in (*steps, *briefs)}
    undoing: dict[int, list[Brief]] = {}
    # what an operator repeated has numbers below zero, the last one the lowest
    for brief in sorted((b for b in briefs if b.kind in UNDOES), key=lambda b: (b.seq < 0, abs(b.seq))):
        if brief.undoes is not None:
            undoing.setdefault(brief.undoes, []).append(brief)
    left = {entry.seq: entry for entry in description.not_undone if entry.run == run}
    undone = [_undone(known.get(seq), seq, records, left) for seq, records in undoing.items()]
    plans = [b for b in briefs if b.compensation is not None and b.kind not in UNDOES and b.seq not in undoing]
    pending = sorted(filter(_may_be_undone, plans), key=_started, reverse=True)
    return Stack(
        tuple(undone[:limit]),
        tuple(_pending(brief) for brief in pending[:limit]),
        _note(description),
        len(undone) > limit or len(pending) > limit or len(briefs) > 2 * limit,
    )


def _started(brief: Brief) -> tuple[datetime, int]:
    return (brief.started_at or brief.scheduled_at, brief.seq)


def _may_be_undone(brief: Brief) -> bool:
    if brief.outcome is None:
        return True
    return brief.outcome in (Outcome.SUCCEEDED, Outcome.UNKNOWN) or (
        brief.outcome is Outcome.FAILED and brief.is_always_undone
    )


def _pending(brief: Brief) -> Undo:
    how = {
        None: "if it takes effect",
        Outcome.UNKNOWN: "it may have taken effect",
        Outcome.FAILED: "undone always, though it failed",
    }.get(brief.outcome, "")
    return Undo(brief, brief.seq, brief.compensation or "", (), how, "secondary")


def _undone(step: Brief | None, seq: int, records: list[Brief], left: dict[int, NotUndone]) -> Undo:
    first, last = records[0], records[-1]
    entry = left.get(first.seq)
    is_open = last.state is not State.SETTLED
    may_retry = (entry is not None and not is_open) or (
        first.kind is Kind.COMPENSATION and first.state is State.SCHEDULED and first.attempts > 0
    )
    may_skip = (entry is not None and not is_open) or first.state in (State.SCHEDULED, State.HELD)
    how, colour = _how(first, last, is_left=entry is not None)
    message = None if entry is None else entry.message
    return Undo(step, seq, first.name, tuple(records), how, colour, message, may_retry, may_skip)


def _how(first: Brief, last: Brief, *, is_left: bool) -> tuple[str, str]:
    if first.resolution is not None:
        return first.resolution, "success" if last.outcome is Outcome.SUCCEEDED else "secondary"
    match last.state:
        case State.SETTLED if last.outcome is Outcome.SUCCEEDED and is_left:
            return "ran, and the step took effect after it had begun", "danger"
        case State.SETTLED if last.outcome is Outcome.SUCCEEDED:
            return "undone", "success"
        case State.SETTLED:
            return f"{last.outcome}: not undone", "danger"
        case State.RUNNING | State.TIMED_OUT:
            return "running", "info"
        case State.SCHEDULED if last.attempts > 0:
            return "failed so far; waits for its next attempt", "warning"
        case _:
            return "waiting", "secondary"


def _note(description: Description) -> str:
    status = Status(description.status)
    if description.is_past_pivot:
        return "It is past its pivot, the point of no return: what was done before it stays done."
    if status is Status.COMPLETED:
        return "It has completed. Undo would run these, the step that was started last first."
    if status is Status.COMPENSATING:
        return "Still to come, the step that was started last first."
    if status is Status.TERMINATED:
        return "It was terminated: these were left as they are."
    if status.is_final:
        return "These were left done: the workflow committed or accepted them, or undid only a scope inside it."
    return (
        "If it failed or were cancelled now, these would run, the step that was started last first; "
        "not those that the workflow's code has committed or accepted, which its history does not tell."
    )
