"""How such a process is told what to run, and tells when it began and ended: a line of JSON each way."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping

from benchmarks.contenders.contender import Run

Handler = Callable[[dict[str, int]], Run]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed goes to the log
    print(json.dumps({"is_ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            run = handlers[request.pop("run")](request)
            answer: dict[str, object] = {"began": run.began, "ended": run.ended}
        except Exception as error:  # who asked is told, and may go on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
