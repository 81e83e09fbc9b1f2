"""What was registered beside tasks: compensations and defaults.

Decorators run at import, when Celery's tasks may still be promises; nothing here looks at one before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from orchestrator.core.records import Compensation
from orchestrator.core.retry import COMPENSATION_RETRY, RetryPolicy
from orchestrator.errors import ConfigurationError, ResultNeeded


@dataclass(frozen=True, slots=True)
class ActivityDefaults:
    """What ``@orchestrator.activity`` sets for a task."""

    retry: RetryPolicy | None = None
    timeout_seconds: float | None = None
    unknown_on: tuple[type[BaseException], ...] = ()
    is_transactional: bool = False


@dataclass(frozen=True, slots=True)
class RegisteredCompensation:
    """What ``@orchestrator.compensates`` sets for a task."""

    task: Any
    pass_step: bool = False
    retry: RetryPolicy | None = None
    always: bool = False

    @property
    def name(self) -> str:
        return str(getattr(self.task, "name", self.task))  # it may be no task; whoever needs one says so

    def plan(self, retry: RetryPolicy | None) -> Compensation:
        return Compensation(
            self.task.name, passes="step" if self.pass_step else "result", retry=retry, always=self.always
        )


class Registry:
    """Compensations and defaults, by task name."""

    def __init__(self) -> None:
        self._pending: list[Callable[[], None]] = []
        self._compensations: dict[str, RegisteredCompensation] = {}
        self._defaults: dict[str, ActivityDefaults] = {}
        self._conflicts: dict[str, tuple[str, str]] = {}

    def add_compensation(self, task: Any, compensation: RegisteredCompensation) -> None:
        self._pending.append(lambda: self._add(task.name, compensation))

    def _add(self, undone: str, compensation: RegisteredCompensation) -> None:
        before = self._compensations.get(undone)
        if before is not None and before.name != compensation.name:  # of the same name: its module was loaded again
            self._conflicts[undone] = (before.name, compensation.name)
        self._compensations[undone] = compensation

    def list_conflicts(self) -> list[str]:
        """Say of which tasks more than one compensation was registered."""
        self._resolve()
        return [
            f"both {first} and {second} are registered to undo {undone}; a step is undone by one task: register one, "
            "and give the other where it is called, with compensate="
            for undone, (first, second) in sorted(self._conflicts.items())
        ]

    def check(self) -> None:
        """Refuse, with ``ConfigurationError``, what must not be decided by which module was imported last."""
        conflicts = self.list_conflicts()
        if conflicts:
            raise ConfigurationError("; ".join(conflicts))

    def add_defaults(self, task: Any, defaults: ActivityDefaults) -> None:
        self._pending.append(lambda: self._defaults.__setitem__(task.name, defaults))

    def _resolve(self) -> None:
        while self._pending:
            self._pending.pop(0)()

    def find_compensation(self, task_name: str) -> RegisteredCompensation | None:
        self._resolve()
        return self._compensations.get(task_name)

    def list_compensations(self) -> dict[str, str]:
        """Return the names of tasks and of what undoes them."""
        self._resolve()
        return {name: each.task.name for name, each in self._compensations.items()}

    def find_plan(self, task_name: str) -> Compensation | None:
        """Return the compensation registered for a task, as it is recorded with a step."""
        registered = self.find_compensation(task_name)
        if registered is None:
            return None
        return registered.plan(self.compensation_retry(registered.task.name, registered.retry))

    def compensation_retry(self, task_name: str, own: RetryPolicy | None) -> RetryPolicy:
        """Return the policy of a compensation; no attempt can help one that needs a result which nobody knows."""
        policy = own or self.find_defaults(task_name).retry or COMPENSATION_RETRY
        return replace(policy, stop_on=(*policy.stop_on, ResultNeeded))

    def find_defaults(self, task_name: str) -> ActivityDefaults:
        self._resolve()
        return self._defaults.get(task_name, _NO_DEFAULTS)


_NO_DEFAULTS = ActivityDefaults()


def seconds(value: float | timedelta | None) -> float | None:
    return value.total_seconds() if isinstance(value, timedelta) else value
