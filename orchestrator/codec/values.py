"""One typed value <-> JSON text.

What Celery's JSON can carry has exactly the form that Celery gives it: plain JSON as it is, and datetimes, UUIDs,
Decimals and bytes in kombu's ``{"__type__": ..., "__value__": ...}``.  So a task without annotations receives what it
always did.  Everything else (models, dataclasses, enums, sets, timedeltas) is written as plain JSON, and comes back by
the annotation of whoever reads it.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, TypeVar
from uuid import UUID

from kombu.utils.json import JSONEncoder as KombuEncoder
from kombu.utils.json import object_hook as kombu_value
from pydantic import AnyUrl, BaseModel, ValidationError

from orchestrator import errors
from orchestrator.codec.annotated import MISFITS, adapter_for, is_untyped, lenient_adapter_for

__all__ = ["decode", "decode_leniently", "dump", "encode", "fit_leniently", "load", "read"]

T = TypeVar("T")

_TAG_KEYS = {"__type__", "__value__"}
_TAG = '"__type__"'


# --- encoding -----------------------------------------------------------------------------------------------------


def encode(value: object, what: str, limit_bytes: int | None = None) -> str:
    """Return ``value`` as JSON text, all ASCII.

    Raise ``NotEncodable`` or, when the text is longer than ``limit_bytes``, ``PayloadTooLarge``; both name ``what``.
    """
    text = _encode(value, what)
    if limit_bytes is not None and len(text) > limit_bytes:
        raise errors.PayloadTooLarge(what, len(text), limit_bytes)
    return text


def dump(value: object) -> str:
    """Return one of our own frozen dataclasses as JSON text, for a column of the store."""
    return encode(value, type(value).__name__)


def _encode(value: object, what: str) -> str:
    try:
        text = _encoder.encode(value)
        if _TAG not in text:
            return text
    except MISFITS:
        pass  # the walk below gives keys their text, or says what does not fit and where
    try:
        return _encoder.encode(_unfold(value))
    except _Unfit as unfit:
        raise errors.NotEncodable(what, str(unfit)) from None
    except RecursionError:
        raise errors.NotEncodable(what, "it contains itself, or is nested too deeply") from None
    except MISFITS as error:
        raise errors.NotEncodable(what, f"{type(error).__name__}: {error}") from error


class _Unfit(TypeError):
    """Something has no JSON form; the path to it is gathered while the walk unwinds."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path: list[str] = []

    def __str__(self) -> str:
        return f"{self.reason}, at {''.join(reversed(self.path))}" if self.path else self.reason


def _form(value: object) -> Any:
    """Return what stands for ``value`` in JSON, one level deep; Celery's own form where it has one."""
    try:
        return _kombu_form(value)
    except TypeError:
        return _own_form(value)


def _own_form(value: object) -> Any:
    match value:
        case BaseModel():
            # as Python values, not JSON: bytes and datetimes in it come back here and get their tags
            return value.model_dump(mode="python", by_alias=False, round_trip=True, warnings=False)
        case Enum():
            return _enum_value(value)
        case set() | frozenset():
            return _ordered(value)
        case timedelta():
            return _duration(value)
        case PurePath() | AnyUrl() | ipaddress.IPv4Address() | ipaddress.IPv6Address():
            return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise _Unfit(f"{type(value).__module__}.{type(value).__qualname__} has no JSON form")


_kombu_form: Callable[[object], Any] = KombuEncoder().default
_encoder = json.JSONEncoder(separators=(",", ":"), default=_form)

_SCALARS = (str, int, float, bool, type(None), datetime, date, time, UUID, Decimal, bytes)


def _enum_value(member: Enum) -> object:
    # a member is found again by its value; a tuple would come back as a list, which is no member's value
    if not isinstance(member.value, _SCALARS):
        raise _Unfit(f"{type(member).__qualname__}.{member.name} cannot be found again by its value {member.value!r}")
    return member.value


def _ordered(items: set[Any] | frozenset[Any]) -> list[Any]:
    """Order a set alike in every process, whatever PYTHONHASHSEED is."""
    kinds = {type(item) for item in items}
    if kinds <= {str} or kinds <= {int}:
        return sorted(items)
    # not by ``<``: sets of sets have one too, and it is no order
    return sorted(items, key=lambda item: _encoder.encode(_unfold(item)))


def _duration(value: timedelta) -> str:
    """Return an ISO 8601 duration, exact to the microsecond."""
    sign, size = ("-", -value) if value.days < 0 and value != timedelta.min else ("", value)
    if size.days < 0:  # timedelta.min has no positive counterpart
        return "-P999999999D"
    fraction = f".{size.microseconds:06}" if size.microseconds else ""
    return f"{sign}P{size.days}DT{size.seconds}{fraction}S"


def _unfold(value: object) -> Any:
    """Return ``value`` as plain JSON all the way down; slower than the encoder's hook, but it sees keys and paths."""
    match value:
        case None | str() | int() | float():
            return value
        case dict():
            return _unfold_dict(value)
        case list() | tuple():
            return _unfold_items(value)
    form = _form(value)
    if isinstance(form, dict) and form.keys() == _TAG_KEYS and not _is_record(value):
        return {"__type__": form["__type__"], "__value__": _unfold(form["__value__"])}
    return _unfold(form)


def _is_record(value: object) -> bool:
    return isinstance(value, BaseModel) or dataclasses.is_dataclass(value)


def _unfold_items(items: Iterable[object]) -> list[Any]:
    unfolded = []
    for index, item in enumerate(items):
        try:
            unfolded.append(_unfold(item))
        except _Unfit as unfit:
            unfit.path.append(f"[{index}]")
            raise
    return unfolded


def _unfold_dict(items: dict[Any, object]) -> dict[Any, Any]:
    if items.keys() == _TAG_KEYS:
        raise _Unfit("a dict of exactly the keys '__type__' and '__value__' would be read as something else")
    unfolded = {}
    for key, item in items.items():
        try:
            unfolded[_key(key)] = _unfold(item)
        except _Unfit as unfit:
            unfit.path.append(f"[{key!r:.60}]")
            raise
    return unfolded


def _key(key: object) -> str | int | float | None:
    match key:
        case None | str() | int() | float():
            return key  # the encoder writes these itself
        case UUID() | Decimal() | PurePath() | ipaddress.IPv4Address() | ipaddress.IPv6Address():
            return str(key)
        case datetime() | date() | time():
            return key.isoformat()
        case timedelta():
            return _duration(key)
        case Enum() if isinstance(key.value, str):
            return key.value
    raise _Unfit(f"a key of type {type(key).__qualname__} cannot be found again by its text")


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(text: str, annotation: object = None) -> Any:
    """Return the value that ``text`` holds, as the type ``annotation`` names (``None``, ``Any``: as plain JSON).

    Raise ``ResultMismatch`` when it does not fit.
    """
    return fit(read(text), annotation)


def fit(value: object, annotation: object, what: str = "the recorded value") -> Any:
    """Return plain JSON as the type ``annotation`` names; raise ``ResultMismatch`` when it does not fit.

    ``what`` names it in the error.
    """
    if is_untyped(annotation):
        return value
    try:
        return _validate(adapter_for(annotation), value)
    except MISFITS as misfit:
        reason = f"{what} does not fit {_spelled(annotation)}: {_summary(misfit)}"
        raise errors.ResultMismatch(reason) from misfit


def decode_leniently(text: str, annotation: object) -> Any:
    """Return the value that ``text`` holds, as the type ``annotation`` names where it fits, else as plain JSON.

    For annotations that are hints, as those of a Celery task: nothing is refused, and what JSON carries by itself
    (text, numbers, datetimes, UUIDs) is handed over as it is, not converted: ``"007"`` stays text for an ``int``.
    """
    return fit_leniently(read(text), annotation)


def load(kind: type[T], text: str) -> T:
    """Return what ``dump`` wrote of a ``kind``."""
    value: T = decode(text, kind)
    return value


def read(text: str) -> Any:
    """Return the plain JSON that ``text`` holds, with Celery's tagged types decoded."""
    if _TAG not in text:
        try:
            value, end = _scan(text, 0)
        except (StopIteration, *MISFITS):
            end = -1  # whatever is wrong with it is said below
        if end == len(text):
            return value
    try:
        return (_tagged_decoder if _TAG in text else _decoder).decode(text)
    except MISFITS as error:
        raise errors.ResultMismatch(f"a recorded value cannot be decoded: {error}") from error


def fit_leniently(value: object, annotation: object) -> Any:
    """Return plain JSON as the type ``annotation`` names where it fits, else as it is."""
    adapter = None if is_untyped(annotation) else lenient_adapter_for(annotation)
    if adapter is None:
        return value
    try:
        return _validate(adapter, value)
    except MISFITS:
        return value


def _revive(fields: dict[str, Any]) -> Any:
    try:
        return kombu_value(fields)
    except MISFITS as error:
        raise ValueError(f"{fields['__type__']!r} is not registered with kombu here, or not of that form") from error


_decoder = json.JSONDecoder()
#: What ``_decoder.decode`` comes to for text without space around it, such as we write.
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]
_tagged_decoder = json.JSONDecoder(object_hook=_revive)


def _validate(adapter: Any, value: object) -> Any:
    # strict=False also where a model is strict: that is about its callers, and JSON has neither tuples nor enums
    return adapter.validate_python(value, strict=False, by_alias=True, by_name=True)


def _spelled(annotation: object) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else repr(annotation)


def _summary(misfit: Exception) -> str:
    if not isinstance(misfit, ValidationError):
        return f"{type(misfit).__name__}: {misfit}".partition("\n")[0]
    # without the input: it may be a card number, and messages are logged
    found = misfit.errors(include_url=False, include_context=False, include_input=False)
    listed = [": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"]))) for one in found[:3]]
    return "; ".join([*listed, f"and {len(found) - 3} more"] if len(found) > 3 else listed)
