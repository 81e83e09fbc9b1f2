"""Random programs under random schedules: what must hold of all of them (see ``checks.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core.asking import REFUSED
from orchestrator.core.records import Completed, Failed, Kind, Outcome, Recurred, State, Undone

from .checks import check_program, check_seed
from .driver import is_refused
from .elsewhere import digest_of
from .programs import Generator

#: programs from these seeds are tried in each run, whatever hypothesis draws
SEEDS = range(600)


@given(st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_every_program_ends_as_the_model_says_and_every_prefix_asks_for_the_rest(random: Random, seed: int) -> None:
    check_program(Generator(random).program(), seed)


@pytest.mark.parametrize("part", range(6))
def test_a_fixed_set_of_programs_holds_too(part: int) -> None:
    for seed in SEEDS[part::6]:
        check_seed(seed)


def test_the_fixed_programs_come_by_everything() -> None:
    """Guard the generator: a property over programs that never undo anything would hold of any core."""
    instances = [check_seed(seed) for seed in SEEDS[:300]]
    shells = [shell for instance in instances for shell in instance.runs()]
    decisions = [decision for shell in shells for decision in shell.decisions]
    rows = [row for shell in shells for row in shell.rows]
    records = [row.record for row in rows]
    assert {record.kind for record in records} == set(Kind)
    assert {type(shell.decisions[-1].ending) for shell in shells} >= {Completed, Failed, Undone, Recurred}
    for kind in (Kind.STEP, Kind.CHILD):
        assert {record.outcome for record in records if record.kind is kind} >= set(Outcome)
    for kind in (Kind.TIMER, Kind.RECEIVE):
        assert {record.outcome for record in records if record.kind is kind} == {"succeeded", "withdrawn", None}
    for kind in (Kind.COMPENSATION, Kind.UNDO):
        assert {record.outcome for record in records if record.kind is kind} >= {"succeeded", "failed", "unknown"}
    assert any(record.late_outcome == "succeeded" for record in records)
    assert any(record.scope.count(".") > 1 and record.undoes is not None for record in records)
    assert any(row.lane is not None and row.record.undoes is not None for row in rows)
    assert any(decision.not_undone for decision in decisions)
    assert any(new.event for decision in decisions for new in decision.records)
    assert any(entry.event for decision in decisions for entry in decision.withdrawals)
    assert any(entry.state is State.BLOCKED for decision in decisions for entry in decision.withdrawals)
    assert any(decision.receipts for decision in decisions)
    assert any(new.message_order is not None for decision in decisions for new in decision.records)
    assert any(record.name == REFUSED for record in records)
    assert any(decision.cancels for decision in decisions)
    assert any(isinstance(d.ending, Failed) and d.ending.is_cancelled for d in decisions)
    assert any(shell.is_past_pivot for shell in shells)
    assert any(row.is_detached for row in rows)
    assert any(shell.number == 3 for shell in shells)
    # most programs come to an end of their own
    assert sum(is_refused(shell.decisions[-1].ending) for shell in shells) * 50 < len(shells)
    assert len(decisions) > 3 * len(shells)


def test_another_process_with_another_hash_seed_decides_the_same() -> None:
    seeds = [str(seed) for seed in range(60)]
    here = [digest_of(int(seed)) for seed in seeds]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", f"{__package__}.elsewhere", *seeds]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert done.stdout.split() == here


@pytest.mark.storm
@pytest.mark.parametrize("part", range(20))
def test_a_storm_of_programs_holds(part: int) -> None:
    first = int(os.environ.get("STORM_SEED", "1000000")) + part
    for seed in range(first, first + 20 * 1_000, 20):
        check_seed(seed, size=40)
