"""A shell in one thread: records and inbox kept as the SQL store keeps them, a seeded scheduler for a world.

What a step does is decided beforehand, by its ``Fate``; what happens when is drawn by the scheduler.  The shell checks
as it goes what must hold at any moment: a lane is never over its width, a wait counts down exactly as the core would,
nothing is asked for between two passes, and no compensation begins while its step may still be alive.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Literal

from orchestrator.core.records import (
    AttemptEnded,
    Command,
    Completed,
    Decision,
    Event,
    Failed,
    Failure,
    History,
    Kind,
    NewRecord,
    Outcome,
    Record,
    RunCompensation,
    ScheduleStep,
    Settled,
    State,
    Waiting,
    Wake,
    Withdrawal,
)
from orchestrator.core.replay import decide

from .host import FakeHost, failure

STARTED_AT = datetime(2024, 5, 1, 12, tzinfo=UTC)

#: lost: its worker died; doubts: it raised OutcomeUnknown
Attempt = Literal["succeeds", "fails", "lost", "doubts"]


@dataclass(frozen=True, slots=True)
class Fate:
    """What the attempts of a step do, one after the other; another one follows only what failed or was lost."""

    attempts: tuple[Attempt, ...] = ("succeeds",)
    value: Any = None
    times_out: Literal["running", "waiting"] | None = None  # in its last attempt, or before its first
    raises: type[Exception] = RuntimeError


SUCCEEDS = Fate()
FAILS = Fate(("fails",))
UNKNOWN = Fate(("doubts",))


@dataclass(slots=True)
class Row:
    """A record and the command it came from."""

    command: Command
    record: Record
    fate: Fate

    @property
    def lane(self) -> int | None:
        return self.command.lane if isinstance(self.command, ScheduleStep | RunCompensation) else None

    @property
    def is_alive(self) -> bool:
        return self.record.state in (State.RUNNING, State.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """History as some commit left it."""

    records: tuple[Record, ...]
    inbox: tuple[Event, ...]
    seen_order: int | None


FateOf = Callable[[Command, "Row | None"], Fate]


@dataclass(slots=True)
class Shell:
    """Runs one instance to its end.

    ``fate_of`` is asked once for each step, and for each compensation with the row of the step it undoes.
    """

    function: Callable[..., Any]
    host: FakeHost
    fate_of: FateOf = lambda _command, _undone: SUCCEEDS
    seed: int = 0
    random: Random = field(default_factory=Random)
    rows: list[Row] = field(default_factory=list)
    inbox: list[Event] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    count: int = 0
    wakes: dict[int, Wake] = field(default_factory=dict)
    draining: frozenset[int] = frozenset()
    seen_order: int | None = None
    at: datetime = STARTED_AT
    widths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, most_events: int = 5_000) -> Decision:
        """Let things happen, in an order drawn by the seed, until the instance has ended."""
        self.advance()
        for _ in range(most_events):
            if not isinstance(self.decisions[-1].ending, Waiting):
                return self.decisions[-1]
            self.step()
        raise AssertionError("the instance never ended")

    def step(self) -> None:
        """Let one thing happen."""
        actions = self._actions()
        if self.count == 0:
            # a pass may come late: what was committed meanwhile is in its inbox too
            actions += [self.advance] * (1 + len(actions))
        assert actions, f"nothing can happen any more, and the instance waits: {self.decisions[-1].ending}"
        self.random.choice(actions)()

    def _actions(self) -> list[Callable[[], None]]:
        actions: list[Callable[[], None]] = []
        for row in self.rows:
            match row.record.state, row.record.kind:
                case State.SCHEDULED, Kind.TIMER:
                    actions.append(self._action(self.settle, row, Outcome.SUCCEEDED))
                case State.SCHEDULED, _ if row.fate.times_out == "waiting":
                    actions.append(self._action(self._time_out_waiting, row))
                case State.SCHEDULED, _:
                    actions.append(self._action(self.claim, row))
                case State.RUNNING, _ if self._times_out_now(row):
                    actions.append(self._action(self._time_out, row))
                case ((State.RUNNING | State.TIMED_OUT), _):
                    actions.append(self._action(self.end_attempt, row))
                case _:
                    pass
        return actions

    def _action(self, do: Callable[..., None], *args: Any) -> Callable[[], None]:
        return lambda: do(*args)

    def row(self, seq: int) -> Row:
        return self.rows[seq]

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
        if row.record.state is State.TIMED_OUT:
            return self._end_late(row, attempt)
        is_last = row.record.attempt >= len(row.fate.attempts) or row.record.seq in self.draining
        match attempt:
            case "succeeds":
                self.settle(row, Outcome.SUCCEEDED, result=json.dumps(row.fate.value))
            case "doubts":
                row.record = replace(row.record, in_doubt=True)
                self.settle(row, Outcome.UNKNOWN)
            case "fails" | "lost":
                row.record = replace(row.record, in_doubt=row.record.in_doubt or attempt == "lost")
                if is_last:
                    self.settle(row, Outcome.UNKNOWN if row.record.in_doubt else Outcome.FAILED)
                else:
                    row.record = replace(row.record, state=State.SCHEDULED)
        return None

    def _times_out_now(self, row: Row) -> bool:
        return row.fate.times_out == "running" and row.record.attempt >= len(row.fate.attempts)

    def _time_out(self, row: Row) -> None:
        row.record = replace(row.record, timed_out=True, in_doubt=True)
        self.settle(row, Outcome.UNKNOWN, state=State.TIMED_OUT)

    def _time_out_waiting(self, row: Row) -> None:
        # no attempt is alive, so there is none whose end could be waited for
        timed_out = Failure("orchestrator.errors.StepTimedOut", (), "no attempt began in time")
        self.settle(row, Outcome.UNKNOWN if row.record.in_doubt else Outcome.FAILED, failed=timed_out)

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
        self._count_down(event.seq)
        self._snapshot()
        if was_waiting and self.count > 0:
            self._check_quiet()

    def _count_down(self, seq: int) -> None:
        record, wake = self.rows[seq].record, self.wakes.get(seq)
        if wake is None or (wake is Wake.CLOSED and record.state is State.TIMED_OUT):
            return
        del self.wakes[seq]
        ends = wake is Wake.ALONE or (wake is Wake.FAILURE and record.outcome is not Outcome.SUCCEEDED)
        self.count = 0 if ends else max(0, self.count - 1)

    def _check_quiet(self) -> None:
        """Check that a pass in between would have asked for nothing, and that its wait has counted down as ours."""
        lines = len(self.host.log.lines)
        decision = decide(self.function, (), {}, self.history(), self.host)
        del self.host.log.lines[lines:]
        assert not decision.records
        assert not decision.withdrawals
        assert isinstance(decision.ending, Waiting)
        assert (decision.ending.count, decision.ending.wakes) == (self.count, self.wakes)

    def history(self) -> History:
        records = tuple(row.record for row in self.rows)
        return History("order-1", "g1", 1, STARTED_AT, records, tuple(self.inbox), self.seen_order)

    def _snapshot(self) -> None:
        history = self.history()
        self.snapshots.append(Snapshot(history.records, history.inbox, history.seen_order))

    # --- passes -------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Run a pass and write what it decides."""
        decision = decide(self.function, (), {}, self.history(), self.host)
        self.decisions.append(decision)
        first, events = len(self.rows), []
        for new in decision.records:
            self._insert(new, decision)
            events.append(new.event)
        for withdrawal in decision.withdrawals:
            self._withdraw(withdrawal)
            events.append(withdrawal.event)
        for event in sorted((event for event in events if event is not None), key=lambda event: event.order):
            assert event.order == self._next_order()
            self.inbox.append(event)
        self._check_lanes(first)
        self.seen_order = self.inbox[-1].order if self.inbox else 0
        self.count, self.wakes, self.draining = 0, {}, frozenset()
        if isinstance(decision.ending, Waiting):
            self._begin_wait(decision.ending)
        else:
            assert isinstance(decision.ending, Completed | Failed), decision.ending
        self._snapshot()

    def _insert(self, new: NewRecord, decision: Decision) -> None:
        command = new.command
        assert new.seq == len(self.rows)
        undone = self.rows[command.undoes] if command.undoes is not None else None
        is_step = isinstance(command, ScheduleStep | RunCompensation)
        fate = self.fate_of(command, undone) if is_step else SUCCEEDS
        state = State.SCHEDULED if new.outcome is None else State.SETTLED
        if new.outcome is None and isinstance(command, ScheduleStep | RunCompensation) and command.held:
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
            idempotency_key=f"order-1:g1:1:{new.seq}",
        )
        self.rows.append(Row(command, record, fate))

    def _check_lanes(self, first: int) -> None:
        for row in self.rows[first:]:
            if row.lane is not None and row.lane not in self.widths:
                members = [r for r in self._lane(row.lane) if isinstance(r.command, ScheduleStep | RunCompensation)]
                assert members[0].record.seq == row.lane
                self.widths[row.lane] = sum(not getattr(member.command, "held", False) for member in members)

    def _withdraw(self, withdrawal: Withdrawal) -> None:
        row = self.rows[withdrawal.seq]
        assert (row.record.state, row.record.attempt) == (withdrawal.state, withdrawal.attempt)
        assert row.record.kind in (Kind.STEP, Kind.TIMER)
        row.record = replace(row.record, state=State.SETTLED, outcome=withdrawal.outcome)

    def _begin_wait(self, waiting: Waiting) -> None:
        assert 0 < waiting.count <= len(waiting.wakes)
        for seq, wake in waiting.wakes.items():
            state = self.rows[seq].record.state
            assert state is not State.SETTLED, f"it waits for record {seq}, which has settled"
            assert state is not State.TIMED_OUT or wake is Wake.CLOSED
        self.count, self.wakes, self.draining = waiting.count, dict(waiting.wakes), frozenset(waiting.draining)
