"""Which attempts the processes of this worker are executing, and when the worker last beat.

The parent of a prefork pool gives back what is claimed under its incarnation and no process of it executes.  Its
children tell it through memory that they share from before the fork: each has a slot, writes there which attempt it is
about to claim, before it claims it, and clears it after the settlement is committed.  So whoever reads the claims from
the store first, and the slots afterwards, finds every claim that is still being worked on.  A slot has room for two: a
process that hands the next step to itself claims it with the commit that settles the one before.

In the pools without child processes the same bookkeeping is a set.
"""

from __future__ import annotations

import atexit
import hashlib
import mmap
import os
import struct
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from billiard import get_start_method

from orchestrator.store.history import StepKey

_HEADER = struct.Struct("d36s")  # the last heartbeat on the system's monotonic clock, the incarnation
_SLOT = struct.Struct("qQQ")  # a process, and the tokens of what it executes (0: nothing)
_TOKEN = struct.Struct("Q")
_EVENTS_BYTE = _HEADER.size  # whether monitors asked for events
_ENDING_BYTE = _EVENTS_BYTE + 1  # whether the worker was asked to end
_HEADER_BYTES = 64
_SLOTS = 4096
_BYTES = _HEADER_BYTES + _SLOTS * _SLOT.size
_PATH_VARIABLE = "ORCHESTRATOR_WORKER_STATE"


def token_of(key: StepKey, dispatch: int) -> int:
    """Name an attempt by a number: a dispatch is claimed at most once."""
    digest = hashlib.blake2b(f"{key.idempotency_key}:{dispatch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


@dataclass(frozen=True, slots=True)
class Execution:
    """An attempt, and the process that executes it."""

    process: int
    token: int


class Executing:
    """Shared by a worker and its pool processes."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BYTES)
        self._is_shared = False
        self._worker: int | None = None
        self._slot: int | None = None
        # counted: a doubled message makes two threads announce the same attempt, of which one lets go at once
        self._own: Counter[int] = Counter()
        self._lock = threading.Lock()

    def share(self) -> None:
        """Put the memory where pool processes find it; called before the pool begins.

        Forked ones inherit it as it is; spawned ones find it by a file.
        """
        self._is_shared = True
        self._worker = os.getpid()
        if get_start_method() == "fork":
            return
        file = tempfile.NamedTemporaryFile(prefix="orchestrator-worker-", delete=False)  # noqa: SIM115 - outlives this
        file.truncate(_BYTES)
        self._memory = mmap.mmap(file.fileno(), _BYTES)
        file.close()
        os.environ[_PATH_VARIABLE] = file.name
        atexit.register(_remove_file, file.name, os.getpid())

    def become_child(self, index: int) -> None:
        """Use the slot of pool process ``index`` from now on; whatever its predecessor left there is gone."""
        if index >= _SLOTS:
            raise ValueError(f"a pool of more than {_SLOTS} processes is not supported")
        path = os.environ.get(_PATH_VARIABLE)
        if not self._is_shared and path is not None:  # spawned, not forked
            with Path(path).open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), _BYTES)
        self._slot = _HEADER_BYTES + index * _SLOT.size
        self._own = Counter()
        self._lock = threading.Lock()
        _SLOT.pack_into(self._memory, self._slot, os.getpid(), 0, 0)

    @property
    def is_child(self) -> bool:
        """Whether this is a process of a prefork pool."""
        return self._slot is not None

    @property
    def is_worker(self) -> bool:
        """Whether this is a worker's own process, and not one of its pool, nor one outside of workers."""
        return self._worker == os.getpid()

    def begin(self, token: int) -> None:
        with self._lock:
            self._own[token] += 1
            if self._own[token] == 1:
                self._show(token, in_place_of=0)

    def end(self, token: int) -> None:
        with self._lock:
            self._own[token] -= 1
            if not self._own[token]:
                del self._own[token]
                self._show(0, in_place_of=token)

    def _show(self, token: int, *, in_place_of: int) -> None:
        """Change one of the tokens in the slot of a pool process; the other one stays where it is."""
        if self._slot is not None:
            _, *shown = _SLOT.unpack_from(self._memory, self._slot)
            _TOKEN.pack_into(self._memory, self._slot + _TOKEN.size * (1 + shown.index(in_place_of)), token)

    def list_executions(self) -> set[Execution]:
        """Return what this process and its children execute, those included that have died since."""
        with self._lock:
            found = {Execution(os.getpid(), token) for token in self._own}
        for index in range(_SLOTS):
            process, *tokens = _SLOT.unpack_from(self._memory, _HEADER_BYTES + index * _SLOT.size)
            found.update(Execution(process, token) for token in tokens if process and token)
        return found

    def wait_unoccupied(self, seconds: float) -> bool:
        """Wait until no process that is alive executes anything; ``False`` if one still does."""
        until = time.monotonic() + seconds
        while any(_is_alive_after_reaping(each.process) for each in self.list_executions()):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    # --- the heartbeat --------------------------------------------------------------------------------------------

    def note_beat(self, incarnation: str) -> None:
        _HEADER.pack_into(self._memory, 0, time.monotonic(), incarnation.encode())

    @property
    def incarnation(self) -> str:
        """The worker's present incarnation; empty before it has one."""
        _, incarnation = _HEADER.unpack_from(self._memory, 0)
        return bytes(incarnation).rstrip(b"\0").decode()

    @property
    def sends_events(self) -> bool:
        """Whether a monitor asked this worker for events."""
        return self._memory[_EVENTS_BYTE] != 0

    @sends_events.setter
    def sends_events(self, is_on: bool) -> None:
        self._memory[_EVENTS_BYTE] = int(is_on)

    @property
    def is_ending(self) -> bool:
        """Whether the worker was asked to end."""
        return self._memory[_ENDING_BYTE] != 0

    def note_ending(self) -> None:
        """Tell the pool processes that the worker was asked to end."""
        self._memory[_ENDING_BYTE] = 1

    @property
    def seconds_since_beat(self) -> float:
        at, _ = _HEADER.unpack_from(self._memory, 0)
        return time.monotonic() - float(at)


def _remove_file(name: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs its parent's exit functions as well
        Path(name).unlink(missing_ok=True)


def _is_alive_after_reaping(process: int) -> bool:
    """Tell whether a process goes on; a child that was killed exists until its parent has asked for it."""
    with suppress(ChildProcessError):  # this process, or one that was asked for before
        os.waitpid(process, os.WNOHANG)
    return is_alive(process)


def is_alive(process: int) -> bool:
    """Tell whether a process of this machine exists (or is not yet reaped)."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
