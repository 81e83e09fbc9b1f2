"""Every exception of this package, one tree; the docstring says what happened, the message names to what.

Attributes come first and the message is made from them.  Nothing here imports anything of the package.
"""

from __future__ import annotations

import builtins
import sys
from typing import Any

__all__ = [
    "CompensationFailed",
    "ConfigurationError",
    "ContextMisused",
    "EagerModeStuck",
    "InputMismatch",
    "InstanceEnded",
    "InstanceExists",
    "InvalidInput",
    "InvalidInstanceId",
    "MessageMismatch",
    "NaiveDatetime",
    "NotEncodable",
    "InvalidOperation",
    "OrchestratorError",
    "OutcomeUnknown",
    "PayloadTooLarge",
    "ReceiveTimedOut",
    "ReplaceRefused",
    "ResultMismatch",
    "ResultNotKept",
    "ResultNeeded",
    "SecondWriter",
    "SentInsideWorkflow",
    "StepFailed",
    "StepTimedOut",
    "StepUndone",
    "StepUnknown",
    "StepWithdrawn",
    "StoreUnreachable",
    "TransactionEnded",
    "UnknownInstance",
    "UnknownTask",
    "UnknownWorkflow",
    "WorkflowCancelled",
    "WorkflowFailed",
    "WorkflowUndone",
]


class OrchestratorError(Exception):
    """Base of all errors raised by this package."""

    def __reduce__(self) -> Any:
        # the args are the message, which no constructor here takes; and Celery's pool pickles exceptions
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigurationError(OrchestratorError):
    """A setting is missing or cannot be used."""


class EagerModeStuck(OrchestratorError):
    """An instance that runs eagerly waits for what nobody can bring while its caller waits for it."""

    def __init__(self, instance_id: str, reason: str) -> None:
        self.instance_id = instance_id
        self.reason = reason
        super().__init__(f"{instance_id} runs eagerly, and cannot end: {reason}")


class StoreUnreachable(OrchestratorError):
    """No connection to the store could be made."""

    def __init__(self, url: str, cause: BaseException) -> None:
        self.url = url
        super().__init__(f"cannot reach the store {url}: {cause}")


# --- bad input: refused at the call, nothing recorded -------------------------------------------------------------


class InvalidInput(OrchestratorError):
    """A call was refused; nothing of it was recorded."""


class NotEncodable(InvalidInput, TypeError):
    """A value has no JSON form."""

    def __init__(self, what: str, reason: str) -> None:
        self.what, self.reason = what, reason
        super().__init__(f"{what} cannot be encoded: {reason}")


class PayloadTooLarge(InvalidInput, ValueError):
    """A value is over ``orchestrator_max_payload_bytes``."""

    def __init__(self, what: str, size_bytes: int, limit_bytes: int) -> None:
        self.what, self.size_bytes, self.limit_bytes = what, size_bytes, limit_bytes
        super().__init__(
            f"{what} takes {size_bytes} bytes encoded, more than the {limit_bytes} that are allowed (payloads: "
            "orchestrator_max_payload_bytes); store it elsewhere and pass a reference"
        )


class UnknownTask(InvalidInput, NameError):
    """No task of that name is registered here or on a live worker."""

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(f"no task named {task!r} is registered here or on any live worker")


class UnknownWorkflow(InvalidInput, LookupError):
    """The signature given is not one of a workflow."""

    def __init__(self, workflow: str) -> None:
        self.workflow = workflow
        super().__init__(f"{workflow!r} is not a registered workflow; decorate it with @orchestrator.workflow")


class InstanceEnded(InvalidInput, ValueError):
    """The instance has ended, and receives no more messages."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        super().__init__(f"instance {instance_id!r} has ended; what is sent to it would never be received")


class UnknownInstance(InvalidInput, LookupError):
    """No instance has that id."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        super().__init__(f"there is no instance {instance_id!r}")


class InstanceExists(InvalidInput, ValueError):
    """The instance id is already used, by another input or workflow (or ``on_conflict="raise"`` was asked for)."""

    def __init__(self, instance_id: str, reason: str) -> None:
        self.instance_id, self.reason = instance_id, reason
        super().__init__(f"instance {instance_id!r} exists already{reason and ', ' + reason}")


class InvalidInstanceId(InvalidInput, ValueError):
    """An instance id is 1 to 200 printable characters."""

    def __init__(self, instance_id: object, reason: str) -> None:
        self.instance_id, self.reason = instance_id, reason
        super().__init__(f"{str(instance_id)[:60]!r} cannot be an instance id: {reason}")


class NaiveDatetime(InvalidInput, ValueError):
    """A datetime without a time zone does not name an instant."""

    def __init__(self, what: str, value: object) -> None:
        self.what, self.value = what, value
        super().__init__(f"{what} is {value!r}, which has no time zone; use an aware datetime")


class InputMismatch(InvalidInput, TypeError):
    """The arguments given to a workflow do not fit its annotations."""

    def __init__(self, workflow: str, reason: str) -> None:
        self.workflow, self.reason = workflow, reason
        super().__init__(f"the input of {workflow} is refused: {reason}")


class InvalidOperation(InvalidInput, ValueError):
    """An operator's call does not fit the state of the instance or record."""


class ResultNotKept(OrchestratorError, NotImplementedError):
    """The result of a task was asked for that no result backend keeps, and that is no instance's and no step's."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        super().__init__(
            f"No result backend is configured, and no instance or step has the id {task_id!r} yet: set result_backend, "
            "or wait for a workflow that was only just sent through the handle that delay() returned, or its task's "
            "AsyncResult(id)"
        )


class ContextMisused(OrchestratorError, TypeError):
    """``ctx`` was used where it cannot be used, or with arguments that contradict each other."""


class SentInsideWorkflow(OrchestratorError, TypeError):
    """A workflow function sent a Celery message itself; a replay would send it again."""

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(
            f"a workflow function tried to send {task!r}; it runs again on every replay: "
            "use ctx.run or ctx.start, or send it from an activity"
        )


# --- raised into workflows ----------------------------------------------------------------------------------------


class StepFailed(OrchestratorError):
    """A step failed for good.

    What is raised is also an instance of the activity's own exception class, where that class is already imported, else
    of its nearest builtin base: ``except StepFailed`` and ``except CardDeclined`` both catch it.
    """

    _fields = ("seq", "name", "outcome", "error_type", "message", "traceback")

    def __init__(
        self, *, seq: int, name: str, outcome: str, error_type: str, message: str, traceback: str | None = None
    ) -> None:
        self.seq, self.name, self.outcome = seq, name, outcome
        self.error_type, self.message, self.traceback = error_type, message, traceback
        # not super().__init__: in a class made with the activity's own exception it would be that one's, whose
        # arguments nobody here knows
        self.args = (str(self),)

    def __str__(self) -> str:
        return f"step {self.seq} ({self.name}) {self.outcome}: {self.error_type}: {self.message}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> Any:
        return _restore, (_plain_kind(type(self)), {field: getattr(self, field) for field in self._fields})


class StepUnknown(StepFailed):
    """Nobody can say whether the step took effect; it is undone like one that did."""


class StepTimedOut(StepFailed):
    """The step did not end within its ``timeout``; its last attempt may still be alive."""


class StepWithdrawn(StepFailed):
    """The step was withdrawn before it began."""


class ReceiveTimedOut(OrchestratorError, TimeoutError):
    """No message came in time; one that comes later waits for the next receive."""

    def __init__(self, channel: str, seconds: float) -> None:
        self.channel, self.seconds = channel, seconds
        super().__init__(f"no message on {channel!r} within {seconds:g} s")


class MessageMismatch(OrchestratorError, ValueError):
    """A message that was received does not fit the ``returns=`` given for it.

    The mistake is the sender's: unlike one of the workflow's own code it blocks nothing, and undoes what does not catch
    it.  The message counts as received.
    """

    def __init__(self, channel: str, reason: str) -> None:
        self.channel, self.reason = channel, reason
        super().__init__(f"the message on {channel!r} is not what was to be received: {reason}")


class WorkflowCancelled(BaseException):
    """Raised once into a workflow that is cancelled, or past its deadline, where it waits.

    Not an ``Exception``, so that ``except Exception`` around a step does not decline it.  Leaving the function (or a
    scope) it undoes as a failure does; whoever catches it may run steps, and declines it by returning.
    """

    def __init__(self, reason: str | None = None, *, is_deadline: bool = False) -> None:
        self.reason, self.is_deadline = reason, is_deadline
        super().__init__(reason or ("its deadline has passed" if is_deadline else "cancelled"))


class StepUndone(OrchestratorError):
    """The result of a step was asked for whose scope has been undone."""

    def __init__(self, seq: int, name: str) -> None:
        self.seq, self.name = seq, name
        super().__init__(f"step {seq} ({name}) was undone with its scope; its result no longer holds")


class CompensationFailed(OrchestratorError):
    """A scope could not be undone fully; ``not_undone`` says what is left for a person to look at."""

    def __init__(self, not_undone: tuple[Any, ...]) -> None:
        self.not_undone = not_undone
        listing = "; ".join(f"step {n.undoes} by {n.name}: {n.message}" for n in not_undone)
        super().__init__(f"{len(not_undone)} compensation(s) failed: {listing}")


class ResultMismatch(OrchestratorError, TypeError):
    """A recorded result does not fit the ``returns=`` given for it."""


# --- raised by activities -----------------------------------------------------------------------------------------


class OutcomeUnknown(OrchestratorError):
    """Raise it in an activity that cannot tell whether it took effect: the step is ``unknown`` and will be undone."""


class TransactionEnded(OutcomeUnknown):
    """A transactional task ended the transaction that its session is on: what it wrote stands, without its result."""

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(
            f"{task} ended the transaction of its session; what it wrote before may be in the database: use "
            "session.commit(), which keeps what was written for the end, and not the connection's"
        )


class SecondWriter(OrchestratorError, RuntimeError):
    """A transactional task wrote to an SQLite store by another connection than its session's: it would block itself."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(
            f"a transactional task is writing to {url}, and SQLite lets only one connection write at a time: do this "
            "outside of the task, or use another database"
        )


class ReplaceRefused(OrchestratorError):
    """A task that runs as a step called ``replace()``; its result would be another task's, which nobody awaits."""

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(
            f"{task} called replace() while running as a step; let the workflow run the other task instead"
        )


class ResultNeeded(OrchestratorError):
    """A compensation needs the result of a step whose outcome nobody knows; a person has to look."""

    def __init__(self, name: str, parameter: str, undoes: int) -> None:
        self.name, self.parameter, self.undoes = name, parameter, undoes
        super().__init__(
            f"{name} was not called to undo step {undoes}: the step's outcome is unknown, so there is no result, and "
            f"its parameter {parameter!r} does not accept None"
        )


# --- raised by handles --------------------------------------------------------------------------------------------


class WorkflowUndone(OrchestratorError):
    """What the instance ended with when its compensations were run after it had completed."""

    def __init__(self) -> None:
        super().__init__("it had completed, and was undone by request")


class WorkflowFailed(OrchestratorError):
    """The instance ended without a result.

    Like ``StepFailed`` it is also an instance of the original exception's class, where that is imported here.
    """

    _fields = ("instance_id", "status", "error_type", "message", "traceback")

    def __init__(
        self, *, instance_id: str, status: str, error_type: str, message: str, traceback: str | None = None
    ) -> None:
        self.instance_id, self.status = instance_id, status
        self.error_type, self.message, self.traceback = error_type, message, traceback
        self.args = (str(self),)

    def __str__(self) -> str:
        return f"instance {self.instance_id} is {self.status}: {self.error_type}: {self.message}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> Any:
        return _restore, (WorkflowFailed, {field: getattr(self, field) for field in self._fields})


# --- an error that is also the activity's own ---------------------------------------------------------------------


def in_class_of(
    kind: type[StepFailed] | type[WorkflowFailed], error_type: str, bases: tuple[str, ...], **attributes: Any
) -> Any:
    """Return a ``kind`` that is also an instance of the class named ``error_type``, or of its nearest builtin base.

    Only classes that are imported already are looked up: nothing is imported because a payload names it.
    """
    made: Any = kind
    for own in (_imported(error_type), _builtin(bases)):
        if made is kind and own is not None:
            made = _class_of(kind, own)
    return made(error_type=error_type, **attributes)


def _builtin(bases: tuple[str, ...]) -> type[Exception] | None:
    for base in bases:
        module, _, name = base.rpartition(".")
        found = getattr(builtins, name, None) if module == "builtins" else None
        if isinstance(found, type) and issubclass(found, Exception):
            return found
    return None


def _imported(error_type: str) -> type[Exception] | None:
    """Look ``package.module.Outer.Inner`` up among the imported modules."""
    parts = error_type.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:split]))
        if module is None:
            continue
        found: object = module
        for name in parts[split:]:
            found = vars(found).get(name) if hasattr(found, "__dict__") else None
        return found if isinstance(found, type) and issubclass(found, Exception) else None
    return None


_classes: dict[tuple[Any, type[Exception]], Any] = {}


def _class_of(kind: type[StepFailed] | type[WorkflowFailed], own: type[Exception]) -> Any:
    key = (kind, own)
    if key not in _classes:
        _classes[key] = _make_class(kind, own)
    return _classes[key]


def _make_class(kind: type[StepFailed] | type[WorkflowFailed], own: type[Exception]) -> Any:
    """Return a class that is both, or ``kind`` where there can be none."""
    if issubclass(kind, own) or issubclass(own, StepFailed | WorkflowFailed):
        return kind
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    both: Any
    try:
        both = type(own.__name__, (kind, own), {**names, "__new__": _bare_new})
        both(**dict.fromkeys(kind._fields, ""))
    except Exception:
        # Two classes that cannot be one: a metaclass, a layout, a constructor in C, an __init_subclass__ with rules of
        # its own, or a property or frozen dataclass that will not have our attributes set.
        return kind
    return both


def _bare_new(cls: type[Exception], *_args: Any, **_attributes: Any) -> Any:
    """Make an instance without the constructor of the activity's class, whose arguments nobody here knows."""
    native: Any = next(base for base in cls.__mro__ if getattr(builtins, base.__name__, None) is base)
    return native.__new__(cls)


def _plain_kind(cls: type[StepFailed]) -> type[StepFailed]:
    plain: tuple[type[StepFailed], ...] = (StepTimedOut, StepUnknown, StepWithdrawn, StepFailed)
    return next(kind for kind in plain if issubclass(cls, kind))


def _restore(kind: type[Exception], attributes: dict[str, Any]) -> Any:
    """Unpickle as the plain kind: Celery's pool pickles exceptions between its own processes."""
    return kind(**attributes)


def _rebuild(cls: type[Exception], args: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(attributes)
    return error
