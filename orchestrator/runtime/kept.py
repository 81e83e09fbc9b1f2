"""What is kept with an instance of the Celery request that started it: what follows its end, and how it was to begin.

Whatever follows is frozen before it is recorded, canvases with all that is in them: it is published under the same
ids however often it is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from celery import Celery
from celery.app.task import Context as CeleryRequest
from celery.canvas import Signature, chunks, maybe_signature
from celery.utils.functional import maybe_list
from celery.utils.time import maybe_make_aware

from orchestrator import codec
from orchestrator.core.records import Payload
from orchestrator.errors import InvalidOperation, NotEncodable
from orchestrator.runtime.dispatch import START_HEADER

#: Attributes of a Celery request that its end needs.
_NEEDED = (
    "root_id",
    "parent_id",
    "chain",
    "chord",
    "group",
    "group_index",
    "ignore_result",
    "reply_to",
    "correlation_id",
    "stamped_headers",
    "stamps",
    "traceparent",
    "tracestate",
)
#: Of these, nought says something too.
_NUMBERS = ("group_index",)
#: Headers of a start message that are not the caller's: they are of this one message, or kept by themselves.
_OUR_OWN = (START_HEADER, "traceparent", "tracestate")
#: What says when is a matter of the record, what follows the end of its end; the id is the instance's.
_NOT_SENT = ("countdown", "eta", "expires", "link", "link_error", "task_id")


@dataclass(frozen=True, slots=True)
class Start:
    """How ``orchestrator.start`` was to begin an instance: the options of its message, and when."""

    options: dict[str, Any] = field(default_factory=dict)
    begins_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """What a recorded request says."""

    request: dict[str, Any] = field(default_factory=dict)
    priority: int | None = None
    start: Start | None = None


def read(text: Payload | None) -> Kept:
    return codec.load(Kept, text) if text else Kept()


def of_message(app: Celery, request: CeleryRequest) -> Payload:
    """Return what is recorded of the request of a start message."""
    needed = {name: getattr(request, name, None) for name in _NEEDED}
    links = {name: _frozen(app, getattr(request, name, None)) for name in ("callbacks", "errbacks")}
    priority = (request.delivery_info or {}).get("priority")
    return _text({**needed, **links, "headers": _custom(request.headers)}, priority, None)


def of_options(
    app: Celery,
    task: Any,
    instance_id: str,
    options: Mapping[str, Any],
    now: datetime,
    carried: Mapping[str, Any],
) -> tuple[Payload, Start]:
    """Return what is recorded of a start that ``options`` were given with, and how it is to begin.

    ``carried`` is what of its caller is kept besides.
    Raises ``InvalidOperation`` for an eta or an expiry that says no instant, ``NotEncodable`` for what has no JSON.
    """
    merged = {**{name: value for name, value in task._get_exec_options().items() if value is not None}, **options}
    parent = app.current_worker_task
    request = {
        **carried,
        "root_id": merged.get("root_id") or (parent and (parent.request.root_id or parent.request.id)),
        "parent_id": merged.get("parent_id") or (parent and parent.request.id),
        "callbacks": _frozen(app, merged.get("link")),
        "errbacks": _frozen(app, merged.get("link_error")),
        "ignore_result": merged.get("ignore_result", task.ignore_result),
        "reply_to": merged.get("reply_to") or app.thread_oid,
        "correlation_id": instance_id,
        "stamped_headers": merged.get("stamped_headers"),
        "stamps": {name: merged[name] for name in merged.get("stamped_headers") or () if name in merged},
        "chain": merged.get("chain"),
        "chord": merged.get("chord"),
        "group": merged.get("group_id"),
        "group_index": merged.get("group_index"),
        "headers": _custom(merged.get("headers")),
    }
    sent = {name: getattr(value, "name", value) if name == "queue" else value for name, value in options.items()}
    sent = {name: value for name, value in sent.items() if name not in _NOT_SENT}
    instants = {name: _instant(app, task.name, name, merged, now) for name in ("countdown", "eta", "expires")}
    start = Start(sent, instants["eta"] or instants["countdown"], instants["expires"])
    return _text(request, merged.get("priority"), start), start


def _text(request: Mapping[str, Any], priority: int | None, start: Start | None) -> Payload:
    # a place in a group is told also where it is the first one: without it Celery takes a member for the last one
    told = {name: value for name, value in request.items() if value or (name in _NUMBERS and value is not None)}
    kept = {"request": told, "priority": priority, "start": start}
    return codec.encode({name: value for name, value in kept.items() if value is not None}, "the request")


def _custom(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the headers that somebody gave a message, as far as they have a JSON form: brokers take more than that."""
    kept = {}
    for name, value in (headers or {}).items():
        if name in _OUR_OWN:
            continue
        with suppress(NotEncodable):
            codec.encode(value, "a header")
            kept[str(name)] = value
    return kept


def _instant(app: Celery, task: str, name: str, options: Mapping[str, Any], now: datetime) -> datetime | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, int | float) and not isinstance(value, bool) and name != "eta":
        return now + timedelta(seconds=value)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            value = None
    if not isinstance(value, datetime) or name == "countdown":
        seconds = "seconds" if name == "countdown" else "a datetime" if name == "eta" else "seconds or a datetime"
        raise InvalidOperation(f"{name} of {task} is {options[name]!r}; give {seconds}")
    aware: datetime = maybe_make_aware(value, tz=app.timezone)  # a naive one is in the app's time zone, as for Celery
    return aware


# --- what follows -------------------------------------------------------------------------------------------------


def _frozen(app: Celery, links: Any) -> list[Any]:
    """Return signatures with all ids that are in them drawn, and which share nothing with the caller's."""
    return [_freeze(app, link) for link in maybe_list(links) or ()]


def _freeze(app: Celery, link: Any) -> Signature:
    signature = maybe_signature(codec.decode(codec.encode(link, "a callback")), app=app)
    if isinstance(signature, chunks):  # they draw the ids of their parts only when they are applied
        signature = signature.group()
    signature.freeze(signature.options.get("task_id"))
    return signature
