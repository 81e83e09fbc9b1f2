"""Scopes: what is undone together, and in which order.

The idea is the saga of Garcia-Molina and Salem (1987): every step that took effect is undone by its compensation, in
reverse.  A ``Scope`` keeps what was started in it; ``undo_waves`` says what is undone after what.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from orchestrator.core.records import Compensation, Outcome, Payload, Record


@dataclass(slots=True, eq=False)
class Node:
    """One record as the pass knows it: nothing of its outcome shows before it was delivered."""

    record: Record
    scope: Scope
    optional: bool = False
    is_pivot: bool = False
    returns: object = None
    is_settled: bool = False
    is_attempt_alive: bool = False
    outcome: Outcome | None = None
    is_observed: bool = False  # its failure was raised into the workflow, or covered by a gather or collect
    is_accepted: bool = False
    is_committed: bool = False
    is_undone: bool = False

    @property
    def seq(self) -> int:
        return self.record.seq

    @property
    def is_closed(self) -> bool:
        """No attempt can take effect any more."""
        return self.is_settled and not self.is_attempt_alive

    @property
    def is_failure(self) -> bool:
        return self.is_settled and self.outcome is not Outcome.SUCCEEDED

    @property
    def is_in_doubt(self) -> bool:
        return self.outcome is Outcome.UNKNOWN and not self.is_accepted and not self.is_undone

    @property
    def is_taken_on(self) -> bool:
        return self.outcome is Outcome.UNKNOWN and self.is_accepted

    @property
    def needs_undoing(self) -> bool:
        plan = self.record.compensation
        if plan is None or self.is_undone or self.is_committed:
            return False
        return self.outcome in (Outcome.SUCCEEDED, Outcome.UNKNOWN) or (plan.always and self.outcome is Outcome.FAILED)


@dataclass(slots=True, eq=False)
class Batch:
    """Nodes that may be undone at the same time, ``width`` of them (``None``: all)."""

    nodes: list[Node]
    width: int | None = 1


@dataclass(slots=True, eq=False)
class Scope:
    """The part of a workflow that is undone together; the workflow itself is the outermost one."""

    path: str = ""
    parallel: bool = False
    parent: Scope | None = None
    batches: list[Batch] = field(default_factory=list)
    inner: int = 0
    committed: int = 0  # so many batches, from the first, are committed as a whole

    def open_inner(self, parallel: bool) -> Scope:
        self.inner += 1
        return Scope(path=f"{self.path}{self.inner}.", parallel=parallel, parent=self)

    def commit(self) -> None:
        """Let what has settled stay done, but for what is in doubt."""
        whole = True
        for batch in self.batches[self.committed :]:
            for node in batch.nodes:
                node.is_committed |= node.is_settled and not node.is_in_doubt
            whole = whole and all(node.is_committed for node in batch.nodes)
            self.committed += whole

    def nodes(self) -> Iterator[Node]:
        for batch in self.batches:
            yield from batch.nodes

    def enclosing(self) -> Iterator[Scope]:
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def pass_outward(self) -> None:
        """Hand what may still have to be undone to the scope around this one."""
        if self.parent is not None:
            self.parent.batches.extend(self.batches)
            for node in self.nodes():
                node.scope = self.parent


@dataclass(frozen=True, slots=True)
class Wave:
    """Compensations that run ``width`` at a time (``None``: all together), each wave after the one before it."""

    nodes: tuple[Node, ...]
    width: int | None


def undo_waves(scope: Scope) -> Iterator[Wave]:
    """Yield what is to be undone, last-started first."""
    batches = [Batch([node for node in batch.nodes if node.needs_undoing], batch.width) for batch in scope.batches]
    batches = sorted((b for b in batches if b.nodes), key=lambda b: b.nodes[-1].seq, reverse=True)
    if scope.parallel:
        batches = [Batch([node for batch in batches for node in batch.nodes], None)] if batches else []
    for batch in batches:
        yield Wave(tuple(sorted(batch.nodes, key=lambda node: node.seq, reverse=True)), batch.width)


def doubts(nodes: Iterable[Node]) -> list[Node]:
    """Return the steps to be undone because nobody knows their outcome and the workflow did not take them on."""
    return [node for node in nodes if node.is_in_doubt and node.needs_undoing]


def compensation_arguments(plan: Compensation, step: Record, outcome: Outcome | None) -> Payload:
    """Return the arguments of a compensation: the recorded bytes of the step's result go in as they are."""
    if plan.passes == "nothing":
        return plan.arguments
    given = json.loads(plan.arguments)
    first = _result(step, outcome) if plan.passes == "result" else _undone_step(step, outcome)
    rest = "".join("," + json.dumps(arg) for arg in given["args"])
    return f'{{"args":[{first}{rest}],"kwargs":{json.dumps(given["kwargs"])}}}'


def _result(step: Record, outcome: Outcome | None) -> Payload:
    if step.late_outcome is Outcome.SUCCEEDED:
        return step.late_result or "null"
    return (step.result or "null") if outcome is Outcome.SUCCEEDED else "null"


def _undone_step(step: Record, outcome: Outcome | None) -> Payload:
    arguments = step.arguments or '{"args":[],"kwargs":{}}'
    fields = {
        "call": arguments,
        "result": _result(step, outcome),
        "outcome": json.dumps(outcome),
        "late_outcome": json.dumps(step.late_outcome),
        "name": json.dumps(step.name),
        "idempotency_key": json.dumps(step.idempotency_key),
    }
    return "{" + ",".join(f'"{name}":{text}' for name, text in fields.items()) + "}"
