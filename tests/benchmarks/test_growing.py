"""Contenders in the sizes by which cost grows: payloads, and processes of the pool."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contenders.chain import ChainSpec
from benchmarks.contenders.on_celery import OnCelery
from benchmarks.contenders.ours import Ours, OursSpec
from benchmarks.lab import open_lab
from benchmarks.tasks import make_text
from benchmarks.workloads import payload

SIZE, STEPS = 5000, 4


def test_payload_is_given_to_each_step_and_returned_by_it_in_as_many_processes_as_asked_for(tmp_path: Path) -> None:
    chain, ours = ChainSpec(processes=1), OursSpec("sqlite", processes=1)
    with open_lab(tmp_path) as lab:
        contenders, missing = lab.use([chain, ours])
        assert not missing
        for contender in contenders.values():
            assert payload.milliseconds_per_step(contender, STEPS, SIZE, 1) > 0
            assert count_processes(contender) == 1
        mine = contenders[ours]
        assert isinstance(mine, Ours)
        (newest,) = mine.orchestrators.list(limit=1)
        results = [entry.result for entry in mine.orchestrators.get(newest.instance_id).history()]
        assert results == [None, *[make_text(SIZE)] * (STEPS - 1)]


def count_processes(contender: object) -> int:
    assert isinstance(contender, OnCelery)
    name = f"{contender.settings.queue}@localhost"
    (stats,) = contender.app.control.inspect([name], timeout=10, limit=1).stats().values()
    return int(stats["pool"]["max-concurrency"])


def test_text_has_its_size_and_is_the_same_in_every_process() -> None:
    assert [len(make_text(size)) for size in payload.SIZES.values()] == list(payload.SIZES.values())
    assert make_text(100) == make_text.__wrapped__(100)
