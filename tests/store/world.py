"""A coordinator over a real database, workflow functions run by the real core, and no broker.

What a worker does is called directly: a test claims a step and says how its attempt ended.  Time stands still until
the test moves it.
"""

from __future__ import annotations

import copy
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from orchestrator.core.attempts import AttemptDoubtful, AttemptFailed, AttemptLost, AttemptSucceeded, Ended
from orchestrator.core.live import LivePass
from orchestrator.core.records import Decision, Delivery, Event, History, Kind, PublishMessage, Record
from orchestrator.runtime import mail
from orchestrator.runtime.aftermath import Aftermath
from orchestrator.runtime.change import Outbox
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.forks import Forks
from orchestrator.runtime.lifecycle import Lifecycle
from orchestrator.runtime.mail import Postman
from orchestrator.runtime.operator import Operator
from orchestrator.runtime.passes import WorkflowOptions
from orchestrator.runtime.settings import Settings
from orchestrator.runtime.timers import Timers
from orchestrator.store import claiming, due, history, instances, mailbox, tables, workers
from orchestrator.store.claiming import Claimant, Held
from orchestrator.store.engine import Store
from orchestrator.store.history import HistoryRow, StepKey
from orchestrator.store.instances import Instance, Status
from orchestrator.store.mailbox import NewMail
from orchestrator.store.workers import Worker
from tests.core.host import FakeHost, Signature, failure

BEGINNING = datetime(2024, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)
PATIENCE_SECONDS = 20.0

FAILS = AttemptFailed(failure(RuntimeError, "declined"))
DOUBTS = AttemptDoubtful(failure(TimeoutError, "no answer"))
LOST = AttemptLost(failure(Exception, "its process ended"))


def succeeds(value: object = None) -> AttemptSucceeded:
    return AttemptSucceeded(json.dumps(value))


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = BEGINNING

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Host(FakeHost):
    """Finds the receivers of messages in the store."""

    def __init__(self, store: Store | None) -> None:
        super().__init__(max_payload_bytes=4 * 1024 * 1024)
        self.store = store

    def find_receiver(self, instance_id: str) -> Delivery:
        if self.store is None:
            return super().find_receiver(instance_id)
        with self.store.read("find-receiver") as connection:
            return mail.find_receiver(connection, instance_id)


class Scripted:
    """Workflow functions by name; ``during_pass`` is called once, inside the next pass, before it commits."""

    def __init__(
        self, functions: dict[str, Callable[..., Any]], tasks: Iterable[str], store: Store | None = None
    ) -> None:
        self.functions = functions
        self.host = Host(store)
        for name in functions:
            self.host.task(name, is_workflow=True)
        for name in tasks:
            self.host.task(name)
        self.passes: list[str] = []
        self.went_on = 0  # passes that went on from where the one before stood
        self.declared = WorkflowOptions()
        self.during_pass: Callable[[], object] | None = None

    def knows(self, workflow: str) -> bool:
        return workflow in self.functions

    def names(self) -> list[str]:
        return sorted(self.functions)

    def options(self, _workflow: str) -> WorkflowOptions:
        return self.declared

    def decide(self, instance: Instance, history: History) -> tuple[Decision, LivePass | None]:
        self.passes.append(instance.id)
        args = json.loads(instance.input)["args"]
        live = LivePass(self.functions[instance.workflow], tuple(args), {}, history, self.host)
        decision = live.decide()
        self._interrupt()
        return decision, live

    def go_on(self, live: LivePass, instance: Instance, records: Sequence[Record], events: Sequence[Event]) -> Decision:
        decision = live.go_on(records, events, passed_order=instance.passed_order)
        self.passes.append(instance.id)
        self.went_on += 1
        self._interrupt()
        return decision

    def _interrupt(self) -> None:
        interruption, self.during_pass = self.during_pass, None
        if interruption is not None:
            interruption()


TASKS = ("reserve", "charge", "ship", "release", "refund", "recall", "work", "undo")


def step(name: str, *args: Any, **options: Any) -> Signature:
    return Signature(name, args, options=options)


class Bell:
    """Takes what is to be published, in place of a broker."""

    def __init__(self, world: World) -> None:
        self.world = world

    def deliver(self, outbox: Outbox) -> None:
        self.world.publish(outbox)

    def workflow_queue(self, _workflow: str, _options: dict[str, Any]) -> None:
        return None

    def publish_start_of_child(self, row: HistoryRow, _generation: str) -> None:
        self.world.begun.append(row.child_id or "")

    def publish(self, instance_id: str, *_rest: Any) -> str:
        return instance_id


class World:
    """One instance at a time, the workers that run its steps, and what was published for it."""

    def __init__(self, store: Store, **functions: Callable[..., Any]) -> None:
        self.store = store
        self.clock = Clock()
        self.settings = Settings(store_patience=PATIENCE_SECONDS, live_passes=100)
        self.workflows = Scripted(functions, TASKS, store)
        self.incarnation = self.hire("worker-1", functions)
        self.generation = secrets.token_hex(8)
        self.instance_id = "order-1"
        self.run_number = 0
        self.published: list[tuple[int, int]] = []
        self.passes_owed = 0
        self.begun: list[str] = []  # ids of children whose start was published
        self._held: dict[tuple[StepKey, int], Held] = {}  # what a claim found, as its process has it
        self.connect()

    def connect(self, store: Store | None = None) -> None:
        """Set up what the runtime sets up in a process, over ``store`` as that process has it."""
        self.store = store or self.store
        self.coordinator = self.coordinator_of(self.incarnation)
        bell: Any = Bell(self)
        self.postman = Postman(self.coordinator)
        self.lifecycle = Lifecycle(self.coordinator, bell)
        self.operator = Operator(self.coordinator, bell)
        self.forks = Forks(self.coordinator, bell)
        self.aftermath = Aftermath(self.coordinator, bell, bell, self.postman)

    def at(self, instance_id: str) -> World:
        """Return the same world, looking at another instance in its present run."""
        other = copy.copy(self)
        other.instance_id = instance_id
        other.generation, other.run_number = other.instance.generation, other.instance.run
        return other

    def elsewhere(self, store: Store) -> World:
        """Return the same world as another process sees it, which shares nothing but the database."""
        other = copy.copy(self)
        with store.read("warm-up"):
            pass
        other.connect(store)
        return other

    def coordinator_of(
        self, incarnation: str, store: Store | None = None, workflows: Scripted | None = None
    ) -> Coordinator:
        return Coordinator(
            store or self.store, self.settings, workflows or self.workflows, lambda: incarnation, self.clock
        )

    def hire(self, incarnation: str, serves: Iterable[str] = ()) -> str:
        """Record a worker."""
        new = Worker(incarnation, "node", 1, "0", 0, self.clock(), self.clock(), tuple(serves), TASKS, ())
        with self.store.begin("hire") as connection:
            workers.insert_worker(connection, new)
        return incarnation

    def fire(self, incarnation: str) -> None:
        """Give a worker up."""
        with self.store.begin("fire") as connection:
            assert workers.mark_dead(connection, incarnation, None, self.clock())

    # --- what the runtime would do ------------------------------------------------------------------------------------

    def record(self, workflow: str, *args: Any, instance_id: str = "order-1", grace: float = 0.0) -> None:
        """Record an instance that owes its first pass, and whose message is doubted after ``grace`` seconds."""
        self.instance_id = instance_id
        with self.store.begin("start") as connection:
            assert instances.insert_instance(
                connection,
                instance_id=instance_id,
                generation=self.generation,
                workflow=workflow,
                queue=None,
                arguments=json.dumps({"args": args, "kwargs": {}}),
                request=None,
                now=self.clock(),
                pass_due_at=self.clock() + timedelta(seconds=grace),
            )

    def begin(self, *, is_counted: bool = False) -> None:
        """Take the first message of an instance for the first time."""
        self.publish(self.coordinator.begin(self.instance_id, self.generation, None, is_counted=is_counted))

    def start(self, workflow: str, *args: Any, instance_id: str = "order-1") -> None:
        self.record(workflow, *args, instance_id=instance_id)
        self.advance()

    def advance(self, coordinator: Coordinator | None = None) -> None:
        self.publish((coordinator or self.coordinator).advance(self.instance_id, self.generation))

    def claim(
        self,
        seq: int,
        *,
        by: str = "worker-1",
        dispatch: int | None = None,
        generation: str | None = None,
        compensation: str | None = None,
        name: str | None = None,
    ) -> HistoryRow | None:
        key = StepKey(self.instance_id, generation or self.generation, self.run_number, seq)
        if dispatch is None:
            dispatch = self.row(seq).dispatch
        with self.store.begin("claim", locks_late=True) as connection:
            held = claiming.claim(
                connection, key, name or self.row(seq).name, dispatch, Claimant(by, 1), self.clock(), compensation
            )
        if held is None:
            return None
        self._held[key, held.row.attempt] = held
        return held.row

    def take(self, seq: int, *, by: str = "worker-1") -> HistoryRow:
        row = self.claim(seq, by=by)
        assert row is not None
        return row

    def end(self, row: HistoryRow, ended: Ended, *, coordinator: Coordinator | None = None) -> bool:
        """Settle an attempt as its worker would; return whether it still held the claim."""
        ends = (coordinator or self.coordinator).end_attempt
        was_held, outbox = ends(row.key, row.attempt, ended, held=self.held(row))
        self.publish(outbox)
        return was_held

    def held(self, row: HistoryRow) -> Held | None:
        """Return what the claim of an attempt found."""
        return self._held.get((row.key, row.attempt))

    def run(self, seq: int, ended: Ended) -> HistoryRow:
        """Claim a step and end its attempt."""
        row = self.take(seq)
        assert self.end(row, ended)
        return row

    def lose(self, row: HistoryRow) -> None:
        """Give an attempt up, as a poller would."""
        was_held, outbox = self.coordinator.end_attempt(row.key, row.attempt, LOST, makes_pass=False)
        assert was_held
        self.publish(outbox)

    def time_out(self, seq: int) -> None:
        self.publish(self.coordinator.time_out(self.row(seq).key))

    def fire_timers(self) -> None:
        """Fire what is due, as a poller would."""
        timers = Timers(self.coordinator)
        timers.fire()
        timers.publish(self._note_pass, PATIENCE_SECONDS)

    def _note_pass(self, _instance_id: str, _generation: str, _queue: str | None) -> None:
        self.passes_owed += 1

    # --- what is asked of the instance, and what comes for it ---------------------------------------------------------

    def send(
        self,
        channel: str,
        message: object = None,
        message_id: str | None = None,
        *,
        missing: Literal["raise", "ignore"] = "raise",
    ) -> bool:
        """Send a message, and leave it in the mailbox."""
        new = NewMail(self.instance_id, channel, json.dumps(message), message_id)
        return self.postman.send(new, missing, None, lambda _outbox: None)

    def publish_message(self, channel: str, message: object, message_id: str | None = None) -> Outbox:
        """Publish a message, and leave it in the mailboxes."""
        told: list[Outbox] = []
        self.postman.publish(PublishMessage(channel, "", json.dumps(message), message_id), None, told.append)
        return told[0]

    def wake(self) -> None:
        """Let the instance take notice of its mail."""
        self.publish(self.postman.wake(self.instance_id))

    def cancel(self, reason: str | None = None) -> None:
        self.lifecycle.cancel(self.instance, reason, terminate=False)

    def start_child(self, seq: int) -> None:
        """Begin the life of the child that a record asks for."""
        self.publish(self.aftermath.start_child(self.row(seq)))

    def child(self, seq: int) -> World:
        """Return the world, looking at the child that a record asked for."""
        return self.at(self.row(seq).child_id or "")

    def go_on(self) -> None:
        """Do what is there to be done without a worker: passes, mail, children, handing out; nothing of the clock."""
        for _ in range(100):
            if not self._go_on_once():
                return
        raise AssertionError("there is always something left to do")

    def _go_on_once(self) -> bool:
        now = self.clock()
        with self.store.read("look") as connection:
            owed = instances.list_owed_passes(connection, now + timedelta(days=1), 100)
            receivers = mailbox.list_due_receivers(connection, now, 100)
            open_children = (tables.history.c.kind == Kind.CHILD, tables.history.c.state == "scheduled")
            children = [row for row in history.list_rows(connection, open_children, 100) if row.publications]
        for each in owed:
            self.publish(self.coordinator.advance(each.instance_id, each.generation))
        for instance_id in receivers:
            self.publish(self.postman.wake(instance_id))
        for row in children:
            self.publish(self.aftermath.start_child(row))
        shared = self.postman.hand_out(None)
        self.publish(shared)
        return bool(owed or receivers or children or shared.owes_pass)

    def pass_deadlines(self) -> None:
        """Do what the poller does about deadlines."""
        with self.store.read("deadlines") as connection:
            passed = instances.list_past_deadline(connection, self.clock(), 100)
        for instance_id, generation in passed:
            self.publish(self.coordinator.pass_deadline(instance_id, generation))

    def settle_due(self) -> None:
        """Settle what the clock has brought, as the poller does."""
        self.fire_timers()
        with self.store.read("due-records") as connection:
            records = due.list_due_records(connection, self.clock(), 100)
        for record in records:
            self.publish(self.coordinator.time_out(record.key))

    def publish(self, outbox: Outbox) -> None:
        self.published += [(row.seq, row.dispatch) for row in outbox.steps]
        self.passes_owed += len(outbox.owes_pass)

    # --- what is recorded ---------------------------------------------------------------------------------------------

    @property
    def instance(self) -> Instance:
        with self.store.read("look") as connection:
            found = instances.find_instance(connection, self.instance_id)
        assert found is not None
        return found

    def status(self) -> Status:
        return self.instance.status

    def rows(self) -> list[HistoryRow]:
        with self.store.read("look") as connection:
            return history.load_rows(connection, self.instance_id, self.run_number)

    def row(self, seq: int) -> HistoryRow:
        with self.store.read("look") as connection:
            found = history.find_row(connection, StepKey(self.instance_id, self.generation, self.run_number, seq))
        assert found is not None
        return found

    def states(self) -> list[str]:
        """Return each record as ``name state``, with the outcome for what has one."""
        return [f"{row.name} {row.outcome or row.state}" for row in self.rows()]

    def result(self) -> Any:
        """Return what the instance returned, which has to have completed."""
        found = self.instance
        assert (found.status, found.failure) == (Status.COMPLETED, None)
        return json.loads(found.result or "null")

    def open_steps(self) -> list[int]:
        """Return the ``seq`` of what a worker may claim."""
        kinds = (Kind.STEP, Kind.COMPENSATION)
        return [row.seq for row in self.rows() if row.state == "scheduled" and row.kind in kinds]

    def run_all(self, ended: Ended | None = None) -> None:
        """Run every step that may be claimed, and go on, until there is none."""
        for _ in range(100):
            self.go_on()
            seqs = self.open_steps()
            if not seqs:
                return
            self.run(seqs[0], ended or succeeds(seqs[0]))
        raise AssertionError("there is always another step")


# --- concurrency --------------------------------------------------------------------------------------------------


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Call all in threads of their own, released together; return what they returned, or raise what one raised."""
    barrier = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def call(index: int, function: Callable[[], Any]) -> None:
        try:
            barrier.wait(PATIENCE_SECONDS)
            results[index] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    join(threads)
    if errors:
        raise errors[0]
    return results


def join(threads: Sequence[threading.Thread]) -> None:
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a thread did not end"


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = threading.Event()
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        pause.wait(0.01)
