"""Processes that begin at once: forked, by the standard library's fork server, from one that has imported it all.

A worker that is started as ``python -m celery`` computes for a second before it says anything, and the tests start
hundreds.  Nothing but modules is shared: each process has a session, an environment and a folder of its own.  The seed
of hashes comes with them; that nothing depends on it is shown by processes that begin anew (``test_properties``).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


class Process(Protocol):
    """What tests do with a process; ``subprocess.Popen`` does."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def terminate(self) -> None: ...


def cold_process(args: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> Process:
    """Start ``python`` with these arguments in a session of its own, what it prints going to a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *args], cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True
        )


def warm_process(args: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> Process:
    """Do the same by a fork; ``args`` are ``-m module …`` or ``script …``."""
    return _WarmProcess(args, cwd, env, log)


class _WarmProcess:
    def __init__(self, args: Sequence[str], cwd: Path, env: Mapping[str, str], log: Path) -> None:
        self.args = list(args)
        ready, begun = _context.Pipe(duplex=False)
        self._process = _context.Process(target=_run, args=(self.args, str(cwd), dict(env), str(log), begun))
        self._process.daemon = True  # none outlives the tests
        self._process.start()
        begun.close()
        with ready:  # before that it has no session of its own to be signalled in
            ready.recv()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def _run(args: list[str], cwd: str, env: dict[str, str], log: str, begun: Connection) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    multiprocessing.current_process().name = "MainProcess"  # the logs name it
    begun.send(None)
    begun.close()
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if env.get("PYTHONWARNINGS"):
        warnings.simplefilter(env["PYTHONWARNINGS"])  # type: ignore[arg-type]
    try:
        if args[0] == "-m":
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(args)
            runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process ends without
