"""Commands that change one instance, several, or all that a selection finds: cancel, terminate, undo, resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from orchestrator import errors
from orchestrator.cli.confirming import confirm
from orchestrator.cli.group import EXPECTED, FAILED, as_failure, orchestrator, orchestrator_in
from orchestrator.cli.output import as_time, complain, print_json, print_table, say, styled
from orchestrator.cli.parameters import (
    Duration,
    InstanceId,
    attributes_option,
    json_option,
    status_choice,
    workflow_option,
    yes_option,
)
from orchestrator.runtime import requests
from orchestrator.runtime.app import Orchestrator
from orchestrator.runtime.handle import WorkflowHandle
from orchestrator.store.instances import Instance, Status

F = TypeVar("F", bound=Callable[..., Any])

UNENDED = tuple(status for status in Status if not status.is_final)
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Target:
    """An instance that is to be changed; of one that is not there nothing is known but that it was named."""

    instance_id: str
    workflow: str | None = None
    status: Status | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which instances a command is about: those named, or all that meet every condition."""

    instance_ids: tuple[str, ...]
    workflow: str | None
    statuses: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    older_than: timedelta | None
    is_dry_run: bool
    is_sure: bool
    as_document: bool

    def find(self, owner: Orchestrator, eligible: Sequence[Status]) -> list[Target]:
        """Return the instances.  Raises ``UsageError`` where nothing says which."""
        is_selecting = bool(self.workflow or self.statuses or self.attributes or self.older_than is not None)
        if self.instance_ids and is_selecting:
            raise click.UsageError(
                "give ids, or select by --workflow, --status, --attribute and --older-than; not both"
            )
        if self.instance_ids:
            return [_named(owner, each) for each in dict.fromkeys(self.instance_ids)]
        if not is_selecting:
            raise click.UsageError("give ids, or select by --workflow, --status, --attribute and --older-than")
        before = None if self.older_than is None else datetime.now(UTC) - self.older_than
        found: list[Target] = []
        cursor: str | None = None
        while True:
            page = owner.list(
                workflow=self.workflow,
                status=self.statuses or [str(each) for each in eligible],
                attributes=dict(self.attributes),
                started_before=before,
                limit=_PAGE,
                cursor=cursor,
            )
            found += [Target(each.instance_id, each.workflow, each.status, each.created_at) for each in page]
            cursor = page.cursor
            if cursor is None:
                return found


def _named(owner: Orchestrator, instance_id: str) -> Target:
    found = owner.find_instance(instance_id)
    if found is None:
        return Target(instance_id)
    return Target(found.id, found.workflow, found.status, found.created_at)


def selecting(eligible: Sequence[Status]) -> Callable[[F], F]:
    """Give a command the parameters of a ``Selection``; only instances in ``eligible`` can be selected."""

    def decorate(command: F) -> F:
        for parameter in (
            json_option,
            yes_option,
            click.option("--dry-run", "is_dry_run", is_flag=True, help="Only list what would be touched."),
            click.option("--older-than", type=Duration(), help="Only instances started longer ago: 90s, 12h, 30d."),
            attributes_option,
            click.option(
                "--status", "statuses", type=status_choice(eligible), multiple=True, help="Only in this status."
            ),
            workflow_option,
            click.argument("instance_ids", metavar="[ID]...", type=InstanceId(), nargs=-1),
        ):
            command = parameter(command)
        return command

    return decorate


def change_each(
    ctx: click.Context,
    selection: Selection,
    eligible: Sequence[Status],
    words: tuple[str, str],
    change: Callable[[WorkflowHandle], None],
    check: Callable[[Instance], None],
    question: str | None = None,
) -> None:
    """Do ``change`` to each instance; one that refuses does not keep it from the others.

    ``words`` are the deed and what was done: ``("cancel", "cancelled")``; ``check`` raises what ``change`` would,
    and is all that is done in a dry run; ``question`` asks before it is begun.
    """
    owner = orchestrator_in(ctx)
    targets = selection.find(owner, eligible)
    if targets and question is not None and not selection.is_dry_run:
        what = targets[0].instance_id if len(targets) == 1 else f"{len(targets)} instances"
        confirm(question.format(what), is_sure=selection.is_sure)
    accepted: list[Target] = []
    failed: list[dict[str, str]] = []
    for target in targets:
        try:
            if selection.is_dry_run:
                _check(owner, target, check)
            else:
                change(owner.get(target.instance_id))
        except EXPECTED as error:
            failure = as_failure(error)
            if len(selection.instance_ids) == 1:
                raise failure from error
            failed.append({"instance_id": target.instance_id, "error": failure.message})
            complain(f"{target.instance_id}: {failure.message}")
        else:
            accepted.append(target)
            if not (selection.is_dry_run or selection.as_document):
                say(f"{words[1]} {target.instance_id}")
    _report(selection, words, targets, accepted, failed)
    if failed:
        ctx.exit(FAILED)


def _check(owner: Orchestrator, target: Target, check: Callable[[Instance], None]) -> None:
    instance = owner.find_instance(target.instance_id)
    if instance is None:
        raise errors.UnknownInstance(target.instance_id)
    check(instance)


def _report(
    selection: Selection,
    words: tuple[str, str],
    targets: list[Target],
    accepted: list[Target],
    failed: list[dict[str, str]],
) -> None:
    if selection.as_document:
        done = [] if selection.is_dry_run else [target.instance_id for target in accepted]
        print_json({"dry_run": selection.is_dry_run, "instances": targets, "done": done, "failed": failed})
    elif selection.is_dry_run:
        _list(accepted, words[0])
    elif not targets:
        say(f"nothing to {words[0]}")
    elif len(targets) > 1:
        say(f"{words[1]} {len(accepted)} of {len(targets)} instances")


def _list(targets: list[Target], deed: str) -> None:
    rows = [
        (each.instance_id, each.workflow or "", styled(each.status) if each.status else "", as_time(each.created_at))
        for each in targets
    ]
    print_table(("id", "workflow", "status", "started (UTC)"), rows)
    say(f"would {deed} {len(targets)} instance{'s' if len(targets) != 1 else ''}")


@orchestrator.command()
@click.option("--reason", help="Kept with the instance.")
@click.option("--terminate", "terminates", is_flag=True, help="End the processes of steps under way as well.")
@selecting(UNENDED)
@click.pass_context
def cancel(ctx: click.Context, /, reason: str | None, terminates: bool, **selected: Any) -> None:
    """Cancel instances: what they did is undone."""
    change_each(
        ctx,
        Selection(**selected),
        UNENDED,
        ("cancel", "cancelled"),
        lambda handle: handle.cancel(reason, terminate=terminates),
        requests.check_cancellable,
        "Cancel {}, and undo what was done?",
    )


@orchestrator.command()
@click.option("--reason", help="Kept with the instance.")
@selecting(UNENDED)
@click.pass_context
def terminate(ctx: click.Context, /, reason: str | None, **selected: Any) -> None:
    """End instances where they stand: nothing is undone."""
    change_each(
        ctx,
        Selection(**selected),
        UNENDED,
        ("terminate", "terminated"),
        lambda handle: handle.terminate(reason),
        requests.check_terminable,
        "End {} with nothing undone?",
    )


@orchestrator.command()
@selecting((Status.COMPLETED,))
@click.pass_context
def undo(ctx: click.Context, /, **selected: Any) -> None:
    """Run the compensations of instances that have completed."""
    change_each(
        ctx,
        Selection(**selected),
        (Status.COMPLETED,),
        ("undo", "undoing"),
        lambda handle: handle.undo(),
        requests.check_undoable,
        "Undo all that {} did?",
    )


@orchestrator.command()
@selecting((Status.BLOCKED,))
@click.pass_context
def resume(ctx: click.Context, /, **selected: Any) -> None:
    """Give BLOCKED instances another try: their blocked steps another attempt, their code another pass."""
    change_each(
        ctx,
        Selection(**selected),
        (Status.BLOCKED,),
        ("resume", "resumed"),
        lambda handle: handle.resume(),
        requests.check_blocked,
    )
