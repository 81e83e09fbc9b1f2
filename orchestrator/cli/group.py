"""The command group, which Celery finds by the entry point ``celery.commands``."""

from __future__ import annotations

import errno
from typing import IO, Any

import click
from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from orchestrator import errors
from orchestrator.cli.output import clean
from orchestrator.flower.command import flower
from orchestrator.runtime.app import Orchestrator
from orchestrator.runtime.owner import orchestrator_of

#: What a command ends with: refused or failed, used wrongly (click's own), not found, and for the commands that look
#: for trouble, that they found some.
FAILED, USAGE, NOT_FOUND, FOUND = 1, 2, 3, 4

_MISSING = (errors.UnknownInstance, errors.UnknownWorkflow)


class Failed(click.ClickException):
    """A command cannot be done; said in one line."""

    exit_code = FAILED

    def __init__(self, message: object) -> None:
        super().__init__(clean(" ".join(str(message).split("\n"))))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {self.message}", file=file, err=file is None)


class NotFound(Failed):
    """There is no instance, or no workflow, of that name."""

    exit_code = NOT_FOUND


def as_failure(error: Exception) -> Failed:
    """Return the line, and the exit code, for an error that is no fault of this package."""
    if isinstance(error, _MISSING):
        return NotFound(error)
    if isinstance(error, SQLAlchemyError):
        return Failed(f"the store refused: {getattr(error, 'orig', None) or error}; doctor says what is wrong with it")
    if isinstance(error, KombuError | ConnectionError):
        return Failed(f"the broker cannot be reached: {error}")
    return Failed(error)


#: What is told in a line; anything else is a fault of ours, and its traceback is wanted.
EXPECTED = (errors.OrchestratorError, SQLAlchemyError, KombuError, OSError)


class Commands(click.Group):
    """Says in one line what went wrong, and ends with the exit code for it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:  # ``… list | head``; click knows what to do
                raise
            raise as_failure(error) from error


@click.group(cls=Commands)
def orchestrator() -> None:
    """Look at workflows, and repair them."""


def orchestrator_in(ctx: click.Context) -> Orchestrator:
    """Return the orchestrator of the app that ``celery -A`` names, with all of the app's tasks registered."""
    app = ctx.obj.app
    try:
        # what makes the orchestrator may be a module that the app only names
        app.loader.import_default_modules()
    except ImportError as error:
        raise Failed(f"the tasks of the app {app.main!r} cannot be imported: {error}") from error
    try:
        return orchestrator_of(app)
    except errors.ConfigurationError as error:
        raise Failed(f"{error}; celery -A names the module that has the app") from error


orchestrator.add_command(flower)
