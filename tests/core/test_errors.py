"""Failures that are also the activity's own exception, and the errors of the package through a pickle."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import dataclass
from datetime import datetime
from types import ModuleType
from typing import Any

import pytest

from orchestrator import errors
from orchestrator.core.records import NotUndone


class CardDeclined(Exception):
    def __init__(self, card: str, *, cents: int) -> None:
        super().__init__(card, cents)
        self.card, self.cents = card, cents


class Gateway:
    class TimedOut(TimeoutError):
        pass


class Fussy(Exception):
    def __new__(cls, one: int, two: int) -> Any:
        return super().__new__(cls, one + two)


class Slotted(Exception):
    __slots__ = ("code",)


class ReadOnly(ValueError):
    @property
    def message(self) -> str:
        return "computed"


@dataclass(frozen=True)
class Frozen(ValueError):
    code: int


@dataclass
class Described(Exception):
    code: int


@dataclass(frozen=True)
class FrozenMessage(ValueError):
    message: str


class Meta(type):
    pass


class WithMeta(ValueError, metaclass=Meta):
    pass


class Final(type):
    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if len(bases) > 1:
            raise TypeError("one base only")
        return super().__new__(cls, name, bases, names)


class WithFinal(ValueError, metaclass=Final):
    pass


class Registering(ValueError):
    def __init_subclass__(cls) -> None:
        raise RuntimeError("no subclasses of mine")


def named(cls: type[BaseException]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def made(error: type[BaseException] | str, *bases: str, kind: type[errors.StepFailed] = errors.StepFailed) -> Any:
    name = error if isinstance(error, str) else named(error)
    if not isinstance(error, str):
        bases = tuple(named(base) for base in error.__mro__[1:-1])
    return errors.in_class_of(kind, name, bases, seq=3, name="charge", outcome="failed", message="no", traceback="tb")


@pytest.mark.parametrize(
    "own",
    [
        CardDeclined,
        Gateway.TimedOut,
        Fussy,
        Slotted,
        Described,
        Frozen,
        WithMeta,
        ValueError,
        KeyError,
        OSError,
        ConnectionResetError,
        StopIteration,
        ImportError,
        SyntaxError,
        UnicodeDecodeError,
        AttributeError,
        errors.OutcomeUnknown,
        errors.NotEncodable,
    ],
)
def test_a_failure_is_an_instance_of_the_activity_s_own_class(own: type[Exception]) -> None:
    failed = made(own)
    assert isinstance(failed, own)
    assert isinstance(failed, errors.StepFailed)
    assert (failed.seq, failed.name, failed.outcome, failed.error_type) == (3, "charge", "failed", named(own))
    assert (failed.message, failed.traceback) == ("no", "tb")
    assert str(failed) == f"step 3 (charge) failed: {named(own)}: no"
    assert failed.args == (str(failed),)
    assert repr(failed)
    # what is recorded of it, should it leave the workflow, names the activity's class
    assert named(type(failed)) == named(own)
    with pytest.raises(own):
        raise failed


@pytest.mark.parametrize("own", [ReadOnly, FrozenMessage, WithFinal, Registering])
def test_a_class_that_cannot_be_joined_gives_way_to_its_builtin_base(own: type[Exception]) -> None:
    failed = made(own)
    assert isinstance(failed, errors.StepFailed)
    assert not isinstance(failed, own)
    assert isinstance(failed, ValueError)
    assert failed.error_type == named(own)


def test_a_class_that_is_not_imported_gives_way_to_its_nearest_builtin_base() -> None:
    failed = made("nowhere.payments.Declined", "nowhere.payments.Base", "builtins.KeyError", "builtins.LookupError")
    assert isinstance(failed, KeyError)
    assert "nowhere" not in sys.modules


def test_nothing_is_imported_because_a_payload_names_it() -> None:
    assert "this" not in sys.modules
    made("this.Zen", "builtins.Exception")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "builtins.SystemExit",
        "builtins.BaseException",
        "builtins.print",
        "os.path",
        "sys.modules",
        f"{__name__}.made.<locals>.Inner",
        "NoModule",
        "",
        "..",
    ],
)
def test_what_is_no_exception_class_is_not_taken_for_one(name: str) -> None:
    assert type(made(name, "builtins.BaseException", "builtins.object")) is errors.StepFailed


def test_a_module_s_own_getattr_is_not_asked() -> None:
    module = ModuleType("tests_core_lazy")
    asked: list[str] = []
    module.__getattr__ = asked.append  # type: ignore[method-assign]
    sys.modules[module.__name__] = module
    try:
        made("tests_core_lazy.Anything")
    finally:
        del sys.modules[module.__name__]
    assert asked == []


def test_a_group_of_exceptions_is_named_but_not_imitated() -> None:
    assert made(ExceptionGroup).error_type == "builtins.ExceptionGroup"


@pytest.mark.parametrize("kind", [errors.StepUnknown, errors.StepTimedOut, errors.StepWithdrawn])
def test_each_kind_keeps_its_kind(kind: type[errors.StepFailed]) -> None:
    assert isinstance(made(CardDeclined, kind=kind), kind)


def test_a_failure_of_a_failure_is_one_failure() -> None:
    assert type(made(errors.StepFailed)) is errors.StepFailed
    assert type(made(errors.WorkflowFailed)) is errors.StepFailed
    assert type(made(type(made(CardDeclined)))).__mro__.count(errors.StepFailed) == 1


def test_the_class_of_a_pair_is_made_once() -> None:
    assert type(made(CardDeclined)) is type(made(CardDeclined))


@pytest.mark.parametrize("kind", [errors.StepFailed, errors.StepUnknown, errors.StepTimedOut, errors.StepWithdrawn])
@pytest.mark.parametrize("own", [CardDeclined, Fussy, OSError])
def test_a_failure_survives_a_pickle_as_its_plain_kind(kind: type[errors.StepFailed], own: type[Exception]) -> None:
    failed = made(own, kind=kind)
    again = pickle.loads(pickle.dumps(failed))
    assert type(again) is kind
    assert vars(again) == vars(failed)
    assert str(again) == str(failed)


def test_a_workflow_s_failure_is_the_original_s_class_too_and_survives_a_pickle() -> None:
    failed = errors.in_class_of(
        errors.WorkflowFailed, named(CardDeclined), (), instance_id="order-1", status="COMPENSATED", message="no"
    )
    assert isinstance(failed, CardDeclined)
    assert str(failed) == f"instance order-1 is COMPENSATED: {named(CardDeclined)}: no"
    assert vars(pickle.loads(pickle.dumps(failed))) == vars(failed)


EVERY: list[errors.OrchestratorError] = [
    errors.ConfigurationError("no store"),
    errors.EagerModeStuck("order-1", "it waits"),
    errors.ResultNotKept("order-1"),
    errors.StoreUnreachable("sqlite://", OSError("gone")),
    errors.NotEncodable("the result", "a set"),
    errors.PayloadTooLarge("the result", 10, 5),
    errors.UnknownTask("shop.charge"),
    errors.UnknownWorkflow("shop.checkout"),
    errors.UnknownInstance("order-1"),
    errors.InstanceEnded("order-1"),
    errors.InstanceExists("order-1", "by another input"),
    errors.InvalidInstanceId(5, "too short"),
    errors.NaiveDatetime("eta", datetime(2024, 5, 1)),  # noqa: DTZ001
    errors.InputMismatch("checkout", "no order"),
    errors.InvalidOperation("step 3 has settled"),
    errors.ReplaceRefused("shop.charge"),
    errors.ContextMisused("no"),
    errors.SentInsideWorkflow("shop.mail"),
    errors.StepUndone(3, "charge"),
    errors.CompensationFailed((NotUndone(4, 3, "refund", "bank closed"),)),
    errors.ReceiveTimedOut("paid", 60.0),
    errors.MessageMismatch("paid", "no"),
    errors.ResultMismatch("no"),
    errors.OutcomeUnknown("timeout"),
    errors.TransactionEnded("shop.charge"),
    errors.SecondWriter("sqlite:///shop.db"),
    errors.ResultNeeded("refund", "charge_id", 3),
    errors.WorkflowUndone(),
]


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_every_error_survives_a_pickle_and_a_copy(error: errors.OrchestratorError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert vars(again) == vars(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.WorkflowCancelled(), "cancelled"),
        (errors.WorkflowCancelled("out of stock"), "out of stock"),
        (errors.WorkflowCancelled(is_deadline=True), "its deadline has passed"),
    ],
)
def test_a_cancellation_says_why_and_is_no_exception(error: errors.WorkflowCancelled, text: str) -> None:
    assert str(error) == text
    assert not isinstance(error, Exception)


def test_every_error_is_public_and_tried_here() -> None:
    tried = {type(error).__name__ for error in EVERY}
    tried |= {"OrchestratorError", "InvalidInput", "WorkflowFailed", "WorkflowCancelled"}
    tried |= {"StepFailed", "StepTimedOut", "StepUnknown", "StepWithdrawn"}
    assert tried == set(errors.__all__)
