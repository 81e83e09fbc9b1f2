from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator.core.retry import COMPENSATION_RETRY, RetryPolicy


class CardDeclined(ValueError):
    pass


def delays(policy: RetryPolicy, attempts: int, chance: float = 0.0) -> list[float]:
    return [round(policy.interval_seconds(attempt, chance), 6) for attempt in range(1, attempts + 1)]


def test_waits_grow_by_backoff_up_to_the_longest() -> None:
    policy = RetryPolicy(initial_interval=timedelta(seconds=2), backoff=3, max_interval=timedelta(seconds=30))
    assert delays(policy, 5) == [2, 6, 18, 30, 30]


def test_a_backoff_of_one_keeps_the_waits_equal() -> None:
    assert delays(RetryPolicy(backoff=1), 3) == [1, 1, 1]


def test_a_first_wait_over_the_longest_is_cut() -> None:
    assert delays(RetryPolicy(initial_interval=timedelta(hours=2)), 2) == [3600, 3600]


@pytest.mark.parametrize("field", ["initial_interval", "max_interval"])
def test_an_interval_of_nothing_retries_at_once(field: str) -> None:
    settings: dict[str, Any] = {field: timedelta(0)}
    assert delays(RetryPolicy(**settings), 3) == [0, 0, 0]


def test_a_step_that_never_gives_up_does_not_overflow() -> None:
    assert RetryPolicy().interval_seconds(1_000_000, 0.0) == 3600


def test_jitter_takes_a_share_of_the_wait_away() -> None:
    assert delays(RetryPolicy(jitter=0.5, backoff=1), 1, chance=0.5) == [0.75]
    assert delays(RetryPolicy(jitter=0, backoff=1), 1, chance=0.9) == [1]


def test_it_stops_after_max_attempts() -> None:
    policy = RetryPolicy(max_attempts=2, jitter=0)
    assert [policy.delay_after(attempts, 0, (), 0) for attempts in (1, 2, 3)] == [1, None, None]


def test_it_stops_when_the_next_attempt_would_begin_after_max_duration() -> None:
    policy = RetryPolicy(max_duration=timedelta(seconds=10), initial_interval=timedelta(seconds=4), jitter=0)
    assert [policy.delay_after(1, elapsed, (), 0) for elapsed in (0, 6, 6.1)] == [4, 4, None]


@pytest.mark.parametrize("entry", [CardDeclined, "CardDeclined", f"{__name__}.CardDeclined", ValueError, "ValueError"])
def test_it_stops_at_once_for_a_named_class_or_one_of_its_bases(entry: Any) -> None:
    types = (f"{__name__}.CardDeclined", "builtins.ValueError", "builtins.Exception")
    assert RetryPolicy(stop_on=(entry,)).delay_after(1, 0, types, 0) is None


@pytest.mark.parametrize("entry", ["Declined", "other.CardDeclined", KeyError])
def test_it_goes_on_for_any_other_class(entry: Any) -> None:
    types = (f"{__name__}.CardDeclined", "builtins.ValueError")
    assert RetryPolicy(stop_on=(entry,)).delay_after(1, 0, types, 0) is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"max_attempts": 0},
        {"backoff": 0.5},
        {"backoff": float("nan")},
        {"backoff": float("inf")},
        {"jitter": 1.5},
        {"jitter": -0.1},
        {"initial_interval": timedelta(seconds=-1)},
        {"max_interval": timedelta(seconds=-1)},
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        RetryPolicy(**settings)


def test_policies_are_values() -> None:
    assert RetryPolicy(stop_on=(CardDeclined,)) == RetryPolicy(stop_on=(f"{__name__}.CardDeclined",))


def test_a_compensation_goes_on_for_three_days_at_most_an_hour_apart() -> None:
    day = 86_400.0
    assert COMPENSATION_RETRY.delay_after(5_000, 2.9 * day, (), 0) == 3600
    assert COMPENSATION_RETRY.delay_after(5_000, 3 * day, (), 0) is None
