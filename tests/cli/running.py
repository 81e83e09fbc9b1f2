"""Runs ``celery -A … orchestrator …``: in this process, or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.bin.celery import celery
from click.testing import CliRunner

from tests.runtime.cluster import ROOT, Cluster


@dataclass(frozen=True)
class Ran:
    """What a command printed, and what it ended with."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)

    @property
    def lines(self) -> list[str]:
        return self.stdout.splitlines()


class CommandLine:
    """Celery's own command group, as its entry point finds it, on an app of this process."""

    def __init__(self, app: Celery) -> None:
        self.app = app

    def __call__(self, *arguments: str, code: int | None = 0) -> Ran:
        result = CliRunner().invoke(celery, ["orchestrator", *arguments], default_map={"app": self.app})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        ran = Ran(result.exit_code, result.stdout, result.stderr)
        assert code is None or ran.exit_code == code, (ran.stdout, ran.stderr)
        return ran


def run_alone(cluster: Cluster, *arguments: str, code: int = 0) -> Ran:
    """Run a command in a process of its own, as from a shell whose output goes into a file."""
    command = [sys.executable, "-m", "celery", "-A", cluster.module, "orchestrator", *arguments]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env={**cluster.environment, "PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    return Ran(ended.returncode, ended.stdout, ended.stderr)
