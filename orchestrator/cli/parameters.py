"""What commands take: durations, JSON, attributes, and names that the shell completes."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click
from celery._state import get_current_app
from celery.app.utils import find_app
from click.shell_completion import CompletionItem

from orchestrator.runtime.app import Orchestrator
from orchestrator.runtime.owner import orchestrator_of
from orchestrator.runtime.unmigrated import unmigrated_store
from orchestrator.store import names, workers
from orchestrator.store.instances import Status

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
    Choice = click.Choice[str]
else:  # older releases of click, whose classes are not generic, do
    ParamType = click.ParamType
    Choice = click.Choice

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
#: How many names a shell is given.
_MOST_NAMES = 50


class Duration(ParamType):
    """``90s``, ``15m``, ``12h``, ``30d``, ``2w``, or several of them: ``1h30m``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        parts = _DURATION.findall(str(value))
        if not parts or "".join(number + unit for number, unit in parts) != value:
            self.fail(f"{value!r} is no duration; give one like 90s, 15m, 12h or 30d", param, ctx)
        try:
            return sum((timedelta(**{_UNITS[unit]: float(number)}) for number, unit in parts), timedelta())
        except OverflowError:
            self.fail(f"{value!r} is longer than there are dates", param, ctx)


class Json(ParamType):
    """A JSON value; ``kind`` is the Python type that it has to be."""

    name = "json"

    def __init__(self, kind: type = object, what: str = "a JSON value") -> None:
        self.kind, self.what = kind, what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            read = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not {self.what}: {error} (text needs quotes of its own: '\"text\"')", param, ctx)
        if not isinstance(read, self.kind):
            self.fail(f"{value!r} is not {self.what}", param, ctx)
        return read


class Attribute(ParamType):
    """``name=value``; the value is JSON, or else text."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        name, separator, text = str(value).partition("=")
        if not (name and separator):
            self.fail(f"{value!r} is no attribute; give name=value", param, ctx)
        try:
            return name, json.loads(text)
        except ValueError:
            return name, text


# --- names that the shell completes ---------------------------------------------------------------------------------


class InstanceId(ParamType):
    """The id of an instance."""

    name = "id"

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _complete(ctx, lambda owner: _list_instance_ids(owner, incomplete))


class WorkflowName(ParamType):
    """The name of a workflow that is registered in the app, or on a live worker."""

    name = "workflow"

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _complete(ctx, lambda owner: _list_workflow_names(owner, incomplete))


def _list_instance_ids(owner: Orchestrator, beginning: str) -> list[str]:
    with unmigrated_store(owner.settings) as store, store.read("complete") as connection:
        return names.list_instance_ids(connection, beginning, _MOST_NAMES)


def _list_workflow_names(owner: Orchestrator, beginning: str) -> list[str]:
    found = set(owner.workflows.names())
    with unmigrated_store(owner.settings) as store, store.read("complete") as connection:
        found |= {name for worker in workers.list_workers(connection) for name in worker.workflows}
    return sorted(name for name in found if name.startswith(beginning))


def _complete(ctx: click.Context, find: Callable[[Orchestrator], list[str]]) -> list[CompletionItem]:
    """Return what a shell may go on with; whatever goes wrong, somebody's typing is not to be disturbed."""
    silenced = io.StringIO()
    with (
        contextlib.suppress(Exception, SystemExit),
        contextlib.redirect_stdout(silenced),
        contextlib.redirect_stderr(silenced),
    ):
        # no command is run while the shell completes, so Celery has not loaded the app
        given = ctx.find_root().params.get("app")
        app = find_app(given) if isinstance(given, str) else given or get_current_app()
        app.loader.import_default_modules()
        return [CompletionItem(name) for name in find(orchestrator_of(app))]
    return []


class StatusName(Choice):
    """A status, also in small letters."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(str(value).upper(), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return super().shell_complete(ctx, param, incomplete.upper())


def status_choice(statuses: Iterable[Status] = tuple(Status)) -> StatusName:
    return StatusName([str(status) for status in statuses])


# --- options that several commands have -----------------------------------------------------------------------------


def instance_id_argument(command: F) -> F:
    return click.argument("instance_id", metavar="ID", type=InstanceId())(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_document", is_flag=True, help="Print one JSON document, for scripts.")(command)


def yes_option(command: F) -> F:
    return click.option("--yes", "-y", "is_sure", is_flag=True, help="Do not ask for confirmation.")(command)


def workflow_option(command: F) -> F:
    return click.option("--workflow", type=WorkflowName(), help="Only instances of this workflow.")(command)


def attributes_option(command: F) -> F:
    return click.option(
        "--attribute",
        "attributes",
        type=Attribute(),
        multiple=True,
        help="Only instances with this attribute; several have to hold together.",
    )(command)
