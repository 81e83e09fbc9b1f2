"""Steps whose task runs in a worker without this package: settled by Celery's own callbacks.

Such a worker sends ``link`` and ``link_error`` by name, so it needs to know nothing of us.  ``link_error`` also fires
for bodies that succeeded, so what it tells is that nobody can say.  What callbacks never tell (a message that expired,
was revoked or lost) is left to the step's timeout.  Nobody claims such a step, and its message is never sent twice.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from orchestrator import codec, errors
from orchestrator.core.attempts import AttemptDoubtful, AttemptSucceeded, Ended
from orchestrator.core.records import Failure
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import FOREIGN_FAILED, FOREIGN_SUCCEEDED, SURVIVING, Dispatcher, read_header


class ForeignSteps:
    """The bodies of the two callbacks."""

    def __init__(self, coordinator: Coordinator, dispatcher: Dispatcher) -> None:
        self.coordinator = coordinator
        self.dispatcher = dispatcher

    def succeed(self, result: Any, step: dict[str, Any]) -> None:
        try:
            text = codec.encode(result, "the result", self.coordinator.settings.max_payload_bytes)
            ended: Ended = AttemptSucceeded(text)
        except errors.InvalidInput as error:
            ended = AttemptDoubtful(codec.describe_error(error), is_final=True)
        self._end(step, ended)

    def fail(self, task_id: str, step: dict[str, Any]) -> None:
        message = f"its task {task_id} failed in a worker that does not tell how"
        failure = Failure("orchestrator.errors.ForeignFailure", ("builtins.Exception",), message)
        self._end(step, AttemptDoubtful(failure))

    def _end(self, step: dict[str, Any], ended: Ended) -> None:
        key, dispatch = read_header(step)
        self.dispatcher.deliver(self.coordinator.end_foreign(key, dispatch, ended))


def register(app: Celery, steps: Any) -> None:
    """Register the callbacks; ``steps()`` returns the ``ForeignSteps`` of the app."""

    def succeeded(result: Any, step: dict[str, Any]) -> None:
        steps().succeed(result, step)

    def failed(request_or_id: Any, exc: Any = None, traceback: Any = None, *, step: dict[str, Any]) -> None:  # noqa: ARG001
        # called in place with all three by a worker that knows this task, sent with an id by one that does not
        steps().fail(str(getattr(request_or_id, "id", request_or_id)), step)

    # nobody else tells what they tell
    app.task(name=FOREIGN_SUCCEEDED, ignore_result=True, shared=False, **SURVIVING)(succeeded)
    app.task(name=FOREIGN_FAILED, ignore_result=True, shared=False, **SURVIVING)(failed)
