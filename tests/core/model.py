"""What must become of a program, worked out in plain Python: no replay, no suspension, no records.

``ModelContext`` is ``ctx`` with everything that a step comes to known beforehand (taken from what the driver saw
happen), so a run through it is a single, ordinary call.  It keeps what has been undone, in which order, and which
receive must have got which message.  Where something depends on how far events had been delivered, the trace of the
real run says that; what follows from it is worked out here.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from typing import Any

from orchestrator import errors
from orchestrator.core.records import (
    AttemptEnded,
    Compensation,
    Decision,
    Failed,
    Kind,
    MessageTaken,
    Outcome,
    Record,
    Settled,
    UndoRequested,
)

from .driver import INSTANCE, STARTED_AT, Row, Shell
from .host import BoundLog, Group, Signature
from .programs import Trace, Waited


class Recurring(BaseException):
    """Ends a run of the model that goes on in another."""


@dataclass(slots=True, eq=False)
class Effect:
    """One step or child, or one compensation registered by hand."""

    record: Record
    plan: Compensation | None
    is_optional: bool = False
    is_pivot: bool = False
    is_observed: bool = False
    is_accepted: bool = False
    is_committed: bool = False
    is_undone: bool = False

    @property
    def seq(self) -> int:
        return self.record.seq

    @property
    def outcome(self) -> Outcome:
        assert self.record.outcome is not None
        return self.record.outcome

    @property
    def has_failed(self) -> bool:
        return self.outcome is not Outcome.SUCCEEDED

    @property
    def is_in_doubt(self) -> bool:
        return self.outcome is Outcome.UNKNOWN and not self.is_accepted and not self.is_undone

    @property
    def must_be_undone(self) -> bool:
        if self.plan is None or self.is_undone or self.is_committed:
            return False
        return self.outcome in ("succeeded", "unknown") or (self.plan.always and self.outcome == "failed")

    def failure(self) -> errors.StepFailed:
        self.is_observed = True
        record = self.record
        return errors.StepFailed(
            seq=record.seq, name=record.name, outcome=str(record.outcome), error_type="", message=""
        )


@dataclass(slots=True)
class ModelScope:
    parallel: bool
    effects: list[Effect] = field(default_factory=list)


class ModelHandle:
    """Of a step or a child; timers and messages have no effects."""

    kind = "step"

    def __init__(self, ctx: ModelContext, effects: list[Effect]) -> None:
        self.ctx, self.effects = ctx, effects

    @property
    def seq(self) -> int:
        return self.effects[0].seq

    def ready_at(self) -> float:
        """Return the order of what made it ready."""
        return max(self.ctx.settled_at(effect.seq) for effect in self.effects)

    def ready(self) -> bool:
        return self.ready_at() <= self.ctx.look()

    def get(self) -> Any:
        self.ctx.wait_for([self])
        return self.value()

    def value(self) -> Any:
        return self.ctx.result(self.effects[0])

    @property
    def error(self) -> errors.StepFailed | None:
        effect = self.effects[0]
        return effect.failure() if self.ready_at() <= self.ctx.order and effect.has_failed else None

    def cancel(self) -> None:
        effect = self.effects[0]
        if effect.is_undone:
            return
        failed = self.ctx.undo([effect])
        effect.is_observed = True
        if failed:
            raise errors.CompensationFailed(())


class ModelChild(ModelHandle):
    def __init__(self, ctx: ModelContext, effects: list[Effect]) -> None:
        super().__init__(ctx, effects)
        self.instance_id = effects[0].record.child_id


class ModelTimer(ModelHandle):
    kind = "timer"

    def __init__(self, ctx: ModelContext, record: Record) -> None:
        super().__init__(ctx, [])
        self.record, self.is_cancelled = record, False

    @property
    def seq(self) -> int:
        return self.record.seq

    def ready_at(self) -> float:
        return 0 if self.is_cancelled else self.ctx.settled_at(self.seq)

    def value(self) -> None:
        return None

    def cancel(self) -> None:
        self.is_cancelled = True


class ModelMessage(ModelHandle):
    kind = "message"

    def __init__(self, ctx: ModelContext, record: Record) -> None:
        super().__init__(ctx, [])
        self.record, self.order, self.message = record, inf, ""

    @property
    def seq(self) -> int:
        return self.record.seq

    def ready_at(self) -> float:
        return self.order

    def ready(self) -> bool:
        self.ctx.hand_out([self], self.ctx.look())
        return self.order < inf

    def value(self) -> Any:
        assert self.order < inf
        return json.loads(self.message)

    def cancel(self) -> None: ...


class ModelContext:
    def __init__(self, shell: Shell, trace: Trace) -> None:
        self.waits, self.seen = iter(trace.waits), iter(trace.seen)
        self.shell = shell
        self.order = 0
        rows: defaultdict[Kind, list[Row]] = defaultdict(list)
        for row in shell.rows:
            rows[Kind.STEP if row.record.kind is Kind.CHILD else row.record.kind].append(row)
        self.rows = {kind: iter(of_kind) for kind, of_kind in rows.items()}
        self.compensations = {row.record.undoes: row.record for row in shell.rows if row.record.undoes is not None}
        self.settled = {event.seq: event.order for event in shell.inbox if isinstance(event, Settled)}
        self.ended = {event.seq: event.order for event in shell.inbox if isinstance(event, Settled | AttemptEnded)}
        self.mail: defaultdict[str, deque[MessageTaken]] = defaultdict(deque)
        for event in shell.inbox:
            if isinstance(event, MessageTaken):
                self.mail[event.channel].append(event)
        self.received: dict[int, int] = {}
        self.scopes = [ModelScope(parallel=False)]
        self.effects: list[Effect] = []
        self.undone: list[int] = []
        self.not_undone: list[int] = []
        self.logger = BoundLog([], lambda: True)

    def next_row(self, kind: Kind) -> Row:
        return next(self.rows[kind])

    # --- waiting ------------------------------------------------------------------------------------------------------

    def settled_at(self, seq: int) -> float:
        record = self.shell.row(seq).record
        if record.kind in (Kind.REGISTRATION, Kind.TIMER) and record.outcome is Outcome.SUCCEEDED:
            return self.settled.get(seq, 0)  # what settled as it was recorded
        return self.settled.get(seq, inf)

    def look(self) -> int:
        self.order = max(self.order, next(self.seen))
        self.pass_pivots()
        return self.order

    def begin_wait(self) -> Waited:
        """Begin a wait, unless a cancellation is raised before it asks for anything."""
        waited = next(self.waits)
        self.order = max(self.order, waited.before)
        if waited.is_raised and waited.asked == 0 and waited.after == waited.before:
            self.end_wait(waited)
        return waited

    def end_wait(self, waited: Waited, until: float | None = None) -> None:
        """End a wait; ``until`` is the order of the event that must have satisfied it."""
        if until is not None and not waited.has_tail:
            until = max(until, waited.before)
            assert waited.after == until or (waited.is_raised and waited.after <= until)
        self.order = max(self.order, waited.after)
        self.pass_pivots()
        if waited.is_raised:
            raise errors.WorkflowCancelled

    def wait_for(self, handles: list[ModelHandle], waited: Waited | None = None) -> None:
        """Wait for all of ``handles``."""
        waited = waited or self.begin_wait()
        messages = [handle for handle in handles if isinstance(handle, ModelMessage)]
        self.hand_out(messages, waited.after)
        until = max([0, *(handle.ready_at() for handle in handles)])
        self.end_wait(waited, until)

    def sleep(self, seconds: Any) -> None:
        waited = self.begin_wait()
        timer = self.next_row(Kind.TIMER).record
        if waited.is_raised:
            self.check_stopped(timer, waited)
        self.end_wait(waited, self.settled_at(timer.seq))

    sleep_until = sleep

    def check_stopped(self, record: Record, waited: Waited) -> None:
        """Check that a timer or receive of a wait that has ended was withdrawn, if it did not settle first."""
        too_late = record.kind is Kind.TIMER and self.settled_at(record.seq) > waited.after
        assert record.outcome is Outcome.WITHDRAWN or (too_late and record.outcome is Outcome.SUCCEEDED)

    def timer(self, seconds: float) -> ModelTimer:
        return ModelTimer(self, self.next_row(Kind.TIMER).record)

    # --- messages -----------------------------------------------------------------------------------------------------

    def hand_out(self, handles: list[ModelMessage], until: float) -> None:
        """Give open receives the messages that came up to ``until``, the first to the first."""
        for handle in sorted(handles, key=lambda handle: handle.seq):
            mail = self.mail[handle.record.name]
            if handle.order == inf and mail and mail[0].order <= until:
                message = mail.popleft()
                handle.order, handle.message = message.order, message.payload
                assert handle.record.result == message.payload
                self.received[message.order] = handle.seq

    def message(self, channel: str) -> ModelMessage:
        record = self.next_row(Kind.RECEIVE).record
        assert record.name == channel
        return ModelMessage(self, record)

    def receive(self, channel: str, *, timeout: Any) -> Any:
        waited = self.begin_wait()
        message = self.message(channel)
        timer = self.next_row(Kind.TIMER).record if timeout else None
        fired = inf if timer is None else self.settled_at(timer.seq)
        first = min([mail.order for mail in self.mail[channel]], default=inf)
        if waited.is_raised or fired < first:
            assert waited.after < first, "a message that was there was not received"
            self.check_stopped(message.record, waited)
            if waited.is_raised and timer is not None:
                self.check_stopped(timer, waited)
        else:
            self.hand_out([message], first)
            if timer is not None:
                self.check_stopped(timer, waited)
        self.end_wait(waited, min(first, fired))
        if fired < first:
            raise errors.ReceiveTimedOut(channel, timeout)
        return message.value()

    def send(self, instance_id: str, channel: str, message: Any, *, missing: str) -> bool:
        assert self.next_row(Kind.SEND).record.name == channel
        if instance_id.startswith(INSTANCE):
            return True
        if missing == "ignore":
            return False
        raise (errors.InstanceEnded if instance_id == "gone" else errors.UnknownInstance)(instance_id)

    def publish(self, channel: str, message: Any) -> None: ...

    def subscribe(self, channel: str) -> None: ...

    def unsubscribe(self, channel: str) -> None: ...

    # --- steps --------------------------------------------------------------------------------------------------------

    def _begin(self, name: str, *, optional: bool = False, on_parent_end: str = "cancel", **_settings: Any) -> Effect:
        row = self.next_row(Kind.STEP)
        assert row.record.name == name
        effect = Effect(row.record, row.record.compensation, optional, row.role == "pivot")
        self.effects.append(effect)
        if on_parent_end == "cancel":
            self.scopes[-1].effects.append(effect)
        return effect

    def result(self, effect: Effect) -> Any:
        if effect.is_undone:
            raise errors.StepUndone(effect.record.seq, effect.record.name)
        if not effect.has_failed:
            return self.shell.row(effect.record.seq).fate.value
        effect.is_observed = True
        if effect.is_optional:
            return None
        raise effect.failure()

    def pass_pivots(self) -> None:
        """Commit what was started before a pivot that has succeeded."""
        for pivot in self.effects:
            if pivot.is_pivot and pivot.record.outcome == "succeeded" and self.settled_at(pivot.seq) <= self.order:
                pivot.is_pivot = False
                for scope in self.scopes:
                    for effect in scope.effects:
                        effect.is_committed = effect.is_committed or effect.seq <= pivot.seq

    def start(self, step: Signature, **settings: Any) -> ModelHandle:
        effect = self._begin(step.task, **settings)
        return (ModelChild if effect.record.kind is Kind.CHILD else ModelHandle)(self, [effect])

    def run(self, step: Signature | Group, **settings: Any) -> Any:
        waited = self.begin_wait()
        if isinstance(step, Group):
            handles = [self.start(member) for member in step.members]
            self.wait_for(handles, waited)
            return self._all(handles)
        handle = self.start(step, **settings)
        self.wait_for([handle], waited)
        return handle.value()

    def gather(self, *steps: Any, return_exceptions: bool = False) -> list[Any]:
        waited = self.begin_wait()
        handles = [step if isinstance(step, ModelHandle) else self.start(step) for step in steps]
        self.wait_for(handles, waited)
        return self._all(handles, collects=return_exceptions)

    def _all(self, handles: list[ModelHandle], *, collects: bool = False) -> list[Any]:
        effects = [effect for handle in handles for effect in handle.effects]
        for effect in effects:
            effect.is_observed = True
        failed = [effect for effect in effects if effect.has_failed and not effect.is_optional]
        if failed and not collects:
            self.result(min(failed, key=lambda effect: effect.record.seq))
        return [self._in_place(handle) if collects else handle.value() for handle in handles]

    def _in_place(self, handle: ModelHandle) -> Any:
        try:
            return handle.value()
        except (errors.StepFailed, errors.StepUndone) as error:
            return error

    def map(self, step: Signature, items: list[Any], *, concurrency: Any, on_failure: str, timeout: Any) -> list[Any]:
        waited = self.begin_wait()
        handles = [self.start(step) for _ in items]
        self.end_wait(waited)
        effects = [handle.effects[0] for handle in handles]
        failed = [effect for effect in effects if effect.has_failed and effect.outcome is not Outcome.WITHDRAWN]
        if on_failure == "stop" and failed:
            for effect in effects:
                effect.is_observed = True
            self.result(failed[0])
        return self._all(handles, collects=True)

    def wait(self, *handles: ModelHandle, count: int, timeout: Any) -> None:
        """What it found is read by the interpreter, handle by handle."""
        waited = self.begin_wait()
        timer = self.next_row(Kind.TIMER).record if timeout else None
        self.hand_out([handle for handle in handles if isinstance(handle, ModelMessage)], waited.after)
        ready = sorted(handle.ready_at() for handle in handles)[count - 1]
        fired = inf if timer is None else self.settled_at(timer.seq)
        if timer is not None and (waited.is_raised or ready < fired):
            self.check_stopped(timer, waited)
        self.end_wait(waited, min(ready, fired))

    # --- scopes -------------------------------------------------------------------------------------------------------

    @contextmanager
    def saga(self, *, parallel: bool) -> Iterator[None]:
        scope = ModelScope(parallel)
        self.scopes.append(scope)
        try:
            yield
            self.end_wait(next(self.waits))
            self.end_scope(scope)
        except (Exception, errors.WorkflowCancelled) as error:
            failed = self.undo_scope(scope)
            if failed:
                raise errors.CompensationFailed(()) from error
            raise
        else:
            self.scopes[-2].effects += scope.effects
        finally:
            self.scopes.pop()

    def end_scope(self, scope: ModelScope) -> None:
        effects = sorted(scope.effects, key=lambda effect: effect.record.seq)
        self.order = max([self.order, *(self.settled.get(effect.seq, 0) for effect in effects)])
        self.pass_pivots()
        for effect in effects:
            is_seen = effect.is_observed or effect.is_optional or effect.is_undone
            is_taken_on = effect.is_accepted and effect.outcome is Outcome.UNKNOWN
            if effect.has_failed and not is_seen and not is_taken_on:
                raise effect.failure()
        doubtful = [effect for effect in effects if effect.is_in_doubt and effect.must_be_undone]
        self.undo(doubtful)

    def undo_scope(self, scope: ModelScope) -> list[Effect]:
        return self.undo(scope.effects)

    def undo(self, effects: list[Effect]) -> list[Effect]:
        """Undo what must be, last-started first, once all have ended; return what could not be."""
        self.order = max([self.order, *(self.ended.get(effect.seq, 0) for effect in effects)])
        self.pass_pivots()
        to_undo = [effect for effect in effects if effect.must_be_undone]
        for effect in effects:
            effect.is_undone = not effect.is_committed
        failed = []
        for effect in sorted(to_undo, key=lambda effect: effect.record.seq, reverse=True):
            self.undone.append(effect.record.seq)
            compensation = self.compensations[effect.record.seq]
            self.order = max(self.order, self.ended[compensation.seq])
            if compensation.outcome is not Outcome.SUCCEEDED:
                failed.append(effect)
                self.not_undone.append(effect.record.seq)
        self.pass_pivots()
        return failed

    def compensate(self, signature: Signature) -> None:
        record = self.next_row(Kind.REGISTRATION).record
        self.scopes[-1].effects.append(Effect(record, record.compensation))
        self.effects.append(self.scopes[-1].effects[-1])

    def commit(self) -> None:
        now = self.look()
        for scope in self.scopes:
            for effect in scope.effects:
                if self.settled_at(effect.seq) <= now and not effect.is_in_doubt:
                    effect.is_committed = True

    def accept(self, step: ModelHandle | errors.StepFailed) -> None:
        seq = step.seq if isinstance(step, errors.StepFailed) else step.effects[0].record.seq
        next(effect for effect in self.effects if effect.record.seq == seq).is_accepted = True

    # --- the rest -----------------------------------------------------------------------------------------------------

    def recur(self, left: int) -> None:
        waited = self.begin_wait()
        self.end_wait(waited)
        self.end_scope(self.scopes[0])
        assert not any(effect.must_be_undone for effect in self.scopes[0].effects)
        raise Recurring

    def local(self, function: Any) -> Any:
        return function()

    def patched(self, change_id: str) -> bool:
        return True

    def random(self) -> float:
        return 0.0

    def now(self) -> datetime:
        return STARTED_AT

    def uuid4(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an instance must end, and what of it must have been undone."""

    value: Any
    failed_at: str | None
    recurs: bool
    undone: list[int]
    not_undone: list[int]
    effects: list[Effect]
    received: dict[int, int]  # by the order of the message, the receive that must have got it


def judge(shell: Shell, interpret: Any, trace: Trace, decision: Decision) -> Verdict:
    """Run ``interpret(ctx)`` against the model."""
    ctx = ModelContext(shell, trace)
    root = ctx.scopes[0]
    value, failed_at, recurs = None, None, False
    try:
        value = interpret(ctx)
        if is_cancelled_at_end(trace, decision):
            raise errors.WorkflowCancelled
        ctx.end_scope(root)
        if any(isinstance(event, UndoRequested) for event in shell.inbox):
            raise errors.WorkflowUndone
    except Recurring:
        recurs = True
    except (Exception, errors.WorkflowCancelled) as error:
        value = None
        failed_at = f"step {error.seq}" if isinstance(error, errors.StepFailed) else type(error).__name__
        ctx.undo_scope(root)
    assert not any(list(left) for kind, left in ctx.rows.items() if kind in (Kind.STEP, Kind.TIMER, Kind.RECEIVE))
    assert not [*ctx.waits]
    assert not [*ctx.seen]
    return Verdict(value, failed_at, recurs, ctx.undone, ctx.not_undone, ctx.effects, ctx.received)


def is_cancelled_at_end(trace: Trace, decision: Decision) -> bool:
    """Tell whether a cancellation was raised while the function, having returned, waited for what was open."""
    ending = decision.ending
    was_raised = isinstance(ending, Failed) and ending.failure.type.endswith("WorkflowCancelled")
    return trace.returned_at is not None and was_raised
