"""Durable sagas over the Celery tasks you already have."""

from orchestrator._version import __version__
from orchestrator.codec import UndoneStep
from orchestrator.core.context import Context
from orchestrator.core.handles import GroupHandle, StepHandle, TimerHandle
from orchestrator.core.retry import RetryPolicy
from orchestrator.errors import (
    CompensationFailed,
    OrchestratorError,
    OutcomeUnknown,
    StepFailed,
    StepTimedOut,
    StepUndone,
    StepUnknown,
    StepWithdrawn,
    WorkflowFailed,
)
from orchestrator.runtime.activity import CurrentStep, current_step
from orchestrator.runtime.app import Orchestrator, shared_workflow
from orchestrator.runtime.workflow import WorkflowHandle

__all__ = [
    "CompensationFailed",
    "Context",
    "CurrentStep",
    "GroupHandle",
    "Orchestrator",
    "OrchestratorError",
    "OutcomeUnknown",
    "RetryPolicy",
    "StepFailed",
    "StepHandle",
    "StepTimedOut",
    "StepUndone",
    "StepUnknown",
    "StepWithdrawn",
    "TimerHandle",
    "UndoneStep",
    "WorkflowFailed",
    "WorkflowHandle",
    "__version__",
    "current_step",
    "shared_workflow",
]
