"""Commands in processes of their own, as operators run them, beside a real worker."""

from __future__ import annotations

import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from celery import shared_task

from orchestrator import Context, Orchestrator, RetryPolicy, shared_workflow
from tests.runtime.cluster import ROOT, Cluster

from .running import run_alone


@shared_task
def charge(order: str) -> str:
    return f"charge/{order}"


@shared_task
def refund(charge_id: str | None) -> None:
    if not Path(os.environ["TEST_CRASHES"], "gateway-is-up").exists():
        raise ConnectionError("the gateway does not answer")


@shared_task
def ship(order: str) -> None:
    raise LookupError("the parcel was lost")


def register(orchestrator: Orchestrator) -> None:
    orchestrator.activity(retry=RetryPolicy(max_attempts=2, initial_interval=timedelta(0)))(refund)


@shared_workflow
def checkout(ctx: Context, order: str) -> None:
    ctx.run(charge.s(order), compensate=refund.s())
    ctx.run(ship.s(order))


@shared_workflow
def asks(ctx: Context) -> str:
    return str(ctx.receive("answer"))


def test_a_failed_saga_is_found_mended_and_watched(cluster: Cluster) -> None:
    (own,) = run_alone(cluster, "start", f"{__name__}.checkout", "--args", '["A1"]').lines
    assert run_alone(cluster, "watch", own, "--interval", "0.1").lines[-1].endswith("COMPENSATION_FAILED")
    found = run_alone(cluster, "stuck", code=4).lines
    assert own in found[0]
    assert "the gateway does not answer" in found[1]
    (cluster.crashes / "gateway-is-up").touch()
    try:
        command = shlex.split(found[2])
        assert command[:4] == ["celery", "-A", cluster.module, "orchestrator"]
        run_alone(cluster, *command[4:])
        assert cluster.wait_status(cluster.orchestrator.get(own), "COMPENSATED")
    finally:
        (cluster.crashes / "gateway-is-up").unlink()
    assert run_alone(cluster, "stuck", "--json").document == {"stuck": [], "is_complete": True}


def test_an_app_without_an_orchestrator_gets_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("from celery import Celery\n\napp = Celery('plain', broker='memory://')\n")
    cluster.environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    module, cluster.module = cluster.module, "plain"
    try:
        ran = run_alone(cluster, "list", code=1)
    finally:
        cluster.module = module
    assert ran.stderr.splitlines()[-1].startswith("Error: the Celery app 'plain' has no Orchestrator")
    assert "Traceback" not in ran.stderr


# --- at a terminal ----------------------------------------------------------------------------------------------------


class Terminal:
    """A command whose input and output are a terminal."""

    def __init__(self, cluster: Cluster, *arguments: str, columns: int) -> None:
        self._own, theirs = pty.openpty()
        command = [sys.executable, "-m", "celery", "-A", cluster.module, "orchestrator", *arguments]
        environment = {**cluster.environment, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown, but {self.shown!r}"
            if not self._read():
                assert text in self.shown, self.shown
                return

    def _read(self) -> bool:
        ready, _, _ = select.select([self._own], [], [], 0.5)
        try:
            got = os.read(self._own, 65536) if ready else b"..."
        except OSError:  # the process has closed its side
            return False
        self.shown += got.decode(errors="replace") if ready else ""
        return bool(got)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def wait(self) -> int:
        while self._read():
            pass
        return self._process.wait(30)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._own)


@contextmanager
def at_terminal(cluster: Cluster, *arguments: str, columns: int = 150) -> Iterator[Terminal]:
    terminal = Terminal(cluster, *arguments, columns=columns)
    try:
        yield terminal
    finally:
        terminal.close()


def test_a_question_is_asked_and_the_answer_counts(cluster: Cluster) -> None:
    handle = cluster.start("asks")
    cluster.wait_history(handle, 1)
    for answer, code, status in (("n", 1, "RUNNING"), ("y", 0, "TERMINATED")):
        with at_terminal(cluster, "terminate", handle.id) as terminal:
            terminal.wait_for("cannot be taken back. [y/N]:")
            terminal.type(f"{answer}\n")
            assert terminal.wait() == code
        assert handle.instance_status == status


def test_watch_lives_at_a_terminal_until_the_instance_has_ended(cluster: Cluster) -> None:
    handle = cluster.start("asks")
    cluster.wait_history(handle, 1)
    with at_terminal(cluster, "watch", handle.id, "--interval", "0.1") as terminal:
        terminal.wait_for("receive")
        terminal.wait_for("RUNNING")
        handle.send("answer", "\x1b]0;title\x07[red]x")
        terminal.wait_for("COMPLETED")
        assert terminal.wait() == 0
    assert "\x1b]0;" not in terminal.shown
    assert "\x07" not in terminal.shown
    assert "[red]x" in terminal.shown


def test_a_narrow_terminal_breaks_no_id(cluster: Cluster) -> None:
    own = f"{'long-' * 20}id"
    cluster.start("asks", instance_id=own)
    with at_terminal(cluster, "list", columns=60) as terminal:
        assert terminal.wait() == 0
    assert own in terminal.shown
    assert "RUNNING" in terminal.shown or "PENDING" in terminal.shown
