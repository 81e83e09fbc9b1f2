"""Workflows in chains, groups and chords, beside plain tasks: what follows one runs when the instance has ended.

Over Redis, where the result backend counts the parts of a chord, and over RabbitMQ with a database of results, where a
task of Celery's looks at them time and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from orchestrator import WorkflowHandle
from orchestrator.store import instances
from tests.runtime.canvas import read_notes, wait_notes
from tests.runtime.cluster import Cluster, wait_until

SECONDS = 20


@pytest.fixture(scope="module", params=["counting", "looking"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp(request.param)
    broker = request.getfixturevalue("valkey_url" if request.param == "counting" else "rabbitmq_url")
    results = broker if request.param == "counting" else f"db+sqlite:///{folder}/results.db"
    celery = {"result_backend": results, "result_chord_retry_interval": 0.1}
    settings = {"publish_grace": 1.0}
    store, tasks = f"sqlite:///{folder}/store.db", "tests.runtime.canvas"
    cluster = Cluster(folder, store, broker, tasks=tasks, celery=celery, settings=settings)
    try:
        cluster.start_worker(concurrency=3).wait_ready()
        yield cluster
    finally:
        cluster.close()


def test_a_chain_goes_on_when_an_instance_has_ended(cluster: Cluster) -> None:
    add, doubles = cluster.task("add"), cluster.task("doubles")
    assert chain(add.s(1, 2), doubles.s(), add.s(10), doubles.s()).apply_async().get(timeout=SECONDS) == 32
    assert chain(doubles.s(1), doubles.si(5), add.si(1, 1)).apply_async().get(timeout=SECONDS) == 2


def test_workflows_are_members_of_nested_groups(cluster: Cluster) -> None:
    add, doubles = cluster.task("add"), cluster.task("doubles")
    nested = group(doubles.s(1), group(doubles.s(2), add.s(1, 2)), add.s(4, 4) | doubles.s())
    assert nested.apply_async().get(timeout=SECONDS) == [2, 4, 3, 16]


def test_workflows_are_header_and_body_of_a_chord(cluster: Cluster) -> None:
    add, doubles, doubles_all = (cluster.task(name) for name in ("add", "doubles", "doubles_all"))
    header = [doubles.s(1), add.s(1, 2), doubles.s(3) | add.s(1), add.s(1, 1) | doubles.s()]
    assert chord(header, doubles_all.s() | add.s(1)).apply_async().get(timeout=SECONDS) == 2 * (2 + 3 + 7 + 4) + 1


def test_the_body_of_a_chord_gets_results_in_the_order_of_the_header(cluster: Cluster, tmp_path: Path) -> None:
    add, late, note = (cluster.task(name) for name in ("add", "doubles_late", "note"))
    # the members end in the opposite order
    for first in (late.s(1, 0.8), add.s(1, 1)):
        header = [first, late.s(2, 0.4), late.s(3, 0.1), add.s(4, 4)]
        assert chord(header, note.s(str(tmp_path / "notes"))).apply_async().get(timeout=SECONDS) == [2, 4, 6, 8]


def test_a_chord_is_a_member_of_a_chord(cluster: Cluster) -> None:
    doubles, doubles_all, total = (cluster.task(name) for name in ("doubles", "doubles_all", "total"))
    inner = chord([doubles.s(1), doubles.s(2)], doubles_all.s())
    assert chord([inner, doubles.s(3)], total.s()).apply_async().get(timeout=SECONDS) == 12 + 6


def test_a_group_and_its_body_follow_a_workflow(cluster: Cluster) -> None:
    add, doubles, total = (cluster.task(name) for name in ("add", "doubles", "total"))
    followed = doubles.s(1) | group(add.s(1), doubles.s(), doubles.s()) | total.s() | doubles.s()
    assert followed.apply_async().get(timeout=SECONDS) == 2 * (3 + 4 + 4)
    two = doubles.s(1) | group(doubles.s(), doubles.s()) | group(total.s(), cluster.task("doubles_all").s())
    assert two.apply_async().get(timeout=SECONDS) == [8, 16]


def test_a_plain_task_replaces_itself_with_a_workflow(cluster: Cluster) -> None:
    becomes, add = cluster.task("becomes_workflow"), cluster.task("add")
    result = chain(add.s(1, 1), becomes.s(), add.s(1)).apply_async()
    assert result.get(timeout=SECONDS) == 5
    assert cluster.orchestrator.get(result.parent.id).instance_status == "COMPLETED"  # under the id of the task
    in_chord = chord([becomes.s(1), becomes.s(2)], cluster.task("total").s())
    assert in_chord.apply_async().get(timeout=SECONDS) == 6


@pytest.mark.parametrize("how", ["delay", "start"])
def test_canvases_are_linked_to_a_workflow(cluster: Cluster, tmp_path: Path, how: str) -> None:
    add, note, total = (cluster.task(name) for name in ("add", "note", "total"))
    files = [tmp_path / name for name in ("task", "chain", "group", "chord")]
    signature = cluster.task("doubles").s(3)
    for link in (
        note.s(str(files[0])),
        add.s(1) | note.s(str(files[1])),
        group(note.s(str(files[2])), note.s(str(files[2]))),
        chord([add.s(1), add.s(2)], total.s() | note.s(str(files[3]))),
    ):
        signature.link(link)
    handle = signature.delay() if how == "delay" else cluster.orchestrator.start(signature)
    found = [wait_notes(files[0]), wait_notes(files[1]), wait_notes(files[2], 2), wait_notes(files[3])]
    assert [[value for _, value in notes] for notes in found] == [[6], [7], [6, 6], [15]]
    wait_told(cluster, handle)
    shown = AsyncResult(handle.id, app=cluster.app)
    # its one step, and what followed it
    assert [type(child).__name__ for child in shown.children] == [
        *("AsyncResult", "AsyncResult", "AsyncResult", "GroupResult", "AsyncResult")
    ]
    assert shown.children[1].id == found[0][0][0]
    # the step that was its last is not taken for the sender of what follows
    step = AsyncResult(shown.children[0].id, app=cluster.app)
    wait_until(step.ready, "the result of its step")
    assert not step.children


def wait_told(cluster: Cluster, handle: AsyncResult) -> None:
    """Wait until nothing is owed to Celery any more."""

    def is_told() -> bool:
        found = cluster.orchestrator.find_instance(handle.id)
        if found is None or not found.status.is_final:
            return False
        with cluster.orchestrator.store.read("test") as connection:
            return instances.find_told(connection, handle.id, found.generation) is None

    wait_until(is_told, f"Celery being told of {handle.id}")


# --- failures -------------------------------------------------------------------------------------------------------

ENDINGS = {
    "fails": ("FAILED", "FAILURE", "there is no 0"),
    "is_undone": ("COMPENSATED", "FAILURE", "there is no 0"),
    "cancelled": ("CANCELLED", "REVOKED", "no longer wanted"),
    "terminated": ("TERMINATED", "REVOKED", "no longer wanted"),
}


def end(cluster: Cluster, ending: str, handle: WorkflowHandle) -> None:
    status = ENDINGS[ending][0]
    if ending in ("cancelled", "terminated"):
        cluster.wait_status(handle, "RUNNING")
        (handle.cancel if ending == "cancelled" else handle.terminate)("no longer wanted")
    cluster.wait_status(handle, status)


def workflow_of(cluster: Cluster, ending: str) -> Any:
    return cluster.task("waits" if ending in ("cancelled", "terminated") else ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_chain_fails_with_an_instance_and_calls_its_errbacks(cluster: Cluster, ending: str, tmp_path: Path) -> None:
    note = cluster.task("note")
    called, ids, followed = tmp_path / "called", tmp_path / "ids", tmp_path / "followed"
    signature = chain(cluster.task("add").si(1, 1), workflow_of(cluster, ending).si(), note.s(str(followed)))
    signature.link_error(cluster.task("note_failure").s(str(called)))
    signature.link_error(cluster.task("note_failed_id").s(str(ids)))
    result = signature.apply_async()
    handle = cluster.task("fails").AsyncResult(result.parent.id)
    wait_until(lambda: handle.instance_status != "PENDING", "the instance in the chain")
    end(cluster, ending, handle)
    _, state, message = ENDINGS[ending]
    with pytest.raises(TaskRevokedError if state == "REVOKED" else Exception, match=message):
        result.get(timeout=SECONDS)
    wait_told(cluster, handle)
    (failed_id, told), (_, sent_id) = (*wait_notes(called), *wait_notes(ids))
    assert (failed_id, sent_id) == (handle.id, handle.id)
    assert message in told
    assert AsyncResult(handle.id, app=cluster.app).state == state
    assert not followed.exists()


@pytest.mark.parametrize("ending", ["is_undone", "terminated"])
def test_a_chord_whose_member_fails_calls_the_errback_of_its_body(
    cluster: Cluster, ending: str, tmp_path: Path
) -> None:
    called, followed = tmp_path / "called", tmp_path / "followed"
    body = cluster.task("note").s(str(followed)).on_error(cluster.task("note_failure").s(str(called)))
    member = workflow_of(cluster, ending).si()
    member.set(task_id=f"member-{ending}-{tmp_path.name}")
    result = chord([cluster.task("add").s(1, 1), member], body).apply_async()
    handle = cluster.task("fails").AsyncResult(member.id)
    wait_until(lambda: handle.instance_status != "PENDING", "the instance in the chord")
    end(cluster, ending, handle)
    with pytest.raises(Exception, match=ENDINGS[ending][2]):
        result.get(timeout=SECONDS)
    ((failed_id, message),) = wait_notes(called)
    assert failed_id == result.id
    assert message.startswith("ChordError")
    assert ENDINGS[ending][2] in message
    assert not followed.exists()


def test_a_workflow_that_is_the_body_of_a_failed_chord_never_begins(cluster: Cluster) -> None:
    header = [cluster.task("add").s(1, 1), cluster.task("refuse").s(7)]
    result = chord(header, cluster.task("doubles_all").s()).apply_async()
    assert isinstance(result, WorkflowHandle)
    with pytest.raises(Exception, match="there is no 7"):
        result.get(timeout=SECONDS)
    assert cluster.orchestrator.find_instance(result.id) is None


def test_what_cannot_be_sent_has_failed_and_the_instance_has_not(cluster: Cluster, tmp_path: Path) -> None:
    called = tmp_path / "called"
    needs_another = cluster.task("add").s()
    followed = chain(cluster.task("doubles").s(2), needs_another, cluster.task("add").s(1))
    followed.link_error(cluster.task("note_failure").s(str(called)))
    result = followed.apply_async()
    with pytest.raises(TypeError, match="add"):
        result.get(timeout=SECONDS)
    instance = AsyncResult(result.parent.parent.id, app=cluster.app)
    assert instance.get(timeout=SECONDS) == 4
    assert "TypeError" in wait_notes(called)[0][1]


# --- what goes with them --------------------------------------------------------------------------------------------


def test_stamps_survive_to_what_follows(cluster: Cluster, tmp_path: Path) -> None:
    told, linked = tmp_path / "told", tmp_path / "linked"
    first = cluster.task("doubles").s(1)
    first.link(cluster.task("note_stamps").s(str(linked)))
    stamped = chain(first, cluster.task("doubles").s(), cluster.task("note_stamps").s(str(told)))
    stamped.stamp(tenant="north")
    stamped.apply_async()
    assert [wait_notes(path)[0][1] for path in (told, linked)] == ["north", "north"]


@pytest.mark.parametrize("how", ["plain", "sent", "started", "in a chain"])
def test_errbacks_see_the_headers_that_it_was_sent_with(cluster: Cluster, tmp_path: Path, how: str) -> None:
    notes = tmp_path / "notes"
    failing = cluster.task("refuse" if how == "plain" else "fails").si(1)
    failing.set(headers={"tenant": "north"}, link_error=[cluster.task("note_headers").s(str(notes))])
    if how == "started":
        cluster.orchestrator.start(failing)
    else:
        (cluster.task("add").s(1, 1) | failing if how == "in a chain" else failing).apply_async()
    assert [headers for _, headers in wait_notes(notes)] == [["north", "north"]]


def test_undoing_what_has_completed_tells_celery_nothing(cluster: Cluster, tmp_path: Path) -> None:
    followed, called = tmp_path / "followed", tmp_path / "called"
    signature = cluster.task("can_be_undone").s()
    signature.link(cluster.task("note").s(str(followed)))
    signature.link_error(cluster.task("note_failed_id").s(str(called)))
    handle = signature.delay()
    wait_notes(followed)
    wait_told(cluster, handle)
    handle.undo()
    cluster.wait_status(handle, "COMPENSATED")
    wait_told(cluster, handle)
    assert (len(read_notes(followed)), called.exists()) == (1, False)
    assert AsyncResult(handle.id, app=cluster.app).get(timeout=1) == 2
