"""From what a workflow asks for to commands: signatures are read whole, before any of them is asked for.

Only what is new is read.  A replay is compared by kind, name and scope, so of a call that is recorded nothing else is
looked at: its arguments are neither checked nor encoded.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from enum import Enum
from itertools import islice
from typing import Any, Final, Literal, NamedTuple

from orchestrator import errors
from orchestrator.core.calls.durations import Seconds, read_seconds
from orchestrator.core.host import Call
from orchestrator.core.passes import Pass
from orchestrator.core.records import Compensation, Kind, Record, Role, ScheduleStep, StartChild
from orchestrator.core.retry import RetryPolicy


class Recorded(Enum):
    """What stands for a command that an earlier pass has asked for."""

    RECORDED = "recorded"


RECORDED: Final = Recorded.RECORDED

Plan = ScheduleStep | StartChild | Recorded

OnParentEnd = Literal["cancel", "leave"]

#: What the column of an instance's id holds.
LONGEST_ID = 200


class StepSettings(NamedTuple):
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


PLAIN: Final = StepSettings()

# --- reading ------------------------------------------------------------------------------------------------------


def plan_steps(current: Pass, step: Any, settings: StepSettings) -> Plan | list[Plan]:
    """Read a step, a child or a group of them.  A call that is refused leaves nothing behind."""
    _check(settings)
    members = current.host.read_members(step)
    if members is None:
        record = current.find_record()
        if record is not None and _is_call_of(record, current, current.host.identify(step)):
            return RECORDED
        return _read(current, lambda first: [_plan_step(current, step, settings, first)])[0]
    if settings.pivot:
        raise errors.ContextMisused("a pivot is one step, not a group: the point of no return lies in one place")
    return _plan_all(current, members, settings)


def plan_each(current: Pass, steps: Sequence[Any]) -> list[Plan | list[Plan]]:
    """Read steps, children and groups of them, all before the first of them is asked for."""
    groups = [current.host.read_members(step) for step in steps]
    single = [[step] if members is None else members for step, members in zip(steps, groups, strict=True)]
    plans = iter(_plan_all(current, [step for members in single for step in members], PLAIN))
    return [next(plans) if members is None else list(islice(plans, len(members))) for members in groups]


def _plan_all(current: Pass, steps: Sequence[Any], settings: StepSettings) -> list[Plan]:
    identify = current.host.identify
    # where one of them is not as recorded, a closer look at each tells whether the call is refused, or what it asks for
    known = current.list_records(len(steps))
    if not all(_is_call_of(record, current, identify(step)) for record, step in zip(known, steps, strict=False)):
        known = []
    new = enumerate(steps[len(known) :], len(known))
    read = _read(current, lambda first: [_plan_step(current, step, settings, first + place) for place, step in new])
    return [RECORDED] * len(known) + read


def plan_map(
    current: Pass, step: Any, items: Sequence[Any], settings: StepSettings, concurrency: int | None
) -> list[Plan]:
    """Read a step that runs once for each of ``items``, no more than ``concurrency`` of them at a time."""
    identity = current.host.identify(step)
    known = current.list_records(len(items))
    if not all(_is_call_of(record, current, identity) for record in known):
        known = []
    width = concurrency if concurrency is not None and concurrency < len(items) else None

    def read(first: int) -> list[Plan]:
        return [
            _plan_step(
                current,
                step,
                settings,
                first + place,
                item=(items[place],),
                lane=first if width is not None else None,
                held=width is not None and place >= width,
            )
            for place in range(len(known), len(items))
        ]

    return [RECORDED] * len(known) + _read(current, read)


def _is_call_of(record: Record, current: Pass, identity: tuple[str, bool] | None) -> bool:
    """Tell whether ``record`` is what a call of such a task asked for."""
    if identity is None or record.name != identity[0] or record.scope != current.scope.path:
        return False
    if record.kind is Kind.CHILD:
        return True
    return record.kind is Kind.STEP and not identity[1] and record.name not in current.child_names


def _read(current: Pass, read: Callable[[int], list[Plan]]) -> list[Plan]:
    """Read calls with what will be the number of the first command, and get ready to ask for it."""
    first = len(current.nodes) + current.follows_refusal
    try:
        plans = read(first)
    except Exception:
        current.note_refusal()
        raise
    if plans:
        current.mark_refusal()
    return plans


def _check(settings: StepSettings) -> None:
    if settings.pivot and settings.optional:
        raise errors.ContextMisused("a pivot cannot be optional: what follows it rests on its having succeeded")
    if settings.on_parent_end == "cancel":
        return
    if settings.on_parent_end != "leave":
        raise errors.ContextMisused(f"on_parent_end is 'cancel' or 'leave', not {settings.on_parent_end!r}")
    if settings.pivot:
        raise errors.ContextMisused("a pivot is waited for; it cannot be left alone at its parent's end")


def _plan_step(
    current: Pass,
    step: Any,
    settings: StepSettings,
    seq: int,
    *,
    item: tuple[Any, ...] = (),
    lane: int | None = None,
    held: bool = False,
) -> Plan:
    """Read one signature, which will be command ``seq``."""
    call = current.host.read_call(step, item)
    if not settings.foreign:  # a worker without this package tells nobody what it knows
        current.check_known(call.name)
    seconds = read_seconds(settings.timeout, "timeout") if settings.timeout is not None else call.timeout_seconds
    if call.is_workflow or call.name in current.child_names:
        return _plan_child(current, call, settings, seconds, seq, lane, held)
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
    seq: int,
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
        call.child_id or child_id(current, seq),
        call.options,
        plan,
        timeout_seconds=seconds,
        role=settings.role,
        is_detached=is_detached,
        lane=lane,
        held=held,
    )


def child_id(current: Pass, seq: int) -> str:
    """Return the id of the child that command ``seq`` starts: no other life of the id has it."""
    history = current.history
    return name_child(f"{history.instance_id}:{history.run}:{seq}~{history.generation[:8]}")


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
