"""The arguments of a call <-> JSON text, and the annotations that say what they are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any, Optional, get_type_hints
from weakref import WeakKeyDictionary

from orchestrator.codec.annotated import is_untyped, takes_none
from orchestrator.codec.values import encode, fit, fit_leniently, read
from orchestrator.core.records import Outcome

__all__ = [
    "Annotations",
    "UndoneStep",
    "accepts_none",
    "annotations_of",
    "decode_arguments",
    "decode_undone_step",
    "encode_arguments",
    "plain_arguments",
    "returns_of",
]


@dataclass(frozen=True, slots=True)
class Annotations:
    """What a function says of its parameters and its result; ``None`` where it says nothing.

    ``parameters`` has every named parameter, ``positional`` the names of those that can be passed by position.
    """

    parameters: dict[str, object]
    positional: tuple[str, ...]
    var_positional: object
    var_keyword: object
    returns: object


@dataclass(frozen=True, slots=True)
class UndoneStep:
    """The step that a compensation undoes, for one registered with ``pass_step=True``.

    ``args`` and ``kwargs`` are what the step was called with, ``result`` is what it returned: ``None`` when its
    ``outcome`` is not ``succeeded``.  ``outcome`` is what the workflow was told; a step that outlived its timeout may
    also have a ``late_outcome``, and then ``result`` is what it returned in the end.  ``idempotency_key`` is the key
    that the step itself saw, the same in all of its attempts.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    outcome: Outcome
    late_outcome: Outcome | None
    idempotency_key: str


# --- annotations --------------------------------------------------------------------------------------------------

_UNANNOTATED = Annotations(parameters={}, positional=(), var_positional=None, var_keyword=None, returns=None)
_known: WeakKeyDictionary[Callable[..., Any], Annotations] = WeakKeyDictionary()


def annotations_of(function: Callable[..., Any]) -> Annotations:
    """Return the annotations of a function, following ``__wrapped__``; of a bound method without its ``self``.

    An annotation that cannot be resolved counts as none, without harm to the others; a ``functools.partial`` and
    whatever has no signature have none.
    """
    if isinstance(function, MethodType):
        whole = annotations_of(function.__func__)
        return replace(whole, positional=whole.positional[1:])
    if isinstance(function, functools.partial):
        return _UNANNOTATED
    try:
        known = _known.get(function)
    except TypeError:  # it cannot be hashed, or takes no weak reference
        return _read_annotations(function, _hints(function))
    if known is None:
        hints = _hints(function)
        known = _read_annotations(function, hints)
        if None not in hints.values():
            # else a class that is defined further down its module may still be missing: look again next time
            _known[function] = known
    return known


def returns_of(function: Callable[..., Any]) -> tuple[object, bool]:
    """Return what a function says of its result, and whether that will stay so: see ``annotations_of``."""
    returns = annotations_of(function).returns
    return returns, returns is not None or "return" not in getattr(_innermost(function), "__annotations__", {})


def _read_annotations(function: Callable[..., Any], hints: dict[str, object]) -> Annotations:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return _UNANNOTATED
    named: dict[str, object] = {}
    positional: list[str] = []
    variable: dict[inspect._ParameterKind, object] = {}
    for parameter in signature.parameters.values():
        hint = hints.get(parameter.name)
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            variable[parameter.kind] = hint
            continue
        named[parameter.name] = _with_default(hint, parameter.default)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            positional.append(parameter.name)
    return Annotations(
        parameters=named,
        positional=tuple(positional),
        var_positional=variable.get(inspect.Parameter.VAR_POSITIONAL),
        var_keyword=variable.get(inspect.Parameter.VAR_KEYWORD),
        returns=hints.get("return"),
    )


def _hints(function: Callable[..., Any]) -> dict[str, object]:
    """Resolve annotations one by one: a name that only the type checker sees must not cost the others theirs."""
    inner = _innermost(function)
    return {name: _resolved(inner, annotation) for name, annotation in getattr(inner, "__annotations__", {}).items()}


def _resolved(function: Any, annotation: object) -> object:
    alone = SimpleNamespace(
        __annotations__={"it": annotation}, __type_params__=getattr(function, "__type_params__", ())
    )
    try:
        namespace = getattr(function, "__globals__", {})
        hint = get_type_hints(alone, globalns=namespace, include_extras=True)["it"]
    except Exception:  # an annotation is code, and may raise anything
        return None
    # ``x: any``, ``x: callable``: slips that say nothing
    return Any if isinstance(hint, FunctionType | BuiltinFunctionType) else hint


def _innermost(function: Any) -> Any:
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        function = wrapped
    return function


def _with_default(hint: object, default: object) -> object:
    """Read ``x: str = None`` as it was always meant."""
    if hint is None or default is not None:
        return hint
    try:
        return Optional[hint]  # noqa: UP045 - it is a value here, of any kind
    except TypeError:
        return hint


def accepts_none(annotations: Annotations, index: int) -> bool:
    """Tell whether the positional parameter ``index`` takes ``None``; one without an annotation does."""
    if index < len(annotations.positional):
        return takes_none(annotations.parameters[annotations.positional[index]])
    return takes_none(annotations.var_positional)


# --- arguments ----------------------------------------------------------------------------------------------------


def encode_arguments(
    args: Sequence[object], kwargs: Mapping[str, object], what: str, limit_bytes: int | None = None
) -> str:
    """Return the arguments of a call as JSON text; raise ``NotEncodable`` or ``PayloadTooLarge``."""
    return encode({"args": list(args), "kwargs": dict(kwargs)}, what, limit_bytes)


def plain_arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments as Celery's JSON would give them."""
    call = read(text)
    return call["args"], call["kwargs"]


def decode_arguments(
    text: str, annotations: Annotations, skip: int = 0, *, strict: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments, each as its parameter's annotation says where it fits, else as plain JSON.

    The first ``skip`` positional parameters are bound already (``self``, or ``ctx``).  ``strict`` raises
    ``ResultMismatch`` for what does not fit: a workflow is written for us, its annotations are meant.
    """
    args, kwargs = plain_arguments(text)
    return _fit_arguments(args, kwargs, annotations, skip, _fit_strictly if strict else _fit_leniently)


def _fit_arguments(
    args: list[Any],
    kwargs: dict[str, Any],
    annotations: Annotations,
    skip: int,
    fitted: Callable[[object, object, str], Any],
) -> tuple[list[Any], dict[str, Any]]:
    parameters = annotations.parameters
    hints = [*parameters.values(), annotations.var_positional, annotations.var_keyword]
    if all(is_untyped(hint) for hint in hints):
        return args, kwargs
    by_position = [(name, parameters[name]) for name in annotations.positional[skip:]]
    by_position += [("*args", annotations.var_positional)] * (len(args) - len(by_position))
    return (
        [fitted(arg, hint, name) for arg, (name, hint) in zip(args, by_position, strict=False)],
        {name: fitted(arg, parameters.get(name, annotations.var_keyword), name) for name, arg in kwargs.items()},
    )


def _fit_strictly(value: object, annotation: object, name: str) -> Any:
    return fit(value, annotation, f"{name!r} of the input")


def _fit_leniently(value: object, annotation: object, _name: str) -> Any:
    return fit_leniently(value, annotation)


def decode_undone_step(payload: str | dict[str, Any], annotations: Annotations | None, skip: int = 0) -> UndoneStep:
    """Return the ``UndoneStep`` in the first argument of a compensation, as text or decoded plainly.

    ``annotations`` are those of the undone task, where it is known here; its first ``skip`` parameters are bound.
    """
    step = read(payload) if isinstance(payload, str) else payload
    args, kwargs, result = step["call"]["args"], step["call"]["kwargs"], step["result"]
    if annotations is not None:
        args, kwargs = _fit_arguments(args, kwargs, annotations, skip, _fit_leniently)
        result = fit_leniently(result, annotations.returns)
    late_outcome = step["late_outcome"]
    return UndoneStep(
        args=tuple(args),
        kwargs=kwargs,
        result=result,
        outcome=Outcome(step["outcome"]),
        late_outcome=None if late_outcome is None else Outcome(late_outcome),
        idempotency_key=step["idempotency_key"],
    )
