"""A claim whose COMMIT does not wait for the disk, as a model: a crash of the database may take it back.

    handle = ctx.start(a.s(), compensate=c.s())    # a has an effect, which c undoes
    ctx.run(b.s())                                 # may fail
    handle.get()

The log is flushed in the order of its commits, so whatever waits for its flush takes with it all that was before.  Two
workers, of one process each; messages are not in it: what is scheduled may be claimed by either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .exploring import Violated

RULES = {
    "settled_flushed": "a settlement, like all but claims, waits for its flush",
    "token": "a claim has a token of its own, which its settlement names: after a crash attempts are counted anew",
    "doubt": "what was scheduled before the crash is in doubt: withdrawn or failed, it is unknown, and undone",
    "put_back": "a worker that notices the crash puts back the claims of what its processes execute, then says so",
    "paused_claims": "nothing is claimed before every worker that lives has said so",
    "paused_passes": "no pass is made before that: it might withdraw what is being executed",
    "recognised": "a settlement that finds its step as it was before its claim takes it for its own",
    "lives": "it does so only under an incarnation that was not given up",
}

#: The rules that need no pause: after a crash alone every effect is undone or named, but attempts may run side by side.
WITHOUT_PAUSE = frozenset({"settled_flushed", "token", "doubt"})

#: No two attempts side by side; none beside the undo; none settled by another; no effect forgotten; no outcome refused.
CHECKS = frozenset({"ALIVE", "DRAIN", "FENCE", "LEAK", "RESULT"})

#: So many lost attempts are followed by another one.
MAX_LOST = 2

FINAL = ("COMPLETED", "COMPENSATED", "COMPENSATION_FAILED")


class Store(NamedTuple):
    """What is committed."""

    a: str = "scheduled"  # running, settled
    attempt: int = 0
    dispatch: int = 1
    token: int = -1  # which worker's claim it is
    lost: int = 0
    is_in_doubt: bool = False
    epoch: int = 0  # in which it was scheduled
    outcome: str = ""  # ok, failed, unknown, withdrawn
    b: str = ""  # ok, failed
    undo: str = ""  # scheduled, done
    status: str = "RUNNING"
    is_owed: bool = False  # a pass
    noticed: tuple[int, int] = (0, 0)  # the epoch that each worker has put its claims back in
    given_up: tuple[bool, bool] = (False, False)


class Process(NamedTuple):
    """A worker's only one."""

    at: str = "idle"  # body, ran, dead
    attempt: int = 0
    dispatch: int = 0
    result: str = ""
    is_given_up: bool = False  # though it may go on


class State(NamedTuple):
    store: Store = Store()
    flushed: Store = Store()
    epoch: int = 0  # how often the database has crashed
    processes: tuple[Process, Process] = (Process(), Process())
    has_effect: bool = False  # of a, which nobody has undone
    is_named: bool = False  # an effect that came after its undo, for an operator
    crashes: int = 2
    losses: int = 1  # of workers


class Unflushed:
    """What can happen to a step whose claim is not flushed, and to those who take it."""

    def __init__(
        self,
        rules: frozenset[str],
        *,
        checks: frozenset[str] = CHECKS,
        is_flushed: bool = False,
        crashes: int = 2,
        losses: int = 1,
    ) -> None:
        self.rules = rules
        self.checks = checks
        self.is_flushed = is_flushed  # the claim, after all, before the body begins
        self.crashes = crashes
        self.losses = losses

    def begin(self) -> State:
        return State(crashes=self.crashes, losses=self.losses)

    def is_final(self, state: State) -> bool:
        is_over = state.store.status in FINAL
        is_quiet = all(each.at in ("idle", "dead") for each in state.processes)
        if is_over and is_quiet and state.has_effect and state.store.status == "COMPENSATED" and not state.is_named:
            self._violate("LEAK: the instance is undone, and an effect of a is left, of which nobody knows")
        return is_over

    def _violate(self, what: str) -> None:
        if what.partition(":")[0] in self.checks:
            raise Violated(what)

    def steps(self, state: State) -> Iterator[tuple[str, bool, State]]:
        store = state.store
        for number, process in enumerate(state.processes):
            if process.at != "dead":
                yield from self._process(state, number, process)
                yield from self._faults_of(state, number)
            elif not store.given_up[number]:
                yield f"W{number} is given up", False, self._give_up(state, number)
        if store.b == "":
            for outcome in ("ok", "failed"):
                yield f"b: {outcome}", False, self._commit(state, self._owe(state, store._replace(b=outcome)))
        if store.is_owed and not self._is_paused(state, "paused_passes"):
            yield "the pass is made", False, self._commit(state, self._pass(state, store))
        if store.undo == "scheduled":
            yield "a is undone", False, self._undo(state)
        if state.store != state.flushed:
            yield "the log is flushed", False, state._replace(flushed=store)
        if state.crashes:
            yield "the database CRASHES", True, self._crash(state)

    # --- the store --------------------------------------------------------------------------------------------------

    def _commit(self, state: State, store: Store) -> State:
        """Commit, and wait for the disk, which takes all that was committed before with it."""
        return state._replace(store=store, flushed=store)

    def _crash(self, state: State) -> State:
        if state.store.a == "settled" and state.flushed.a != "settled":
            self._violate("RESULT: an outcome is gone that others have acted on")
        return state._replace(store=state.flushed, epoch=state.epoch + 1, crashes=state.crashes - 1)

    def _is_paused(self, state: State, rule: str) -> bool:
        """Tell whether a worker lives that has not put its claims back since the crash."""
        store = state.store
        each = zip(store.noticed, store.given_up, strict=True)
        return rule in self.rules and any(epoch != state.epoch and not is_gone for epoch, is_gone in each)

    def _is_doubtful(self, state: State, store: Store) -> bool:
        return store.is_in_doubt or ("doubt" in self.rules and store.epoch != state.epoch)

    # --- the instance -----------------------------------------------------------------------------------------------

    def _owe(self, state: State, store: Store) -> Store:
        """Let the pass follow what was settled: at once, or when there is no pause."""
        if self._is_paused(state, "paused_passes"):
            return store._replace(is_owed=True)
        return self._pass(state, store)

    def _pass(self, state: State, store: Store) -> Store:
        store = store._replace(is_owed=False)
        if store.b == "" or store.status in FINAL or store.undo:
            return store
        if store.b == "ok" and store.a != "settled":
            return store
        if (store.b, store.outcome) == ("ok", "ok"):
            return store._replace(status="COMPLETED")
        store = store._replace(status="COMPENSATING")
        if store.a == "running":
            return store
        if store.a == "scheduled":
            outcome = "unknown" if self._is_doubtful(state, store) else "withdrawn"
            store = store._replace(a="settled", outcome=outcome)
        if store.outcome in ("ok", "unknown"):
            return store._replace(undo="scheduled")
        return store._replace(status="COMPENSATED")

    def _undo(self, state: State) -> State:
        for number, each in enumerate(state.processes):
            if each.at == "body" and not each.is_given_up:
                self._violate(f"DRAIN: a is undone while W{number} runs it, which nobody gave up")
        status = "COMPENSATION_FAILED" if state.is_named else "COMPENSATED"
        undone = state.store._replace(undo="done", status=status)
        return self._commit(state._replace(has_effect=False), undone)

    # --- attempts ---------------------------------------------------------------------------------------------------

    def _process(self, state: State, number: int, process: Process) -> Iterator[tuple[str, bool, State]]:
        store, name = state.store, f"W{number}"
        if not process.is_given_up and store.noticed[number] != state.epoch:
            yield f"{name} notices the crash", False, self._put_back(state, number, process)
        if process.at == "idle":
            is_free = store.a == "scheduled" and not store.given_up[number]
            if is_free and not self._is_paused(state, "paused_claims"):
                yield f"{name} claims and begins a#{store.attempt + 1}", False, self._claim(state, number)
        elif process.at == "body":
            # what was charged before may be refused; how a given up attempt ends after its undo is beyond any rule
            for result in ("ok", "failed") if state.has_effect else ("ok",):
                is_beyond = process.is_given_up and bool(store.undo)
                after = state._replace(has_effect=state.has_effect or not is_beyond)
                ran = process._replace(at="ran", result=result)
                yield f"{name}: a#{process.attempt} ends: {result}", False, _with(after, number, ran)
        else:
            yield from self._settle(state, number, process)

    def _claim(self, state: State, number: int) -> State:
        store = state.store
        for other, each in enumerate(state.processes):
            if each.at == "body" and not each.is_given_up:
                self._violate(f"ALIVE: W{number} begins a while W{other} runs it, which nobody gave up")
        claimed = store._replace(
            a="running", attempt=store.attempt + 1, token=number, is_in_doubt=self._is_doubtful(state, store)
        )
        begun = _with(state, number, Process("body", claimed.attempt, store.dispatch))
        return self._commit(begun, claimed) if self.is_flushed else begun._replace(store=claimed)

    def _is_before_claim(self, store: Store, process: Process) -> bool:
        """Tell whether the step is as it was before the process claimed it."""
        before = ("scheduled", process.dispatch, process.attempt - 1)
        return process.at in ("body", "ran") and (store.a, store.dispatch, store.attempt) == before

    def _put_back(self, state: State, number: int, process: Process) -> State:
        store = state.store
        noticed = list(store.noticed)
        noticed[number] = state.epoch
        if "put_back" in self.rules and self._is_before_claim(store, process):
            is_in_doubt = self._is_doubtful(state, store)
            store = store._replace(a="running", attempt=process.attempt, token=number, is_in_doubt=is_in_doubt)
        return self._commit(state, store._replace(noticed=(noticed[0], noticed[1])))

    def _settle(self, state: State, number: int, process: Process) -> Iterator[tuple[str, bool, State]]:
        store, label = state.store, f"W{number} settles a#{process.attempt}: {process.result}"
        freed = _with(state, number, Process(is_given_up=process.is_given_up))
        is_held = (store.a, store.attempt) == ("running", process.attempt)
        if is_held and (store.token == number or "token" not in self.rules):
            if store.token != number:
                self._violate(f"FENCE: W{number}'s outcome is taken for that of W{store.token}, which is running")
        elif not self._is_recognised(state, number, process):
            if not process.is_given_up:
                self._violate(f"RESULT: W{number} has run a, nobody gave it up, and its outcome is refused")
            yield f"{label}: refused", False, self._name_stray(freed)
            return
        outcome = process.result
        if outcome == "failed" and self._is_doubtful(state, store):
            outcome = "unknown"
        settled = self._owe(state, store._replace(a="settled", outcome=outcome))
        if "settled_flushed" in self.rules:
            yield label, False, self._commit(freed, settled)
        else:
            yield label, False, freed._replace(store=settled)

    def _is_recognised(self, state: State, number: int, process: Process) -> bool:
        is_alive = not state.store.given_up[number] or "lives" not in self.rules
        return "recognised" in self.rules and is_alive and self._is_before_claim(state.store, process)

    def _name_stray(self, state: State) -> State:
        """Name an effect that came after its undo had begun."""
        if not state.store.undo or not state.has_effect:
            return state
        named = state._replace(is_named=True)
        if state.store.status == "COMPENSATED":
            return self._commit(named, state.store._replace(status="COMPENSATION_FAILED"))
        return named

    # --- workers ----------------------------------------------------------------------------------------------------

    def _faults_of(self, state: State, number: int) -> Iterator[tuple[str, bool, State]]:
        process = state.processes[number]
        if not state.losses or process.is_given_up:
            return
        lost = state._replace(losses=state.losses - 1)
        yield f"W{number} is KILLED at {process.at}", True, _with(lost, number, Process("dead"))
        silent = _with(lost, number, process._replace(is_given_up=True))
        yield f"W{number} falls SILENT at {process.at}, and is given up", True, self._give_up(silent, number)

    def _give_up(self, state: State, number: int) -> State:
        store = state.store
        given_up = list(store.given_up)
        given_up[number] = True
        store = store._replace(given_up=(given_up[0], given_up[1]))
        if (store.a, store.token) == ("running", number):
            store = store._replace(lost=store.lost + 1, is_in_doubt=True)
            if store.lost > MAX_LOST or store.status == "COMPENSATING":
                store = self._owe(state, store._replace(a="settled", outcome="unknown"))
            else:
                store = store._replace(a="scheduled", dispatch=store.dispatch + 1, epoch=state.epoch)
        return self._commit(state, store)


def _with(state: State, number: int, process: Process) -> State:
    processes = list(state.processes)
    processes[number] = process
    return state._replace(processes=(processes[0], processes[1]))
