"""Metrics.  What comes by signals comes at least once: after a crash it may have been counted twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

from orchestrator._version import __version__
from orchestrator.runtime.notices import seconds_waited
from orchestrator.store.history import HistoryRow

if TYPE_CHECKING:
    from orchestrator.runtime.app import Orchestrator


class Metrics:
    """The instruments; names and attributes are listed in ``docs/how-to/observe.md``."""

    def __init__(self, orchestrator: Orchestrator, provider: MeterProvider | None) -> None:
        self._orchestrator = orchestrator
        self._due: float | None = None
        meter = metrics.get_meter("orchestrator", __version__, meter_provider=provider)
        self._started = meter.create_counter(
            "orchestrator.instance.started", "{instance}", "Instances whose first pass was made"
        )
        self._ended = meter.create_counter("orchestrator.instance.ended", "{instance}", "Instances that ended")
        self._duration = meter.create_histogram(
            "orchestrator.step.duration", "s", "From the start of a step's last attempt until it settled"
        )
        self._wait = meter.create_histogram(
            "orchestrator.step.wait", "s", "From the sending of a step's message to the start of its attempt"
        )
        self._lost = meter.create_counter("orchestrator.step.lost", "{attempt}", "Attempts lost with their workers")
        self._failed = meter.create_counter(
            "orchestrator.compensation.failed", "{compensation}", "Compensations that did not succeed"
        )
        self._pass = meter.create_histogram("orchestrator.pass.duration", "s", "Replays of workflow functions")
        meter.create_observable_gauge(
            "orchestrator.due.age", [self._observe_due], "s", "How long the oldest work in the store has been due"
        )

    # --- in the process ------------------------------------------------------------------------------------------

    def note_attempt(self, row: HistoryRow) -> None:
        self._wait.record(seconds_waited(row), {"orchestrator.task": row.name})

    def note_pass(self, workflow: str, seconds: float) -> None:
        self._pass.record(seconds, {"orchestrator.workflow": workflow})

    def note_due(self, seconds: float | None) -> None:
        self._due = seconds

    def _observe_due(self, _options: CallbackOptions) -> Iterable[Observation]:
        """Tell what the poller has seen, in the process of each worker.

        The store is not asked here: the SDK holds a lock meanwhile, and a pool process that is forked then has it
        held for ever, and its metrics never come.
        """
        if self._due is None or not self._orchestrator.executing.is_worker:
            return []
        return [Observation(self._due)]

    # --- by signals ----------------------------------------------------------------------------------------------

    def on_instance_started(self, workflow: str, **_more: Any) -> None:
        self._started.add(1, {"orchestrator.workflow": workflow})

    def on_instance_ended(self, workflow: str, status: str, **_more: Any) -> None:
        self._ended.add(1, {"orchestrator.workflow": workflow, "orchestrator.status": status})

    def on_settled(self, sender: str, kind: str, outcome: str, seconds: float | None, **_more: Any) -> None:
        if seconds is not None:
            about = {"orchestrator.task": sender, "orchestrator.kind": kind, "orchestrator.outcome": outcome}
            self._duration.record(seconds, about)

    def on_lost(self, sender: str, **_more: Any) -> None:
        self._lost.add(1, {"orchestrator.task": sender})

    def on_compensation_failed(self, sender: str, workflow: str, **_more: Any) -> None:
        self._failed.add(1, {"orchestrator.task": sender, "orchestrator.workflow": workflow})
