"""Random workflow programs: data, and the workflow function that interprets them.

The same interpreter runs against the real ``ctx`` and against the model's, so the two differ in nothing but what
``ctx`` does.  What depends on the schedule (which steps a wait found settled) it writes to a ``Trace``, from which the
model reads it back.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from orchestrator import errors
from orchestrator.core.records import Command, Compensation, Kind, RegisterCompensation

from .driver import SUCCEEDS, Attempt, Fate, Row, Shell
from .host import FakeHost, Group

Passes = Literal["result", "nothing", "step"]


@dataclass(frozen=True, slots=True)
class Undo:
    """The compensation of a call."""

    passes: Passes = "result"
    fate: Fate = SUCCEEDS
    always: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an activity of its own: ``label`` names both."""

    label: int
    fate: Fate
    undo: Undo | None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    call: Call


@dataclass(frozen=True, slots=True)
class RunGroup:
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Start:
    call: Call


@dataclass(frozen=True, slots=True)
class Use:
    """Do something with one of the handles started so far."""

    what: Literal["get", "cancel", "look", "accept"]
    index: int


@dataclass(frozen=True, slots=True)
class Gather:
    indexes: tuple[int, ...]
    calls: tuple[Call, ...]
    collects: bool


@dataclass(frozen=True, slots=True)
class WaitFor:
    """Wait for some of the handles; go on one way or another, by which of them settled."""

    indexes: tuple[int, ...]
    count: int
    has_timeout: bool
    then: Block
    otherwise: Block


@dataclass(frozen=True, slots=True)
class Map:
    calls: tuple[Call, ...]
    concurrency: int | None
    on_failure: Literal["stop", "collect"]


@dataclass(frozen=True, slots=True)
class Saga:
    block: Block
    parallel: bool


@dataclass(frozen=True, slots=True)
class Try:
    block: Block
    handler: Block
    catches: Literal["step", "any"]
    accepts: bool


@dataclass(frozen=True, slots=True)
class Finally:
    block: Block
    last: Call


@dataclass(frozen=True, slots=True)
class Swallow:
    """Catch everything, a suspension too."""

    block: Block


@dataclass(frozen=True, slots=True)
class If:
    """Branch on the last result."""

    block: Block
    otherwise: Block


@dataclass(frozen=True, slots=True)
class Loop:
    times: int
    block: Block


@dataclass(frozen=True, slots=True)
class Simple:
    what: Literal["sleep", "raise", "return", "commit", "local", "draw", "patched", "log"]


@dataclass(frozen=True, slots=True)
class Register:
    label: int
    undo: Undo


Statement = (
    Run
    | RunGroup
    | Start
    | Use
    | Gather
    | WaitFor
    | Map
    | Saga
    | Try
    | Finally
    | Swallow
    | If
    | Loop
    | Simple
    | Register
)
Block = tuple[Statement, ...]


class Refused(Exception):
    """What a program raises itself."""


class Returned(Exception):
    """Carries a return out of the nested blocks; an error like any other to the scopes it crosses."""


# --- the interpreter ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Trace:
    """What a pass saw of the schedule, and what it logged."""

    seen: list[bool] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def clear(self) -> None:
        self.seen.clear()
        self.lines.clear()


@dataclass(slots=True)
class Interpreter:
    """Runs a program; ``host`` reads its calls, ``ctx`` is the real one or the model's."""

    ctx: Any
    host: ProgramHost
    trace: Trace
    handles: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def run(self, block: Block) -> list[Any]:
        with contextlib.suppress(Returned):
            self.block(block)
        return self.values

    def block(self, block: Block) -> None:
        for statement in block:
            self._log(type(statement).__name__)
            self.statement(statement)

    def _log(self, line: str) -> None:
        self.trace.lines.append(line)
        self.ctx.logger.info(line)

    def keep(self, value: Any) -> None:
        self.values.append("failed" if isinstance(value, Exception) else value)

    def settings(self, call: Call) -> dict[str, Any]:
        return {"timeout": 60 if call.fate.times_out else None, "optional": call.optional}

    def is_ready(self, handle: Any) -> bool:
        ready: bool = handle.ready()
        self.trace.seen.append(ready)
        return ready

    def chosen(self, indexes: Iterable[int]) -> list[Any]:
        picked = [self.handles[index % len(self.handles)] for index in indexes if self.handles]
        return list(dict.fromkeys(picked))

    def statement(self, statement: Statement) -> None:
        ctx, host = self.ctx, self.host
        match statement:
            case Run(call):
                self.keep(ctx.run(host.step(call), **self.settings(call)))
            case RunGroup(calls):
                self.keep(ctx.run(Group(tuple(host.step(call) for call in calls)), timeout=60))
            case Start(call):
                self.handles.append(ctx.start(host.step(call), **self.settings(call)))
            case Use(what, index):
                for handle in self.chosen([index]):
                    self.use(what, handle)
            case Gather(indexes, calls, collects):
                steps = [*self.chosen(indexes), *(host.step(call) for call in calls)]
                for value in ctx.gather(*steps, return_exceptions=collects):
                    self.keep(value)
            case WaitFor():
                self.wait_for(statement)
            case Map(calls, concurrency, on_failure):
                items = [call.label for call in calls]
                mapped = host.mapped(calls)
                for value in ctx.map(mapped, items, concurrency=concurrency, on_failure=on_failure, timeout=60):
                    self.keep(value)
            case Saga(block, parallel):
                with ctx.saga(parallel=parallel):
                    self.block(block)
            case Try():
                self.try_block(statement)
            case Finally(block, last):
                try:
                    self.block(block)
                finally:
                    self.keep(ctx.run(host.step(last), **self.settings(last)))
            case Swallow(block):
                try:
                    self.block(block)
                except Returned:
                    raise
                except BaseException:
                    self.values.append("swallowed")
            case If(block, otherwise):
                numbers = [value for value in self.values if isinstance(value, int)]
                self.block(block if numbers and numbers[-1] % 2 else otherwise)
            case Loop(times, block):
                for _ in range(times):
                    self.block(block)
            case Register(label, _):
                ctx.compensate(host.compensation_of(label))
            case Simple(what):
                self.simple(what)

    def use(self, what: str, handle: Any) -> None:
        match what:
            case "get":
                self.keep(handle.get())
            case "cancel":
                handle.cancel()
            case "look":
                self.is_ready(handle)
                self.keep("failed" if handle.error is not None else "fine")
            case "accept":
                self.ctx.accept(handle)

    def wait_for(self, statement: WaitFor) -> None:
        handles = self.chosen(statement.indexes)
        if not handles:
            return
        count = 1 + statement.count % len(handles)
        self.ctx.wait(*handles, count=count, timeout=60 if statement.has_timeout else None)
        ready = [self.is_ready(handle) for handle in handles]
        assert statement.has_timeout or sum(ready) >= count
        self.block(statement.then if ready[0] else statement.otherwise)

    def try_block(self, statement: Try) -> None:
        caught = errors.StepFailed if statement.catches == "step" else Exception
        try:
            self.block(statement.block)
        except Returned:
            raise
        except caught as error:
            if statement.accepts and isinstance(error, errors.StepFailed):
                self.ctx.accept(error)
            self.block(statement.handler)

    def simple(self, what: str) -> None:
        match what:
            case "sleep":
                self.ctx.sleep(30)
            case "raise":
                raise Refused
            case "return":
                raise Returned
            case "commit":
                for handle in self.handles:
                    self.is_ready(handle)
                self.ctx.commit()
            case "local":
                self.keep(self.ctx.local(seven))
            case "draw":
                assert 0 <= self.ctx.random() < 1
                self.ctx.now()
                self.ctx.uuid4()
            case "patched":
                self.keep(self.ctx.patched("change"))
            case _:
                self._log("a line of its own")


def seven() -> int:
    return 7


# --- its host and its fates -----------------------------------------------------------------------------------------


class ProgramHost(FakeHost):
    """Knows a task for each label of a program, and one that a map hands all its calls to."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.calls: dict[int, Call] = {}
        self.registered: dict[int, Undo] = {}
        self.task("work")
        self.task("undo")
        _list_calls(block, self)

    def step(self, call: Call) -> Any:
        return self.tasks[f"work{call.label}"].s(call.label)

    def mapped(self, calls: tuple[Call, ...]) -> Any:
        return self.tasks[f"work{calls[0].label}"].s()

    def compensation_of(self, label: int) -> Any:
        return self.tasks["undo"].s(label)

    def add(self, call: Call, mapped: Call | None = None) -> None:
        self.calls[call.label] = call
        undo = (mapped or call).undo
        plan = None
        if undo is not None:
            arguments = json.dumps({"args": [call.label], "kwargs": {}})
            plan = Compensation("undo", arguments, undo.passes, always=undo.always)
        self.task(f"work{call.label}", compensation=plan)

    def fate_of(self, command: Command, undone: Row | None) -> Fate:
        """Return the fate of a step by its label, and that of a compensation by the label of what it undoes."""
        if undone is None:
            return self.calls[label_of(command)].fate
        if isinstance(undone.command, RegisterCompensation):
            return self.registered[label_of(undone.command)].fate
        undo = self.calls[label_of(undone.command)].undo
        return undo.fate if undo is not None else SUCCEEDS


def label_of(command: Command) -> int:
    """Return the label of the call, or of the registered compensation, that a command came from."""
    arguments = command.compensation.arguments if isinstance(command, RegisterCompensation) else command.arguments  # type: ignore[union-attr]
    label: int = json.loads(arguments)["args"][-1]
    return label


def _list_calls(block: Block, host: ProgramHost) -> None:
    for statement in block:
        match statement:
            case Run(call) | Start(call):
                host.add(call)
            case RunGroup(calls) | Gather(_, calls, _):
                for call in calls:
                    host.add(call)
            case Map(calls, _, _):
                for call in calls:
                    host.add(call, mapped=calls[0])
            case Register(label, undo):
                host.registered[label] = undo
            case Finally(inner, last):
                host.add(last)
                _list_calls(inner, host)
            case WaitFor(then=first, otherwise=second) | Try(block=first, handler=second) | If(first, second):
                _list_calls(first, host)
                _list_calls(second, host)
            case Saga(block=inner) | Swallow(inner) | Loop(block=inner):
                _list_calls(inner, host)
            case _:
                pass


def shell_of(block: Block, seed: int) -> tuple[Shell, ProgramHost, Trace]:
    """Return a shell that will run a program, with its host and the trace of its latest pass."""
    host, trace = ProgramHost(block), Trace()

    def workflow(ctx: Any) -> list[Any]:
        trace.clear()
        return Interpreter(ctx, host, trace).run(block)

    return Shell(workflow, host, host.fate_of, seed), host, trace


def step_rows(shell: Shell) -> list[Row]:
    """Return the rows of steps, in the order in which they were started."""
    return [row for row in shell.rows if row.record.kind is Kind.STEP]


# --- the generator --------------------------------------------------------------------------------------------------


class Generator:
    """Draws programs.  ``random`` is a ``Random``, or hypothesis's, which shrinks them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.labels = 0

    def program(self, size: int = 20) -> Block:
        self.left = size
        return self.block(0)

    def block(self, depth: int) -> Block:
        statements: list[Statement] = []
        for _ in range(self.random.randint(1, 4) if depth else self.random.randint(2, 9)):
            if self.left <= 0:
                break
            self.left -= 1
            statements.append(self.statement(depth))
        return tuple(statements)

    def statement(self, depth: int) -> Statement:
        plain: list[tuple[int, Callable[[], Statement]]] = [
            (6, lambda: Run(self.call())),
            (1, lambda: RunGroup(self.few_calls())),
            (5, lambda: Start(self.call())),
            (4, self.use),
            (2, self.gather),
            (2, self.map),
            (3, self.simple),
            (1, self.register),
        ]
        nested: list[tuple[int, Callable[[], Statement]]] = [
            (3, lambda: Saga(self.block(depth + 1), self.chance(4))),
            (12 if depth == 0 else 4, lambda: self.try_(depth + 1)),
            (1, lambda: Finally(self.block(depth + 1), self.call())),
            (1, lambda: Swallow(self.block(depth + 1))),
            (1, lambda: If(self.block(depth + 1), self.block(depth + 1))),
            (1, lambda: Loop(self.random.randint(1, 2), self.block(depth + 1))),
            (2, lambda: self.wait_for(depth + 1)),
        ]
        choices = plain + (nested if depth < 3 else [])
        drawn = self.random.randint(0, sum(weight for weight, _ in choices) - 1)
        for weight, make in choices:
            drawn -= weight
            if drawn < 0:
                return make()
        raise AssertionError

    def chance(self, one_in: int) -> bool:
        return self.random.randint(0, one_in - 1) == one_in - 1

    def label(self) -> int:
        self.labels += 1
        return self.labels

    def call(self) -> Call:
        undo = None if self.chance(6) else self.undo()
        return Call(self.label(), self.fate(), undo, optional=self.chance(10))

    def few_calls(self) -> tuple[Call, ...]:
        return tuple(self.call() for _ in range(self.random.randint(1, 3)))

    def fate(self) -> Fate:
        kind = self.random.randint(0, 15)
        value = self.random.randint(0, 9)
        if kind < 10:
            return Fate(value=value)
        if kind < 12:
            return Fate(("fails",), value, raises=self.random.choice((RuntimeError, TypeError, KeyError)))
        attempts: tuple[Attempt, ...] = tuple(
            self.random.choice(("fails", "lost")) for _ in range(self.random.randint(0, 2))
        )
        last: Attempt = self.random.choice(("succeeds", "fails", "lost", "doubts"))
        times_out: list[Literal["running", "waiting"] | None] = [None, None, "running", "running", "waiting"]
        return Fate((*attempts, last), value, self.random.choice(times_out))

    def undo(self) -> Undo:
        attempts: list[tuple[Attempt, ...]] = [("succeeds",)] * 6
        attempts += [("fails", "succeeds"), ("lost", "succeeds"), ("fails",), ("doubts",)]
        passes: list[Passes] = ["result", "nothing", "step"]
        return Undo(self.random.choice(passes), Fate(self.random.choice(attempts)), always=self.chance(8))

    def use(self) -> Use:
        return Use(self.random.choice(("get", "get", "cancel", "look", "accept")), self.random.randint(0, 5))

    def indexes(self) -> tuple[int, ...]:
        return tuple(self.random.randint(0, 5) for _ in range(self.random.randint(1, 3)))

    def gather(self) -> Gather:
        return Gather(self.indexes(), self.few_calls() if self.chance(2) else (), self.chance(2))

    def map(self) -> Map:
        calls = tuple(self.call() for _ in range(self.random.randint(1, 5)))
        concurrency = self.random.choice((None, 1, 2, 3))
        return Map(calls, concurrency, self.random.choice(("stop", "collect")))

    def simple(self) -> Simple:
        kinds: list[Literal["sleep", "raise", "return", "commit", "local", "draw", "patched", "log"]]
        kinds = ["sleep", "sleep", "raise", "return", "commit", "local", "local", "draw", "patched", "log"]
        return Simple(self.random.choice(kinds))

    def register(self) -> Register:
        return Register(self.label(), self.undo())

    def try_(self, depth: int) -> Try:
        catches: Literal["step", "any"] = "step" if self.chance(2) else "any"
        return Try(self.block(depth), self.block(depth), catches, self.chance(3))

    def wait_for(self, depth: int) -> WaitFor:
        return WaitFor(self.indexes(), self.random.randint(0, 2), self.chance(2), self.block(depth), self.block(depth))
