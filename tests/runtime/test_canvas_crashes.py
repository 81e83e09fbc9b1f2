"""A pool process is killed while Celery is told of an end: what follows runs nevertheless, and under the same ids.

Each point has an instance of its own, and a plan to die there, once.  The killed process has published what
follows before it died, or not; so that runs once or twice, but is one task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import AsyncResult

from tests.runtime import crashing
from tests.runtime.canvas import read_notes, wait_notes
from tests.runtime.cluster import Cluster, wait_until
from tests.runtime.test_canvas import wait_told

#: Whoever dies at one of these has published nothing yet: what follows runs once.
BEFORE = ("settle:before-commit", "settle:after-commit", "publish-next:before", "finished:after-commit")
AFTER = ("publish-next:after", "store-result:before", "store-result:after", "finished:before-commit")
OF_CHORD = ("store-result:after", "chord-part:after", "finished:before-commit")


@dataclass(frozen=True)
class Crash:
    """Where the instance of a canvas is hit."""

    canvas: str
    point: str

    @property
    def instance(self) -> str:
        return f"{self.canvas}-{self.point.replace(':', '-')}"


CRASHES = [
    *(Crash("chain", point) for point in (*BEFORE, *AFTER)),
    *(Crash("links", point) for point in ("publish-next:before", "publish-next:after", "finished:before-commit")),
    *(Crash("failing", point) for point in ("store-result:after", "publish-next:before", "publish-next:after")),
    *(Crash("slow_chord", point) for point in OF_CHORD),
    *(Crash("quick_chord", point) for point in (*OF_CHORD, "publish-next:before", "publish-next:after")),
    *(Crash("failing_chord", point) for point in OF_CHORD),
    *(Crash("failing_in_chord", point) for point in ("store-result:after", "chord-part:before", "chord-part:after")),
]
#: Where a task of Celery's looks at the members of a chord, what it sees is all there is to go wrong.
LOOKED_AT = [
    *(Crash(name, "store-result:after") for name in ("slow_chord", "quick_chord", "failing_chord", "failing_in_chord")),
    *(Crash("quick_chord", point) for point in ("store-result:before", "finished:before-commit")),
]


@dataclass
class Batch:
    """A cluster in which every crash has happened, or is about to."""

    cluster: Cluster
    results: dict[Crash, Any] = field(default_factory=dict)

    def path(self, crash: Crash, what: str) -> Path:
        return self.cluster.folder / f"{crash.instance}.{what}"

    def apply(self, crash: Crash) -> None:
        make: Callable[[Crash], Any] = getattr(self, f"make_{crash.canvas}")
        seq = 1 if crash.point.startswith("settle") else None
        self.cluster.plan_crash(crash.instance, "pool", crash.point, seq)
        self.results[crash] = make(crash).apply_async()

    def wait_crash(self, crash: Crash) -> None:
        folder = self.cluster.crashes
        wait_until(lambda: crashing.was_reached(folder, crash.instance), f"a process dying at {crash}")

    def _workflow(self, crash: Crash, name: str) -> Any:
        return self.cluster.task(name).si(3).set(task_id=crash.instance)

    def _note(self, crash: Crash) -> Any:
        return self.cluster.task("note").s(str(self.path(crash, "notes")))

    def _errback(self, crash: Crash) -> Any:
        return self.cluster.task("note_failed_id").s(str(self.path(crash, "errors")))

    def make_chain(self, crash: Crash) -> Any:
        return chain(self._workflow(crash, "doubles"), self._note(crash))

    def make_links(self, crash: Crash) -> Any:
        signature, note, add = self._workflow(crash, "doubles"), self._note(crash), self.cluster.task("add")
        signature.link(group(note, note))
        signature.link(add.s(1) | note)
        return signature

    def make_failing(self, crash: Crash) -> Any:
        return chain(self._workflow(crash, "fails"), self._note(crash)).on_error(self._errback(crash))

    def make_slow_chord(self, crash: Crash) -> Any:
        held = self.cluster.task("hold").s(str(self.path(crash, "go")), 1)
        return chord([held, self._workflow(crash, "doubles")], self._note(crash))

    def make_quick_chord(self, crash: Crash) -> Any:
        return chord([self.cluster.task("add").s(0, 1), self._workflow(crash, "doubles")], self._note(crash))

    def make_failing_chord(self, crash: Crash) -> Any:
        header = [self.cluster.task("add").s(0, 1), self._workflow(crash, "fails")]
        return chord(header, self._note(crash).on_error(self._errback(crash)))

    def make_failing_in_chord(self, crash: Crash) -> Any:
        failing = chain(self._workflow(crash, "fails"), self.cluster.task("add").s(1))
        return chord([self.cluster.task("add").s(0, 1), failing], self._note(crash).on_error(self._errback(crash)))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[dict[str, Batch]]:
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(crashed(kind, tmp_path_factory.mktemp(kind), valkey_url))
            for kind in ("counting", "looking")
        }


@pytest.fixture
def batch(request: pytest.FixtureRequest, batches: dict[str, Batch]) -> Batch:
    return batches[request.param]


@contextmanager
def crashed(kind: str, folder: Path, valkey_url: str) -> Iterator[Batch]:
    """Give a batch in which every crash has happened; the result backend counts the parts of a chord, or does not."""
    results = valkey_url if kind == "counting" else f"db+sqlite:///{folder}/results.db"
    celery = {
        "result_backend": results,
        "result_chord_retry_interval": 0.2,
        # for so long nobody else fires a chord that a process took on, and died
        "result_chord_join_timeout": 1.0,
        "broker_connection_timeout": 1.0,
    }
    settings = {"publish_grace": 4.0}
    store, tasks = f"sqlite:///{folder}/store.db", "tests.runtime.canvas"
    cluster = Cluster(folder, store, valkey_url, tasks=tasks, celery=celery, settings=settings)
    try:
        # the tasks that hold a chord up take a process each
        cluster.start_worker(concurrency=len(OF_CHORD) + 3).wait_ready()
        batch = Batch(cluster)
        for crash in CRASHES if kind == "counting" else LOOKED_AT:
            batch.apply(crash)
            # one after the other: a process that dies takes messages of others with it, which come again only later
            batch.wait_crash(crash)
        yield batch
    finally:
        cluster.close()


def crashes(*canvases: str) -> pytest.MarkDecorator:
    every = [("counting", crash) for crash in CRASHES] + [("looking", crash) for crash in LOOKED_AT]
    chosen = [(kind, crash) for kind, crash in every if crash.canvas in canvases]
    ids = [f"{kind}-{crash.instance}" for kind, crash in chosen]
    return pytest.mark.parametrize(("batch", "crash"), chosen, ids=ids, indirect=["batch"])


def wait_crash(batch: Batch, crash: Crash) -> Any:
    """Wait until all has been told of the end; return the result of the canvas."""
    wait_told(batch.cluster, AsyncResult(crash.instance, app=batch.cluster.app))
    return batch.results[crash]


@crashes("chain")
def test_what_follows_in_a_chain_is_one_task(batch: Batch, crash: Crash) -> None:
    result = wait_crash(batch, crash)
    assert result.get(timeout=30) == 6
    notes = read_notes(batch.path(crash, "notes"))
    assert {tuple(note) for note in notes} == {(result.id, 6)}
    assert len(notes) == 1 if crash.point in BEFORE else len(notes) <= 2
    assert AsyncResult(crash.instance, app=batch.cluster.app).get(timeout=10) == 6


@crashes("links")
def test_canvases_that_follow_keep_all_their_ids(batch: Batch, crash: Crash) -> None:
    wait_crash(batch, crash)
    path = batch.path(crash, "notes")
    wait_until(lambda: {value for _, value in read_notes(path)} == {6, 7}, f"what follows {crash}")
    wait_until(lambda: len({own for own, _ in read_notes(path)}) == 3, f"what follows {crash}")
    # the chain comes after the group: what it tells is the last of the second round, too
    settled = [own for own, value in wait_notes(path, 3) if value == 7]
    assert len(set(settled)) == 1
    assert len({own for own, value in read_notes(path) if value == 6}) == 2


@crashes("failing")
def test_errbacks_are_one_task(batch: Batch, crash: Crash) -> None:
    result = wait_crash(batch, crash)
    with pytest.raises(Exception, match="there is no 3"):
        result.get(timeout=30)
    notes = wait_notes(batch.path(crash, "errors"))
    assert len({own for own, _ in notes}) == 1
    assert {failed for _, failed in notes} == {crash.instance}
    assert not batch.path(crash, "notes").exists()


@crashes("slow_chord")
def test_a_chord_waits_for_all_its_members_however_often_one_is_told(batch: Batch, crash: Crash) -> None:
    result = wait_crash(batch, crash)
    # had it been counted twice, what follows would be in the queue before this, which has come back
    assert batch.cluster.task("add").delay(1, 1).get(timeout=30) == 2
    assert not batch.path(crash, "notes").exists()
    batch.path(crash, "go").touch()
    assert result.get(timeout=30) == [1, 6]
    assert read_notes(batch.path(crash, "notes")) == [[result.id, [1, 6]]]


@crashes("quick_chord")
def test_a_chord_fires_though_its_last_member_died_telling(batch: Batch, crash: Crash) -> None:
    result = wait_crash(batch, crash)
    assert result.get(timeout=60) == [1, 6]
    notes = read_notes(batch.path(crash, "notes"))
    assert {own for own, _ in notes} == {result.id}
    assert len(notes) == 1 or crash.point == "publish-next:after"


@crashes("failing_chord", "failing_in_chord")
def test_a_chord_fails_though_its_member_died_telling(batch: Batch, crash: Crash) -> None:
    result = wait_crash(batch, crash)
    with pytest.raises(Exception, match="there is no 3"):
        result.get(timeout=60)
    errors = wait_notes(batch.path(crash, "errors"))
    assert {failed for _, failed in errors} == {result.id}
    assert len({own for own, _ in errors}) <= 2
    assert not batch.path(crash, "notes").exists()
