"""Explicit-state exploration, breadth first, so that what is found comes with the shortest schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

S = TypeVar("S")

MOST_STATES = 400_000


class Violated(Exception):
    """A state that must not be reached was."""


class Model(Protocol[S]):
    """What can happen, one transaction, message or fault at a time."""

    def begin(self) -> S: ...

    def steps(self, state: S) -> Iterable[tuple[str, bool, S]]:
        """Yield what may happen next: a label, whether it is a fault, the state after it; or raise ``Violated``."""

    def is_final(self, state: S) -> bool:
        """Tell whether everything has come to its end; raise ``Violated`` if it is the wrong one."""


class Finding(NamedTuple):
    """What was violated, by which schedule; ``what`` is empty if nothing was."""

    what: str
    schedule: list[str]
    states: int


def explore(model: Model[S]) -> Finding:
    """Visit every state, and check that from each of them an end is reached without a further fault."""
    first = model.begin()
    seen: dict[S, tuple[S | None, str]] = {first: (None, "")}
    back: dict[S, list[S]] = {}
    todo, ends = deque([first]), []
    while todo:
        state = todo.popleft()
        try:
            if model.is_final(state):
                ends.append(state)
            for label, is_fault, after in model.steps(state):
                if not is_fault:
                    back.setdefault(after, []).append(state)
                if after not in seen:
                    seen[after] = (state, label)
                    todo.append(after)
        except Violated as violation:
            return Finding(str(violation), [*_schedule(seen, state)], len(seen))
        assert len(seen) < MOST_STATES, "the model is too large to be explored"
    reaches = _reaching(ends, back)
    for state in seen:
        if state not in reaches:
            return Finding("no end can be reached any more", [*_schedule(seen, state)], len(seen))
    return Finding("", [], len(seen))


def _reaching(ends: list[S], back: dict[S, list[S]]) -> set[S]:
    reaching, stack = set(ends), list(ends)
    while stack:
        for before in back.get(stack.pop(), ()):
            if before not in reaching:
                reaching.add(before)
                stack.append(before)
    return reaching


def _schedule(seen: dict[S, tuple[S | None, str]], state: S) -> Iterator[str]:
    labels = []
    current: S | None = state
    while current is not None:
        current, label = seen[current]
        labels.append(label)
    yield from reversed([label for label in labels if label])
