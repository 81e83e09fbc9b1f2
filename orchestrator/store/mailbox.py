"""The mailbox: what was sent to instances, and who subscribes to what.

Whoever sends only inserts rows; each receiver takes notice of them in a transaction of its own, under its own lock, and
numbers them like outcomes.  What subscribers compete for belongs to nobody until one of them waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, exc, exists, func, insert, select, update

from orchestrator.core.records import Kind, MessageTaken, Payload, State
from orchestrator.store.instances import Instance
from orchestrator.store.prepared import Prepared
from orchestrator.store.tables import history, instance, message, subscription

#: Between two tries to deliver mail to an instance that does not exist.
LONGEST_SECONDS = 86400.0


class MailKind(StrEnum):
    """What a row of the mailbox asks of its receiver."""

    MESSAGE = "message"
    CANCEL = "cancel"  # these come from a parent to its child
    TERMINATE = "stop"
    UNDO = "undo"


@dataclass(frozen=True, slots=True)
class NewMail:
    """Something to be sent to one instance."""

    instance_id: str
    channel: str = ""
    payload: Payload | None = None
    message_id: str | None = None
    kind: MailKind = MailKind.MESSAGE


@dataclass(frozen=True, slots=True)
class Mail:
    """A row of the mailbox of an instance."""

    id: int
    kind: MailKind
    channel: str
    payload: Payload | None
    taken_order: int | None
    taken_at: datetime | None
    received_seq: int | None
    generation: str | None = None  # of the receiver; none if it did not exist yet

    @property
    def event(self) -> MessageTaken:
        assert self.taken_order is not None
        assert self.taken_at is not None
        return MessageTaken(self.taken_order, self.taken_at, self.channel, self.payload or "null")


@dataclass(frozen=True, slots=True)
class TakenMail:
    """That an instance takes notice of a row: in which run, with which number, when."""

    id: int
    run: int
    order: int
    at: datetime


_COLUMNS = [message.c[name] for name in Mail.__slots__]


def _mail(row: Any) -> Mail:
    return Mail(row[0], MailKind(row[1]), *row[2:])


# --- sending ------------------------------------------------------------------------------------------------------


def insert_mail(connection: Connection, new: NewMail, now: datetime) -> bool:
    """Put ``new`` into the mailbox of its receiver; ``False`` if its ``message_id`` was delivered there before."""
    # by a statement of its own: as a part of the INSERT, MySQL would wait for the receiver's lock to read it
    generation = connection.execute(select(instance.c.generation).where(instance.c.id == new.instance_id)).scalar()
    values = {
        "address": _address(new.instance_id, new.channel),
        "message_id": new.message_id,
        "instance_id": new.instance_id,
        "generation": generation,
        "kind": new.kind,
        "channel": new.channel,
        "payload": new.payload,
        "sent_at": now,
        "attempts": 0,
        "due_at": now,
    }
    return _insert_once(connection, values, new.message_id)


def _address(instance_id: str, channel: str) -> str:
    # ids have colons in them, those of children always; no id has a line feed
    return f"i:{instance_id}\n{channel}"


def _insert_once(connection: Connection, values: dict[str, Any], message_id: str | None) -> bool:
    if message_id is None:
        connection.execute(insert(message).values(**values))
        return True
    try:
        with connection.begin_nested():
            connection.execute(insert(message).values(**values))
    except exc.IntegrityError:
        return False
    return True


def publish(
    connection: Connection, channel: str, payload: Payload, message_id: str | None, now: datetime, limit: int
) -> list[str]:
    """Give a message to all who subscribe to ``channel``, and one to those who compete for it.

    Returns the ids of up to ``limit`` receivers.
    """
    statement = select(subscription.c.instance_id, subscription.c.generation, subscription.c.mode)
    subscribers = list(connection.execute(statement.where(subscription.c.channel == channel)))
    values: dict[str, Any] = {"message_id": message_id, "kind": MailKind.MESSAGE, "channel": channel}
    values |= {"payload": payload, "sent_at": now, "attempts": 0}
    listeners = [(row[0], row[1]) for row in subscribers if row[2] == "broadcast"]
    _broadcast(connection, listeners, {**values, "due_at": now})
    if len(listeners) < len(subscribers):
        shared = {"address": f"c:{channel}", "instance_id": None, "generation": None, "due_at": None}
        _insert_once(connection, {**values, **shared}, message_id)
    return [instance_id for instance_id, _ in listeners[:limit]]


def _broadcast(connection: Connection, listeners: list[tuple[str, str]], values: dict[str, Any]) -> None:
    channel, message_id = values["channel"], values["message_id"]
    rows = [
        {**values, "address": _address(instance_id, channel), "instance_id": instance_id, "generation": generation}
        for instance_id, generation in listeners
    ]
    if not rows:
        return
    try:
        with connection.begin_nested():
            connection.execute(insert(message), rows)
    except exc.IntegrityError:
        # some of them have it already, or are being given it at this moment
        for row in rows:
            _insert_once(connection, row, message_id)


# --- taking notice ------------------------------------------------------------------------------------------------


def list_untaken(connection: Connection, receiver: Instance) -> list[Mail]:
    """Return what an instance has not taken notice of yet, in the order in which it was sent.

    Mail for an earlier life of its id is among it.
    """
    statement = select(*_COLUMNS).where(
        message.c.instance_id == receiver.id, message.c.run.is_(None), message.c.due_at.is_not(None)
    )
    return [_mail(row) for row in connection.execute(statement.order_by(message.c.id))]


def load_taken(connection: Connection, instance_id: str, run: int, after_order: int = 0) -> list[Mail]:
    """Return the messages that a run has taken notice of since ``after_order``, in that order."""
    statement = select(*_COLUMNS).where(
        message.c.instance_id == instance_id, message.c.run == run, message.c.taken_order > after_order
    )
    return [_mail(row) for row in connection.execute(statement.order_by(message.c.taken_order))]


def mark_taken(connection: Connection, taken: Iterable[TakenMail]) -> None:
    """Number what an instance takes notice of; rows that it has numbered in an earlier run are numbered anew."""
    for each in taken:
        values = {"run": each.run, "taken_order": each.order, "taken_at": each.at, "due_at": None}
        connection.execute(update(message).where(message.c.id == each.id).values(**values))


def mark_received(connection: Connection, instance_id: str, run: int, order: int, seq: int) -> None:
    """Note which receive got a message."""
    own = (message.c.instance_id == instance_id, message.c.run == run, message.c.taken_order == order)
    connection.execute(update(message).where(*own).values(received_seq=seq))


def copy_taken(connection: Connection, ids: Sequence[int], instance_id: str, generation: str, before_seq: int) -> None:
    """Let a fork have taken notice of what its origin has; what a later receive got is there to be received."""
    names = ("message_id", "kind", "channel", "payload", "sent_at", "taken_order", "taken_at", "attempts")
    for mail_id in ids:
        row = connection.execute(select(message).where(message.c.id == mail_id)).mappings().one()
        seq = row["received_seq"]
        copy = {
            **{name: row[name] for name in names},
            "address": _address(instance_id, row["channel"]),
            "instance_id": instance_id,
            "generation": generation,
            "run": 0,
            "received_seq": seq if seq is not None and seq < before_seq else None,
        }
        connection.execute(insert(message).values(**copy))


def let_lie(connection: Connection, ids: Sequence[int]) -> None:
    """Leave rows unread: their instance has ended."""
    if ids:
        connection.execute(update(message).where(message.c.id.in_(ids)).values(due_at=None))


def list_due_receivers(connection: Connection, now: datetime, limit: int) -> list[str]:
    """Return the instances that have mail which nobody has told them of."""
    statement = select(message.c.instance_id).where(message.c.due_at <= now, message.c.instance_id.is_not(None))
    statement = statement.group_by(message.c.instance_id).order_by(func.min(message.c.due_at)).limit(limit)
    return [row[0] for row in connection.execute(statement)]


def list_lost(connection: Connection, instance_id: str) -> list[Mail]:
    """Return the mail of an instance that does not exist."""
    statement = select(*_COLUMNS).where(message.c.instance_id == instance_id, message.c.due_at.is_not(None))
    return [_mail(row) for row in connection.execute(statement.order_by(message.c.id))]


def postpone_mail(
    connection: Connection, instance_id: str, now: datetime, first_seconds: float, most_attempts: int
) -> None:
    """Try the mail of an instance that does not exist (yet) later and later; at last nobody will read it."""
    own = and_(message.c.instance_id == instance_id, message.c.due_at.is_not(None))
    for mail_id, attempts in connection.execute(select(message.c.id, message.c.attempts).where(own)).all():
        if attempts >= most_attempts and not _is_to_be_started(connection, instance_id):
            delete_mail(connection, mail_id)
            continue
        until = now + timedelta(seconds=min(first_seconds * 2.0 ** min(attempts, most_attempts), LONGEST_SECONDS))
        values = {"due_at": until, "attempts": attempts + 1}
        connection.execute(update(message).where(message.c.id == mail_id).values(**values))


def _is_to_be_started(connection: Connection, instance_id: str) -> bool:
    """Tell whether a child of that id is going to be started; reads all of the history, so it is asked rarely."""
    unbegun = history.c.state.in_((State.HELD, State.SCHEDULED))
    statement = select(history.c.seq).where(history.c.child_id == instance_id, unbegun).limit(1)
    return connection.execute(statement).first() is not None


def hasten_mail(connection: Connection, instance_id: str, now: datetime) -> None:
    """Have the mail that an instance was sent before it existed delivered at once."""
    own = and_(message.c.instance_id == instance_id, message.c.due_at.is_not(None))
    connection.execute(update(message).where(own).values(due_at=now))


def delete_mail(connection: Connection, mail_id: int) -> None:
    connection.execute(delete(message).where(message.c.id == mail_id))


# --- competing ----------------------------------------------------------------------------------------------------


def list_waiting_competitors(connection: Connection, channel: str | None, limit: int) -> list[tuple[str, str, str]]:
    """Return id, generation and channel of instances that wait for what is there to be had."""
    shared = message.alias("shared")
    is_there = exists().where(shared.c.channel == subscription.c.channel, shared.c.instance_id.is_(None))
    waits = exists().where(
        history.c.instance_id == instance.c.id,
        history.c.run == instance.c.run,
        history.c.kind == Kind.RECEIVE,
        history.c.name == subscription.c.channel,
        history.c.state == State.SCHEDULED,
        history.c.awaited == instance.c.wait_number,
    )
    statement = select(instance.c.id, instance.c.generation, subscription.c.channel).where(
        subscription.c.mode == "competing",
        instance.c.id == subscription.c.instance_id,
        instance.c.generation == subscription.c.generation,
        instance.c.waiting > 0,
        is_there,
        waits,
    )
    if channel is not None:
        statement = statement.where(subscription.c.channel == channel)
    rows = connection.execute(statement.order_by(subscription.c.created_at).limit(limit))
    return [(row[0], row[1], row[2]) for row in rows]


def win_shared(connection: Connection, channel: str, winner: Instance, now: datetime) -> bool:
    """Give the oldest message that is competed for to ``winner``; ``False`` where none is left."""
    oldest = select(message.c.id).where(message.c.channel == channel, message.c.instance_id.is_(None))
    oldest = oldest.order_by(message.c.id).limit(1)
    while True:
        found = connection.execute(oldest).scalar()
        if found is None:
            return False
        statement = update(message).where(message.c.id == found, message.c.instance_id.is_(None))
        won = {"instance_id": winner.id, "generation": winner.generation, "due_at": now}
        if connection.execute(statement.values(**won)).rowcount == 1:
            return True


def _won(instance_id: Any) -> Any:
    is_shared = message.c.address.like("c:%")
    return and_(message.c.instance_id == instance_id, is_shared, message.c.received_seq.is_(None))


_find_won = Prepared(select(message.c.channel).where(_won(bindparam("own_id"))).distinct())


def give_back_shared(connection: Connection, instance_id: str) -> list[str]:
    """Give what an instance won and never received back to those who compete for it; return the channels."""
    channels = [row[0] for row in _find_won.rows(connection, {"own_id": instance_id})]
    if channels:
        won = _won(instance_id)
        nobody = {"instance_id": None, "generation": None, "run": None, "taken_order": None, "taken_at": None}
        connection.execute(update(message).where(won).values(**nobody, due_at=None))
    return channels


def is_competing(connection: Connection, competitor: Instance, channel: str) -> bool:
    own = (subscription.c.instance_id == competitor.id, subscription.c.generation == competitor.generation)
    statement = select(subscription.c.channel).where(
        *own, subscription.c.channel == channel, subscription.c.mode == "competing"
    )
    return connection.execute(statement).first() is not None


# --- subscribing --------------------------------------------------------------------------------------------------


def subscribe(connection: Connection, subscriber: Instance, channel: str, mode: str, now: datetime) -> None:
    unsubscribe(connection, subscriber.id, channel)
    values = {"instance_id": subscriber.id, "generation": subscriber.generation, "channel": channel, "mode": mode}
    connection.execute(insert(subscription).values(**values, created_at=now))


def unsubscribe(connection: Connection, instance_id: str, channel: str) -> None:
    own = (subscription.c.instance_id == instance_id, subscription.c.channel == channel)
    connection.execute(delete(subscription).where(*own))


_delete_subscriptions = Prepared(delete(subscription).where(subscription.c.instance_id == bindparam("own_id")))


def delete_subscriptions(connection: Connection, instance_id: str) -> None:
    """Let an instance that has ended receive nothing more."""
    _delete_subscriptions.run(connection, {"own_id": instance_id})
