"""Whoever sends, cancels, wakes, undoes, forks or starts a child dies by SIGKILL; what was committed is not lost.

Each point has an instance of its own, as in ``test_crash_points``.  What a client does is done by a process of its own,
which dies there; if it had not committed, it is done again, as a client would.  Of ``child`` the pool process dies that
comes to the point (or the worker, where its poller does), of ``worker`` all of it, and a new one is started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest

from orchestrator import WorkflowHandle
from tests.brokers import embedded_valkey
from tests.runtime import crashing, lifecycles
from tests.runtime.clients import KILLED, Clients
from tests.runtime.cluster import ENDED, ROOT, Cluster
from tests.waiting import wait_until

TASKS = lifecycles.__name__
#: A poller may do first what a client was to die of: then another instance is tried.
MOST_TRIES = 8


def around(purpose: str) -> tuple[str, str]:
    return (f"{purpose}:before-commit", f"{purpose}:after-commit")


def around_publishing(what: str) -> tuple[str, str]:
    return (f"{what}:before", f"{what}:after")


@dataclass(frozen=True)
class Expected:
    """What an instance comes to; effects may be repeated, so only their first occurrences are compared."""

    status: str
    effects: tuple[str, ...]
    result: Any = None
    may_be_early: bool = False  # it may end before its first step has begun


@dataclass(frozen=True)
class Story:
    """The life of an instance, and of another one that belongs to it; ``{}`` is its id in ``args``."""

    workflow: str
    args: tuple[Any, ...]
    expected: Expected
    partner: Expected | None = None  # a child, a receiver, a fork: its id ends with -partner
    receiver: tuple[Any, ...] | None = None  # arguments of the partner that is started first
    operation: tuple[Any, ...] = ()  # what a client does to it, when ``ready`` is its status or its number of records
    ready: str | int = 0
    takes_messages: bool = False  # what is received ends with a message "end"


RECEIVED = Expected("COMPLETED", ("do got m",), ["m"])
SHIPPED = Expected("COMPLETED", ("do a", "do b"), ["a", "b"])
CANCELLED = Expected("CANCELLED", ("do a", "undo a"))
CHILD_UNDONE = Expected("COMPENSATED", ("do c", "undo c"))

STORIES = {
    # what a client does
    "started": Story("ships", (), SHIPPED, operation=("start", f"{TASKS}.ships")),
    "sent": Story(
        "receives", ("{}", None), RECEIVED, operation=("send", "{}", "m", "id"), ready=1, takes_messages=True
    ),
    "broadcast": Story(
        "receives", ("{}", "broadcast"), RECEIVED, operation=("publish", "m", "id"), ready=2, takes_messages=True
    ),
    "competing": Story(
        "receives", ("{}", "competing"), RECEIVED, operation=("publish", "m", "id"), ready=2, takes_messages=True
    ),
    "cancelled": Story("sleeps", (), CANCELLED, operation=("cancel",), ready=2),
    "terminated": Story("sleeps", (), Expected("TERMINATED", ("do a",)), operation=("terminate",), ready=2),
    "undone": Story(
        "ships",
        (),
        Expected("COMPENSATED", ("do a", "do b", "undo b", "undo a")),
        operation=("undo",),
        ready="COMPLETED",
    ),
    "resumed": Story("is_parked", (), SHIPPED, operation=("resume",), ready="BLOCKED"),
    "failed": Story(
        "is_parked",
        (),
        Expected("COMPENSATED", ("do a", "do b", "undo a")),
        operation=("fail_step", 1),
        ready="BLOCKED",
    ),
    "forked": Story(
        "ships",
        (),
        SHIPPED,
        partner=Expected("COMPLETED", ("do b",), ["a", "b"]),
        operation=("fork", 1, "{}-partner"),
        ready="COMPLETED",
    ),
    # what workers do by themselves
    "tells": Story(
        "tells", ("{}-partner", "send"), Expected("COMPLETED", ("do a", "do b"), "b"), RECEIVED, ("{}-partner", None)
    ),
    "publishes": Story(
        "tells",
        ("{}-partner", "publish"),
        Expected("COMPLETED", ("do a", "do b"), "b"),
        RECEIVED,
        ("{}-partner", "competing"),
    ),
    "has-child": Story("has_child", ("{}-partner", False), Expected("COMPENSATED", ("do a", "undo a")), CHILD_UNDONE),
    "cancels-child": Story(
        "has_child",
        ("{}-partner", True),
        CANCELLED,
        Expected("CANCELLED", ("do c", "undo c")),
        operation=("cancel",),
        ready=2,
    ),
    "recurs": Story("recurs", (0,), Expected("COMPLETED", ("do run 0", "do run 1", "do run 2"), 2)),
    "late": Story("is_late", (), Expected("CANCELLED", ("do a", "undo a"), may_be_early=True)),
    "naps": Story("naps", (), SHIPPED),
}

#: The points at which a client dies: story, point, record, and whether it is the partner's point.
Place = tuple[str, str, int | None, bool]


def _places(story: str, points: tuple[str, ...], seq: int | None = None, *, partner: bool = False) -> list[Place]:
    return [(story, point, seq, partner) for point in points]


OWED = around_publishing("publish-pass")
OF_CLIENTS: list[Place] = [
    *_places("started", (*around("start"), *around_publishing("publish-start"))),
    *_places("sent", (*around("send"), *around("wake"), *OWED)),
    *_places("broadcast", (*around("publish-message"), *around("wake"))),
    *_places("competing", (*around("publish-message"), *around("win"), *around("wake"))),
    *_places("cancelled", (*around("cancel"), *OWED)),
    *_places("terminated", (*around("terminate"), *around("finished"))),
    *_places("undone", (*around("undo"), *OWED)),
    *_places("resumed", around("resume")),
    *_places("resumed", around_publishing("publish"), 1),
    *_places("failed", (*around("fail-step"), *OWED)),
    *_places("forked", (*around("fork"), *around_publishing("publish-start")), partner=True),
]
OF_WORKERS: list[Place] = [
    *_places("tells", around("settle"), 0),
    *_places("tells", (*around("wake"), *OWED, "advance:after-commit"), partner=True),
    *_places("publishes", around("settle"), 0),
    *_places("publishes", around("win"), partner=True),
    *_places("has-child", around("start-child")),
    *_places("has-child", around_publishing("publish-start"), partner=True),
    *_places("has-child", around("settle"), 0, partner=True),  # its end, and the report to its parent
    *_places("has-child", OWED),  # of the parent, because of that
    *_places("has-child", around("wake"), partner=True),  # for its undo
    *_places("has-child", around("settle"), 1, partner=True),  # the end of its undo, and the report
    *_places("cancels-child", around("wake"), partner=True),
    *_places("cancels-child", around("advance")),
    *_places("recurs", around("settle"), 0),
    *_places("recurs", (*OWED, "advance:before-commit")),
    *_places("late", around("deadline")),
    *_places("naps", around("fire-timers")),
]


@dataclass(frozen=True)
class Point:
    """Where a life is hit."""

    story: str
    name: str
    seq: int | None
    is_partners: bool

    @property
    def id(self) -> str:
        where = "-partner" if self.is_partners else ""
        return f"{self.story}{where}-{self.name.replace(':', '-')}-{'' if self.seq is None else self.seq}".rstrip("-")


@dataclass(frozen=True)
class Batch:
    """Lives that are hit in the same kind of process."""

    who: str
    half: int | None = None
    store: str = "sqlite"

    @cached_property
    def points(self) -> list[Point]:
        places = [Point(*place) for place in (OF_CLIENTS if self.who == "client" else OF_WORKERS)]
        if self.half is None:
            return places
        # of every pair of a before and an after one half takes this, the other that
        return [point for index, point in enumerate(places) if (index + index // 2) % 2 == self.half]

    @property
    def at_once(self) -> int:
        return {"client": 40, "child": 10, "worker": 4}[self.who]


@dataclass
class Life:
    """One try at a point, and how far it has come."""

    point: Point
    batch: Batch
    cluster: Cluster
    clients: Clients
    number: int = 0
    is_begun: bool = False
    is_done: bool = False  # the operation
    is_ended: bool = False  # the message "end" was sent
    log: list[str] = field(default_factory=list)

    @property
    def story(self) -> Story:
        return STORIES[self.point.story]

    @property
    def instance(self) -> str:
        return f"{self.point.id}-{self.number}"

    @property
    def hit(self) -> str:
        return f"{self.instance}-partner" if self.point.is_partners else self.instance

    def _own(self, args: tuple[Any, ...]) -> list[Any]:
        return [arg.replace("{}", self.instance) if isinstance(arg, str) else arg for arg in args]

    def _plan(self) -> None:
        self.cluster.plan_crash(self.hit, self.batch.who, self.point.name, self.point.seq)

    def begin(self) -> None:
        receiver = self.story.receiver
        if receiver is not None:
            self.cluster.start("receives", *self._own(receiver), instance_id=f"{self.instance}-partner")
        self.is_begun = self.is_done = self.is_ended = False

    def _start(self) -> None:
        """Start the instance itself, as soon as whom it is going to tell is there to be told."""
        receiver = self.story.receiver
        if receiver is not None and len(self._partner_history()) < (1 if receiver[1] is None else 2):
            return
        if not self.story.operation:
            self._plan()
        if self.story.operation[:1] != ("start",):
            self.cluster.start(self.story.workflow, *self._own(self.story.args), instance_id=self.instance)
        self.is_begun = True

    def go_on(self) -> bool:
        """Do what is to be done now; tell whether this life is over."""
        if not self.is_begun:
            self._start()
            return False
        if self.story.operation and not self.is_done:
            if self._is_ready():
                self._operate()
            return False
        if not self._is_over():
            return False
        if crashing.was_reached(self.cluster.crashes, self.hit) or self.number + 1 == MOST_TRIES:
            return True
        (self.cluster.crashes / self.hit).unlink(missing_ok=True)
        self.number += 1
        self.begin()
        return False

    def _is_ready(self) -> bool:
        ready = self.story.ready
        if not ready:
            return True
        handle = self._handle()
        if isinstance(ready, str):
            return handle.instance_status == ready
        is_partner_asleep = self.story.partner is None or len(self._partner_history()) >= 2
        return len(handle.history()) >= ready and is_partner_asleep

    def _partner_history(self) -> list[Any]:
        partner = f"{self.instance}-partner"
        return self._handle("-partner").history() if self.cluster.orchestrator.find_instance(partner) else []

    def _operate(self) -> None:
        self._plan()
        operation, *args = self.story.operation
        code = self.clients.do(operation, self.instance, *self._own(tuple(args)))
        self.log.append(f"{operation}: {code}")
        if self.batch.who == "client" and code == KILLED and self.point.name in _UNCOMMITTED:
            again = self.clients.do(operation, self.instance, *self._own(tuple(args)))
            self.log.append(f"again: {again}")
        self.is_done = True

    def _handle(self, suffix: str = "") -> WorkflowHandle:
        return self.cluster.orchestrator.get(self.instance + suffix)

    def _is_over(self) -> bool:
        suffixes = ["", "-partner"] if self.story.partner is not None else [""]
        if any(self.cluster.orchestrator.find_instance(self.instance + suffix) is None for suffix in suffixes):
            return False
        self._end_receiving()
        statuses = [self._handle(suffix).instance_status for suffix in suffixes]
        expected = [each.status for each in (self.story.expected, self.story.partner) if each is not None]
        return statuses == expected and statuses != ["BLOCKED"] and all(status in ENDED for status in statuses)

    def _end_receiving(self) -> None:
        """Send the message that ends a receiver when it has the first; one that comes twice would come before it."""
        if self.is_ended or not (self.story.takes_messages or self.story.receiver):
            return
        receiver = self._handle("" if self.story.takes_messages else "-partner")
        if "do got m" not in self.cluster.effects.names(receiver.id):
            return
        if self.story.takes_messages:
            operation, *args = self._own(self.story.operation)
            self.log.append(f"once more: {self.clients.do(operation, self.instance, *args)}")
        receiver.send(receiver.id, "end", message_id="end")
        self.is_ended = True

    def check(self) -> None:
        log = f"{self.log} {[(e.seq, e.kind, e.state, e.outcome, e.attempts) for e in self._handle().history()]}"
        assert crashing.was_reached(self.cluster.crashes, self.hit), f"nobody died at {self.point}: {log}"
        self._check("", self.story.expected, log)
        if self.story.partner is not None:
            self._check("-partner", self.story.partner, log)

    def _check(self, suffix: str, expected: Expected, log: str) -> None:
        handle = self._handle(suffix)
        assert handle.instance_status == expected.status, log
        effects = self.cluster.effects.names(handle.id)
        allowed = [expected.effects]
        if expected.may_be_early:
            # or it ended before the step began, or the step was lost before its effect: then it is undone for nothing
            allowed += [(), tuple(name for name in expected.effects if name.startswith("undo"))]
        assert tuple(dict.fromkeys(effects)) in allowed, log
        if self.batch.who == "client":  # no worker dies, so nothing has to be repeated but what failed on purpose
            repeated = {"do b"} if self.story.operation == ("resume",) else set()
            assert {name for name in effects if effects.count(name) > 1} == repeated, log
        if expected.status == "COMPLETED":
            assert handle.get(timeout=0) == expected.result, log


#: What the client does is not recorded when it dies here.
_UNCOMMITTED = {
    f"{purpose}:before-commit"
    for purpose in ("start", "send", "publish-message", "cancel", "terminate", "undo", "resume", "fail-step", "fork")
}


@pytest.fixture(scope="class")
def lives(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Point, Life]]:
    """What became of the batch of the class."""
    batch: Batch = request.cls.batch
    folder = tmp_path_factory.mktemp(batch.who)
    store = f"sqlite:///{folder}/store.db"
    if batch.store != "sqlite":
        databases = request.getfixturevalue(f"{batch.store}_databases")
        store = databases.create(migrated=True)
    with embedded_valkey() as broker:
        cluster = Cluster(
            folder,
            store,
            broker,
            # others of the batch die around it: it is lost more often than it would be by itself
            settings={"max_lost": 100, "max_pass_attempts": 100, "publish_grace": 1.0, "heartbeat_limit": 1.0},
            tasks=TASKS,
        )
        clients = Clients(cluster.environment, str(ROOT))
        try:
            yield _run(cluster, clients, batch)
        finally:
            clients.close()
            cluster.close()
            if batch.store != "sqlite":
                databases.drop(store)


def _run(cluster: Cluster, clients: Clients, batch: Batch) -> dict[Point, Life]:
    """Live a few lives of the batch at a time, with a live worker, until all are over."""
    lives = {point: Life(point, batch, cluster, clients) for point in batch.points}
    waiting = list(lives.values())
    running: list[Life] = []
    cluster.start_worker(concurrency=3)

    def are_all_over() -> bool:
        cluster.supervise()
        running[:] = [life for life in running if not life.go_on()]
        while waiting and len(running) < batch.at_once:
            life = waiting.pop(0)
            life.begin()
            running.append(life)
        return not running

    # what is not over by then is told of by its own test
    with contextlib.suppress(AssertionError):
        wait_until(are_all_over, "all lives of the batch", seconds=240)
    cluster.workers[-1].kill()
    return lives


CLIENT, CHILD, WORKER = Batch("client"), Batch("child", 0), Batch("worker", 1)
ON_POSTGRESQL, ON_MYSQL = Batch("client", store="postgresql"), Batch("client", store="mysql")
OTHER_CHILD, OTHER_WORKER = Batch("child", 1), Batch("worker", 0)


def every_point(batch: Batch) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("point", [pytest.param(point, id=point.id) for point in batch.points])


# One class for each batch: pytest-xdist keeps the tests of a class together (--dist loadscope).


class TestClientDies:
    batch = CLIENT

    @every_point(batch)
    def test_what_it_has_committed_is_not_lost(self, lives: dict[Point, Life], point: Point) -> None:
        lives[point].check()


class TestPoolProcessDies:
    batch = CHILD

    @every_point(batch)
    def test_what_it_has_committed_is_not_lost(self, lives: dict[Point, Life], point: Point) -> None:
        lives[point].check()


class TestWorkerDies:
    batch = WORKER

    @every_point(batch)
    def test_what_it_has_committed_is_not_lost(self, lives: dict[Point, Life], point: Point) -> None:
        lives[point].check()


@pytest.mark.storm
class TestClientDiesOnPostgresql:
    batch = ON_POSTGRESQL

    @every_point(batch)
    def test_what_it_has_committed_is_not_lost(self, lives: dict[Point, Life], point: Point) -> None:
        lives[point].check()


@pytest.mark.storm
class TestClientDiesOnMysql:
    batch = ON_MYSQL

    @every_point(batch)
    def test_what_it_has_committed_is_not_lost(self, lives: dict[Point, Life], point: Point) -> None:
        lives[point].check()


@pytest.mark.storm
class TestPoolProcessDiesAtTheOtherPoints:
    batch = OTHER_CHILD

    @every_point(batch)
    def test_what_it_has_committed_is_not_lost(self, lives: dict[Point, Life], point: Point) -> None:
        lives[point].check()


@pytest.mark.storm
class TestWorkerDiesAtTheOtherPoints:
    batch = OTHER_WORKER

    @every_point(batch)
    def test_what_it_has_committed_is_not_lost(self, lives: dict[Point, Life], point: Point) -> None:
        lives[point].check()
