"""From what a workflow asks for to commands: signatures are read whole, before any of them is asked for."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator import errors
from orchestrator.core.calls.durations import Seconds, read_seconds
from orchestrator.core.host import Call
from orchestrator.core.passes import Pass
from orchestrator.core.records import Compensation, Role, ScheduleStep, StartChild
from orchestrator.core.retry import RetryPolicy

Plan = ScheduleStep | StartChild

OnParentEnd = Literal["cancel", "leave"]

#: What the column of an instance's id holds.
LONGEST_ID = 200


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What a call says of its steps besides the signature."""

    compensate: Any = None
    retry: RetryPolicy | None = None
    timeout: Seconds | None = None
    pivot: bool = False
    optional: bool = False
    foreign: bool = False
    on_parent_end: OnParentEnd = "cancel"

    @property
    def role(self) -> Role | None:
        if self.pivot:
            return Role.PIVOT
        return Role.OPTIONAL if self.optional else None


def plan_steps(current: Pass, step: Any, settings: StepSettings, place: int = 0) -> Plan | list[Plan]:
    """Read a step, a child or a group of them, which will be the ``place``-th command from here and those after it.

    A call that is refused leaves nothing behind.
    """
    current.check_live()
    _check(settings)
    members = current.host.read_members(step)
    if members is None:
        return plan_step(current, step, settings, place)
    if settings.pivot:
        raise errors.ContextMisused("a pivot is one step, not a group: the point of no return lies in one place")
    return [plan_step(current, member, settings, place + index) for index, member in enumerate(members)]


def _check(settings: StepSettings) -> None:
    if settings.pivot and settings.optional:
        raise errors.ContextMisused("a pivot cannot be optional: what follows it rests on its having succeeded")
    if settings.pivot and settings.on_parent_end == "leave":
        raise errors.ContextMisused("a pivot is waited for; it cannot be left alone at its parent's end")
    if settings.on_parent_end not in ("cancel", "leave"):
        raise errors.ContextMisused(f"on_parent_end is 'cancel' or 'leave', not {settings.on_parent_end!r}")


def plan_step(
    current: Pass,
    step: Any,
    settings: StepSettings,
    place: int = 0,
    *,
    item: tuple[Any, ...] = (),
    lane: int | None = None,
    held: bool = False,
) -> Plan:
    """Read one signature; it will be the ``place``-th command from here."""
    call = current.host.read_call(step, item)
    if not settings.foreign:  # a worker without this package tells nobody what it knows
        current.check_known(call.name)
    seconds = read_seconds(settings.timeout, "timeout") if settings.timeout is not None else call.timeout_seconds
    if call.is_workflow or call.name in current.child_names:
        return _plan_child(current, call, settings, seconds, place, lane, held)
    if settings.on_parent_end != "cancel":
        raise errors.ContextMisused(
            f"{call.name} is a task; on_parent_end is for workflows, which outlive their parent"
        )
    if settings.foreign and seconds is None:
        raise errors.ContextMisused(f"{call.name} is foreign, so only a timeout can tell that it was lost; give one")
    return ScheduleStep(
        call.name,
        current.scope.path,
        call.arguments,
        call.options,
        _compensation(current, settings.compensate, call.compensation),
        inherits_compensation=settings.compensate is None,
        retry=settings.retry or call.retry,
        timeout_seconds=seconds,
        foreign=settings.foreign,
        role=settings.role,
        lane=lane,
        held=held,
    )


def _plan_child(
    current: Pass,
    call: Call,
    settings: StepSettings,
    seconds: float | None,
    place: int,
    lane: int | None,
    held: bool,
) -> StartChild:
    if settings.retry is not None or settings.foreign:
        raise errors.ContextMisused(f"{call.name} is a workflow: an instance is neither retried nor foreign")
    is_detached = settings.on_parent_end == "leave"
    if is_detached and settings.compensate:
        raise errors.ContextMisused(f"{call.name} is left alone at its parent's end, so nothing can undo it there")
    # without another one, a child is undone by its own compensations
    itself = call.compensation or Compensation(call.name, passes="nothing", is_child=True)
    plan = None if is_detached else _compensation(current, settings.compensate, itself)
    return StartChild(
        call.name,
        current.scope.path,
        call.arguments,
        call.child_id or _child_id(current, place),
        call.options,
        plan,
        timeout_seconds=seconds,
        role=settings.role,
        is_detached=is_detached,
        lane=lane,
        held=held,
    )


def _child_id(current: Pass, place: int) -> str:
    """Return the id of the child that the ``place``-th command from here starts: no other life of the id has it."""
    history = current.history
    return name_child(f"{history.instance_id}:{history.run}:{len(current.nodes) + place}~{history.generation[:8]}")


def name_child(name: str) -> str:
    """Return ``name`` as the id of a child, or what stands for it where it is too long."""
    return name if len(name) <= LONGEST_ID else str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def _compensation(current: Pass, compensate: Any, registered: Compensation | None) -> Compensation | None:
    if compensate is None:
        return registered
    if compensate is False:
        return None
    plan = current.host.read_compensation(compensate)
    current.check_known(plan.name)
    return plan
