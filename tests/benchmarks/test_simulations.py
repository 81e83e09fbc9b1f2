"""The simulation of several stores, where pencil and paper give the answer as well."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.simulations.placement import NAMES, find, place, spread
from benchmarks.simulations.stores import Run, Setting

#: A disk that flushes a thousand times a second, and nothing else.
DISK = Setting(think=0.0, work=0.0, flush=1.0, commits=1, cores=1000, steps=2000)


@pytest.mark.parametrize("stores", [1, 8])
def test_one_instance_is_as_fast_as_its_lock_however_many_stores_there_are(stores: int) -> None:
    run = Run(replace(DISK, instances=1, processes=10, stores=stores))
    assert run.per_second == pytest.approx(1000)
    assert run.waits[len(run.waits) // 2] == pytest.approx(10.0)  # all ten stand in line for it


def test_settlements_of_different_instances_share_a_flush() -> None:
    # one begins a flush, the other nineteen wait for the next: twenty in two
    run = Run(replace(DISK, instances=20_000, processes=20))
    assert run.per_second == pytest.approx(10_000, rel=0.02)
    assert run.waits[0] == pytest.approx(1.0)


def test_second_store_doubles_what_one_can_do_and_a_busy_instance_takes_that_away() -> None:
    busy = Setting(think=0.0, flush=0.0, work=1.0, cores=1, steps=4000, commits=1)
    even = [Run(replace(busy, stores=stores)).per_second for stores in (1, 2)]
    assert even[0] == pytest.approx(1000, rel=0.05)
    assert even[1] > 1.8 * even[0]
    skewed = [Run(replace(busy, stores=stores, skew=2.0)).per_second for stores in (1, 2)]
    assert skewed[1] < 1.7 * skewed[0]


def test_step_of_one_commit_costs_half_of_a_step_of_two() -> None:
    bound = Setting(think=0.0, flush=0.0, work=1.0, cores=1, steps=4000)
    handed, claimed = (Run(replace(bound, commits=commits)).per_second for commits in (1, 2))
    assert handed == pytest.approx(2 * claimed, rel=0.1)


def test_same_setting_gives_the_same_run() -> None:
    setting = Setting(steps=500, skew=0.8, stores=2)
    assert Run(setting).waits == Run(setting).waits


@pytest.mark.parametrize("stores", [1, 2, 4, 8])
def test_ids_spread_evenly_and_none_moves_when_a_store_is_added(stores: int) -> None:
    of = spread(stores, 20_000)
    assert of.least > 94
    assert of.most < 106
    assert of.rehashed == pytest.approx(20_000 / (stores + 1), rel=0.05)  # what hashing alone would have moved
    assert of.moved == 0


def test_instance_is_found_where_it_was_begun_and_a_new_one_is_begun_by_the_newest_epoch() -> None:
    epochs = (NAMES[:1], NAMES[:2], NAMES[:4])
    begun = {f"order-{number}": place(f"order-{number}", epochs[number % 3]) for number in range(300)}
    assert all(find(each, epochs, lambda store, each: begun[each] == store) == begun[each] for each in begun)
    assert find("order-1000", epochs, lambda _store, _id: False) is None
    # one that is begun again by mistake would be in two: the newest place is looked at first
    assert find("order-1000", epochs, lambda _store, _id: True) == place("order-1000", NAMES[:4])
