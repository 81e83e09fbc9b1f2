"""The results of a task <- JSON text, by the annotation of the task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from orchestrator.codec.annotated import is_untyped, lenient_adapter_for
from orchestrator.codec.arguments import returns_of
from orchestrator.codec.values import decode_leniently, read

__all__ = ["result_decoder"]

Decoder = Callable[[str], Any]


def result_decoder(function: Callable[..., Any] | None) -> tuple[Decoder, bool]:
    """Return what decodes the results of a function as ``decode_leniently`` does, and whether it may be kept.

    It may not where the annotation cannot be resolved yet: a class that it names may be defined further down.
    """
    if function is None:
        return read, True
    returns, is_final = returns_of(function)
    if is_untyped(returns) or lenient_adapter_for(returns) is None:
        return read, is_final
    return partial(decode_leniently, annotation=returns), is_final
