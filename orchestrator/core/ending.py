"""How scopes end: drained, undone, or well.

A scope that failed is drained first, so that no attempt in it can take effect any more, and then undone, last-started
first.  One that ends well may still have to undo what nobody knows the outcome of.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.core.failing import failure_of
from orchestrator.core.passes import Pass
from orchestrator.core.records import Kind, NotUndone, RunCompensation, UndoChild, Wake
from orchestrator.core.saga import Batch, Node, Scope, compensation_arguments, doubts, undo_waves
from orchestrator.core.wanted import Wanted


def drain(current: Pass, nodes: Iterable[Node]) -> None:
    """Withdraw what has not begun, wait for what has, until no attempt of ``nodes`` can take effect any more."""
    current.check_live()
    wanted = _open(nodes)
    while wanted.needed > 0:
        if current.deliver_next(wanted):
            continue
        # all that came in is known now
        unbegun = [node for node in wanted.pending.values() if current.is_unbegun(node)]
        for node in unbegun:
            current.withdraw(node)
            wanted.note(node.seq)
        if not unbegun:
            current.cancels += [node.seq for node in wanted.pending.values() if node.record.kind is Kind.CHILD]
            current.suspend(wanted, draining=True)


def close(current: Pass, nodes: Iterable[Node]) -> None:
    """Wait until no attempt of ``nodes`` can take effect any more, withdrawing none."""
    wanted = _open(nodes)
    while wanted.needed > 0:
        if not current.deliver_next(wanted):
            current.suspend(wanted, draining=False)
        current.raise_cancellation()


def _open(nodes: Iterable[Node]) -> Wanted:
    open_nodes = {node.seq: node for node in nodes if not node.is_closed}
    return Wanted(open_nodes, len(open_nodes), Wake.CLOSED)


def end_scope(current: Pass, scope: Scope) -> None:
    """End a scope well: everything in it settles, no failure stays unseen, steps in doubt are undone."""
    nodes = list(scope.nodes())
    current.wait_for(nodes)
    for node in sorted(nodes, key=lambda n: n.seq):
        if node.is_failure and not (node.is_observed or node.optional or node.is_undone or node.is_taken_on):
            raise failure_of(node)
    in_doubt = doubts(nodes)
    if in_doubt:
        drain(current, in_doubt)
        doubtful = Scope(scope.path, scope.parallel, batches=[Batch([node]) for node in in_doubt])
        _undo_waves(current, doubtful)
        for node in in_doubt:
            node.is_undone = True
    scope.pass_outward()


def undo_scope(current: Pass, scope: Scope) -> tuple[NotUndone, ...]:
    """Drain a scope that failed, then undo it.  Return what could not be undone."""
    drain(current, scope.nodes())
    failed = _undo_waves(current, scope)
    for node in scope.nodes():
        node.is_undone = not node.is_committed
    return failed


def undo_nodes(current: Pass, nodes: list[Node]) -> tuple[NotUndone, ...]:
    """Drain and undo single steps of a scope that goes on."""
    drain(current, nodes)
    # before the waves: a pivot may succeed meanwhile, and commits what is being undone all the same
    undone = {node for node in nodes if not node.is_committed}
    failed = _undo_waves(current, Scope(current.scope.path, batches=[Batch([node]) for node in nodes]))
    for node in nodes:
        node.is_undone, node.is_observed = node in undone, True
    return failed


def _undo_waves(current: Pass, scope: Scope) -> tuple[NotUndone, ...]:
    failed: list[NotUndone] = []
    for wave in undo_waves(scope):
        undoing = _ask_wave(current, wave.nodes, wave.width)
        current.wait_for(undoing, is_shielded=True)
        failed += [_not_undone(node) for node in undoing if node.is_failure]
    current.not_undone += failed
    return tuple(failed)


def _ask_wave(current: Pass, nodes: tuple[Node, ...], width: int | None) -> list[Node]:
    current.has_compensated = True
    first = len(current.nodes)
    undoing = []
    for index, node in enumerate(nodes):
        lane = first if width is not None and width < len(nodes) else None
        held = width is not None and index >= width
        undoing.append(current.ask(_undo_command(node, lane, held)))
    return undoing


def _undo_command(node: Node, lane: int | None, held: bool) -> RunCompensation | UndoChild:
    plan = node.record.compensation
    assert plan is not None
    if plan.is_child:
        return UndoChild(plan.name, node.record.scope, node.seq, node.record.child_id or "", lane, held)
    return RunCompensation(
        plan.name,
        node.record.scope,
        undoes=node.seq,
        arguments=compensation_arguments(plan, node.record, node.outcome),
        passes=plan.passes,
        options=plan.options,
        retry=plan.retry,
        lane=lane,
        held=held,
    )


def _not_undone(node: Node) -> NotUndone:
    record = node.record
    message = f"{record.failure.type}: {record.failure.message}" if record.failure else str(node.outcome)
    return NotUndone(record.seq, record.undoes if record.undoes is not None else -1, record.name, message)
