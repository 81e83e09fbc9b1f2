"""An instance as a tree: its steps, what undoes them beneath them, its children nested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from orchestrator import errors
from orchestrator.cli.output import as_duration, as_json, as_time, as_value, clean, styled
from orchestrator.core.records import Failure, Kind, Outcome, State
from orchestrator.runtime.app import Orchestrator
from orchestrator.runtime.descriptions import Description, HistoryEntry, RunEntry
from orchestrator.store.instances import Status

#: Children of children are shown so deep, and so many instances in all: each is read from the store.
DEEPEST, MOST_INSTANCES = 8, 100

_MARKS = {
    Outcome.SUCCEEDED: ("✓", "green"),
    Outcome.FAILED: ("✗", "red"),
    Outcome.UNKNOWN: ("?", "yellow"),
    Outcome.WITHDRAWN: ("-", "dim"),
}
_UNDOING = (Kind.COMPENSATION, Kind.UNDO)
_CALLED = (Kind.STEP, Kind.CHILD, Kind.COMPENSATION, Kind.UNDO)


@dataclass(frozen=True, slots=True)
class Shown:
    """An instance with its records and its children."""

    instance: Description
    run: int
    runs: list[RunEntry]
    history: list[HistoryEntry]
    children: dict[str, Shown]

    def as_document(self) -> dict[str, Any]:
        return {
            **as_json(self.instance),
            "runs": as_json(self.runs),
            "shown_run": self.run,
            "history": as_json(self.history),
            "children": [child.as_document() for child in self.children.values()],
        }


def load(owner: Orchestrator, instance_id: str, run: int | None = None) -> Shown:
    """Read an instance, and its children.  Raises ``UnknownInstance``, and ``InvalidOperation`` for a run it lacks."""
    left = iter(range(MOST_INSTANCES))

    def one(own_id: str, number: int | None, depth: int) -> Shown:
        handle = owner.get(own_id)
        instance, runs = handle.describe(), handle.runs()
        if number is not None and number not in {instance.run, *(each.run for each in runs)}:
            raise errors.InvalidOperation(f"{own_id} has no run {number}; its present one is {instance.run}")
        shown = instance.run if number is None else number
        history = handle.history(shown)
        children: dict[str, Shown] = {}
        for entry in history:
            if entry.kind != Kind.CHILD or entry.child_id is None or depth >= DEEPEST:
                continue
            try:
                if next(left, None) is not None:
                    children[entry.child_id] = one(entry.child_id, None, depth + 1)
            except errors.UnknownInstance:
                continue  # it has not been started yet, or was purged
        return Shown(instance, shown, runs, history, children)

    return one(instance_id, run, 0)


def render(shown: Shown, *, most_records: int | None = None) -> RenderableType:
    """Return all there is to say of an instance; of each instance's records, ``most_records`` at most."""
    now = datetime.now(UTC)
    tree = Tree(_headline(shown.instance, now))
    _grow(tree, shown, now, most_records)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(justify="right", style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _list_facts(shown):
        facts.add_row(name, Text(clean(value)))
    return Group(facts, tree)


def _list_facts(shown: Shown) -> list[tuple[str, object]]:
    instance = shown.instance
    facts: list[tuple[str, object]] = [
        ("started (UTC)", as_time(instance.created_at)),
        ("ended (UTC)", as_time(instance.ended_at)),
        ("deadline (UTC)", as_time(instance.deadline_at)),
        ("parent", instance.parent_id),
        ("run", f"{shown.run} of {instance.run}" if shown.runs else None),
        ("progress", instance.progress),
        ("attributes", as_value(instance.attributes) if instance.attributes else None),
        ("args", as_value(instance.args) if instance.args else None),
        ("kwargs", as_value(instance.kwargs) if instance.kwargs else None),
        ("result", as_value(instance.result) if instance.status is Status.COMPLETED else None),
        ("error", _of_failure(instance.error)),
        ("cancelled", instance.cancel_reason),
        *(("blocked", line) for line in (instance.blocked or "").splitlines()),
        *(("not undone", f"step {each.undoes} by {each.name}: {each.message}") for each in instance.not_undone),
    ]
    return [(name, value) for name, value in facts if value]


def _headline(instance: Description, now: datetime) -> Text:
    took = as_duration((instance.ended_at or now) - instance.created_at)
    when = f"took {took}" if instance.ended_at else f"for {took}"
    return Text.assemble(
        (clean(instance.instance_id), "bold"),
        "  ",
        clean(instance.workflow),
        "  ",
        styled(instance.status),
        f"  {when}",
    )


def _grow(tree: Tree, shown: Shown, now: datetime, most_records: int | None) -> None:
    entries = shown.history if most_records is None else shown.history[:most_records]
    known = {entry.seq for entry in entries}
    began_at = shown.instance.created_at
    nodes: dict[int | None, Tree] = {None: tree}
    # an operator's repetitions are numbered below zero, and come after what they repeat
    for entry in sorted(entries, key=lambda each: (each.seq < 0, abs(each.seq))):
        above = nodes.get(entry.undoes if entry.undoes in known else None, tree)
        node = above.add(line_of(entry, began_at, now))
        nodes.setdefault(entry.seq, node)
        child = shown.children.get(entry.child_id or "") if entry.kind == Kind.CHILD else None
        if child is not None:
            _grow(node.add(_headline(child.instance, now)), child, now, most_records)
    if len(entries) < len(shown.history):
        tree.add(Text(f"… {len(shown.history) - len(entries)} more; history has all", style="dim"))


def line_of(entry: HistoryEntry, began_at: datetime, now: datetime) -> Text:
    """Return what a record is and has come to, with its times."""
    mark, style = _MARKS[Outcome(entry.outcome)] if entry.outcome else ("·", "cyan")
    is_undoing = entry.kind in _UNDOING
    line = Text.assemble((f"{mark} ", style), (f"{entry.seq} ", "dim"))
    if entry.kind not in (Kind.STEP, entry.name):
        line.append(f"{entry.kind} ", style="magenta" if is_undoing else "dim")
    line.append(clean(entry.name), style="bold" if entry.kind in _CALLED else "")
    line.append(f"  {entry.outcome or entry.state}", style=style)
    line.append(f"  +{as_duration(entry.scheduled_at - began_at)}", style="dim")
    for word in times_of(entry, now):
        line.append(f"  {word}")
    if entry.error is not None and entry.outcome != Outcome.SUCCEEDED:
        line.append(f"  {_of_failure(entry.error, 120)}", style="red")
    if entry.resolution:
        line.append(f"  {clean(entry.resolution)}", style="green")
    return line


def times_of(entry: HistoryEntry, now: datetime) -> Sequence[str]:
    """Return how long a record waited and took, and how many attempts it needed."""
    words: list[str] = []
    if entry.kind in (Kind.STEP, Kind.COMPENSATION):
        if entry.started_at is not None:
            words.append(f"waited {as_duration(entry.started_at - entry.scheduled_at)}")
            if entry.settled_at is not None:
                words.append(f"took {as_duration(entry.settled_at - entry.started_at)}")
        if entry.attempts > 1:
            words.append(f"{entry.attempts} attempts")
        if entry.lost:
            words.append(f"{entry.lost} lost")
    elif entry.settled_at is not None and entry.settled_at > entry.scheduled_at:
        words.append(f"took {as_duration(entry.settled_at - entry.scheduled_at)}")
    if entry.outcome is None:
        words += _waiting(entry, now)
    return words


def _waiting(entry: HistoryEntry, now: datetime) -> list[str]:
    if entry.state == State.SCHEDULED and entry.due_at is not None and entry.due_at > now:
        left = as_duration(entry.due_at - now)
        if entry.kind == Kind.TIMER:
            return [f"fires in {left}"]
        if entry.attempts:
            return [f"next attempt in {left}"]
    if entry.state == State.RUNNING and entry.started_at is not None:
        return [f"for {as_duration(now - entry.started_at)}"]
    return [f"for {as_duration(now - entry.scheduled_at)}"]


def _of_failure(failure: Failure | None, longest: int = 1000) -> str:
    if failure is None:
        return ""
    text = clean(f"{failure.type.rpartition('.')[2]}: {failure.message}")
    return text if len(text) <= longest else f"{text[:longest]}…"
