"""Durable sagas over the Celery tasks you already have."""

from orchestrator._version import __version__
from orchestrator.codec import UndoneStep
from orchestrator.core.context import Context
from orchestrator.core.handles import ChildHandle, GroupHandle, MessageHandle, StepHandle, TimerHandle
from orchestrator.core.retry import RetryPolicy
from orchestrator.errors import (
    CompensationFailed,
    OrchestratorError,
    OutcomeUnknown,
    ReceiveTimedOut,
    StepFailed,
    StepTimedOut,
    StepUndone,
    StepUnknown,
    StepWithdrawn,
    WorkflowCancelled,
    WorkflowFailed,
)
from orchestrator.runtime.app import Orchestrator, shared_workflow
from orchestrator.runtime.current import CurrentStep, current_step
from orchestrator.runtime.handle import WorkflowHandle

__all__ = [
    "ChildHandle",
    "CompensationFailed",
    "Context",
    "CurrentStep",
    "GroupHandle",
    "MessageHandle",
    "Orchestrator",
    "OrchestratorError",
    "OutcomeUnknown",
    "ReceiveTimedOut",
    "RetryPolicy",
    "StepFailed",
    "StepHandle",
    "StepTimedOut",
    "StepUndone",
    "StepUnknown",
    "StepWithdrawn",
    "TimerHandle",
    "UndoneStep",
    "WorkflowCancelled",
    "WorkflowFailed",
    "WorkflowHandle",
    "__version__",
    "current_step",
    "shared_workflow",
]
