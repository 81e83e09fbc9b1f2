"""The benchmark, end to end in the smallest size: chain and ours on SQLite, three steps, one round."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.__main__ import main
from benchmarks.contenders.chain import ChainSpec
from benchmarks.contenders.contender import Contender, Spec
from benchmarks.contenders.ours import Ours, OursSpec
from benchmarks.lab import open_lab
from benchmarks.measuring import measure
from benchmarks.points import Goal, Point, Subject, Workload
from benchmarks.record import write_record
from benchmarks.report import show_goals, show_workload
from benchmarks.workers import ROOT
from benchmarks.workloads import list_workloads
from tests.waiting import wait_until

STEPS = 3


def milliseconds(contender: Contender) -> float:
    run = contender.sequence(STEPS)
    assert run.first is not None
    assert run.began < run.first < run.ended
    if isinstance(contender, Ours):
        # what ended is what was asked for, and all of it is recorded
        (newest,) = contender.orchestrators.list(limit=1)
        assert newest.status == "COMPLETED"
        assert len(contender.orchestrators.get(newest.instance_id).history()) == STEPS
    return 1000.0 * run.seconds


def make_workload(*specs: Spec) -> Workload:
    subjects = tuple(Subject("3 steps", spec, milliseconds) for spec in specs)
    # met by whatever runs at all, and missed by whatever does
    goals = tuple(Goal(Point("3 steps", "ours-sqlite"), Point("3 steps", "chain"), bound) for bound in (1e6, 1e-6))
    return Workload("tiny", "Three steps", "ms", subjects, goals, rounds=1)


def test_smallest_benchmark_measures_judges_and_ends_what_it_started(tmp_path: Path) -> None:
    unable = OursSpec("sqlite", label="nowhere", has_worker=False)  # nobody runs it
    with open_lab(tmp_path) as lab:
        workload = make_workload(ChainSpec(), OursSpec("sqlite"))
        measured = measure(lab, workload, lambda _text: None)
        contenders, _ = lab.use([ChainSpec(), OursSpec("sqlite")])
        pids = [pid for contender in contenders.values() for pid in contender.list_pids()]
        assert all(is_alive(pid) for pid in pids)
        broken = measure(lab, Workload("b", "b", "ms", (Subject("c", unable, fail),), (), 2), lambda _text: None)
    assert [sample.point.contender for sample in measured.samples] == ["chain", "ours-sqlite"]
    assert not measured.skipped
    assert not measured.broken
    assert broken.broken == {Point("c", unable.name): "RuntimeError: it breaks"}
    assert not any(is_alive(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []

    write_record(tmp_path / "results.json", [measured], {"machine": {}})
    (recorded,) = json.loads((tmp_path / "results.json").read_text())["workloads"]
    assert [goal["is_met"] for goal in recorded["goals"]] == [True, False]
    assert len(recorded["samples"]) == 2
    console = Console(width=160, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    show_workload(console, measured)
    assert not show_goals(console, [measured])
    console.file.close()
    assert "We lose here:\n  tiny, 3 steps, ours-sqlite: " in (tmp_path / "out").read_text()


def fail(_contender: Contender) -> float:
    raise RuntimeError("it breaks")


def test_interrupted_benchmark_leaves_nothing_behind(tmp_path: Path) -> None:
    token = f"benchmark-of-{tmp_path.name}-{os.getpid()}"
    databases = tmp_path / "databases"
    databases.mkdir()
    command = ["-m", "benchmarks", "--only", "growth", "--folder", str(databases), "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "BENCHMARK_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for_workers(token, databases)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.terminate()  # it is over, unless the test has failed
        process.communicate()
    assert process.returncode == 130, output.decode()
    assert b"what was started has been ended" in output
    # what was killed is there until the system has taken it away
    wait_until(lambda: not list_processes(token, databases), "the end of all that was started")
    assert list(databases.iterdir()) == []


def wait_for_workers(token: str, folder: Path) -> None:
    """Wait until the broker and a worker with its pool are there."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("what a process has started is found through /proc")
    deadline = time.monotonic() + 60
    while len(found := list_processes(token, folder)) < 5:
        assert time.monotonic() < deadline, f"after 60 s there are only {found}"
        time.sleep(0.1)


def list_processes(token: str, folder: Path) -> list[str]:
    """Return the command lines of all processes that have the token in their environment, or work in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = token.encode() in (process / "environ").read_bytes()
            if is_ours or str((process / "cwd").readlink()).startswith(str(folder)):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has just ended, or is another's
    return found


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_goal_is_about_what_its_workload_measures() -> None:
    for full in (False, True):
        for workload in list_workloads(full=full):
            points = {subject.point for subject in workload.subjects}
            for goal in workload.goals:
                missing = {goal.subject, goal.against or goal.subject} - points
                # contenders of the hand-off are left out where nothing is measured of them
                assert not missing, f"{workload.name}: {missing}"


def test_workload_that_is_not_there_is_refused_by_name() -> None:
    listed = CliRunner().invoke(main, ["--list"])
    assert listed.exit_code == 0
    assert "sequential" in listed.output
    refused = CliRunner().invoke(main, ["--only", "nonsense"])
    assert refused.exit_code == 2
    assert "there is no workload nonsense; known are sequential" in refused.output
