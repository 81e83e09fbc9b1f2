"""Claiming: one attempt at a time, and only by whom the newest message was for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import RetryPolicy, codec
from orchestrator.core.context import Context
from orchestrator.core.records import Compensation, State
from orchestrator.store import due, history, workers
from orchestrator.store.claiming import Claimant

from .locks import count_waiting
from .world import FAILS, World, at_once, join, step, succeeds, wait_until

Worlds = Callable[..., World]


def one_step(ctx: Context, **options: Any) -> Any:
    return ctx.run(step("charge"), **options)


@pytest.fixture
def claimed(world: Worlds) -> World:
    """An instance whose only step waits to be claimed."""
    started = world(pay=one_step)
    started.start("pay")
    return started


def test_a_claim_names_its_holder_and_counts_the_attempt(claimed: World) -> None:
    row = claimed.take(0)
    assert (row.state, row.attempt) == (State.RUNNING, 1)
    assert (row.claim_incarnation, row.claim_process) == ("worker-1", 1)
    assert (row.started_at, row.publish_at, row.due_at) == (claimed.clock(), None, None)
    assert claimed.row(0) == row


def test_of_8_that_claim_at_once_one_wins(claimed: World) -> None:
    claimed.row(0)
    rows = at_once(*[lambda: claimed.store.retrying(lambda: claimed.claim(0, dispatch=1), patience_seconds=20)] * 8)
    assert len([row for row in rows if row is not None]) == 1
    assert claimed.row(0).attempt == 1


def test_a_message_of_another_dispatch_or_generation_claims_nothing(claimed: World) -> None:
    assert claimed.claim(0, dispatch=0) is None
    assert claimed.claim(0, dispatch=2) is None
    assert claimed.claim(0, dispatch=1, generation="0" * 16) is None
    assert claimed.row(0).state is State.SCHEDULED


def test_a_worker_that_was_given_up_or_never_recorded_claims_nothing(claimed: World) -> None:
    claimed.hire("worker-2")
    claimed.fire("worker-2")
    assert claimed.claim(0, by="worker-2") is None
    assert claimed.claim(0, by="worker-3") is None
    assert claimed.claim(0, by="worker-1") is not None


def test_a_settled_step_is_not_claimed_again(claimed: World) -> None:
    claimed.run(0, succeeds(1))
    assert claimed.claim(0, dispatch=1) is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({}, "refund"), ({"compensate": False}, None), ({"compensate": step("release")}, "release")],
    ids=["inherited", "opted-out", "its-own"],
)
def test_a_compensation_that_only_the_claimer_knows_is_recorded_with_the_claim(
    world: Worlds, asked: dict[str, Any], expected: str | None
) -> None:
    started = world(pay=lambda ctx: one_step(ctx, **asked))
    started.start("pay")
    claimed = started.claim(0, compensation=codec.dump(Compensation("refund")))
    assert claimed == started.row(0)
    recorded = started.row(0).compensation
    assert (codec.load(Compensation, recorded).name if recorded else None) == expected


def test_the_attempt_only_grows(world: Worlds) -> None:
    started = world(pay=lambda ctx: one_step(ctx, retry=RetryPolicy()))
    started.start("pay")
    attempts = []
    for _ in range(2):
        row = started.run(0, FAILS)
        attempts.append(row.attempt)
        row = started.take(0)
        attempts.append(row.attempt)
        started.lose(row)
        row = started.take(0)
        attempts.append(row.attempt)
        _, outbox = started.coordinator.release(row.key, row.attempt, delay_seconds=0, failure=None, values={})
        started.publish(outbox)
    assert attempts == [1, 2, 3, 4, 5, 6]


def test_claims_are_listed_by_holder_and_orphans_apart(world: Worlds) -> None:
    started = world(pay=lambda ctx: ctx.gather(*(step("work", n) for n in range(4))))
    started.start("pay")
    for name in ("worker-2", "worker-3"):
        started.hire(name)
    started.take(0)
    started.take(1, by="worker-2")
    started.take(2, by="worker-3")
    started.fire("worker-3")
    with started.store.read("look") as connection:
        held = {seq: due.list_claims(connection, f"worker-{seq}") for seq in (1, 2, 3)}
        orphans = due.list_orphaned_claims(connection, 10)
    assert {worker: [claim.key.seq for claim in claims] for worker, claims in held.items()} == {1: [0], 2: [1], 3: [2]}
    assert [(claim.key.seq, claim.attempt, claim.claimant) for claim in orphans] == [(2, 1, Claimant("worker-3", 1))]


@pytest.mark.parametrize("databases", ["postgresql", "mysql"], indirect=True)
def test_a_beat_is_not_held_up_by_a_claim_that_waits_for_a_record(claimed: World) -> None:
    row = claimed.row(0)
    claims = threading.Thread(target=lambda: claimed.claim(0, dispatch=1), daemon=True)
    with claimed.store.begin("pass") as connection:
        # a process that freezes here keeps the record until the server ends its transaction
        history.note_on_row(connection, row, {"awaited": 1})
        claims.start()
        wait_until(lambda: is_waiting(claimed), "the claim waits for the record")
        beats = threading.Thread(target=lambda: beat(claimed), daemon=True)
        beats.start()
        beats.join(3)
        was_held_up = beats.is_alive()
    join([claims, beats])
    assert not was_held_up


def beat(world: World) -> None:
    with world.store.begin("beat") as connection:
        assert workers.beat(connection, "worker-1", world.clock())


def is_waiting(world: World) -> bool:
    return count_waiting(world.store) > 0
