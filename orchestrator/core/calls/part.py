"""What all parts of ``ctx`` share."""

from __future__ import annotations

from datetime import datetime

from orchestrator.core.calls.durations import Seconds, check_instant, read_seconds
from orchestrator.core.passes import Pass
from orchestrator.core.records import Outcome, StartTimer
from orchestrator.core.saga import Node


class Part:
    """Calls of ``ctx`` about one subject, on the pass that is being made."""

    def __init__(self, current: Pass) -> None:
        self._pass = current

    def _timer(self, until: Seconds | datetime, what: str) -> Node:
        """Start a timer; one whose instant has passed has fired as it is recorded, so no numbers shift."""
        self._pass.check_live()
        scope = self._pass.scope.path
        if not isinstance(until, datetime):
            return self._pass.ask(StartTimer(scope, seconds=read_seconds(until, what)))
        at = check_instant(until, what)
        if not self._pass.has_passed(at):
            return self._pass.ask(StartTimer(scope, at=at))
        return self._pass.ask(StartTimer(scope, at=at), settle=lambda: (Outcome.SUCCEEDED, None, None))
