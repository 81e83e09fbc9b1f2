"""What must hold of an instance that has ended, and of every history on its way there."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

from orchestrator.core.records import (
    AttemptEnded,
    Completed,
    Decision,
    Diverged,
    Event,
    Failed,
    History,
    Kind,
    NewRecord,
    Outcome,
    Record,
    Settled,
    State,
)
from orchestrator.core.replay import decide

from .driver import STARTED_AT, Shell, Snapshot
from .model import Verdict, judge
from .programs import Block, Generator, Interpreter, Map, ProgramHost, Saga, Trace, shell_of, step_rows


def check_program(block: Block, seed: int) -> Shell:
    """Run a program to its end and check all that must hold."""
    shell, host, trace = shell_of(block, seed)
    decision = shell.run()
    assert host.log.lines == trace.lines, "a line was logged twice, or never, or while replaying"
    verdict = judge(shell, lambda ctx: Interpreter(ctx, host, Trace()).run(block), list(trace.seen))
    check_ending(shell, decision, verdict)
    check_nothing_is_lost(shell, decision, verdict)
    check_compensations(shell, host, in_sequence=not _undoes_together(block))
    check_snapshots(shell)
    check_inbox_prefixes(shell)
    return shell


def check_ending(shell: Shell, decision: Decision, verdict: Verdict) -> None:
    compensations = [row.record for row in shell.rows if row.record.kind is Kind.COMPENSATION]
    assert [record.undoes for record in compensations] == verdict.undone
    assert [entry.undoes for entry in decision.not_undone] == verdict.not_undone
    if verdict.failed_at is None:
        assert isinstance(decision.ending, Completed)
        assert json.loads(decision.ending.result) == verdict.value
    else:
        assert isinstance(decision.ending, Failed)
        failed = decision.ending.failure
        assert failed.message.startswith(f"{verdict.failed_at} (") or failed.type.endswith(verdict.failed_at)
        assert decision.ending.undone == bool(compensations)


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
        may_go_on = effect.is_accepted or record.compensation is None
        assert record.state is State.SETTLED or (record.state is State.TIMED_OUT and may_go_on), record
        assert len(undoing) <= 1, "undone twice"
        may_have_acted = record.outcome in (Outcome.SUCCEEDED, Outcome.UNKNOWN)
        if undoing:
            always = record.compensation is not None and record.compensation.always
            assert may_have_acted or (always and record.outcome is Outcome.FAILED)
            assert (undoing[0].outcome is Outcome.SUCCEEDED) != (record.seq in named)
        elif may_have_acted and record.compensation is not None and not effect.is_committed:
            assert isinstance(decision.ending, Completed)
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
    ends = {event.seq: event.order for event in shell.inbox}
    before = -1
    for row in shell.rows:
        record = row.record
        if record.undoes is None:
            continue
        undone = shell.rows[record.undoes]
        assert record.after_order >= ends.get(record.undoes, 0), "undone before its step had ended"
        if in_sequence:
            assert record.after_order >= before, "undone before the one after it was"
        before = ends[record.seq]
        plan = undone.record.compensation
        assert plan is not None
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
    for length in range(len(final.inbox) + 1):
        inbox = final.inbox[:length]
        last = inbox[-1].order if inbox else 0
        reachable = [record for record in final.records if record.after_order <= last]
        assert [record.seq for record in reachable] == list(range(len(reachable)))
        least = max((event.seq + 1 for event in inbox), default=0)
        for kept in {least, (least + len(reachable)) // 2, len(reachable)}:
            records = tuple(_as_of(record, inbox) for record in reachable[:kept])
            _check_rest(shell, Snapshot(records, inbox, None))


def _check_rest(shell: Shell, snapshot: Snapshot) -> None:
    """Check that a pass over a snapshot asks for what history goes on with, up to the snapshot's last event.

    Where it withdraws steps, events that came later are not there to be put before the withdrawals: what it asks for
    after those may stand elsewhere in a history that went on, and is not compared.
    """
    history = History("order-1", "g1", 1, STARTED_AT, snapshot.records, snapshot.inbox, snapshot.seen_order)
    decision = decide(shell.function, (), {}, history, shell.host)
    assert not isinstance(decision.ending, Diverged), decision.ending
    last = snapshot.inbox[-1].order if snapshot.inbox else 0
    asked = [new for new in decision.records if new.after_order <= last]
    withdraws = any(new.event for new in decision.records) or any(entry.event for entry in decision.withdrawals)
    assert withdraws or len(asked) == len(decision.records)
    first = len(snapshot.records)
    expected = shell.rows[first : first + len(asked)]
    assert [_as_asked(new) for new in asked] == [_as_recorded(row.record) for row in expected]
    assert [new.command for new in asked] == [row.command for row in expected]
    rest = shell.rows[first + len(asked) :]
    assert not rest or rest[0].record.after_order > last, "history asks for more"


def _as_asked(new: NewRecord) -> tuple[Any, ...]:
    command = new.command
    arguments = getattr(command, "arguments", None)
    return (new.seq, command.kind, command.name, command.scope, command.undoes, new.after_order, arguments)


def _as_recorded(record: Record) -> tuple[Any, ...]:
    return (
        record.seq, record.kind, record.name, record.scope, record.undoes, record.after_order, record.arguments
    )  # fmt: skip


def _as_of(record: Record, inbox: tuple[Event, ...]) -> Record:
    """Return a record as it was when only ``inbox`` had come in; what had not settled is taken to be running."""
    if record.kind in (Kind.LOCAL, Kind.PATCH, Kind.REGISTRATION):
        return record
    mine = [event for event in inbox if event.seq == record.seq]
    if not any(isinstance(event, Settled) for event in mine):
        state = State.SCHEDULED if record.kind is Kind.TIMER else State.RUNNING
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
