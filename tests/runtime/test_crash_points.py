"""A worker process ends with SIGKILL at every point of the protocol; still each effect ends as done or as undone.

Each point has an instance of its own, in a saga of three steps that completes or in one that undoes them, and a plan
to die at that point, once.  The instances of a batch run together against one real worker: of ``child`` only the pool
process dies, of ``worker`` all of it, and a new one is started.  Every test looks at one instance.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest

from tests.brokers import embedded_valkey
from tests.runtime import crashing
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until

STEP = (
    "message:taken",
    "claim:before-commit",
    "claim:after-commit",
    "body:before-effect",
    "body:after-effect",
    "settle:before-commit",
    "settle:after-commit",
    "publish:before",
    "publish:after",
    "message:done",
)
IN_PARENT = ("ack:before", "ack:after")
SETTLING = ("claim:after-commit", "body:after-effect", "settle:before-commit", "settle:after-commit")
PASS = ("count-pass:before-commit", "count-pass:after-commit", "advance:before-commit", "advance:after-commit")
END = ("settle:before-commit", "settle:after-commit", "finished:before-commit", "finished:after-commit")


#: Others of a batch die around an instance: it is lost more often than it would be by itself.
PATIENT = {"max_lost": 100, "max_pass_attempts": 100, "publish_grace": 1.0, "heartbeat_limit": 1.0}

#: So many seconds after an instance has ended, what follows its end has come to the last point.
AFTER_THE_END = 10.0


@dataclass(frozen=True)
class Point:
    """Where an instance of ``workflow`` is hit."""

    workflow: str
    name: str
    seq: int | None

    @property
    def instance(self) -> str:
        return f"{self.workflow}-{self.name.replace(':', '-')}-{self.seq}"

    @property
    def instances(self) -> list[str]:
        """Return the ids of those that are tried one after the other, until one is hit."""
        return [self.instance, f"{self.instance}-again", f"{self.instance}-at-last"]


#: What a step comes by that its process was handed: no message, and its claim is the commit before.
HANDED = tuple(name for name in STEP if not name.startswith(("claim", "publish")))


def _handed_points() -> list[Point]:
    begin = [Point("completes", name, None) for name in PASS]
    forward = [Point("completes", name, seq) for name, seq in product(HANDED, (0, 1))]
    end = [Point("completes", name, None if name.startswith("finished") else 2) for name in END]
    failing = [Point("undoes", name, 3) for name in ("settle:before-commit", "settle:after-commit", "message:done")]
    return begin + forward + end + failing + [Point("undoes", name, seq) for name, seq in product(HANDED, (4, 5, 6))]


def _points(who: str) -> list[Point]:
    of_step = STEP + (IN_PARENT if who == "worker" else ())
    of_start = (*PASS, "publish:before", "publish:after")
    forward = [Point("completes", name, 1) for name in of_step]
    begin = [Point("completes", name, 0 if name.startswith("publish") else None) for name in of_start]
    end = [Point("completes", name, None if name.startswith("finished") else 2) for name in END]
    failing = [Point("undoes", name, 3) for name in ("settle:before-commit", "settle:after-commit")]
    undoing = [Point("undoes", name, seq) for name, seq in product(of_step, (4, 5, 6))]
    # a step that is settled while others are waited for as well
    counted = [Point("gathers", name, 0) for name in SETTLING]
    return begin + forward + end + failing + undoing + counted


@dataclass(frozen=True)
class Batch:
    """Instances that run together."""

    who: str
    acks_late: bool
    quarters: tuple[int, ...]  # of the points
    hands_off: bool = False

    @property
    def at_once(self) -> int:
        """A worker that dies takes the messages it had fetched with it: the others of its batch wait for them."""
        return 8 if self.who == "child" else 3

    @property
    def name(self) -> str:
        return f"{self.who}-{'acks-late' if self.acks_late else 'acks-early'}{'-handed' if self.hands_off else ''}"

    def points(self) -> list[Point]:
        points = _handed_points() if self.hands_off else _points(self.who)
        return [point for index, point in enumerate(points) if index % 4 in self.quarters]


# By default each point is hit in a pool process, with early or with late acks, and every other one in a whole worker,
# which takes seconds to begin again; the storm does the rest.
CHILD_EARLY, CHILD_LATE = Batch("child", False, (0, 2)), Batch("child", True, (1, 3))
WORKER_EARLY, WORKER_LATE = Batch("worker", False, (0,)), Batch("worker", True, (2,))
CHILD_HANDED, WORKER_HANDED = Batch("child", False, (0, 2), hands_off=True), Batch("worker", True, (1,), hands_off=True)
OTHERS = [
    Batch("child", False, (1, 3)),
    Batch("child", True, (0, 2)),
    Batch("worker", False, (1, 2, 3)),
    Batch("worker", True, (0, 1, 3)),
    Batch("child", True, (1, 3), hands_off=True),
    Batch("worker", False, (0, 2, 3), hands_off=True),
]


@pytest.fixture(scope="class")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Where the batch of the class has run."""
    batch: Batch = request.cls.batch
    folder = tmp_path_factory.mktemp(batch.name)
    with embedded_valkey() as broker:
        cluster = Cluster(
            folder,
            f"sqlite:///{folder}/store.db",
            broker,
            settings={**PATIENT, "hand_off": batch.hands_off, "live_passes": 100 if batch.hands_off else 0},
            celery={"task_acks_late": batch.acks_late, "result_backend": broker},  # there is somebody to be told
        )
        try:
            _run(cluster, batch)
            yield cluster
        finally:
            cluster.close()


def _run(cluster: Cluster, batch: Batch) -> None:
    """Run a few instances of the batch at a time, with a live worker, until all have ended and been hit."""
    waiting = [(point, point.instances) for point in batch.points()]
    running: list[tuple[Point, list[str]]] = []
    ended_at: dict[str, float] = {}
    cluster.start_worker()

    def begin(point: Point, instance: str) -> None:
        cluster.plan_crash(instance, batch.who, point.name, point.seq)
        # the pass that is made for a first message is counted when that comes again, any other before it is made
        later = {"countdown": 0.1} if point.name.startswith("count-pass") else {}
        cluster.start(point.workflow, instance_id=instance, **later)

    def is_over(point: Point, untried: list[str]) -> bool:
        instance = untried[0]
        if cluster.orchestrator.get(instance).instance_status not in ("COMPLETED", "COMPENSATED"):
            return False
        if crashing.was_reached(cluster.crashes, instance):
            return True
        seconds = time.monotonic() - ended_at.setdefault(instance, time.monotonic())
        if seconds > AFTER_THE_END and len(untried) > 1:
            # who was to die at its point had died of another's plan before, with the message that would have led there
            untried.pop(0)
            begin(point, untried[0])
        return False

    def are_all_over() -> bool:
        cluster.supervise()
        running[:] = [each for each in running if not is_over(*each)]
        while waiting and len(running) < batch.at_once:
            point, untried = waiting.pop(0)
            begin(point, untried[0])
            running.append((point, untried))
        return not running

    # what is not over by then is told of by its own test
    with contextlib.suppress(AssertionError):
        wait_until(are_all_over, "all instances of the batch", seconds=240)
    cluster.workers[-1].kill()


def check(cluster: Cluster, batch: Batch, point: Point) -> None:
    """Check that the instance was hit at its point, and that every effect of it is done or undone."""
    tried = [instance for instance in point.instances if cluster.orchestrator.find_instance(instance) is not None]
    instance = tried[-1] if tried else point.instance
    handle = cluster.orchestrator.get(instance)
    log = f"{[(e.seq, e.kind, e.state, e.outcome, e.attempts) for e in handle.history()]}"
    assert crashing.was_reached(cluster.crashes, instance), f"nobody died at {point}: {log}"
    expected = "COMPENSATED" if point.workflow == "undoes" else "COMPLETED"
    assert handle.instance_status == expected, log

    effects = cluster.effects.names(instance)
    first = list(dict.fromkeys(effects))
    if point.workflow != "undoes":
        assert (sorted(first) if point.workflow == "gathers" else first) == ["do a", "do b", "do c"]
        assert handle.get(timeout=0) == ["a", "b", "c"]
    else:
        assert first == ["do a", "do b", "do c", "undo c", "undo b", "undo a"]
    # at most one step is hit, and only where its body had run was its effect repeated
    repeated = [name for name in first if effects.count(name) > 1]
    hit_after_effect = point.name in ("body:after-effect", "settle:before-commit") and batch.who == "child"
    if batch.who == "child":
        assert len(repeated) == (1 if hit_after_effect and _has_body(point) else 0)
    _check_attempts_do_not_overlap(cluster, instance)


def _has_body(point: Point) -> bool:
    """The fourth step of the saga that undoes fails without an effect."""
    return not (point.workflow == "undoes" and point.seq == 3)


def _check_attempts_do_not_overlap(cluster: Cluster, instance: str) -> None:
    """No attempt of a step begins in one process while another that goes on has begun it."""
    alive: dict[int, tuple[int, int]] = {}
    for effect in cluster.effects.list_effects(instance):
        if effect.what == "begin":
            assert effect.attempt > alive.get(effect.seq, (0, 0))[0], f"an attempt began twice: {effect}"
            alive[effect.seq] = (effect.attempt, effect.process)
        else:
            assert alive[effect.seq] == (effect.attempt, effect.process), f"an older attempt went on: {effect}"


def every_point(batch: Batch) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("point", [pytest.param(point, id=point.instance) for point in batch.points()])


# One class for each batch: pytest-xdist keeps the tests of a class together (--dist loadscope).


class TestPoolProcessDiesWithEarlyAcks:
    batch = CHILD_EARLY

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


class TestPoolProcessDiesWithLateAcks:
    batch = CHILD_LATE

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


class TestWorkerDiesWithEarlyAcks:
    batch = WORKER_EARLY

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


class TestWorkerDiesWithLateAcks:
    batch = WORKER_LATE

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


class TestPoolProcessDiesThatHandsOff:
    batch = CHILD_HANDED

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


class TestWorkerDiesThatHandsOff:
    batch = WORKER_HANDED

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


@pytest.mark.storm
class TestPoolProcessDiesAtTheOtherPointsWithEarlyAcks:
    batch = OTHERS[0]

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


@pytest.mark.storm
class TestPoolProcessDiesAtTheOtherPointsWithLateAcks:
    batch = OTHERS[1]

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


@pytest.mark.storm
class TestWorkerDiesAtTheOtherPointsWithEarlyAcks:
    batch = OTHERS[2]

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


@pytest.mark.storm
class TestWorkerDiesAtTheOtherPointsWithLateAcks:
    batch = OTHERS[3]

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


@pytest.mark.storm
class TestPoolProcessDiesAtTheOtherPointsThatHandsOff:
    batch = OTHERS[4]

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)


@pytest.mark.storm
class TestWorkerDiesAtTheOtherPointsThatHandsOff:
    batch = OTHERS[5]

    @every_point(batch)
    def test_every_effect_is_done_or_undone(self, cluster: Cluster, point: Point) -> None:
        check(cluster, self.batch, point)
