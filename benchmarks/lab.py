"""The servers and contenders of one run of the benchmark, and their end."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import workers
from benchmarks.contenders.contender import Contender, Spec, Unavailable
from benchmarks.servers import SERVERS, DatabaseServer, Valkey


class Lab:
    """Starts servers and contenders when they are first needed; ``close`` ends all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.valkey = Valkey(folder / "valkey")
        self._databases: dict[str, DatabaseServer] = {}
        self._missing: dict[str, str] = {}
        self._running: dict[Spec, Contender] = {}
        self._made = 0

    def new_database(self, kind: str, name: str) -> str:
        """Return the URL of a new, empty database of that kind.  Raises ``Unavailable``."""
        self._made += 1
        unique = f"{name}_{self._made}".replace("-", "_").replace(".", "_")
        if kind == "sqlite":
            return f"sqlite:///{self.folder / unique}.db"
        return self._find_server(kind).new_database(unique)

    def _find_server(self, kind: str) -> DatabaseServer:
        if kind in self._missing:  # not tried again: the answer is the same
            raise Unavailable(self._missing[kind])
        if kind not in self._databases:
            try:
                self._databases[kind] = SERVERS[kind](self.folder / kind)
            except Unavailable as error:
                self._missing[kind] = f"{kind}: {error}"
                raise Unavailable(self._missing[kind]) from error
        return self._databases[kind]

    def use(self, specs: Iterable[Spec]) -> tuple[dict[Spec, Contender], dict[str, str]]:
        """Run these contenders and no others; return them, and why some are not there, by name."""
        wanted = list(dict.fromkeys(specs))
        self._end([spec for spec in self._running if spec not in wanted])
        missing: dict[str, str] = {}
        new: list[Spec] = []
        for spec in wanted:
            if spec not in self._running:
                try:
                    self._running[spec] = spec.open(self)
                except Unavailable as error:
                    missing[spec.name] = str(error)
                else:
                    new.append(spec)
        for spec in new:
            try:
                self._running[spec].warm()
            except Exception as error:  # whatever it is, the others can be measured
                missing[spec.name] = f"does not run: {error!r}"
                self._end([spec])
        return {spec: self._running[spec] for spec in wanted if spec in self._running}, missing

    def end(self, spec: Spec) -> None:
        """End a contender; it is started anew when it is needed again."""
        self._end([spec])

    def _end(self, specs: list[Spec]) -> None:
        for spec in specs:
            if spec in self._running:
                self._running[spec].tell_to_stop()
        for spec in specs:
            if spec in self._running:
                self._running[spec].close()
                del self._running[spec]

    def close(self) -> None:
        """End every process that was started; one that does not end well keeps none of the others alive."""
        for contender in self._running.values():
            contender.tell_to_stop()
        stops = [contender.close for contender in self._running.values()]
        servers = [server.stop for server in self._databases.values()]
        for stop in [*stops, workers.stop_all, *servers, self.valkey.stop]:
            with contextlib.suppress(Exception):
                stop()


@contextmanager
def open_lab(parent: Path | None) -> Iterator[Lab]:
    """Open a lab in a temporary folder (in ``parent``), and leave nothing of it behind."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=parent, ignore_cleanup_errors=True) as folder:
        path = Path(folder)
        path.chmod(0o755)  # servers that do not run as root look into it
        lab = Lab(path)
        try:
            yield lab
        finally:
            with _undisturbed():
                lab.close()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let nobody interrupt the end, which takes a few seconds."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
