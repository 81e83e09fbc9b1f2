"""What wraps a task while it runs as a step: claim, run the body, settle.

Tasks are used as they are.  When a worker starts, the ``run`` of every registered task is wrapped; a message without
our header goes straight through.  A message with it is a doorbell: the wrapper claims the step it names, and what does
not hold the claim runs nothing.
"""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown, WorkerTerminate
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import codec, errors
from orchestrator.core.attempts import AttemptDoubtful, AttemptFailed, AttemptSucceeded, Ended
from orchestrator.core.records import Failure, Kind, Outcome
from orchestrator.runtime import softlimit
from orchestrator.runtime.claims import Claims
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.current import CancelProbe, CurrentStep, as_current
from orchestrator.runtime.dispatch import HEADER, Dispatcher, begins_step, read_header
from orchestrator.runtime.handoff import HandOff
from orchestrator.runtime.logs import about
from orchestrator.runtime.registry import Registry
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.softlimit import SoftLimit
from orchestrator.runtime.transactional import GivenUp, TransactionalBodies, follow
from orchestrator.store import history
from orchestrator.store.claiming import Held
from orchestrator.store.history import HistoryRow, StepKey

logger = logging.getLogger("orchestrator")

#: What of the options of a retry is a column of the record.
_OWN_COLUMNS = ("retries", "countdown", "eta")


@dataclass(frozen=True, slots=True)
class AskedRetry:
    """What a body asked for by ``retry()``: its next message, and the options given to that call."""

    signature: Any
    options: dict[str, Any]


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
        hand_off: HandOff,
        bodies: Callable[[], TransactionalBodies],
    ) -> None:
        self.app = app
        self.settings = settings
        self.registry = registry
        self.coordinator = coordinator
        self.claims = claims
        self.dispatcher = dispatcher
        self.hand_off = hand_off
        self.bodies = bodies

    def run(self, task: Any, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one delivery of a step's message: to its end if it can be claimed, else not at all."""
        request = task.request
        key, dispatch = read_header(getattr(request, HEADER))
        request.is_inside_step = False  # from here on what is raised is not the task's before its body
        plan = self.registry.find_plan(task.name)
        with (
            softlimit.deferred(in_pool_process=self.claims.state.is_child) as limit,
            self._holding(key, task.name, dispatch, codec.dump(plan) if plan is not None else None) as held,
        ):
            if held is None:
                old = "%s[%s]: not claimed, its message is old or doubled"
                logger.info(old, task.name, request.id, extra=about(key))
                raise Ignore
            request.is_inside_step = True
            # a base class with a ``__call__`` of its own may give its body other arguments than the message has
            own = None if (list(args), kwargs) == (list(request.args), request.kwargs) else (args, kwargs)
            call = functools.partial(self._call, task, body, held.row, limit, own)
            with self.coordinator.instrumentation.attempt(held.row):
                return self._run_claimed(task, held, call)

    @contextmanager
    def _holding(self, key: StepKey, name: str, dispatch: int, plan: str | None) -> Iterator[Held | None]:
        """Claim a step for as long as the block runs, unless this process holds it already."""
        held = self.hand_off.find_held(key, dispatch)
        if held is not None:
            yield held
            return
        with self.claims.executing(key, dispatch):
            yield self.claims.claim(key, name, dispatch, plan)

    def _run_claimed(self, task: Any, held: Held, call: Callable[..., Any]) -> Any:
        if self.registry.find_defaults(task.name).is_transactional:
            return self._run_transactional(task, held, call)
        with self._settling_what_is_raised(task, held):
            result = call()
        ended = self._encoded(task, result)
        self._settle(held, ended, task)
        return _for_celery(task, task.request, result, ended)

    def _run_transactional(self, task: Any, held: Held, call: Callable[..., Any]) -> Any:
        def encode(result: Any) -> str:
            return codec.encode(result, f"the result of {task.name}", self.settings.max_payload_bytes)

        with self._settling_what_is_raised(task, held):
            committed = self.bodies().run_step(held.row, call, encode)
        follow(self.coordinator, self.dispatcher, committed.change.outbox)
        return _for_celery(task, task.request, committed.result, committed.ended)

    @contextmanager
    def _settling_what_is_raised(self, task: Any, held: Held) -> Iterator[None]:
        """Settle a step, or give it back, by what its body raised."""
        try:
            yield
        except GivenUp:
            _log_given_up(held.row, "what it wrote was rolled back")
            raise Ignore from None
        except Retry as retry:
            self._retry(held, retry, task.request.step_retry)
            raise
        except Reject as rejection:
            self._reject(held, rejection)
            raise Ignore from rejection
        except BaseException as error:
            if not _is_told_to_end(error):
                self._settle(held, self._ended_by(task, error), task if isinstance(error, Exception) else None)
            raise

    def fail_unbegun(self, task: Any, request: Any, error: BaseException) -> None:
        """Settle a step whose task raised before its body (in ``before_start``, or a ``__call__`` of its own)."""
        key, dispatch = read_header(getattr(request, HEADER))
        with self._holding(key, task.name, dispatch, None) as held:
            if held is not None:
                self._settle(held, self._ended_by(task, error))

    def _call(
        self, task: Any, body: Callable[..., Any], row: HistoryRow, limit: SoftLimit, own: Any, **given: Any
    ) -> Any:
        """Call the body; a retry that it asked for holds, whatever it did afterwards."""
        request = task.request
        request.step_retry = None
        recorded = self._arguments(task, request, row)
        args, kwargs = own or recorded
        try:
            around = self.coordinator.instrumentation.body(row)
            with as_current(self._step(row)), around, limit.allowed():
                result = body(*args, **kwargs, **given)
        except Retry:
            raise
        except Exception as error:
            if request.step_retry is None:
                raise
            raise Retry(exc=error, sig=request.step_retry.signature) from error
        if request.step_retry is not None:  # retry(throw=False)
            raise Retry(sig=request.step_retry.signature)
        return result

    def _step(self, row: HistoryRow) -> CurrentStep:
        probe = CancelProbe(lambda: self._is_unwanted(row))
        return CurrentStep(row.instance_id, row.run, row.seq, row.attempt, row.key.idempotency_key, probe)

    def _is_unwanted(self, row: HistoryRow) -> bool:
        try:
            with self.coordinator.store.read("is-unwanted") as connection:
                current = history.find_row(connection, row.key)
        except (SQLAlchemyError, errors.StoreUnreachable):
            return False  # nobody can say, and the body must not fail for it
        return current is None or current.attempt != row.attempt or current.is_draining or current.is_revoked

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
                self._check_result_known(task.name, _first(annotations), replace(row.key, seq=row.undoes))
        return args, kwargs

    def _check_result_known(self, name: str, parameter: str, undone: StepKey) -> None:
        """Refuse to undo a step with ``None`` where that is not what the step returned."""

        def once() -> HistoryRow | None:
            with self.coordinator.store.read("undone-step") as connection:
                return history.find_row(connection, undone)

        step = self.coordinator.store.retrying(once, patience_seconds=self.settings.store_patience)
        if step is None or Outcome.SUCCEEDED not in (step.outcome, step.late_outcome):
            raise errors.ResultNeeded(name, parameter, undone.seq)

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
        if isinstance(error, Ignore) or self._leaves_doubt(task.name, error):
            return AttemptDoubtful(failure)
        # sys.exit() in a library ends the process wherever the body was
        return AttemptFailed(failure) if isinstance(error, Exception) else AttemptDoubtful(failure)

    def _leaves_doubt(self, name: str, error: object) -> bool:
        unknown = self.registry.find_defaults(name).unknown_on
        return isinstance(error, (errors.OutcomeUnknown, SoftTimeLimitExceeded, *unknown))

    # --- settling -------------------------------------------------------------------------------------------------

    def _settle(self, held: Held, ended: Ended, task: Any = None) -> None:
        """Settle a step; the process of ``task`` may be handed the next one."""
        row = held.row
        with self.hand_off.offering(task) as offer:
            was_held, outbox = self.coordinator.end_attempt(row.key, row.attempt, ended, offer=offer, held=held)
            self.hand_off.take(outbox)
        if not was_held:
            _log_given_up(row, "what it came to changes nothing")
        self.dispatcher.deliver(outbox)

    def _retry(self, held: Held, retry: Retry, asked: AskedRetry | None) -> None:
        """Celery's own retry: one commit releases the claim and records count, arguments and instant."""
        row = held.row
        failure = codec.describe_error(retry.exc) if isinstance(retry.exc, BaseException) else _message(retry)
        is_in_doubt = self._leaves_doubt(row.name, retry.exc)
        ended = AttemptDoubtful(failure) if is_in_doubt else AttemptFailed(failure)
        if asked is None:  # raised by hand: in Celery too nothing would follow
            self._settle(held, ended)
            return
        try:
            values = self._values_of(row, asked)
            delay = _seconds_until(asked.signature.options, self.coordinator)
        except (TypeError, ValueError) as error:  # arguments or options that cannot be recorded
            self._settle(held, AttemptFailed(codec.describe_error(error)))
            return
        if is_in_doubt:
            values["is_in_doubt"] = True
        released, outbox = self.coordinator.release(
            row.key, row.attempt, delay_seconds=delay, failure=failure, values=values
        )
        if not released:
            self._settle(held, ended)
        self.dispatcher.deliver(outbox)

    def _values_of(self, row: HistoryRow, asked: AskedRetry) -> dict[str, Any]:
        """Return the columns that a retry changes."""
        signature, limit = asked.signature, self.settings.max_payload_bytes
        what = f"the arguments of {row.name}"
        values = {
            "celery_retries": signature.options["retries"],
            "arguments": codec.encode_arguments(tuple(signature.args), signature.kwargs, what, limit),
        }
        if asked.options:
            options = {**row.message_options, **asked.options}
            values["options"] = codec.encode(options, f"the options of {row.name}", limit)
        return values

    def _reject(self, held: Held, rejection: Reject) -> None:
        row = held.row
        failure = replace(codec.describe_error(rejection), message=str(rejection.reason))
        if not rejection.requeue:
            self._settle(held, AttemptFailed(failure))
            return
        released, outbox = self.coordinator.release(row.key, row.attempt, delay_seconds=0, failure=failure, values={})
        if not released:
            self._settle(held, AttemptFailed(failure))
        self.dispatcher.deliver(outbox)


def wrap(task: Any, steps: Callable[[], StepRunner]) -> None:
    """Let a task run as a step where its message says so; doing it twice is doing it once."""
    body = task.run
    if getattr(body, "runs_as_step", False):
        return

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not begins_step(task.request):
            return body(*args, **kwargs)
        return steps().run(task, body, args, kwargs)

    run.runs_as_step = True  # type: ignore[attr-defined]
    task.run = run
    _hold_back_retries(task)


def _hold_back_retries(task: Any) -> None:
    """Keep ``retry()`` inside a step from publishing: our commit comes first, and refuse ``replace()``."""
    signature_from_request, replace_task = task.signature_from_request, task.replace

    @functools.wraps(signature_from_request)
    def recorded(request: Any = None, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        signature = signature_from_request(request, args, kwargs, **options)
        own = task.request
        if getattr(own, "is_inside_step", False):
            given = {name: value for name, value in options.items() if name not in _OWN_COLUMNS and value is not None}

            def record(*_args: Any, **_options: Any) -> None:
                own.step_retry = AskedRetry(signature, given)

            signature.apply_async = record
        return signature

    @functools.wraps(replace_task)
    def refused(sig: Any) -> Any:
        if getattr(task.request, "is_inside_step", False):
            raise errors.ReplaceRefused(task.name)
        return replace_task(sig)

    task.signature_from_request, task.replace = recorded, refused


def _seconds_until(options: dict[str, Any], coordinator: Coordinator) -> float:
    if options.get("eta") is not None:
        eta = options["eta"]
        aware = eta if eta.tzinfo else eta.astimezone()
        return max(0.0, float((aware - coordinator.clock()).total_seconds()))
    return float(options.get("countdown") or 0.0)


def _message(retry: Retry) -> Failure:
    return Failure("celery.exceptions.Retry", ("builtins.Exception",), str(retry))


def _is_told_to_end(error: BaseException) -> bool:
    """Tell whether a signal ends this process.  Its claim stays: whoever finds it orphaned knows what that means."""
    if isinstance(error, KeyboardInterrupt | WorkerShutdown | WorkerTerminate) or _is_terminated_in_body():
        return True
    # billiard's way of telling which signal a pool process was ended by
    return isinstance(error, SystemExit) and isinstance(error.code, int) and 0 < 256 + error.code < signal.NSIG


def _is_terminated_in_body() -> bool:
    """Tell whether a cold shutdown has been ordered in the thread that runs this.

    In the solo pool that is where bodies run, and Celery, which cannot end its own process, raises there what has
    nothing to do with them.
    """
    from celery.worker import state  # of workers alone, which other processes do not load

    is_ordered = state.should_terminate not in (None, False)
    return is_ordered and threading.current_thread() is threading.main_thread()


def _log_given_up(row: HistoryRow, what_follows: str) -> None:
    step = row.attempt, row.seq, row.instance_id
    logger.warning("attempt %d of step %d of %s had been given up; %s", *step, what_follows, extra=about(row))


def _for_celery(task: Any, request: Any, result: Any, ended: Ended) -> Any:
    """Return what Celery is told: as plain JSON where it is going to write it down, for our codec knows more types."""
    is_written = request.callbacks or not (request.ignore_result or isinstance(task.backend, DisabledBackend))
    return codec.decode(ended.result) if is_written and isinstance(ended, AttemptSucceeded) else result


def _first(annotations: codec.Annotations) -> str:
    return annotations.positional[0] if annotations.positional else "*args"
