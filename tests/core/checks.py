"""What must hold of an instance that has ended, and of every history on its way there."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from math import inf
from random import Random
from typing import Any

from orchestrator.core.records import (
    AttemptEnded,
    CancelRequested,
    Completed,
    Decision,
    Diverged,
    Event,
    Failed,
    Kind,
    MessageTaken,
    NewRecord,
    Outcome,
    Record,
    Recurred,
    Role,
    Settled,
    State,
    Undone,
    UndoRequested,
)
from orchestrator.core.replay import decide

from .driver import Shell, Snapshot, is_refused
from .model import Verdict, is_cancelled_at_end, judge
from .programs import (
    Block,
    Generator,
    Interpreter,
    Map,
    Program,
    ProgramHost,
    Saga,
    Trace,
    Waited,
    shell_of,
    step_rows,
)


def check_program(program: Program, seed: int) -> Shell:
    """Run a program to its end and check all that must hold."""
    shell, host, traces = shell_of(program, seed)
    shell.run()
    lines = [line for trace in traces for line in trace.lines]
    runs = shell.runs()
    assert len(runs) == len(traces)
    if not is_refused(shell.decisions[-1].ending):  # a pass that ends so is never written, so it may log again
        assert host.log.lines == lines, "a line was logged twice, or never, or while replaying"
    received: list[MessageTaken] = []
    for run, trace in zip(runs, traces, strict=True):
        check_run(run, host, program, trace)
        messages = {event.order: event for event in run.inbox if isinstance(event, MessageTaken)}
        received += [messages[order] for order in run.received]
    check_messages(shell, received)
    return shell


def check_run(run: Shell, host: ProgramHost, program: Program, trace: Trace) -> None:
    decision = run.decisions[-1]
    check_compensations(run, host, in_sequence=not _undoes_together(program.block))
    check_snapshots(run)
    check_inbox_prefixes(run)
    if is_refused(decision.ending):
        assert run.number <= program.recurs
        return
    left = program.recurs + 1 - run.number
    verdict = judge(
        run, lambda ctx: Interpreter(ctx, host, Trace(), left).run(program.block), trace, decision
    )  # fmt: skip
    check_ending(run, decision, verdict)
    check_nothing_is_lost(run, decision, verdict)
    check_cancellation(run, trace, decision)


def check_ending(shell: Shell, decision: Decision, verdict: Verdict) -> None:
    undone = [row.record.undoes for row in shell.rows if row.record.undoes is not None]
    assert undone == verdict.undone
    assert [entry.undoes for entry in decision.not_undone] == verdict.not_undone
    assert shell.received == verdict.received
    match decision.ending:
        case Completed(result):
            assert (verdict.failed_at, verdict.recurs) == (None, False)
            assert json.loads(result) == verdict.value
        case Recurred():
            assert verdict.recurs
        case Failed(failed, has_undone):
            assert verdict.failed_at is not None
            assert failed.message.startswith(f"{verdict.failed_at} (") or failed.type.endswith(verdict.failed_at)
            assert has_undone == bool(undone)
        case Undone(failed):
            assert failed.type.endswith(str(verdict.failed_at))
        case ending:
            raise AssertionError(ending)


# --- messages and cancellation --------------------------------------------------------------------------------------


def check_messages(shell: Shell, received: list[MessageTaken]) -> None:
    """Over all runs, what was received on a channel is what was sent there first, none left out and none twice."""
    sent: defaultdict[str, list[str]] = defaultdict(list)
    for channel, payload in shell.sent:
        sent[channel].append(payload)
    got: defaultdict[str, list[str]] = defaultdict(list)
    for message in sorted(received, key=received.index):
        got[message.channel].append(message.payload)
    for channel, payloads in got.items():
        assert sorted(payloads) == sorted(sent[channel][: len(payloads)])


def check_cancellation(run: Shell, trace: Trace, decision: Decision) -> None:
    """A cancellation is raised once, at the first unshielded wait that knows of it, unless the pivot forbids it."""
    watch = _Watch(run)
    for waited in trace.waits:
        watch.follow(waited)
    if trace.returned_at is not None:
        last = run.inbox[-1].order if run.inbox else 0
        is_raised = is_cancelled_at_end(trace, decision)
        watch.follow(Waited(trace.returned_at, len(run.rows), has_tail=True, after=last, is_raised=is_raised))
    if isinstance(decision.ending, Recurred):
        watch.deliver_to(decision.ending.order)
        assert not watch.is_pending, "the next run will not know of a cancellation that this one was told of"
    is_cancelled = isinstance(decision.ending, Failed) and decision.ending.is_cancelled
    if isinstance(decision.ending, Failed) and decision.ending.failure.type.endswith("WorkflowCancelled"):
        assert is_cancelled
    assert not is_cancelled or watch.was_raised


class _Watch:
    def __init__(self, run: Shell) -> None:
        self.events = {event.order: event for event in run.inbox}
        settled = {event.seq: event.order for event in run.inbox if isinstance(event, Settled)}
        pivots = [row.record for row in run.rows if row.role is Role.PIVOT]
        self.pivots = [(pivot.seq, settled.get(pivot.seq, inf)) for pivot in pivots]
        passed = [settled.get(pivot.seq, inf) for pivot in pivots if pivot.outcome is Outcome.SUCCEEDED]
        self.passed_at = min(passed, default=inf)
        self.order = 0
        self.is_pending = self.was_raised = False

    def deliver_to(self, order: int) -> None:
        for delivered in range(self.order + 1, order + 1):
            self.order = delivered
            if delivered >= self.passed_at:
                self.is_pending = False
            elif isinstance(self.events[delivered], CancelRequested):
                self.is_pending = True

    def is_due(self, known: int) -> bool:
        return self.is_pending and not any(seq < known and order > self.order for seq, order in self.pivots)

    def follow(self, waited: Waited) -> None:
        self.deliver_to(waited.before)
        was_raised, is_shielded = False, False
        for order in range(waited.before, waited.after + 1):
            self.deliver_to(order)
            known = waited.known + (waited.asked if order > waited.before else 0)
            if is_shielded or not self.is_due(known):
                continue
            if waited.is_raised:
                assert waited.has_tail or waited.after == order, "it should have been raised before"
                self.is_pending, was_raised = False, True
            else:
                assert waited.has_tail, "it was not raised"
                assert order > waited.before, "it was not raised as the wait began"
            is_shielded = True
        assert was_raised == waited.is_raised, "nobody had asked for that"
        self.was_raised |= was_raised


def check_nothing_is_lost(shell: Shell, decision: Decision, verdict: Verdict) -> None:
    """Every step that took effect, or may have, is kept, undone, or named."""
    named = {entry.undoes for entry in decision.not_undone}
    effects = {effect.record.seq: effect for effect in verdict.effects}
    undone: dict[int, list[Record]] = {}
    for row in shell.rows:
        if row.record.undoes is not None:
            undone.setdefault(row.record.undoes, []).append(row.record)
    for row in step_rows(shell):
        record, effect = row.record, effects[row.record.seq]
        undoing = undone.get(record.seq, [])
        # an attempt that outlived its timeout is waited for only where it would have to be undone
        may_go_on = effect.is_accepted or effect.is_committed or record.compensation is None
        is_at_rest = record.state is State.SETTLED or (record.state is State.TIMED_OUT and may_go_on)
        assert is_at_rest or row.is_detached, record
        assert len(undoing) <= 1, "undone twice"
        may_have_acted = record.outcome in (Outcome.SUCCEEDED, Outcome.UNKNOWN)
        if undoing:
            always = record.compensation is not None and record.compensation.always
            assert may_have_acted or (always and record.outcome is Outcome.FAILED)
            assert (undoing[0].outcome is Outcome.SUCCEEDED) != (record.seq in named)
        elif may_have_acted and record.compensation is not None and not effect.is_committed:
            assert isinstance(decision.ending, Completed)
            assert not row.is_detached
            assert record.outcome is Outcome.SUCCEEDED or effect.is_accepted


def _undoes_together(block: Block) -> bool:
    for statement in block:
        if isinstance(statement, Map) or (isinstance(statement, Saga) and statement.parallel):
            return True
        inner = [getattr(statement, name, ()) for name in ("block", "handler", "then", "otherwise")]
        if any(_undoes_together(nested) for nested in inner):
            return True
    return False


def check_compensations(shell: Shell, host: ProgramHost, *, in_sequence: bool) -> None:
    ends = {event.seq: event.order for event in shell.inbox if isinstance(event, Settled | AttemptEnded)}
    before = -1
    for row in shell.rows:
        record = row.record
        if record.undoes is None:
            continue
        undone = shell.rows[record.undoes]
        assert record.after_order >= ends.get(record.undoes, 0), "undone before its step had ended"
        if in_sequence:
            assert record.after_order >= before, "undone before the one after it was"
        before = ends.get(record.seq, 0)
        plan = undone.record.compensation
        assert plan is not None
        assert plan.is_child == (record.kind is Kind.UNDO)
        if plan.is_child:
            assert record.name == undone.record.name
            continue
        assert record.arguments is not None
        args = json.loads(record.arguments)["args"]
        is_known = Outcome.SUCCEEDED in (undone.record.outcome, undone.record.late_outcome)
        result = undone.fate.value if is_known else None
        label = json.loads(plan.arguments)["args"]
        match plan.passes:
            case "nothing":
                assert args == label
            case "result":
                assert args == [result, *label]
            case "step":
                assert (args[0]["result"], args[0]["outcome"]) == (result, undone.record.outcome)
                assert args[0]["late_outcome"] == undone.record.late_outcome
                assert args[0]["call"] == json.loads(undone.record.arguments or "")
                assert args[1:] == label


# --- prefixes -------------------------------------------------------------------------------------------------------


def check_snapshots(shell: Shell) -> None:
    """At every commit a pass asks for what the rest of history records, neither more nor less."""
    for snapshot in shell.snapshots:
        _check_rest(shell, snapshot)


def check_inbox_prefixes(shell: Shell) -> None:
    """Cut the finished history after each event, and its records anywhere that a crash could have cut them."""
    final = shell.history()
    settled = {event.seq for event in final.inbox if isinstance(event, Settled)}
    for length in range(len(final.inbox) + 1):
        inbox = final.inbox[:length]
        last = inbox[-1].order if inbox else 0
        reachable = [record for record in final.records if record.after_order <= last]
        assert [record.seq for record in reachable] == list(range(len(reachable)))
        least = max((event.seq + 1 for event in inbox if isinstance(event, Settled | AttemptEnded)), default=0)
        # an undo is asked for once the run has completed, when all that it asked for is recorded
        undone_at = min((event.order for event in inbox if isinstance(event, UndoRequested)), default=0)
        least = max(least, sum(record.after_order < undone_at for record in reachable))
        for kept in {least, (least + len(reachable)) // 2, len(reachable)}:
            records = tuple(_as_of(record, inbox, settled) for record in reachable[:kept])
            _check_rest(shell, Snapshot(records, inbox, None))


def _check_rest(shell: Shell, snapshot: Snapshot) -> None:
    """Check that a pass over a snapshot asks for what history goes on with, up to the snapshot's last event.

    Where it withdraws steps, events that came later are not there to be put before the withdrawals: what it asks for
    after those may stand elsewhere in a history that went on, and is not compared.
    """
    history = replace(
        shell.history(), records=snapshot.records, inbox=snapshot.inbox, seen_order=snapshot.seen_order
    )  # fmt: skip
    decision = decide(shell.function, shell.args, {}, history, shell.host)
    assert not isinstance(decision.ending, Diverged), decision.ending
    last = snapshot.inbox[-1].order if snapshot.inbox else 0
    asked = [new for new in decision.records if new.after_order <= last]
    withdraws = any(new.event for new in decision.records) or any(entry.event for entry in decision.withdrawals)
    assert withdraws or len(asked) == len(decision.records)
    first = len(snapshot.records)
    expected = shell.rows[first : first + len(asked)]
    assert [_as_asked(new) for new in asked] == [_as_recorded(row.record) for row in expected]
    assert [new.command for new in asked] == [row.command for row in expected]
    for seq, order in _receipts(decision, asked):
        assert shell.received.get(order) == seq, "another receive got that message in the end"
    rest = shell.rows[first + len(asked) :]
    assert not rest or rest[0].record.after_order > last, "history asks for more"


def _receipts(decision: Decision, asked: list[NewRecord]) -> list[tuple[int, int]]:
    new = [(new.seq, new.message_order) for new in asked if new.message_order is not None]
    return [*new, *((receipt.seq, receipt.message.order) for receipt in decision.receipts)]


def _as_asked(new: NewRecord) -> tuple[Any, ...]:
    command = new.command
    arguments = getattr(command, "arguments", None)
    return (new.seq, command.kind, command.name, command.scope, command.undoes, new.after_order, arguments)


def _as_recorded(record: Record) -> tuple[Any, ...]:
    return (
        record.seq, record.kind, record.name, record.scope, record.undoes, record.after_order, record.arguments
    )  # fmt: skip


#: What is settled as it is recorded.
AT_ONCE = (
    Kind.LOCAL, Kind.PATCH, Kind.REGISTRATION, Kind.SEND, Kind.PUBLISH, Kind.SUBSCRIBE, Kind.UNSUBSCRIBE
)  # fmt: skip


def _as_of(record: Record, inbox: tuple[Event, ...], settled: set[int]) -> Record:
    """Return a record as it was when only ``inbox`` had come in; what had not settled is taken to be running."""
    is_past_instant = record.kind is Kind.TIMER and record.outcome is Outcome.SUCCEEDED and record.seq not in settled
    if record.kind in AT_ONCE or is_past_instant:
        return record
    mine = [event for event in inbox if isinstance(event, Settled | AttemptEnded) and event.seq == record.seq]
    if not any(isinstance(event, Settled) for event in mine):
        state = State.SCHEDULED if record.kind in (Kind.TIMER, Kind.RECEIVE) else State.RUNNING
        return replace(
            record, state=state, outcome=None, result=None, failure=None, timed_out=False, late_outcome=None,
            late_result=None,
        )  # fmt: skip
    if record.timed_out and not any(isinstance(event, AttemptEnded) for event in mine):
        return replace(record, state=State.TIMED_OUT, late_outcome=None, late_result=None)
    return record


def check_seed(seed: int, size: int = 20) -> Shell:
    """Draw a program and a schedule from ``seed`` and check them."""
    return check_program(Generator(Random(seed)).program(size), seed)
