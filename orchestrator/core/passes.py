"""One pass of the coordinator through a workflow function.

The function runs from the top.  What it asks for is compared with the records, in order; what is not recorded yet is
new.  What came in is delivered in the order in which it was committed, one event at a time, and only inside a wait,
until that wait is satisfied.  That alone makes every pass over the same history take the same path, and every pass
over a longer one take the same path further.

A wait that the inbox cannot satisfy **suspends** the pass.  Suspension is sticky: once it was raised, every later call
of ``ctx`` in the same pass raises it again, so nothing that a ``finally`` or an over-broad ``except`` does afterwards
has any effect.  Divergence from history and programming errors end a pass in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from orchestrator import errors
from orchestrator.core.host import Host
from orchestrator.core.records import (
    AttemptEnded,
    Broken,
    Command,
    Compensation,
    Diverged,
    Event,
    Failure,
    History,
    Kind,
    MarkPatched,
    NewRecord,
    NotUndone,
    Outcome,
    Payload,
    Record,
    RegisterCompensation,
    RunCompensation,
    RunLocal,
    ScheduleStep,
    Settled,
    State,
    Waiting,
    Wake,
    Withdrawal,
)
from orchestrator.core.saga import Batch, Node, Scope, compensation_arguments, doubts, undo_waves


class Suspension(BaseException):
    """Ends a pass.  Not an ``Exception``, so that workflow code does not catch it by accident."""


@dataclass(slots=True, eq=False)
class Wanted:
    """What a wait is for: ``needed`` completions among ``pending``."""

    pending: dict[int, Node]
    needed: int
    wake: Wake = Wake.COUNT
    alone: set[int] = field(default_factory=set)

    def note(self, seq: int) -> None:
        """Take notice of a delivered event."""
        node = self.pending.get(seq)
        if node is None or (self.wake is Wake.CLOSED and not node.is_closed):
            return
        del self.pending[seq]
        ends = seq in self.alone or (self.wake is Wake.FAILURE and node.is_failure)
        self.needed = 0 if ends else self.needed - 1

    def waiting(self, *, is_compensating: bool, draining: bool) -> Waiting:
        wakes = {seq: Wake.ALONE if seq in self.alone else self.wake for seq in self.pending}
        seqs = tuple(self.pending) if draining else ()
        return Waiting(self.needed, wakes, is_compensating, seqs)


class Pass:
    """The state of one pass; ``Context`` is its face towards workflow code."""

    def __init__(self, history: History, host: Host) -> None:
        self.history = history
        self.host = host
        self.nodes: list[Node] = []
        self.records: list[NewRecord] = []
        self.withdrawals: list[Withdrawal] = []
        self.not_undone: list[NotUndone] = []
        self.ending: Waiting | Diverged | Broken | None = None
        self.scope = Scope()
        self.now = history.started_at
        self.order = 0
        self.is_compensating = False
        self.has_compensated = False
        self.is_in_local = False
        self.patches: dict[str, bool] = {}
        self._delivered = 0

    # --- asking ---------------------------------------------------------------------------------------------------

    def ask(
        self,
        command: Command,
        *,
        optional: bool = False,
        returns: object = None,
        settle: Callable[[], tuple[Outcome, Payload | None, Failure | None]] | None = None,
    ) -> Node:
        """Return the node of the next command, recorded or new; a new one is settled by ``settle``, if given."""
        self.check_live()
        seq = len(self.nodes)
        if seq < len(self.history.records):
            record = self.history.records[seq]
            self._compare(record, command)
        else:
            outcome, result, failure = settle() if settle is not None else (None, None, None)
            new = NewRecord(seq, command, self.order, outcome, result, failure)
            self.records.append(new)
            record = _as_record(new)
        node = Node(record, self.scope, optional=optional, returns=returns)
        if settle is not None:
            node.is_settled, node.outcome = True, record.outcome
        self.nodes.append(node)
        return node

    @property
    def is_at_frontier(self) -> bool:
        """Whether the next command is one that no earlier pass has asked for."""
        return len(self.nodes) >= len(self.history.records)

    def _compare(self, record: Record, command: Command) -> None:
        recorded = (record.kind, record.name, record.scope, record.undoes)
        requested = (command.kind, command.name, command.scope, command.undoes)
        if recorded != requested:
            self.stop(Diverged(record.seq, _describe(*recorded), _describe(*requested)))

    def patched(self, change_id: str) -> bool:
        """Answer ``ctx.patched``: no where history shows that an earlier pass went here without asking."""
        self.check_live()
        if change_id not in self.patches:
            seq = len(self.nodes)
            recorded = self.history.records[seq] if seq < len(self.history.records) else None
            takes_new_path = recorded is None or (recorded.kind, recorded.name) == (Kind.PATCH, change_id)
            if takes_new_path:
                self.ask(MarkPatched(change_id, self.scope.path), settle=lambda: (Outcome.SUCCEEDED, None, None))
            self.patches[change_id] = takes_new_path
        return self.patches[change_id]

    def perform(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """Run a ``ctx.local`` function, or return what it came to the first time."""

        def run() -> tuple[Outcome, Payload | None, Failure | None]:
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
        node = self.ask(command, settle=lambda: (Outcome.SUCCEEDED, None, None))
        self.scope.batches.append(Batch([node]))

    # --- waiting --------------------------------------------------------------------------------------------------

    def check_live(self) -> None:
        """Refuse any use of ``ctx`` in a pass that has ended, and inside a ``ctx.local``."""
        if self.ending is not None:
            raise Suspension
        if self.is_in_local:
            raise errors.ContextMisused("ctx cannot be used inside a function that ctx.local runs")

    def stop(self, ending: Waiting | Diverged | Broken) -> NoReturn:
        self.ending = ending
        raise Suspension

    def break_off(self, error: BaseException) -> NoReturn:
        """End the pass for a programming error in workflow code: a deploy mends it, nothing is undone."""
        self.stop(Broken(self.host.describe(error)))

    def wait_for(
        self, nodes: Iterable[Node], count: int | None = None, *, wake: Wake = Wake.COUNT, alone: Iterable[Node] = ()
    ) -> None:
        """Deliver events until ``count`` of ``nodes`` (``None``: all) have settled, or one of ``alone`` has."""
        self.check_live()
        every, single = list(nodes), list(alone)
        open_nodes = {node.seq: node for node in every if not node.is_settled}
        needed = len(open_nodes) if count is None else count - (len(every) - len(open_nodes))
        if any(node.is_settled for node in single) or (wake is Wake.FAILURE and any(n.is_failure for n in every)):
            return
        open_nodes.update((node.seq, node) for node in single)
        wanted = Wanted(open_nodes, needed, wake, {node.seq for node in single})
        while wanted.needed > 0:
            seq = self._deliver_next()
            if seq is None:
                self.stop(wanted.waiting(is_compensating=self.is_compensating, draining=False))
            wanted.note(seq)

    def _deliver_next(self) -> int | None:
        """Deliver one event and return the seq it is about; ``None`` when all have been delivered."""
        if self._delivered == len(self.history.inbox):
            return None
        event = self.history.inbox[self._delivered]
        self._delivered += 1
        if event.seq >= len(self.nodes):
            record = self.history.records[len(self.nodes)]
            recorded = _describe(record.kind, record.name, record.scope, record.undoes)
            self.stop(Diverged(record.seq, recorded, "a wait for something else"))
        self._apply(event)
        return event.seq

    def _apply(self, event: Event) -> None:
        node = self.nodes[event.seq]
        self.order, self.now = event.order, max(self.now, event.at)
        match event:
            case Settled():
                node.is_settled, node.outcome = True, node.record.outcome
                node.is_attempt_alive = node.record.timed_out
            case AttemptEnded():
                node.is_attempt_alive = False

    # --- withdrawing and draining ---------------------------------------------------------------------------------

    def drain(self, nodes: Iterable[Node]) -> None:
        """Withdraw what has not begun, wait for what has, until no attempt of ``nodes`` can take effect any more."""
        self.check_live()
        open_nodes = {node.seq: node for node in nodes if not node.is_closed}
        wanted = Wanted(open_nodes, len(open_nodes), Wake.CLOSED)
        while wanted.needed > 0:
            seq = self._deliver_next()
            if seq is not None:
                wanted.note(seq)
                continue
            # All that came in is known now.  A withdrawal takes the next order, as if it had come in: a replay then
            # finds it at just this place.
            unbegun = [node for node in wanted.pending.values() if self._is_fresh(node) or _is_unbegun(node)]
            for node in unbegun:
                self._withdraw(node)
                wanted.note(node.seq)
            if not unbegun:
                self.stop(wanted.waiting(is_compensating=self.is_compensating, draining=True))

    def _withdraw(self, node: Node) -> None:
        outcome = _withdrawn_outcome(node.record)
        # at the time of the last event, not of the clock: a replay must tell ctx.now() the same
        self.order += 1
        self._settle_unbegun(node, outcome, Settled(self.order, self.now, node.seq))
        node.is_settled, node.outcome = True, outcome

    def stop_timer(self, node: Node) -> None:
        """Withdraw a timer that nobody waits for any more."""
        self.check_live()
        if node.is_settled or node.record.state is State.SETTLED:
            return
        self._settle_unbegun(node, Outcome.WITHDRAWN, None)

    def _is_fresh(self, node: Node) -> bool:
        return node.seq >= len(self.history.records)

    def _settle_unbegun(self, node: Node, outcome: Outcome, event: Settled | None) -> None:
        if self._is_fresh(node):
            index = node.seq - len(self.history.records)
            self.records[index] = replace(self.records[index], outcome=outcome, event=event)
        else:
            record = node.record
            self.withdrawals.append(Withdrawal(record.seq, record.state, record.attempt, outcome, event))

    # --- ending scopes --------------------------------------------------------------------------------------------

    def end_scope(self, scope: Scope) -> None:
        """End a scope well: everything in it settles, no failure stays unseen, steps in doubt are undone."""
        nodes = list(scope.nodes())
        self.wait_for(nodes)
        for node in sorted(nodes, key=lambda n: n.seq):
            if node.is_failure and not (node.is_observed or node.optional or node.is_undone or node.is_taken_on):
                raise self.failure_of(node)
        in_doubt = doubts(nodes)
        if in_doubt:
            self.drain(in_doubt)
            doubtful = Scope(scope.path, scope.parallel, batches=[Batch([node]) for node in in_doubt])
            self._undo_waves(doubtful)
            for node in in_doubt:
                node.is_undone = True
        scope.pass_outward()

    def undo_scope(self, scope: Scope) -> tuple[NotUndone, ...]:
        """Drain a scope that failed, then undo it.  Return what could not be undone."""
        self.drain(scope.nodes())
        failed = self._undo_waves(scope)
        for node in scope.nodes():
            node.is_undone = not node.is_committed
        return failed

    def undo_nodes(self, nodes: list[Node]) -> tuple[NotUndone, ...]:
        """Drain and undo single steps of a scope that goes on."""
        self.drain(nodes)
        failed = self._undo_waves(Scope(self.scope.path, batches=[Batch([node]) for node in nodes]))
        for node in nodes:
            node.is_undone, node.is_observed = not node.is_committed, True
        return failed

    def _undo_waves(self, scope: Scope) -> tuple[NotUndone, ...]:
        failed: list[NotUndone] = []
        for wave in undo_waves(scope):
            undoing = self._ask_wave(wave.nodes, wave.width)
            self.wait_for(undoing)
            failed += [self._not_undone(node) for node in undoing if node.is_failure]
        self.not_undone += failed
        return tuple(failed)

    def _ask_wave(self, nodes: tuple[Node, ...], width: int | None) -> list[Node]:
        self.has_compensated = True
        first = len(self.nodes)
        undoing = []
        for index, node in enumerate(nodes):
            plan = node.record.compensation
            assert plan is not None
            command = RunCompensation(
                plan.name,
                node.record.scope,
                undoes=node.seq,
                arguments=compensation_arguments(plan, node.record, node.outcome),
                passes=plan.passes,
                options=plan.options,
                retry=plan.retry,
                lane=first if width is not None and width < len(nodes) else None,
                held=width is not None and index >= width,
            )
            undoing.append(self.ask(command))
        return undoing

    def _not_undone(self, node: Node) -> NotUndone:
        record = node.record
        message = f"{record.failure.type}: {record.failure.message}" if record.failure else str(node.outcome)
        return NotUndone(record.seq, record.undoes if record.undoes is not None else -1, record.name, message)

    # --- results --------------------------------------------------------------------------------------------------

    def value_of(self, node: Node) -> Any:
        """Return the result of a settled node, or raise its failure."""
        if node.is_undone:
            raise errors.StepUndone(node.seq, node.record.name)
        if node.outcome is not Outcome.SUCCEEDED:
            node.is_observed = True
            if node.optional:
                return None
            raise self.failure_of(node)
        if node.record.result is None:
            return None
        return self.host.decode(node.record.result, node.record.name, node.returns)

    def failure_of(self, node: Node) -> errors.StepFailed:
        """Return the exception of a node that did not succeed; it counts as seen from now on."""
        node.is_observed = True
        record = node.record
        if record.timed_out or (record.failure and record.failure.type == "orchestrator.errors.StepTimedOut"):
            kind: type[errors.StepFailed] = errors.StepTimedOut
        else:
            kinds = {Outcome.UNKNOWN: errors.StepUnknown, Outcome.WITHDRAWN: errors.StepWithdrawn}
            kind = kinds.get(node.outcome or Outcome.FAILED, errors.StepFailed)
        failure = record.failure or Failure(f"orchestrator.errors.{kind.__name__}", (), _WITHOUT_FAILURE[kind])
        error: errors.StepFailed = errors.in_class_of(
            kind,
            failure.type,
            failure.bases,
            seq=node.seq,
            name=record.name,
            outcome=str(node.outcome),
            message=failure.message,
            traceback=failure.traceback,
        )
        return error


#: What is said of a step that ended without an exception: withdrawn, or lost.
_WITHOUT_FAILURE: dict[type[errors.StepFailed], str] = {
    errors.StepWithdrawn: "it never began",
    errors.StepFailed: "it was withdrawn after an attempt that failed",
    errors.StepUnknown: "nobody can say whether it took effect",
    errors.StepTimedOut: "it did not end in time",
}

#: What a typo or a missing import in a deploy raises: it must not undo every order in flight.
PROGRAMMING_ERRORS = (NameError, AttributeError, TypeError, ImportError, RecursionError, MemoryError)


def is_programming_error(error: BaseException) -> bool:
    """Tell whether workflow code itself raised it, not a step."""
    return isinstance(error, PROGRAMMING_ERRORS) and not isinstance(error, errors.StepFailed)


def _as_record(new: NewRecord) -> Record:
    command = new.command
    compensation: Compensation | None = None
    foreign, arguments = False, None
    match command:
        case ScheduleStep():
            compensation, foreign, arguments = command.compensation, command.foreign, command.arguments
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
    )


def _is_unbegun(node: Node) -> bool:
    """No attempt holds the step's claim; a foreign step is never withdrawn, nobody could say whether it runs."""
    return node.record.state in (State.HELD, State.SCHEDULED) and not node.record.foreign


def _withdrawn_outcome(record: Record) -> Outcome:
    if record.in_doubt:
        return Outcome.UNKNOWN
    return Outcome.WITHDRAWN if record.attempt == 0 else Outcome.FAILED


def _describe(kind: Kind, name: str, scope: str, undoes: int | None) -> str:
    where = f" in scope {scope}" if scope else ""
    what = f" undoing step {undoes}" if undoes is not None else ""
    return f"{kind} {name}{what}{where}"
