"""Clients that are killed: a process that forks for each thing a client does, so that only the fork dies.

Run as ``python -m tests.runtime.clients`` it reads what to do, a line of JSON each, and answers with the exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from tests.runtime import crashing

KILLED = -9


class Clients:
    """The test's side."""

    def __init__(self, environment: Mapping[str, str], folder: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.clients"],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, operation: str, instance: str, *args: Any) -> int:
        """Have a new process do something to an instance; return its exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([operation, instance, *args]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()


def _perform(operation: str, instance: str, args: list[Any]) -> None:
    from tests.runtime.app import app, orchestrator

    match operation:
        case "start":
            workflow, *arguments = args
            orchestrator.start(app.tasks[workflow].s(*arguments), instance_id=instance)
        case "send":
            channel, message, message_id = args
            orchestrator.send(instance, channel, message, message_id=message_id)
        case "publish":
            message, message_id = args
            orchestrator.publish(instance, message, message_id=message_id)
        case "fork":
            orchestrator.get(instance).fork(*args)
        case _:
            getattr(orchestrator.get(instance), operation)(*args)


def _serve() -> None:
    from tests.runtime.app import app

    app.finalize()
    crashing.become_client()
    for line in sys.stdin:
        operation, instance, *args = json.loads(line)
        process = os.fork()
        if process == 0:
            try:
                _perform(operation, instance, args)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
