"""Commands that change one instance: start, send, fail-step, compensations, fork."""

from __future__ import annotations

from typing import Any

import click

from orchestrator import errors
from orchestrator.cli.confirming import confirm
from orchestrator.cli.group import orchestrator, orchestrator_in
from orchestrator.cli.output import print_json, say
from orchestrator.cli.parameters import Json, WorkflowName, instance_id_argument, json_option, yes_option

#: A repeated compensation is recorded below zero, which must not be taken for an option.
_SEQ_SETTINGS = {"ignore_unknown_options": True}


@orchestrator.command()
@click.argument("workflow", type=WorkflowName())
@click.option(
    "--args", "args", type=Json(list, "a JSON array"), default="[]", help="Positional arguments, a JSON array."
)
@click.option("--kwargs", type=Json(dict, "a JSON object"), default="{}", help="Named arguments, a JSON object.")
@click.option("--id", "instance_id", help="The id of the instance (default: a new one); the same id starts once.")
@json_option
@click.pass_context
def start(
    ctx: click.Context,
    workflow: str,
    args: list[Any],
    kwargs: dict[str, Any],
    instance_id: str | None,
    as_document: bool,
) -> None:
    """Start a workflow, durably, and print the id of the instance."""
    owner = orchestrator_in(ctx)
    task = owner.workflows.find(workflow)
    if task is None:
        raise errors.UnknownWorkflow(workflow)
    handle = owner.start(task.signature(args, kwargs), instance_id=instance_id)
    if as_document:
        print_json({"instance_id": handle.id, "workflow": workflow})
    else:
        say(handle.id)


@orchestrator.command()
@instance_id_argument
@click.argument("channel")
@click.argument("message", type=Json())
@click.option("--message-id", help="The same message id is delivered once on a channel.")
@click.pass_context
def send(ctx: click.Context, instance_id: str, channel: str, message: Any, message_id: str | None) -> None:
    """Send MESSAGE, a JSON value, to an instance that receives, or will, on CHANNEL."""
    orchestrator_in(ctx).send(instance_id, channel, message, message_id=message_id)
    say(f"sent to {instance_id} on {channel}")


@orchestrator.command("fail-step", context_settings=_SEQ_SETTINGS)
@instance_id_argument
@click.argument("seq", type=int)
@yes_option
@click.pass_context
def fail_step(ctx: click.Context, instance_id: str, seq: int, is_sure: bool) -> None:
    """Let the blocked step SEQ raise in its workflow."""
    handle = orchestrator_in(ctx).get(instance_id)
    confirm(f"Let step {seq} of {instance_id} fail?", is_sure=is_sure)
    handle.fail_step(seq)
    say(f"step {seq} of {instance_id} failed")


@orchestrator.command("retry-compensation", context_settings=_SEQ_SETTINGS)
@instance_id_argument
@click.argument("seq", type=int)
@click.pass_context
def retry_compensation(ctx: click.Context, instance_id: str, seq: int) -> None:
    """Run a compensation again that failed, or now if it waits; SEQ is its own, or that of the step it undoes."""
    orchestrator_in(ctx).get(instance_id).retry_compensation(seq)
    say(f"compensation {seq} of {instance_id} runs again")


@orchestrator.command("skip-compensation", context_settings=_SEQ_SETTINGS)
@instance_id_argument
@click.argument("seq", type=int)
@click.option("--reason", required=True, help="How it was dealt with; kept with the record.")
@yes_option
@click.pass_context
def skip_compensation(ctx: click.Context, instance_id: str, seq: int, reason: str, is_sure: bool) -> None:
    """Take a compensation as dealt with by hand; SEQ is its own, or that of the step it undoes."""
    handle = orchestrator_in(ctx).get(instance_id)
    confirm(f"Take compensation {seq} of {instance_id} as dealt with, and never run it?", is_sure=is_sure)
    handle.skip_compensation(seq, reason)
    say(f"compensation {seq} of {instance_id} skipped")


@orchestrator.command()
@instance_id_argument
@click.argument("seq", type=int)
@click.option("--id", "new_id", help="The id of the new instance (default: a new one).")
@click.option(
    "--owns-compensations", is_flag=True, help="The new instance undoes what it shares; of a TERMINATED instance only."
)
@json_option
@click.pass_context
def fork(
    ctx: click.Context, instance_id: str, seq: int, new_id: str | None, owns_compensations: bool, as_document: bool
) -> None:
    """Begin a new instance that shares the history before record SEQ, and print its id."""
    handle = orchestrator_in(ctx).get(instance_id)
    forked = handle.fork(seq, new_id, owns_compensations=owns_compensations)
    if as_document:
        print_json({"instance_id": forked.id, "forked_from": instance_id, "seq": seq})
    else:
        say(forked.id)
