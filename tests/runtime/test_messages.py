"""Messages: from a client, a task or another workflow, each received once by whom it is meant for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Any

import pytest
from celery import shared_task
from pydantic import BaseModel

from orchestrator import Context, ReceiveTimedOut, shared_workflow
from orchestrator.errors import InstanceEnded, InvalidOperation, MessageMismatch, NotEncodable, UnknownInstance
from tests.runtime.cluster import ROOT, Cluster
from tests.runtime.workflows import do, undo
from tests.waiting import wait_until


@shared_workflow
def collects(ctx: Context, count: int) -> list[Any]:
    return [ctx.receive("in") for _ in range(count)]


def test_messages_are_kept_and_received_in_the_order_sent(cluster: Cluster) -> None:
    handle = cluster.start("collects", 6)
    for number in range(6):
        assert handle.send("in", number)
    assert handle.get(timeout=20) == list(range(6))


def test_a_message_id_is_delivered_once_on_a_channel(cluster: Cluster) -> None:
    handle = cluster.start("collects", 2)
    for _ in range(3):
        handle.send("in", "first", message_id="one")
        handle.send("elsewhere", "other", message_id="one")
    handle.send("in", "second", message_id="two")
    assert handle.get(timeout=20) == ["first", "second"]


CLIENT = """
import json, sys
from celery import Celery
from orchestrator import Orchestrator
store, broker, queue, instance, message = sys.argv[1:]
app = Celery("plain", broker=broker)
app.conf.task_default_queue = queue
sent = Orchestrator(app, store=store).send(instance, "in", json.loads(message), message_id="from-client")
print(json.dumps(sent))
"""


def test_a_plain_client_process_sends(cluster: Cluster) -> None:
    handle = cluster.start("collects", 1)
    cluster.wait_history(handle, 1)
    environment = cluster.environment
    arguments = [environment["TEST_STORE"], environment["TEST_BROKER"], cluster.queue, handle.id, '{"cents": 5}']
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *arguments], capture_output=True, cwd=ROOT, env=environment, timeout=60
    )
    assert json.loads(done.stdout) is True, done.stderr.decode()
    assert handle.get(timeout=20) == [{"cents": 5}]


@shared_task
def tell(instance_id: str, message: str) -> bool:
    """What a web hook's task does."""
    from tests.runtime.app import orchestrator

    return orchestrator.send(instance_id, "in", message, message_id=message)


@shared_workflow
def sends(ctx: Context, receiver: str) -> list[Any]:
    by_step = ctx.run(tell.s(receiver, "from a step"))
    by_workflow = ctx.send(receiver, "in", "from a workflow")
    ctx.run(do.s("sent"))
    return [by_step, by_workflow]


def test_a_task_and_a_workflow_send(cluster: Cluster) -> None:
    receiver = cluster.start("collects", 3)
    sender = cluster.start("sends", receiver.id)
    assert sender.get(timeout=20) == [True, True]
    cluster.task("tell").delay(receiver.id, "from a plain task")
    assert receiver.get(timeout=20) == ["from a step", "from a workflow", "from a plain task"]
    assert [entry.kind for entry in sender.history()] == ["step", "send", "step"]


@shared_workflow
def asks(ctx: Context, other: str, reply_to: str) -> Any:
    ctx.send(other, "question", {"reply_to": reply_to})
    return ctx.receive("answer")


@shared_workflow
def answers(ctx: Context) -> None:
    question = ctx.receive("question")
    ctx.send(question["reply_to"], "answer", 42)


def test_two_workflows_talk(cluster: Cluster) -> None:
    answering = cluster.start("answers")
    asking = cluster.start("asks", answering.id, "asks-1", instance_id="asks-1")
    assert asking.get(timeout=20) == 42
    assert answering.get(timeout=20) is None


@shared_workflow
def sends_to_nobody(ctx: Context, receiver: str) -> list[Any]:
    told: list[Any] = [ctx.send(receiver, "in", 1, missing="ignore")]
    try:
        ctx.send(receiver, "in", 1)
    except (InstanceEnded, UnknownInstance) as error:
        told.append(type(error).__name__)
    ctx.run(do.s("after"))
    return told


def test_a_workflow_is_told_that_nobody_is_there(cluster: Cluster) -> None:
    ended = cluster.run("collects", 0)
    assert cluster.run("sends_to_nobody", ended.id).get(timeout=1) == [False, "InstanceEnded"]
    assert cluster.run("sends_to_nobody", "nobody").get(timeout=1) == [False, "UnknownInstance"]


def test_what_cannot_be_sent_is_refused_at_the_call(cluster: Cluster) -> None:
    handle = cluster.start("collects", 1)
    with pytest.raises(NotEncodable, match="the message on in"):
        handle.send("in", object())
    with pytest.raises(InvalidOperation, match="channel is ''"):
        handle.send("", 1)
    with pytest.raises(InvalidOperation, match="message_id is"):
        handle.send("in", 1, message_id="x" * 201)
    with pytest.raises(UnknownInstance):
        cluster.orchestrator.send("nobody", "in", 1)
    assert not cluster.orchestrator.send("nobody", "in", 1, missing="ignore")
    handle.send("in", "good")
    assert handle.get(timeout=20) == ["good"]
    with pytest.raises(InstanceEnded):
        handle.send("in", 1)
    assert not handle.send("in", 1, missing="ignore")


@shared_workflow
def is_late(ctx: Context) -> list[Any]:
    told: list[Any] = []
    try:
        ctx.receive("in", timeout=0.2)
    except ReceiveTimedOut as error:
        told.append(str(error))
    ctx.receive("go on")
    return [*told, ctx.receive("in", timeout=0.2)]


def test_a_message_after_the_timeout_waits_for_the_next_receive(cluster: Cluster) -> None:
    handle = cluster.start("is_late")
    cluster.wait_history(handle, 3)
    handle.send("in", "late")
    handle.send("go on", None)
    told = handle.get(timeout=20)
    assert told[1] == "late"
    assert "'in'" in told[0]


class Payment(BaseModel):
    cents: int
    currency: str = "EUR"


@shared_workflow
def is_typed(ctx: Context) -> str:
    payment = ctx.receive("in", returns=Payment)
    return repr(payment)


def test_a_message_is_decoded_as_asked(cluster: Cluster) -> None:
    handle = cluster.start("is_typed")
    handle.send("in", Payment(cents=5))
    assert handle.get(timeout=20) == "Payment(cents=5, currency='EUR')"


def test_messages_of_many_senders_are_each_received_once(cluster: Cluster) -> None:
    senders, each = 4, 6
    handle = cluster.start("collects", senders * each)

    def send(sender: int) -> None:
        for number in range(each):
            handle.send("in", [sender, number])

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    received = handle.get(timeout=30)
    for sender in range(senders):
        assert [number for who, number in received if who == sender] == list(range(each))


# --- publishing ---------------------------------------------------------------------------------------------------


@shared_workflow
def listens(ctx: Context, channel: str, mode: str, count: int) -> list[Any]:
    ctx.subscribe(channel, mode=mode)  # type: ignore[arg-type]
    return [ctx.receive(channel) for _ in range(count)]


def test_a_broadcast_reaches_every_subscriber_once(cluster: Cluster) -> None:
    handles = [cluster.start("listens", "news", "broadcast", 2) for _ in range(3)]
    other = cluster.start("listens", "other news", "broadcast", 1)
    for handle in (*handles, other):
        cluster.wait_history(handle, 2)
    for _ in range(2):
        cluster.orchestrator.publish("news", 1, message_id="one")
    cluster.orchestrator.publish("news", 2)
    assert [handle.get(timeout=20) for handle in handles] == [[1, 2]] * 3
    cluster.orchestrator.publish("other news", 3)
    assert other.get(timeout=20) == [3]


def test_a_direct_message_reaches_that_subscriber_alone(cluster: Cluster) -> None:
    first, second = (cluster.start("listens", "direct", "broadcast", 1) for _ in range(2))
    cluster.wait_history(first, 2)
    cluster.wait_history(second, 2)
    first.send("direct", "for the first")
    assert first.get(timeout=20) == ["for the first"]
    cluster.orchestrator.publish("direct", "for all")
    assert second.get(timeout=20) == ["for all"]


def test_what_is_competed_for_is_received_by_one(cluster: Cluster) -> None:
    handles = [cluster.start("listens", "work", "competing", 3) for _ in range(3)]
    for handle in handles:
        cluster.wait_history(handle, 2)
    for number in range(9):
        cluster.orchestrator.publish("work", number, message_id=str(number))
        cluster.orchestrator.publish("work", number, message_id=str(number))
    received = [number for handle in handles for number in handle.get(timeout=30)]
    assert sorted(received) == list(range(9))


@shared_workflow
def competes_when_it_has_time(ctx: Context, channel: str) -> Any:
    ctx.subscribe(channel, mode="competing")
    ctx.receive("begin")
    return ctx.receive(channel)


def test_what_nobody_waits_for_yet_is_kept_for_the_first_who_does(cluster: Cluster) -> None:
    busy, idle = (cluster.start("competes_when_it_has_time", "kept") for _ in range(2))
    cluster.wait_history(busy, 2)
    cluster.wait_history(idle, 2)
    cluster.orchestrator.publish("kept", "first")
    idle.send("begin", None)
    assert idle.get(timeout=20) == "first"
    busy.send("begin", None)
    cluster.orchestrator.publish("kept", "second")
    assert busy.get(timeout=20) == "second"


@shared_workflow
def publishes(ctx: Context, channel: str) -> None:
    ctx.publish(channel, "from a workflow")
    ctx.run(do.s("published"))


def test_a_workflow_publishes_once(cluster: Cluster) -> None:
    broadcast = cluster.start("listens", "from workflows", "broadcast", 2)
    competing = cluster.start("listens", "from workflows", "competing", 2)
    cluster.wait_history(broadcast, 2)
    cluster.wait_history(competing, 2)
    cluster.run("publishes", "from workflows")
    cluster.orchestrator.publish("from workflows", "from a client")
    for handle in (broadcast, competing):
        assert handle.get(timeout=20) == ["from a workflow", "from a client"]


@shared_workflow
def leaves(ctx: Context) -> list[Any]:
    ctx.subscribe("left")
    first = ctx.receive("left")
    ctx.unsubscribe("left")
    ctx.receive("go on")
    try:
        return [first, ctx.receive("left", timeout=0.2)]
    except ReceiveTimedOut:
        return [first]


def test_who_has_unsubscribed_receives_no_more(cluster: Cluster) -> None:
    handle = cluster.start("leaves")
    cluster.wait_history(handle, 2)
    cluster.orchestrator.publish("left", 1)
    wait_until(lambda: len(handle.history()) >= 4, "it having unsubscribed")
    cluster.orchestrator.publish("left", 2)
    handle.send("go on", None)
    assert handle.get(timeout=20) == [1]


# --- what does not fit --------------------------------------------------------------------------------------------


@shared_workflow
def counts_on_strangers(ctx: Context, is_careful: bool) -> int:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    while True:
        try:
            return int(ctx.receive("amount", returns=int))
        except MessageMismatch:
            if not is_careful:
                raise


def test_a_message_that_does_not_fit_can_be_passed_over(cluster: Cluster) -> None:
    handle = cluster.start("counts_on_strangers", True)
    for message in ("a lot", {"cents": 5}, 500):
        handle.send("amount", message)
    assert handle.get(timeout=30) == 500


def test_a_message_that_does_not_fit_undoes_who_does_not_expect_it(cluster: Cluster) -> None:
    handle = cluster.start("counts_on_strangers", False)
    handle.send("amount", "a lot")
    cluster.wait_status(handle, "COMPENSATED")
    with pytest.raises(ValueError, match="the message on 'amount' is not what was to be received"):
        handle.get(timeout=1)
