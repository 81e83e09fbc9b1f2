"""What a workflow's history is made of: commands, records, the inbox, and what a pass decides.

Two sequences make up the history of a run.  The **records** say what the workflow asked for, numbered by ``seq`` from
0; each keeps the ``after_order`` of the last event that had been delivered when it was asked for.  The **inbox** says
what came in, numbered by ``order``: outcomes, fired timers, messages, cancellation, in the order in which they were
committed.  A pass replays the function over both; all else follows from them, and so does which message is received by
whom: they are matched when they are delivered, never by who sends them.

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
    CHILD = "child"
    COMPENSATION = "compensation"
    UNDO = "undo"
    TIMER = "timer"
    RECEIVE = "receive"
    LOCAL = "local"
    PATCH = "patch"
    REGISTRATION = "registration"
    SEND = "send"
    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"
    UNSUBSCRIBE = "unsubscribe"


class State(StrEnum):
    """How far a record has come."""

    HELD = "held"  # recorded by a map, waits for its turn
    SCHEDULED = "scheduled"  # may be claimed
    RUNNING = "running"  # an attempt holds the claim
    TIMED_OUT = "timed_out"  # its outcome is known to the workflow, its attempt may still be alive
    BLOCKED = "blocked"  # it failed where failing blocks the instance: an operator decides
    SETTLED = "settled"


class Outcome(StrEnum):
    """What became of a command."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"  # nobody can say whether it took effect
    WITHDRAWN = "withdrawn"  # it never began


class Role(StrEnum):
    """What a step's failure does besides being raised."""

    PIVOT = "pivot"  # the point of no return: unknown, it blocks
    OPTIONAL = "optional"  # nobody minds: it never blocks


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
    """The activity that undoes a step, as recorded with it; for a child, that it is to undo itself."""

    name: str
    arguments: Payload = '{"args":[],"kwargs":{}}'
    passes: Literal["result", "step", "nothing"] = "result"
    options: dict[str, Any] = field(default_factory=dict)
    retry: RetryPolicy | None = None
    always: bool = False
    is_child: bool = False


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
    role: Role | None = None
    lane: int | None = None  # the first seq of the map it belongs to
    held: bool = False
    kind = Kind.STEP
    undoes = None


@dataclass(frozen=True, slots=True)
class StartChild:
    """Start an instance of another workflow."""

    name: str
    scope: str
    arguments: Payload
    child_id: str
    options: dict[str, Any] = field(default_factory=dict)
    compensation: Compensation | None = None
    timeout_seconds: float | None = None
    role: Role | None = None
    is_detached: bool = False
    lane: int | None = None
    held: bool = False
    kind = Kind.CHILD
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
class UndoChild:
    """Have the child that ``undoes`` started run its own compensations."""

    name: str
    scope: str
    undoes: int
    child_id: str
    lane: int | None = None
    held: bool = False
    kind = Kind.UNDO


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
class OpenReceive:
    """Wait for a message on the channel ``name``."""

    name: str
    scope: str
    kind = Kind.RECEIVE
    undoes = None


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Put a message into the mailbox of another instance; the result says whether there is one (``Delivery``)."""

    name: str
    scope: str
    instance_id: str
    payload: Payload
    message_id: str | None = None
    kind = Kind.SEND
    undoes = None


class Delivery(StrEnum):
    """Whether an instance can be sent messages."""

    DELIVERED = "delivered"
    UNKNOWN = "unknown"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class PublishMessage:
    """Give a message to all that subscribed to the channel ``name``, and to one of those that compete for it."""

    name: str
    scope: str
    payload: Payload
    message_id: str | None = None
    kind = Kind.PUBLISH
    undoes = None


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Join the channel ``name``."""

    name: str
    scope: str
    mode: Literal["broadcast", "competing"]
    kind = Kind.SUBSCRIBE
    undoes = None


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """Leave the channel ``name``."""

    name: str
    scope: str
    kind = Kind.UNSUBSCRIBE
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


#: What somebody else settles; the rest is settled as it is recorded.
Dispatched = ScheduleStep | StartChild | RunCompensation | UndoChild
Command = (
    Dispatched
    | StartTimer
    | OpenReceive
    | SendMessage
    | PublishMessage
    | Subscribe
    | Unsubscribe
    | RunLocal
    | MarkPatched
    | RegisterCompensation
)


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
    child_id: str | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """A step, child, compensation or timer has its outcome."""

    order: int
    at: datetime
    seq: int


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """The attempt that outlived the timeout of step ``seq`` has ended, or was given up."""

    order: int
    at: datetime
    seq: int


@dataclass(frozen=True, slots=True)
class MessageTaken:
    """A message is there."""

    order: int
    at: datetime
    channel: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody asked for the instance to be cancelled, or its deadline has passed."""

    order: int
    at: datetime
    reason: str | None = None
    is_deadline: bool = False


@dataclass(frozen=True, slots=True)
class UndoRequested:
    """Somebody asked for what the completed instance did to be undone."""

    order: int
    at: datetime


Event = Settled | AttemptEnded | MessageTaken | CancelRequested | UndoRequested


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
    seeds: tuple[tuple[int, str], ...] = ()  # of a fork: (seq, seed): what was drawn from before record ``seq``


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
    message_order: int | None = None  # it received the message of that order at once


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Settle a record that was still in ``state`` at ``attempt`` when it was read; if it no longer is, decide again."""

    seq: int
    state: State
    attempt: int
    outcome: Outcome
    event: Settled | None  # None for a timer or a receive: nobody waits for it any more


@dataclass(frozen=True, slots=True)
class Receipt:
    """The receive ``seq`` got the message of ``order``."""

    seq: int
    message: MessageTaken


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
    run: int = 0


@dataclass(frozen=True, slots=True)
class Completed:
    """The function returned."""

    result: Payload


@dataclass(frozen=True, slots=True)
class Failed:
    """The function raised; ``undone`` tells whether any compensation ran, ``Decision.not_undone`` which failed."""

    failure: Failure
    undone: bool
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Undone:
    """The function had returned, and later on its compensations were run."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Recurred:
    """This run has ended, and the next begins with other input; ``order`` is the last event that was delivered."""

    arguments: Payload
    order: int


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


Ending = Waiting | Completed | Failed | Undone | Recurred | Diverged | Broken


@dataclass(frozen=True, slots=True)
class Decision:
    """What one pass asks the shell to write, and where it stopped."""

    ending: Ending
    records: tuple[NewRecord, ...] = ()
    withdrawals: tuple[Withdrawal, ...] = ()
    not_undone: tuple[NotUndone, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    progress: str | None = None
    receipts: tuple[Receipt, ...] = ()
    cancels: tuple[int, ...] = ()  # records of children that are to be cancelled
