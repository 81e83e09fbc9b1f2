"""With all its rules the protocol holds; without any one of them the model finds how it breaks."""

from __future__ import annotations

import pytest

from . import children, mailbox
from .children import Family
from .exploring import explore
from .mailbox import Mailbox


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_the_mailbox_holds_with_all_rules(is_cancelled: bool) -> None:
    finding = explore(Mailbox(frozenset(mailbox.RULES), is_cancelled=is_cancelled))
    assert not finding.what, finding
    assert finding.states > 50


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("poller", "no end"),
        ("locked", "TWICE"),
        ("matched_late", "LOST"),
        ("own_withdrawn", "DUE"),
    ],
)
def test_the_mailbox_breaks_without(rule: str, what: str) -> None:
    finding = explore(Mailbox(frozenset(mailbox.RULES) - {rule}))
    assert finding.what.startswith(what), finding
    assert finding.schedule


def test_a_family_holds_with_all_rules() -> None:
    finding = explore(Family(frozenset(children.RULES), is_purged=True))
    assert not finding.what, finding
    assert finding.states > 50


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("same_transaction", "no end"),
        ("start_repeated", "no end"),
        ("one_life", "LEAK"),
        ("mail", "no end"),
        ("drained", "no end"),
    ],
)
def test_a_family_breaks_without(rule: str, what: str) -> None:
    finding = explore(Family(frozenset(children.RULES) - {rule}))
    assert finding.what.startswith(what), finding
    assert finding.schedule


def test_a_child_that_was_purged_too_early_cannot_be_undone() -> None:
    rules = frozenset(children.RULES) - {"kept"}
    statuses = _ends(Family(rules, is_purged=True))
    assert "COMPENSATION_FAILED" in statuses
    assert "COMPENSATION_FAILED" not in _ends(Family(frozenset(children.RULES), is_purged=True))


def _ends(family: Family) -> set[str]:
    """Return how a parent can end without any fault."""
    seen, todo = {family.begin()._replace(faults=0)}, [family.begin()._replace(faults=0)]
    while todo:
        for _, _, after in family.steps(todo.pop()):
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return {state.parent for state in seen}
