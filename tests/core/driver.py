"""A shell in one thread: records and inbox kept as the SQL store keeps them, a seeded scheduler for a world.

What a step does is decided beforehand, by its ``Fate``; what happens when is drawn by the scheduler, and so is when
what comes from outside comes in: messages, cancellation, a deadline, a request to undo what has completed.  The shell
checks as it goes what must hold at any moment: a lane is never over its width, a wait counts down exactly as the core
would, nothing is asked for between two passes, no compensation begins while its step may still be alive, no message is
received twice, and just those children are cancelled whose scope is drained.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Literal

from orchestrator.core.records import (
    AttemptEnded,
    Broken,
    CancelRequested,
    Command,
    Completed,
    Decision,
    Event,
    Failed,
    Failure,
    History,
    Kind,
    MessageTaken,
    NewRecord,
    Outcome,
    PublishMessage,
    Record,
    Recurred,
    Role,
    RunCompensation,
    ScheduleStep,
    SendMessage,
    Settled,
    StartChild,
    StartTimer,
    State,
    Subscribe,
    UndoChild,
    Undone,
    UndoRequested,
    Unsubscribe,
    Waiting,
    Wake,
    Withdrawal,
)
from orchestrator.core.replay import decide

from .host import FakeHost, failure
from .twin import Twin

STARTED_AT = datetime(2024, 5, 1, 12, tzinfo=UTC)

#: What the instance that the shell runs is called.
INSTANCE = "order-1"

#: What may be part of a lane, and has a fate.
LANED = ScheduleStep | StartChild | RunCompensation | UndoChild

#: lost: its worker died; doubts: it raised OutcomeUnknown
Attempt = Literal["succeeds", "fails", "lost", "doubts"]


@dataclass(frozen=True, slots=True)
class Fate:
    """What the attempts of a step do, one after the other; another one follows only what failed or was lost."""

    attempts: tuple[Attempt, ...] = ("succeeds",)
    value: Any = None
    times_out: Literal["running", "waiting"] | None = None  # in its last attempt, or before its first
    raises: type[Exception] = RuntimeError
    declines: bool = False  # of a child: being cancelled changes nothing of what it comes to


SUCCEEDS = Fate()
FAILS = Fate(("fails",))
UNKNOWN = Fate(("doubts",))


@dataclass(slots=True)
class Row:
    """A record and the command it came from."""

    command: Command
    record: Record
    fate: Fate
    due_at: datetime = STARTED_AT  # of a timer
    is_cancelled: bool = False  # of a child
    is_resumed: bool = False  # by an operator, who has mended what made it fail

    @property
    def lane(self) -> int | None:
        return self.command.lane if isinstance(self.command, LANED) else None

    @property
    def role(self) -> Role | None:
        return self.command.role if isinstance(self.command, ScheduleStep | StartChild) else None

    @property
    def is_detached(self) -> bool:
        return isinstance(self.command, StartChild) and self.command.is_detached

    @property
    def is_alive(self) -> bool:
        return self.record.state in (State.RUNNING, State.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """History as some commit left it."""

    records: tuple[Record, ...]
    inbox: tuple[Event, ...]
    seen_order: int | None


Request = Literal["cancel", "deadline"]

FateOf = Callable[[Command, "Row | None"], Fate]


@dataclass(slots=True)
class Shell:
    """Runs one instance to its end.

    ``fate_of`` is asked once for each step, and for each compensation with the row of the step it undoes.  ``incoming``
    are the messages that will be sent to the instance, in that order; ``requests`` what else is asked of it.
    """

    function: Callable[..., Any]
    host: FakeHost
    fate_of: FateOf = lambda _command, _undone: SUCCEEDS
    seed: int = 0
    incoming: list[tuple[str, Any]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    is_undone_later: bool = False
    parks: bool = False
    ended_run: Callable[[], None] = lambda: None
    twin: Twin | None = None
    random: Random = field(default_factory=Random)
    # the present run
    number: int = 1
    args: tuple[Any, ...] = ()
    started_at: datetime = STARTED_AT
    rows: list[Row] = field(default_factory=list)
    inbox: list[Event] = field(default_factory=list)
    received: dict[int, int] = field(default_factory=dict)  # by the order of the message, the receive that got it
    snapshots: list[Snapshot] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    count: int = 0
    wakes: dict[int, Wake] = field(default_factory=dict)
    draining: frozenset[int] = frozenset()
    seen_order: int | None = None
    widths: dict[int, int] = field(default_factory=dict)
    is_past_pivot: bool = False
    # the instance
    at: datetime = STARTED_AT
    sent: list[tuple[str, str]] = field(default_factory=list)  # all that came in, by channel and payload
    subscriptions: set[str] = field(default_factory=set)
    earlier: list[Shell] = field(default_factory=list)  # as they were when they ended

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, most_events: int = 5_000) -> Decision:
        """Let things happen, in an order drawn by the seed, until the instance has ended."""
        while (self.incoming or self.requests) and self.random.random() < 0.3:
            self.random.choice(self._from_outside())()
        self.advance()
        for _ in range(most_events):
            if self.is_over:
                self.ended_run()
                if self.twin is not None:
                    self.twin.let_go()
                return self.decisions[-1]
            self.step()
        raise AssertionError("the instance never ended")

    @property
    def is_over(self) -> bool:
        ending = self.decisions[-1].ending if self.decisions else None
        if isinstance(ending, Completed):
            return not self.is_undone_later
        return isinstance(ending, Failed | Undone | Broken)

    def runs(self) -> list[Shell]:
        """Return all runs of the instance, each as it was at its end."""
        return [*self.earlier, self]

    def step(self) -> None:
        """Let one thing happen."""
        has_completed = self.decisions and isinstance(self.decisions[-1].ending, Completed)
        if has_completed and not isinstance(self.inbox[-1] if self.inbox else None, UndoRequested):
            left = [self._action(self.end_attempt, row) for row in self.rows if row.is_alive]
            return self.random.choice([*left, self.request_undo])()
        actions = self._actions()
        # what comes from outside comes now and then only, or it would all come before the first step is done
        if actions and self.random.random() < 0.4:
            actions += self._from_outside()
        if self.count == 0:
            # a pass may come late: what was committed meanwhile is in its inbox too
            actions += [self.advance] * (1 + len(actions))
        if not actions:
            actions = [self._action(self.send, channel, 0) for channel in self._awaited_channels()]
        assert actions, f"nothing can happen any more, and the instance waits: {self.decisions[-1].ending}"
        return self.random.choice(actions)()

    def _from_outside(self) -> list[Callable[[], None]]:
        actions: list[Callable[[], None]] = []
        if self.incoming:
            actions.append(lambda: self.send(*self.incoming.pop(0)))
        if self.requests:
            actions.append(lambda: self.request(self.requests.pop(0)))
        return actions

    def _awaited_channels(self) -> list[str]:
        return [self.rows[seq].record.name for seq in self.wakes if self.rows[seq].record.kind is Kind.RECEIVE]

    def _actions(self) -> list[Callable[[], None]]:
        actions: list[Callable[[], None]] = []
        for row in self.rows:
            match row.record.state, row.record.kind:
                case _, Kind.RECEIVE:
                    pass
                case State.SCHEDULED, Kind.TIMER:
                    actions.append(self._action(self._fire, row))
                case State.SCHEDULED, _ if row.fate.times_out == "waiting":
                    actions.append(self._action(self._time_out_waiting, row))
                case State.SCHEDULED, _:
                    actions.append(self._action(self.claim, row))
                case State.RUNNING, _ if self._times_out_now(row):
                    actions.append(self._action(self._time_out, row))
                case ((State.RUNNING | State.TIMED_OUT), _):
                    actions.append(self._action(self.end_attempt, row))
                case State.BLOCKED, _:
                    actions.append(self._action(self._operate, row))
                case _:
                    pass
        return actions

    def _action(self, do: Callable[..., None], *args: Any) -> Callable[[], None]:
        return lambda: do(*args)

    def row(self, seq: int) -> Row:
        return self.rows[seq]

    # --- from outside -------------------------------------------------------------------------------------------------

    def send(self, channel: str, message: Any) -> None:
        """Let a message come in."""
        payload = json.dumps(message)
        self.sent.append((channel, payload))
        self._commit(MessageTaken(self._next_order(), self._now(), channel, payload))

    def request(self, request: Request) -> None:
        is_deadline = request == "deadline"
        self._commit(CancelRequested(self._next_order(), self._now(), None if is_deadline else "why", is_deadline))

    def request_undo(self) -> None:
        self._commit(UndoRequested(self._next_order(), self._now()))

    def _fire(self, timer: Row) -> None:
        self.at = max(self.at, timer.due_at)
        self.settle(timer, Outcome.SUCCEEDED)

    def _operate(self, row: Row) -> None:
        """Do what an operator does about a step that blocks: have it tried again, or let it raise."""
        if self.random.random() < 0.5 and row.fate.times_out is None:
            row.is_resumed = True
            row.record = replace(row.record, state=State.SCHEDULED)
        else:
            self.settle(row, Outcome.UNKNOWN if row.record.in_doubt else Outcome.FAILED)

    # --- attempts -----------------------------------------------------------------------------------------------------

    def claim(self, row: Row) -> None:
        assert row.record.state is State.SCHEDULED
        if row.record.undoes is not None:
            undone = self.rows[row.record.undoes]
            assert undone.record.state is State.SETTLED, "a compensation began while its step was still alive"
        row.record = replace(row.record, state=State.RUNNING, attempt=row.record.attempt + 1)

    def end_attempt(self, row: Row) -> None:
        """End the attempt that holds the claim, as its fate has it."""
        attempt = row.fate.attempts[min(row.record.attempt, len(row.fate.attempts)) - 1]
        if row.is_resumed:
            attempt = "succeeds"
        if row.is_cancelled and not row.fate.declines:
            attempt = "fails"
        if row.record.state is State.TIMED_OUT:
            return self._end_late(row, attempt)
        is_last = row.record.attempt >= len(row.fate.attempts) or row.record.seq in self.draining
        match attempt:
            case "succeeds":
                self.settle(row, Outcome.SUCCEEDED, result=json.dumps(row.fate.value))
            case "doubts":
                row.record = replace(row.record, in_doubt=True)
                self._fail(row)
            case "fails" | "lost":
                row.record = replace(row.record, in_doubt=row.record.in_doubt or attempt == "lost")
                if is_last:
                    self._fail(row)
                else:
                    row.record = replace(row.record, state=State.SCHEDULED)
        return None

    def _fail(self, row: Row, failed: Failure | None = None) -> None:
        outcome = Outcome.UNKNOWN if row.record.in_doubt else Outcome.FAILED
        if self._blocks(row, outcome):
            row.record = replace(row.record, state=State.BLOCKED, failure=failed or failure(row.fate.raises))
            self._snapshot()
        else:
            self.settle(row, outcome, failed=failed)

    def _blocks(self, row: Row, outcome: Outcome) -> bool:
        is_compensation = row.record.undoes is not None
        if is_compensation or row.role is Role.OPTIONAL or row.record.seq in self.draining:
            return False
        return self.parks or self.is_past_pivot or (row.role is Role.PIVOT and outcome is Outcome.UNKNOWN)

    def _times_out_now(self, row: Row) -> bool:
        # where a timeout would block, the attempt is left to end by itself
        is_last = row.fate.times_out == "running" and row.record.attempt >= len(row.fate.attempts)
        return is_last and not self._blocks(row, Outcome.UNKNOWN)

    def _time_out(self, row: Row) -> None:
        row.record = replace(row.record, timed_out=True, in_doubt=True)
        self.settle(row, Outcome.UNKNOWN, state=State.TIMED_OUT)

    def _time_out_waiting(self, row: Row) -> None:
        # no attempt is alive, so there is none whose end could be waited for
        timed_out = Failure("orchestrator.errors.StepTimedOut", (), "no attempt began in time")
        self._fail(row, timed_out)

    def _end_late(self, row: Row, attempt: Attempt) -> None:
        late, result = Outcome.UNKNOWN, None
        if attempt == "succeeds":
            late, result = Outcome.SUCCEEDED, json.dumps(row.fate.value)
        elif attempt == "fails" and row.record.attempt == 1:
            late = Outcome.FAILED
        row.record = replace(row.record, state=State.SETTLED, late_outcome=late, late_result=result)
        self._commit(AttemptEnded(self._next_order(), self._now(), row.record.seq))

    def settle(
        self,
        row: Row,
        outcome: Outcome,
        *,
        result: str | None = None,
        failed: Failure | None = None,
        state: State = State.SETTLED,
    ) -> None:
        """Record the outcome of a step, a compensation or a timer."""
        if outcome is not Outcome.SUCCEEDED and failed is None:
            failed = failure(row.fate.raises)
        row.record = replace(row.record, state=state, outcome=outcome, result=result, failure=failed)
        self.is_past_pivot |= row.role is Role.PIVOT and outcome is Outcome.SUCCEEDED
        self._release(row)
        self._commit(Settled(self._next_order(), self._now(), row.record.seq))

    def _release(self, settled: Row) -> None:
        """Let the next record of the lane go, in the transaction that completes one."""
        if settled.lane is None or (
            self.wakes.get(settled.record.seq) is Wake.FAILURE and settled.record.outcome is not Outcome.SUCCEEDED
        ):
            return
        held = [row for row in self._lane(settled.lane) if row.record.state is State.HELD]
        if held:
            held[0].record = replace(held[0].record, state=State.SCHEDULED)
        # what timed out has left the lane, though its attempt may be alive
        working = (State.SCHEDULED, State.RUNNING)
        busy = sum(row.record.state in working for row in self._lane(settled.lane))
        assert busy <= self.widths[settled.lane], "a lane is over its width"

    def _refill_lanes(self) -> None:
        """Let go what a lane has room for: a map that was stopped and interrupted at once goes on, if it is waited for.

        The failure that stops a map lets nothing go.  Where a cancellation was delivered before it, and caught, the
        map's own wait never comes to see that failure, and nothing else would let go of what the map holds back.
        """
        for lane, width in self.widths.items():
            working = (State.SCHEDULED, State.RUNNING, State.BLOCKED)
            room = width - sum(row.record.state in working for row in self._lane(lane))
            held = [row for row in self._lane(lane) if row.record.state is State.HELD]
            for row in held[:room]:
                row.record = replace(row.record, state=State.SCHEDULED)

    def _lane(self, lane: int) -> list[Row]:
        return [row for row in self.rows if row.lane == lane]

    # --- commits ------------------------------------------------------------------------------------------------------

    def _next_order(self) -> int:
        return self.inbox[-1].order + 1 if self.inbox else 1

    def _now(self) -> datetime:
        self.at += timedelta(seconds=self.random.choice((0, 1, 60)))
        return self.at

    def _commit(self, event: Event) -> None:
        self.inbox.append(event)
        was_waiting = self.count > 0
        match event:
            case Settled() | AttemptEnded():
                self._count_down(event.seq)
                if self._frees_cancellation(event.seq):
                    self.count = 0
            case MessageTaken():
                self._count_message(event.channel)
            case CancelRequested() | UndoRequested():
                self.count = 0
        self._snapshot()
        if was_waiting and self.count > 0:
            self._check_quiet()

    def _frees_cancellation(self, seq: int) -> bool:
        row = self.rows[seq]
        has_failed = row.role is Role.PIVOT and row.record.outcome is not Outcome.SUCCEEDED
        return has_failed and any(isinstance(event, CancelRequested) for event in self.inbox)

    def _count_down(self, seq: int) -> None:
        record, wake = self.rows[seq].record, self.wakes.get(seq)
        if wake is None or (wake is Wake.CLOSED and record.state is State.TIMED_OUT):
            return
        del self.wakes[seq]
        ends = wake is Wake.ALONE or (wake is Wake.FAILURE and record.outcome is not Outcome.SUCCEEDED)
        self.count = 0 if ends else max(0, self.count - 1)

    def _count_message(self, channel: str) -> None:
        """Count the first receive on ``channel`` that the wait is for and that no message was counted for yet."""
        rows = [self.rows[seq].record for seq in self.wakes]
        counted = min((r.seq for r in rows if (r.kind, r.name) == (Kind.RECEIVE, channel)), default=None)
        if counted is None:
            return
        wake = self.wakes.pop(counted)
        assert wake in (Wake.COUNT, Wake.ALONE)
        self.count = 0 if wake is Wake.ALONE else max(0, self.count - 1)

    def _check_quiet(self) -> None:
        """Check that a pass in between would have asked for nothing, and that its wait has counted down as ours."""
        lines = len(self.host.log.lines)
        decision = self._decide()
        del self.host.log.lines[lines:]
        if self.twin is not None:
            self.twin.check_quiet(self.args, self.history(), decision)
        assert not decision.records
        assert not decision.withdrawals
        assert isinstance(decision.ending, Waiting)
        assert (decision.ending.count, decision.ending.wakes) == (self.count, self.wakes)

    def history(self) -> History:
        records = tuple(row.record for row in self.rows)
        return History(INSTANCE, "g1", self.number, self.started_at, records, tuple(self.inbox), self.seen_order)

    def _snapshot(self) -> None:
        history = self.history()
        self.snapshots.append(Snapshot(history.records, history.inbox, history.seen_order))

    # --- passes -------------------------------------------------------------------------------------------------------

    def _decide(self) -> Decision:
        return decide(self.function, self.args, {}, self.history(), self.host)

    def advance(self) -> None:
        """Run a pass and write what it decides."""
        decision = self._decide()
        if self.twin is not None:
            self.twin.check_pass(self.args, self.history(), decision, self.host.log.lines)
        self.decisions.append(decision)
        first, events = len(self.rows), []
        for new in decision.records:
            self._insert(new)
            events.append(new.event)
        for withdrawal in decision.withdrawals:
            self._withdraw(withdrawal)
            events.append(withdrawal.event)
        for receipt in decision.receipts:
            assert receipt.message in self.inbox
            self._receive(receipt.seq, receipt.message.order)
        for event in sorted((event for event in events if event is not None), key=lambda event: event.order):
            assert event.order == self._next_order()
            self.inbox.append(event)
        self._check_lanes(first)
        self.seen_order = self.inbox[-1].order if self.inbox else 0
        self.count, self.wakes, self.draining = 0, {}, frozenset()
        match decision.ending:
            case Waiting():
                self._begin_wait(decision.ending)
            case ending:
                assert isinstance(ending, Completed | Failed | Undone | Recurred) or is_refused(ending), ending
        self._cancel_children(decision)
        self._refill_lanes()
        self._snapshot()
        if isinstance(decision.ending, Recurred):
            self._recur(decision.ending)

    def _insert(self, new: NewRecord) -> None:
        command = new.command
        assert new.seq == len(self.rows)
        undone = self.rows[command.undoes] if command.undoes is not None else None
        fate = self.fate_of(command, undone) if isinstance(command, LANED) else SUCCEEDS
        state = State.SCHEDULED if new.outcome is None else State.SETTLED
        if new.outcome is None and isinstance(command, LANED) and command.held:
            state = State.HELD
        record = Record(
            new.seq,
            command.kind,
            command.name,
            command.scope,
            command.undoes,
            new.after_order,
            state,
            new.outcome,
            new.result,
            new.failure,
            compensation=getattr(command, "compensation", None),
            arguments=getattr(command, "arguments", None),
            foreign=getattr(command, "foreign", False),
            idempotency_key=f"{INSTANCE}:g1:{self.number}:{new.seq}",
            child_id=command.child_id if isinstance(command, StartChild) else None,
        )
        row = Row(command, record, fate)
        self.rows.append(row)
        match command:
            case StartTimer(seconds=seconds, at=at):
                assert (seconds is None) != (at is None)
                row.due_at = at if at is not None else self.at + timedelta(seconds=seconds or 0)
            case SendMessage(instance_id=instance_id) if instance_id == INSTANCE:
                self.incoming.append((command.name, json.loads(command.payload)))
            case PublishMessage() if command.name in self.subscriptions:
                self.incoming.append((command.name, json.loads(command.payload)))
            case Subscribe():
                self.subscriptions.add(command.name)
            case Unsubscribe():
                self.subscriptions.discard(command.name)
            case _:
                pass
        if new.message_order is not None:
            row.record = replace(record, state=State.SCHEDULED)
            self._receive(new.seq, new.message_order)
            assert row.record.result == new.result

    def _receive(self, seq: int, order: int) -> None:
        """Mark a message as received: each is, once at most, and so is each receive."""
        row = self.rows[seq]
        message = next(event for event in self.inbox if event.order == order)
        assert isinstance(message, MessageTaken)
        assert (row.record.kind, row.record.name) == (Kind.RECEIVE, message.channel)
        assert row.record.state is State.SCHEDULED, "a receive that had settled got a message"
        assert order not in self.received, "a message was received twice"
        assert seq not in self.received.values()
        self.received[order] = seq
        row.record = replace(
            row.record, state=State.SETTLED, outcome=Outcome.SUCCEEDED, result=message.payload
        )  # fmt: skip

    def _check_lanes(self, first: int) -> None:
        for row in self.rows[first:]:
            if row.lane is not None and row.lane not in self.widths:
                members = self._lane(row.lane)
                assert members[0].record.seq == row.lane
                self.widths[row.lane] = sum(not getattr(member.command, "held", False) for member in members)

    def _withdraw(self, withdrawal: Withdrawal) -> None:
        row = self.rows[withdrawal.seq]
        assert (row.record.state, row.record.attempt) == (withdrawal.state, withdrawal.attempt)
        if row.record.kind in (Kind.TIMER, Kind.RECEIVE):
            assert (withdrawal.outcome, withdrawal.event) == (Outcome.WITHDRAWN, None)
        else:
            assert row.record.kind in (Kind.STEP, Kind.CHILD)
            assert withdrawal.event is not None
        row.record = replace(row.record, state=State.SETTLED, outcome=withdrawal.outcome)

    def _begin_wait(self, waiting: Waiting) -> None:
        assert 0 < waiting.count <= len(waiting.wakes)
        for seq, wake in waiting.wakes.items():
            state = self.rows[seq].record.state
            assert state is not State.SETTLED, f"it waits for record {seq}, which has settled"
            assert state is not State.TIMED_OUT or wake is Wake.CLOSED
        self.count, self.wakes, self.draining = waiting.count, dict(waiting.wakes), frozenset(waiting.draining)

    def _cancel_children(self, decision: Decision) -> None:
        children = {seq for seq in self.draining if self.rows[seq].record.kind is Kind.CHILD}
        assert sorted(decision.cancels) == sorted(children)
        for seq in children:
            assert self.rows[seq].is_alive
            self.rows[seq].is_cancelled = True

    def _recur(self, ending: Recurred) -> None:
        """Begin the next run; what was not received, and a cancellation that was not delivered, come in there again."""
        self.earlier.append(copy.copy(self))
        self.ended_run()
        unread: list[Event] = [
            event for event in self.inbox if isinstance(event, MessageTaken) and event.order not in self.received
        ]
        if not self.is_past_pivot:
            unread += [e for e in self.inbox if isinstance(e, CancelRequested) and e.order > ending.order]
        self.number, self.args = self.number + 1, tuple(json.loads(ending.arguments)["args"])
        self.inbox = [replace(event, order=order) for order, event in enumerate(unread, 1)]
        self.rows, self.received, self.snapshots, self.decisions = [], {}, [], []
        self.wakes, self.draining, self.seen_order, self.widths = {}, frozenset(), None, {}
        self.started_at, self.is_past_pivot = self.at, False


def is_refused(ending: object) -> bool:
    """Tell whether a pass was ended by a call that the core refused."""
    return isinstance(ending, Broken) and ending.failure.type == "orchestrator.errors.ContextMisused"
