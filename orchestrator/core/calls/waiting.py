"""``ctx``: waiting for time and messages, sending them, and beginning again."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal, NoReturn

from orchestrator import errors
from orchestrator.core.asking import Settlement
from orchestrator.core.calls.durations import Seconds, check_instant, read_seconds
from orchestrator.core.calls.part import Part
from orchestrator.core.ending import close, end_scope
from orchestrator.core.handles import MessageHandle, TimerHandle
from orchestrator.core.passes import Pass
from orchestrator.core.records import (
    Delivery,
    Kind,
    OpenReceive,
    Outcome,
    Payload,
    PublishMessage,
    Recurred,
    SendMessage,
    State,
    Subscribe,
    Unsubscribe,
)
from orchestrator.core.saga import Node

#: What the columns of the mailbox hold.
LONGEST_CHANNEL, LONGEST_MESSAGE_ID = 100, 200


class WaitCalls(Part):
    """Timers, messages, and the next run."""

    def __init__(self, current: Pass, function: Callable[..., Any]) -> None:
        super().__init__(current)
        self._function = function
        self._children: list[Node] = []
        self._looked_at = 0

    # --- time -----------------------------------------------------------------------------------------------------

    def sleep(self, duration: Seconds) -> None:
        """Wait durably for ``duration``, in seconds or as a timedelta."""
        self._wait_until(duration, "duration")

    def sleep_until(self, instant: datetime) -> None:
        """Wait durably until ``instant``, an aware datetime; one that has passed returns at once."""
        self._wait_until(check_instant(instant, "instant"), "instant")

    def _wait_until(self, until: Seconds | datetime, what: str) -> None:
        self._pass.check_live()
        self._pass.raise_cancellation()
        timer = self._timer(until, what)
        self._pass.wait_for_one(timer, is_own=True)

    def timer(self, until: Seconds | datetime) -> TimerHandle:
        """Start a timer, for a duration or until an aware datetime; its handle is waited for together with others."""
        return TimerHandle(self._pass, [self._timer(until, "the timer")])

    # --- messages -------------------------------------------------------------------------------------------------

    def receive(self, channel: str, *, timeout: Seconds | None = None, returns: Any = None) -> Any:
        """Wait for the next message on ``channel`` and return it, decoded as ``returns`` if that is given.

        Messages come in the order in which they were sent, and are kept until they are received.  Raises
        ``ReceiveTimedOut`` when ``timeout`` has passed; a message that comes later waits for the next receive.
        """
        self._pass.check_live()
        self._pass.raise_cancellation()
        seconds = None if timeout is None else read_seconds(timeout, "timeout")
        handle = self.message(channel, returns=returns)
        (node,) = handle._nodes
        if seconds is None:
            self._pass.wait_for_one(node, is_own=True)
            return handle._value()
        timer = self._timer(seconds, "timeout")
        self._pass.wait_for([node], alone=[timer], own=[node, timer])
        if node.is_settled:
            self._pass.stop_waiting(timer)
            return handle._value()
        self._pass.stop_waiting(node)
        raise errors.ReceiveTimedOut(channel, seconds)

    def message(self, channel: str, *, returns: Any = None) -> MessageHandle:
        """Return the next message on ``channel`` as a handle, to be waited for together with others.

        It takes a message only when it is looked at: while it is waited for, or when it is asked whether it is ready.
        """
        self._pass.check_live()
        node = self._pass.ask(OpenReceive(_check_channel(channel), self._pass.scope.path), returns=returns)
        return MessageHandle(self._pass, [node])

    def send(
        self,
        instance_id: str,
        channel: str,
        message: Any,
        *,
        message_id: str | None = None,
        missing: Literal["raise", "ignore"] = "raise",
    ) -> bool:
        """Send ``message`` to another instance, which keeps it until it receives on ``channel``.

        It is sent once, whatever is replayed; the same ``message_id`` is delivered once on a channel.  Raises
        ``UnknownInstance`` or ``InstanceEnded``, or with ``missing="ignore"`` returns ``False``.
        """
        self._pass.check_live()
        if missing not in ("raise", "ignore"):
            raise errors.ContextMisused(f"missing is 'raise' or 'ignore', not {missing!r}")
        payload = self._payload(channel, message, message_id)
        command = SendMessage(channel, self._pass.scope.path, str(instance_id), payload, message_id)
        node = self._pass.ask(command, settle=lambda: self._find_receiver(command.instance_id))
        delivery = Delivery(json.loads(node.record.result or '"unknown"'))
        if delivery is Delivery.DELIVERED or missing == "ignore":
            return delivery is Delivery.DELIVERED
        kind = errors.InstanceEnded if delivery is Delivery.ENDED else errors.UnknownInstance
        raise kind(command.instance_id)

    def _find_receiver(self, instance_id: str) -> Settlement:
        # a child that this very pass asks for, or that nobody has got to starting, is nowhere to be found yet
        self._children += [node for node in self._pass.nodes[self._looked_at :] if node.record.kind is Kind.CHILD]
        self._looked_at = len(self._pass.nodes)
        unbegun = (State.HELD, State.SCHEDULED)
        own = [node.record for node in self._children if not node.is_settled]
        is_own = any(record.child_id == instance_id and record.state in unbegun for record in own)
        delivery = Delivery.DELIVERED if is_own else self._pass.host.find_receiver(instance_id)
        return Outcome.SUCCEEDED, json.dumps(delivery), None

    def publish(self, channel: str, message: Any, *, message_id: str | None = None) -> None:
        """Give ``message`` to every instance that has subscribed to ``channel``, once, whatever is replayed.

        Of the instances that compete for it one receives it.
        """
        self._pass.check_live()
        payload = self._payload(channel, message, message_id)
        self._record(PublishMessage(channel, self._pass.scope.path, payload, message_id))

    def subscribe(self, channel: str, *, mode: Literal["broadcast", "competing"] = "broadcast") -> None:
        """Receive what is published on ``channel`` from here on: all of it, or what no competitor was faster to."""
        self._pass.check_live()
        if mode not in ("broadcast", "competing"):
            raise errors.ContextMisused(f"mode is 'broadcast' or 'competing', not {mode!r}")
        self._record(Subscribe(_check_channel(channel), self._pass.scope.path, mode))

    def unsubscribe(self, channel: str) -> None:
        """Receive no more of what is published on ``channel``; what has come already stays to be received."""
        self._pass.check_live()
        self._record(Unsubscribe(_check_channel(channel), self._pass.scope.path))

    def _record(self, command: PublishMessage | Subscribe | Unsubscribe) -> Node:
        return self._pass.ask(command, settle=lambda: (Outcome.SUCCEEDED, None, None))

    def _payload(self, channel: str, message: Any, message_id: str | None) -> Payload:
        _check_channel(channel)
        if message_id is not None and not is_name(message_id, LONGEST_MESSAGE_ID):
            raise errors.ContextMisused(f"message_id is {message_id!r}; give {describe_name(LONGEST_MESSAGE_ID)}")
        return self._pass.host.encode(message, f"the message on {channel}")

    # --- the next run ---------------------------------------------------------------------------------------------

    def recur(self, *args: Any, **kwargs: Any) -> NoReturn:
        """End this run and begin the next one, with other input and a fresh history, under the same instance id.

        Waits for what is open first.  Refused inside ``saga()``, and while compensations are registered: ``commit()``
        lets them go.  Messages that were not received are there for the next run, and subscriptions hold.
        """
        self._pass.check_live()
        self._pass.raise_cancellation()
        scope = self._pass.scope
        if scope.parent is not None:
            raise errors.ContextMisused("ctx.recur cannot be used inside saga(), whose steps could not be undone then")
        payload = self._pass.host.encode_input(self._function, args, kwargs)
        self._refuse_compensations()
        end_scope(self._pass, scope)
        close(self._pass, scope.nodes())
        self._pass.raise_cancellation()  # delivered while a doubt was undone: the next run would not be told of it
        self._refuse_compensations()
        self._pass.stop(Recurred(payload, self._pass.order))

    def _refuse_compensations(self) -> None:
        # what is in doubt is undone as the run ends
        registered = [node for node in self._pass.scope.nodes() if node.needs_undoing and not node.is_in_doubt]
        if registered:
            raise errors.ContextMisused(
                f"ctx.recur would forget {len(registered)} compensation(s), the first for step {registered[0].seq} "
                f"({registered[0].record.name}); call ctx.commit() if what is done may stay done"
            )


def _check_channel(channel: str) -> str:
    if not is_name(channel, LONGEST_CHANNEL):
        raise errors.ContextMisused(f"a channel is {describe_name(LONGEST_CHANNEL)}, not {channel!r}")
    return channel


def is_name(name: object, longest: int) -> bool:
    """Tell whether ``name`` can be a channel or a message's id, on whatever database."""
    # some ignore a space at the end, and some do not keep every character
    return isinstance(name, str) and 0 < len(name) <= longest and name == name.strip() and name.isprintable()


def describe_name(longest: int) -> str:
    return f"a string of 1 to {longest} characters, printable, with no space around them"
