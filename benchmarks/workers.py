"""A Celery worker in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: So many processes the pool of a worker has, where nothing else is said.
PROCESSES = 2
STOP_SECONDS = 8.0

#: Every process that was started and not yet waited for.
_running: set[Process] = set()


def stop_all() -> None:
    """End what is left: an interruption may have come before anybody had it in his hands."""
    for process in list(_running):
        process.stop()


class WorkerEnded(RuntimeError):
    """A process ended although nobody told it to."""


class Process:
    """A process with a session of its own, so that Ctrl-C reaches nobody but us."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, *, talks: bool = False) -> None:
        self.log = log
        pipe = subprocess.PIPE if talks else None
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - what is run is named in this package
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or output,
                stderr=output,
                start_new_session=True,
            )
        _running.add(self)
        self.requests, self.answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raise ``WorkerEnded``, with the end of its log, if it is no longer there."""
        if self._process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise WorkerEnded(f"it ended with status {self._process.returncode}; the end of its log:\n{tail}")

    def tell_to_stop(self) -> None:
        """Have it end, without waiting for it."""
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End it and every process of its session, which is ours; kill what takes too long."""
        self.tell_to_stop()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # not waited for: the id cannot be another's yet
            self._process.wait()
        _running.discard(self)
        for pipe in (self.requests, self.answers):
            if pipe is not None:
                pipe.close()


def list_options(processes: int = PROCESSES) -> list[str]:
    """Return how a worker is started; all contenders that run on Celery have the same."""
    return ["--pool=prefork", f"--concurrency={processes}", "--without-gossip", "--without-mingle", "--loglevel=ERROR"]


def start_worker(queue: str, environment: Mapping[str, str], folder: Path, processes: int = PROCESSES) -> Process:
    """Start a Celery worker that serves ``queue``."""
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "benchmarks.worker_app",
        "worker",
        f"--hostname={queue}@localhost",
        *list_options(processes),
    ]
    return Process([*command, "--queues", queue], environment, folder / f"{queue}.log")
