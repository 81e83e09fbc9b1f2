"""The mailbox as a model: two messages, a receive that may time out, another that does not, a cancellation.

    try:
        first = ctx.receive("c", timeout=…)
    except ReceiveTimedOut:
        first = None
    second = ctx.receive("c")

One sender sends both.  It may die between inserting a row and telling the instance of it; a notice is lost or doubled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .exploring import Violated

RULES = {
    "poller": "the poller tells an instance of mail that nobody has told it of",
    "locked": "mail is numbered under the instance's lock, each row once",
    "matched_late": "a message is matched to a receive when a pass delivers it, not when it is sent",
    "own_withdrawn": "a wait that has ended has its own timer withdrawn in the same pass",
}

NAMES = ("0", "1")


class State(NamedTuple):
    mail: tuple[str, ...] = ("-", "-")  # unsent, row, taken, unread
    notices: int = 0  # on their way to the instance
    inbox: tuple[str, ...] = ()  # what was numbered: 0, 1 (messages), t (the timer), c (the cancellation)
    timer: str = "-"  # not set, set, fired, withdrawn
    waits_for: tuple[str, ...] = ()  # r (a message), t (the timer)
    is_owed: bool = True
    received: tuple[str, ...] = ()  # as the last pass had it
    promised: tuple[str, ...] = ()  # without matched_late: messages that belong to the first receive
    reading: tuple[str, ...] = ()  # without locked: what another waker has read, and not written yet
    ended: str = ""
    faults: int = 2


class Pass(NamedTuple):
    """What a pass over an inbox comes to."""

    received: tuple[str, ...]
    unread: tuple[str, ...]
    waits_for: tuple[str, ...] = ()
    ended: str = ""


def decide(inbox: tuple[str, ...], promised: tuple[str, ...]) -> Pass:
    """Replay: deliver the inbox one event at a time, only inside a wait."""
    mailbox: list[str] = []
    events = list(inbox)
    received: list[str] = []
    for wait in (0, 1):
        mine = [name for name in mailbox if wait == 0 or name not in promised]
        got = mine[0] if mine else ""
        if got:
            mailbox.remove(got)
        while not got:
            if not events:
                return Pass(tuple(received), tuple(mailbox), ("r", "t") if wait == 0 else ("r",))
            event = events.pop(0)
            if event == "c":
                return Pass(tuple(received), (*mailbox, *events), ended="CANCELLED")
            if event == "t":
                got = "none" if wait == 0 else ""
            elif wait == 0 or event not in promised:
                got = event
            else:
                mailbox.append(event)
        received.append(got)
    return Pass(tuple(received), (*mailbox, *events), ended="COMPLETED")


class Mailbox:
    """What can happen to the instance and its mail."""

    def __init__(self, rules: frozenset[str], *, is_cancelled: bool = False) -> None:
        self.rules = rules
        self.is_cancelled = is_cancelled

    def begin(self) -> State:
        return State()

    def is_final(self, state: State) -> bool:
        if state.ended and state.timer == "set":
            raise Violated("DUE: the instance has ended, and its timer will be due for ever")
        return bool(state.ended)

    def steps(self, state: State) -> Iterator[tuple[str, bool, State]]:
        yield from self._send(state)
        yield from self._notice(state)
        if state.timer == "set":
            yield "the timer fires", False, self._come_in(state._replace(timer="fired"), "t")
        if state.ended:
            return
        if self.is_cancelled and "c" not in state.inbox:
            yield "it is cancelled", False, self._come_in(state, "c")
        if state.is_owed:
            yield "a pass is made", False, self._pass(state)

    def _send(self, state: State) -> Iterator[tuple[str, bool, State]]:
        unsent = [number for number in (0, 1) if state.mail[number] == "-"]
        if state.ended or not unsent:
            return
        sent = state._replace(mail=_with(state.mail, NAMES[unsent[0]], "row"))
        yield f"message {unsent[0]} is sent", False, sent._replace(notices=min(2, state.notices + 1))
        if state.faults:
            label = f"message {unsent[0]} is sent, and its sender DIES before it tells"
            yield label, True, sent._replace(faults=state.faults - 1)

    def _notice(self, state: State) -> Iterator[tuple[str, bool, State]]:
        rows = tuple(name for name, mail in zip(NAMES, state.mail, strict=True) if mail == "row")
        if state.reading:
            yield "the slow waker writes", False, self._take(state._replace(reading=()), state.reading)
        if state.notices:
            heard = state._replace(notices=state.notices - 1)
            yield "the instance takes notice", False, self._take(heard, rows)
            if state.faults:
                yield "a notice is LOST", True, heard._replace(faults=state.faults - 1)
                yield "a notice is DOUBLED", True, state._replace(notices=2, faults=state.faults - 1)
            if "locked" not in self.rules and rows and not state.reading:
                yield "a waker reads without the lock", False, heard._replace(reading=rows)
        if "poller" in self.rules and rows:
            yield "the poller tells of mail", False, self._take(state, rows)

    def _take(self, state: State, rows: tuple[str, ...]) -> State:
        for name in rows:
            state = state._replace(mail=_with(state.mail, name, "unread" if state.ended else "taken"))
            if not state.ended:
                state = self._come_in(state, name)
        return state

    def _come_in(self, state: State, event: str) -> State:
        if event in state.inbox:
            raise Violated(f"TWICE: {event} was numbered twice")
        if event in NAMES and "matched_late" not in self.rules and "r" in state.waits_for and not state.received:
            state = state._replace(promised=(*state.promised, event))
        counted = event if event == "t" else "r"
        is_owed = state.is_owed or event == "c" or counted in state.waits_for
        left = tuple(each for each in state.waits_for if each != counted)
        return state._replace(inbox=(*state.inbox, event), is_owed=is_owed, waits_for=left)

    def _pass(self, state: State) -> State:
        result = decide(state.inbox, state.promised)
        if result.received[: len(state.received)] != state.received:
            raise Violated(f"REPLAY: {result.received} was received, and before that {state.received}")
        messages = [name for name in result.received if name in NAMES]
        if messages != sorted(messages) or len(set(messages)) != len(messages):
            raise Violated(f"ORDER: {messages} were received")
        for name in set(state.promised) & set(result.unread):
            if "none" in result.received:
                raise Violated(f"LOST: message {name} belongs to a receive that has timed out")
        timer = "set" if state.timer == "-" and "t" in result.waits_for else state.timer
        if timer == "set" and "t" not in result.waits_for and "own_withdrawn" in self.rules:
            timer = "withdrawn"
        return state._replace(
            is_owed=False, received=result.received, waits_for=result.waits_for, timer=timer, ended=result.ended
        )


def _with(mail: tuple[str, ...], name: str, value: str) -> tuple[str, ...]:
    return tuple(value if each == name else old for each, old in zip(NAMES, mail, strict=True))
