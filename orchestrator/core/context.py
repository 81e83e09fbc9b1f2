"""``ctx``: what workflow code calls."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Literal

from orchestrator import errors
from orchestrator.core.handles import GroupHandle, Handle, StepHandle, TimerHandle, first_failure, in_place, leaves
from orchestrator.core.passes import Pass, is_programming_error
from orchestrator.core.records import Compensation, ScheduleStep, StartTimer, Wake
from orchestrator.core.retry import RetryPolicy
from orchestrator.core.saga import Batch, Node

__all__ = ["Context"]

Seconds = float | timedelta

#: What the columns hold that ``orchestrator.list`` filters by.
LONGEST_ATTRIBUTE_NAME, LONGEST_ATTRIBUTE = 100, 255


class Context:
    """The first argument of every workflow function; see each method for what it asks for.

    A workflow function is run again from the top whenever something it waits for has happened, so everything that is
    not a pure function of its arguments must go through here.
    """

    def __init__(self, current: Pass) -> None:
        self._pass = current
        self._drawn = 0
        self._uuids = 0
        self._attributes: dict[str, Any] = {}
        self._progress: str | None = None
        # nor does it speak in a suspended pass, whose ``finally`` blocks run again every time
        self.logger = current.host.logger(lambda: self.is_replaying or current.ending is not None)

    # --- steps ----------------------------------------------------------------------------------------------------

    def run(
        self,
        step: Any,
        *,
        compensate: Any = None,
        retry: RetryPolicy | None = None,
        timeout: Seconds | None = None,
        returns: Any = None,
        optional: bool = False,
        foreign: bool = False,
    ) -> Any:
        """Run a Celery signature (or a bare task without arguments) as a step; wait for it and return its result.

        ``compensate`` is a signature or bare task that undoes it (``.s()`` gets the step's result first, ``.si()`` does
        not), or ``False`` to have none.  ``timeout`` counts from the first dispatch.  ``returns`` is the type of the
        result, where the task's own annotation does not say it.  A group of signatures runs its members as steps and
        returns their results as a list.

        Raises ``StepFailed``, which is also the activity's own exception, unless ``optional`` is set: then a failure is
        recorded and ``None`` returned.  A redelivery of the step's message runs nothing twice.
        """
        handle = self.start(
            step,
            compensate=compensate,
            retry=retry,
            timeout=timeout,
            returns=returns,
            optional=optional,
            foreign=foreign,
        )
        return handle.get()

    def start(
        self,
        step: Any,
        *,
        compensate: Any = None,
        retry: RetryPolicy | None = None,
        timeout: Seconds | None = None,
        returns: Any = None,
        optional: bool = False,
        foreign: bool = False,
    ) -> Any:
        """Schedule a step as ``run`` does, without waiting for it; return its handle."""
        plan = self._plan(step, compensate=compensate, retry=retry, timeout=timeout, foreign=foreign)
        return self._begin(plan, optional=optional, returns=returns)

    def _plan(self, step: Any, **settings: Any) -> ScheduleStep | list[ScheduleStep]:
        """Read a step or a group whole, before any of it is asked for: a call that is refused leaves nothing behind."""
        self._pass.check_live()
        members = self._pass.host.read_members(step)
        if members is None:
            return self._schedule(step, **settings)
        return [self._schedule(member, **settings) for member in members]

    def _begin(
        self, plan: ScheduleStep | list[ScheduleStep], *, optional: bool = False, returns: Any = None
    ) -> StepHandle | GroupHandle:
        if isinstance(plan, list):
            return GroupHandle(self._pass, [self._begin(one, optional=optional, returns=returns) for one in plan])
        node = self._pass.ask(plan, optional=optional, returns=returns)
        self._pass.scope.batches.append(Batch([node]))
        return StepHandle(self._pass, [node])

    def _schedule(
        self,
        step: Any,
        *,
        compensate: Any = None,
        retry: RetryPolicy | None = None,
        timeout: Seconds | None = None,
        foreign: bool = False,
        item: tuple[Any, ...] = (),
        lane: int | None = None,
        held: bool = False,
    ) -> ScheduleStep:
        self._pass.check_live()
        call = self._pass.host.read_call(step, item)
        if not foreign:  # a worker without this package tells nobody what it knows
            self._check_known(call.name)
        seconds = _seconds(timeout, "timeout") if timeout is not None else call.timeout_seconds
        if foreign and seconds is None:
            raise errors.ContextMisused(
                f"{call.name} is foreign, so only a timeout can tell that it was lost; give one"
            )
        return ScheduleStep(
            call.name,
            self._pass.scope.path,
            call.arguments,
            call.options,
            self._compensation(compensate, call.compensation),
            inherits_compensation=compensate is None,
            retry=retry or call.retry,
            timeout_seconds=seconds,
            foreign=foreign,
            lane=lane,
            held=held,
        )

    def _compensation(self, compensate: Any, registered: Compensation | None) -> Compensation | None:
        if compensate is None:
            return registered
        if compensate is False:
            return None
        plan = self._pass.host.read_compensation(compensate)
        self._check_known(plan.name)
        return plan

    def _check_known(self, name: str) -> None:
        # what is recorded was known once, and a replay must not depend on which workers happen to be alive
        if self._pass.is_at_frontier:
            self._pass.host.check_known(name)

    def gather(self, *steps: Any, return_exceptions: bool = False) -> list[Any]:
        """Wait for all of ``steps`` (handles, or signatures to start) to settle; return their results in order.

        Then raises the failure with the lowest ``seq``; with ``return_exceptions`` failures come back in place.
        """
        handles = self._handles(steps)
        nodes = leaves(handles)
        self._pass.wait_for(nodes)
        first = first_failure(nodes)
        for node in nodes:
            node.is_observed = True
        if first is not None and not return_exceptions:
            self._pass.value_of(first)
        return [in_place(handle) if return_exceptions else handle._value() for handle in handles]

    def wait(self, *steps: Any, count: int = 1, timeout: Seconds | None = None) -> tuple[list[Handle], list[Handle]]:
        """Wait until ``count`` of ``steps`` have settled, or ``timeout`` has passed; return ``(done, pending)``.

        Never raises for a failure: ask the handles.
        """
        handles = list(dict.fromkeys(self._handles(steps)))
        if not 0 < count <= len(handles):
            raise errors.ContextMisused(f"ctx.wait was asked for {count} of {len(handles)} handles")
        if any(len(handle._nodes) != 1 for handle in handles):
            raise errors.ContextMisused("ctx.wait takes single steps and timers; wait for a group with ctx.gather")
        nodes = leaves(handles)
        if timeout is None:
            self._pass.wait_for(nodes, count)
        else:
            timer = self._timer(_seconds(timeout, "timeout"))
            self._pass.wait_for(nodes, count, alone=[timer])
            self._pass.stop_timer(timer)
        done = [handle for handle in handles if handle.ready()]
        return done, [handle for handle in handles if not handle.ready()]

    def _handles(self, steps: Iterable[Any]) -> list[Handle]:
        self._pass.check_live()
        plans = [step if isinstance(step, Handle) else self._plan(step) for step in steps]
        return [plan if isinstance(plan, Handle) else self._begin(plan) for plan in plans]

    def map(
        self,
        step: Any,
        items: Iterable[Any],
        *,
        concurrency: int | None = None,
        on_failure: Literal["stop", "collect"] = "stop",
        compensate: Any = None,
        retry: RetryPolicy | None = None,
        timeout: Seconds | None = None,
        returns: Any = None,
    ) -> list[Any]:
        """Run ``step`` once for each of ``items``, the item as its first argument; return the results in order.

        At most ``concurrency`` are dispatched at a time, and undone at a time.  ``on_failure="stop"``: the first
        failure withdraws what has not begun and waits for what has; then the failure with the lowest ``seq`` is raised.
        ``"collect"``: failures come back in place.
        """
        if concurrency is not None and concurrency < 1:
            raise errors.ContextMisused(f"ctx.map was given concurrency={concurrency}; at least 1 is needed")
        if on_failure not in ("stop", "collect"):
            raise errors.ContextMisused(f"ctx.map knows on_failure='stop' and 'collect', not {on_failure!r}")
        self._pass.check_live()
        every = list(items)
        limited = concurrency is not None and concurrency < len(every)
        first = len(self._pass.nodes)
        commands = [
            self._schedule(
                step,
                compensate=compensate,
                retry=retry,
                timeout=timeout,
                item=(item,),
                lane=first if limited else None,
                held=limited and concurrency is not None and index >= concurrency,
            )
            for index, item in enumerate(every)
        ]
        nodes: list[Node] = []
        self._pass.scope.batches.append(Batch(nodes, concurrency))
        for command in commands:
            nodes.append(self._pass.ask(command, returns=returns))
        stops = on_failure == "stop"
        self._pass.wait_for(nodes, wake=Wake.FAILURE if stops else Wake.COUNT)
        failed = first_failure(nodes)
        if stops and failed is not None:
            self._pass.drain(nodes)
            failed = min((n for n in nodes if n.is_failure and n.outcome != "withdrawn"), key=lambda n: n.seq)
        for node in nodes:
            node.is_observed = True
        if stops and failed is not None:
            self._pass.value_of(failed)
        return [in_place(StepHandle(self._pass, [node])) for node in nodes]

    # --- compensation ---------------------------------------------------------------------------------------------

    def saga(self, *, parallel: bool = False) -> AbstractContextManager[None]:
        """Open a nested scope: an exception that leaves it undoes its own steps first, then goes on.

        When it ends well, its compensations pass to the scope around it.  ``parallel`` undoes its steps together.
        """
        return _OpenScope(self._pass, parallel)

    def compensate(self, signature: Any, *, retry: RetryPolicy | None = None) -> None:
        """Register a compensation by hand, from here on; it gets no result."""
        self._pass.check_live()
        plan = self._pass.host.read_compensation(signature, retry, of_step=False)
        self._check_known(plan.name)
        self._pass.register(plan)

    def commit(self) -> None:
        """Let what has been done so far stay done: its compensations are forgotten, in every open scope.

        Steps that have not settled yet, and those in doubt, keep theirs.
        """
        self._pass.check_live()
        for scope in self._pass.scope.enclosing():
            for node in scope.nodes():
                if node.is_settled and not node.is_in_doubt:
                    node.is_committed = True

    def accept(self, step: StepHandle | errors.StepFailed) -> None:
        """Take on a step in doubt: it is no longer undone when its scope ends well."""
        self._pass.check_live()
        if not isinstance(step, StepHandle | errors.StepFailed):
            raise errors.ContextMisused(f"ctx.accept takes a handle or the StepFailed that was raised, not {step!r}")
        self._pass.nodes[step.seq].is_accepted = True

    # --- time, randomness and the outside -------------------------------------------------------------------------

    def sleep(self, duration: Seconds) -> None:
        """Wait durably for ``duration``, in seconds or as a timedelta."""
        self._pass.wait_for([self._timer(_seconds(duration, "duration"))])

    def timer(self, duration: Seconds) -> TimerHandle:
        """Start a timer and return its handle, to be waited for together with others."""
        return TimerHandle(self._pass, [self._timer(_seconds(duration, "duration"))])

    def _timer(self, seconds: float) -> Node:
        return self._pass.ask(StartTimer(self._pass.scope.path, seconds=seconds))

    def now(self) -> datetime:
        """Return the time of the last outcome delivered: aware, UTC, never earlier than before."""
        self._pass.check_live()
        return self._pass.now

    def random(self) -> float:
        """Return a number in [0, 1), the same on every replay."""
        self._pass.check_live()
        self._drawn += 1
        return int.from_bytes(self._digest(f"random:{self._drawn}")[:7], "big") / 2**56

    def uuid4(self, key: str | None = None) -> uuid.UUID:
        """Return a UUID, the same on every replay: the next one, or the one of ``key``."""
        self._pass.check_live()
        if key is None:
            self._uuids += 1
        return uuid.UUID(bytes=self._digest(f"uuid:{self._uuids}" if key is None else f"key:{key}")[:16], version=4)

    def _digest(self, name: str) -> bytes:
        history = self._pass.history
        return hashlib.sha256(f"{history.instance_id}\0{history.generation}\0{history.run}\0{name}".encode()).digest()

    def local(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function(*args)`` here, without a message, and record its result in the same commit.

        It runs once, unless the commit is lost; ``ctx`` cannot be used inside.  What it raises is recorded as a failed
        step would be.
        """
        name = getattr(function, "__qualname__", None)
        if name is None:
            raise errors.ContextMisused(f"ctx.local takes a function, not {function!r}")
        return self._pass.value_of(self._pass.perform(name, function, args))

    def patched(self, change_id: str) -> bool:
        """Tell whether this run takes the new path of a change; the first answer for an id and run holds."""
        return self._pass.patched(change_id)

    @property
    def is_replaying(self) -> bool:
        """Whether an earlier pass has been here already."""
        seen = self._pass.history.seen_order
        return seen is not None and self._pass.order <= seen

    # --- what monitors show ---------------------------------------------------------------------------------------

    def set_attributes(self, **attributes: str | int | float | bool | None) -> None:
        """Set what ``orchestrator.list(attributes=…)`` filters by."""
        self._pass.check_live()
        for name, value in attributes.items():
            text = self._pass.host.encode(value, f"the attribute {name}")
            if len(name) > LONGEST_ATTRIBUTE_NAME:
                longest = f"at most {LONGEST_ATTRIBUTE_NAME} characters"
                raise errors.ContextMisused(f"{name[:60]!r}… cannot be the name of an attribute: {longest} are allowed")
            if len(text) > LONGEST_ATTRIBUTE:
                raise errors.PayloadTooLarge(f"the attribute {name}", len(text), LONGEST_ATTRIBUTE)
        self._attributes.update(attributes)

    def set_progress(self, text: str) -> None:
        """Set the line of text that monitors show for this instance."""
        self._pass.check_live()
        self._progress = text


class _OpenScope(AbstractContextManager[None]):
    def __init__(self, current: Pass, parallel: bool) -> None:
        self._pass = current
        self._parallel = parallel

    def __enter__(self) -> None:
        self._pass.check_live()
        self._pass.scope = self._scope = self._pass.scope.open_inner(self._parallel)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pass.check_live()
        if error is None:
            try:
                self._pass.end_scope(self._scope)
            except errors.StepFailed as failure:
                self._undo(failure)
                raise
            self._leave()
        elif isinstance(error, Exception):
            self._undo(error)

    def _undo(self, error: Exception) -> None:
        if is_programming_error(error):
            self._pass.break_off(error)
        not_undone = self._pass.undo_scope(self._scope)
        self._leave()
        if not_undone:
            raise errors.CompensationFailed(not_undone) from error

    def _leave(self) -> None:
        assert self._scope.parent is not None
        self._pass.scope = self._scope.parent


def _seconds(duration: Seconds, what: str) -> float:
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise errors.ContextMisused(f"{what} is {duration!r}; give seconds or a timedelta")
    if not 0 <= seconds < 10**10:
        raise errors.ContextMisused(f"{what} is {duration!r}; it cannot be negative or endless")
    return float(seconds)
