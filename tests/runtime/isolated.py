"""Runs ``celery``, or a script (``-c``), as in an environment that does not have this package: importing it fails."""

from __future__ import annotations

import runpy
import sys
from importlib.abc import MetaPathFinder
from typing import Any


class Missing(MetaPathFinder):
    """Finds that this package is not installed."""

    def find_spec(self, name: str, *_args: Any) -> None:
        if name.partition(".")[0] == "orchestrator":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Missing())
    if sys.argv[1] == "-c":
        sys.argv[:] = sys.argv[1:]
        exec(compile(sys.argv[1], "script", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module("celery", run_name="__main__", alter_sys=True)
    assert "orchestrator" not in sys.modules
