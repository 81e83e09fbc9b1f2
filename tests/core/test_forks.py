"""Forks: an instance that begins with part of another's history, and with what that drew at random."""

from __future__ import annotations

from typing import Any

from orchestrator.core.calls.values import seed_of
from orchestrator.core.context import Context
from orchestrator.core.records import History

from .driver import STARTED_AT
from .host import FakeHost
from .past import Past, result_of

ORIGIN = seed_of(History("origin", "g0", 3, STARTED_AT))
MIDDLE = seed_of(History("middle", "g9", 1, STARTED_AT))


def drawing(host: FakeHost) -> Any:
    """Return a workflow that draws before and after each of three steps."""

    def workflow(ctx: Context) -> Any:
        drawn: list[Any] = []
        for _ in range(3):
            drawn.append([ctx.random(), str(ctx.uuid4()), str(ctx.uuid4(f"key {len(drawn)}"))])
            ctx.run(host.tasks["work"].s())
        return [*drawn, [ctx.random(), str(ctx.uuid4()), str(ctx.uuid4("key 0"))]]

    return workflow


def drawn_with(host: FakeHost, *seeds: tuple[int, str]) -> Any:
    past = Past(host, seeds=seeds)
    for seq in range(3):
        past.asked("work").succeeded(seq)
    return result_of(past.decide(drawing(host)))


def test_a_fork_draws_what_its_origin_drew_before_the_record_where_they_part(host: FakeHost) -> None:
    own, origin = drawn_with(host), drawn_with(host, (9, ORIGIN))
    assert not {str(one) for one in own[1]} & {str(one) for one in origin[1]}
    fork = drawn_with(host, (2, ORIGIN))
    assert fork[:2] == origin[:2]
    assert fork[2] == own[2]
    assert fork[3][:2] == own[3][:2]


def test_the_uuid_of_a_key_stays_what_it_was_first(host: FakeHost) -> None:
    fork = drawn_with(host, (1, ORIGIN))
    assert fork[3][2] == fork[0][2] == drawn_with(host, (9, ORIGIN))[0][2]


def test_a_fork_of_a_fork_draws_from_each_in_turn(host: FakeHost) -> None:
    own, origin, middle = drawn_with(host), drawn_with(host, (9, ORIGIN)), drawn_with(host, (9, MIDDLE))
    assert drawn_with(host, (1, ORIGIN), (2, MIDDLE))[:3] == [origin[0], middle[1], own[2]]


def test_a_fork_from_the_beginning_shares_nothing(host: FakeHost) -> None:
    assert drawn_with(host, (0, ORIGIN)) == drawn_with(host)


def test_the_seed_of_a_run_is_that_of_no_other() -> None:
    histories = [
        History(instance, generation, run, STARTED_AT)
        for instance in ("a", "b")
        for generation in ("g1", "g2")
        for run in (1, 2)
    ]
    assert len({seed_of(history) for history in histories}) == len(histories)
