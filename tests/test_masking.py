"""What is shown of arguments and results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.runtime.masking import Masks
from orchestrator.runtime.settings import Settings


def charge(card: str, cents: int, note: str = "") -> str:
    return f"{card}{cents}{note}"


def checkout(ctx: object, order: dict[str, Any]) -> None:
    pass


TASKS = {"charge": SimpleNamespace(run=charge), "checkout": SimpleNamespace(is_workflow=True, function=checkout)}


def masks(**mask: list[str]) -> Masks:
    return Masks({name.replace("every", "*"): tuple(paths) for name, paths in mask.items()}, TASKS.get)


def test_a_parameter_is_hidden_however_it_is_passed() -> None:
    hidden = masks(charge=["card"])
    assert hidden.arguments("charge", ["4000", 12], {}) == (["***", 12], {})
    assert hidden.arguments("charge", [], {"card": "4000", "cents": 12}) == ([], {"card": "***", "cents": 12})
    assert hidden.arguments("other", ["4000"], {"card": "4000"}) == (["4000"], {"card": "4000"})


def test_the_context_of_a_workflow_is_no_argument() -> None:
    assert masks(checkout=["order"]).arguments("checkout", [{"id": 1}], {}) == (["***"], {})


def test_a_path_goes_into_mappings_and_lists() -> None:
    hidden = masks(checkout=["order.cards.number", "order.missing.path"])
    order = {"id": 1, "cards": [{"number": "4000", "year": 30}, {"number": "5000"}]}
    shown, _ = hidden.arguments("checkout", [order], {})
    assert shown == [{"id": 1, "cards": [{"number": "***", "year": 30}, {"number": "***"}]}]
    assert order["cards"][0] == {"number": "4000", "year": 30}  # type: ignore[index]


def test_a_mask_of_every_task_hides_by_name() -> None:
    hidden = masks(every=["password"])
    assert hidden.arguments("unknown", [1], {"password": "x"}) == ([1], {"password": "***"})


def test_all_positional_arguments_of_a_task_that_is_not_registered_are_hidden() -> None:
    assert masks(elsewhere=["card"]).arguments("elsewhere", ["4000", 12], {"cents": 1}) == (
        ["***", "***"],
        {"cents": 1},
    )


def test_what_a_task_returns_is_hidden_by_its_own_word() -> None:
    assert masks(charge=["return"]).result("charge", "token") == "***"
    assert masks(charge=["return"]).result("charge", None) is None
    assert masks(charge=["card"]).result("charge", "token") == "token"


def test_what_a_compensation_is_told_of_its_step_is_hidden_as_the_step_is() -> None:
    undone = {
        "name": "charge",
        "call": {"args": ["4000", 12], "kwargs": {"note": "x"}},
        "result": "token",
        "outcome": "succeeded",
        "late_outcome": None,
        "idempotency_key": "k",
    }
    shown, _ = masks(charge=["card", "return", "note"]).arguments("refund", [undone], {})
    assert shown == [{**undone, "call": {"args": ["***", 12], "kwargs": {"note": "***"}}, "result": "***"}]


def test_a_slip_is_found() -> None:
    assert masks(charge=["card", "return"], every=["password"]).list_slips() == []
    assert masks(charge=["cardd.number"]).list_slips() == [
        "orchestrator_mask names cardd of charge, which has no such parameter"
    ]
    assert masks(chargee=["card"]).list_slips() == ["orchestrator_mask names chargee, which is no task of this app"]


def test_messages_tell_of_their_arguments_only_where_something_is_hidden() -> None:
    hidden = masks(charge=["card"])
    assert hidden.representations("charge", ["4000", 12], {}) == {"argsrepr": "('***', 12)", "kwargsrepr": "{}"}
    assert hidden.representations("other", ["4000"], {}) == {}


@pytest.mark.parametrize("mask", [{"charge": "card"}, ["card"], {"charge": [1]}])
def test_a_mask_of_another_shape_is_refused(mask: object) -> None:
    with pytest.raises(Exception, match="orchestrator_mask"):
        Settings.read({"orchestrator_mask": mask}, {})
