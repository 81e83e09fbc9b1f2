"""With all its rules the protocol holds; without any one of them the model finds how it breaks."""

from __future__ import annotations

import pytest

from . import children, counted, handoff, mailbox, unflushed, unlocked
from .children import Family
from .counted import Counted
from .exploring import explore
from .handoff import Handoff
from .mailbox import Mailbox
from .unflushed import WITHOUT_PAUSE, Unflushed
from .unlocked import Unlocked


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


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("poison", ["", "b", "pass"])
def test_the_hand_off_holds_with_all_rules(poison: str, begins: bool) -> None:
    finding = explore(Handoff(frozenset(handoff.RULES), poison=poison, begins=begins))
    assert not finding.what, finding
    assert finding.states > (100 if begins and poison == "pass" else 5000)


@pytest.mark.parametrize(
    ("rule", "what", "poison"),
    [
        ("announced_first", "TWICE", ""),
        ("both_announced", "TWICE", ""),
        ("claims_first", "TWICE", ""),
        ("reconciled", "no end", ""),
        ("let_go", "no end", ""),
        ("fenced", "TWICE", ""),
        ("beat_first", "TWICE", ""),
        ("same_life", "TWICE", ""),
        ("orphaned", "no end", ""),
        ("alone", "POISON", "pass"),
        ("counted", "POISON", "b"),
        ("asked", "ENDLESS", ""),
    ],
)
def test_the_hand_off_breaks_without(rule: str, what: str, poison: str) -> None:
    finding = explore(Handoff(frozenset(handoff.RULES) - {rule}, poison=poison))
    assert finding.what.startswith(what), finding
    assert finding.schedule


@pytest.mark.parametrize(("rule", "what"), [("announced_first", "TWICE"), ("let_go", "no end"), ("same_life", "TWICE")])
def test_the_first_pass_hands_nothing_over_without(rule: str, what: str) -> None:
    finding = explore(Handoff(frozenset(handoff.RULES) - {rule}, begins=True))
    assert finding.what.startswith(what), finding


def test_a_claim_that_an_incarnation_makes_which_was_given_up_does_no_harm() -> None:
    finding = explore(Handoff(frozenset(handoff.RULES), checks_incarnation=False))
    assert not finding.what, finding


def test_what_was_handed_over_when_the_end_is_asked_for_may_as_well_be_run() -> None:
    finding = explore(Handoff(frozenset(handoff.RULES), releases=False))
    assert not finding.what, finding


def test_a_claim_that_is_not_flushed_holds_with_all_rules() -> None:
    finding = explore(Unflushed(frozenset(unflushed.RULES)))
    assert not finding.what, finding
    assert finding.states > 5000


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("settled_flushed", "RESULT"),
        ("token", "FENCE"),
        ("doubt", "LEAK"),
        ("put_back", "ALIVE"),
        ("paused_claims", "ALIVE"),
        ("paused_passes", "DRAIN"),
        ("recognised", "RESULT"),
        ("lives", "RESULT"),
    ],
)
def test_a_claim_that_is_not_flushed_breaks_without(rule: str, what: str) -> None:
    finding = explore(Unflushed(frozenset(unflushed.RULES) - {rule}))
    assert finding.what.startswith(what), finding
    assert finding.schedule


def test_a_claim_that_is_flushed_needs_none_of_that() -> None:
    finding = explore(Unflushed(frozenset({"settled_flushed"}), is_flushed=True))
    assert not finding.what, finding


def test_a_crash_alone_makes_a_withdrawal_forget_an_effect() -> None:
    finding = explore(Unflushed(WITHOUT_PAUSE - {"doubt"}, checks=frozenset({"LEAK"}), losses=0))
    assert finding.what.startswith("LEAK"), finding


def test_without_a_pause_a_crash_alone_leaves_no_effect_unnamed() -> None:
    finding = explore(Unflushed(WITHOUT_PAUSE, checks=frozenset({"LEAK", "FENCE"}), losses=0))
    assert not finding.what, finding


@pytest.mark.parametrize(("what", "losses"), [("ALIVE", 0), ("DRAIN", 0), ("RESULT", 0), ("LEAK", 1)])
def test_without_a_pause_attempts_run_side_by_side_and_a_second_fault_leaves_an_effect(what: str, losses: int) -> None:
    finding = explore(Unflushed(WITHOUT_PAUSE, checks=frozenset({what}), losses=losses))
    assert finding.what.startswith(what), finding


def test_a_settlement_that_locks_late_holds_with_all_rules() -> None:
    finding = explore(Unlocked(frozenset(unlocked.RULES)))
    assert not finding.what, finding
    assert finding.states > 50


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("compared", "STALE"),
        ("raised", "STALE"),
        ("instance_first", "STALE"),
        ("made_again", "LOST"),
    ],
)
def test_a_settlement_that_locks_late_breaks_without(rule: str, what: str) -> None:
    finding = explore(Unlocked(frozenset(unlocked.RULES) - {rule}))
    assert finding.what.startswith(what), finding
    assert finding.schedule


def test_a_settlement_that_locks_late_and_compares_nothing_loses_a_completion() -> None:
    finding = explore(Unlocked(frozenset(unlocked.RULES) - {"compared"}, is_cancelled=False))
    assert finding.what.startswith("LOST"), finding


def test_a_settlement_that_only_counts_holds_with_all_rules() -> None:
    finding = explore(Counted(frozenset(counted.RULES)))
    assert not finding.what, finding
    assert finding.states > 500


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("above_zero", "LOST"),
        ("same_wait", "EARLY"),
        ("same_attempt", "EARLY"),
        ("whole", "EARLY"),
    ],
)
def test_a_settlement_that_only_counts_breaks_without(rule: str, what: str) -> None:
    finding = explore(Counted(frozenset(counted.RULES) - {rule}))
    assert finding.what.startswith(what), finding
    assert finding.schedule
