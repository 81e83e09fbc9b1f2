"""What a person can do on an instance's page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from orchestrator.errors import InvalidOperation
from orchestrator.flower.review import Review
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.store.instances import Status

Form = Mapping[str, str]

_TOO_LARGE = 2**31


@dataclass(frozen=True, slots=True)
class Field:
    """A field of an action's form."""

    name: str
    label: str
    is_required: bool = True
    is_long: bool = False
    is_claim: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """What is asked before it is done, and said when it is."""

    name: str
    label: str
    explanation: str
    button: str
    done: str
    perform: Callable[[WorkflowHandle, Form], object]
    fields: tuple[Field, ...] = ()
    colour: str = "primary"
    seq: int | None = None

    @property
    def outline(self) -> str:
        """The colour of what opens the form: Bootstrap's yellow cannot be read as text."""
        return "secondary" if self.colour == "warning" else self.colour

    def on(self, seq: int) -> Action:
        """Return the same for one record."""
        return replace(self, seq=seq)


def read_number(text: str) -> int:
    """Return the number of a record or run, as far as databases count.  Raises ``InvalidOperation``."""
    try:
        number = int(text)
    except ValueError:
        number = _TOO_LARGE
    if abs(number) >= _TOO_LARGE:
        raise InvalidOperation(f"records and runs have numbers, {text!r} is none of them")
    return number


def _number(form: Form) -> int:
    return read_number(form.get("seq", ""))


def _message(form: Form) -> object:
    try:
        return json.loads(form.get("message", ""))
    except ValueError as error:
        raise InvalidOperation(
            f'the message is not JSON: {error}; a text is written in quotes ("like this"), no message at all as null'
        ) from None


def _required(form: Form, name: str, what: str) -> str:
    given = form.get(name, "").strip()
    if not given:
        raise InvalidOperation(f"{what} is needed")
    return given


def _terminate(handle: WorkflowHandle, form: Form) -> None:
    if form.get("sure") != "yes":
        raise InvalidOperation("it was not confirmed that nothing is to be undone")
    handle.terminate(form.get("reason", "").strip() or None)


def _send(handle: WorkflowHandle, form: Form) -> None:
    # the form's own id: sent twice, by a second click or a reload, it is delivered once
    channel = _required(form, "channel", "a channel")
    handle.send(channel, _message(form), message_id=form.get("message_id") or None)


def _skip(handle: WorkflowHandle, form: Form) -> None:
    handle.skip_compensation(_number(form), _required(form, "reason", "a reason, which is kept with the record,"))


_REASON = Field("reason", "Reason (kept with the instance)", is_required=False)

CANCEL = Action(
    "cancel",
    "Cancel",
    "It stops where it waits, and what was done is undone, the last step first. A step under way is left to end.",
    "Cancel it",
    "It has been asked to cancel.",
    lambda handle, form: handle.cancel(form.get("reason", "").strip() or None),
    (_REASON,),
    "warning",
)
RESUME = Action(
    "resume",
    "Resume",
    "Its blocked steps get another attempt, its code another pass. Mend the cause first, or it blocks again.",
    "Resume it",
    "It goes on.",
    lambda handle, _form: handle.resume(),
)
FAIL_STEP = Action(
    "fail-step",
    "Let it fail",
    "The step raises in the workflow, as it would have without blocking; most likely that undoes the steps before it.",
    "Let the step fail",
    "The step raises in the workflow now.",
    lambda handle, form: handle.fail_step(_number(form)),
    colour="warning",
)
UNDO = Action(
    "undo",
    "Undo",
    "It has completed. Its compensations run, the last step first; that cannot be taken back.",
    "Undo it",
    "It is being undone.",
    lambda handle, _form: handle.undo(),
    colour="warning",
)
SEND = Action(
    "send",
    "Send a message",
    "It is kept until the workflow receives on that channel.",
    "Send it",
    "The message has been sent.",
    _send,
    (Field("channel", "Channel"), Field("message", "Message (JSON)", is_long=True)),
)
TERMINATE = Action(
    "terminate",
    "Terminate",
    "It ends where it stands, and its children with it. Nothing is undone, now or later.",
    "Terminate it",
    "It has been terminated.",
    _terminate,
    (_REASON, Field("sure", "Yes: leave everything that was done as it is", is_claim=True)),
    "danger",
)
RETRY = Action(
    "retry-compensation",
    "Run again",
    "The compensation runs again. Mend what made it fail first.",
    "Run it again",
    "The compensation runs again.",
    lambda handle, form: handle.retry_compensation(_number(form)),
)
SKIP = Action(
    "skip-compensation",
    "Skip",
    "Take it as dealt with by hand: it will not run again, and the reason is kept with its record.",
    "Skip it",
    "The compensation counts as dealt with.",
    _skip,
    (Field("reason", "What was done instead, and by whom"),),
    "warning",
)

ACTIONS = {each.name: each for each in (CANCEL, RESUME, FAIL_STEP, UNDO, SEND, TERMINATE, RETRY, SKIP)}


def offer(review: Review) -> list[Action]:
    """Return what makes sense for the instance as a whole; what has changed since is refused when it is done."""
    status = Status(review.description.status)
    if status is Status.COMPLETED:
        return [UNDO]
    if status.is_final:
        return []
    offered = [RESUME] if status is Status.BLOCKED else []
    offered += [SEND]
    if not review.description.is_past_pivot:
        offered += [CANCEL]
    return [*offered, TERMINATE]
