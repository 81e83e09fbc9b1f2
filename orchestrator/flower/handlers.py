"""The list of workflows, and a page for each instance."""

from __future__ import annotations

import base64
import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlencode

import tornado.web

from orchestrator import errors
from orchestrator._version import __version__
from orchestrator.flower import actions, review, words
from orchestrator.flower.guarding import Refused, WorkflowsHandler, logger
from orchestrator.flower.review import Part, Review
from orchestrator.store import searching
from orchestrator.store.instances import Status
from orchestrator.store.searching import Position, Results, Search

_PAGE = 50
#: Statuses that are asked for together, by the name of their filter.
_TOGETHER = {
    "attention": (Status.BLOCKED, Status.COMPENSATION_FAILED),
    "unfinished": (Status.PENDING, Status.RUNNING, Status.COMPENSATING, Status.BLOCKED),
}
_SHORTEST_REFRESH, _LONGEST_REFRESH = 1, 3600


@dataclass(frozen=True, slots=True)
class Filters:
    """What the form above the list says."""

    id: str
    workflow: str
    status: str
    attribute: str

    def query(self) -> Search:
        """Read the form.  Raises ``Refused``."""
        if self.status in ("", *_TOGETHER):
            statuses = _TOGETHER.get(self.status, ())
        elif self.status in Status.__members__:
            statuses = (Status(self.status),)
        else:
            raise Refused(400, f"{self.status!r} is no status; statuses are {', '.join(Status)}")
        name: str | None = None
        values: tuple[str, ...] = ()
        if self.attribute:
            name, equals, text = (part.strip() for part in self.attribute.partition("="))
            if not equals or not name:
                raise Refused(400, f"{self.attribute!r} is no attribute; write its name and value: customer=ada")
            values = searching.read_attribute(name, text)[1]
        return Search(self.id, self.workflow or None, statuses, name, values)

    def link(self, path: str, **more: str) -> str:
        """Return a link to the list with these filters."""
        given = {"id": self.id, "workflow": self.workflow, "status": self.status, "attribute": self.attribute, **more}
        query = urlencode({name: value for name, value in given.items() if value})
        return f"{path}?{query}" if query else path


class ListHandler(WorkflowsHandler):
    """Instances, newest first, a page at a time."""

    @tornado.web.authenticated
    async def get(self) -> None:
        # tornado's own readers: Flower's escape what they read, and our templates escape what they show
        filters = Filters(*(self.get_query_argument(name, "").strip() for name in Filters.__slots__))
        after, before = self.get_query_argument("after", ""), self.get_query_argument("before", "")
        position = read_cursor(after or before) if after or before else None
        direction: Literal["after", "before"] = "before" if before and not after else "after"
        results, attributes = await self.source.call(self._search, filters.query(), position, direction)
        self.render(
            "orchestrator-list.html",
            filters=filters,
            results=results,
            attributes=attributes,
            before=results.before and make_cursor(results.before),
            after=results.after and make_cursor(results.after),
            is_first=position is None,
            statuses=list(Status),
            together=_TOGETHER,
            workflows=sorted(self.source.orchestrator.workflows.names()),
            now=datetime.now(UTC),
            zone=self.capp.timezone,
            words=words,
            version=__version__,
        )

    def _search(
        self, query: Search, position: Position | None, direction: Literal["after", "before"]
    ) -> tuple[Results, dict[str, list[tuple[str, Any]]]]:
        with self.source.orchestrator.current.store.read("search") as connection:
            results = searching.search(connection, query, position=position, direction=direction, limit=_PAGE)
            encoded = searching.load_attributes_of(connection, [found.id for found in results.found])
        return results, {
            own_id: [(name, json.loads(value)) for name, value in values] for own_id, values in encoded.items()
        }


class InstanceHandler(WorkflowsHandler):
    """One instance: what it has done, and what can be done to it."""

    def decode_argument(self, value: bytes, name: str | None = None) -> str:
        text: str = super().decode_argument(value, name)
        if name is None and not text.isprintable():  # a part of the path: no id, and not every database takes it
            raise Refused(404, "there is no such instance")
        return text

    @tornado.web.authenticated
    async def get(self, instance_id: str) -> None:
        await self._show(instance_id)

    @tornado.web.authenticated
    async def post(self, instance_id: str) -> None:
        # by itself as well: whoever makes a Flower application of their own may leave its setting out
        self.check_xsrf_cookie()
        objection = self.find_objection()
        if objection is not None:
            raise Refused(403, objection)
        form = {name: self.get_body_argument(name) for name in self.request.body_arguments}
        action = actions.ACTIONS.get(form.get("action", ""))
        if action is None:
            raise Refused(400, f"there is no action {form.get('action')!r}")
        handle = await self.source.call(self.source.orchestrator.get, instance_id)
        try:
            await self.source.call(action.perform, handle, form)
        except errors.StoreUnreachable:
            raise
        except (errors.OrchestratorError, ValueError) as error:
            logger.info("%s asked to %s %s: refused, %s", self.name_user(), action.name, instance_id, error)
            await self._show(instance_id, refusal=f"{action.label}: {error}")
            return
        logger.info("%s asked to %s %s: done", self.name_user(), action.name, instance_id)
        done = urlencode({"done": action.name})
        self.redirect(f"{self.reverse_url('workflow', instance_id)}?{done}", status=303)

    async def _show(self, instance_id: str, refusal: str | None = None) -> None:
        shown = await self.source.call(review.read, self.source.orchestrator, instance_id, self._read_part())
        if refusal is not None:
            self.set_status(409)
        done = actions.ACTIONS.get(self.get_query_argument("done", ""))
        refresh = self.get_query_argument("refresh", "")
        if refresh.isascii() and refresh.isdigit() and _SHORTEST_REFRESH <= int(refresh) <= _LONGEST_REFRESH:
            self.set_header("Refresh", str(int(refresh)))
        is_fragment = bool(self.get_query_argument("fragment", ""))
        self.render(
            "orchestrator-live.html" if is_fragment else "orchestrator-instance.html",
            refusal=refusal,
            done=None if done is None else done.done,
            objection=self.find_objection(),
            **_namespace(shown),
            zone=self.capp.timezone,
            version=__version__,
        )

    def _read_part(self) -> Part:
        numbers = [self.get_query_argument(name, "") for name in ("run", "from")]
        try:
            run, from_seq = (actions.read_number(number) if number else None for number in numbers)
        except errors.InvalidOperation as error:
            raise Refused(400, str(error)) from None
        return Part(run, from_seq, bool(self.get_query_argument("alone", "")))


def _namespace(shown: Review) -> dict[str, Any]:
    """Return the names that the templates of an instance use."""
    return {
        "shown": shown,
        "description": shown.description,
        "offers": actions.offer(shown),
        "actions": actions,
        "waits_for": review.waits_for,
        "message_id": f"flower-{uuid.uuid4()}",
        "words": words,
    }


def make_cursor(position: Position) -> str:
    """Return a position as part of a link."""
    text = json.dumps([position.created_at.isoformat(), position.id])
    return base64.urlsafe_b64encode(text.encode()).decode()


def read_cursor(text: str) -> Position:
    """Return the position that ``make_cursor`` made ``text`` of.  Raises ``Refused``."""
    try:
        at, last_id = json.loads(base64.urlsafe_b64decode(text.encode()))
        position = Position(datetime.fromisoformat(at), str(last_id))
    except (ValueError, TypeError) as error:
        raise Refused(400, "this is not a link to a page of the list; begin with its first page") from error
    if position.created_at.tzinfo is None or not position.id.isprintable():
        raise Refused(400, "this is not a link to a page of the list; begin with its first page")
    return position
