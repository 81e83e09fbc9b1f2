"""What instances begin with: their ids and inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from orchestrator import codec, errors
from orchestrator.core.records import Payload


def is_workflow(task: object) -> bool:
    """Tell whether a registered task is a workflow's."""
    return bool(getattr(task, "is_workflow", False))


def encode_input(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], limit_bytes: int
) -> Payload:
    """Return the input as it is recorded: bound to the function's parameters, checked against its annotations."""
    try:
        bound = inspect.signature(function).bind(None, *args, **kwargs)
    except TypeError as error:
        raise errors.InputMismatch(name, str(error)) from error
    text = codec.encode_arguments(bound.args[1:], bound.kwargs, f"the input of {name}", limit_bytes)
    try:
        codec.decode_arguments(text, codec.annotations_of(function), 1, strict=True)
    except errors.ResultMismatch as error:
        raise errors.InputMismatch(name, str(error)) from error
    return text


def check_instance_id(instance_id: object) -> str:
    if not isinstance(instance_id, str):
        raise errors.InvalidInstanceId(instance_id, f"it is a {type(instance_id).__name__}, not a string")
    if not 1 <= len(instance_id) <= 200:
        raise errors.InvalidInstanceId(instance_id, f"it has {len(instance_id)} characters, 1 to 200 are allowed")
    if instance_id != instance_id.strip():
        raise errors.InvalidInstanceId(instance_id, "it begins or ends with a space, which some databases ignore")
    if not instance_id.isprintable():
        raise errors.InvalidInstanceId(instance_id, "it has characters that cannot be printed")
    return instance_id
