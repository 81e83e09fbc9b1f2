"""Messages: numbered when they are taken notice of, counted for one receive each, none lost and none taken twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, select

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.records import State
from orchestrator.runtime.mail import read_message
from orchestrator.store import due, instances, mailbox, tables
from orchestrator.store.instances import Status
from orchestrator.store.mailbox import MailKind, NewMail
from orchestrator.store.tables import instance as instance_table
from orchestrator.store.tables import message, subscription

from .locks import lose_answer
from .test_settling import lost_answer
from .world import FAILS, World, at_once, step, succeeds

Worlds = Callable[..., World]


def listen(ctx: Context, count: int, channel: str = "paid") -> Any:
    return [ctx.receive(channel) for _ in range(count)]


def listening(lives: Worlds, count: int = 1) -> World:
    started = lives(listen=listen)
    started.start("listen", count)
    return started


def mail_of(world: World, instance_id: str | None = None) -> list[tuple[Any, ...]]:
    columns = (message.c.channel, message.c.taken_order, message.c.received_seq, message.c.due_at)
    statement = select(*columns).where(message.c.instance_id == (instance_id or world.instance_id))
    with world.store.read("look") as connection:
        return [tuple(row) for row in connection.execute(statement.order_by(message.c.id))]


def send_and_wake(world: World, what: object) -> None:
    world.send("paid", what)
    world.wake()


def count_due_mail(world: World) -> int:
    with world.store.read("look") as connection:
        return len(mailbox.list_due_receivers(connection, world.clock(), 100))


# --- order --------------------------------------------------------------------------------------------------------


def test_messages_are_received_in_the_order_of_sending_whenever_they_are_taken(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        first = ctx.receive("a")
        ctx.run(step("work"))
        return [first, ctx.receive("b"), ctx.receive("a"), ctx.receive("a")]

    started = lives(listen=workflow)
    started.record("listen")
    started.send("a", 1)  # before the first pass
    started.wake()
    started.advance()
    started.send("b", 2)  # during the wait for something else
    started.send("a", 3)
    started.wake()
    started.run(1, succeeds())
    started.send("a", 4)
    started.go_on()
    assert started.result() == [1, 2, 3, 4]
    assert [row[1:3] for row in mail_of(started)] == [(1, 0), (2, 2), (3, 3), (5, 4)]


def test_a_message_that_is_sent_before_the_wait_satisfies_it_at_once(lives: Worlds) -> None:
    started = lives(listen=listen)
    started.record("listen", 1)
    started.send("paid", "early")
    started.go_on()
    assert started.result() == ["early"]


# --- counting -----------------------------------------------------------------------------------------------------


def test_only_the_message_that_brings_the_count_to_zero_replays(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        return ctx.gather(ctx.message("a"), ctx.message("a"), ctx.message("b"), step("work"))

    started = lives(listen=workflow)
    started.start("listen")
    for channel, waiting in (("a", 3), ("other", 3), ("a", 2), ("a", 2)):
        started.send(channel, channel)
        started.wake()
        assert started.instance.waiting == waiting
        assert len(started.workflows.passes) == 1
    started.run(3, succeeds("done"))
    started.send("b", "b")
    started.wake()
    assert started.passes_owed == 1
    started.go_on()
    assert started.result() == ["a", "a", "b", "done"]
    assert len(started.workflows.passes) == 2


def test_a_receive_that_nobody_waits_for_counts_for_nothing(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        handle = ctx.message("a")
        done = ctx.run(step("work"))
        return [done, handle.get()]

    started = lives(listen=workflow)
    started.start("listen")
    started.send("a", "early")
    started.wake()
    assert (started.instance.waiting, len(started.workflows.passes), started.row(0).state) == (1, 1, State.SCHEDULED)
    started.run(1, succeeds("work"))
    assert started.result() == ["work", "early"]


def test_whichever_message_comes_first_ends_a_wait_for_one_and_the_other_is_kept(lives: Worlds) -> None:
    def workflow(ctx: Context) -> Any:
        paid, cancelled = ctx.message("paid"), ctx.message("cancelled")
        done, pending = ctx.wait(paid, cancelled, timeout=60)
        return [len(done), done[0].get(), pending[0].get()]

    started = lives(listen=workflow)
    started.start("listen")
    started.send("cancelled", "no")
    started.go_on()
    assert started.status() is Status.RUNNING
    started.send("paid", "yes")
    started.go_on()
    assert started.result() == [1, "no", "yes"]


@pytest.mark.parametrize("first", ["timer", "message"])
def test_of_a_timer_and_a_message_the_first_wins_and_the_message_is_not_lost(lives: Worlds, first: str) -> None:
    def workflow(ctx: Context) -> Any:
        try:
            came = ctx.receive("paid", timeout=60)
        except errors.ReceiveTimedOut:
            return ["late", ctx.receive("paid")]
        return ["in time", came]

    started = lives(listen=workflow)
    started.start("listen")
    started.clock.advance(60)

    def send() -> None:
        started.send("paid", "p-1")
        started.wake()

    deeds = [started.settle_due, send]
    for deed in deeds if first == "timer" else reversed(deeds):
        deed()
    started.go_on()
    assert started.result() == ["late" if first == "timer" else "in time", "p-1"]
    started.settle_due()


def test_a_message_that_comes_while_the_pass_is_made_is_received(lives: Worlds) -> None:
    started = lives(listen=listen)
    started.record("listen", 1)

    # on SQLite the pass is made outside of the lock, and made again; elsewhere whoever wakes would wait for it
    def send() -> None:
        started.send("paid", "x")
        if started.store.is_sqlite:
            started.wake()

    started.workflows.during_pass = send
    started.advance()
    started.go_on()
    assert started.result() == ["x"]


# --- once ---------------------------------------------------------------------------------------------------------


def test_the_same_message_id_is_delivered_once_also_by_8_at_once(
    lives: Worlds, another_process: Callable[[World], World]
) -> None:
    started = listening(lives, 2)
    started.send("paid", 0, "m-0")
    others = [another_process(started) for _ in range(4)]
    at_once(*(lambda other=other: other.send("paid", 1, "m-1") for other in others * 2))
    started.send("paid", 0, "m-0")
    started.go_on()
    assert started.result() == [0, 1]
    assert len(mail_of(started)) == 2


def test_an_id_and_a_channel_that_read_like_others_are_not_taken_for_them(lives: Worlds) -> None:
    started = lives(listen=listen)
    started.start("listen", 1, "b:c", instance_id="a")
    started.start("listen", 1, "c", instance_id="a:b")
    started.at("a").send("b:c", "first", "m-1")
    started.at("a:b").send("c", "second", "m-1")
    started.go_on()
    assert (started.at("a").result(), started.at("a:b").result()) == (["first"], ["second"])


def test_two_that_wake_an_instance_at_once_number_each_message_once(
    lives: Worlds, another_process: Callable[[World], World]
) -> None:
    started = listening(lives, 12)
    for number in range(12):
        started.send("paid", number)
    others = [another_process(started) for _ in range(4)]
    at_once(*(other.wake for other in others))
    assert [row[1] for row in mail_of(started)] == list(range(1, 13))
    started.go_on()
    assert started.result() == list(range(12))


def test_sending_and_waking_by_8_at_once_loses_nothing(
    lives: Worlds, another_process: Callable[[World], World]
) -> None:
    started = listening(lives, 16)
    others = [another_process(started) for _ in range(4)]

    def send_two(world: World, number: int) -> None:
        for index in (0, 1):
            world.send("paid", [number, index])
            world.wake()
            world.advance()

    at_once(*(lambda n=n: send_two(others[n % 4], n) for n in range(8)))
    started.go_on()
    received = started.result()
    assert sorted(received) == [[number, index] for number in range(8) for index in (0, 1)]
    assert all(received.index([number, 0]) < received.index([number, 1]) for number in range(8))


@pytest.mark.parametrize("name", ["a\0b", "a\udfff", "paid ", "a\nb"], ids=["NUL", "surrogate", "space", "line feed"])
def test_a_channel_or_message_id_that_not_every_database_keeps_is_refused_at_the_call(lives: Worlds, name: str) -> None:
    calls: list[Callable[[Context], object]] = [
        lambda ctx: ctx.receive(name),
        lambda ctx: ctx.subscribe(name),
        lambda ctx: ctx.publish(name, 1),
        lambda ctx: ctx.publish("a", 1, message_id=name),
    ]
    started = lives(buy=lambda ctx, number: calls[number](ctx))
    for number in range(len(calls)):
        started.start("buy", number, instance_id=f"order-{number}")
        assert started.status() is Status.BLOCKED
        assert "ContextMisused" in (started.instance.blocked or "")
    for channel, message_id in ((name, None), ("a", name)):
        with pytest.raises(errors.InvalidOperation, match="printable"):
            read_message(channel, 1, message_id, 1000)


# --- whom it reaches ----------------------------------------------------------------------------------------------


def test_what_is_sent_to_an_ended_or_unknown_instance_is_refused(lives: Worlds) -> None:
    started = listening(lives)
    started.send("paid")
    started.go_on()
    with pytest.raises(errors.InstanceEnded):
        started.send("paid")
    assert not started.send("paid", missing="ignore")
    started.instance_id = "nobody"
    with pytest.raises(errors.UnknownInstance):
        started.send("paid")
    assert not started.send("paid", missing="ignore")
    started.instance_id = "order-1"


def test_what_an_instance_has_not_taken_when_it_ends_lies_unread(lives: Worlds) -> None:
    started = listening(lives)
    started.send("paid", 1)
    started.wake()
    started.send("paid", 2)
    started.advance()
    started.go_on()
    assert started.result() == [1]
    assert [row[1] for row in mail_of(started)] == [1, None]
    assert count_due_mail(started) == 0


def test_sending_does_not_wait_for_the_receivers_lock(lives: Worlds, another_process: Callable[[World], World]) -> None:
    started = listening(lives)
    if started.store.is_sqlite:
        pytest.skip("whoever writes keeps all others out")
    sender = another_process(started)
    with started.store.begin("hold") as connection:
        instances.lock_instance(connection, "order-1")
        at_once(lambda: sender.send("paid", "through", "m-1"))
    started.go_on()
    assert started.result() == ["through"]


def end_and_purge(world: World) -> None:
    """Remove an instance as a purge does: its mail may be on its way still."""
    with world.store.begin("purge") as connection:
        connection.execute(delete(tables.history).where(tables.history.c.instance_id == world.instance_id))
        connection.execute(instance_table.delete().where(instance_table.c.id == world.instance_id))


def test_mail_to_an_earlier_life_of_an_id_is_not_read_by_the_next_and_does_not_stay_due(lives: Worlds) -> None:
    started = listening(lives)
    started.send("paid", "old")
    end_and_purge(started)
    started.generation = "f" * 16
    started.start("listen", 1)
    started.go_on()
    assert (started.status(), count_due_mail(started)) == (Status.RUNNING, 0)
    started.send("paid", "new")
    started.go_on()
    assert started.result() == ["new"]


def test_mail_to_nobody_is_tried_less_and_less_often_and_then_given_up(lives: Worlds) -> None:
    started = listening(lives)
    started.send("paid", "old")
    end_and_purge(started)
    tries = 0
    while mail_of(started):
        with started.store.read("look") as connection:
            moment = due.find_next_due(connection)
        assert moment is not None
        started.clock.now = max(moment, started.clock.now)
        started.publish(started.postman.wake("order-1"))
        tries += 1
        assert tries < 100
    assert tries <= 30


# --- children that are not there yet ------------------------------------------------------------------------------


def parent(ctx: Context, delay: float | None = None) -> Any:
    options = {"countdown": delay} if delay else {}
    child = ctx.start(step("listen", 1).set(**options))
    ctx.run(step("work"))
    ctx.send(child.instance_id, "paid", "from its parent")
    return child.get()


def test_a_child_that_has_not_been_started_can_be_sent_messages(lives: Worlds) -> None:
    started = lives(listen=listen, parent=parent)
    started.start("parent")
    started.run(1, succeeds())  # before anybody got to starting the child
    started.go_on()
    assert started.result() == ["from its parent"]


def test_a_message_waits_as_long_as_the_start_of_the_child_does(lives: Worlds) -> None:
    started = lives(listen=listen, parent=parent)
    started.start("parent", 30 * 86400)
    started.run(1, succeeds())
    child_id = started.row(0).child_id or ""
    for _ in range(60):
        started.clock.advance(43200)
        if mail_of(started, child_id)[0][3] <= started.clock():
            started.publish(started.postman.wake(child_id))
    started.publish(started.aftermath.start_child(started.row(0)))
    started.go_on()
    assert started.result() == ["from its parent"]


# --- one notice of several things ---------------------------------------------------------------------------------


def test_a_message_behind_the_order_to_stop_changes_nothing_any_more(lives: Worlds) -> None:
    started = listening(lives)
    with started.store.begin("test") as connection:
        mailbox.insert_mail(connection, NewMail("order-1", kind=MailKind.TERMINATE), started.clock())
    started.send("paid", "too late")
    started.go_on()
    assert started.status() is Status.TERMINATED
    assert (started.instance.pass_due_at, count_due_mail(started)) == (None, 0)


@pytest.mark.parametrize("purpose", ["send", "wake", "advance"])
def test_an_answer_to_a_commit_that_was_lost_doubles_nothing(lives: Worlds, purpose: str) -> None:
    started = listening(lives, 2)
    lose_answer(started.store, lost_answer(), purpose)
    for number in (1, 2):
        try:
            started.send("paid", number, f"m-{number}")
        except Exception:
            assert purpose == "send"
            started.send("paid", number, f"m-{number}")  # whoever is not sure sends the same message_id again
    started.go_on()
    assert started.result() == [1, 2]


# --- publishing ---------------------------------------------------------------------------------------------------


def subscriber(ctx: Context, mode: str, count: int) -> Any:
    ctx.subscribe("news", mode=mode)  # type: ignore[arg-type]
    return [ctx.receive("news") for _ in range(count)]


def start_subscribers(lives: Worlds, mode: str, count: int, each: int = 1) -> World:
    started = lives(read=subscriber)
    for number in range(count):
        started.start("read", mode, each, instance_id=f"reader-{number}")
    return started


def test_a_broadcast_reaches_every_subscriber_once(lives: Worlds) -> None:
    started = start_subscribers(lives, "broadcast", 3, each=2)
    for _ in range(2):
        started.publish(started.publish_message("news", "first", "n-1"))
    started.publish_message("news", "second")
    started.go_on()
    assert [started.at(f"reader-{n}").result() for n in range(3)] == [["first", "second"]] * 3


def test_the_same_publication_by_8_at_once_reaches_every_subscriber_once(
    lives: Worlds, another_process: Callable[[World], World]
) -> None:
    started = start_subscribers(lives, "broadcast", 3, each=2)
    others = [another_process(started) for _ in range(4)]
    at_once(*(lambda other=other: other.publish_message("news", 1, "n-1") for other in others * 2))
    started.publish_message("news", 2)
    started.go_on()
    assert [started.at(f"reader-{n}").result() for n in range(3)] == [[1, 2]] * 3


def test_what_competitors_wait_for_is_won_by_one_each(lives: Worlds, another_process: Callable[[World], World]) -> None:
    started = start_subscribers(lives, "competing", 4, each=3)
    for number in range(12):
        started.publish_message("news", number)
    others = [another_process(started) for _ in range(4)]
    for _ in range(3):
        at_once(*(lambda other=other: other.publish(other.postman.hand_out("news")) for other in others * 2))
        started.go_on()
    received = [started.at(f"reader-{n}").result() for n in range(4)]
    assert sorted(itertools.chain(*received)) == list(range(12))


def test_a_competitor_that_does_not_wait_takes_nothing_from_the_others(lives: Worlds) -> None:
    def busy(ctx: Context) -> Any:
        ctx.subscribe("news", mode="competing")
        ctx.run(step("work"))
        return ctx.receive("news")

    started = lives(busy=busy, read=subscriber)
    started.start("busy", instance_id="busy")
    started.start("read", "competing", 1, instance_id="free")
    started.publish_message("news", "first")
    started.go_on()
    assert started.at("free").result() == ["first"]
    started.at("busy").run(1, succeeds())
    started.publish_message("news", "second")
    started.go_on()
    assert started.at("busy").result() == "second"


def test_a_direct_message_reaches_that_instance_alone(lives: Worlds) -> None:
    started = start_subscribers(lives, "competing", 2)
    started.at("reader-1").send("news", "for you")
    started.go_on()
    assert started.at("reader-1").result() == ["for you"]
    assert started.at("reader-0").status() is Status.RUNNING


def test_who_has_unsubscribed_or_ended_receives_nothing_more(lives: Worlds) -> None:
    def once(ctx: Context) -> Any:
        ctx.subscribe("news")
        first = ctx.receive("news")
        ctx.unsubscribe("news")
        return [first, ctx.receive("news", timeout=60)]

    started = lives(once=once, read=subscriber)
    started.start("once", instance_id="once")
    started.start("read", "broadcast", 1, instance_id="reader")
    started.publish_message("news", 1)
    started.go_on()
    started.publish_message("news", 2)
    started.go_on()
    assert (len(mail_of(started, "once")), len(mail_of(started, "reader"))) == (1, 1)
    started.clock.advance(60)
    started.settle_due()
    started.go_on()
    assert started.at("once").status() is Status.FAILED
    with started.store.read("look") as connection:
        assert connection.execute(select(subscription.c.instance_id)).all() == []


def test_what_a_workflow_sends_and_publishes_goes_out_once_with_its_record(lives: Worlds) -> None:
    def talker(ctx: Context) -> Any:
        ctx.send("reader", "news", "direct")
        ctx.publish("news", "to all")
        return ctx.run(step("work"))

    started = lives(talk=talker, read=subscriber)
    started.start("read", "broadcast", 2, instance_id="reader")
    started.start("talk")
    started.go_on()
    started.run(2, FAILS)
    assert started.at("reader").result() == ["direct", "to all"]
    assert len(mail_of(started, "reader")) == 2
