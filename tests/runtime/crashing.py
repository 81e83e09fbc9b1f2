"""Ends a process with SIGKILL at a named point of the protocol, once for each instance that has one.

A plan is a file in a folder, named for the instance, holding ``who point seq``.  Whoever reaches the point renames the
file, which only one process can do, and dies there.  All hooks are outside of the package: SQLAlchemy's commit,
Celery's publish and acknowledgement, and the bodies of the tests' own tasks.  What is published on a channel is about
the instance of the same name.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.worker.request import Request

from orchestrator import Orchestrator
from orchestrator.runtime.claims import Claims
from orchestrator.runtime.coordinator import Coordinator
from orchestrator.runtime.dispatch import ADVANCE, START_HEADER
from orchestrator.runtime.finishing import Finisher
from orchestrator.runtime.forks import Forks
from orchestrator.runtime.mail import Postman
from orchestrator.runtime.notices import Notice
from orchestrator.runtime.observing import Observers
from orchestrator.runtime.starter import Starter
from orchestrator.runtime.timers import Timers
from orchestrator.runtime.transactional import TransactionalBodies
from orchestrator.store.engine import Store, current_purpose

_about: ContextVar[tuple[str, int | None]] = ContextVar("about", default=("", None))
_folder: Path | None = None


def plan(folder: Path, instance: str, who: str, point: str, seq: int | None) -> None:
    """Let ``who`` die when ``instance`` reaches ``point`` at record ``seq``.

    ``child``: whoever gets there in a worker; ``pool``: only a process of its pool; ``worker``; ``client``.
    """
    folder.mkdir(exist_ok=True)
    (folder / instance).write_text(f"{who} {point} {'-' if seq is None else seq}")


def was_reached(folder: Path, instance: str) -> bool:
    return (folder / f"{instance}.done").exists()


def reach(point: str, instance: str, seq: int | None) -> None:
    """Die here, if that is the plan."""
    if _folder is None or not instance:
        return
    file = _folder / instance
    try:
        who, planned, planned_seq = file.read_text().split()
    except (FileNotFoundError, ValueError):
        return
    if who == "pool" and not _in_pool_process:  # the poller may come by the same point
        return
    if planned != point or planned_seq not in ("-", str(seq)) or (who == "client") != _is_client:
        return
    try:
        file.rename(_folder / f"{instance}.done")
    except FileNotFoundError:
        return
    if who == "worker" and _in_pool_process:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


_in_pool_process = False
_is_client = False


def become_client() -> None:
    """Take what is planned for clients as meant for this process."""
    global _is_client
    _is_client = True


def _become_pool_process(**_kwargs: Any) -> None:
    global _in_pool_process
    _in_pool_process = True


def install(app: Celery, folder: str | None) -> None:
    """Hook the points, where a folder of plans is given."""
    global _folder
    if folder is None:
        return
    _folder = Path(folder)
    signals.worker_process_init.connect(_become_pool_process, weak=False)
    _hook_commits()
    _hook_publishing()
    _hook_messages()
    _hook_results(app)


@contextmanager
def _about_instance(instance: str, seq: int | None) -> Iterator[None]:
    token = _about.set((instance, seq))
    try:
        yield
    finally:
        _about.reset(token)


def _hook_commits() -> None:
    ready_engine = Store._ready_engine

    def hooked_engine(self: Store) -> Any:
        engine = ready_engine(self)
        dialect: Any = engine.dialect
        if not getattr(dialect, "is_hooked", False):
            commit = dialect.do_commit

            def do_commit(connection: Any) -> None:
                instance, seq = _about.get()
                reach(f"{current_purpose.get()}:before-commit", instance, seq)
                commit(connection)
                reach(f"{current_purpose.get()}:after-commit", instance, seq)

            dialect.do_commit, dialect.is_hooked = do_commit, True
        return engine

    Store._ready_engine = hooked_engine  # type: ignore[method-assign]
    _tell_instance(Coordinator, "transact", lambda args: (args[1], _about.get()[1]))
    _tell_instance(Coordinator, "end_attempt", lambda args: (args[0].instance_id, args[0].seq))
    _tell_instance(Coordinator, "release", lambda args: (args[0].instance_id, args[0].seq))
    _tell_instance(TransactionalBodies, "run_step", lambda args: (args[0].instance_id, args[0].seq))
    _tell_instance(Claims, "claim", lambda args: (args[0].instance_id, args[0].seq))
    _tell_instance(Finisher, "finish", lambda args: (args[0], None))
    _tell_instance(Starter, "begin", lambda args: (args[0].request.id, None))
    _tell_instance(Starter, "start", lambda args: (args[1] or "", None))
    _tell_instance(Orchestrator, "send", lambda args: (args[0], None))
    _tell_instance(Orchestrator, "publish", lambda args: (args[0], None))
    _tell_instance(Postman, "_win", lambda args: (args[0], None))
    _tell_instance(Timers, "fire_timers_of", lambda args: (_planned_among(args[0]), None))
    _tell_instance(Forks, "fork", lambda args: (args[2] or "", None))
    _tell_instance(Observers, "_tell", lambda args: (args[0][0].instance_id, _settled_among(args[0])))


def _planned_among(instances: list[str]) -> str:
    """Return an instance of a batch that somebody is to die at."""
    assert _folder is not None
    return next((instance for instance in instances if (_folder / instance).exists()), "")


def _settled_among(notices: list[Notice]) -> int | None:
    """Return the step whose settlement receivers are told of."""
    return next((each.arguments["seq"] for each in notices if each.signal.endswith("_settled")), None)


def _tell_instance(owner: Any, name: str, about: Any) -> None:
    original = getattr(owner, name)

    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _about_instance(*about(args)):
            return original(self, *args, **kwargs)

    setattr(owner, name, told)


def _hook_publishing() -> None:
    def step_of(headers: Any) -> tuple[str, int | None]:
        header = headers.get("orchestrator")
        return (header["instance"], header["seq"]) if header else ("", None)

    def reach_each(moment: str, sender: Any, headers: Any, body: Any) -> None:
        reach(f"publish:{moment}", *step_of(headers))
        if sender == ADVANCE:
            reach(f"publish-pass:{moment}", body[0][0], None)
        if headers.get(START_HEADER):
            reach(f"publish-start:{moment}", headers["id"], None)
        if sender != ADVANCE and not headers.get(START_HEADER) and not headers.get("orchestrator"):
            reach(f"publish-next:{moment}", _about.get()[0], None)  # what follows an end

    def before(sender: Any = None, headers: Any = None, body: Any = None, **_kwargs: Any) -> None:
        reach_each("before", sender, headers, body)

    def after(sender: Any = None, headers: Any = None, body: Any = None, **_kwargs: Any) -> None:
        reach_each("after", sender, headers, body)

    signals.before_task_publish.connect(before, weak=False)
    signals.after_task_publish.connect(after, weak=False)


def _hook_results(app: Celery) -> None:
    """Hook what the result backend is told of an instance."""
    for kind in type(app.backend).__mro__:
        for name, point in (("_store_result", "store-result"), ("on_chord_part_return", "chord-part")):
            if name in vars(kind):
                _hook_telling(kind, name, point)


def _hook_telling(kind: Any, name: str, point: str) -> None:
    original = getattr(kind, name)

    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        reach(f"{point}:before", _about.get()[0], None)
        answer = original(self, *args, **kwargs)
        reach(f"{point}:after", _about.get()[0], None)
        return answer

    setattr(kind, name, told)


def _hook_messages() -> None:
    def step_of(request: Any) -> tuple[str, int | None]:
        header = getattr(request, "orchestrator", None)
        return (header["instance"], header["seq"]) if header else ("", None)

    def prerun(task: Any = None, **_kwargs: Any) -> None:
        reach("message:taken", *step_of(task.request))

    def postrun(task: Any = None, **_kwargs: Any) -> None:
        reach("message:done", *step_of(task.request))

    signals.task_prerun.connect(prerun, weak=False)
    signals.task_postrun.connect(postrun, weak=False)
    acknowledge = Request.acknowledge

    def hooked(self: Any) -> None:
        header = self._request_dict.get("orchestrator")
        about = (header["instance"], header["seq"]) if header else ("", None)
        reach("ack:before", *about)
        acknowledge(self)
        reach("ack:after", *about)

    Request.acknowledge = hooked
