"""What the end of an attempt means for its step."""

from __future__ import annotations

from datetime import timedelta

import pytest

from orchestrator.core.attempts import (
    AttemptDoubtful,
    AttemptFailed,
    AttemptLost,
    AttemptSucceeded,
    Ended,
    Standing,
    Verdict,
    judge,
    late_outcome,
)
from orchestrator.core.records import Failure, Outcome
from orchestrator.core.retry import RetryPolicy

FAILURE = Failure("builtins.ValueError", ("builtins.Exception",), "no")
TWICE = RetryPolicy(max_attempts=2, initial_interval=timedelta(seconds=8), jitter=0)


def standing(
    failures: int = 0,
    lost: int = 0,
    *,
    in_doubt: bool = False,
    draining: bool = False,
    retry: RetryPolicy | None = None,
) -> Standing:
    return Standing(failures, lost, in_doubt, draining, retry, elapsed_seconds=0)


def follows(before: Standing, ended: Ended, max_lost: int = 3) -> Verdict:
    return judge(before, ended, max_lost=max_lost, chance=0)


def test_success_settles_whatever_was_lost_before() -> None:
    verdict = follows(standing(lost=2, in_doubt=True), AttemptSucceeded('"r"'))
    assert (verdict.outcome, verdict.result, verdict.failure) == (Outcome.SUCCEEDED, '"r"', None)


def test_a_failure_without_a_policy_settles() -> None:
    assert follows(standing(), AttemptFailed(FAILURE)) == Verdict(1, 0, False, Outcome.FAILED, None, FAILURE)


def test_a_failure_is_retried_as_the_policy_has_it() -> None:
    verdict = follows(standing(retry=TWICE), AttemptFailed(FAILURE))
    assert (verdict.outcome, verdict.failures) == (None, 1)
    assert verdict.delay_seconds == pytest.approx(8)
    assert follows(standing(1, retry=TWICE), AttemptFailed(FAILURE)).outcome is Outcome.FAILED


def test_lost_attempts_do_not_use_up_the_policy_s_attempts() -> None:
    assert follows(standing(0, 2, in_doubt=True, retry=TWICE), AttemptFailed(FAILURE)).outcome is None


def test_a_lost_attempt_is_followed_at_once_by_another_max_lost_times() -> None:
    verdict = follows(standing(lost=2), AttemptLost(FAILURE))
    assert (verdict.outcome, verdict.delay_seconds, verdict.lost, verdict.is_in_doubt) == (None, 0, 3, True)
    assert follows(standing(lost=3), AttemptLost(FAILURE)).outcome is Outcome.UNKNOWN


def test_a_failure_after_a_lost_attempt_is_unknown() -> None:
    assert follows(standing(lost=1, in_doubt=True), AttemptFailed(FAILURE)).outcome is Outcome.UNKNOWN


def test_a_doubtful_attempt_may_be_retried_but_taints_the_step() -> None:
    verdict = follows(standing(retry=TWICE), AttemptDoubtful(FAILURE))
    assert (verdict.outcome, verdict.is_in_doubt) == (None, True)
    assert follows(standing(1, in_doubt=True, retry=TWICE), AttemptFailed(FAILURE)).outcome is Outcome.UNKNOWN


def test_a_result_that_cannot_be_recorded_is_not_tried_again() -> None:
    assert follows(standing(retry=TWICE), AttemptDoubtful(FAILURE, is_final=True)).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        (AttemptLost(FAILURE), Outcome.UNKNOWN),
        (AttemptDoubtful(FAILURE), Outcome.UNKNOWN),
        (AttemptFailed(FAILURE), Outcome.FAILED),
    ],
)
def test_nothing_is_tried_again_while_its_scope_drains(ended: Ended, outcome: Outcome) -> None:
    assert follows(standing(draining=True, retry=TWICE), ended).outcome is outcome


@pytest.mark.parametrize(
    ("ended", "in_doubt", "late"),
    [
        (AttemptSucceeded("1"), True, Outcome.SUCCEEDED),
        (AttemptFailed(FAILURE), False, Outcome.FAILED),
        (AttemptFailed(FAILURE), True, Outcome.UNKNOWN),
        (AttemptDoubtful(FAILURE), False, Outcome.UNKNOWN),
        (AttemptLost(FAILURE), False, Outcome.UNKNOWN),
    ],
)
def test_an_attempt_that_outlived_its_timeout_tells_what_it_did(ended: Ended, in_doubt: bool, late: Outcome) -> None:
    assert late_outcome(standing(in_doubt=in_doubt), ended) is late
