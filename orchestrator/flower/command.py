"""``celery -A app orchestrator flower``: Flower as it is, with a place for workflows in it."""

from __future__ import annotations

import click
from celery.bin.base import CeleryCommand

from orchestrator.errors import ConfigurationError
from orchestrator.runtime.owner import orchestrator_of

_NOT_INSTALLED = 'Flower is not installed; install it with: pip install "celery-orchestrator[flower]"'


@click.command(cls=CeleryCommand, context_settings={"ignore_unknown_options": True})
@click.argument("tornado_argv", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def flower(ctx: click.Context, tornado_argv: tuple[str, ...]) -> None:
    """Run Flower with pages about workflows in it.

    Takes Flower's own options (--port, --basic-auth, --url-prefix ...), and its settings from the environment.
    """
    try:
        from flower import urls
        from flower.command import flower as plain_flower
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("flower", "tornado"):
            raise  # Flower is there, and misses something else
        raise click.ClickException(_NOT_INSTALLED) from error
    from orchestrator.flower.extension import extend

    root = ctx.find_root()
    app = root.obj.app
    app.loader.import_default_modules()  # as Flower does; one of them may be what makes the orchestrator
    try:
        orchestrator = orchestrator_of(app)
        orchestrator.settings.require_store()
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from error
    extend(urls.handlers, urls.settings, orchestrator)
    # as a child of celery's own context, where Flower looks for options that were given in the wrong place
    with plain_flower.make_context("flower", list(tornado_argv), parent=root) as own:
        plain_flower.invoke(own)
