"""Real processes: children of the test, forked."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

from .world import PATIENCE_SECONDS


def fork(function: Callable[[], object]) -> int:
    """Call ``function`` in a child; return the child's id."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(2 * PATIENCE_SECONDS))  # a child that hangs is killed by it
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def wait_for(child: int) -> int:
    """Return a child's exit code, once it has ended; negative where a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
