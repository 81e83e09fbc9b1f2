"""Commands about the store: purge, migrate."""

from __future__ import annotations

from datetime import timedelta

import click

from orchestrator.cli.confirming import confirm
from orchestrator.cli.group import FOUND, orchestrator, orchestrator_in
from orchestrator.cli.output import print_json, say
from orchestrator.cli.parameters import Duration, json_option, status_choice, yes_option
from orchestrator.runtime.unmigrated import unmigrated_store
from orchestrator.store import migrations
from orchestrator.store.instances import Status

_FINAL = tuple(status for status in Status if status.is_final)


@orchestrator.command()
@click.option(
    "--older-than", type=Duration(), required=True, help="How long ago they have to have ended: 90s, 15m, 12h, 30d."
)
@click.option(
    "--status",
    "statuses",
    type=status_choice(_FINAL),
    multiple=True,
    help="Only in this status (default: all in which an instance has ended).",
)
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only say how many it would be.")
@yes_option
@json_option
@click.pass_context
def purge(
    ctx: click.Context,
    older_than: timedelta,
    statuses: tuple[str, ...],
    is_dry_run: bool,
    is_sure: bool,
    as_document: bool,
) -> None:
    """Delete instances that ended long ago, with their history."""
    owner = orchestrator_in(ctx)
    if not (is_dry_run or is_sure):
        count = owner.purge(older_than=older_than, statuses=statuses or None, dry_run=True)
        confirm(f"Delete {count} instances, with their history?", is_sure=False)
    count = owner.purge(older_than=older_than, statuses=statuses or None, dry_run=is_dry_run)
    if as_document:
        print_json({"dry_run": is_dry_run, "purged": count})
    else:
        say(f"{'would purge' if is_dry_run else 'purged'} {count} instance{'s' if count != 1 else ''}")


@orchestrator.command()
@click.option("--check", "only_checks", is_flag=True, help="Change nothing; the exit code is 4 if there is a need to.")
@json_option
@click.pass_context
def migrate(ctx: click.Context, only_checks: bool, as_document: bool) -> None:
    """Bring the store's schema to the revision of this version; do nothing where it is there already."""
    owner = orchestrator_in(ctx)
    with unmigrated_store(owner.settings) as store:
        with store.read("revision") as connection:
            before, is_current = migrations.find_revision(connection), migrations.is_current(connection)
        if not (is_current or only_checks):
            store.migrate_now()
        with store.read("revision") as connection:
            after = migrations.find_revision(connection)
    if as_document:
        print_json({"store": store.describe(), "before": before, "after": after, "head": migrations.HEAD})
    elif is_current:
        say(f"{store.describe()} is at revision {after}; there is nothing to do")
    elif only_checks:
        say(f"{store.describe()} is at revision {before or 'none'}, and has to be migrated to {migrations.HEAD}")
    else:
        say(f"migrated {store.describe()} from revision {before or 'none'} to {after}")
    if only_checks and not is_current:
        ctx.exit(FOUND)
