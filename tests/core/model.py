"""What must become of a program, worked out in plain Python: no replay, no suspension, no records.

``ModelContext`` is ``ctx`` with everything that a step comes to known beforehand (taken from what the driver saw
happen), so a run through it is a single, ordinary call.  It keeps what has been undone, in which order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator import errors
from orchestrator.core.records import Compensation, Kind, Outcome, Record

from .driver import Shell
from .host import BoundLog, Group, Signature


@dataclass(slots=True, eq=False)
class Effect:
    """One step, or one compensation registered by hand."""

    record: Record
    plan: Compensation | None
    is_optional: bool = False
    is_delivered: bool = False
    is_observed: bool = False
    is_accepted: bool = False
    is_committed: bool = False
    is_undone: bool = False

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
    def __init__(self, ctx: ModelContext, effects: list[Effect]) -> None:
        self.ctx, self.effects = ctx, effects

    def ready(self) -> bool:
        is_ready = next(self.ctx.seen)
        if is_ready:
            for effect in self.effects:
                effect.is_delivered = True
        return is_ready

    def get(self) -> Any:
        return self.ctx.result(self.effects[0])

    @property
    def error(self) -> errors.StepFailed | None:
        effect = self.effects[0]
        return effect.failure() if effect.is_delivered and effect.has_failed else None

    def cancel(self) -> None:
        effect = self.effects[0]
        if effect.is_undone:
            return
        effect.is_delivered = True
        failed = self.ctx.undo([effect])
        effect.is_observed, effect.is_undone = True, not effect.is_committed
        if failed:
            raise errors.CompensationFailed(())


class ModelContext:
    def __init__(self, shell: Shell, seen: Iterable[bool]) -> None:
        self.seen = iter(seen)
        self.shell = shell
        self.steps = iter([row.record for row in shell.rows if row.record.kind is Kind.STEP])
        self.registrations = iter([row.record for row in shell.rows if row.record.kind is Kind.REGISTRATION])
        self.compensations = {row.record.undoes: row.record for row in shell.rows if row.record.undoes is not None}
        self.scopes = [ModelScope(parallel=False)]
        self.effects: list[Effect] = []
        self.undone: list[int] = []
        self.not_undone: list[int] = []
        self.logger = BoundLog([], lambda: True)

    # --- steps --------------------------------------------------------------------------------------------------------

    def _begin(self, name: str, optional: bool) -> Effect:
        record = next(self.steps)
        assert record.name == name
        effect = Effect(record, record.compensation, optional)
        self.effects.append(effect)
        self.scopes[-1].effects.append(effect)
        return effect

    def result(self, effect: Effect) -> Any:
        effect.is_delivered = True
        if effect.is_undone:
            raise errors.StepUndone(effect.record.seq, effect.record.name)
        if not effect.has_failed:
            return self.shell.row(effect.record.seq).fate.value
        effect.is_observed = True
        if effect.is_optional:
            return None
        raise effect.failure()

    def start(self, step: Signature, *, timeout: Any = None, optional: bool = False) -> ModelHandle:
        return ModelHandle(self, [self._begin(step.task, optional)])

    def run(self, step: Signature | Group, *, timeout: Any = None, optional: bool = False) -> Any:
        if isinstance(step, Group):
            return self._all([self._begin(member.task, False) for member in step.members])
        return self.start(step, optional=optional).get()

    def gather(self, *steps: Any, return_exceptions: bool = False) -> list[Any]:
        handles = [step if isinstance(step, ModelHandle) else self.start(step) for step in steps]
        return self._all([handle.effects[0] for handle in handles], collects=return_exceptions)

    def _all(self, effects: list[Effect], *, collects: bool = False) -> list[Any]:
        for effect in effects:
            effect.is_delivered = effect.is_observed = True
        failed = [effect for effect in effects if effect.has_failed and not effect.is_optional]
        if failed and not collects:
            self.result(min(failed, key=lambda effect: effect.record.seq))
        return [self._in_place(effect) if collects else self.result(effect) for effect in effects]

    def _in_place(self, effect: Effect) -> Any:
        try:
            return self.result(effect)
        except (errors.StepFailed, errors.StepUndone) as error:
            return error

    def map(self, step: Signature, items: list[Any], *, concurrency: Any, on_failure: str, timeout: Any) -> list[Any]:
        effects = [self._begin(step.task, False) for _ in items]
        failed = [effect for effect in effects if effect.has_failed and effect.outcome is not Outcome.WITHDRAWN]
        if on_failure == "stop" and failed:
            for effect in effects:
                effect.is_delivered = effect.is_observed = True
            self.result(failed[0])
        return self._all(effects, collects=True)

    def wait(self, *handles: ModelHandle, count: int, timeout: Any) -> None:
        """What it found is read by the interpreter, handle by handle."""

    # --- scopes -------------------------------------------------------------------------------------------------------

    @contextmanager
    def saga(self, *, parallel: bool) -> Iterator[None]:
        scope = ModelScope(parallel)
        self.scopes.append(scope)
        try:
            yield
            self.end_scope(scope)
        except Exception as error:
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
        for effect in effects:
            effect.is_delivered = True
        for effect in effects:
            is_seen = effect.is_observed or effect.is_optional or effect.is_undone
            is_taken_on = effect.is_accepted and effect.outcome is Outcome.UNKNOWN
            if effect.has_failed and not is_seen and not is_taken_on:
                raise effect.failure()
        doubtful = [effect for effect in effects if effect.is_in_doubt]
        self.undo(doubtful)
        for effect in doubtful:
            effect.is_undone = True

    def undo_scope(self, scope: ModelScope) -> list[Effect]:
        failed = self.undo(scope.effects)
        for effect in scope.effects:
            effect.is_delivered, effect.is_undone = True, not effect.is_committed
        return failed

    def undo(self, effects: list[Effect]) -> list[Effect]:
        """Undo what must be, last-started first; return what could not be."""
        failed = []
        for effect in sorted(effects, key=lambda effect: effect.record.seq, reverse=True):
            if effect.must_be_undone:
                self.undone.append(effect.record.seq)
                if self.compensations[effect.record.seq].outcome is not Outcome.SUCCEEDED:
                    failed.append(effect)
                    self.not_undone.append(effect.record.seq)
        return failed

    def compensate(self, signature: Signature) -> None:
        record = next(self.registrations)
        self.scopes[-1].effects.append(Effect(record, record.compensation))
        self.effects.append(self.scopes[-1].effects[-1])

    def commit(self) -> None:
        for scope in self.scopes:
            for effect in scope.effects:
                is_known = effect.is_delivered or effect.record.kind is Kind.REGISTRATION
                if is_known and not effect.is_in_doubt:
                    effect.is_committed = True

    def accept(self, step: ModelHandle | errors.StepFailed) -> None:
        seq = step.seq if isinstance(step, errors.StepFailed) else step.effects[0].record.seq
        next(effect for effect in self.effects if effect.record.seq == seq).is_accepted = True

    # --- the rest -----------------------------------------------------------------------------------------------------

    def sleep(self, seconds: float) -> None: ...

    def local(self, function: Any) -> Any:
        return function()

    def patched(self, change_id: str) -> bool:
        return True

    def random(self) -> float:
        return 0.0

    def now(self) -> None: ...

    def uuid4(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an instance must end, and what of it must have been undone."""

    value: Any
    failed_at: str | None
    undone: list[int]
    not_undone: list[int]
    effects: list[Effect]


def judge(shell: Shell, interpret: Any, seen: Iterable[bool]) -> Verdict:
    """Run ``interpret(ctx)`` against the model."""
    ctx = ModelContext(shell, seen)
    root = ctx.scopes[0]
    value, failed_at = None, None
    try:
        value = interpret(ctx)
        ctx.end_scope(root)
    except Exception as error:
        value = None
        failed_at = f"step {error.seq}" if isinstance(error, errors.StepFailed) else type(error).__name__
        ctx.undo_scope(root)
    assert next(ctx.steps, None) is None
    return Verdict(value, failed_at, ctx.undone, ctx.not_undone, ctx.effects)
