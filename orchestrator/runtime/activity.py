"""What wraps a task while it runs as a step: claim, run the body, settle.

Tasks are used as they are.  When a worker starts, the ``run`` of every registered task is wrapped; a message without
our header goes straight through.  A message with it is a doorbell: the wrapper claims the step it names, and what does
not hold the claim runs nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry

from orchestrator import codec, errors
from orchestrator.core.attempts import AttemptDoubtful, AttemptFailed, AttemptSucceeded, Ended
from orchestrator.core.records import Failure, Kind
from orchestrator.runtime import softlimit
from orchestrator.runtime.claims import Claims
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import HEADER, Dispatcher, read_header
from orchestrator.runtime.registry import Registry
from orchestrator.runtime.settings import Settings
from orchestrator.store.history import HistoryRow

logger = logging.getLogger("orchestrator")


@dataclass(frozen=True, slots=True)
class CurrentStep:
    """The step that the running task is an attempt of."""

    instance_id: str
    run: int
    seq: int
    attempt: int
    idempotency_key: str
    cancel_requested: bool = False


_current: ContextVar[CurrentStep | None] = ContextVar("orchestrator_current_step", default=None)


def current_step() -> CurrentStep | None:
    """Return the step that the calling task runs as, ``None`` outside of one.

    ``idempotency_key`` is the same for every attempt and redelivery of the step: give it to the payment provider.
    """
    return _current.get()


class StepRunner:
    """Runs task bodies as steps."""

    def __init__(
        self,
        app: Celery,
        settings: Settings,
        registry: Registry,
        coordinator: Coordinator,
        claims: Claims,
        dispatcher: Dispatcher,
    ) -> None:
        self.app = app
        self.settings = settings
        self.registry = registry
        self.coordinator = coordinator
        self.claims = claims
        self.dispatcher = dispatcher

    def run(self, task: Any, body: Callable[..., Any], request: Any, header: Any) -> Any:
        """Run one delivery of a step's message: to its end if it can be claimed, else not at all."""
        key, dispatch = read_header(header)
        plan = self.registry.find_plan(task.name)
        with (
            softlimit.deferred(in_pool_process=self.claims.state.is_child) as limit,
            self.claims.executing(key, dispatch),
        ):
            row = self.claims.claim(key, dispatch, codec.dump(plan) if plan is not None else None)
            if row is None:
                logger.info("%s[%s]: not claimed, its message is old or doubled", task.name, request.id)
                raise Ignore
            request.is_inside_step = True
            try:
                args, kwargs = self._arguments(task, request, row)
                with _as_current(row), limit.allowed():
                    result = body(*args, **kwargs)
            except Retry as retry:
                self._retry(row, retry)
                raise
            except Reject as rejection:
                self._reject(row, rejection)
                raise Ignore from rejection
            except BaseException as error:
                self._settle(row, self._ended_by(task, error))
                raise
            self._settle(row, self._encoded(task, result))
            return result

    # --- arguments and results ------------------------------------------------------------------------------------

    def _arguments(self, task: Any, request: Any, row: HistoryRow) -> tuple[list[Any], dict[str, Any]]:
        """Return the recorded arguments as the task's annotations say; the request keeps them plain, for Celery."""
        text = row.arguments or codec.encode_arguments((), {}, "")
        request.args, request.kwargs = codec.plain_arguments(text)
        annotations = codec.annotations_of(task.run)
        args, kwargs = codec.decode_arguments(text, annotations)
        if row.kind is Kind.COMPENSATION and row.undoes is not None:
            if row.passes == "step":
                args[0] = self._undone_step(request.args[0])
            elif row.passes == "result" and args[0] is None and not codec.accepts_none(annotations, 0):
                raise errors.ResultNeeded(task.name, _first(annotations), row.undoes)
        return args, kwargs

    def _undone_step(self, plain: Any) -> codec.UndoneStep:
        task = self.app.tasks.get(plain["name"])
        return codec.decode_undone_step(plain, None if task is None else codec.annotations_of(task.run), 0)

    def _encoded(self, task: Any, result: Any) -> Ended:
        try:
            what = f"the result of {task.name}"
            return AttemptSucceeded(codec.encode(result, what, self.settings.max_payload_bytes))
        except errors.InvalidInput as error:
            # it took effect, and what it returned is lost: nobody can say what
            return AttemptDoubtful(codec.describe_error(error), is_final=True)

    def _ended_by(self, task: Any, error: BaseException) -> Ended:
        failure = codec.describe_error(error)
        unknown = self.registry.find_defaults(task.name).unknown_on
        if isinstance(error, (errors.OutcomeUnknown, SoftTimeLimitExceeded, Ignore, *unknown)):
            return AttemptDoubtful(failure)
        # SystemExit and the like end the process wherever the body was
        return AttemptFailed(failure) if isinstance(error, Exception) else AttemptDoubtful(failure)

    # --- settling -------------------------------------------------------------------------------------------------

    def _settle(self, row: HistoryRow, ended: Ended) -> None:
        was_held, outbox = self.coordinator.end_attempt(row.key, row.attempt, ended)
        if not was_held:
            logger.warning(
                "attempt %d of step %d of %s had been given up; what it came to changes nothing",
                row.attempt,
                row.seq,
                row.instance_id,
            )
        self.dispatcher.deliver(outbox)

    def _retry(self, row: HistoryRow, retry: Retry) -> None:
        """Celery's own retry: one commit releases the claim and records count, arguments and instant."""
        signature = retry.sig
        failure = codec.describe_error(retry.exc) if isinstance(retry.exc, BaseException) else _message(retry)
        unknown = self.registry.find_defaults(row.name).unknown_on
        values: dict[str, Any] = {}
        delay = 0.0
        if signature is not None:
            arguments = codec.encode_arguments(
                tuple(signature.args), signature.kwargs, f"the arguments of {row.name}", self.settings.max_payload_bytes
            )
            values = {
                "celery_retries": signature.options.get("retries", row.celery_retries + 1),
                "arguments": arguments,
            }
            delay = _seconds_until(signature.options, self.coordinator)
        if isinstance(retry.exc, unknown):
            values["is_in_doubt"] = True
        released, outbox = self.coordinator.release(
            row.key, row.attempt, delay_seconds=delay, failure=failure, values=values
        )
        if not released:
            self._settle(row, AttemptFailed(failure))
        self.dispatcher.deliver(outbox)

    def _reject(self, row: HistoryRow, rejection: Reject) -> None:
        failure = codec.describe_error(rejection)
        if not rejection.requeue:
            self._settle(row, AttemptFailed(failure))
            return
        released, outbox = self.coordinator.release(row.key, row.attempt, delay_seconds=0, failure=failure, values={})
        if not released:
            self._settle(row, AttemptFailed(failure))
        self.dispatcher.deliver(outbox)


def wrap(task: Any, steps: Callable[[], StepRunner]) -> None:
    """Let a task run as a step where its message says so; doing it twice is doing it once."""
    body = task.run
    if getattr(body, "runs_as_step", False):
        return

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        request = task.request
        header = None if request.called_directly else getattr(request, HEADER, None)
        if header is None or getattr(request, "is_inside_step", False):
            return body(*args, **kwargs)
        return steps().run(task, body, request, header)

    run.runs_as_step = True  # type: ignore[attr-defined]
    task.run = run
    _hold_back_retries(task)


@contextmanager
def _as_current(row: HistoryRow) -> Iterator[None]:
    step = CurrentStep(
        row.instance_id, row.run, row.seq, row.attempt, row.key.idempotency_key, cancel_requested=row.is_draining
    )
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def _hold_back_retries(task: Any) -> None:
    """Keep ``retry()`` inside a step from publishing: our commit comes first, and refuse ``replace()``."""
    signature_from_request, replace = task.signature_from_request, task.replace

    @functools.wraps(signature_from_request)
    def recorded(request: Any = None, *args: Any, **kwargs: Any) -> Any:
        signature = signature_from_request(request, *args, **kwargs)
        if getattr(task.request, "is_inside_step", False):
            signature.apply_async = _publish_nothing
        return signature

    @functools.wraps(replace)
    def refused(sig: Any) -> Any:
        if getattr(task.request, "is_inside_step", False):
            raise errors.ReplaceRefused(task.name)
        return replace(sig)

    task.signature_from_request, task.replace = recorded, refused


def _publish_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _seconds_until(options: dict[str, Any], coordinator: Coordinator) -> float:
    if options.get("eta") is not None:
        eta = options["eta"]
        aware = eta if eta.tzinfo else eta.astimezone()
        return max(0.0, float((aware - coordinator.clock()).total_seconds()))
    return float(options.get("countdown") or 0.0)


def _message(retry: Retry) -> Failure:
    return Failure("celery.exceptions.Retry", ("builtins.Exception",), str(retry))


def _first(annotations: codec.Annotations) -> str:
    return annotations.positional[0] if annotations.positional else "*args"
