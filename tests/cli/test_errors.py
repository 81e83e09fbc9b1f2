"""What goes wrong is said in one line, with an exit code, whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from orchestrator import Orchestrator
from orchestrator.store import migrations
from tests.brokers import free_port

from .running import CommandLine, Ran

Make = Callable[..., CommandLine]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make the command line of an app whose orchestrator has these options."""
    made: list[Orchestrator] = []

    def one(**options: Any) -> CommandLine:
        app = Celery("shop", broker="memory://", set_as_current=False)
        made.append(Orchestrator(app, **options))
        return CommandLine(app)

    yield one
    for each in made:
        if each.settings.store is not None:
            each.store.dispose()
        each.app.close()


def error_of(ran: Ran) -> str:
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_an_app_that_has_no_orchestrator(make: Make) -> None:
    plain = Celery("plain", broker="memory://", set_as_current=False)
    for command in (("list",), ("doctor",), ("stuck",), ("migrate",)):
        assert "'plain' has no Orchestrator" in error_of(CommandLine(plain)(*command, code=1))
    plain.close()


def test_a_store_that_is_not_set(make: Make) -> None:
    assert "no store is set" in error_of(make()("list", code=1))


def test_a_store_that_is_away(make: Make) -> None:
    run = make(store=f"postgresql+psycopg://somebody:secret@127.0.0.1:{free_port()}/none")
    for command in (("list",), ("stuck",), ("purge", "--older-than", "1d", "--yes"), ("send", "one", "channel", "1")):
        error = error_of(run(*command, code=1))
        assert "cannot reach the store" in error
        assert "secret" not in error


def test_a_schema_that_was_never_made_is_made_by_migrate(make: Make, empty_store_url: str) -> None:
    run = make(store=empty_store_url, migrate=False)
    assert "doctor says" in error_of(run("list", code=1))
    assert f"has to be migrated to {migrations.HEAD}" in run("migrate", "--check", code=4).stdout
    assert run("doctor", "--json", code=4).document["problems"] == 1
    assert run("migrate", "--json").document["before"] is None
    assert "nothing to do" in run("migrate").stdout
    assert len(run("list").lines) == 1


def test_instances_that_are_not_there(make: Make, sqlite_url: str) -> None:
    run = make(store=sqlite_url)
    for command in (
        ("show", "none"),
        ("watch", "none"),
        ("history", "none"),
        ("cancel", "none", "--yes"),
        ("terminate", "none", "--yes"),
        ("undo", "none", "--yes"),
        ("resume", "none"),
        ("fail-step", "none", "0", "--yes"),
        ("retry-compensation", "none", "-1"),
        ("skip-compensation", "none", "-1", "--reason", "why", "--yes"),
        ("fork", "none", "0"),
        ("send", "none", "channel", "1"),
    ):
        assert "there is no instance 'none'" in error_of(run(*command, code=3)), command


def test_what_is_typed_wrongly(make: Make, sqlite_url: str) -> None:
    run = make(store=sqlite_url)
    for command in (
        ("lst",),
        ("list", "--status", "DONE"),
        ("list", "--limit", "0"),
        ("list", "--attribute", "customer"),
        ("list", "--older-than", "1"),
        ("purge",),
        ("purge", "--older-than", "9999999999999d"),
        ("skip-compensation", "one", "0", "--yes"),
        ("retry-compensation", "one", "two"),
    ):
        ran = run(*command, code=2)
        assert ran.stdout == ""
        assert ran.stderr.startswith("Usage: celery")


def test_nothing_to_do_is_no_error(make: Make, sqlite_url: str) -> None:
    run = make(store=sqlite_url)
    assert run("cancel", "--status", "RUNNING").lines == ["nothing to cancel"]
    assert run("resume", "--older-than", "1d", "--json").document == {
        "dry_run": False,
        "instances": [],
        "done": [],
        "failed": [],
    }
    assert run("stuck").lines == ["nothing is stuck"]
