"""Orders that wait, have children, recur, are cancelled and undone, while their workers are killed all the time."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Context, WorkflowHandle, shared_workflow
from orchestrator.errors import InvalidInput
from tests.runtime.cluster import Cluster
from tests.runtime.workflows import do, undo

#: What a parent that was undone must find of its child.
UNDONE = ("COMPENSATED", "CANCELLED", "FAILED")


@shared_workflow
def packs(ctx: Context, name: str) -> str:
    """A child with an effect, and a wait in which it may be cancelled."""
    done: str = ctx.run(do.s(f"{name} box"), compensate=undo.s(f"{name} box"))
    ctx.sleep(0.1)
    return done


@shared_workflow
def journey(ctx: Context, run: int = 0) -> list[Any]:
    """Two runs; the second one receives two messages that were sent while the first was under way."""
    ctx.run(do.s(f"{run} reserve"), compensate=undo.s(f"{run} reserve"))
    if run == 0:
        ctx.sleep(0.1)
        ctx.commit()
        ctx.recur(1)
    got = [ctx.receive("paid") for _ in range(2)]
    with ctx.saga():
        ctx.run(packs.s(f"{run}"))
        ctx.gather(*(ctx.start(do.s(f"{run} {n}"), compensate=undo.s(f"{run} {n}")) for n in "ab"))
    done, _ = ctx.wait(ctx.message("never"), timeout=0.1)
    return [*got, len(done)]


@dataclass
class Order:
    """What a customer does to an instance, and when."""

    handle: WorkflowHandle
    cancels: bool
    refunds: bool
    at: float
    sent: int = 0
    is_cancelled: bool = False
    is_refunded: bool = False

    def act(self, now: float) -> None:
        """Do what is next, twice: whoever repeats a call changes nothing."""
        if self.sent < 2:
            for _ in range(2):
                self.handle.send("paid", self.sent, message_id=f"payment {self.sent}", missing="ignore")
            self.sent += 1
        if self.cancels and now > self.at and not self.is_cancelled:
            self.is_cancelled = True
            for _ in range(2):
                try:
                    self.handle.cancel("the customer")
                except InvalidInput:  # it was faster
                    self.is_cancelled = self.handle.instance_status == "CANCELLED"
        if self.refunds and not self.is_refunded and self.handle.instance_status == "COMPLETED":
            self.is_refunded = True
            for _ in range(2):
                self.handle.undo()

    @property
    def is_over(self) -> bool:
        ends = ("COMPENSATED", "CANCELLED") if self.refunds else ("COMPLETED", "CANCELLED")
        return self.handle.instance_status in ends


@dataclass
class Storm:
    """A few orders at a time, and a worker killed every now and then."""

    cluster: Cluster
    seed: int
    orders: list[Order] = field(default_factory=list)
    kills: int = 0

    def run(self, count: int, seconds: float) -> None:
        chance = random.Random(self.seed)
        begun, killed_at = time.monotonic(), time.monotonic()
        while len(self.orders) < count or not self.kills or not all(order.is_over for order in self.orders):
            now = time.monotonic()
            assert now - begun < seconds, [order.handle.describe() for order in self.orders if not order.is_over]
            if len(self.orders) < count:
                self._begin(chance, now)
            for order in self.orders:
                order.act(now)
            if now - killed_at > chance.uniform(0.8, 2.0):
                killed_at = now
                self._kill_one(chance)
            time.sleep(0.05)

    def _begin(self, chance: random.Random, now: float) -> None:
        number = len(self.orders)
        handle = self.cluster.start("journey", instance_id=f"order-{self.seed}-{number}")
        self.orders.append(Order(handle, chance.random() < 0.4, chance.random() < 0.4, now + chance.uniform(0, 3)))

    def _kill_one(self, chance: random.Random) -> None:
        """Kill a worker while another one is at work, so that something happens between two kills."""
        ready = [worker for worker in self.cluster.workers if worker.is_running and worker.is_ready]
        if len(ready) > 1:
            chance.choice(ready).kill()
            self.kills += 1
            self.cluster.start_worker()

    def check(self) -> None:
        assert self.kills >= 1
        for order in self.orders:
            check_effects(self.cluster, order.handle)
            if order.handle.instance_status == "COMPLETED":
                assert order.handle.get(timeout=1) == [0, 1, 0]
            for child in children_of(order.handle):
                kept = order.handle.instance_status == "COMPLETED"
                assert child.instance_status in (("COMPLETED",) if kept else UNDONE), child.describe()
                check_effects(self.cluster, child)


def children_of(handle: WorkflowHandle) -> list[WorkflowHandle]:
    found = (entry.child_id for entry in handle.history() if entry.kind == "child" and entry.attempts)
    return [WorkflowHandle(child_id, app=handle.app) for child_id in found if child_id is not None]


def check_effects(cluster: Cluster, handle: WorkflowHandle) -> None:
    """Check that what an instance did stands, or was undone in reverse; what the first run did it let go at its end."""
    names = list(dict.fromkeys(cluster.effects.names(handle.id)))
    done = [name.removeprefix("do ") for name in names if name.startswith("do ")]
    undone = [name.removeprefix("undo ") for name in names if name.startswith("undo ")]
    if handle.instance_status == "COMPLETED":
        assert not undone, (handle.id, names)
        return
    # one whose attempt was lost before its effect is undone for nothing: nobody could know
    begun = [name.removeprefix("do ") for name in cluster.effects.names(handle.id, "begin")]
    assert set(undone) - set(begun) <= set(lost_steps(handle)), (handle.id, names)
    assert set(undone) >= set(done) - {"0 reserve"}, (handle.id, names)
    # of two steps side by side the one that was asked for last is undone first, whichever began first
    order = [name for name in ("0 reserve", "1 reserve", "1 box", "1 a", "1 b") if name in undone]
    assert undone == order[::-1], (handle.id, names)


def lost_steps(handle: WorkflowHandle) -> list[str]:
    """Return the steps whose process was killed after the claim: their bodies may not have got as far as to begin."""
    entries = [entry for run in range(handle.describe().run + 1) for entry in handle.history(run)]
    return [entry.args[0] for entry in entries if entry.kind == "step" and entry.started_at and entry.lost]


@pytest.fixture
def storm_cluster(tmp_path: Path, store_url: str, valkey_url: str) -> Any:
    cluster = Cluster(tmp_path, store_url, valkey_url, tasks=__name__)
    try:
        for _ in range(2):
            cluster.start_worker()
        yield cluster
    finally:
        cluster.close()


def test_a_few_orders_in_a_storm(storm_cluster: Cluster) -> None:
    storm = Storm(storm_cluster, seed=7)
    storm.run(6, seconds=120)
    storm.check()


@pytest.mark.storm
@pytest.mark.parametrize("seed", range(3))
def test_many_orders_in_a_storm(storm_cluster: Cluster, seed: int) -> None:
    storm = Storm(storm_cluster, seed)
    storm.run(100, seconds=900)
    storm.check()
