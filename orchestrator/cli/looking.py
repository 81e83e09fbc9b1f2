"""Commands that look: list, show, watch, history."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.live import Live
from rich.text import Text

from orchestrator.cli.group import FOUND, orchestrator, orchestrator_in
from orchestrator.cli.output import (
    as_duration,
    as_time,
    as_value,
    clean,
    make_console,
    print_json,
    print_table,
    say,
    styled,
)
from orchestrator.cli.parameters import (
    Duration,
    attributes_option,
    instance_id_argument,
    json_option,
    status_choice,
    workflow_option,
)
from orchestrator.cli.tree import Shown, load, render
from orchestrator.core.records import Outcome
from orchestrator.runtime.app import Orchestrator
from orchestrator.runtime.descriptions import HistoryEntry
from orchestrator.store.instances import Status

#: Of so many records ``show`` tells; there may be tens of thousands.
MOST_RECORDS = 200


@orchestrator.command("list")
@workflow_option
@click.option("--status", "statuses", type=status_choice(), multiple=True, help="Only in this status.")
@attributes_option
@click.option("--older-than", type=Duration(), help="Only instances started longer ago: 90s, 15m, 12h, 30d.")
@click.option("--newer-than", type=Duration(), help="Only instances started since: 90s, 15m, 12h, 30d.")
@click.option("--limit", type=click.IntRange(1, 10000), default=50, show_default=True, help="How many at most.")
@click.option("--cursor", help="Where the page before this one ended; it is printed below it.")
@json_option
@click.pass_context
def list_(
    ctx: click.Context,
    workflow: str | None,
    statuses: tuple[str, ...],
    attributes: tuple[tuple[str, Any], ...],
    older_than: timedelta | None,
    newer_than: timedelta | None,
    limit: int,
    cursor: str | None,
    as_document: bool,
) -> None:
    """List instances, the newest first."""
    now = datetime.now(UTC)
    owner = orchestrator_in(ctx)
    try:
        page = owner.list(
            workflow=workflow,
            status=statuses or None,
            attributes=dict(attributes),
            started_after=None if newer_than is None else now - newer_than,
            started_before=None if older_than is None else now - older_than,
            limit=limit,
            cursor=cursor,
        )
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param_hint="--cursor") from error
    if as_document:
        print_json({"instances": page.instances, "cursor": page.cursor})
        return
    rows = [
        (
            each.instance_id,
            each.workflow,
            styled(each.status),
            as_time(each.created_at),
            as_duration((each.ended_at or now) - each.created_at),
            "  ".join([each.progress or "", *(f"{name}={as_value(v, 60)}" for name, v in each.attributes.items())]),
        )
        for each in page
    ]
    print_table(("id", "workflow", "status", "started (UTC)", "took or age", "progress, attributes"), rows)
    if page.cursor is not None:
        say(f"there are more: --cursor {page.cursor}")


@orchestrator.command()
@instance_id_argument
@click.option("--run", type=int, help="A run that has ended in recur (default: the present one).")
@click.option("--all", "shows_all", is_flag=True, help=f"Show more than {MOST_RECORDS} records of an instance.")
@json_option
@click.pass_context
def show(ctx: click.Context, instance_id: str, run: int | None, shows_all: bool, as_document: bool) -> None:
    """Show an instance as a tree: steps, what undid them beneath them, children nested."""
    shown = load(orchestrator_in(ctx), instance_id, run)
    if as_document:
        print_json(shown.as_document())
    else:
        make_console().print(render(shown, most_records=None if shows_all else MOST_RECORDS))


@orchestrator.command()
@instance_id_argument
@click.option("--run", type=int, help="A run that has ended in recur (default: the present one).")
@json_option
@click.pass_context
def history(ctx: click.Context, instance_id: str, run: int | None, as_document: bool) -> None:
    """List the records of an instance, with arguments, results and errors."""
    handle = orchestrator_in(ctx).get(instance_id)
    number = handle.describe().run if run is None else run
    entries = handle.history(number)
    if as_document:
        print_json({"instance_id": instance_id, "run": number, "history": entries})
        return
    rows = [
        (
            each.seq,
            each.kind,
            each.name,
            each.outcome or each.state,
            each.attempts,
            as_time(each.settled_at),
            f"({', '.join(_list_arguments(each))}){_what_it_came_to(each)}",
        )
        for each in entries
    ]
    print_table(("seq", "kind", "name", "outcome", "attempts", "settled (UTC)", "arguments, result or error"), rows)


def _list_arguments(entry: HistoryEntry) -> list[str]:
    return [as_value(v, 60) for v in entry.args] + [f"{name}={as_value(v, 60)}" for name, v in entry.kwargs.items()]


def _what_it_came_to(entry: HistoryEntry) -> str:
    if entry.outcome == Outcome.SUCCEEDED:
        return f" -> {as_value(entry.result, 100)}"
    return "" if entry.error is None else f" {entry.error.type}: {entry.error.message[:200]}"


# --- watching -------------------------------------------------------------------------------------------------------


@orchestrator.command()
@instance_id_argument
@click.option(
    "--interval", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--exit-status", is_flag=True, help="End with exit code 4 unless the instance ended COMPLETED.")
@json_option
@click.pass_context
def watch(ctx: click.Context, instance_id: str, interval: float, exit_status: bool, as_document: bool) -> None:
    """Watch an instance until it has ended; where stdout is no terminal, a line for each thing that happens."""
    looks = _look(orchestrator_in(ctx), instance_id, interval)
    if as_document:
        *_, last = looks
        print_json(last.as_document())
    elif sys.stdout.isatty():
        last = _watch_live(looks)
    else:
        last = _watch_lines(looks)
    if exit_status and last.instance.status is not Status.COMPLETED:
        ctx.exit(FOUND)


def _look(owner: Orchestrator, instance_id: str, interval: float) -> Iterator[Shown]:
    """Give the instance again and again; last of all, as it ended."""
    while True:
        shown = load(owner, instance_id)
        yield shown
        if shown.instance.status.is_final:
            return
        time.sleep(interval)


def _watch_live(looks: Iterator[Shown]) -> Shown:
    console = make_console()
    # what does not fit is cropped while it lives: the whole of it is printed when it has ended
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for shown in looks:
            live.update(render(shown, most_records=MOST_RECORDS), refresh=True)
    console.print(render(shown, most_records=MOST_RECORDS))
    return shown


def _watch_lines(looks: Iterator[Shown]) -> Shown:
    console = make_console()
    told: dict[tuple[str, ...], tuple[object, ...]] = {}
    for shown in looks:
        for key, state, line in _list_states(shown):
            if told.get(key) != state:
                told[key] = state
                console.print(Text.assemble((f"{as_time(datetime.now(UTC))}  ", "dim"), line), soft_wrap=True)
        console.file.flush()
    return shown


def _list_states(shown: Shown) -> Iterator[tuple[tuple[str, ...], tuple[object, ...], Text]]:
    """Give everything that can change, what it is now, and a line that says so; the instance itself last."""
    instance = shown.instance
    own = clean(instance.instance_id)
    for entry in shown.history:
        state = (entry.state, entry.outcome, entry.attempts, entry.resolution)
        words = [entry.kind, str(entry.seq), entry.name, entry.outcome or entry.state]
        words += [f"attempt {entry.attempts}"] if entry.attempts > 1 else []
        words += [f"{entry.error.type}: {entry.error.message}"] if entry.error and entry.outcome != "succeeded" else []
        words += [entry.resolution] if entry.resolution else []
        yield (own, str(shown.run), str(entry.seq)), state, Text(f"{own}  {clean('  '.join(words))}")
    for child in shown.children.values():
        yield from _list_states(child)
    if instance.progress:
        yield (own, "progress"), (instance.progress,), Text(f"{own}  {clean(instance.progress)}")
    said = (instance.blocked or "").partition("\n")[0]
    line = Text.assemble(f"{own}  ", styled(instance.status), f"  {clean(said)}" if said else "")
    yield (own, "status"), (instance.status, said), line
