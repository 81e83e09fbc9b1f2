"""What a workflow's history is made of: commands, records, the inbox, and what a pass decides.

Two sequences make up the history of a run.  The **records** say what the workflow asked for, numbered by ``seq`` from
0; each keeps the ``after_order`` of the last event that had been delivered when it was asked for.  The **inbox** says
what came in, numbered by ``order``: outcomes and fired timers (later also messages and cancellation), in the order in
which they were committed.  A pass replays the function over both; all else follows from them.

Payloads (arguments, results) are JSON text throughout: what the live run sees is decoded from the very bytes that a
replay decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from orchestrator.core.retry import RetryPolicy

Payload = str


class Kind(StrEnum):
    """What a record asked for."""

    STEP = "step"
    COMPENSATION = "compensation"
    TIMER = "timer"
    LOCAL = "local"
    PATCH = "patch"
    REGISTRATION = "registration"


class State(StrEnum):
    """How far a record has come."""

    HELD = "held"  # recorded by a map, waits for its turn
    SCHEDULED = "scheduled"  # may be claimed
    RUNNING = "running"  # an attempt holds the claim
    TIMED_OUT = "timed_out"  # its outcome is known to the workflow, its attempt may still be alive
    SETTLED = "settled"


class Outcome(StrEnum):
    """What became of a command."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"  # nobody can say whether it took effect
    WITHDRAWN = "withdrawn"  # it never began


class Wake(StrEnum):
    """What the completion of an awaited record does to the wait."""

    COUNT = "count"  # one less to wait for
    FAILURE = "failure"  # the same, but a failure ends the wait
    ALONE = "alone"  # ends the wait by itself
    CLOSED = "closed"  # one less, once no attempt can be alive any more


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception as it is recorded: names and text only, so that nothing is ever imported or unpickled."""

    type: str
    bases: tuple[str, ...]
    message: str
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class Compensation:
    """The activity that undoes a step, as recorded with it."""

    name: str
    arguments: Payload = '{"args":[],"kwargs":{}}'
    passes: Literal["result", "step", "nothing"] = "result"
    options: dict[str, Any] = field(default_factory=dict)
    retry: RetryPolicy | None = None
    always: bool = False


@dataclass(frozen=True, slots=True)
class ScheduleStep:
    """Run an activity."""

    name: str
    scope: str
    arguments: Payload
    options: dict[str, Any] = field(default_factory=dict)
    compensation: Compensation | None = None
    inherits_compensation: bool = True  # the claiming worker may add the one registered there
    retry: RetryPolicy | None = None
    timeout_seconds: float | None = None
    foreign: bool = False
    lane: int | None = None  # the first seq of the map it belongs to
    held: bool = False
    kind = Kind.STEP
    undoes = None


@dataclass(frozen=True, slots=True)
class RunCompensation:
    """Undo the step ``undoes``."""

    name: str
    scope: str
    undoes: int
    arguments: Payload
    passes: Literal["result", "step", "nothing"] = "result"
    options: dict[str, Any] = field(default_factory=dict)
    retry: RetryPolicy | None = None
    lane: int | None = None
    held: bool = False
    kind = Kind.COMPENSATION


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Fire after ``seconds``, or at ``at`` (one of them is set)."""

    scope: str
    seconds: float | None = None
    at: datetime | None = None
    name = "timer"
    kind = Kind.TIMER
    undoes = None


@dataclass(frozen=True, slots=True)
class RunLocal:
    """Run a function in the coordinator; it is settled when it is recorded."""

    name: str
    scope: str
    kind = Kind.LOCAL
    undoes = None


@dataclass(frozen=True, slots=True)
class MarkPatched:
    """Remember that this run takes the new path of a changed workflow."""

    name: str
    scope: str
    kind = Kind.PATCH
    undoes = None


@dataclass(frozen=True, slots=True)
class RegisterCompensation:
    """Undo something that was no step: ``ctx.compensate``."""

    name: str
    scope: str
    compensation: Compensation
    kind = Kind.REGISTRATION
    undoes = None


Command = ScheduleStep | RunCompensation | StartTimer | RunLocal | MarkPatched | RegisterCompensation


@dataclass(frozen=True, slots=True)
class Record:
    """One command as history holds it, with what has become of it so far."""

    seq: int
    kind: Kind
    name: str
    scope: str
    undoes: int | None = None
    after_order: int = 0
    state: State = State.SCHEDULED
    outcome: Outcome | None = None
    result: Payload | None = None
    failure: Failure | None = None
    timed_out: bool = False
    late_outcome: Outcome | None = None
    late_result: Payload | None = None
    compensation: Compensation | None = None
    arguments: Payload | None = None
    attempt: int = 0
    in_doubt: bool = False  # an attempt was lost, or nobody knows what it did
    foreign: bool = False
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True)
class Settled:
    """A step, compensation or timer has its outcome."""

    order: int
    at: datetime
    seq: int


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """The attempt that outlived the timeout of step ``seq`` has ended, or was given up."""

    order: int
    at: datetime
    seq: int


Event = Settled | AttemptEnded


@dataclass(frozen=True, slots=True)
class History:
    """All that a pass may know."""

    instance_id: str
    generation: str
    run: int
    started_at: datetime
    records: tuple[Record, ...] = ()
    inbox: tuple[Event, ...] = ()
    seen_order: int | None = None  # the last event that an earlier pass knew of


# --- what a pass decides ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewRecord:
    """A command asked for in this pass for the first time; ``outcome`` is set where it is settled as it is recorded."""

    seq: int
    command: Command
    after_order: int
    outcome: Outcome | None = None
    result: Payload | None = None
    failure: Failure | None = None
    event: Settled | None = None  # it was withdrawn at once: that takes an order like any other outcome


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Settle a record that was still in ``state`` at ``attempt`` when it was read; if it no longer is, decide again."""

    seq: int
    state: State
    attempt: int
    outcome: Outcome
    event: Settled | None  # None for a timer: nobody waits for it any more


@dataclass(frozen=True, slots=True)
class Waiting:
    """The pass is suspended until ``count`` of the records in ``wakes`` have completed."""

    count: int
    wakes: dict[int, Wake]
    is_compensating: bool = False
    draining: tuple[int, ...] = ()  # what is lost among these is unknown at once, and none is retried


@dataclass(frozen=True, slots=True)
class NotUndone:
    """A compensation that failed, by the ``seq`` of its own record and of the step that it should have undone."""

    seq: int
    undoes: int
    name: str
    message: str


@dataclass(frozen=True, slots=True)
class Completed:
    """The function returned."""

    result: Payload


@dataclass(frozen=True, slots=True)
class Failed:
    """The function raised; ``undone`` tells whether any compensation ran, ``Decision.not_undone`` which failed."""

    failure: Failure
    undone: bool


@dataclass(frozen=True, slots=True)
class Diverged:
    """The function asked for something else than history holds at ``seq``."""

    seq: int
    recorded: str
    requested: str


@dataclass(frozen=True, slots=True)
class Broken:
    """Workflow code itself raised a programming error; a deploy mends it."""

    failure: Failure


Ending = Waiting | Completed | Failed | Diverged | Broken


@dataclass(frozen=True, slots=True)
class Decision:
    """What one pass asks the shell to write, and where it stopped."""

    ending: Ending
    records: tuple[NewRecord, ...] = ()
    withdrawals: tuple[Withdrawal, ...] = ()
    not_undone: tuple[NotUndone, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    progress: str | None = None
