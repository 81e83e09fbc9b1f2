"""One pass of the coordinator through a workflow function.

The function runs from the top.  What it asks for is compared with the records, in order; what is not recorded yet is
new.  What came in is delivered in the order in which it was committed, one event at a time, and only inside a wait,
until that wait is satisfied.  That alone makes every pass over the same history take the same path, and every pass
over a longer one take the same path further.

A wait that the inbox cannot satisfy **suspends** the pass.  Suspension is sticky: once it was raised, every later call
of ``ctx`` in the same pass raises it again, so nothing that a ``finally`` or an over-broad ``except`` does afterwards
has any effect.  Divergence from history, programming errors and ``recur`` end a pass in the same way.

A message that is delivered goes to the first receive that the wait is for; if there is none, it stays in the mailbox
until one looks.  A receive that nobody waits for takes nothing, so a handle that was let go loses no message.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any, NoReturn

from orchestrator import errors
from orchestrator.core.failing import failure_of, is_programming_error
from orchestrator.core.host import Host
from orchestrator.core.records import (
    AttemptEnded,
    Broken,
    CancelRequested,
    Command,
    Compensation,
    Diverged,
    Failure,
    History,
    Kind,
    MarkPatched,
    MessageTaken,
    NewRecord,
    NotUndone,
    Outcome,
    Payload,
    Receipt,
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
    Wake,
    Withdrawal,
)
from orchestrator.core.saga import Batch, Node, Scope
from orchestrator.core.wanted import Wanted

#: What settles a command as it is recorded.
Settlement = tuple[Outcome, Payload | None, Failure | None]

#: The name of the mark that stands where a call was refused, and the workflow went on.
REFUSED = "after a refused call"


class Suspension(BaseException):
    """Ends a pass.  Not an ``Exception``, so that workflow code does not catch it by accident."""


class Pass:
    """The state of one pass; ``Context`` is its face towards workflow code."""

    def __init__(self, history: History, host: Host) -> None:
        self.history = history
        self.host = host
        self.recorded = list(history.records)
        self.inbox = list(history.inbox)
        self.seen_order = history.seen_order
        self.nodes: list[Node] = []
        self.records: list[NewRecord] = []
        self.withdrawals: list[Withdrawal] = []
        self.receipts: list[Receipt] = []
        self.cancels: list[int] = []
        self.not_undone: list[NotUndone] = []
        self.ending: Waiting | Recurred | Diverged | Broken | None = None
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
        self._delivered = 0
        self._mailbox: defaultdict[str, deque[MessageTaken]] = defaultdict(deque)
        self._cancellation: CancelRequested | None = None  # delivered, and not raised yet
        self._is_past_pivot = False

    # --- asking ---------------------------------------------------------------------------------------------------

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
            requested = _describe(command.kind, command.name, command.scope, command.undoes)
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
            self.stop(Diverged(record.seq, _describe(*recorded), _describe(*requested)))

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

    # --- waiting --------------------------------------------------------------------------------------------------

    def check_live(self) -> None:
        """Refuse any use of ``ctx`` in a pass that has ended, and inside a ``ctx.local``."""
        if self.ending is not None:
            raise Suspension
        if self.is_in_local:
            raise errors.ContextMisused("ctx cannot be used inside a function that ctx.local runs")

    def stop(self, ending: Waiting | Recurred | Diverged | Broken) -> NoReturn:
        self.ending = ending
        raise Suspension

    def break_off(self, error: BaseException) -> NoReturn:
        """End the pass for a programming error in workflow code: a deploy mends it, nothing is undone."""
        self.stop(Broken(self.host.describe(error)))

    def wait_for(
        self,
        nodes: Iterable[Node],
        count: int | None = None,
        *,
        wake: Wake = Wake.COUNT,
        alone: Iterable[Node] = (),
        own: Iterable[Node] = (),
        is_shielded: bool = False,
    ) -> None:
        """Deliver events until ``count`` of ``nodes`` (``None``: all) have settled, or one of ``alone`` has.

        A cancellation that is delivered meanwhile is raised here, unless the wait is shielded from it, and the timers
        and receives that are the wait's ``own`` are withdrawn.
        """
        self.check_live()
        if not is_shielded:
            self.raise_cancellation(own)
        every, single = list(nodes), list(alone)
        receives = [node for node in (*every, *single) if node.record.kind is Kind.RECEIVE]
        for node in sorted(receives, key=lambda node: node.seq):
            self.take(node)
        open_nodes = {node.record.seq: node for node in every if not node.is_settled}
        needed = len(open_nodes) if count is None else count - (len(every) - len(open_nodes))
        if single and any(node.is_settled for node in single):
            return
        if wake is Wake.FAILURE and any(node.is_failure for node in every):
            return
        open_nodes.update((node.seq, node) for node in single)
        self._wait(Wanted(open_nodes, needed, wake, {node.seq for node in single}), own, is_shielded)

    def wait_for_one(self, node: Node, *, is_own: bool = False) -> None:
        """Do the same for a single node, which is what most waits are for."""
        own = (node,) if is_own else ()
        self.check_live()
        self.raise_cancellation(own)
        self.take(node)
        if not node.is_settled:
            self._wait(Wanted({node.record.seq: node}, 1), own)

    def _wait(self, wanted: Wanted, own: Iterable[Node], is_shielded: bool = False) -> None:
        while wanted.needed > 0:
            if not self.deliver_next(wanted):
                self.stop(wanted.waiting(is_compensating=self.is_compensating, draining=False))
            if self._cancellation is not None and not is_shielded:
                self.raise_cancellation(own)

    def deliver_next(self, wanted: Wanted) -> bool:
        """Deliver one event to the wait for ``wanted``; ``False`` when all have been delivered."""
        if self._delivered == len(self.inbox):
            return False
        event = self.inbox[self._delivered]
        self._delivered += 1
        self.order = event.order
        if event.at > self.now:
            self.now = event.at
        match event:
            case Settled() | AttemptEnded():
                self._apply(event)
                wanted.note(event.seq)
            case MessageTaken():
                self._hand_over(event, wanted)
            case CancelRequested():
                if self._cancellation is None and not self._is_past_pivot:
                    self._cancellation = event
            case UndoRequested():
                if wanted.needed > 0 and not self.is_undo_requested:
                    self.stop(Diverged(len(self.nodes), "nothing more", "a wait"))
                self.is_undo_requested = True
        return True

    def _apply(self, event: Settled | AttemptEnded) -> None:
        if event.seq >= len(self.nodes):
            record = self.recorded[len(self.nodes)]
            recorded = _describe(record.kind, record.name, record.scope, record.undoes)
            self.stop(Diverged(record.seq, recorded, "a wait for something else"))
        node = self.nodes[event.seq]
        if isinstance(event, AttemptEnded):
            node.is_attempt_alive = False
            return
        node.is_settled, node.outcome = True, node.record.outcome
        node.is_attempt_alive = node.record.timed_out
        if node.is_pivot and node.outcome is Outcome.SUCCEEDED:
            self._pass_pivot(node)

    def _pass_pivot(self, pivot: Node) -> None:
        """Let nothing that was started before the pivot be undone any more, nor a cancellation take effect."""
        self._is_past_pivot, self._cancellation = True, None
        for scope in self.scope.enclosing():
            for node in scope.nodes():
                node.is_committed = node.is_committed or node.seq <= pivot.seq

    # --- messages -------------------------------------------------------------------------------------------------

    def _hand_over(self, message: MessageTaken, wanted: Wanted) -> None:
        receive = wanted.find_receive(message.channel)
        if receive is None:
            self._mailbox[message.channel].append(message)
            return
        self._receive(receive, message)
        wanted.note(receive.seq)

    def take(self, node: Node) -> None:
        """Give a receive that is looked at the first message that waits for one, if there is any."""
        if node.record.kind is Kind.RECEIVE and not node.is_settled and self._mailbox[node.record.name]:
            self._receive(node, self._mailbox[node.record.name].popleft())

    def _receive(self, node: Node, message: MessageTaken) -> None:
        if self.is_fresh(node):
            index = node.seq - len(self.recorded)
            self.records[index] = replace(
                self.records[index], outcome=Outcome.SUCCEEDED, result=message.payload, message_order=message.order
            )
        elif node.record.state is not State.SETTLED:
            self.receipts.append(Receipt(node.seq, message))
        node.is_settled, node.outcome = True, Outcome.SUCCEEDED
        node.record = replace(node.record, result=message.payload)

    # --- cancellation ---------------------------------------------------------------------------------------------

    def raise_cancellation(self, own: Iterable[Node] = ()) -> None:
        """Raise a cancellation that was delivered, once; while the pivot is under way it waits for that."""
        if self._cancellation is None or any(node.is_pivot and not node.is_settled for node in self.nodes):
            return
        event, self._cancellation = self._cancellation, None
        for node in own:
            self.stop_waiting(node)
        raise errors.WorkflowCancelled(event.reason, is_deadline=event.is_deadline)

    # --- withdrawing ----------------------------------------------------------------------------------------------

    def withdraw(self, node: Node) -> None:
        """Settle a step that has not begun, when all that came in has been delivered.

        It takes the next order, as if it had come in: a replay then finds it at just this place.
        """
        outcome = _withdrawn_outcome(node.record)
        # at the time of the last event, not of the clock: a replay must tell ctx.now() the same
        self.order += 1
        self._settle_unbegun(node, outcome, Settled(self.order, self.now, node.seq))
        node.is_settled, node.outcome = True, outcome

    def stop_waiting(self, node: Node) -> None:
        """Withdraw a timer or a receive that nobody waits for any more."""
        self.check_live()
        if node.is_settled:
            return
        if node.record.state is not State.SETTLED:
            self._settle_unbegun(node, Outcome.WITHDRAWN, None)
        node.is_settled, node.outcome = True, Outcome.WITHDRAWN

    def is_unbegun(self, node: Node) -> bool:
        """Tell whether no attempt holds the step's claim; of a foreign step nobody can say whether it runs."""
        if self.is_fresh(node) or node.record.state is State.BLOCKED:
            return True
        return node.record.state in (State.HELD, State.SCHEDULED) and not node.record.foreign

    def is_fresh(self, node: Node) -> bool:
        return node.seq >= len(self.recorded)

    def _settle_unbegun(self, node: Node, outcome: Outcome, event: Settled | None) -> None:
        if self.is_fresh(node):
            index = node.seq - len(self.recorded)
            self.records[index] = replace(self.records[index], outcome=outcome, event=event)
        else:
            record = node.record
            self.withdrawals.append(Withdrawal(record.seq, record.state, record.attempt, outcome, event))

    # --- results --------------------------------------------------------------------------------------------------

    def value_of(self, node: Node) -> Any:
        """Return the result of a settled node, or raise its failure."""
        if node.is_undone:
            raise errors.StepUndone(node.seq, node.record.name)
        if node.outcome is not Outcome.SUCCEEDED:
            node.is_observed = True
            if node.optional:
                return None
            raise failure_of(node)
        if node.record.result is None:
            return None
        return self.host.decode(node.record.result, node.record.name, node.returns)


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


def _withdrawn_outcome(record: Record) -> Outcome:
    if record.in_doubt:
        return Outcome.UNKNOWN
    return Outcome.WITHDRAWN if record.attempt == 0 else Outcome.FAILED


def _describe(kind: Kind, name: str, scope: str, undoes: int | None) -> str:
    where = f" in scope {scope}" if scope else ""
    what = f" undoing step {undoes}" if undoes is not None else ""
    return f"{kind} {name}{what}{where}"
