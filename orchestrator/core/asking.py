"""What one pass asks for, compared with what earlier passes have asked for.

A command that is recorded is compared by kind, name, scope and what it undoes; what is not recorded yet is new.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from orchestrator import errors
from orchestrator.core.failing import is_programming_error
from orchestrator.core.host import Host
from orchestrator.core.records import (
    Broken,
    Command,
    Compensation,
    Diverged,
    Failure,
    History,
    Kind,
    MarkPatched,
    NewRecord,
    NotUndone,
    Outcome,
    Payload,
    Record,
    Recurred,
    RegisterCompensation,
    Role,
    RunLocal,
    ScheduleStep,
    Settled,
    StartChild,
    State,
    UndoRequested,
    Waiting,
)
from orchestrator.core.saga import Batch, Node, Scope

#: What settles a command as it is recorded.
Settlement = tuple[Outcome, Payload | None, Failure | None]

#: How a pass ends that has not run the function to its end.
Stop = Waiting | Recurred | Diverged | Broken

#: The name of the mark that stands where a call was refused, and the workflow went on.
REFUSED = "after a refused call"


class Suspension(BaseException):
    """Ends a pass.  Not an ``Exception``, so that workflow code does not catch it by accident."""


class Asking:
    """The part of a pass that goes through the records; ``Pass`` in ``passes.py`` is the whole of it."""

    def __init__(self, history: History, host: Host) -> None:
        self.history = history  # as it was at first: what has come in since is in these
        self.recorded = list(history.records)
        self.inbox = list(history.inbox)
        self.seen_order = history.seen_order
        self.host = host
        self.nodes: list[Node] = []
        self.records: list[NewRecord] = []
        self.not_undone: list[NotUndone] = []
        self.ending: Stop | None = None
        self.scope = Scope()
        self.now = history.started_at
        self.order = 0
        self.is_compensating = False
        self.has_compensated = False
        self.is_in_local = False
        self.is_undo_requested = False
        self.patches: dict[str, bool] = {}
        self.child_names = {record.name for record in history.records if record.kind is Kind.CHILD}
        self.has_completed = any(isinstance(event, UndoRequested) for event in history.inbox)
        self._fired = {event.seq for event in history.inbox if isinstance(event, Settled)}
        self._refused_at: int | None = None  # where a call was refused, whatever the workflow made of it

    def ask(
        self,
        command: Command,
        *,
        optional: bool = False,
        returns: object = None,
        settle: Callable[[], Settlement] | None = None,
    ) -> Node:
        """Return the node of the next command, recorded or new; a new one is settled by ``settle``, if given."""
        self.check_live()
        seq = len(self.nodes)
        if seq < len(self.recorded):
            record = self.recorded[seq]
            self._compare(record, command)
        elif self.has_completed and not self.is_undo_requested:
            requested = describe(command.kind, command.name, command.scope, command.undoes)
            self.stop(Diverged(seq, "nothing more", requested))
        else:
            outcome, result, failure = settle() if settle is not None else (None, None, None)
            new = NewRecord(seq, command, self.order, outcome, result, failure)
            self.records.append(new)
            record = _as_record(new)
        is_pivot = isinstance(command, ScheduleStep | StartChild) and command.role is Role.PIVOT
        node = Node(record, self.scope, optional, is_pivot, returns)
        if settle is not None:
            node.is_settled, node.outcome = True, record.outcome
        self.nodes.append(node)
        return node

    def replay(self, *, optional: bool = False, is_pivot: bool = False, returns: object = None) -> Node:
        """Return the node of the next record, of which the caller has seen that it is what is asked for."""
        node = Node(self.recorded[len(self.nodes)], self.scope, optional, is_pivot, returns)
        self.nodes.append(node)
        return node

    def find_record(self) -> Record | None:
        """Return the record of the next command, if an earlier pass has asked for one."""
        seq = len(self.nodes)
        return self.recorded[seq] if seq < len(self.recorded) else None

    def list_records(self, count: int) -> list[Record]:
        """Return the records of the next ``count`` commands, or of as many of them as an earlier pass has asked for."""
        return self.recorded[len(self.nodes) : len(self.nodes) + count]

    @property
    def is_at_frontier(self) -> bool:
        """Whether the next command is one that no earlier pass has asked for."""
        return len(self.nodes) >= len(self.recorded)

    def has_passed(self, at: datetime) -> bool:
        """Tell whether the next command, a timer, fires as it is recorded."""
        if self.is_at_frontier:
            return at <= self.now
        # a deploy may change the instant; what is recorded has fired at once, or will, as it was asked for then
        record = self.recorded[len(self.nodes)]
        return record.outcome is Outcome.SUCCEEDED and record.seq not in self._fired

    def check_known(self, name: str) -> None:
        """Refuse a task that nobody knows."""
        # what is recorded was known once, and a replay must not depend on which workers happen to be alive
        if self.is_at_frontier:
            try:
                self.host.check_known(name)
            except errors.UnknownTask as error:
                # not left to the workflow: on a replay nobody would ask, and what it then did would not be recorded
                self.break_off(error)

    def _compare(self, record: Record, command: Command) -> None:
        recorded = (record.kind, record.name, record.scope, record.undoes)
        requested = (command.kind, command.name, command.scope, command.undoes)
        if recorded != requested:
            self.stop(Diverged(record.seq, describe(*recorded), describe(*requested)))

    # --- refusing -------------------------------------------------------------------------------------------------

    def note_refusal(self) -> None:
        """Remember that a call was refused here.  What the workflow makes of it is its own affair."""
        self._refused_at = len(self.nodes)

    @property
    def follows_refusal(self) -> bool:
        """Whether a call was refused here, in this pass or in the one that went on from here.

        A replay does not look into calls that are recorded, so it would not refuse that one again: it would take the
        next call of the same task for it.  A mark is recorded between the two, and where one is, calls are looked into.
        """
        record = self.find_record()
        if record is None:
            return self._refused_at == len(self.nodes)
        return record.kind is Kind.PATCH and record.name == REFUSED

    def mark_refusal(self) -> None:
        """Record that a call was refused here, before what is asked for instead of it."""
        if self.follows_refusal:
            self.ask(MarkPatched(REFUSED, self.scope.path), settle=_done)

    # --- asking for what is settled at once -----------------------------------------------------------------------

    def patched(self, change_id: str) -> bool:
        """Answer ``ctx.patched``: no where history shows that an earlier pass went here without asking."""
        self.check_live()
        if change_id not in self.patches:
            recorded = self.find_record()
            takes_new_path = recorded is None or (recorded.kind, recorded.name) == (Kind.PATCH, change_id)
            if takes_new_path:
                self.ask(MarkPatched(change_id, self.scope.path), settle=_done)
            self.patches[change_id] = takes_new_path
        return self.patches[change_id]

    def perform(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Run a ``ctx.local`` function, or return what it came to the first time."""
        self.check_live()
        record = self.find_record()
        if record is not None and record.kind is Kind.LOCAL and record.name == name and record.scope == self.scope.path:
            node = self.replay()
            node.is_settled, node.outcome = True, record.outcome
            return node

        def run() -> Settlement:
            self.is_in_local = True
            try:
                return self.host.perform(function, args)
            except Exception as error:
                if is_programming_error(error):
                    self.break_off(error)
                return Outcome.FAILED, None, self.host.describe(error)
            finally:
                self.is_in_local = False

        return self.ask(RunLocal(name, self.scope.path), settle=run)

    def register(self, compensation: Compensation) -> None:
        """Record a compensation that belongs to no step."""
        command = RegisterCompensation(compensation.name, self.scope.path, compensation)
        node = self.ask(command, settle=_done)
        self.scope.batches.append(Batch([node]))

    # --- stopping -------------------------------------------------------------------------------------------------

    def check_live(self) -> None:
        """Refuse any use of ``ctx`` in a pass that has ended, and inside a ``ctx.local``."""
        if self.ending is not None:
            raise Suspension
        if self.is_in_local:
            raise errors.ContextMisused("ctx cannot be used inside a function that ctx.local runs")

    def stop(self, ending: Stop) -> NoReturn:
        self.ending = ending
        raise Suspension

    def break_off(self, error: BaseException) -> NoReturn:
        """End the pass for a programming error in workflow code: a deploy mends it, nothing is undone."""
        self.stop(Broken(self.host.describe(error)))


def _done() -> Settlement:
    return Outcome.SUCCEEDED, None, None


def _as_record(new: NewRecord) -> Record:
    command = new.command
    compensation: Compensation | None = None
    foreign, arguments, child_id = False, None, None
    match command:
        case ScheduleStep():
            compensation, foreign, arguments = command.compensation, command.foreign, command.arguments
        case StartChild():
            compensation, arguments, child_id = command.compensation, command.arguments, command.child_id
        case RegisterCompensation():
            compensation = command.compensation
        case _:
            pass
    return Record(
        new.seq,
        command.kind,
        command.name,
        command.scope,
        command.undoes,
        new.after_order,
        State.SCHEDULED if new.outcome is None else State.SETTLED,
        new.outcome,
        new.result,
        new.failure,
        compensation=compensation,
        arguments=arguments,
        foreign=foreign,
        child_id=child_id,
    )


def describe(kind: Kind, name: str, scope: str, undoes: int | None) -> str:
    where = f" in scope {scope}" if scope else ""
    what = f" undoing step {undoes}" if undoes is not None else ""
    return f"{kind} {name}{what}{where}"
