"""Random workflow programs: data, and the workflow function that interprets them.

The same interpreter runs against the real ``ctx`` and against the model's, so the two differ in nothing but what
``ctx`` does.  What depends on the schedule it writes to a ``Trace``, from which the model reads it back: how far events
had been delivered when a wait began and ended, and whether a cancellation was raised there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from random import Random
from typing import Any, Literal

from orchestrator import errors
from orchestrator.core.context import Context
from orchestrator.core.handles import MessageHandle, TimerHandle
from orchestrator.core.records import Command, Compensation, Delivery, Kind, RegisterCompensation

from .driver import INSTANCE, STARTED_AT, SUCCEEDS, Attempt, Fate, Request, Row, Shell
from .host import FakeHost, Group
from .twin import Twin

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
    pivot: bool = False
    child: Literal["owned", "detached"] | None = None


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
    catches: Literal["step", "any", "cancel"]
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
class SleepUntil:
    """Sleep until so many seconds from now, or until an instant that is as likely past as not."""

    seconds: int | None


@dataclass(frozen=True, slots=True)
class Receive:
    channel: str
    has_timeout: bool
    catches: bool


@dataclass(frozen=True, slots=True)
class Open:
    """Get the handle of a message, or of a timer."""

    channel: str | None


@dataclass(frozen=True, slots=True)
class Post:
    """Send, publish, subscribe or leave."""

    what: Literal["send", "publish", "subscribe", "unsubscribe"]
    channel: str
    to: Literal["itself", "child", "gone", "nobody"]
    ignores: bool


@dataclass(frozen=True, slots=True)
class Recur:
    """Begin again, as often as the program may."""


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
    | SleepUntil
    | Receive
    | Open
    | Post
    | Recur
    | Register
)
Block = tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """What an instance does, and what will be done to it."""

    block: Block
    incoming: tuple[tuple[str, int], ...] = ()
    requests: tuple[Request, ...] = ()
    is_undone_later: bool = False
    parks: bool = False
    recurs: int = 0


class Refused(Exception):
    """What a program raises itself."""


class Returned(Exception):
    """Carries a return out of the nested blocks; an error like any other to the scopes it crosses."""


# --- the interpreter ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Waited:
    """One wait: how far events had been delivered when it began and ended, and what it asked for."""

    before: int
    known: int  # how many commands had been asked for when it began
    has_tail: bool = False  # it may end in a part that is shielded
    asked: int = 0
    after: int = 0
    is_raised: bool = False


@dataclass(slots=True)
class Trace:
    """What a pass saw of the schedule, and what it logged."""

    waits: list[Waited] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # the order at which the program looked at something
    lines: list[str] = field(default_factory=list)
    returned_at: int | None = None
    drawn: list[object] = field(default_factory=list)

    def clear(self) -> None:
        self.waits.clear()
        self.seen.clear()
        self.lines.clear()
        self.drawn.clear()
        self.returned_at = None


def kind_of(handle: Any) -> str:
    if isinstance(handle, MessageHandle | TimerHandle):
        return "message" if isinstance(handle, MessageHandle) else "timer"
    return getattr(handle, "kind", "step")


@dataclass(slots=True)
class Interpreter:
    """Runs a program; ``host`` reads its calls, ``ctx`` is the real one or the model's."""

    ctx: Any
    host: ProgramHost
    trace: Trace
    left: int = 0  # how many more runs there may be
    sagas: int = 0
    handles: list[Any] = field(default_factory=list)
    dead: list[Any] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def run(self, block: Block) -> list[Any]:
        with contextlib.suppress(Returned):
            self.block(block)
        self.trace.returned_at = self.position()[0]
        return self.values

    def position(self) -> tuple[int, int]:
        """Return how far events have been delivered, and how much has been asked for."""
        ctx = self.ctx
        return (ctx._pass.order, len(ctx._pass.nodes)) if isinstance(ctx, Context) else (0, 0)

    def begin_wait(self, *, has_tail: bool = False) -> Waited:
        self.trace.waits.append(Waited(*self.position(), has_tail))
        return self.trace.waits[-1]

    def end_wait(self, waited: Waited) -> None:
        waited.after, known = self.position()
        waited.asked = known - waited.known

    @contextlib.contextmanager
    def waiting(self, *, has_tail: bool = False) -> Iterator[None]:
        """Note a wait; its body asks for something first, maybe."""
        waited = self.begin_wait(has_tail=has_tail)
        try:
            yield
        except errors.WorkflowCancelled:
            waited.is_raised = True
            raise
        finally:
            self.end_wait(waited)

    def look(self) -> None:
        self.trace.seen.append(self.position()[0])

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
        settings: dict[str, Any] = {"timeout": 60 if call.fate.times_out else None, "optional": call.optional}
        if call.pivot:
            settings["pivot"] = True
        if call.child == "detached":
            settings["on_parent_end"] = "leave"
        elif call.child and call.undo is None:
            settings["compensate"] = False
        return settings

    def is_ready(self, handle: Any) -> bool:
        self.look()
        ready: bool = handle.ready()
        return ready

    def chosen(self, indexes: Iterable[int]) -> list[Any]:
        picked = [self.handles[index % len(self.handles)] for index in indexes if self.handles]
        return [handle for handle in dict.fromkeys(picked) if handle not in self.dead]

    def statement(self, statement: Statement) -> None:
        ctx, host = self.ctx, self.host
        match statement:
            case Run(call):
                with self.waiting():
                    self.be_refused(call)
                    value = ctx.run(host.step(call), **self.settings(call))
                self.keep(value)
            case RunGroup(calls):
                with self.waiting():
                    self.be_refused(*calls)
                    value = ctx.run(Group(tuple(host.step(call) for call in calls)), timeout=60)
                self.keep(value)
            case Start(call):
                self.handles.append(ctx.start(host.step(call), **self.settings(call)))
            case Use(what, index):
                for handle in self.chosen([index]):
                    self.use(what, handle)
            case Gather(indexes, calls, collects):
                steps = [*self.chosen(indexes), *(host.step(call) for call in calls)]
                with self.waiting():
                    self.be_refused(*calls)
                    values = ctx.gather(*steps, return_exceptions=collects)
                for value in values:
                    self.keep(value)
            case WaitFor():
                self.wait_for(statement)
            case Map(calls, concurrency, on_failure):
                items = [call.label for call in calls]
                mapped = host.mapped(calls)
                with self.waiting(has_tail=True):
                    values = ctx.map(mapped, items, concurrency=concurrency, on_failure=on_failure, timeout=60)
                for value in values:
                    self.keep(value)
            case Saga():
                self.saga(statement)
            case Try():
                self.try_block(statement)
            case Finally(block, last):
                try:
                    self.block(block)
                finally:
                    with self.waiting():
                        value = ctx.run(host.step(last), **self.settings(last))
                    self.keep(value)
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
            case SleepUntil(seconds):
                self.sleep_until(seconds)
            case Receive():
                self.receive(statement)
            case Open(channel):
                self.handles.append(ctx.timer(30) if channel is None else ctx.message(channel))
            case Post():
                self.post(statement)
            case Recur():
                self.recur()
            case Simple(what):
                self.simple(what)

    def saga(self, saga: Saga) -> None:
        waited = None
        try:
            with self.ctx.saga(parallel=saga.parallel):
                self.block(saga.block)
                waited = self.begin_wait(has_tail=True)
        except (errors.WorkflowCancelled, errors.CompensationFailed) as error:
            if waited is not None:
                waited.is_raised = isinstance(error.__cause__ or error, errors.WorkflowCancelled)
            raise
        finally:
            if waited is not None:
                self.end_wait(waited)

    def be_refused(self, *calls: Call) -> None:
        """Call now and then what is about to be called, the last of it with an argument that is refused, and go on."""
        if calls and calls[-1].label % 5 == 0 and isinstance(self.ctx, Context):
            *good, bad = (self.host.step(call) for call in calls)
            with contextlib.suppress(errors.PayloadTooLarge):
                self.ctx.gather(*good, replace(bad, args=("x" * 20_000,)))

    def use(self, what: str, handle: Any) -> None:
        kind = kind_of(handle)
        match what:
            case "get":
                with self.waiting():
                    value = handle.get()
                self.keep(value)
            case "cancel":
                handle.cancel()
                if kind == "message":  # nothing can be made of it any more
                    self.dead.append(handle)
            case "look":
                ready = self.is_ready(handle)
                failed = kind == "step" and handle.error is not None
                self.keep("failed" if failed else "fine" if ready else "open")
            case "accept" if kind == "step":
                self.ctx.accept(handle)

    def wait_for(self, statement: WaitFor) -> None:
        handles = self.chosen(statement.indexes)
        if not handles:
            return
        count = 1 + statement.count % len(handles)
        with self.waiting():
            self.ctx.wait(*handles, count=count, timeout=60 if statement.has_timeout else None)
        ready = [self.is_ready(handle) for handle in handles]
        assert statement.has_timeout or sum(ready) >= count
        self.block(statement.then if ready[0] else statement.otherwise)

    def sleep_until(self, seconds: int | None) -> None:
        now = self.ctx.now()
        instant = self.host.later if seconds is None else now + timedelta(seconds=seconds)
        with self.waiting():
            self.ctx.sleep_until(instant)
        assert self.ctx.now() >= instant or not isinstance(self.ctx, Context)

    def receive(self, statement: Receive) -> None:
        timeout = 60 if statement.has_timeout else None
        try:
            with self.waiting():
                message = self.ctx.receive(statement.channel, timeout=timeout)
        except errors.ReceiveTimedOut:
            if not statement.catches:
                raise
            message = "nothing"
        self.keep(message)

    def post(self, statement: Post) -> None:
        ctx, channel = self.ctx, statement.channel
        match statement.what:
            case "send":
                missing = "ignore" if statement.ignores else "raise"
                self.keep(ctx.send(self.receiver(statement.to), channel, len(self.values), missing=missing))
            case "publish":
                ctx.publish(channel, len(self.values))
            case "subscribe":
                ctx.subscribe(channel)
            case "unsubscribe":
                ctx.unsubscribe(channel)

    def receiver(self, to: str) -> str:
        if to == "itself":
            return INSTANCE
        children = [handle for handle in self.handles if hasattr(handle, "instance_id")]
        return str(children[-1].instance_id) if to == "child" and children else to

    def recur(self) -> None:
        if self.left == 0:
            return
        steps = [handle for handle in self.handles if kind_of(handle) == "step"]
        with self.waiting():
            self.ctx.gather(*steps, return_exceptions=True)
        self.look()
        self.ctx.commit()
        with self.waiting(has_tail=True):
            self.ctx.recur(self.left - 1)

    def try_block(self, statement: Try) -> None:
        caught: type[BaseException] = Exception
        if statement.catches != "any":
            caught = errors.StepFailed if statement.catches == "step" else errors.WorkflowCancelled
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
                with self.waiting():
                    self.ctx.sleep(30)
            case "raise":
                raise Refused
            case "return":
                raise Returned
            case "commit":
                self.look()
                self.ctx.commit()
            case "local":
                self.keep(self.ctx.local(seven))
            case "draw":
                assert 0 <= self.ctx.random() < 1
                self.trace.drawn += [self.ctx.random(), self.ctx.now(), self.ctx.uuid4()]
                if isinstance(self.ctx, Context):
                    self.trace.drawn.append(self.ctx.uuid4("key"))
                    self.ctx.set_attributes(drawn=len(self.trace.drawn))
                    self.ctx.set_progress(f"{len(self.values)} values")
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
        self.later = STARTED_AT + timedelta(minutes=5)
        self.receivers = {INSTANCE: Delivery.DELIVERED, "gone": Delivery.ENDED}
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
        first = mapped or call
        undo, plan = first.undo, None
        # a child is undone by its own compensations, unless another one is registered for its workflow
        if undo is not None and (first.child is None or first.label % 2):
            arguments = json.dumps({"args": [call.label], "kwargs": {}})
            plan = Compensation("undo", arguments, undo.passes, always=undo.always)
        self.task(f"work{call.label}", compensation=plan, is_workflow=first.child is not None)

    def find_receiver(self, instance_id: str) -> Delivery:
        # the ids of children begin with that of their parent; they are there from the pass that starts them
        is_child = instance_id.startswith(f"{INSTANCE}:")
        return Delivery.DELIVERED if is_child else super().find_receiver(instance_id)

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


def shell_of(program: Program, seed: int) -> tuple[Shell, ProgramHost, list[Trace]]:
    """Return a shell that will run a program, with its host, and a list that will hold the trace of each run."""
    host, trace, traces = ProgramHost(program.block), Trace(), list[Trace]()
    # the same once more, for a live pass that is to do just what the passes of the shell do
    live_host, live_trace = ProgramHost(program.block), Trace()

    def function_of(own_host: ProgramHost, own_trace: Trace) -> Callable[..., list[Any]]:
        def workflow(ctx: Any, left: int = program.recurs) -> list[Any]:
            own_trace.clear()
            return Interpreter(ctx, own_host, own_trace, left).run(program.block)

        return workflow

    def keep_trace() -> None:
        kept = Trace([*trace.waits], [*trace.seen], [*trace.lines], trace.returned_at, [*trace.drawn])
        traces.append(kept)
        assert live_trace == trace, "a live pass went another way"
        assert live_host.log.lines == host.log.lines

    shell = Shell(
        function_of(host, trace),
        host,
        host.fate_of,
        seed,
        incoming=list(program.incoming),
        requests=list(program.requests),
        is_undone_later=program.is_undone_later,
        parks=program.parks,
        ended_run=keep_trace,
        twin=Twin(function_of(live_host, live_trace), live_host, Random(seed)),
    )
    return shell, host, traces


def step_rows(shell: Shell) -> list[Row]:
    """Return the rows of steps and children, in the order in which they were started."""
    return [row for row in shell.rows if row.record.kind in (Kind.STEP, Kind.CHILD)]


# --- the generator --------------------------------------------------------------------------------------------------


class Generator:
    """Draws programs.  ``random`` is a ``Random``, or hypothesis's, which shrinks them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.labels = 0

    def program(self, size: int = 20) -> Program:
        self.left, self.has_pivot = size, self.chance(5)
        incoming = tuple(
            (self.channel(), self.random.randint(1, 9)) for _ in range(self.random.choice((0, 0, 1, 3, 6)))
        )
        requests: list[tuple[Request, ...]] = [
            (),
            (),
            (),
            ("cancel",),
            ("cancel",),
            ("deadline",),
            ("cancel", "deadline"),
        ]
        return Program(
            self.block(0),
            incoming,
            self.random.choice(requests),
            is_undone_later=self.chance(4),
            parks=self.chance(15),
            recurs=self.random.choice((0, 0, 1, 2)),
        )

    def channel(self) -> str:
        return self.random.choice("ab")

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
            (6, lambda: Run(self.single_call())),
            (1, lambda: RunGroup(self.few_calls())),
            (5, lambda: Start(self.started_call())),
            (4, self.use),
            (2, self.gather),
            (2, self.map),
            (3, self.simple),
            (1, self.register),
            (2, self.receive),
            (2, lambda: Open(self.random.choice(("a", "a", "b", None)))),
            (1, lambda: SleepUntil(self.random.choice((-10, 0, 50, None)))),
            (1, self.post),
        ]
        if depth == 0:
            plain.append((1, Recur))
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
        call = Call(self.label(), self.fate(), undo, optional=self.chance(10))
        return self.child(call) if self.chance(8) else call

    def single_call(self) -> Call:
        """Return a call that is none of many: it may be the pivot."""
        call = self.call()
        return replace(call, pivot=True, optional=False) if self.has_pivot and self.chance(4) else call

    def child(self, call: Call) -> Call:
        last = call.fate.attempts[-1]
        fate = replace(call.fate, attempts=("doubts" if last == "lost" else last,), declines=self.chance(3))
        return replace(call, fate=fate, child="owned")

    def started_call(self) -> Call:
        call = self.single_call()
        return replace(call, child="detached", pivot=False) if call.child and self.chance(3) else call

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

    def receive(self) -> Receive:
        return Receive(self.channel(), not self.chance(3), not self.chance(3))

    def post(self) -> Post:
        what: list[Literal["send", "publish", "subscribe", "unsubscribe"]]
        what = ["send", "send", "publish", "publish", "subscribe", "subscribe", "unsubscribe"]
        to: list[Literal["itself", "child", "gone", "nobody"]] = ["itself", "itself", "child", "gone", "nobody"]
        return Post(self.random.choice(what), self.channel(), self.random.choice(to), not self.chance(4))

    def register(self) -> Register:
        return Register(self.label(), self.undo())

    def try_(self, depth: int) -> Try:
        caught: list[Literal["step", "any", "cancel"]] = ["step", "step", "any", "any", "cancel"]
        catches = self.random.choice(caught)
        return Try(self.block(depth), self.block(depth), catches, self.chance(3))

    def wait_for(self, depth: int) -> WaitFor:
        return WaitFor(self.indexes(), self.random.randint(0, 2), self.chance(2), self.block(depth), self.block(depth))
