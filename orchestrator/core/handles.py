"""What ``ctx.start``, ``ctx.timer`` and ``ctx.message`` return: something to wait for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator import errors
from orchestrator.core.ending import undo_nodes
from orchestrator.core.failing import failure_of
from orchestrator.core.passes import Pass
from orchestrator.core.records import Kind, Outcome
from orchestrator.core.saga import Node

__all__ = ["ChildHandle", "GroupHandle", "Handle", "MessageHandle", "StepHandle", "TimerHandle", "leaves"]


class Handle:
    """Something that a workflow has started and can wait for."""

    def __init__(self, current: Pass, nodes: Sequence[Node]) -> None:
        self._pass = current
        self._nodes = nodes

    def ready(self) -> bool:
        """Tell whether it has settled, as far as the workflow has been told; never waits."""
        self._pass.check_live()
        return all(node.is_settled for node in self._nodes)

    def get(self) -> Any:
        """Wait until it has settled and return its result, or raise its failure."""
        if len(self._nodes) == 1:
            self._pass.wait_for_one(self._nodes[0])
        else:
            self._pass.wait_for(self._nodes)
        return self._value()

    def _value(self) -> Any:
        raise AssertionError("every kind of handle has its own value")


class _Steps(Handle):
    """What a step and a group of steps have in common."""

    @property
    def error(self) -> errors.StepFailed | None:
        """The failure with the lowest ``seq`` among what has settled, ``None`` while there is none.

        Reading it takes notice of that failure: the scope no longer fails for it at its end.
        """
        self._pass.check_live()
        failed = min((node for node in self._nodes if node.is_failure), key=lambda node: node.seq, default=None)
        return None if failed is None else failure_of(failed)

    def cancel(self) -> None:
        """Withdraw what has not begun; wait until the attempts of what has have ended, and undo it.

        Raises ``CompensationFailed`` when it could not be undone.
        """
        self._pass.check_live()
        open_nodes = [node for node in self._nodes if not node.is_undone]
        failed = undo_nodes(self._pass, open_nodes) if open_nodes else ()
        if failed:
            raise errors.CompensationFailed(failed)


class StepHandle(_Steps):
    """A step that was started."""

    @property
    def seq(self) -> int:
        """The number of the step in the history of this run."""
        return self._nodes[0].seq

    @property
    def name(self) -> str:
        """The name of the step's task."""
        return self._nodes[0].record.name

    def _value(self) -> Any:
        return self._pass.value_of(self._nodes[0])

    def __repr__(self) -> str:
        return f"<StepHandle {self.seq} {self.name}>"


class ChildHandle(StepHandle):
    """A child instance that was started."""

    def __init__(self, current: Pass, nodes: Sequence[Node], instance_id: str) -> None:
        super().__init__(current, nodes)
        self._planned_id = instance_id

    @property
    def instance_id(self) -> str:
        """The id of the child; of one that an operator had another take the place of, the other's."""
        return self._nodes[0].record.child_id or self._planned_id

    def __repr__(self) -> str:
        return f"<ChildHandle {self.seq} {self.name} {self.instance_id}>"


class _Awaited(Handle):
    """What a timer and a message have in common: nothing happens that could be undone."""

    def cancel(self) -> None:
        """Stop waiting for it."""
        self._pass.stop_waiting(self._nodes[0])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._nodes[0].seq}>"


class TimerHandle(_Awaited):
    """A timer that was started; its result is ``None``."""

    def _value(self) -> None:
        return None


class MessageHandle(_Awaited):
    """The next message on a channel; its result is the message."""

    def ready(self) -> bool:
        """Tell whether the message is there, and take it if one is; never waits."""
        self._pass.check_live()
        self._pass.take(self._nodes[0])
        return self._nodes[0].is_settled

    def _value(self) -> Any:
        (node,) = self._nodes
        if node.outcome is not Outcome.SUCCEEDED:
            raise errors.ContextMisused(f"the message on {node.record.name!r} was cancelled; nothing will come")
        try:
            return self._pass.host.decode_message(node.record.result or "null", node.returns)
        except errors.ResultMismatch as error:
            raise errors.MessageMismatch(node.record.name, str(error)) from error


class GroupHandle(_Steps):
    """The members of a group, each a step of its own; the result is the list of theirs."""

    def __init__(self, current: Pass, members: Sequence[Handle]) -> None:
        super().__init__(current, [node for member in members for node in member._nodes])
        self.members = tuple(members)

    def _value(self) -> list[Any]:
        first = first_failure(self._nodes)
        for node in self._nodes:
            node.is_observed = True
        if first is not None:
            self._pass.value_of(first)
        return [member._value() for member in self.members]

    def __repr__(self) -> str:
        return f"<GroupHandle of {len(self.members)}>"


def leaves(handles: Iterable[Handle]) -> list[Node]:
    """Return the records that ``handles`` stand for."""
    return [node for handle in handles for node in handle._nodes]


def first_failure(nodes: Iterable[Node]) -> Node | None:
    """Return the failed node with the lowest ``seq``, leaving out those whose failure is no error."""
    # a timer or receive that was cancelled has its own answer, the same in a gather as from its handle
    awaited = (Kind.TIMER, Kind.RECEIVE)
    failed = [node for node in nodes if node.is_failure and not node.optional and node.record.kind not in awaited]
    return min(failed, key=lambda node: node.seq, default=None)


def in_place(handle: Handle) -> Any:
    """Return the result of a settled handle, or its failure as a value."""
    if isinstance(handle, GroupHandle):
        return [in_place(member) for member in handle.members]
    try:
        return handle._value()
    except (errors.StepFailed, errors.StepUndone, errors.MessageMismatch) as error:
        return error
