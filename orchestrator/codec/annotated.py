"""What an annotation means for a value that was read from JSON; each is looked into once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Annotated, Any, NewType, TypeVar, Union, get_args, get_origin
from uuid import UUID

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

__all__ = ["MISFITS", "adapter_for", "is_untyped", "lenient_adapter_for", "takes_none"]

T = TypeVar("T")

# What an annotation, or the code of a model, raises over a value that it was not made for, or when it makes no sense
# itself.  Not Exception: Celery's soft time limit is one, may strike here, and must not pass for a misfit.
MISFITS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, NameError, RuntimeError)

_CARRIED_SCALARS = {NoneType, str, int, float, bool, bytes, datetime, date, time, UUID, Decimal}
_CARRIED_LISTS = {list, Iterable, Iterator, Collection, Sequence, MutableSequence}
_CARRIED_DICTS = {dict, Mapping, MutableMapping}

# classes that only a registered type of kombu's can carry are checked by isinstance; a Decimal may be NaN
_CONFIG = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=True)


def is_untyped(annotation: object) -> bool:
    """Tell whether an annotation says nothing (``None`` stands for there being none)."""
    return annotation is None or annotation is Any or annotation is object or annotation is inspect.Parameter.empty


def _per_annotation(build: Callable[[Any], T]) -> Callable[[Any], T]:
    """Cache ``build`` by annotation."""
    cached = lru_cache(maxsize=2048)(lambda annotation, _spelling: build(annotation))

    def find(annotation: Any) -> T:
        try:
            hash(annotation)
        except TypeError:
            return build(annotation)  # Annotated[int, []]
        # A | B equals B | A, but prefers A: which one is meant must not depend on which one came first
        return cached(annotation, "" if isinstance(annotation, type) else repr(annotation))

    return find


@_per_annotation
def adapter_for(annotation: Any) -> TypeAdapter[Any]:
    """Return what validates a value against an annotation; raise where there can be none."""
    annotation = _listed(annotation)
    try:
        return TypeAdapter(annotation, config=_CONFIG)
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":
            raise
        return TypeAdapter(annotation)


@_per_annotation
def lenient_adapter_for(annotation: Any) -> TypeAdapter[Any] | None:
    """Return what decodes a value that an annotation describes, ``None`` where plain JSON is all there can be."""
    try:
        return None if _is_carried(annotation) else adapter_for(annotation)
    except MISFITS:
        return None


@_per_annotation
def takes_none(annotation: Any) -> bool:
    """Tell whether ``None`` is a value of the annotated type."""
    if is_untyped(annotation):
        return True
    try:
        adapter_for(annotation).validate_python(None, strict=True)
    except ValidationError:
        return False
    except MISFITS:
        return NoneType in get_args(annotation)
    return True


def _is_carried(annotation: Any) -> bool:
    """Tell whether JSON with Celery's tags brings such a value back by itself."""
    if is_untyped(annotation):
        return True
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if isinstance(annotation, NewType):
        return _is_carried(annotation.__supertype__)
    if origin is Annotated:
        return _is_carried(args[0])
    if origin in (Union, UnionType) or origin in _CARRIED_LISTS:
        return all(_is_carried(arg) for arg in args)
    if origin in _CARRIED_DICTS:
        return not args or (args[0] is str and _is_carried(args[1]))
    return isinstance(origin, type) and origin in _CARRIED_SCALARS


def _listed(annotation: Any) -> Any:
    """Read ``Iterable[X]`` as a list: pydantic would give an iterator that is used up after the first loop."""
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Iterable, Iterator):
        return list[args[0] if args else Any]  # type: ignore[misc]
    if origin in (Union, UnionType):
        return reduce(or_, (_listed(arg) for arg in args))
    return annotation
