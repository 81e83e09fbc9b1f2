"""``ctx``: running steps and children, one by one, together, or over many items."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from orchestrator import errors
from orchestrator.core.calls.durations import Seconds
from orchestrator.core.calls.part import Part
from orchestrator.core.calls.plans import (
    PLAIN,
    RECORDED,
    OnParentEnd,
    Plan,
    StepSettings,
    child_id,
    plan_each,
    plan_map,
    plan_steps,
)
from orchestrator.core.ending import drain
from orchestrator.core.handles import (
    ChildHandle,
    GroupHandle,
    Handle,
    StepHandle,
    first_failure,
    in_place,
    leaves,
)
from orchestrator.core.records import Kind, Wake
from orchestrator.core.retry import RetryPolicy
from orchestrator.core.saga import Batch, Node


class StepCalls(Part):
    """Scheduling and waiting for steps."""

    def run(
        self,
        step: Any,
        *,
        compensate: Any = None,
        retry: RetryPolicy | None = None,
        timeout: Seconds | None = None,
        returns: Any = None,
        pivot: bool = False,
        optional: bool = False,
        foreign: bool = False,
        on_parent_end: OnParentEnd = "cancel",
    ) -> Any:
        """Run a Celery signature (or a bare task without arguments) as a step; wait for it and return its result.

        ``compensate`` is a signature or bare task that undoes it (``.s()`` gets the step's result first, ``.si()`` does
        not), or ``False`` to have none.  ``timeout`` counts from the first dispatch.  ``returns`` is the type of the
        result, where the task's own annotation does not say it.  A group of signatures runs its members as steps and
        returns their results as a list.  A workflow's signature starts a child instance, which by default is undone by
        its own compensations, and cancelled with its parent (``on_parent_end="leave"``: left alone).

        ``pivot`` makes it the point of no return: once it has succeeded, nothing before it is undone any more, and a
        step that fails after it blocks the instance, for an operator, instead of raising.

        Raises ``StepFailed``, which is also the activity's own exception, unless ``optional`` is set: then a failure is
        recorded and ``None`` returned.  A redelivery of the step's message runs nothing twice.
        """
        self._pass.check_live()
        self._pass.raise_cancellation()
        settings = StepSettings(compensate, retry, timeout, pivot, optional, foreign, on_parent_end)
        return self._begin(plan_steps(self._pass, step, settings), settings, returns).get()

    def start(
        self,
        step: Any,
        *,
        compensate: Any = None,
        retry: RetryPolicy | None = None,
        timeout: Seconds | None = None,
        returns: Any = None,
        pivot: bool = False,
        optional: bool = False,
        foreign: bool = False,
        on_parent_end: OnParentEnd = "cancel",
    ) -> Any:
        """Schedule a step as ``run`` does, without waiting for it; return its handle."""
        self._pass.check_live()
        settings = StepSettings(compensate, retry, timeout, pivot, optional, foreign, on_parent_end)
        return self._begin(plan_steps(self._pass, step, settings), settings, returns)

    def _begin(
        self,
        plan: Plan | list[Plan],
        settings: StepSettings = PLAIN,
        returns: Any = None,
    ) -> StepHandle | GroupHandle:
        current = self._pass
        if isinstance(plan, list):
            return GroupHandle(current, [self._begin(one, settings, returns) for one in plan])
        if plan is RECORDED:
            node = current.replay(optional=settings.optional, is_pivot=settings.pivot, returns=returns)
        else:
            node = current.ask(plan, optional=settings.optional, returns=returns)
        if node.record.kind is not Kind.CHILD:
            current.scope.batches.append(Batch([node]))
            return StepHandle(current, [node])
        if settings.on_parent_end == "cancel":  # the scope ends without one that is left alone
            current.scope.batches.append(Batch([node]))
        # of a fork the record tells: the id is made of its origin's
        return ChildHandle(current, [node], node.record.child_id or child_id(current, node.seq))

    def gather(self, *steps: Any, return_exceptions: bool = False) -> list[Any]:
        """Wait for all of ``steps`` (handles, or signatures to start) to settle; return their results in order.

        Then raises the failure with the lowest ``seq``; with ``return_exceptions`` failures come back in place.
        """
        self._pass.check_live()
        self._pass.raise_cancellation()
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

        ``steps`` are handles of steps, children, timers and messages, or signatures to start.  Never raises for a
        failure: ask the handles.
        """
        self._pass.check_live()
        self._pass.raise_cancellation()
        handles = list(dict.fromkeys(self._handles(steps)))
        if not 0 < count <= len(handles):
            raise errors.ContextMisused(f"ctx.wait was asked for {count} of {len(handles)} handles")
        if any(len(handle._nodes) != 1 for handle in handles):
            raise errors.ContextMisused(
                "ctx.wait takes single steps, children, timers and messages; wait for a group with ctx.gather"
            )
        nodes = leaves(handles)
        if timeout is None:
            self._pass.wait_for(nodes, count)
        else:
            timer = self._timer(timeout, "timeout")
            self._pass.wait_for(nodes, count, alone=[timer], own=[timer])
            self._pass.stop_waiting(timer)
        done = [handle for handle in handles if handle.ready()]
        return done, [handle for handle in handles if not handle.ready()]

    def _handles(self, steps: Iterable[Any]) -> list[Handle]:
        self._pass.check_live()
        every = list(steps)
        plans = iter(plan_each(self._pass, [step for step in every if not isinstance(step, Handle)]))
        return [step if isinstance(step, Handle) else self._begin(next(plans)) for step in every]

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
        self._pass.raise_cancellation()
        settings = StepSettings(compensate, retry, timeout, optional=on_failure == "collect")
        plans = plan_map(self._pass, step, list(items), settings, concurrency)
        nodes: list[Node] = []
        self._pass.scope.batches.append(Batch(nodes, concurrency))
        for plan in plans:
            nodes.append(
                self._pass.replay(returns=returns) if plan is RECORDED else self._pass.ask(plan, returns=returns)
            )
        stops = on_failure == "stop"
        self._pass.wait_for(nodes, wake=Wake.FAILURE if stops else Wake.COUNT)
        failed = first_failure(nodes)
        if stops and failed is not None:
            drain(self._pass, nodes)
            failed = min((n for n in nodes if n.is_failure and n.outcome != "withdrawn"), key=lambda n: n.seq)
        for node in nodes:
            node.is_observed = True
        if stops and failed is not None:
            self._pass.value_of(failed)
        return [in_place(StepHandle(self._pass, [node])) for node in nodes]
