"""``ctx``: what is undone together, and what stays done."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from orchestrator import errors
from orchestrator.core.calls.part import Part
from orchestrator.core.ending import end_scope, undo_scope
from orchestrator.core.failing import is_programming_error
from orchestrator.core.handles import StepHandle
from orchestrator.core.passes import Pass
from orchestrator.core.retry import RetryPolicy


class SagaCalls(Part):
    """Scopes and compensations."""

    def saga(self, *, parallel: bool = False) -> AbstractContextManager[None]:
        """Open a nested scope: an exception that leaves it undoes its own steps first, then goes on.

        When it ends well, its compensations pass to the scope around it.  ``parallel`` undoes its steps together.
        """
        return _OpenScope(self._pass, parallel)

    def compensate(self, signature: Any, *, retry: RetryPolicy | None = None) -> None:
        """Register a compensation by hand, from here on; it gets no result."""
        self._pass.check_live()
        plan = self._pass.host.read_compensation(signature, retry, of_step=False)
        self._pass.check_known(plan.name)
        self._pass.register(plan)

    def commit(self) -> None:
        """Let what has been done so far stay done: its compensations are forgotten, in every open scope.

        Steps that have not settled yet, and those in doubt, keep theirs.
        """
        self._pass.check_live()
        for scope in self._pass.scope.enclosing():
            scope.commit()

    def accept(self, step: StepHandle | errors.StepFailed) -> None:
        """Take on a step in doubt: it is no longer undone when its scope ends well."""
        self._pass.check_live()
        if not isinstance(step, StepHandle | errors.StepFailed):
            raise errors.ContextMisused(f"ctx.accept takes a handle or the StepFailed that was raised, not {step!r}")
        self._pass.nodes[step.seq].is_accepted = True


class _OpenScope(AbstractContextManager[None]):
    def __init__(self, current: Pass, parallel: bool) -> None:
        self._pass = current
        self._parallel = parallel

    def __enter__(self) -> None:
        self._pass.check_live()
        self._pass.scope = self._scope = self._pass.scope.open_inner(self._parallel)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pass.check_live()
        if error is None:
            try:
                end_scope(self._pass, self._scope)
            except (errors.StepFailed, errors.WorkflowCancelled) as failure:
                self._undo(failure)
                raise
            self._leave()
        elif isinstance(error, Exception | errors.WorkflowCancelled):
            self._undo(error)

    def _undo(self, error: BaseException) -> None:
        if is_programming_error(error):
            self._pass.break_off(error)
        not_undone = undo_scope(self._pass, self._scope)
        self._leave()
        if not_undone:
            raise errors.CompensationFailed(not_undone) from error

    def _leave(self) -> None:
        assert self._scope.parent is not None
        self._pass.scope = self._scope.parent
