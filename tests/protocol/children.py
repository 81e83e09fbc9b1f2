"""A parent and its child as a model: started, cancelled, ended, undone, by processes that die between commits.

    child = ctx.start(reserve_hotel.s())        # the child has an effect, and a compensation
    ctx.run(charge.s())                         # may fail: then the child is drained, and undone
    child.get()

Each label is one transaction, one message, or one fault.  The child's own work is a single step of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .exploring import Violated

RULES = {
    "same_transaction": "a child's end settles the record of its parent in the same transaction",
    "start_repeated": "the poller starts a child that its parent's process died before starting",
    "one_life": "whoever starts a child gives it the same id and generation, so it begins once",
    "mail": "cancelling and undoing a child commit as mail with what the parent decides; the poller delivers it",
    "drained": "a child under way is cancelled and waited for before anything of its parent is undone",
    "kept": "a child is not purged while its parent has not ended",
}


class State(NamedTuple):
    record: str = "-"  # the parent's record of the child: scheduled, running, succeeded, failed, withdrawn
    charge: str = "-"  # the other step: running, succeeded, failed
    undo: str = "-"  # the record that undoes the child: waiting, succeeded, failed
    parent: str = "RUNNING"
    lives: tuple[str, ...] = ()  # of the child: working, COMPLETED, FAILED, CANCELLED, undoing, COMPENSATED, purged
    effects: int = 0  # of the child, that have not been undone
    starters: int = 0  # processes about to start the child
    mail: frozenset[str] = frozenset()  # cancel, undo: rows that the child has not taken notice of
    notices: frozenset[str] = frozenset()  # what the child is about to be told of
    untold: str = ""  # without same_transaction: how the child ended, which its process is about to tell
    faults: int = 2


class Family:
    """What can happen to both."""

    def __init__(self, rules: frozenset[str], *, is_purged: bool = False) -> None:
        self.rules = rules
        self.is_purged = is_purged

    def begin(self) -> State:
        return State()

    def is_final(self, state: State) -> bool:
        if state.parent == "RUNNING" or state.parent == "COMPENSATING":
            return False
        if state.parent == "COMPENSATED" and (state.effects or "working" in state.lives):
            raise Violated("LEAK: the parent was undone, and an effect of its child was not")
        if state.parent == "COMPLETED" and state.effects != 1:
            raise Violated(f"TWICE: the parent completed, and its child had {state.effects} effects")
        return True

    def steps(self, state: State) -> Iterator[tuple[str, bool, State]]:
        yield from self._start(state)
        yield from self._child(state)
        yield from self._mail(state)
        if state.parent in ("RUNNING", "COMPENSATING"):
            yield from self._parent(state)

    # --- the parent -------------------------------------------------------------------------------------------------

    def _parent(self, state: State) -> Iterator[tuple[str, bool, State]]:
        if state.record == "-":
            asked = state._replace(record="scheduled", charge="running")
            yield "the parent asks for the child", False, asked._replace(starters=1)
            if state.faults:
                yield "… and its process DIES", True, asked._replace(faults=state.faults - 1)
        elif state.charge == "running":
            yield "the charge succeeds", False, self._decide(state._replace(charge="succeeded"))
            yield "the charge fails", False, self._decide(state._replace(charge="failed"))

    def _decide(self, state: State) -> State:
        """Make the pass that follows what was settled."""
        if state.charge == "running":
            return state
        if state.charge == "succeeded":
            ends = {"succeeded": "COMPLETED", "failed": "COMPENSATED"}
            return state._replace(parent=ends.get(state.record, "RUNNING"))
        state = state._replace(parent="COMPENSATING")
        if state.record == "scheduled":
            state = state._replace(record="withdrawn")
        if state.record == "running" and "drained" in self.rules:
            return self._post(state, "cancel")
        if state.record in ("succeeded", "running") and state.undo == "-":
            return self._post(state._replace(undo="waiting"), "undo")
        if state.undo == "failed":
            return state._replace(parent="COMPENSATION_FAILED")
        return state if state.undo == "waiting" else state._replace(parent="COMPENSATED")

    def _post(self, state: State, what: str) -> State:
        state = state._replace(notices=state.notices | {what})
        return state._replace(mail=state.mail | {what}) if "mail" in self.rules else state

    def _report(self, state: State, ended: str) -> State:
        """Settle the parent's record of the child's end."""
        if state.record != "running" or state.parent not in ("RUNNING", "COMPENSATING"):
            return state
        return self._decide(state._replace(record="succeeded" if ended == "COMPLETED" else "failed"))

    # --- starting ---------------------------------------------------------------------------------------------------

    def _start(self, state: State) -> Iterator[tuple[str, bool, State]]:
        is_asked = state.record == "scheduled" or (state.record == "running" and "one_life" not in self.rules)
        if state.starters and is_asked:
            lives = (*state.lives, "working")
            yield "the child is started", False, state._replace(starters=0, record="running", lives=lives)
        if state.starters and state.faults:
            yield "the process that starts it DIES", True, state._replace(starters=0, faults=state.faults - 1)
        repeats = "start_repeated" in self.rules and not state.starters and len(state.lives) < 2
        if repeats and (state.record == "scheduled" or ("one_life" not in self.rules and state.record == "running")):
            yield "the poller starts it", False, state._replace(starters=1)

    # --- the child --------------------------------------------------------------------------------------------------

    def _child(self, state: State) -> Iterator[tuple[str, bool, State]]:
        for index, life in enumerate(state.lives):
            if life == "working":
                done = _live(state, index, "COMPLETED")._replace(effects=state.effects + 1)
                yield from self._end(done, "COMPLETED", "the child completes")
                yield from self._end(_live(state, index, "FAILED"), "FAILED", "the child fails")
            if life == "undoing":
                undone = _live(state, index, "COMPENSATED")._replace(effects=state.effects - 1)
                yield "the child is undone", False, self._report_undone(undone, "succeeded")
            if life == "COMPLETED" and self.is_purged and self._may_purge(state):
                yield "the child is purged", False, _live(state, index, "purged")
        if state.untold:
            yield "its process tells the parent", False, self._report(state._replace(untold=""), state.untold)
            if state.faults:
                yield "its process DIES before it tells", True, state._replace(untold="", faults=state.faults - 1)

    def _may_purge(self, state: State) -> bool:
        return "kept" not in self.rules or state.parent not in ("RUNNING", "COMPENSATING")

    def _end(self, state: State, ended: str, label: str) -> Iterator[tuple[str, bool, State]]:
        if "same_transaction" in self.rules:
            yield label, False, self._report(state, ended)
        else:
            yield label, False, state._replace(untold=ended)

    def _report_undone(self, state: State, outcome: str) -> State:
        return self._decide(state._replace(undo=outcome)) if state.undo == "waiting" else state

    # --- mail -------------------------------------------------------------------------------------------------------

    def _mail(self, state: State) -> Iterator[tuple[str, bool, State]]:
        for what in sorted(state.notices):
            told = state._replace(notices=state.notices - {what})
            yield f"the child is told to {what}", False, self._obey(told, what)
            if state.faults:
                yield f"the notice to {what} is LOST", True, told._replace(faults=state.faults - 1)
        for what in sorted(state.mail - state.notices):
            yield f"the poller tells the child to {what}", False, self._obey(state, what)

    def _obey(self, state: State, what: str) -> State:
        state = state._replace(mail=state.mail - {what})
        for index, life in enumerate(state.lives):
            if what == "cancel" and life == "working":
                return self._report(_live(state, index, "CANCELLED"), "CANCELLED")
            if what == "undo" and life == "COMPLETED":
                return _live(state, index, "undoing")
            if what == "undo" and life in ("FAILED", "CANCELLED", "COMPENSATED"):
                return self._report_undone(state, "succeeded")
            if what == "undo" and life == "purged":
                return self._report_undone(state, "failed")
        return state


def _live(state: State, index: int, life: str) -> State:
    lives = list(state.lives)
    lives[index] = life
    return state._replace(lives=tuple(lives))
