"""A settlement that is prepared before its instance is locked, as a model: two steps side by side, and a cancellation.

    ctx.gather(ctx.start(a.s()), ctx.start(b.s()))

Whoever takes a step reads the instance as well, and makes of what it read what it is going to write; the first write
locks the instance, if that has not changed.  Whoever cancels locks first, and marks the records that are under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .exploring import Violated

RULES = {
    "compared": "a settlement is written only to an instance of the version that it was made from",
    "raised": "whatever is written under an instance's lock raises its version",
    "instance_first": "the instance is read before the record: what is read after it is never older than its version",
    "made_again": "a settlement that met another version is made again from what is read under the lock",
}

STEPS = ("a", "b")


class Record(NamedTuple):
    state: str = "scheduled"
    is_marked: bool = False  # its scope drains: it is not to be tried again


class Process(NamedTuple):
    """Takes one step; ``version`` and ``waiting`` are the instance's, ``is_marked`` the record's, as they were read."""

    at: str = "idle"
    version: int = -1
    waiting: int = -1
    is_marked: bool | None = None


class State(NamedTuple):
    version: int = 0
    waiting: int = len(STEPS)
    records: tuple[Record, ...] = (Record(),) * len(STEPS)
    processes: tuple[Process, ...] = (Process(),) * len(STEPS)
    may_cancel: bool = True


class Unlocked:
    """What can happen to the instance."""

    def __init__(self, rules: frozenset[str], *, is_cancelled: bool = True) -> None:
        self.rules = rules
        self.is_cancelled = is_cancelled

    def begin(self) -> State:
        return State(may_cancel=self.is_cancelled)

    def is_final(self, state: State) -> bool:
        if any(process.at != "done" for process in state.processes):
            return False
        if state.waiting:
            raise Violated(f"LOST: all have ended, and the instance waits for {state.waiting} more")
        return True

    def steps(self, state: State) -> Iterator[tuple[str, bool, State]]:
        if state.may_cancel:
            yield "somebody cancels", False, self._cancelled(state)
        for number, process in enumerate(state.processes):
            yield from self._process(state, number, process)

    def _cancelled(self, state: State) -> State:
        marked = tuple(each._replace(is_marked=each.state == "running") for each in state.records)
        version = state.version + ("raised" in self.rules)
        return state._replace(records=marked, version=version, may_cancel=False)

    def _process(self, state: State, number: int, process: Process) -> Iterator[tuple[str, bool, State]]:
        name = STEPS[number]
        looks_first = "instance_first" in self.rules
        match process.at:
            case "idle" if looks_first:
                yield f"{name}: looks at the instance", False, self._looks(state, number, "looked")
            case "idle" | "looked":
                after = self._claims(state, number, "running" if looks_first else "claimed")
                yield f"{name}: is claimed", False, after
            case "claimed":
                yield f"{name}: looks at the instance", False, self._looks(state, number, "running")
            case "running" if "compared" in self.rules and process.version != state.version:
                at = "late" if "made_again" in self.rules else "done"
                yield f"{name}: meets another version", False, _put(state, number, process._replace(at=at))
            case "running":
                yield f"{name}: settles", False, self._settles(state, number, process)
            case "late":
                fresh = process._replace(waiting=state.waiting, is_marked=state.records[number].is_marked)
                yield f"{name}: locks, reads, and settles", False, self._settles(state, number, fresh)

    def _looks(self, state: State, number: int, at: str) -> State:
        seen = state.processes[number]._replace(at=at, version=state.version, waiting=state.waiting)
        return _put(state, number, seen)

    def _claims(self, state: State, number: int, at: str) -> State:
        record = state.records[number]._replace(state="running")
        claimed = state._replace(records=_replaced(state.records, number, record))
        return _put(claimed, number, state.processes[number]._replace(at=at, is_marked=record.is_marked))

    def _settles(self, state: State, number: int, process: Process) -> State:
        record = state.records[number]
        if process.is_marked != record.is_marked:
            raise Violated(f"STALE: {STEPS[number]} is settled as if nobody had cancelled")
        settled = state._replace(
            version=state.version + ("raised" in self.rules),
            waiting=process.waiting - 1,
            records=_replaced(state.records, number, record._replace(state="settled")),
        )
        return _put(settled, number, process._replace(at="done"))


def _replaced(every: tuple[Record, ...], number: int, record: Record) -> tuple[Record, ...]:
    return (*every[:number], record, *every[number + 1 :])


def _put(state: State, number: int, process: Process) -> State:
    every = state.processes
    return state._replace(processes=(*every[:number], process, *every[number + 1 :]))
