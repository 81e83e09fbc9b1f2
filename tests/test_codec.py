from __future__ import annotations

import functools
import gc
import ipaddress
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, NewType, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.utils import json as kombu_json
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, HttpUrl, RootModel, SecretStr, computed_field

from orchestrator import codec, errors
from orchestrator.core.records import Compensation, Failure, Kind, Outcome, Record
from orchestrator.core.retry import COMPENSATION_RETRY, RetryPolicy
from orchestrator.core.saga import compensation_arguments

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]

T = TypeVar("T")
kombu_dumps: Callable[[object], str] = kombu_json.dumps
kombu_loads: Callable[[str], Any] = kombu_json.loads
repeatable = settings(derandomize=True, deadline=None, max_examples=60)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(Enum):
    SMALL = 1
    LARGE = 2


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


class Access(Flag):
    READ = 1
    WRITE = 2


class Shape(Enum):
    SQUARE = (1, 1)


class Point(NamedTuple):
    x: int
    at: datetime


@dataclass(frozen=True)
class Parcel:
    weight: float
    label: bytes
    tags: frozenset[str] = frozenset()


@dataclass(slots=True)
class Truck:
    parcels: list[Parcel]
    driver: UUID | None = None
    doubled: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.doubled = 2 * len(self.parcels)


class Line(BaseModel):
    model_config = ConfigDict(frozen=True)

    sku: str
    quantity: int = Field(alias="qty")
    price: Decimal
    seen: datetime


class Order(BaseModel):
    id: UUID
    lines: list[Line]
    colour: Colour
    wait: timedelta
    blob: bytes
    point: Point
    parcel: Parcel | None = None
    tags: set[str] = set()
    by_day: dict[date, int] = {}
    by_id: dict[UUID, list[Mood]] = {}
    by_number: dict[int, tuple[int, ...]] = {}


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    pair: tuple[int, str]
    colours: frozenset[Colour]
    parcel: Parcel


class Card(BaseModel):
    number: str


class Transfer(BaseModel):
    iban: str
    due: date


class Box(BaseModel, Generic[T]):
    content: T


class Tree(BaseModel):
    children: list[Tree] = []


class Web(BaseModel):
    url: HttpUrl
    address: ipaddress.IPv4Address
    path: PurePosixPath


class Secretive(BaseModel):
    secret: SecretStr


ORDER = Order(
    id=uuid4(),
    lines=[],
    colour=Colour.RED,
    wait=timedelta(seconds=-1.5),
    blob=b"\xff",
    point=Point(1, datetime.now(UTC)),
)


def same(left: object, right: object) -> bool:
    """Equal, and of the same types all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float) and isinstance(right, float):
        return repr(left) == repr(right)
    if isinstance(left, BaseModel) and isinstance(right, BaseModel):
        return same(dict(left), dict(right))
    if is_dataclass(left) and is_dataclass(right):
        return all(same(getattr(left, one.name), getattr(right, one.name)) for one in fields(left))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        pairs = zip(left.items(), right.items(), strict=False)
        return len(left) == len(right) and all(same(one, other) for one, other in pairs)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=False))
    return left == right


def returned(value: object, annotation: object) -> Any:
    return codec.decode(codec.encode(value, "it"), annotation)


# --- round trips --------------------------------------------------------------------------------------------------

texts = st.text(max_size=8)
floats = st.floats(allow_nan=True, allow_infinity=True)
naive = st.datetimes()
aware = st.datetimes(timezones=st.timezones()).map(lambda at: at.astimezone(UTC))
decimals = st.decimals(allow_nan=False, allow_infinity=False)
parcels = st.builds(Parcel, weight=st.floats(allow_nan=False), label=st.binary(), tags=st.frozensets(texts, max_size=3))
trucks = st.builds(Truck, parcels=st.lists(parcels, max_size=2), driver=st.none() | st.uuids())
lines = st.builds(Line, sku=texts, qty=st.integers(), price=decimals, seen=aware | naive)
points = st.builds(Point, x=st.integers(), at=naive)
orders = st.builds(
    Order,
    id=st.uuids(),
    lines=st.lists(lines, max_size=2),
    colour=st.sampled_from(Colour),
    wait=st.timedeltas(),
    blob=st.binary(),
    point=points,
    parcel=st.none() | parcels,
    tags=st.sets(texts, max_size=3),
    by_day=st.dictionaries(st.dates(), st.integers(), max_size=2),
    by_id=st.dictionaries(st.uuids(), st.lists(st.sampled_from(Mood), max_size=2), max_size=2),
    by_number=st.dictionaries(st.integers(), st.tuples(st.integers(), st.integers()), max_size=2),
)
stricts = st.builds(
    Strict,
    pair=st.tuples(st.integers(), texts),
    colours=st.frozensets(st.sampled_from(Colour)),
    parcel=parcels,
)
cards, transfers = st.builds(Card, number=texts), st.builds(Transfer, iban=texts, due=st.dates())

TYPES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (float, floats),
    (str, st.text()),
    (bytes, st.binary()),
    (datetime, naive),
    (datetime, aware),
    (date, st.dates()),
    (time, st.times()),
    (timedelta, st.timedeltas()),
    (UUID, st.uuids()),
    (Decimal, decimals),
    (Decimal, st.decimals().filter(lambda number: not number.is_nan())),
    (date | datetime, st.dates() | naive),
    (str | datetime | UUID | bytes | Decimal, texts | naive | st.uuids() | st.binary() | decimals),
    (Colour, st.sampled_from(Colour)),
    (Size, st.sampled_from(Size)),
    (Level, st.sampled_from(Level)),
    (Mood, st.sampled_from(Mood)),
    (Access, st.sampled_from([Access.READ, Access.WRITE, Access.READ | Access.WRITE])),
    (Point, points),
    (tuple[int, str, timedelta], st.tuples(st.integers(), texts, st.timedeltas())),
    (set[int], st.sets(st.integers())),
    (set[UUID | None], st.sets(st.none() | st.uuids())),
    (frozenset[tuple[int, Colour]], st.frozensets(st.tuples(st.integers(), st.sampled_from(Colour)))),
    (set[frozenset[int]], st.sets(st.frozensets(st.integers(), max_size=3), max_size=4)),
    (dict[int, timedelta], st.dictionaries(st.integers(), st.timedeltas(), max_size=3)),
    (dict[float, int], st.dictionaries(st.floats(allow_nan=False), st.integers(), max_size=3)),
    (dict[bool, int], st.dictionaries(st.booleans(), st.integers())),
    (dict[UUID, Line], st.dictionaries(st.uuids(), lines, max_size=2)),
    (dict[date, bytes], st.dictionaries(st.dates(), st.binary(), max_size=2)),
    (dict[datetime, int], st.dictionaries(naive | aware, st.integers(), max_size=2)),
    (dict[Decimal, int], st.dictionaries(decimals, st.integers(), max_size=2)),
    (dict[timedelta, int], st.dictionaries(st.timedeltas(), st.integers(), max_size=2)),
    (dict[Mood, int], st.dictionaries(st.sampled_from(Mood), st.integers())),
    (dict[Colour, int], st.dictionaries(st.sampled_from(Colour), st.integers())),
    (dict[Level, int], st.dictionaries(st.sampled_from(Level), st.integers())),
    (Parcel, parcels),
    (Truck, trucks),
    (Order, orders),
    (Strict, stricts),
    (Order | None, st.none() | orders),
    (list[Order | Parcel | int], st.lists(orders | parcels | st.integers(), max_size=2)),
    (Card | Transfer, cards | transfers),
    (dict[str, list[Card | Transfer]], st.dictionaries(texts, st.lists(cards | transfers, max_size=2), max_size=2)),
    (set[Line], st.sets(lines, max_size=3)),
    (Box[set[int]], st.builds(Box[set[int]], content=st.sets(st.integers(), max_size=3))),
    (RootModel[tuple[int, ...]], st.builds(RootModel[tuple[int, ...]], st.tuples(st.integers()))),
]


@pytest.mark.parametrize(("annotation", "values"), TYPES, ids=[str(annotation) for annotation, _ in TYPES])
def test_a_value_comes_back_as_it_went_in(annotation: object, values: st.SearchStrategy[Any]) -> None:
    @repeatable
    @given(values)
    def check(value: Any) -> None:
        text = codec.encode(value, "it")
        assert text.isascii()
        assert same(codec.decode(text, annotation), value)
        assert same(codec.decode_leniently(text, annotation), value)

    check()


@pytest.mark.parametrize(
    "duration",
    [timedelta.min, timedelta.max, timedelta.resolution, -timedelta.resolution, timedelta(0), timedelta(days=-1)],
)
def test_the_longest_and_the_shortest_durations_are_exact(duration: timedelta) -> None:
    assert returned(duration, timedelta) == duration


def test_a_decimal_that_is_no_number_comes_back() -> None:
    assert returned([Decimal("NaN"), Decimal("-Infinity")], list[Decimal])[0].is_nan()


class Basket(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prices: list[int]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        return sum(self.prices)


def test_computed_fields_are_computed_again_not_recorded() -> None:
    assert returned(Basket(prices=[1, 2]), Basket) == Basket(prices=[1, 2])


def test_urls_addresses_and_paths_come_back() -> None:
    web = Web(url=HttpUrl("https://shop.example/a?b=c"), address=ipaddress.IPv4Address("10.0.0.1"), path="/a/b")  # type: ignore[arg-type]
    assert returned(web, Web) == web


def test_recursive_models_come_back() -> None:
    tree = Tree(children=[Tree(), Tree(children=[Tree()])])
    assert returned(tree, Tree) == tree


def test_a_model_is_read_by_alias_too() -> None:
    line = codec.decode('{"sku":"a","qty":2,"price":1,"seen":"2024-01-01"}', Line)
    assert line == Line(sku="a", qty=2, price=Decimal(1), seen=datetime(2024, 1, 1))  # noqa: DTZ001


def test_half_a_surrogate_pair_is_kept() -> None:
    assert returned("\ud800", str) == "\ud800"


def test_an_iterable_comes_back_as_a_list_that_can_be_read_twice() -> None:
    cards = [Card(number="1"), Card(number="2")]
    assert returned(cards, Iterable[Card]) == cards
    assert returned(cards, Iterable[Card] | None) == cards
    assert returned([1, 2], Iterable) == [1, 2]


class Narrow(BaseModel):
    x: int


class Wide(BaseModel):
    x: int
    y: int = 0


def test_equal_unions_in_another_order_are_told_apart() -> None:
    assert type(codec.decode('{"x":1}', Narrow | Wide)) is Narrow
    assert type(codec.decode('{"x":1}', Wide | Narrow)) is Wide
    assert type(codec.decode('{"x":1}', Narrow | Wide)) is Narrow


def test_metadata_that_cannot_be_hashed_is_no_obstacle() -> None:
    assert codec.decode("5", Annotated[int, []]) == 5


# --- what Celery would have sent ----------------------------------------------------------------------------------

celery_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | floats.filter(lambda number: number == number)
    | st.text(max_size=5)
    | naive
    | aware
    | st.dates()
    | st.times()
    | st.uuids()
    | decimals
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@repeatable
@given(celery_values)
def test_code_without_annotations_receives_what_celery_would_give_it(value: Any) -> None:
    text = codec.encode(value, "it")
    assert json.loads(text) == json.loads(kombu_dumps(value))
    assert same(kombu_loads(text), codec.decode(text))


@repeatable
@given(orders)
def test_without_an_annotation_a_model_is_what_kombu_makes_of_it(order: Order) -> None:
    text = codec.encode(order, "it")
    assert same(kombu_loads(text), codec.decode(text))
    assert codec.decode(text)["id"] == order.id
    assert codec.decode(text, Any) == codec.decode(text, object) == codec.decode(text)


def test_a_type_with_a_json_method_is_encoded_as_celery_does() -> None:
    class Price:
        def __json__(self) -> dict[str, object]:
            return {"cents": 5, "at": date(2024, 1, 2)}

    assert kombu_loads(codec.encode([Price()], "it")) == [{"cents": 5, "at": date(2024, 1, 2)}]


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents


def test_a_type_registered_with_kombu_comes_back_with_and_without_annotation() -> None:
    kombu_json.register_type(Money, "test_codec.Money", lambda money: money.cents, Money)
    text = codec.encode({"price": Money(5)}, "it")
    for annotation in (None, dict[str, Money]):
        assert codec.decode(text, annotation)["price"].cents == 5
    with pytest.raises(errors.ResultMismatch, match="price: Input should be an instance of Money"):
        codec.decode('{"price":5}', dict[str, Money])


def test_sets_are_written_alike_in_every_process() -> None:
    program = (
        "from orchestrator import codec; from uuid import UUID;"
        "print(codec.encode([{'b', 'a', 'c'}, {10, 9}, {1, 'x', None}, {frozenset('pq'), frozenset('rs')},"
        "{UUID(int=n) for n in range(5)}], 'it'))"
    )
    written = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(written) == 1
    assert json.loads(written.pop())[:2] == [["a", "b", "c"], [9, 10]]


# --- what is refused ----------------------------------------------------------------------------------------------


def refusal(value: object) -> str:
    with pytest.raises(errors.NotEncodable) as caught:
        codec.encode(value, "the result of shop.ship")
    assert str(caught.value) == f"the result of shop.ship cannot be encoded: {caught.value.reason}"
    return caught.value.reason


def test_a_value_without_json_form_is_named_with_its_place() -> None:
    assert refusal(object()) == "builtins.object has no JSON form"
    assert refusal({"a": [1, {"b": ValueError()}]}) == "builtins.ValueError has no JSON form, at ['a'][1]['b']"
    assert refusal([Box[Any](content={1: lambda: 0})]) == "builtins.function has no JSON form, at [0]['content'][1]"


def test_a_class_is_no_value() -> None:
    assert refusal(Parcel) == "builtins.type has no JSON form"
    assert refusal(Card).endswith("has no JSON form")


def test_a_secret_is_refused_rather_than_masked() -> None:
    assert refusal(Secretive(secret=SecretStr("x"))) == "pydantic.types.SecretStr has no JSON form, at ['secret']"


@pytest.mark.parametrize("key", [(1, 2), Line(sku="a", qty=1, price=Decimal(1), seen=datetime.now(UTC)), b"x"])
def test_a_key_that_has_no_text_is_refused(key: object) -> None:
    assert refusal({key: 1}).startswith(f"a key of type {type(key).__name__} cannot be found again by its text, at [")


def test_a_key_that_its_text_does_not_lead_back_to_is_refused() -> None:
    assert refusal({Size.SMALL: 1}).startswith("a key of type Size cannot be found again by its text")


def test_a_member_whose_value_does_not_come_back_is_refused() -> None:
    assert refusal([Shape.SQUARE]) == "Shape.SQUARE cannot be found again by its value (1, 1), at [0]"


@pytest.mark.parametrize("inside", [False, True])
def test_a_dict_that_would_be_read_as_something_else_is_refused(inside: bool) -> None:
    taken = {"__type__": "datetime", "__value__": "2024-01-01"}
    reason = refusal([datetime.now(UTC), Box[Any](content=taken)] if inside else taken)
    assert reason.startswith("a dict of exactly the keys '__type__' and '__value__' would be read as something else")
    with pytest.raises(errors.NotEncodable):
        codec.encode_arguments((), taken, "it")


@pytest.mark.parametrize(
    "value", [{"__type__": "datetime"}, {"__type__": 1, "__value__": 2, "x": 3}, {'a"__type__': '"__type__":'}]
)
def test_dicts_that_only_resemble_it_are_kept(value: object) -> None:
    assert returned(value, None) == kombu_loads(codec.encode(value, "it")) == value


def test_what_contains_itself_is_refused() -> None:
    items: list[object] = []
    items.append({"again": items})
    assert refusal(items) == "it contains itself, or is nested too deeply"
    tree = Tree()
    tree.children.append(tree)
    assert "Circular reference" in refusal(tree)


def test_an_integer_too_long_to_be_read_back_is_refused() -> None:
    assert "4300 digits" in refusal(10**5000)


def test_a_payload_over_the_limit_is_refused_with_its_size() -> None:
    assert codec.encode("x" * 8, "it", 10) == '"xxxxxxxx"'
    with pytest.raises(errors.PayloadTooLarge, match="the arguments takes 11 bytes encoded") as caught:
        codec.encode("x" * 9, "the arguments", 10)
    assert (caught.value.size_bytes, caught.value.limit_bytes) == (11, 10)
    with pytest.raises(errors.PayloadTooLarge):
        codec.encode("€", "it", 7)


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "annotation", "message"),
    [
        ('"x"', int, "the recorded value does not fit int: Input should be a valid integer, unable to parse string"),
        ('[{"number":1}]', list[Card], r"does not fit list\[.*Card\]: 0.number: Input should be a valid string"),
        ("[1,2,3,4]", list[str], "2: Input should be a valid string; and 1 more"),
        ("1", type(None), "does not fit NoneType: Input should be None"),
        ("1", "Missing", "does not fit 'Missing': "),
        ("{", None, "a recorded value cannot be decoded: Expecting property name"),
        ('{"__type__":"money","__value__":1}', None, "decoded: 'money' is not registered with kombu here"),
    ],
)
def test_a_mismatch_says_what_does_not_fit(text: str, annotation: object, message: str) -> None:
    with pytest.raises(errors.ResultMismatch, match=message):
        codec.decode(text, annotation)


def test_a_mismatch_does_not_show_the_value() -> None:
    with pytest.raises(errors.ResultMismatch) as caught:
        codec.decode('{"number":["4242424242424242"]}', Card)
    assert "4242" not in str(caught.value)


@dataclass
class Picky:
    x: int

    def __post_init__(self) -> None:
        raise KeyError("no")


def test_a_type_whose_own_code_raises_does_not_fit() -> None:
    with pytest.raises(errors.ResultMismatch, match="Picky: KeyError"):
        codec.decode('{"x":1}', Picky)
    assert codec.decode_leniently('{"x":1}', Picky) == {"x": 1}


UserId = NewType("UserId", int)


@pytest.mark.parametrize(
    "annotation",
    [Card, list[Card], set[int], Colour, "Missing", Callable[[], int], type[int], ValueError],
)
def test_a_hint_that_does_not_fit_leaves_the_value_as_celery_would_give_it(annotation: object) -> None:
    assert codec.decode_leniently('{"a":{"1":2}}', annotation) == {"a": {"1": 2}}


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('"007"', int),
        ('"yes"', bool),
        ('"2024-01-01"', datetime),
        (f'"{UUID(int=1)}"', UUID),
        ('["1"]', list[int]),
        ('"1"', UserId),
        ('{"1":"2"}', dict[str, int | None]),
        ('"5"', Annotated[int, Field(gt=9)]),
        ("[1]", Iterable[str]),
        ("1", float),
    ],
)
def test_a_hint_converts_nothing_that_json_carries_by_itself(text: str, hint: object) -> None:
    assert same(codec.decode_leniently(text, hint), json.loads(text))


# --- annotations --------------------------------------------------------------------------------------------------


def ship(order: Order, day: date, *rest: Card, fast: bool = False, note: str | None = None, **more: Parcel) -> Line:
    raise NotImplementedError


def hidden(order: Order, missing: Missing, plain) -> Missing:  # type: ignore[no-untyped-def]
    raise NotImplementedError


def test_annotations_written_as_text_are_resolved() -> None:
    found = codec.annotations_of(ship)
    assert found.parameters == {"order": Order, "day": date, "fast": bool, "note": str | None}
    assert found.positional == ("order", "day")
    assert (found.var_positional, found.var_keyword, found.returns) == (Card, Parcel, Line)
    assert codec.annotations_of(ship) is found


def test_a_name_that_only_the_type_checker_sees_costs_the_others_nothing() -> None:
    found = codec.annotations_of(hidden)
    assert found.parameters == {"order": Order, "missing": None, "plain": None}
    assert found.returns is None


def test_a_slip_in_an_annotation_says_nothing() -> None:
    def function(x: any, y: callable, card: Card) -> None: ...  # type: ignore[valid-type]

    text = codec.encode_arguments((1, 2, Card(number="1")), {}, "it")
    assert codec.decode_arguments(text, codec.annotations_of(function)) == ([1, 2, Card(number="1")], {})
    assert codec.accepts_none(codec.annotations_of(function), 0)


def test_a_class_defined_after_the_first_look_is_found_later() -> None:
    namespace: dict[str, Any] = {}
    exec("from __future__ import annotations\ndef f(x: Later): ...", namespace)
    assert codec.annotations_of(namespace["f"]).parameters == {"x": None}
    namespace["Later"] = Card
    assert codec.annotations_of(namespace["f"]).parameters == {"x": Card}


def test_a_decorated_function_has_the_annotations_of_what_it_wraps() -> None:
    @functools.wraps(ship)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return ship(*args, **kwargs)

    assert codec.annotations_of(wrapper) == codec.annotations_of(ship)


class Depot:
    def load(self, order: Order) -> Line:
        raise NotImplementedError

    @functools.wraps(load)
    def reload(self, *args: Any) -> Any:
        raise NotImplementedError

    def __call__(self, order: Order) -> None:
        raise NotImplementedError


def test_a_bound_method_is_annotated_without_its_self() -> None:
    for method in (Depot().load, Depot().reload):
        found = codec.annotations_of(method)
        assert found.positional == ("order",)
        assert (found.parameters["order"], found.returns) == (Order, Line)
    assert codec.annotations_of(Depot.load).positional == ("self", "order")


@pytest.mark.parametrize("function", [functools.partial(ship, ORDER), print, dict, max, Depot()])
def test_what_cannot_be_looked_into_is_unannotated(function: Callable[..., Any]) -> None:
    found = codec.annotations_of(function)
    assert set(found.parameters.values()) <= {None}
    assert codec.decode_arguments('{"args":[1],"kwargs":{"order":{}}}', found) == ([1], {"order": {}})


def test_a_return_annotation_of_none_is_told_from_there_being_none() -> None:
    def quiet() -> None: ...

    assert codec.annotations_of(quiet).returns is type(None)
    assert codec.annotations_of(lambda: None).returns is None


def test_looking_at_a_function_does_not_keep_it_alive() -> None:
    def short_lived(order: Order) -> None: ...

    codec.annotations_of(short_lived)
    gone = weakref.ref(short_lived)
    del short_lived
    gc.collect()
    assert gone() is None


Maybe = TypeVar("Maybe")
Text = TypeVar("Text", bound=str)
Blank = Annotated[str, BeforeValidator(lambda value: value or "")]


def test_whether_a_parameter_accepts_none_is_read_from_its_annotation() -> None:
    def function(  # type: ignore[no-untyped-def]
        a, b: Any, c: object, d: None, e: str | None, f: Annotated[int | None, "x"], g: Maybe, h: Blank,
        i: list[int] | Mood | None, j: Missing, k: str = None,  # type: ignore[assignment]  # noqa: RUF013
    ): ...  # fmt: skip

    annotations = codec.annotations_of(function)
    assert [codec.accepts_none(annotations, index) for index in range(11)] == [True] * 11


def test_a_parameter_that_does_not_accept_none_is_told_apart() -> None:
    def function(
        a: str, b: int, c: list[None], d: Order, e: Parcel, f: UserId, g: Colour, h: Sequence[str], i: Text,
        j: ValueError, k: Annotated[str, "x"], l: str | int, m: Mood = Mood.GOOD,  # noqa: E741
    ) -> None: ...  # fmt: skip

    annotations = codec.annotations_of(function)
    assert [codec.accepts_none(annotations, index) for index in range(13)] == [False] * 13


def test_a_parameter_beyond_the_named_ones_is_one_of_the_rest() -> None:
    def cards(first: str, *rest: Card) -> None: ...
    def anything(first: str, *rest) -> None: ...  # type: ignore[no-untyped-def]

    assert not codec.accepts_none(codec.annotations_of(cards), 1)
    assert codec.accepts_none(codec.annotations_of(anything), 1)
    assert codec.accepts_none(codec.annotations_of(functools.partial(ship)), 0)


# --- the results of a task ----------------------------------------------------------------------------------------

TEXT_OF_LINE = '{"sku":"mug","qty":2,"price":"1.5","seen":"2024-05-01T12:00:00Z"}'


@pytest.mark.parametrize(
    ("hint", "text"), [(Line, TEXT_OF_LINE), (int, "7"), (None, '{"a":[1]}'), (set[int], "[2,1]"), (int, '"x"')]
)
def test_a_result_decoder_does_what_decoding_by_the_annotation_does(hint: Any, text: str) -> None:
    def task() -> Any: ...

    task.__annotations__["return"] = hint
    decoder, is_final = codec.result_decoder(task)
    assert is_final
    assert same(decoder(text), codec.decode_leniently(text, hint))


def test_a_result_decoder_of_nothing_or_of_what_says_nothing_reads_plain_json() -> None:
    assert codec.result_decoder(None)[0]("[1]") == [1]
    decoder, is_final = codec.result_decoder(lambda: 1)
    assert (decoder("[1]"), is_final) == ([1], True)


def test_a_result_decoder_is_not_kept_while_its_annotation_cannot_be_resolved() -> None:
    def task() -> Any: ...

    task.__annotations__["return"] = "DefinedFurtherDown"
    assert not codec.result_decoder(task)[1]


@pytest.mark.parametrize("text", [" 1", "1 ", "\n[1]\n"])
def test_space_around_a_value_is_no_obstacle(text: str) -> None:
    assert same(codec.decode(text), json.loads(text))


@pytest.mark.parametrize("text", ["", " ", "1 2", "[1", "nope", '{"a":}', "[" * 100_000])
def test_text_that_is_no_json_is_a_mismatch(text: str) -> None:
    with pytest.raises(errors.ResultMismatch, match="cannot be decoded"):
        codec.decode(text)


# --- arguments ----------------------------------------------------------------------------------------------------


def test_each_argument_is_decoded_by_its_parameter() -> None:
    args = (ORDER, date(2024, 1, 2), Card(number="1"), Card(number="2"))
    kwargs = {"fast": True, "note": "x", "left": Parcel(1.0, b"")}
    text = codec.encode_arguments(args, kwargs, "it")
    assert codec.decode_arguments(text, codec.annotations_of(ship)) == (list(args), kwargs)
    plain_args, plain_kwargs = codec.plain_arguments(text)
    assert plain_args[1:] == [date(2024, 1, 2), {"number": "1"}, {"number": "2"}]
    assert plain_kwargs == {"fast": True, "note": "x", "left": {"weight": 1.0, "label": b"", "tags": []}}


def test_an_argument_that_does_not_fit_costs_the_others_nothing() -> None:
    text = codec.encode_arguments(("no order", date(2024, 1, 2), Card(number="1")), {"odd": 5}, "it")
    args, kwargs = codec.decode_arguments(text, codec.annotations_of(ship))
    assert args == ["no order", date(2024, 1, 2), Card(number="1")]
    assert kwargs == {"odd": 5}


def test_parameters_that_are_bound_already_take_no_argument() -> None:
    def workflow(ctx: object, card: Card, parcel: Parcel) -> None: ...

    card, parcel = Card(number="1"), Parcel(1.0, b"x")
    text = codec.encode_arguments((card,), {"parcel": parcel}, "it")
    assert codec.decode_arguments(text, codec.annotations_of(workflow), skip=1) == ([card], {"parcel": parcel})


def test_more_arguments_than_parameters_are_left_to_the_call_to_refuse() -> None:
    def one(card: Card) -> None: ...

    text = codec.encode_arguments((Card(number="1"), 2, 3), {"other": 4}, "it")
    assert codec.decode_arguments(text, codec.annotations_of(one)) == ([Card(number="1"), 2, 3], {"other": 4})


def test_arguments_over_the_limit_are_refused() -> None:
    with pytest.raises(errors.PayloadTooLarge):
        codec.encode_arguments(("x" * 100,), {}, "the arguments of shop.ship", 100)


# --- the step that a compensation undoes --------------------------------------------------------------------------


def undone_step_of(step: Record) -> str:
    plan = Compensation(name="shop.unship", passes="step")
    arguments: str = compensation_arguments(plan, step, step.outcome)
    return arguments


LINE = Line(sku="a", qty=1, price=Decimal("1.10"), seen=datetime.now(UTC))
STEP = Record(
    seq=1,
    kind=Kind.STEP,
    name="shop.ship",
    scope="",
    outcome=Outcome.SUCCEEDED,
    result=codec.encode(LINE, "it"),
    arguments=codec.encode_arguments((ORDER, date(2024, 1, 2)), {"fast": True}, "it"),
    idempotency_key="key-1",
)


def test_an_undone_step_is_decoded_by_the_annotations_of_its_task() -> None:
    expected = codec.UndoneStep(
        args=(ORDER, date(2024, 1, 2)),
        kwargs={"fast": True},
        result=LINE,
        outcome=Outcome.SUCCEEDED,
        late_outcome=None,
        idempotency_key="key-1",
    )
    (plain,), _ = codec.plain_arguments(undone_step_of(STEP))
    assert codec.decode_undone_step(plain, codec.annotations_of(ship), 0) == expected
    text = json.dumps(json.loads(undone_step_of(STEP))["args"][0])
    assert codec.decode_undone_step(text, codec.annotations_of(ship), 0) == expected


def test_an_undone_step_of_a_task_unknown_here_is_plain() -> None:
    unknown = Record(seq=1, kind=Kind.STEP, name="n", scope="", outcome=Outcome.UNKNOWN, idempotency_key="k")
    (plain,), _ = codec.plain_arguments(undone_step_of(unknown))
    expected = codec.UndoneStep((), {}, None, Outcome.UNKNOWN, None, "k")
    assert codec.decode_undone_step(plain, None, 0) == expected
    assert codec.decode_undone_step(plain, codec.annotations_of(ship), 0) == expected


def test_a_late_result_reaches_the_undone_step() -> None:
    late = Record(
        seq=1,
        kind=Kind.STEP,
        name="n",
        scope="",
        outcome=Outcome.UNKNOWN,
        late_outcome=Outcome.SUCCEEDED,
        late_result=codec.encode(LINE, "it"),
    )
    (plain,), _ = codec.plain_arguments(undone_step_of(late))
    step = codec.decode_undone_step(plain, codec.annotations_of(ship), 0)
    assert (step.result, step.late_outcome) == (LINE, Outcome.SUCCEEDED)


# --- failures -----------------------------------------------------------------------------------------------------


class CardDeclined(ValueError):
    pass


class Outer:
    class Frozen(CardDeclined, LookupError):
        pass


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_builtin_error_is_described_by_its_full_name() -> None:
    assert codec.describe_error(ValueError("no")) == Failure("builtins.ValueError", ("builtins.Exception",), "no")
    assert codec.describe_error(KeyboardInterrupt()) == Failure("builtins.KeyboardInterrupt", (), "")


def test_an_error_is_described_with_all_its_bases() -> None:
    failure = codec.describe_error(Outer.Frozen("no"))
    assert failure.type == f"{__name__}.Outer.Frozen"
    assert failure.bases == (
        f"{__name__}.CardDeclined",
        "builtins.ValueError",
        "builtins.LookupError",
        "builtins.Exception",
    )


def test_a_traceback_is_kept_where_there_is_one() -> None:
    failure = codec.describe_error(raised(CardDeclined("no")))
    assert failure.traceback is not None
    assert failure.traceback.startswith("Traceback (most recent call last)")
    assert failure.traceback.endswith("CardDeclined: no\n")


def test_long_messages_and_tracebacks_are_cut() -> None:
    failure = codec.describe_error(raised(ValueError("a" * 30_000 + "b")))
    assert failure.message == "a" * 10_000
    assert failure.traceback is not None
    assert len(failure.traceback) == 20_000
    assert failure.traceback.endswith("ab\n")


def test_an_error_that_cannot_say_what_it_is_gets_a_placeholder() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    failure = codec.describe_error(raised(Mute()))
    assert failure.message.endswith("Mute whose __str__ raised RuntimeError>")
    assert failure.traceback is not None


def test_what_is_no_unicode_in_a_message_is_escaped() -> None:
    failure = codec.describe_error(raised(ValueError("a\udcffb")))
    assert failure.message == "a\\udcffb"
    assert failure.traceback is not None
    failure.traceback.encode()


STEP_FAILED: dict[str, Any] = {"seq": 3, "name": "charge", "outcome": "failed", "message": "no"}


def test_a_failed_step_is_described_as_the_exception_of_its_activity() -> None:
    error = errors.in_class_of(errors.StepTimedOut, f"{__name__}.CardDeclined", (), **STEP_FAILED)
    assert isinstance(error, CardDeclined)
    failure = codec.describe_error(error)
    assert failure.type == f"{__name__}.CardDeclined"
    assert failure.bases == ("builtins.ValueError", "builtins.Exception")
    assert failure.message == str(error) == f"step 3 (charge) failed: {__name__}.CardDeclined: no"


def test_a_failed_step_whose_class_is_not_imported_keeps_its_nearest_builtin_base() -> None:
    error = errors.in_class_of(errors.StepFailed, "shop.gone.Declined", ("builtins.ValueError",), **STEP_FAILED)
    failure = codec.describe_error(error)
    assert (failure.type, failure.bases) == ("shop.gone.Declined", ("builtins.ValueError", "builtins.Exception"))
    plain = errors.in_class_of(errors.StepFailed, "shop.gone.Declined", (), **STEP_FAILED)
    assert codec.describe_error(plain).bases == ("builtins.Exception",)


def test_a_failed_workflow_is_described_as_its_original_exception() -> None:
    error = errors.in_class_of(
        errors.WorkflowFailed, f"{__name__}.Outer.Frozen", (), instance_id="i", status="FAILED", message="no"
    )
    failure = codec.describe_error(error)
    assert failure.type == f"{__name__}.Outer.Frozen"
    assert failure.bases[0] == f"{__name__}.CardDeclined"


def test_a_described_step_can_be_raised_again_as_the_same_classes() -> None:
    failure = codec.describe_error(errors.in_class_of(errors.StepFailed, f"{__name__}.Outer.Frozen", (), **STEP_FAILED))
    again = errors.in_class_of(errors.StepFailed, failure.type, failure.bases, **STEP_FAILED)
    assert isinstance(again, Outer.Frozen)
    assert isinstance(again, errors.StepFailed)


# --- columns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Failure("builtins.ValueError", ("builtins.Exception",), "no\x00\ud800", None),
        RetryPolicy(),
        COMPENSATION_RETRY,
        RetryPolicy(3, timedelta(microseconds=1), 1.5, timedelta.max, timedelta(days=3), 0.0, (CardDeclined, "x.Y")),
        Compensation("shop.refund"),
        Compensation(
            "shop.refund",
            '{"args":[1],"kwargs":{}}',
            "step",
            {"queue": "q", "eta": datetime(2024, 1, 1, tzinfo=UTC)},
            COMPENSATION_RETRY,
            True,
        ),
    ],
)
def test_what_a_column_holds_comes_back(value: object) -> None:
    text = codec.dump(value)
    assert text.isascii()
    assert same(codec.load(type(value), text), value)


def test_a_field_that_a_newer_version_added_is_ignored() -> None:
    assert codec.load(Failure, '{"type":"a","bases":[],"message":"b","new":1}') == Failure("a", (), "b")
