"""A settlement that only counts, as a model: three steps side by side, and a timer that ends the wait for all of them.

    ctx.wait(a, b, c, count=3, timeout=…)
    ctx.wait(b, c, count=2)

Where a step was not the last one that its instance waits for, whoever ran it takes one off the counter and settles the
record, in a transaction that has read nothing.  Otherwise it locks the instance, reads, settles, and at zero makes the
pass.  One attempt of ``a`` may be given up while it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .exploring import Violated

RULES = {
    "above_zero": "nothing is counted off where the counter would come to zero: a pass follows then",
    "same_wait": "nothing is counted off but the wait that the record was awaited by when it was claimed",
    "same_attempt": "the record is settled only where the attempt holds its claim",
    "whole": "where the record cannot be settled the counter is as it was",
}

STEPS = ("a", "b", "c")
#: Which step each process runs: the second one takes over what the first was given up for.
RUNS = (0, 0, 1, 2)


class Record(NamedTuple):
    state: str = "scheduled"
    attempt: int = 0
    awaited: int = 1


class Process(NamedTuple):
    """Runs one attempt; ``awaited`` is what it has read of the record when it was claimed."""

    at: str = "idle"
    attempt: int = 0
    awaited: int = 0


class State(NamedTuple):
    wait: int = 1
    waiting: int = len(STEPS)
    records: tuple[Record, ...] = (Record(),) * len(STEPS)
    processes: tuple[Process, ...] = (Process(),) * len(RUNS)
    may_fire: bool = True
    may_give_up: bool = True
    has_ended: bool = False


class Counted:
    """What can happen to the instance."""

    def __init__(self, rules: frozenset[str]) -> None:
        self.rules = rules

    def begin(self) -> State:
        return State()

    def is_final(self, state: State) -> bool:
        if any(record.state != "settled" for record in state.records):
            return False
        if any(process.at not in ("idle", "done") for process in state.processes):
            return False
        if not state.has_ended:
            raise Violated(f"LOST: all have settled, and the instance waits for {state.waiting} more")
        return True

    def steps(self, state: State) -> Iterator[tuple[str, bool, State]]:
        if state.may_fire and not state.has_ended:
            yield "the timer fires", False, self._fired(state)
        if state.may_give_up and state.records[0].state == "running":
            again = _put(state, 0, state.records[0]._replace(state="scheduled"))
            yield "a is given up", True, again._replace(may_give_up=False)
        for number, process in enumerate(state.processes):
            yield from self._process(state, number, process)

    def _fired(self, state: State) -> State:
        """Make the pass that goes on to the second wait, for those of the last two that have not settled."""
        left = [number for number in (1, 2) if state.records[number].state != "settled"]
        for number in left:
            state = _put(state, number, state.records[number]._replace(awaited=2))
        return state._replace(wait=2, waiting=len(left), may_fire=False, has_ended=not left)

    def _process(self, state: State, number: int, process: Process) -> Iterator[tuple[str, bool, State]]:
        step = RUNS[number]
        record, who = state.records[step], f"{STEPS[step]}, process {number}"
        match process.at:
            case "idle" if record.state == "scheduled":
                claimed = record._replace(state="running", attempt=record.attempt + 1)
                running = Process("running", claimed.attempt, claimed.awaited)
                yield f"{who}: claims", False, _set(_put(state, step, claimed), number, running)
            case "running" if self._may_count(state, process):
                counted = state._replace(waiting=state.waiting - 1)
                if self._is_held(record, process):
                    settled = _put(counted, step, record._replace(state="settled"))
                    yield f"{who}: counts", False, _set(settled, number, process._replace(at="done"))
                else:
                    left = state if "whole" in self.rules else counted
                    yield f"{who}: cannot count", False, _set(left, number, process._replace(at="reading"))
            case "running":
                yield f"{who}: may not count", False, _set(state, number, process._replace(at="reading"))
            case "reading":
                after = self._settled(state, step, process) if record.attempt == process.attempt else state
                yield f"{who}: locks, reads and settles", False, _set(after, number, process._replace(at="done"))

    def _may_count(self, state: State, process: Process) -> bool:
        is_above = state.waiting > 1 or ("above_zero" not in self.rules and state.waiting > 0)
        return is_above and (process.awaited == state.wait or "same_wait" not in self.rules)

    def _is_held(self, record: Record, process: Process) -> bool:
        is_own = record.attempt == process.attempt and record.state == "running"
        return is_own or "same_attempt" not in self.rules

    def _settled(self, state: State, step: int, process: Process) -> State:
        record = state.records[step]
        if record.state != "running" or record.attempt != process.attempt:
            return state
        state = _put(state, step, record._replace(state="settled"))
        if record.awaited != state.wait or state.waiting == 0:
            return state
        state = state._replace(waiting=state.waiting - 1)
        if state.waiting:
            return state
        awaited = [each for each in state.records if each.awaited == state.wait]
        if any(each.state != "settled" for each in awaited):
            raise Violated("EARLY: the pass is made before all have settled that it waits for")
        return state._replace(has_ended=True)


def _put(state: State, step: int, record: Record) -> State:
    every = state.records
    return state._replace(records=(*every[:step], record, *every[step + 1 :]))


def _set(state: State, number: int, process: Process) -> State:
    every = state.processes
    return state._replace(processes=(*every[:number], process, *every[number + 1 :]))
