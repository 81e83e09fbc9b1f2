"""A process dies between the commit of a settlement and the telling of it, or before it is noted that it was told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime import crashing, test_signals
from tests.runtime.cluster import Cluster
from tests.runtime.test_signals import count_owed, list_told
from tests.waiting import wait_until

POINTS = ("settle:after-commit", "told:before-commit", "told:after-commit")
SETTLED = [("step_settled", 0), ("step_settled", 1), ("compensation_settled", 2)]


@pytest.fixture
def cluster(tmp_path: Path, store_url: str, valkey_url: str) -> Iterator[Cluster]:
    settings = {**test_signals.SETTINGS, "max_lost": 20, "max_pass_attempts": 20}
    cluster = Cluster(tmp_path, store_url, valkey_url, tasks=test_signals.__name__, settings=settings)
    yield cluster
    cluster.close()


def test_every_settlement_is_told_whoever_dies_around_it(cluster: Cluster) -> None:
    for point in POINTS:
        cluster.plan_crash(point.replace(":", "-"), "child", point, 0)
    handles = [cluster.start("undoes", instance_id=point.replace(":", "-")) for point in POINTS]
    cluster.start_worker()
    for handle in handles:
        cluster.wait_status(handle, "COMPENSATED", seconds=60)
        assert crashing.was_reached(cluster.crashes, handle.id)
    wait_until(lambda: count_owed(cluster) == 0, f"everything having been told\n{cluster.logs()[-3000:]}")
    for handle, times in zip(handles, (1, 2, 1), strict=True):
        told = list_told(cluster, handle.id, "step_settled", "compensation_settled")
        assert sorted({(each["signal"], each["seq"]) for each in told}, key=lambda each: each[1]) == SETTLED
        of_first = [each for each in told if each["seq"] == 0]
        assert len(of_first) == times and len({each["notice_id"] for each in of_first}) == 1
        assert len(list_told(cluster, handle.id, "instance_ended")) >= 1
