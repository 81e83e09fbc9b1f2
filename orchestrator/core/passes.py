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
from typing import Any

from orchestrator import errors
from orchestrator.core.asking import Asking, describe
from orchestrator.core.failing import failure_of
from orchestrator.core.host import Host
from orchestrator.core.records import (
    AttemptEnded,
    CancelRequested,
    Diverged,
    Event,
    History,
    Kind,
    MessageTaken,
    Outcome,
    Receipt,
    Record,
    Settled,
    State,
    UndoRequested,
    Waiting,
    Wake,
    Withdrawal,
)
from orchestrator.core.saga import Node
from orchestrator.core.wanted import Wanted


class Pass(Asking):
    """The state of one pass; ``Context`` is its face towards workflow code."""

    def __init__(self, history: History, host: Host) -> None:
        super().__init__(history, host)
        self.withdrawals: list[Withdrawal] = []
        self.receipts: list[Receipt] = []
        self.cancels: list[int] = []
        #: How a live pass stands still; it returns once more has come in.
        self.park: Callable[[Waiting], None] | None = None
        self._delivered = 0
        self._mailbox: defaultdict[str, deque[MessageTaken]] = defaultdict(deque)
        self._cancellation: CancelRequested | None = None  # delivered, and not raised yet
        self._is_past_pivot = False

    # --- waiting --------------------------------------------------------------------------------------------------

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
                self.suspend(wanted, draining=False)
            if self._cancellation is not None and not is_shielded:
                self.raise_cancellation(own)

    def suspend(self, wanted: Wanted, *, draining: bool) -> None:
        """End the pass: all that came in has been delivered.  A live one returns from here when there is more."""
        waiting = wanted.waiting(is_compensating=self.is_compensating, draining=draining)
        if self.park is None:
            self.stop(waiting)
        self.park(waiting)

    def forget(self) -> None:
        """Undo what refers to itself in a pass that has ended: passes are many, and collectors of garbage are late."""
        for node in self.nodes:
            node.scope.batches.clear()
        self.nodes.clear()
        self.park = None

    def go_on(self, changed: Iterable[Record], events: Iterable[Event], seen_order: int | None) -> None:
        """Take in what has come in while the pass stood still, and begin a new decision.

        ``news.py`` has seen to it that this follows from what the pass knows.
        """
        for record in changed:
            if record.seq < len(self.recorded):
                self.recorded[record.seq] = record
            else:
                self.recorded.append(record)
            if record.seq < len(self.nodes):
                self.nodes[record.seq].record = record
            if record.kind is Kind.CHILD:
                self.child_names.add(record.name)
        self.inbox, self._delivered = list(events), 0
        self._fired.update(event.seq for event in self.inbox if isinstance(event, Settled))
        self.seen_order = seen_order
        self.records, self.withdrawals, self.receipts, self.cancels = [], [], [], []

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
            recorded = describe(record.kind, record.name, record.scope, record.undoes)
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


def _withdrawn_outcome(record: Record) -> Outcome:
    if record.in_doubt:
        return Outcome.UNKNOWN
    return Outcome.WITHDRAWN if record.attempt == 0 else Outcome.FAILED
