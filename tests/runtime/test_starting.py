"""A workflow is a Celery task: it starts, continues chains and ends like one."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group, shared_task
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult
from kombu.exceptions import OperationalError

from orchestrator import Context, Orchestrator, WorkflowFailed, errors, shared_workflow
from tests.brokers import free_port
from tests.runtime.cluster import Cluster, wait_until

KEEPS_RESULTS = True


@shared_task
def add(left: int, right: int) -> int:
    return left + right


@shared_task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task
def tell(what: Any, path: str) -> None:
    Path(path).write_text(json.dumps(what))


@shared_task
def tell_failure(request: Any, error: Any, _traceback: Any, path: str) -> None:
    Path(path).write_text(f"{request.id} {type(error).__name__} {error}")


@shared_workflow
def doubles(ctx: Context, number: int) -> int:
    ctx.sleep(0.1)  # its first pass is not its end
    return int(ctx.run(add.s(number, number)))


@shared_workflow
def fails(ctx: Context, number: int) -> int:
    ctx.sleep(0.1)
    raise LookupError(f"there is no {number}")


def wait_text(path: Path) -> str:
    return wait_until(lambda: path.exists() and path.read_text(), f"{path}") or ""


# --- one workflow -------------------------------------------------------------------------------------------------


def test_delay_starts_an_instance_under_the_id_of_its_task(cluster: Cluster) -> None:
    handle = cluster.task("doubles").delay(2)
    assert handle.instance_status in ("PENDING", "RUNNING", "COMPLETED")
    assert handle.get(timeout=10) == 4
    assert cluster.orchestrator.get(handle.id).describe().args == [2]
    assert (handle.state, handle.ready(), handle.successful()) == ("SUCCESS", True, True)


def test_apply_async_takes_an_id_a_countdown_and_a_queue(cluster: Cluster) -> None:
    other, own = f"{cluster.queue}-other", str(uuid.uuid4())
    cluster.app.control.add_consumer(other, reply=True, timeout=2)
    handle = cluster.task("doubles").apply_async((3,), task_id=own, countdown=0.3, queue=other)
    assert (handle.id, handle.instance_status) == (own, "PENDING")
    assert handle.get(timeout=10) == 6
    found = cluster.orchestrator.find_instance(own)
    assert found is not None
    assert found.queue == other


def test_an_app_without_this_package_starts_a_workflow_by_name_and_sees_its_result(cluster: Cluster) -> None:
    plain = Celery("plain", broker=cluster.environment["TEST_BROKER"], backend=cluster.app.conf.result_backend)
    name = cluster.task("doubles").name
    assert plain.send_task(name, (4,), queue=cluster.queue).get(timeout=10) == 8
    failed = plain.send_task(cluster.task("fails").name, (4,), queue=cluster.queue)
    with pytest.raises(Exception, match="there is no 4"):
        failed.get(timeout=10)
    assert failed.state == "FAILURE"
    plain.close()


@pytest.mark.parametrize(("args", "message"), [((), "missing a required argument"), (("two",), "not fit int")])
def test_wrong_arguments_by_name_fail_the_instance(cluster: Cluster, args: tuple[Any, ...], message: str) -> None:
    sent = cluster.app.send_task(cluster.task("doubles").name, args)
    handle = cluster.task("doubles").AsyncResult(sent.id)
    with pytest.raises(WorkflowFailed, match=message):
        handle.get(timeout=10)
    assert (handle.instance_status, handle.history()) == ("FAILED", [])


def test_the_result_backend_shows_how_an_instance_ended(cluster: Cluster) -> None:
    done, failed = cluster.run("doubles", 5), cluster.run("fails", 5)
    shown: Callable[[str], AsyncResult] = lambda own: AsyncResult(own, app=cluster.app)  # noqa: E731
    wait_until(lambda: shown(done.id).ready() and shown(failed.id).ready(), "the result backend being told")
    assert (shown(done.id).state, shown(done.id).result) == ("SUCCESS", 10)
    assert shown(failed.id).state == "FAILURE"
    assert "there is no 5" in str(shown(failed.id).result)


# --- in a canvas --------------------------------------------------------------------------------------------------


def test_a_chain_goes_on_when_the_instance_has_ended(cluster: Cluster) -> None:
    add_, doubles_ = cluster.task("add"), cluster.task("doubles")
    assert chain(add_.s(1, 2), doubles_.s(), add_.s(10), doubles_.s()).apply_async().get(timeout=10) == 32


def test_a_chain_ends_with_the_instance_that_failed(cluster: Cluster, tmp_path: Path) -> None:
    told = tmp_path / "told"
    result = chain(cluster.task("fails").s(1), cluster.task("tell").s(str(told))).apply_async()
    wait_until(lambda: result.parent.state == "FAILURE", "the failure of the workflow in the chain")
    with pytest.raises(Exception, match="there is no 1"):
        result.get(timeout=10)
    assert not told.exists()


def test_workflows_are_members_of_groups_and_chords(cluster: Cluster) -> None:
    add_, doubles_ = cluster.task("add"), cluster.task("doubles")
    assert group(doubles_.s(1), add_.s(1, 2), doubles_.s(3)).apply_async().get(timeout=10) == [2, 3, 6]
    body = cluster.task("total").s() | doubles_.s()
    assert chord([doubles_.s(1), add_.s(1, 2), doubles_.s(3)], body).apply_async().get(timeout=10) == 22


@pytest.mark.parametrize("how", ["apply_async", "start"])
def test_callbacks_follow_the_end_of_the_instance(cluster: Cluster, tmp_path: Path, how: str) -> None:
    tell_, tell_failure_ = cluster.task("tell"), cluster.task("tell_failure")

    def begin(workflow: str, number: int) -> AsyncResult:
        options = {"link": tell_.s(str(tmp_path / f"{workflow}-done"))}
        failure = tell_failure_.s(str(tmp_path / f"{workflow}-failed"))
        signature = cluster.task(workflow).s(number).set(**options).on_error(failure)
        return signature.apply_async() if how == "apply_async" else cluster.orchestrator.start(signature)

    done, failed = begin("doubles", 3), begin("fails", 3)
    assert wait_text(tmp_path / "doubles-done") == "6"
    told = wait_text(tmp_path / "fails-failed")
    assert told.startswith(f"{failed.id} LookupError")
    assert told.endswith("there is no 3")
    assert cluster.orchestrator.get(done.id).instance_status == "COMPLETED"
    assert not (tmp_path / "doubles-failed").exists()
    assert not (tmp_path / "fails-done").exists()


# --- orchestrator.start -------------------------------------------------------------------------------------------


def test_a_second_start_with_the_same_id_and_input_is_the_same_instance(cluster: Cluster) -> None:
    doubles_, start = cluster.task("doubles"), cluster.orchestrator.start
    first = start(doubles_.s(6), instance_id="order-1")
    again = start(doubles_.s(number=6), instance_id="order-1")
    assert (again.id, again.get(timeout=10)) == (first.id, 12)
    assert start(doubles_.s(6), instance_id="order-1").get(timeout=1) == 12
    assert len([entry for entry in first.history() if entry.kind == "step"]) == 1
    with pytest.raises(errors.InstanceExists, match="'order-1' exists already"):
        start(doubles_.s(6), instance_id="order-1", on_conflict="raise")
    with pytest.raises(errors.InstanceExists, match="'order-1' exists already, with other input"):
        start(doubles_.s(7), instance_id="order-1")
    with pytest.raises(errors.InstanceExists, match=r"'order-1' exists already, of the workflow .*\.doubles"):
        start(cluster.task("fails").s(6), instance_id="order-1")


def test_a_start_while_the_broker_is_away_is_made_up_for(cluster: Cluster) -> None:
    client = Celery("client", broker=f"redis://127.0.0.1:{free_port()}", set_as_current=False)
    client.conf.update(task_default_queue=cluster.queue, broker_transport_options={"max_retries": 0})
    orchestrator = Orchestrator(client, store=cluster.environment["TEST_STORE"], publish_grace=0.1)
    task = client.tasks[cluster.task("doubles").name]
    with pytest.raises(OperationalError):
        task.delay(7)  # a plain message
    handle = orchestrator.start(task.s(7), instance_id="order-2")
    assert handle.get(timeout=15) == 14
    orchestrator.store.dispose()
    client.close()


def test_a_handle_tells_of_an_instance_that_was_never_started(cluster: Cluster) -> None:
    handle = cluster.task("doubles").AsyncResult("order-3")
    assert (handle.state, handle.ready(), handle.instance_status) == ("PENDING", False, "PENDING")
    began = time.monotonic()
    with pytest.raises(CeleryTimeoutError, match="order-3 is not recorded yet"):
        handle.get(timeout=0.1)
    assert time.monotonic() - began < 2
    with pytest.raises(errors.UnknownInstance):
        handle.describe()
