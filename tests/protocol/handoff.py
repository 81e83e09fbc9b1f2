"""The hand-off as a model: the process that settles a step holds the next one from that commit on, without a message.

    ctx.run(a.s())
    ctx.run(b.s())
    ctx.run(c.s())

Faults happen to the worker W0, which hands over: to its process, to all of it, to its link to the store.  W1 takes
messages, gives up what does not beat, and never fails.  A worker's parent reads what is claimed under its incarnation,
and compares it with what its process announces in the memory that they share: two events.
"""

from __future__ import annotations

from collections.abc import Iterator

from .exploring import Violated
from .handoff_state import (
    OTHER,
    PASS,
    STEPS,
    Process,
    Record,
    State,
    following,
    process_dies,
    put,
    record_of,
    schedule_again,
    take,
    with_record,
)

RULES = {
    "announced_first": "the process announces the next step before the commit that claims it",
    "both_announced": "the step that it settles stays announced until that commit: two at once",
    "claims_first": "the parent reads the claims first, and what is announced afterwards",
    "reconciled": "the parent gives back what is claimed under its incarnation and no live process announces",
    "let_go": "a process that does not go on with a step announces it no longer, whatever the reason",
    "fenced": "the transaction settles, and hands over, only where the attempt still holds its claim",
    "beat_first": "a process whose worker's beat is old has the worker beat before it begins what it was handed",
    "same_life": "it begins it only while its worker's incarnation is the one that claimed it",
    "orphaned": "what is claimed under an incarnation that was given up is given back, by whoever sees it",
    "alone": "after a lost attempt the settlement commits alone: the pass is a message, and hands nothing over",
    "counted": "an attempt that was handed over and lost counts as lost, like any",
    "asked": "a process whose worker was asked to end hands nothing over any more",
}

#: So many lost attempts are followed by another one.
MAX_LOST = 1
#: So many passes that do not come back block the instance.
MAX_PASSES = 2


class Handoff:
    """What can happen to an instance of three steps, and to the workers that take them."""

    def __init__(
        self,
        rules: frozenset[str],
        *,
        poison: str = "",
        checks_incarnation: bool = True,
        releases: bool = True,
        begins: bool = False,
    ) -> None:
        self.rules = rules
        self.begins = begins  # with the first pass, which hands over as well
        self.poison = poison  # b: its body kills its process; pass: the workflow function does
        self.checks_incarnation = checks_incarnation  # the transaction hands over only under a live incarnation
        self.releases = releases  # what was handed over just before its worker was asked to end

    def begin(self) -> State:
        return State(records=(Record(),) * len(STEPS), queue=(PASS,), is_owed=True) if self.begins else State()

    def is_final(self, state: State) -> bool:
        return state.status != "RUNNING"

    def steps(self, state: State) -> Iterator[tuple[str, bool, State]]:
        for message in sorted(set(state.queue)):
            yield from self._message(state, message)
        yield from self._poller(state)
        yield from self._other(state)
        if state.mode != "dead":
            yield from self._own(state)
            yield from self._parent(state)
        if state.faults:
            for label, after in self._faults(state):
                yield label, True, after._replace(faults=state.faults - 1)

    # --- messages ---------------------------------------------------------------------------------------------------

    def _message(self, state: State, message: tuple[str, int]) -> Iterator[tuple[str, bool, State]]:
        taken = take(state, message)
        if message == PASS:
            yield "W1 makes the pass", False, self._pass_alone(taken)
            if self._is_free(state) and self._owes_first(state):
                yield "W0 takes the first pass", False, taken._replace(own=Process("passing"))
            return
        step, dispatch = message
        record = record_of(state, step)
        if (record.state, record.dispatch) != ("scheduled", dispatch):
            yield f"a message of {step} is dropped", False, taken
            return
        attempt = record.attempt + 1
        running = record._replace(state="running", attempt=attempt)
        if self._is_free(state):
            claimed = with_record(taken, step, running._replace(holder=(state.life, state.number)))
            own = claimed._replace(announced=frozenset({message}), own=Process("body", step, attempt))
            yield f"W0 claims and begins {step}#{attempt}", False, self._checked(own, own.own)
        if state.other.at == "idle":
            claimed = with_record(taken, step, running._replace(holder=OTHER))
            other = claimed._replace(other=Process("body", step, attempt))
            yield f"W1 claims and begins {step}#{attempt}", False, self._checked(other, other.other)

    def _is_free(self, state: State) -> bool:
        return state.mode == "up" and state.own.at == "idle" and not state.is_asked and not state.is_given_up

    def _owes_first(self, state: State) -> bool:
        return state.is_owed and state.status == "RUNNING" and state.records[0].state == "-"

    def _checked(self, state: State, process: Process) -> State:
        """Look at a body that begins."""
        record = record_of(state, process.step)
        if (record.state, record.attempt) != ("running", process.attempt):
            raise Violated(f"TWICE: {process.step}#{process.attempt} begins, and another attempt of it may be running")
        for each in (state.own, state.other):
            if each.at == "body" and each.step < process.step and each.attempt > record_of(state, each.step).gone:
                raise Violated(f"TWICE: {process.step} begins while {each.step}#{each.attempt} is running")
        return state

    # --- a settlement, and the pass in it ---------------------------------------------------------------------------

    def _is_held(self, state: State, process: Process) -> bool:
        record = record_of(state, process.step)
        return record.state == "running" and (record.attempt == process.attempt or "fenced" not in self.rules)

    def _next_handed(self, state: State) -> str:
        """Return the step that W0's process may hand itself as it settles its own."""
        settles = state.own.step
        after = following(settles) if settles else STEPS[0]
        is_tainted = bool(settles) and "alone" in self.rules and record_of(state, settles).lost > 0
        is_asked = "asked" in self.rules and state.is_asked
        is_dead = self.checks_incarnation and (state.is_given_up or state.own.life not in (0, state.life))
        return "" if is_tainted or is_asked or is_dead else after

    def _settle(self, state: State, process: Process, handed: str = "") -> State | None:
        """Commit a settlement; ``None`` where the pass in it kills the process, and takes everything back."""
        record = record_of(state, process.step)
        settled = with_record(state, process.step, record._replace(state="settled", outcome="ok"))
        if "alone" in self.rules and record.lost:
            return put(settled._replace(is_owed=True), PASS)
        return None if self.poison == "pass" else self._pass(settled, process.step, handed)

    def _pass(self, state: State, settled: str, handed: str = "") -> State:
        after = following(settled) if settled else STEPS[0]
        if not after:
            return state._replace(status="COMPLETED")
        if after == handed:
            claimed = Record("running", attempt=1, holder=(state.own.life, state.number))
            return with_record(state, after, claimed)
        return put(with_record(state, after, Record("scheduled")), (after, 1))

    def _pass_alone(self, state: State) -> State:
        if not state.is_owed or state.status != "RUNNING":
            return state
        if self.poison == "pass":
            passes = state.passes + 1
            return state._replace(passes=passes, status="BLOCKED" if passes == MAX_PASSES else "RUNNING")
        settled = [step for step in STEPS if record_of(state, step).state == "settled"]
        return self._pass(state._replace(is_owed=False), settled[-1] if settled else "")

    def _lose(self, state: State, step: str) -> State:
        """Give up the attempt that holds a step."""
        record = record_of(state, step)
        record = record._replace(gone=record.attempt, holder=OTHER)
        if "counted" in self.rules:
            record = record._replace(lost=record.lost + 1)
        if record.lost > MAX_LOST:
            unknown = with_record(state, step, record._replace(state="settled", outcome="unknown"))
            return put(unknown._replace(is_owed=True), PASS)
        return schedule_again(state, step, record)

    # --- W0's process -----------------------------------------------------------------------------------------------

    def _own(self, state: State) -> Iterator[tuple[str, bool, State]]:
        own = state.own
        match own.at:
            case "body" if own.step == self.poison:
                label = f"{own.step}#{own.attempt} KILLS W0's process"
                yield label, False, process_dies(self._poisoned(state, MAX_LOST + 1))
            case "body":
                yield f"W0: {own.step}#{own.attempt} ends", False, state._replace(own=own._replace(at="ran"))
            case "ran":
                yield from self._ran(state)
            case "passing":
                yield from self._passing(state)
            case "unclear":
                yield from self._unclear(state)
            case "handed":
                yield from self._handed(state)

    def _ran(self, state: State) -> Iterator[tuple[str, bool, State]]:
        own, handed = state.own, self._next_handed(state)
        if handed and not own.life:  # it reads its incarnation, and decides to hand over
            kept = state.announced if "both_announced" in self.rules else frozenset()
            announced = kept | {(handed, 1)} if "announced_first" in self.rules else state.announced
            label = f"W0 announces {handed}"
            yield label, False, state._replace(announced=announced, own=own._replace(life=state.life))
            return
        if state.mode != "up":
            return
        if not self._is_held(state, own):
            yield f"W0's settlement of {own.step}#{own.attempt} changes nothing", False, self._let_go(state)
            return
        committed = self._settle(state, own, handed)
        if committed is None:
            label = f"the pass after {own.step}#{own.attempt} KILLS W0's process"
            yield label, False, process_dies(self._poisoned(state, 1))
            return
        yield f"W0 settles {own.step}#{own.attempt}{_and(handed)}", False, self._go_on(committed, handed)
        if state.faults:
            unclear = own._replace(at="unclear", handed=handed)
            lost = f"W0 settles {own.step}#{own.attempt}{_and(handed)}, and the COMMIT's answer is LOST"
            for label, after in ((lost, committed), (f"{lost}: it was not applied", state)):
                yield label, True, after._replace(own=unclear, faults=state.faults - 1)

    def _passing(self, state: State) -> Iterator[tuple[str, bool, State]]:
        """Make the first pass, which settles nothing; it was counted before, and is published again if it is lost."""
        own, handed = state.own, self._next_handed(state)
        if handed and not own.life:
            announced = frozenset({(handed, 1)}) if "announced_first" in self.rules else state.announced
            yield (
                f"W0 announces {handed}",
                False,
                state._replace(announced=announced, own=own._replace(life=state.life)),
            )
            return
        if state.mode != "up":
            return
        if not self._owes_first(state):
            yield "W0 finds that the first pass was made", False, self._let_go(state)
            return
        if self.poison == "pass":
            passes = state.passes + 1
            counted = state._replace(passes=passes, status="BLOCKED" if passes == MAX_PASSES else "RUNNING")
            yield "the first pass KILLS W0's process", False, process_dies(self._poisoned(counted, MAX_PASSES))
            return
        committed = self._pass(state._replace(is_owed=False), "", handed)
        yield f"W0 makes the first pass{_and(handed)}", False, self._go_on(committed, handed)
        if state.faults:
            unclear = own._replace(at="unclear", handed=handed)
            lost = f"W0 makes the first pass{_and(handed)}, and the COMMIT's answer is LOST"
            for label, after in ((lost, committed), (f"{lost}: it was not applied", state)):
                yield label, True, after._replace(own=unclear, faults=state.faults - 1)

    def _go_on(self, state: State, handed: str) -> State:
        if not handed:
            return self._let_go(state)
        return state._replace(own=Process("handed", handed, 1, life=state.own.life))

    def _let_go(self, state: State) -> State:
        announced = frozenset() if "let_go" in self.rules else state.announced
        return state._replace(own=Process(), announced=announced)

    def _unclear(self, state: State) -> Iterator[tuple[str, bool, State]]:
        own = state.own
        yield "W0 asks the store in vain, and gives up", False, self._let_go(state)
        if state.mode != "up":
            return
        if not own.step:
            yield from self._unclear_pass(state)
            return
        record = record_of(state, own.step)
        if (record.state, record.attempt, record.outcome) == ("settled", own.attempt, "ok"):
            yield f"W0 reads back that {own.step} is settled", False, self._go_on(state, own.handed)
        elif self._is_held(state, own):
            again = own._replace(at="ran", handed="", life=0)
            yield f"W0 reads back that {own.step} is not settled", False, state._replace(own=again)
        else:
            yield f"W0 reads back that {own.step}#{own.attempt} was given up", False, self._let_go(state)

    def _unclear_pass(self, state: State) -> Iterator[tuple[str, bool, State]]:
        own, first = state.own, state.records[0]
        if self._owes_first(state):
            again = own._replace(at="passing", handed="", life=0)
            yield "W0 reads back that the first pass is not made", False, state._replace(own=again)
        elif own.handed and first.attempt == 1 and first.holder == (own.life, state.number):
            yield "W0 reads back that the first pass is its own", False, self._go_on(state, own.handed)
        else:
            yield "W0 reads back that the first pass was made", False, self._let_go(state)

    def _handed(self, state: State) -> Iterator[tuple[str, bool, State]]:
        own = state.own
        if "same_life" in self.rules and own.life != state.life:
            yield f"W0 leaves {own.step}: it belongs to a life that was given up", False, self._let_go(state)
            return
        if "beat_first" in self.rules and state.is_given_up:
            if state.mode == "up":
                yield f"W0 leaves {own.step}: its beat is refused", False, self._let_go(state)
            return
        begun = state._replace(own=own._replace(at="body", life=0), announced=frozenset({(own.step, 1)}))
        if state.is_asked:
            begun = begun._replace(begun_since=state.begun_since + 1)
            if begun.begun_since > 1:
                raise Violated("ENDLESS: the worker was asked to end, and begins one step after another")
        yield f"W0 begins {own.step}#1, which it was handed", False, self._checked(begun, begun.own)
        if state.is_asked and self.releases and state.mode == "up" and self._is_held(state, own):
            released = schedule_again(state, own.step, record_of(state, own.step))
            yield f"W0 releases {own.step}, for it is to end", False, self._let_go(released)

    def _poisoned(self, state: State, most: int) -> State:
        if state.poisoned == most:
            raise Violated(f"POISON: {self.poison} kills one process after another")
        return state._replace(poisoned=state.poisoned + 1)

    # --- W0's parent ------------------------------------------------------------------------------------------------

    def _parent(self, state: State) -> Iterator[tuple[str, bool, State]]:
        if state.mode == "silent":
            yield "W0 reaches the store again", False, state._replace(mode="up")
            return
        if state.is_given_up:
            yield "W0 begins another life", False, state._replace(life=state.life + 1, is_given_up=False, reading=None)
            return
        if state.is_asked and not state.announced:
            yield "W0 signs off", False, state._replace(mode="dead", is_given_up=True, reading=None)
        if "reconciled" not in self.rules:
            return
        is_first = "claims_first" in self.rules
        claimed = frozenset(
            (step, record.dispatch)
            for step, record in zip(STEPS, state.records, strict=True)
            if record.state == "running" and record.holder[0] == state.life
        )
        if state.reading is None:
            if claimed:
                read = claimed if is_first else state.announced
                yield "W0's parent reads " + ("claims" if is_first else "slots"), False, state._replace(reading=read)
            return
        missed = state.reading & claimed - state.announced if is_first else claimed - state.reading
        after, steps = state._replace(reading=None), sorted(step for step, _ in missed)
        for step in steps:
            if self._is_at_work(state, step):
                raise Violated(f"TWICE: {step} is given back while its process works on it, or is about to")
            after = self._lose(after, step)
        yield f"W0's parent gives back {' and '.join(steps) or 'nothing'}", False, after

    def _is_at_work(self, state: State, step: str) -> bool:
        """Tell whether W0's present process is going to run, or to settle, what it holds."""
        record, own = record_of(state, step), state.own
        return record.holder == (state.life, state.number) and step in (own.step, own.handed)

    # --- others -----------------------------------------------------------------------------------------------------

    def _poller(self, state: State) -> Iterator[tuple[str, bool, State]]:
        for step, record in zip(STEPS, state.records, strict=True):
            message = (step, record.dispatch)
            if record.state == "scheduled" and message not in state.queue:
                yield f"the poller publishes {step}", False, put(state, message)
            is_orphaned = state.is_given_up or record.holder[0] < state.life
            if record.state == "running" and record.holder != OTHER and is_orphaned and "orphaned" in self.rules:
                yield f"W1 gives up {step}#{record.attempt}, an orphan", False, self._lose(state, step)
        if state.is_owed and PASS not in state.queue:
            yield "the poller publishes the pass", False, put(state, PASS)
        if state.mode != "up" and not state.is_given_up:
            yield "W1 gives up W0: its beat stands still", False, state._replace(is_given_up=True)

    def _other(self, state: State) -> Iterator[tuple[str, bool, State]]:
        other = state.other
        if other.at == "idle":
            return
        free = state._replace(other=Process())
        label = f"W1 settles {other.step}#{other.attempt}"
        after = None if other.step == self.poison else self._settle(free, other)
        if after is None:
            most = MAX_LOST + 1 if other.step == self.poison else 1
            what = other.step if other.step == self.poison else f"the pass after {other.step}"
            lost = self._lose(self._poisoned(free, most), other.step)
            yield f"{what} KILLS W1's process", False, lost
        elif self._is_held(state, other):
            yield label, False, after
        else:
            yield f"{label}: nothing changes", False, free

    def _faults(self, state: State) -> Iterator[tuple[str, State]]:
        for message in sorted(set(state.queue)):
            yield f"a message of {message[0]} is LOST", take(state, message)
            if len(state.queue) < 3:
                yield f"a message of {message[0]} is DOUBLED", put(state, message)
        if state.mode == "dead":
            return
        where = f"at {state.own.at} {state.own.step}".rstrip()
        if state.own.at != "idle":
            yield f"W0's process is KILLED {where}", process_dies(state)
            yield f"W0 is KILLED {where}", process_dies(state)._replace(mode="dead", reading=None)
        if state.mode == "up":
            yield f"W0 falls SILENT {where}", state._replace(mode="silent")
            if not state.is_asked:
                yield f"W0 is asked to end {where}", state._replace(is_asked=True)


def _and(handed: str) -> str:
    return f" and claims {handed}" if handed else ""
