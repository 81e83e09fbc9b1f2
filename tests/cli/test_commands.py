"""Every command on instances that a real worker runs."""

from __future__ import annotations

import os
import uuid
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from celery import shared_task
from celery.bin.celery import celery

from orchestrator import Context, Orchestrator, RetryPolicy, WorkflowHandle, shared_workflow
from orchestrator.cli.group import orchestrator as group
from orchestrator.store.instances import Status
from tests.runtime.cluster import Cluster
from tests.waiting import wait_until

from .running import CommandLine

MODULE = __name__
#: A name that does harm where it is printed as it is: markup, a cleared screen, a line, text that runs backwards.
EVIL = "[bold red]x\x1b[2J\x07\nnext\u202elive\x9b31m"


def is_mended() -> bool:
    return Path(os.environ["TEST_CRASHES"], "mended").exists()


@shared_task
def reserve(name: str) -> str:
    return f"reserved {name}"


@shared_task
def release(reservation: str | None) -> None:
    if not is_mended():
        raise ConnectionError(f"cannot release {reservation}")


@shared_task
def ship(name: str) -> str:
    if name.startswith("lost"):
        raise LookupError(f"the parcel {name} was lost")
    return f"shipped {name}"


def register(orchestrator: Orchestrator) -> None:
    orchestrator.activity(retry=RetryPolicy(max_attempts=2, initial_interval=timedelta(0)))(release)


@shared_workflow
def order(ctx: Context, name: str) -> str:
    ctx.set_attributes(customer=name, vip=True)
    ctx.set_progress(f"reserving {name}")
    ctx.run(reserve.s(name), compensate=release.s())
    return str(ctx.run(ship.s(name)))


@shared_workflow
def buys(ctx: Context, name: str) -> str:
    return str(ctx.run(order.s(name)))


@shared_workflow
def asks(ctx: Context, channel: str) -> str:
    ctx.run(reserve.s(channel))
    return str(ctx.receive(channel))


@shared_workflow(park=True)
def parks(ctx: Context) -> str:
    try:
        return str(ctx.run(ship.s("lost")))
    except LookupError:
        return "did without"


def new_id() -> str:
    return f"id-{uuid.uuid4().hex[:10]}"


def waiting(cluster: Cluster, channel: str = "answer") -> WorkflowHandle:
    """Start an instance and return it when it waits for a message."""
    handle = cluster.start("asks", channel)
    cluster.wait_history(handle, 2)
    return handle


def blocked(cluster: Cluster) -> WorkflowHandle:
    handle = cluster.start("parks")
    cluster.wait_status(handle, "BLOCKED")
    return handle


# --- looking ----------------------------------------------------------------------------------------------------------


def test_list_finds_instances_by_workflow_status_attribute_and_age(cluster: Cluster, run: CommandLine) -> None:
    handle = cluster.run("order", "ada")
    cluster.run("order", "grace")

    def ids(*arguments: str) -> set[str]:
        return {each["instance_id"] for each in run("list", "--json", *arguments).document["instances"]}

    assert handle.id in ids()
    found = ids("--workflow", f"{MODULE}.order", "--status", "completed", "--attribute", "customer=ada")
    assert found == {handle.id}
    assert ids("--attribute", "customer=ada", "--attribute", "vip=true") == {handle.id}
    assert ids("--attribute", "customer=ada", "--attribute", "vip=false") == set()
    assert ids("--attribute", "customer=ada", "--older-than", "1h") == set()
    assert ids("--attribute", "customer=ada", "--newer-than", "1h") == {handle.id}


def test_list_prints_a_table_and_pages(cluster: Cluster, run: CommandLine) -> None:
    for _ in range(2):
        cluster.run("order", "pages")
    first = run("list", "--attribute", "customer=pages", "--limit", "1")
    assert first.lines[0].split()[:3] == ["id", "workflow", "status"]
    assert "COMPLETED" in first.lines[1]
    cursor = first.lines[-1].rpartition("--cursor ")[2]
    second = run("list", "--attribute", "customer=pages", "--limit", "1", "--cursor", cursor)
    assert len(second.lines) == 2
    assert second.lines[1].split()[0] != first.lines[1].split()[0]
    assert "cursor" in run("list", "--cursor", "nonsense", code=2).stderr


def test_show_nests_children_and_puts_compensations_under_what_they_undo(cluster: Cluster, run: CommandLine) -> None:
    handle = cluster.run("buys", "lost-1")
    lines = run("show", handle.id).lines
    depth = {
        name: next(line.index(name) for line in lines if name in line and "─" in line)
        for name in ("reserve", "release")
    }
    assert depth["reserve"] < depth["release"]
    child = next(line for line in lines if "COMPENSATION_FAILED" in line and f"{MODULE}.order" in line and "─" in line)
    assert f"{MODULE}.order" in child
    (release_line,) = [line for line in lines if "release" in line and "─" in line]
    assert "compensation" in release_line
    assert "failed" in release_line
    assert "2 attempts" in release_line
    assert "took" in release_line


def test_show_as_json_has_the_records_and_the_children(cluster: Cluster, run: CommandLine) -> None:
    handle = cluster.run("buys", "ada")
    document = run("show", handle.id, "--json").document
    assert (document["instance_id"], document["status"], document["result"]) == (handle.id, "COMPLETED", "shipped ada")
    (child,) = document["children"]
    assert [each["name"].rpartition(".")[2] for each in child["history"]] == ["reserve", "ship"]
    assert child["parent_id"] == handle.id
    for moment in (document["created_at"], child["history"][0]["settled_at"]):
        assert moment.endswith("Z")
        assert datetime.fromisoformat(moment).tzinfo is not None


def test_history_tells_of_each_record(cluster: Cluster, run: CommandLine) -> None:
    handle = cluster.run("order", "ada")
    document = run("history", handle.id, "--json").document
    assert document["run"] == 0
    first, second = document["history"]
    assert (first["seq"], first["args"], first["result"], first["outcome"]) == (0, ["ada"], "reserved ada", "succeeded")
    assert second["task_id"] == f"{handle.id}:0:1:1"
    table = run("history", handle.id).lines
    assert len(table) == 3
    assert "reserved ada" in table[1]


def test_watch_ends_with_the_instance_and_prints_a_line_for_each_change(cluster: Cluster, run: CommandLine) -> None:
    handle = cluster.start("order", "ada")
    lines = run("watch", handle.id, "--interval", "0.05").lines
    assert lines[-1].endswith("COMPLETED")
    assert any("ship  succeeded" in line for line in lines)
    assert run("watch", handle.id, "--json").document["status"] == "COMPLETED"


def test_watch_can_tell_by_its_exit_code_how_it_ended(cluster: Cluster, run: CommandLine) -> None:
    run("watch", cluster.run("order", "ada").id, "--exit-status")
    failed = cluster.run("order", "lost-2")
    run("watch", failed.id)
    run("watch", failed.id, "--exit-status", code=4)


def test_what_comes_from_payloads_is_no_command_to_a_terminal(cluster: Cluster, run: CommandLine) -> None:
    handle = cluster.run("order", f"lost{EVIL}")
    commands = (("show", handle.id), ("history", handle.id), ("watch", handle.id), ("list",), ("stuck",))
    for command in commands:
        printed = run(*command, code=None).stdout
        assert "[bold red]x\\" in printed, command
        for line in printed.splitlines():
            assert line.isprintable(), (command, line)
    # and what is typed is repeated as harmlessly
    assert "\x1b" not in run("show", EVIL, code=3).stderr
    assert run("show", handle.id, "--json").document["args"] == [f"lost{EVIL}"]
    assert "\x1b" not in run("show", handle.id, "--json").stdout


# --- changing ---------------------------------------------------------------------------------------------------------


def test_start_prints_the_id_and_starts_once(cluster: Cluster, run: CommandLine) -> None:
    own = new_id()
    for _ in range(2):
        assert run("start", f"{MODULE}.order", "--args", '["ada"]', "--id", own).lines == [own]
    assert cluster.orchestrator.get(own).get(timeout=30) == "shipped ada"
    document = run("start", f"{MODULE}.order", "--kwargs", '{"name": "eve"}', "--json").document
    assert cluster.orchestrator.get(document["instance_id"]).get(timeout=30) == "shipped eve"


def test_start_refuses_bad_input_in_one_line(run: CommandLine) -> None:
    assert "nobody.knows" in run("start", "nobody.knows", code=3).stderr
    assert "not a JSON array" in run("start", f"{MODULE}.order", "--args", "{}", code=2).stderr
    refused = run("start", f"{MODULE}.order", "--args", "[1, 2, 3]", code=1)
    assert len(refused.stderr.splitlines()) == 1


def test_send_delivers_a_message(cluster: Cluster, run: CommandLine) -> None:
    handle = waiting(cluster)
    run("send", handle.id, "answer", '"yes"', "--message-id", "m1")
    assert handle.get(timeout=30) == "yes"
    assert "has ended" in run("send", handle.id, "answer", '"again"', code=1).stderr
    run("send", "nobody", "answer", '"yes"', code=3)
    assert "quotes" in run("send", handle.id, "answer", "yes", code=2).stderr


def test_cancel_undoes(cluster: Cluster, run: CommandLine) -> None:
    handle = waiting(cluster)
    assert run("cancel", handle.id, "--reason", "sold out", "--yes").lines == [f"cancelled {handle.id}"]
    cluster.wait_status(handle, "CANCELLED")
    assert handle.describe().cancel_reason == "sold out"


def test_terminate_leaves_everything_where_it_is(cluster: Cluster, run: CommandLine) -> None:
    handle = waiting(cluster)
    run("terminate", handle.id, "--yes")
    assert handle.instance_status == "TERMINATED"


def test_resume_gives_a_blocked_instance_another_try(cluster: Cluster, run: CommandLine) -> None:
    handle = blocked(cluster)
    before = handle.history()[0].attempts
    run("resume", handle.id)
    wait_until(lambda: handle.history()[0].attempts > before, "another attempt")
    cluster.wait_status(handle, "BLOCKED")


def test_fail_step_lets_a_blocked_step_raise(cluster: Cluster, run: CommandLine) -> None:
    handle = blocked(cluster)
    assert "no step 7" in run("fail-step", handle.id, "7", "--yes", code=1).stderr
    run("fail-step", handle.id, "0", "--yes")
    assert handle.get(timeout=30) == "did without"


def test_undo_and_the_repair_of_what_it_could_not_undo(cluster: Cluster, run: CommandLine) -> None:
    first, second = cluster.run("order", "ada"), cluster.run("order", "eve")
    run("undo", first.id, second.id, "--yes")
    for handle in (first, second):
        cluster.wait_status(handle, "COMPENSATION_FAILED")
    run("skip-compensation", first.id, "0", "--reason", "by hand", "--yes")
    assert first.instance_status == "COMPENSATED"
    mended = cluster.crashes / "mended"
    mended.touch()
    try:
        run("retry-compensation", second.id, "0")
        cluster.wait_status(second, "COMPENSATED")
    finally:
        mended.unlink()
    assert "has been dealt with" in run("retry-compensation", first.id, "0", code=1).stderr
    assert "undone by the repeated compensation" in run("show", second.id).stdout


def test_fork_begins_again_from_the_middle(cluster: Cluster, run: CommandLine) -> None:
    handle, own = cluster.run("order", "ada"), new_id()
    assert run("fork", handle.id, "1", "--id", own).lines == [own]
    assert cluster.orchestrator.get(own).get(timeout=30) == "shipped ada"
    assert "records" in run("fork", handle.id, "99", "--json", code=1).stderr


# --- several at once --------------------------------------------------------------------------------------------------


def test_one_that_refuses_does_not_stop_the_others(cluster: Cluster, run: CommandLine) -> None:
    ended, handle = cluster.run("order", "ada"), waiting(cluster)
    ran = run("cancel", ended.id, "nobody", handle.id, "--yes", code=1)
    assert ran.lines == [f"cancelled {handle.id}", "cancelled 1 of 3 instances"]
    assert [line.partition(":")[0] for line in ran.stderr.splitlines()] == [ended.id, "nobody"]
    again = run("cancel", "nobody", "nobody-either", "--yes", "--json", code=1).document
    assert [each["instance_id"] for each in again["failed"]] == ["nobody", "nobody-either"]


def test_a_dry_run_refuses_what_would_be_refused(cluster: Cluster, run: CommandLine) -> None:
    ended, handle = cluster.run("order", "ada"), waiting(cluster)
    for command, refused in [("cancel", ended), ("terminate", ended), ("undo", handle), ("resume", handle)]:
        assert refused.id in run(command, refused.id, "--dry-run", code=1).stderr
        assert "there is no instance 'nobody'" in run(command, "nobody", "--dry-run", code=3).stderr
    ran = run("cancel", ended.id, "nobody", handle.id, "--dry-run", code=1)
    assert ran.lines[-1] == "would cancel 1 instance"
    assert [line.partition(":")[0] for line in ran.stderr.splitlines()] == [ended.id, "nobody"]
    told = run("cancel", ended.id, handle.id, "--dry-run", "--json", code=1).document
    assert [(each["instance_id"], each["workflow"], each["status"]) for each in told["instances"]] == [
        (ended.id, f"{MODULE}.order", "COMPLETED"),
        (handle.id, f"{MODULE}.asks", "RUNNING"),
    ]
    assert all(each["created_at"] for each in told["instances"])
    assert ([each["instance_id"] for each in told["failed"]], told["done"]) == ([ended.id], [])
    assert handle.instance_status == "RUNNING"
    [row] = run("undo", ended.id, "--yes", "--json").document["instances"]
    assert (row["workflow"], row["status"]) == (f"{MODULE}.order", "COMPLETED")


def test_a_selection_is_listed_before_it_is_touched(cluster: Cluster, run: CommandLine) -> None:
    handles = [cluster.start("buys", f"{number}") for number in range(2)]
    for handle in handles:
        cluster.wait_status(handle)
    channel = new_id()
    chosen = [waiting(cluster, channel), waiting(cluster, channel)]
    other = blocked(cluster)
    selection = ("--workflow", f"{MODULE}.asks", "--status", "RUNNING")
    listed = run("cancel", *selection, "--dry-run", "--json").document
    assert {each.id for each in chosen} <= {each["instance_id"] for each in listed["instances"]}
    assert listed["done"] == []
    assert all(handle.instance_status == "RUNNING" for handle in chosen)
    assert f"would cancel {len(listed['instances'])} instances" in run("cancel", *selection, "--dry-run").stdout
    assert run("cancel", *selection, "--older-than", "1h", "--yes").lines == ["nothing to cancel"]
    run("cancel", *selection, "--yes")
    for handle in chosen:
        cluster.wait_status(handle, "CANCELLED")
    assert other.instance_status == "BLOCKED"
    done = run("terminate", "--workflow", f"{MODULE}.parks", "--yes", "--json").document["done"]
    assert other.id in done


@pytest.mark.parametrize("command", ["cancel", "terminate", "undo", "resume"])
def test_a_command_for_many_wants_to_be_told_which(run: CommandLine, command: str) -> None:
    assert "give ids, or select" in run(command, "--yes", code=2).stderr
    assert "not both" in run(command, "one", "--workflow", "w", "--yes", code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("cancel", "one"),
        ("terminate", "one"),
        ("undo", "one"),
        ("purge", "--older-than", "1s"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_cannot_be_taken_back_is_refused_where_nobody_can_be_asked(
    cluster: Cluster, run: CommandLine, arguments: tuple[str, ...]
) -> None:
    ran = run(*arguments, code=1)
    assert "--yes" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_commands_about_one_record_ask_as_well(cluster: Cluster, run: CommandLine) -> None:
    handle = blocked(cluster)
    assert "--yes" in run("fail-step", handle.id, "0", code=1).stderr
    assert "--yes" in run("skip-compensation", handle.id, "0", "--reason", "r", code=1).stderr
    assert handle.instance_status == "BLOCKED"


# --- the store --------------------------------------------------------------------------------------------------------


def test_purge_says_how_many_it_would_delete_and_deletes_them(cluster: Cluster, run: CommandLine) -> None:
    handle = cluster.run("buys", "ada")
    assert run("purge", "--older-than", "30d", "--dry-run").lines == ["would purge 0 instances"]
    run("purge", "--older-than", "nonsense", code=2)
    run("purge", "--older-than", "1d", "--status", "RUNNING", code=2)

    def count() -> int:
        # a moment after its end an instance may still have to tell Celery of it
        return int(
            run("purge", "--older-than", "0s", "--status", "completed", "--dry-run", "--json").document["purged"]
        )

    wait_until(
        lambda: count() == len(cluster.orchestrator.list(status="COMPLETED", limit=1000)), "all of them done with"
    )
    expected = count()
    assert expected >= 2
    assert run("purge", "--older-than", "0s", "--status", "completed", "--yes").lines == [
        f"purged {expected} instances"
    ]
    run("show", handle.id, code=3)


def test_migrate_has_nothing_to_do_on_a_store_in_use(run: CommandLine) -> None:
    assert "nothing to do" in run("migrate").stdout
    run("migrate", "--check")
    document = run("migrate", "--json").document
    assert document["before"] == document["after"] == document["head"]


def test_doctor_finds_nothing_wrong_with_a_cluster_that_works(cluster: Cluster, run: CommandLine) -> None:
    document = run("doctor", "--json").document
    assert document["problems"] == 0
    assert {"settings", "store", "broker", "workers", "schema"} <= {each["check"] for each in document["findings"]}
    assert "1 alive" in run("doctor").stdout


def test_every_status_can_be_asked_for(run: CommandLine) -> None:
    for status in Status:
        run("list", "--status", status)


def test_celery_finds_the_group() -> None:
    assert celery.commands["orchestrator"] is group
