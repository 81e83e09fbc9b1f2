"""What the model of the hand-off is about: three records, messages, a worker that hands over, and another one."""

from __future__ import annotations

from typing import NamedTuple

STEPS = "abc"
OTHER = (0, 0)
PASS = ("pass", 0)


class Record(NamedTuple):
    state: str = "-"  # scheduled, running, settled
    attempt: int = 0
    lost: int = 0
    gone: int = 0  # the last attempt that was given up
    dispatch: int = 1
    holder: tuple[int, int] = OTHER  # incarnation and process of W0; W1's are all one
    outcome: str = ""


class Process(NamedTuple):
    """What a worker's process is at: idle, body, ran (its body has ended), unclear (its COMMIT), handed."""

    at: str = "idle"
    step: str = ""
    attempt: int = 0
    life: int = 0  # the incarnation, as it read it, under which it claims what it hands itself
    handed: str = ""  # what the COMMIT hands over whose answer was lost


class State(NamedTuple):
    records: tuple[Record, ...] = (Record("scheduled"), Record(), Record())
    queue: tuple[tuple[str, int], ...] = (("a", 1),)
    status: str = "RUNNING"
    is_owed: bool = False  # a pass, by message
    passes: int = 0  # that never came back
    mode: str = "up"  # W0: up, silent (frozen, or cut off from the store), dead
    life: int = 1  # its incarnation
    is_given_up: bool = False  # that incarnation; its beat is old, then
    number: int = 1  # of its process
    own: Process = Process()
    announced: frozenset[tuple[str, int]] = frozenset()  # steps and dispatches, by its process
    reading: frozenset[tuple[str, int]] | None = None  # by its parent: claims, or what was announced
    is_asked: bool = False  # to end
    begun_since: int = 0  # handed over, since it was asked
    poisoned: int = 0  # processes that were killed by what they ran
    other: Process = Process()  # W1's
    faults: int = 2


def record_of(state: State, step: str) -> Record:
    return state.records[STEPS.index(step)]


def with_record(state: State, step: str, record: Record) -> State:
    records = list(state.records)
    records[STEPS.index(step)] = record
    return state._replace(records=tuple(records))


def put(state: State, message: tuple[str, int]) -> State:
    return state._replace(queue=tuple(sorted((*state.queue, message))))


def take(state: State, message: tuple[str, int]) -> State:
    queue = list(state.queue)
    queue.remove(message)
    return state._replace(queue=tuple(queue))


def schedule_again(state: State, step: str, record: Record) -> State:
    again = record._replace(state="scheduled", dispatch=record.dispatch + 1, holder=OTHER)
    return put(with_record(state, step, again), (step, again.dispatch))


def following(step: str) -> str:
    return STEPS[STEPS.index(step) + 1 :][:1]


def process_dies(state: State) -> State:
    return state._replace(number=state.number + 1, own=Process(), announced=frozenset())
