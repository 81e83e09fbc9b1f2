"""A Celery worker as a child process that can be killed and started again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class WorkerEnded(RuntimeError):
    """The worker ended although nobody told it to."""


class Worker:
    """`celery -A tasks.app worker`, with two pool processes, in a process group of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the worker, `None` while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> int:
        """Start the worker and return its process id."""
        command = [sys.executable, "-m", "celery", "-A", "tasks.app", "worker", "--concurrency", "2", "--loglevel=INFO"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - every argument is one of the above
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._process.pid

    def check(self) -> None:
        """Raise `WorkerEnded` if it is no longer there."""
        if self._process is not None and self._process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise WorkerEnded(f"the worker ended with status {self._process.returncode}; the end of its log:\n{tail}")

    def kill(self) -> None:
        """Kill the worker and its pool processes at once, with no chance to finish or tell anything."""
        if self._process is not None:
            if self._process.returncode is None:  # not waited for: the process id cannot be another's yet
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self, patience_seconds: float = 10) -> None:
        """Let the worker finish what it is at, and end."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(patience_seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                self.kill()
