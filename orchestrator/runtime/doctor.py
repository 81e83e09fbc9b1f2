"""Whether an installation is sound: settings, store, broker, workers, what is registered, clocks; and what to do.

It looks, and changes nothing: the schema is not migrated, and what it writes to try the store is rolled back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from celery import Celery
from celery.backends.base import DisabledBackend
from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import codec, errors
from orchestrator._version import __version__
from orchestrator.core.records import Compensation
from orchestrator.runtime import answering
from orchestrator.runtime.liveness import Liveness
from orchestrator.runtime.liveness import look as liveness_of
from orchestrator.runtime.unmigrated import unmigrated_store
from orchestrator.store import health, migrations, stuck
from orchestrator.store.engine import Store
from orchestrator.store.workers import Worker

if TYPE_CHECKING:
    from orchestrator.runtime.app import Orchestrator

#: Clocks that differ by more than this fire timers, and time steps out, visibly early or late.
MOST_SKEW = timedelta(seconds=2)
BROKER_TIMEOUT_SECONDS = 5.0
#: Of so many of the newest instances that have not ended the recorded compensations are looked through.
MOST_INSTANCES, MOST_RECORDS = 1000, 10000


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, what was found, and what to do about it (empty: nothing)."""

    check: str
    level: Level
    what: str
    do: str = ""


def examine(orchestrator: Orchestrator) -> Iterator[Finding]:
    """Look at all there is, and tell of each as soon as it is known.

    Takes up to a fifth of the heartbeat limit longer where a worker's clock does not agree with this host's.
    """
    app = orchestrator.app
    try:
        settings = orchestrator.settings
        settings.require_store()
    except errors.ConfigurationError as error:
        yield Finding("settings", Level.PROBLEM, str(error), "mend the setting; nothing works without it")
        yield from _check_broker(app)
        return
    yield Finding("settings", Level.OK, f"valid; the heartbeat limit is {settings.heartbeat_limit:g} s")
    for slip in orchestrator.masks.list_slips():
        yield Finding("mask", Level.PROBLEM, slip, "mend orchestrator_mask: as it is, nothing is hidden by it")
    yield from _check_celery(app)
    yield from _check_broker(app)
    try:
        with unmigrated_store(settings) as store:
            yield from _Examined(orchestrator, store).check()
    except (errors.ConfigurationError, errors.StoreUnreachable, SQLAlchemyError) as error:
        do = "start the database, or mend orchestrator_store; nothing goes on without it"
        yield Finding("store", Level.PROBLEM, _in_words(error), do)


def _in_words(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]


# --- Celery ---------------------------------------------------------------------------------------------------------


def _check_celery(app: Celery) -> Iterator[Finding]:
    conf = app.conf
    if conf.task_always_eager:
        do = "set it in tests alone: nothing that runs eagerly is durable"
        yield Finding("eager", Level.WARNING, "task_always_eager is on", do)
    accepted = {str(each) for each in conf.accept_content}
    if not _accepts(accepted, conf.task_serializer):
        what = f"tasks are written as {conf.task_serializer}, and workers accept {', '.join(sorted(accepted))} only"
        do = f"add {conf.task_serializer!r} to accept_content: no step's message would be taken"
        yield Finding("serializer", Level.PROBLEM, what, do)
    elif not _accepts(accepted, "json"):
        what = f"workers accept {', '.join(sorted(accepted))}, but not json"
        do = "add 'json' to accept_content: what is started by name from elsewhere is usually written so"
        yield Finding("serializer", Level.WARNING, what, do)
    else:
        yield Finding("serializer", Level.OK, f"{conf.task_serializer}, which workers accept")
    yield _check_backend(app)
    yield from _check_visibility(app)


def _accepts(accepted: set[str], serializer: str) -> bool:
    return serializer in accepted or f"application/{serializer}" in accepted


def _check_backend(app: Celery) -> Finding:
    try:
        backend = app.backend
    except Exception as error:  # whatever the backend's package raises when it is not there
        return Finding("result backend", Level.PROBLEM, _in_words(error), "mend result_backend, or leave it out")
    if isinstance(backend, DisabledBackend):
        return Finding("result backend", Level.OK, "none: handles read the store; chords need one")
    if type(backend).__module__.endswith(".rpc"):
        what = "rpc: only the process that started an instance is told of its end there"
        return Finding("result backend", Level.WARNING, what, "read instances by their handles, or use another backend")
    kind, ping = type(backend).__name__, answering.find_ping(backend)
    away = None if ping is None else answering.ask(ping, BROKER_TIMEOUT_SECONDS)
    if away is not None:
        do = "start it, or mend result_backend; ends wait to be told there, and what follows them in chains and chords"
        return Finding("result backend", Level.PROBLEM, f"{kind} cannot be reached: {_in_words(away)}", do)
    answers = "" if ping is None else "answers, and "
    return Finding("result backend", Level.OK, f"{kind} {answers}is told of each end; handles read the store")


def _check_visibility(app: Celery) -> Iterator[Finding]:
    """A message that is not acknowledged within the visibility timeout is delivered again, while its task runs."""
    try:
        transport = app.connection_for_write().transport.driver_type
    except Exception:  # what a broker URL can be wrong in, the next check tells
        return
    if transport not in ("redis", "sqs"):
        return
    default = 3600 if transport == "redis" else 1800
    visible_seconds = float((app.conf.broker_transport_options or {}).get("visibility_timeout", default))
    for name, task in sorted(app.tasks.items()):
        limit = task.time_limit or app.conf.task_time_limit
        is_late = task.acks_late and not name.startswith(("celery.", "orchestrator."))
        if is_late and limit and limit > visible_seconds:
            what = (
                f"{name} acknowledges late and may run {limit:g} s; after {visible_seconds:g} s it is delivered again"
            )
            do = "raise visibility_timeout above its time limit; only of steps a second delivery is dropped"
            yield Finding("visibility timeout", Level.WARNING, what, do)


def _check_broker(app: Celery) -> Iterator[Finding]:
    try:
        with app.connection_for_write(connect_timeout=BROKER_TIMEOUT_SECONDS) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=BROKER_TIMEOUT_SECONDS)
            url = connection.as_uri()
    except (OSError, KombuError) as error:
        do = "start the broker, or mend broker_url; what is recorded waits meanwhile, and nothing is lost"
        yield Finding("broker", Level.PROBLEM, f"cannot be reached: {_in_words(error)}", do)
    except Exception as error:  # of a URL that names no transport, anything
        yield Finding("broker", Level.PROBLEM, _in_words(error), "mend broker_url")
    else:
        yield Finding("broker", Level.OK, f"{url} answers")


# --- the store, and who is alive according to it --------------------------------------------------------------------


class _RolledBack(Exception):
    """What was written to try the store is not to stay."""


class _Examined:
    """One look at a store."""

    def __init__(self, orchestrator: Orchestrator, store: Store) -> None:
        self.orchestrator = orchestrator
        self.store = store

    def check(self) -> Iterator[Finding]:
        with self.store.read("doctor") as connection:
            version, isolation = health.load_version(connection), health.load_isolation(connection)
            revision, is_current = migrations.find_revision(connection), migrations.is_current(connection)
            now = health.load_now(connection)
            here = datetime.now(UTC)
        yield Finding("store", Level.OK, f"{self.store.describe()} answers ({version})")
        yield self._check_isolation(isolation)
        if now is not None:
            yield _check_skew("database clock", "the database's clock", now - here)
        if not is_current:
            what = f"the schema is at revision {revision or 'none'}, this version needs {migrations.HEAD}"
            yield Finding("schema", Level.PROBLEM, what, "celery -A … orchestrator migrate")
            return
        if revision is not None and revision > migrations.HEAD:
            what = f"the schema is at revision {revision}, newer than {migrations.HEAD}, which this version knows"
            yield Finding("schema", Level.WARNING, what, "update celery-orchestrator here as well")
        else:
            yield Finding("schema", Level.OK, f"at revision {revision}")
        yield self._check_writing()
        liveness = liveness_of(self.store, self.orchestrator.settings.heartbeat_limit)
        yield from self._check_workers(liveness)
        yield from self._check_registered(liveness.beating)

    def _check_isolation(self, isolation: str) -> Finding:
        if self.store.is_sqlite:
            if isolation == "WAL":
                return Finding("isolation", Level.OK, "journal mode WAL")
            what = f"the journal mode is {isolation}, not WAL: readers and writers wait for each other"
            return Finding(
                "isolation", Level.WARNING, what, "put the file on a local disk; WAL does not work on others"
            )
        if isolation.replace("-", " ").upper() == "READ COMMITTED":
            return Finding("isolation", Level.OK, isolation)
        what = f"transactions are {isolation}, not READ COMMITTED: two that settle steps would not see each other"
        return Finding("isolation", Level.PROBLEM, what, "let a proxy or init_connect of yours not set another level")

    def _check_writing(self) -> Finding:
        try:
            with self.store.begin("doctor") as connection:
                is_there = health.write_and_read(connection)
                raise _RolledBack
        except _RolledBack:
            if is_there:
                return Finding("writing", Level.OK, "what is written can be read")
            return Finding(
                "writing", Level.PROBLEM, "what was written was not there", "look at a proxy before the store"
            )
        except SQLAlchemyError as error:
            do = "give the user of orchestrator_store the right to write, or the disk some room"
            return Finding("writing", Level.PROBLEM, f"nothing can be written: {_in_words(error)}", do)

    # --- workers -----------------------------------------------------------------------------------------------------

    def _check_workers(self, liveness: Liveness) -> Iterator[Finding]:
        yield from self._count_workers(liveness.beating)
        for worker, skew in liveness.skewed:
            yield _check_skew(f"clock of {worker.nodename}", "its clock", skew)
        for worker in liveness.silent:
            what = f"{worker.nodename} has not beaten since {worker.beat_at.isoformat(timespec='seconds')}"
            do = "it is gone, frozen or cut off; any live worker gives it up, and its steps go on elsewhere"
            yield Finding("heartbeat", Level.WARNING, what, do)

    def _count_workers(self, live: Sequence[Worker]) -> Iterator[Finding]:
        if not live:
            do = "start one: celery -A … worker; without any, nothing goes on"
            yield Finding("workers", Level.PROBLEM, "no worker with an Orchestrator is alive", do)
            return
        names = ", ".join(sorted({each.nodename for each in live}))
        yield Finding("workers", Level.OK, f"{len(live)} alive: {names}")
        versions = sorted({each.version for each in live} | {__version__})
        if len(versions) > 1:
            what = f"versions of celery-orchestrator differ: {', '.join(versions)} (this one is {__version__})"
            yield Finding("versions", Level.WARNING, what, "finish the deploy; for its time they work side by side")
        else:
            yield Finding("versions", Level.OK, f"celery-orchestrator {__version__} everywhere")
        hosts = sorted({each.nodename.rpartition("@")[2] for each in live})
        if self.store.is_sqlite and len(hosts) > 1:
            what = f"workers of several hosts ({', '.join(hosts)}) use an SQLite file"
            do = "SQLite is for one host: use PostgreSQL, MySQL or MariaDB"
            yield Finding("store", Level.WARNING, what, do)

    # --- what is registered ------------------------------------------------------------------------------------------

    def _check_registered(self, live: Sequence[Worker]) -> Iterator[Finding]:
        tasks = {name for worker in live for name in worker.tasks}
        workflows = {name for worker in live for name in worker.workflows}
        found: list[Finding] = []
        if live:
            with self.store.read("doctor-needs") as connection:
                needed_workflows = stuck.list_workflows_under_way(connection)
                needed_tasks = {crowd.name for crowd in stuck.count_scheduled(connection, None, None)}
                plans = stuck.list_planned_compensations(connection, MOST_INSTANCES, MOST_RECORDS)
            compensations = {plan.name for plan in map(_read_plan, plans) if not plan.is_child}
            for kind, missing in (
                ("workflow", set(needed_workflows) - workflows),
                ("task", needed_tasks - tasks),
                ("compensation", compensations - tasks - needed_tasks),
            ):
                for name in sorted(missing):
                    what = f"instances under way need the {kind} {name}, and no live worker has it"
                    found.append(Finding(f"{kind}s", Level.PROBLEM, what, "deploy it, and start workers that have it"))
        found += self._check_compensations(tasks)
        yield from found
        if live and not found:
            yield Finding("registered", Level.OK, "all that instances under way need")

    def _check_compensations(self, on_workers: set[str]) -> Iterator[Finding]:
        known = on_workers | set(self.orchestrator.app.tasks)
        try:
            registered = self.orchestrator.registry.list_compensations()
        except AttributeError as error:
            what = f"a compensation is registered for, or is, something that is no task: {error}"
            do = "put @orchestrator.compensates above @app.task, and give it a task"
            yield Finding("compensations", Level.PROBLEM, what, do)
            return
        for conflict in self.orchestrator.registry.list_conflicts():
            yield Finding("compensations", Level.PROBLEM, conflict, "register one of them; no worker starts until then")
        for undone, compensation in sorted(registered.items()):
            for name in sorted({undone, compensation} - known):
                what = f"{compensation} is registered to undo {undone}, and no task is named {name}"
                do = "name its module in the app's imports, or mend the name"
                yield Finding("compensations", Level.PROBLEM, what, do)


def _read_plan(text: str) -> Compensation:
    plan: Compensation = codec.load(Compensation, text)
    return plan


def _check_skew(check: str, whose: str, skew: timedelta) -> Finding:
    seconds = abs(skew.total_seconds())
    way = "ahead of" if skew > timedelta(0) else "behind"
    if abs(skew) <= MOST_SKEW:
        return Finding(check, Level.OK, f"agrees with this host's within {MOST_SKEW.total_seconds():g} s")
    what = f"{whose} is {seconds:.1f} s {way} this host's"
    do = "set the clocks by NTP: timers and timeouts are early or late by that much, but nothing else goes wrong"
    return Finding(check, Level.WARNING, what, do)
