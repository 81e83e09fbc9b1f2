"""Commands that look for trouble: stuck, doctor.  Their exit code is 4 where they found some."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime, timedelta

import click
from rich.text import Text

from orchestrator.cli.group import FOUND, orchestrator, orchestrator_in
from orchestrator.cli.output import as_duration, clean, make_console, print_json, say, styled
from orchestrator.cli.parameters import Duration, json_option, workflow_option
from orchestrator.runtime.doctor import Level, examine
from orchestrator.runtime.stuck import Stuck, find_stuck

_BAD = (Level.PROBLEM, Level.WARNING)
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


@orchestrator.command()
@click.option(
    "--older-than",
    type=Duration(),
    default="1h",
    show_default=True,
    help="How long a wait for a message, or an attempt without a timeout, has to have taken: 90s, 15m, 12h.",
)
@workflow_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="How many of each kind at most.")
@json_option
@click.pass_context
def stuck(ctx: click.Context, older_than: timedelta, workflow: str | None, limit: int, as_document: bool) -> None:
    """List what needs a person or may wait for ever, why, and the command that mends it."""
    report = find_stuck(orchestrator_in(ctx), older_than=older_than, workflow=workflow, limit=limit)
    if as_document:
        print_json({"stuck": report.findings, "is_complete": report.is_complete})
    else:
        console, celery, now = make_console(), _celery(ctx), datetime.now(UTC)
        for found in report.findings:
            console.print(_headline(found, now), soft_wrap=True)
            console.print(Text(f"    {clean(found.why)}"), soft_wrap=True)
            if found.mend:
                console.print(Text(f"    {celery} {clean(shlex.join(found.mend))}", style="bold"), soft_wrap=True)
        if not report.findings:
            say("nothing is stuck")
        elif not report.is_complete:
            say(f"there are more: --limit {limit * 10}")
    if report.findings:
        ctx.exit(FOUND)


def _headline(found: Stuck, now: datetime) -> Text:
    line = Text()
    if found.instance_id is not None:
        line.append(f"{clean(found.instance_id)}  ", style="bold")
    if found.workflow is not None:
        line.append(f"{clean(found.workflow)}  ")
    if found.status is not None:
        line.append_text(styled(found.status)).append("  ")
    line.append(str(found.reason), style="red")
    if found.since is not None:
        line.append(f"  for {as_duration(now - found.since)}", style="dim")
    return line


def _celery(ctx: click.Context) -> str:
    app = ctx.find_root().params.get("app")
    return f"celery -A {shlex.quote(app)}" if isinstance(app, str) else "celery"


@orchestrator.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_document: bool) -> None:
    """Check settings, store, broker, workers, what is registered, clocks and versions; say what to do."""
    owner, console = orchestrator_in(ctx), make_console()
    findings = []
    for found in examine(owner):
        findings.append(found)
        if as_document:
            continue
        line = Text.assemble((f"{found.level:<8}", _STYLES[found.level]), f" {clean(found.check)}: {clean(found.what)}")
        console.print(line, soft_wrap=True)
        if found.do:
            console.print(Text(f"         {clean(found.do)}", style="bold"), soft_wrap=True)
    counts = {level: sum(found.level is level for found in findings) for level in Level}
    if as_document:
        print_json({"findings": findings, "problems": counts[Level.PROBLEM], "warnings": counts[Level.WARNING]})
    else:
        say(", ".join(f"{counts[level]} {level}{'s' if counts[level] != 1 else ''}" for level in _BAD))
    if counts[Level.PROBLEM]:
        ctx.exit(FOUND)
