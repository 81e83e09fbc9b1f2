"""Mail: sent by inserting rows; each receiver takes notice of its own in a transaction of its own.

A process that dies between the two loses nothing: the poller tells every receiver of what is there for it.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection

from orchestrator import codec, errors
from orchestrator.core.calls.waiting import LONGEST_CHANNEL, LONGEST_MESSAGE_ID, describe_name, is_name
from orchestrator.core.records import Delivery, Outcome, Payload, PublishMessage
from orchestrator.runtime import callers, requests, settling
from orchestrator.runtime.change import Change, Outbox
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.writing import WOKEN_AT_ONCE
from orchestrator.store import history, instances, mailbox
from orchestrator.store.history import StepKey
from orchestrator.store.instances import Instance
from orchestrator.store.mailbox import Mail, MailKind, NewMail, TakenMail

if TYPE_CHECKING:
    from orchestrator.runtime.callers import CallersSession

logger = logging.getLogger("orchestrator")

#: What delivers what a commit leaves to be done.
Deliver = Callable[[Outbox], None]

#: So often mail is offered to an instance that does not exist, over some days: a child may have to be started yet.
MOST_ATTEMPTS = 20
COMPETITORS_AT_ONCE = 10
#: Whoever sends is waiting.
SENDER_PATIENCE_SECONDS = 10.0

T = TypeVar("T")


def read_message(channel: object, message: Any, message_id: object, limit_bytes: int) -> Payload:
    """Encode a message, or refuse what cannot be sent."""
    for what, name, longest in (("channel", channel, LONGEST_CHANNEL), ("message_id", message_id, LONGEST_MESSAGE_ID)):
        is_left_out = name is None and what == "message_id"
        if not is_left_out and not is_name(name, longest):
            raise errors.InvalidOperation(f"{what} is {name!r}; give {describe_name(longest)}")
    return codec.encode(message, f"the message on {channel}", limit_bytes)


def find_receiver(connection: Connection, instance_id: str) -> Delivery:
    """Tell whether an instance can be sent messages."""
    found = instances.find_instance(connection, instance_id)
    if found is None:
        return Delivery.UNKNOWN
    return Delivery.ENDED if found.status.is_final else Delivery.DELIVERED


class Postman:
    """Tells instances what has come for them."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.store = coordinator.store

    def wake(self, instance_id: str) -> Outbox:
        """Let an instance take notice of its mail; the pass that follows is left owed."""
        with self.store.read("wake") as connection:
            found = instances.find_instance(connection, instance_id)
        if found is None:
            return self._return_to_sender(instance_id)
        return self.coordinator.transact(
            "wake", instance_id, found.generation, lambda connection, locked: self._take(connection, locked)
        )

    def _take(self, connection: Connection, instance: Instance) -> Change | None:
        untaken = mailbox.list_untaken(connection, instance)
        if not untaken:
            return None
        change = Change()
        generations = (None, instance.generation)
        own = [mail for mail in untaken if mail.generation in generations]
        # what was for an earlier life of the id would stay due for ever
        change.unread = [mail.id for mail in untaken if mail.generation not in generations]
        messages = [mail for mail in own if mail.kind is MailKind.MESSAGE]
        for mail in own:
            if mail.kind is not MailKind.MESSAGE:
                self._obey(connection, instance, mail, change)
                change.unread.append(mail.id)
        if instance.status.is_final or instance.changed(change.instance).status.is_final:
            change.unread += [mail.id for mail in messages]
        elif messages:
            self._number(connection, instance, messages, change)
        return change

    def _number(self, connection: Connection, instance: Instance, messages: list[Mail], change: Change) -> None:
        """Number messages like outcomes, and count each for the first receive on its channel that is waited for."""
        order: int = change.instance.get("next_order", instance.next_order)
        at = max(self.coordinator.clock(), change.instance.get("last_at", instance.last_at))
        receives = history.list_awaited_receives(connection, instance)
        seen = instance
        for number, mail in enumerate(messages):
            change.taken.append(TakenMail(mail.id, instance.run, order + number, at))
            row = next((row for row in receives if row.name == mail.channel), None)
            if row is None:
                continue
            receives.remove(row)
            outcome = {"outcome": Outcome.SUCCEEDED}
            waiting = settling.count_down(seen, row, outcome, is_closed=True)
            seen = seen.changed({"waiting": waiting})
            change.change_row(row, {"awaited": None})
        change.instance.update(
            next_order=order + len(messages), last_at=at, waiting=seen.waiting, mail=instance.mail + len(messages)
        )
        if seen.waiting == 0 and instance.waiting > 0 and instance.may_pass:
            grace = self.coordinator.settings.publish_grace
            settling.owe_pass(instance, change, self.coordinator.later(grace))

    def _obey(self, connection: Connection, instance: Instance, mail: Mail, change: Change) -> None:
        """Do what a parent asks of its child."""
        match mail.kind:
            case MailKind.CANCEL:
                requests.request_cancel(self.coordinator, instance, change, mail.payload)
            case MailKind.TERMINATE:
                requests.terminate(self.coordinator, connection, instance, change, mail.payload)
            case MailKind.UNDO:
                requests.request_undo(self.coordinator, instance, change, _undoing(mail))
            case MailKind.MESSAGE:
                raise AssertionError("a message is received by the workflow")

    def _return_to_sender(self, instance_id: str) -> Outbox:
        """Tell a parent that the child it wants undone is gone; keep the rest for a while, for it may come."""
        outbox = Outbox()
        with self.store.read("lost-mail") as connection:
            lost = mailbox.list_lost(connection, instance_id)
        for mail in lost:
            if mail.kind is MailKind.UNDO:
                report = requests.not_undone(_undoing(mail), f"the child {instance_id} does not exist any more")
                outbox.extend(self.coordinator.end_report(report))
                with self.store.begin("lost-mail") as connection:
                    mailbox.delete_mail(connection, mail.id)
        with self.store.begin("lost-mail") as connection:
            now, first_seconds = self.coordinator.clock(), self.coordinator.settings.poll_interval
            mailbox.postpone_mail(connection, instance_id, now, first_seconds, MOST_ATTEMPTS)
        return outbox

    # --- competing ------------------------------------------------------------------------------------------------

    def hand_out(self, channel: str | None) -> Outbox:
        """Give what subscribers compete for to those that wait for it (``None``: on every channel)."""
        outbox = Outbox()
        with self.store.read("competitors") as connection:
            waiting = mailbox.list_waiting_competitors(connection, channel, COMPETITORS_AT_ONCE)
        for instance_id, generation, name in waiting:
            if self._win(instance_id, generation, name):
                outbox.extend(self.wake(instance_id))
        return outbox

    def _win(self, instance_id: str, generation: str, channel: str) -> bool:
        def once() -> bool:
            with self.store.begin("win") as connection:
                locked = instances.lock_instance(connection, instance_id)
                if locked is None or locked.generation != generation:
                    return False
                has_own = any(mail.channel == channel for mail in mailbox.list_untaken(connection, locked))
                receives = history.list_awaited_receives(connection, locked)
                is_waiting = locked.waiting > 0 and any(row.name == channel for row in receives)
                is_waiting = is_waiting and locked.pass_due_at is None  # what that pass brings may end the wait
                if has_own or not is_waiting or not mailbox.is_competing(connection, locked, channel):
                    return False
                return mailbox.win_shared(connection, channel, locked, self.coordinator.clock())

        return self.store.retrying(once, patience_seconds=1.0)

    # --- sending --------------------------------------------------------------------------------------------------

    def send(self, new: NewMail, missing: str, session: CallersSession | None, deliver: Deliver) -> bool:
        """Insert a message for an instance, and tell it after the commit; refuse one that is unknown or has ended."""
        if missing not in ("raise", "ignore"):
            raise errors.InvalidOperation(f"missing is 'raise' or 'ignore', not {missing!r}")

        new = replace(new, message_id=_once(new.message_id, session))

        def insert(connection: Connection) -> Delivery:
            delivery = find_receiver(connection, new.instance_id)
            if delivery is Delivery.DELIVERED:
                mailbox.insert_mail(connection, new, self.coordinator.clock())
            return delivery

        delivery = self._write("send", session, insert)
        if delivery is Delivery.DELIVERED:
            _after(session, lambda: deliver(Outbox(wakes=[new.instance_id])))
            return True
        if missing == "ignore":
            return False
        raise _REFUSED[delivery](new.instance_id)

    def publish(self, message: PublishMessage, session: CallersSession | None, deliver: Deliver) -> None:
        """Insert a publication, and tell those it is for after the commit."""

        message_id = _once(message.message_id, session)

        def insert(connection: Connection) -> list[str]:
            now, told = self.coordinator.clock(), WOKEN_AT_ONCE
            return mailbox.publish(connection, message.name, message.payload, message_id, now, told)

        wakes = self._write("publish-message", session, insert)
        _after(session, lambda: deliver(Outbox(wakes=wakes, shared=[message.name])))

    def _write(self, purpose: str, session: CallersSession | None, insert: Callable[[Connection], T]) -> T:
        """Insert in the caller's transaction, or in one of our own, which is repeated if others were in its way."""
        if session is not None:
            with callers.writing(session, self.store) as connection:
                return insert(connection)

        def once() -> T:
            with self.store.begin(purpose) as connection:
                return insert(connection)

        return self.store.retrying(once, patience_seconds=SENDER_PATIENCE_SECONDS)


def _once(message_id: str | None, session: CallersSession | None) -> str | None:
    """Return an id by which a message is known when its transaction is repeated, the answer to the first one lost."""
    return message_id if message_id is not None or session is not None else uuid.uuid4().hex


def _after(session: CallersSession | None, do: Callable[[], None]) -> None:
    """Do it after the caller's commit; where nobody tells of that, the poller does."""
    if session is None:
        do()
    else:
        callers.after_commit(session, do)


_REFUSED = {Delivery.ENDED: errors.InstanceEnded, Delivery.UNKNOWN: errors.UnknownInstance}


def _undoing(mail: Mail) -> StepKey:
    """Return the record of a parent that waits for its child to be undone."""
    return StepKey(**json.loads(mail.payload or "{}"))
