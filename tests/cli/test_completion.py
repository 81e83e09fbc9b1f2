"""The shell completes commands, instance ids, workflows and statuses, through Celery's own group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.bin.celery import celery
from click.shell_completion import BashComplete

from orchestrator import Orchestrator
from tests.brokers import free_port
from tests.runtime.cluster import ROOT

SHOP = """
from celery import Celery

from orchestrator import Orchestrator

print("noise of an import")
app = Celery("shop", broker="memory://", set_as_current=False)
orchestrator = Orchestrator(app, store={store!r})


@orchestrator.workflow
def checkout(ctx, order_id):
    pass


@orchestrator.workflow
def refund_all(ctx):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, sqlite_url: str) -> Path:
    """A folder with an app whose store has two instances."""
    (tmp_path / "shop.py").write_text(SHOP.format(store=sqlite_url))

    app = Celery("shop", broker="memory://", set_as_current=False)
    orchestrator = Orchestrator(app, store=sqlite_url)
    task = orchestrator.workflow(name="checkout")(lambda_workflow)
    for instance_id in ("order-1", "order-2", "order%3", "parcel-1"):
        orchestrator.start(task.s(), instance_id=instance_id)
    orchestrator.store.dispose()
    app.close()
    return tmp_path


def lambda_workflow(_ctx: object) -> None: ...


def run_bash(folder: Path, script: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout


Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Complete]:
    """Return what the shell is told for the end of a line."""
    monkeypatch.chdir(folder)
    before = set(sys.modules)

    def last_word(line: str) -> list[str]:
        *words, last = line.split(" ")[1:]
        completer = BashComplete(celery, {"auto_envvar_prefix": "CELERY"}, "celery", "_CELERY_COMPLETE")
        return [item.value for item in completer.get_completions(words, last)]

    yield last_word
    for name in set(sys.modules) - before:
        if name in ("shop", "away", "broken"):
            del sys.modules[name]


def test_commands_ids_workflows_and_statuses_are_completed(complete: Complete) -> None:
    begins = "celery -A shop orchestrator"
    assert complete(f"{begins} re") == ["resume", "retry-compensation"]
    assert complete(f"{begins} show ord") == ["order%3", "order-1", "order-2"]
    assert complete(f"{begins} show order%") == ["order%3"]
    assert set(complete(f"{begins} cancel order-1 ")) == {"order-1", "order-2", "order%3", "parcel-1"}
    assert complete(f"{begins} start shop.c") == ["shop.checkout"]
    assert complete(f"{begins} list --workflow shop.r") == ["shop.refund_all"]
    assert complete(f"{begins} list --status com") == [
        "COMPENSATING",
        "COMPLETED",
        "COMPENSATED",
        "COMPENSATION_FAILED",
    ]


def test_a_store_that_is_away_or_an_app_that_is_not_there_completes_nothing(
    folder: Path, complete: Complete, capfd: pytest.CaptureFixture[str]
) -> None:
    away = f"postgresql+psycopg://nobody@127.0.0.1:{free_port()}/none"
    (folder / "away.py").write_text(SHOP.format(store=away))
    (folder / "broken.py").write_text("raise SystemExit('not today')")
    for app in ("away", "broken", "missing"):
        assert complete(f"celery -A {app} orchestrator show ord") == []
    assert capfd.readouterr() == ("", "")


def test_bash_completes_with_the_script_that_the_documents_name(folder: Path) -> None:
    script = """
        eval "$(_CELERY_COMPLETE=bash_source celery)"
        COMP_WORDS=(celery -A shop orchestrator show parc) COMP_CWORD=5 COMP_LINE="x"
        _celery_completion celery
        echo "${COMPREPLY[@]}"
    """
    assert run_bash(folder, script) == "parcel-1\n"
