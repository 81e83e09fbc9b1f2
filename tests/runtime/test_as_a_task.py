"""A workflow for whoever has only Celery: sent by name, by ``celery call`` and by beat; and its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task, chain, group, shared_task, signals
from celery.beat import ScheduleEntry, Scheduler
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from celery.schedules import schedule

from orchestrator import Context, Orchestrator, WorkflowHandle, errors, shared_workflow
from orchestrator.store import instances
from tests.runtime.cluster import ROOT, Cluster, wait_until
from tests.runtime.workflows import do

#: Longer than what is to begin sooner, shorter than what is to begin later.
GRACE = 0.6


@shared_task
def add(left: int, right: int) -> int:
    return left + right


@shared_task
def refuse(what: str) -> None:
    raise LookupError(f"there is no {what}")


@shared_task
def undo(_result: Any, name: str) -> str:
    return f"undone {name}"


@shared_task(bind=True)
def tell_origin(self: Task) -> list[Any]:
    return [self.request.root_id, self.request.parent_id]


@shared_workflow
def doubles(ctx: Context, number: int) -> int:
    return int(ctx.run(add.s(number, number)))


@shared_workflow
def has_children(ctx: Context) -> int:
    one = ctx.run(add.s(1, 2))
    ctx.sleep(0.05)
    return int(ctx.run(doubles.s(one)))


@shared_workflow
def is_undone(ctx: Context) -> None:
    ctx.run(do.s("a"), compensate=undo.s("a"))
    ctx.run(refuse.s("b"))


@shared_workflow
def waits(ctx: Context) -> str:
    ctx.run(add.s(1, 1))
    return str(ctx.receive("go on"))


@shared_workflow
def waits_for(ctx: Context, what: Any) -> str:
    return f"{what} went on {ctx.receive('go on')}"


@shared_workflow(ignore_result=True)
def is_ignored(ctx: Context) -> str:
    return "nobody asks"


@shared_workflow(deadline=timedelta(seconds=20))
def has_a_deadline(ctx: Context) -> str:
    return ctx.now().isoformat()


class Headers:
    """What the messages of start tasks brought along."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def note(self, sender: Any = None, task_id: str = "", **_kwargs: Any) -> None:
        request = sender.request
        told = {"tenant": getattr(request, "tenant", None), "queue": request.delivery_info["routing_key"]}
        (self.folder / f"{task_id}.headers").write_text(json.dumps({**told, "expires": request.expires}))

    def of(self, handle: AsyncResult) -> dict[str, Any]:
        path = self.folder / f"{handle.id}.headers"
        found: dict[str, Any] = json.loads(wait_until(lambda: path.exists() and path.read_text(), f"{path}") or "")
        return found


def register(orchestrator: Orchestrator) -> None:
    headers = Headers(str(Path(os.environ["TEST_EFFECTS"]).parent))

    def note(sender: Any = None, **kwargs: Any) -> None:
        if getattr(sender, "is_workflow", False):
            headers.note(sender, **kwargs)

    signals.task_prerun.connect(note, weak=False)


RESULTS = ["redis", "database", "rpc", "none"]


@pytest.fixture(scope="module", params=RESULTS)
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, valkey_url: str
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp(request.param)
    results = {"redis": valkey_url, "database": f"db+sqlite:///{folder}/results.db", "rpc": "rpc://", "none": None}
    celery = {"result_backend": results[request.param], "task_track_started": True, "result_extended": True}
    settings = {"publish_grace": GRACE}
    store = f"sqlite:///{folder}/store.db"
    cluster = Cluster(folder, store, valkey_url, tasks=__name__, celery=celery, settings=settings)
    cluster.results = request.param  # type: ignore[attr-defined]
    try:
        cluster.start_worker().wait_ready()
        yield cluster
    finally:
        cluster.close()


def results_of(cluster: Cluster) -> str:
    return str(cluster.results)  # type: ignore[attr-defined]


def only(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cluster", kinds, indirect=True, scope="module")


def plain(cluster: Cluster, handle: AsyncResult) -> AsyncResult:
    """Return what somebody has of an instance who only knows its id."""
    return AsyncResult(handle.id, app=cluster.app)


# --- from where there is only Celery --------------------------------------------------------------------------------


def name_of(cluster: Cluster, workflow: str) -> str:
    return str(cluster.task(workflow).name)


@only("redis", "database", "rpc")
def test_a_process_without_this_package_sends_it_by_name_and_gets_its_result(cluster: Cluster) -> None:
    told = cluster.run_elsewhere(
        code=f"""
from celery.result import AsyncResult
import json
done = app.send_task({name_of(cluster, "has_children")!r})
failed = app.send_task({name_of(cluster, "is_undone")!r}, link_error=None, headers={{"tenant": "north"}})
value = done.get(timeout=20)
error = failed.get(timeout=20, propagate=False)
again = AsyncResult(done.id) if {results_of(cluster)!r} != "rpc" else done
print(json.dumps([done.id, value, again.state, again.info, [child.id for child in again.children],
    failed.id, failed.state, type(error).__name__, str(error)]))
"""
    )
    done, value, state, info, children, failed, failed_state, error, message = json.loads(told)
    assert (value, state, info) == (6, "SUCCESS", 6)
    assert children == [each.id for each in cluster.orchestrator.get(done).children]
    assert len(children) == 2
    assert (failed_state, error) == ("FAILURE", "LookupError")
    assert "there is no b" in message
    assert Headers(str(cluster.folder)).of(cluster.orchestrator.get(failed))["tenant"] == "north"


@only("none")
def test_a_process_without_this_package_sends_it_by_name(cluster: Cluster) -> None:
    code = f"print(app.send_task({name_of(cluster, 'doubles')!r}, (4,)).id)"
    assert (
        cluster.app.AsyncResult(wait_recorded(cluster, cluster.run_elsewhere(code=code).strip())).get(timeout=10) == 8
    )


def wait_recorded(cluster: Cluster, instance_id: str) -> str:
    wait_until(lambda: cluster.orchestrator.find_instance(instance_id), f"{instance_id} being recorded")
    return instance_id


@only("redis")
def test_celery_call_starts_it(cluster: Cluster) -> None:
    options = ("--args=[5]", "--countdown=0.2")
    told = cluster.run_elsewhere("-A", "tests.runtime.elsewhere", "call", name_of(cluster, "doubles"), *options)
    assert cluster.task("doubles").AsyncResult(told.strip()).get(timeout=10) == 10


@only("redis")
def test_each_tick_of_beat_starts_another_instance(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "ticking.py").write_text(
        f"""
from tests.runtime.elsewhere import app
from celery.schedules import schedule
app.conf.beat_max_loop_interval = 0.1
app.conf.beat_schedule = {{
    "often": {{"task": {name_of(cluster, "doubles")!r}, "schedule": schedule(0.3), "args": (21,)}},
}}
"""
    )
    own = {**cluster.environment, "TEST_ELSEWHERE": cluster.queue, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "tests.runtime.isolated", "-A", "ticking", "beat", f"--schedule={tmp_path}/beat"]

    def list_ticks() -> list[Any]:
        page = cluster.orchestrator.list(workflow=cluster.task("doubles"), status="COMPLETED")
        return [each for each in page if each.args == [21]]

    with (tmp_path / "beat.log").open("wb") as log:
        beat = subprocess.Popen(command, cwd=tmp_path, env=own, stdout=log, stderr=log)
        try:
            wait_until(lambda: len(list_ticks()) >= 3, f"three ticks ({tmp_path}/beat.log)")
        finally:
            beat.kill()
            beat.wait()


def test_beat_where_the_workflow_is_registered_starts_it_as_well(cluster: Cluster) -> None:
    scheduler = Scheduler(app=cluster.app, lazy=True)
    entry = ScheduleEntry("often", name_of(cluster, "doubles"), schedule=schedule(1), args=(8,), app=cluster.app)
    one, other = scheduler.apply_async(entry, advance=False), scheduler.apply_async(entry, advance=False)
    assert one.id != other.id
    assert (one.get(timeout=10), other.get(timeout=10)) == (16, 16)


# --- results --------------------------------------------------------------------------------------------------------


def test_its_handle_and_a_plain_result_of_its_id_tell_the_same(cluster: Cluster) -> None:
    handle = cluster.task("has_children").delay()
    assert handle.get(timeout=10) == 6
    if results_of(cluster) != "rpc":
        shown = plain(cluster, handle)
        assert shown.get(timeout=10) == 6
        assert (shown.state, shown.info, shown.ready(), shown.successful()) == ("SUCCESS", 6, True, True)
        assert [child.id for child in shown.children] == [child.id for child in handle.children]
    assert (handle.state, handle.info, handle.ready()) == ("SUCCESS", 6, True)
    step, child = handle.children
    assert (step.get(timeout=1), step.state, step.id) == (3, "SUCCESS", f"{handle.id}:0:0:1")
    assert isinstance(child, WorkflowHandle)
    assert (child.get(timeout=1), child.instance_status) == (6, "COMPLETED")


def test_the_graph_of_its_results_can_be_walked(cluster: Cluster) -> None:
    handle = cluster.run("has_children")
    ids = [result.id for _, result in handle.iterdeps()]
    assert len(ids) == 4  # the step of its child, too
    assert [value for _, value in handle.collect()] == [6, 3, 6, 6]
    assert {node.id for node in handle.graph} == set(ids)
    if results_of(cluster) != "rpc":
        shown = plain(cluster, handle)
        wait_until(shown.ready, "the result backend being told")
        assert {result.id for _, result in shown.iterdeps(intermediate=True)} == set(ids)


def test_what_was_undone_tells_of_its_steps_and_compensations(cluster: Cluster) -> None:
    handle = cluster.run("is_undone")
    states = [(child.state, child.name) for child in handle.children]
    assert [state for state, _ in states] == ["SUCCESS", "FAILURE", "SUCCESS"]
    assert states[2][1].endswith(".undo")
    with pytest.raises(LookupError, match="there is no b"):
        handle.children[1].get(timeout=1)
    with pytest.raises(LookupError, match="there is no b"):
        handle.get(timeout=1)
    assert isinstance(handle.info, errors.WorkflowFailed)


def test_while_it_runs_it_is_started(cluster: Cluster) -> None:
    handle = cluster.start("waits")
    wait_until(lambda: handle.state == "STARTED", "its first pass")
    if results_of(cluster) != "rpc":
        shown = plain(cluster, handle)
        wait_until(lambda: shown.state == "STARTED", "a plain result telling that it has begun")
        assert not shown.ready()
    wait_until(lambda: [child.state for child in handle.children] == ["SUCCESS"], "its step")
    handle.send("go on", "now")
    assert handle.get(timeout=10) == "now"


@only("redis", "database")
def test_an_extended_result_says_what_was_called(cluster: Cluster) -> None:
    shown = plain(cluster, cluster.run("doubles", 3))
    wait_until(shown.ready, "the result backend being told")
    assert (shown.name, list(shown.args), shown.queue) == (name_of(cluster, "doubles"), [3], cluster.queue)


@only("redis", "database")
def test_an_ignored_result_is_kept_by_the_store_alone(cluster: Cluster) -> None:
    sent, started = cluster.task("is_ignored").delay(), cluster.start("is_ignored")
    assert (sent.get(timeout=10), started.get(timeout=10)) == ("nobody asks", "nobody asks")
    wait_told(cluster, sent, started)
    assert [plain(cluster, each).ready() for each in (sent, started)] == [False, False]


def wait_told(cluster: Cluster, *handles: AsyncResult) -> None:
    def is_told(handle: AsyncResult) -> bool:
        found = cluster.orchestrator.find_instance(handle.id)
        assert found is not None
        with cluster.orchestrator.store.read("test") as connection:
            return instances.find_told(connection, handle.id, found.generation) is None

    wait_until(lambda: all(is_told(handle) for handle in handles), "Celery being told of an end")


def test_forgetting_a_result_leaves_what_is_recorded(cluster: Cluster) -> None:
    handle = cluster.run("doubles", 2)
    wait_told(cluster, handle)
    handle.forget()
    assert handle.get(timeout=1) == 4
    if results_of(cluster) in ("redis", "database"):
        assert plain(cluster, handle).state == "PENDING"


@only("none")
def test_without_a_result_backend_a_plain_result_asks_the_store(cluster: Cluster) -> None:
    handle = cluster.start("waits")
    shown = plain(cluster, handle)
    wait_until(lambda: shown.state == "STARTED", "its first pass")
    with pytest.raises(shown.TimeoutError):
        shown.get(timeout=0.1)
    handle.cancel("no longer wanted")
    with pytest.raises(TaskRevokedError, match="no longer wanted"):
        shown.get(timeout=10)
    assert (shown.state, cluster.app.AsyncResult(handle.children[0].id).get(timeout=1)) == ("REVOKED", 2)
    with pytest.raises(errors.ResultNotKept, match=r"No result backend is configured.*'nobody'"):
        cluster.app.AsyncResult("nobody").get(timeout=1)
    with pytest.raises(NotImplementedError):  # Celery's own
        chain(group(add.s(1, 1), add.s(2, 2)), cluster.task("doubles").s()).apply_async()


@only("redis", "none")
def test_members_of_a_group_are_waited_for(cluster: Cluster) -> None:
    doubles_ = cluster.task("doubles")
    result = group(doubles_.s(1), doubles_.s(2)).apply_async()
    assert result.get(timeout=10) == [2, 4]


@only("redis", "database")
def test_what_never_began_because_the_task_before_it_failed_raises_its_error(cluster: Cluster) -> None:
    result = chain(cluster.task("refuse").s("one"), cluster.task("doubles").s()).apply_async()
    assert isinstance(result, WorkflowHandle)
    with pytest.raises(Exception, match="there is no one"):
        result.get(timeout=10)


@only("redis", "database")
@pytest.mark.parametrize("workflow", ["waits_for", "doubles"])
def test_another_start_under_its_id_is_dropped_and_leaves_its_result_alone(cluster: Cluster, workflow: str) -> None:
    handle = cluster.task("waits_for").delay("the first")
    wait_recorded(cluster, handle.id)
    cluster.task(workflow).apply_async((2,), task_id=handle.id)
    dropped = f"a start of {name_of(cluster, workflow)} is dropped: instance '{handle.id}' exists already"
    wait_until(lambda: dropped in cluster.logs(), "the second start being dropped")
    shown = plain(cluster, handle)
    with pytest.raises(shown.TimeoutError):
        shown.get(timeout=0.5)
    handle.send("go on", "now")
    assert shown.get(timeout=10) == "the first went on now"
    assert handle.describe().args == ["the first"]


# --- how it begins --------------------------------------------------------------------------------------------------


@only("redis", "none")
@pytest.mark.parametrize("by", ["countdown", "eta"])
def test_a_durable_start_begins_at_its_eta_and_not_before(cluster: Cluster, by: str) -> None:
    seconds, now = 4 * GRACE, datetime.now(UTC)
    when = {"countdown": seconds} if by == "countdown" else {"eta": now + timedelta(seconds=seconds)}
    other = f"{cluster.queue}-other"
    cluster.app.control.add_consumer(other, reply=True, timeout=2)
    signature = cluster.task("has_a_deadline").s().set(headers={"tenant": "south"}, queue=other, **when)
    handle = cluster.orchestrator.start(signature)
    assert handle.get(timeout=20) >= (now + timedelta(seconds=seconds)).isoformat()
    started_at = handle.describe().started_at
    assert started_at is not None
    assert started_at >= now + timedelta(seconds=seconds)
    assert Headers(str(cluster.folder)).of(handle) == {"tenant": "south", "queue": other, "expires": None}


@only("redis")
def test_what_begins_later_is_not_woken_by_a_message_and_is_cancelled_at_once(cluster: Cluster) -> None:
    handle = cluster.orchestrator.start(cluster.task("waits").s().set(countdown=3600))
    handle.send("go on", "early")
    sent = cluster.start("doubles", 1)  # what is published after it has ended
    assert sent.get(timeout=10) == 2
    assert (handle.instance_status, handle.history()) == ("PENDING", [])
    handle.cancel("changed my mind")
    with pytest.raises(TaskRevokedError, match="changed my mind"):
        handle.get(timeout=1)
    assert (handle.instance_status, handle.history()) == ("CANCELLED", [])


@only("redis", "none")
def test_a_durable_start_that_expires_before_it_begins_is_cancelled(cluster: Cluster) -> None:
    signature = cluster.task("doubles").s(1).set(expires=0.5, queue="nobody-serves-this")
    handle = cluster.orchestrator.start(signature)
    assert handle.describe().deadline_at is not None
    with pytest.raises(TaskRevokedError, match="it expired before it began"):
        handle.get(timeout=10)
    assert (handle.instance_status, handle.history()) == ("CANCELLED", [])


@only("redis", "none")
def test_what_has_begun_does_not_expire(cluster: Cluster) -> None:
    handle = cluster.orchestrator.start(cluster.task("waits").s().set(expires=1.0))
    wait_until(lambda: handle.describe().started_at, "its first pass")
    assert handle.describe().deadline_at is None
    wait_until(lambda: handle.describe().created_at + timedelta(seconds=1.2) < datetime.now(UTC), "its expiry")
    handle.send("go on", "late")
    assert handle.get(timeout=10) == "late"
    assert Headers(str(cluster.folder)).of(handle)["expires"] is None


@only("redis")
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"eta": "soon"}, "eta of .*doubles is 'soon'; give a datetime"), ({"expires": "later"}, "seconds or a datetime")],
)
def test_an_instant_that_is_none_is_refused_at_the_call(cluster: Cluster, options: Any, reason: str) -> None:
    with pytest.raises(errors.InvalidOperation, match=reason):
        cluster.orchestrator.start(cluster.task("doubles").s(1).set(**options), instance_id="never")
    assert cluster.orchestrator.find_instance("never") is None


@only("redis")
def test_a_start_message_that_was_lost_is_sent_again_with_its_headers(cluster: Cluster) -> None:
    client = Celery("client", broker="memory://", set_as_current=False)  # its messages go nowhere
    client.conf.task_default_queue = cluster.queue
    orchestrator = Orchestrator(client, store=cluster.environment["TEST_STORE"], publish_grace=GRACE)
    signature = client.tasks[name_of(cluster, "doubles")].s(7).set(headers={"tenant": "west"})
    handle = orchestrator.start(signature, instance_id=str(uuid.uuid4()))
    assert handle.get(timeout=15) == 14
    assert Headers(str(cluster.folder)).of(handle)["tenant"] == "west"
    orchestrator.store.dispose()
    client.close()
