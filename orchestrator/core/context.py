"""``ctx``: what workflow code calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.core.calls.sagas import SagaCalls
from orchestrator.core.calls.steps import StepCalls
from orchestrator.core.calls.values import ValueCalls
from orchestrator.core.calls.waiting import WaitCalls
from orchestrator.core.passes import Pass

__all__ = ["Context"]


class Context(StepCalls, WaitCalls, SagaCalls, ValueCalls):
    """The first argument of every workflow function; see each method for what it asks for.

    A workflow function is run again from the top whenever something it waits for has happened, so everything that is
    not a pure function of its arguments must go through here.
    """

    def __init__(self, current: Pass, function: Callable[..., Any]) -> None:
        WaitCalls.__init__(self, current, function)
        ValueCalls.__init__(self, current)
