from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NotRequired, assert_type
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    Base64Bytes,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    RootModel,
    TypeAdapter,
    WrapSerializer,
    computed_field,
    field_validator,
    model_serializer,
)
from pydantic.dataclasses import dataclass as validated_dataclass
from typing_extensions import TypedDict

from asyncq.errors import PayloadError
from asyncq.payload import Codec, encode

GO = json.loads((Path(__file__).parent / "data" / "go_json.json").read_text())["vectors"]
# In base64 these are "+/+/" of the standard alphabet, "-_-_" of the URL-safe one.
DATA = b"\xfb\xff\xbf"


class Welcome(BaseModel):
    user_id: int
    template: str = "default"
    tags: list[str] = []
    score: float = 0.5
    active: bool = False
    note: str | None = None


class Blob(BaseModel):
    name: str = ""
    data: bytes = b""
    parts: list[bytes] = []
    by_key: dict[str, bytes] = {}


class NilBlob(BaseModel):
    name: str
    data: bytes | None
    parts: list[bytes] | None
    by_key: dict[str, bytes] | None


class Inner(BaseModel):
    data: bytes
    at: datetime


class Outer(BaseModel):
    id: str
    inner: Inner
    many: list[Inner]


class Aliased(BaseModel):
    user_id: int = Field(alias="userId")
    created_by: str = Field(alias="createdBy")


class Empty(BaseModel):
    pass


class Tree(BaseModel):
    data: bytes = b""
    children: list[Tree] = []


class Anything(BaseModel):
    value: Any


class Number(BaseModel):
    value: float


@dataclasses.dataclass
class Order:
    id: int
    data: bytes = DATA
    price: float = 0.5
    code: Annotated[str, Field(max_length=3)] = "abc"


@validated_dataclass
class CheckedOrder:
    id: int
    data: bytes = DATA


class Parcel(TypedDict):
    id: int
    data: NotRequired[bytes]
    weight: Annotated[float, Field(alias="kg")]


class Colour(Enum):
    RED = "red"


def at(*args: int, offset: timedelta = timedelta(0)) -> datetime:
    return datetime(*args, tzinfo=timezone(offset))  # type: ignore[arg-type, misc]


INNER = Inner(data=DATA[:2], at=at(2024, 1, 2, 3, 4, 5, 100_000))
LATE = (2024, 2, 29, 23, 59, 58)

SAME_AS_GO: dict[str, tuple[Any, Any]] = {
    "struct": (Welcome, Welcome(user_id=1, tags=["a", "b"], active=True)),
    "struct with text that is escaped": (
        Welcome,
        Welcome(
            user_id=-1,
            template="é < > & \u2028 \u2029 '\"/\\",
            tags=["<b>"],
            score=1.25,
        ),
    ),
    "empty struct": (Empty, Empty()),
    "aliases": (Aliased, Aliased(userId=7, createdBy="x&y")),
    "nested": (Outer, Outer(id="<1>", inner=INNER, many=[INNER])),
    "all ASCII control characters": (str, "".join(map(chr, range(32))) + "\x7f"),
    "printable ASCII": (str, "".join(map(chr, range(32, 127)))),
    "C1 controls, no-break space, BOM, line separators": (
        str,
        "\u0080\u0085\u009f\u00a0\ufeff\u2027\u2028\u2029\u202a",
    ),
    "emoji": (str, "😀👩\u200d👩\u200d👧𝄞"),
    "quotes typographic": (str, "\u201cit\u2019s\u201d \u2014 \u20ac5 \u2026"),
    "string": (str, "hello"),
    "map keys are escaped": (dict[str, int], {"a<b>&\u2028": 1}),
    "map with number keys": (dict[int, str], {1: "a", 2: "b"}),
    "bytes": (
        Blob,
        Blob(
            name="x",
            data=bytes(range(256)),
            parts=[b"", b"\x01", b"\x01\x02", b"\x01\x02\x03", DATA],
            by_key={"k": b"\xff\xfe"},
        ),
    ),
    "bytes empty": (Blob, Blob()),
    "nil slices and maps": (NilBlob, NilBlob(name="", data=None, parts=None, by_key=None)),
    "time": (datetime, at(*LATE)),
    "time with microseconds": (datetime, at(*LATE, 123_456)),
    "time with milliseconds": (datetime, at(*LATE, 120_000)),
    "time with one microsecond": (datetime, at(*LATE, 1)),
    "time with offset": (datetime, at(*LATE, 500_000, offset=timedelta(hours=2.5))),
    "time west": (datetime, at(*LATE, offset=timedelta(hours=-7))),
    "time zero": (datetime, at(1, 1, 1)),
    "time of the last year": (datetime, at(9999, 12, 31, 23, 59, 59, 999_999)),
    "integers": (list[int], [0, -1, 2**53 + 1, 2**63 - 1, -(2**63)]),
    "largest uint64": (int, 2**64 - 1),
    "floats": (
        list[float],
        [
            *(0.1, 0.5, 1.25, -2.5, math.pi, 1234567.75, 0.0001),
            *(123456789.12345679, 0.30000000000000004),
        ],
    ),
    "floats tiny": (list[float], [1e-7, 1.5e-9, 5e-324, 2.2250738585072014e-308]),
    "nil": (Welcome | None, None),
}

# Read as the same value, written otherwise: (shape, value, what is written).
OTHER_THAN_GO: dict[str, tuple[Any, Any, bytes]] = {
    "floats whole": (list[float], [0.0, 1.0, -3.0, 100.0], b"[0.0,1.0,-3.0,100.0]"),
    "float minus zero": (float, 0.0, b"0.0"),
    "floats small": (list[float], [1e-5, 1e-6, 1.5e-6], b"[0.00001,1e-6,1.5e-6]"),
    "floats large": (
        list[float],
        [1e15, 1e16, 1e20, 1e21, 1.7976931348623157e308],
        b"[1000000000000000.0,1e+16,1e+20,1e+21,1.7976931348623157e+308]",
    ),
    "map is sorted": (dict[str, int], {"b": 1, "a": 2}, b'{"b":1,"a":2}'),
    "time with nanoseconds": (
        datetime,
        at(*LATE, 123_456),
        b'"2024-02-29T23:59:58.123456Z"',
    ),
}


@pytest.mark.parametrize("name", SAME_AS_GO)
def test_a_value_is_written_byte_for_byte_as_go_writes_it(name: str) -> None:
    shape, value = SAME_AS_GO[name]
    assert Codec(shape).encode(value) == GO[name]["json"].encode()


@pytest.mark.parametrize("name", SAME_AS_GO)
def test_what_go_wrote_is_read_as_the_same_value(name: str) -> None:
    shape, value = SAME_AS_GO[name]
    assert Codec(shape).decode(GO[name]["json"].encode()) == value


@pytest.mark.parametrize("name", SAME_AS_GO)
def test_a_value_without_a_declared_type_is_written_as_go_writes_it(name: str) -> None:
    value = SAME_AS_GO[name][1]
    expected = None if value is None else GO[name]["json"].encode()
    assert encode(value) == expected


@pytest.mark.parametrize("name", OTHER_THAN_GO)
def test_a_known_difference_from_go_is_one_of_spelling(name: str) -> None:
    shape, value, written = OTHER_THAN_GO[name]
    codec = Codec(shape)
    raw = GO[name]["json"].encode()
    assert codec.decode(raw) == codec.decode(written) == value
    assert codec.encode(value) == written != raw


def test_every_vector_of_go_is_used() -> None:
    elsewhere = {"any", "duration", "invalid UTF-8"}
    assert GO.keys() == SAME_AS_GO.keys() | OTHER_THAN_GO.keys() | elsewhere


def test_bytes_of_no_declared_type_are_base64_as_in_go() -> None:
    value = [None, True, "<", DATA, {"k": b"\x01"}]
    expected = GO["any"]["json"].encode()
    assert encode(value) == expected
    assert Codec(list[Any]).encode(value) == expected
    assert Codec(Anything).encode(Anything(value=value)) == b'{"value":' + expected + b"}"


text = st.text(st.characters(exclude_categories=["Cs"]))


@given(text)
def test_any_text_is_escaped_as_go_does_and_comes_back(value: str) -> None:
    raw = Codec(str).encode(value)
    assert raw is not None
    # Python's json and Go's differ in these five only; Go's own output is in the vectors.
    expected = json.dumps(value, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        expected = expected.replace(character, f"\\u{ord(character):04x}")
    assert raw == expected.encode()
    assert Codec(str).decode(raw) == value


@given(
    st.builds(
        Outer,
        id=text,
        inner=st.builds(Inner, data=st.binary(), at=st.datetimes(timezones=st.sampled_from([UTC]))),
        many=st.lists(st.builds(Inner, data=st.binary(), at=st.datetimes())),
    )
)
def test_a_model_comes_back_as_it_was(value: Outer) -> None:
    codec = Codec(Outer)
    raw = codec.encode(value)
    assert raw is not None
    assert codec.decode(raw) == value
    assert encode(value) == raw
    assert encode([value]) == b"[" + raw + b"]"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**40), 10**40) | text
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(text, inner),
        max_leaves=20,
    )
)  # fmt: skip
def test_whatever_json_can_say_comes_back(value: Any) -> None:
    raw = encode(value)
    assert raw == (None if value is None else Codec(object).encode(value))
    assert Codec(object).decode(raw or b"") == value


class Everywhere(BaseModel):
    model: Inner
    tree: Tree
    root: RootModel[bytes]
    order: Order
    checked: CheckedOrder
    parcel: Parcel
    sequence: Sequence[bytes]
    union: bytes | int
    optional: bytes | None
    tagged: Annotated[Cat | Dog, Field(discriminator="kind")]
    keys: dict[bytes, int]
    pair: tuple[bytes, int]
    limited: Annotated[bytes, Field(max_length=3)]
    wrapped: Annotated[bytes, WrapSerializer(lambda value, write: write(value))]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def computed(self) -> bytes:
        return DATA


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Cat(BaseModel):
    kind: Literal["cat"]
    data: bytes


class Dog(BaseModel):
    kind: Literal["dog"]


def test_bytes_are_standard_base64_wherever_they_stand() -> None:
    value = Everywhere(
        model=Inner(data=DATA, at=at(2024, 1, 1)),
        tree=Tree(data=DATA, children=[Tree(data=DATA)]),
        root=RootModel[bytes](DATA),
        order=Order(1),
        checked=CheckedOrder(1),
        parcel={"id": 1, "data": DATA, "kg": 1.5},  # type: ignore[typeddict-unknown-key, typeddict-item]
        sequence=[DATA],
        union=DATA,
        optional=DATA,
        tagged=Cat(kind="cat", data=DATA),
        keys={DATA: 1},
        pair=(DATA, 1),
        limited=DATA,
        wrapped=DATA,
    )
    before = Inner(data=b"text", at=at(2024, 1, 1)).model_dump_json()
    codec = Codec(Everywhere)
    raw = codec.encode(value)
    assert raw is not None
    assert raw.count(b'"+/+/"') == 16
    assert codec.decode(raw) == value
    # The models themselves are the application's, and stay as they are.
    assert Inner(data=b"text", at=at(2024, 1, 1)).model_dump_json() == before
    assert b"text" in before.encode()


def test_bytes_in_fields_that_no_one_declared_are_standard_base64() -> None:
    value = Open.model_validate({"data": DATA, "more": [DATA]})
    assert Codec(Open).encode(value) == b'{"data":"+/+/","more":["+/+/"]}'


@pytest.mark.parametrize("written", [b'"+/+/"', b'"-_-_"', b'"+/8="', b'"+/8"'])
def test_base64_is_read_in_either_alphabet_and_without_padding(written: bytes) -> None:
    assert Codec(list[bytes]).decode(b"[" + written + b"]")[0] in (DATA, DATA[:2])


class Hex(BaseModel):
    model_config = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")
    data: bytes = DATA
    inner: Tree = Tree(data=DATA)
    anything: Any = b"\xff"


def test_a_model_that_chose_an_encoding_of_bytes_keeps_it() -> None:
    raw = Codec(Hex).encode(Hex())
    assert raw == (b'{"data":"fbffbf","inner":{"data":"+/+/","children":[]},"anything":"ff"}')
    assert Codec(Hex).decode(raw).data == DATA
    adapter = TypeAdapter(list[bytes], config=Hex.model_config)
    assert Codec(adapter).encode([DATA]) == b'["fbffbf"]'
    assert Codec(adapter).decode(b'["fbffbf"]') == [DATA]


class OwnSerializers(BaseModel):
    encoded: Base64Bytes
    hexed: Annotated[
        bytes,
        PlainSerializer(lambda value: value.hex()),
        AfterValidator(lambda value: bytes.fromhex(value.decode())),
    ]
    after: Tree


def test_a_field_with_its_own_serializer_is_written_and_read_as_it_says() -> None:
    value = OwnSerializers(encoded=b"YWJj", hexed=b"fb", after=Tree(data=DATA))
    raw = Codec(OwnSerializers).encode(value)
    assert raw == (b'{"encoded":"YWJj","hexed":"fb","after":{"data":"+/+/","children":[]}}')
    assert Codec(OwnSerializers).decode(raw) == value


class PlainlySerialized(BaseModel):
    data: bytes
    inner: Cat

    @model_serializer
    def write(self) -> dict[str, Any]:
        return {"data": self.data, "inner": self.inner}


def test_below_a_plain_serializer_bytes_are_what_pydantic_makes_of_them() -> None:
    value = PlainlySerialized(data=b"text", inner=Cat(kind="cat", data=b"more"))
    raw = Codec(PlainlySerialized).encode(value)
    assert raw == b'{"data":"text","inner":{"kind":"cat","data":"more"}}'
    assert Codec(PlainlySerialized).decode(raw) == value


class Named(BaseModel):
    """Fields that bear the names of keys of a core schema."""

    type: bytes
    schema_: bytes = Field(alias="schema")
    fields: bytes
    serialization: bytes


def test_a_field_may_have_any_name() -> None:
    raw = b'{"type":"+/+/","schema":"+/+/","fields":"+/+/","serialization":"+/+/"}'
    value = Codec(Named).decode(raw)
    assert value.type == value.schema_ == value.fields == value.serialization == DATA
    assert Codec(Named).encode(value) == raw


class Seconds(BaseModel):
    model_config = ConfigDict(ser_json_temporal="seconds", ser_json_inf_nan="strings")
    at: datetime
    value: float = math.inf


def test_a_model_that_chose_how_to_write_times_and_infinity_keeps_it() -> None:
    value = Seconds(at=at(1970, 1, 1, 0, 0, 1, 500_000))
    raw = Codec(Seconds).encode(value)
    assert raw == b'{"at":1.5,"value":"Infinity"}'
    assert Codec(Seconds).decode(raw) == value


@pytest.mark.parametrize(
    ("shape", "value", "written"),
    [
        (datetime | int, 3, b"3"),
        (datetime | int, at(2024, 1, 1, 0, 0, 0, 10), b'"2024-01-01T00:00:00.00001Z"'),
        (bytes | str, "some text", b'"some text"'),
        (bytes | str, b"text", b'"dGV4dA=="'),
        (set[int] | list[int], [2, 1], b"[2,1]"),
        (Cat | Welcome, Welcome(user_id=1), encode(Welcome(user_id=1))),
    ],
)
def test_a_union_is_written_by_the_choice_that_fits(shape: Any, value: Any, written: bytes) -> None:
    assert Codec(shape).encode(value) == written
    assert Codec(shape).decode(written) == value


def test_a_naive_datetime_has_no_offset() -> None:
    value = datetime(2024, 1, 1, 0, 0, 0, 120_000)
    assert Codec(datetime).encode(value) == b'"2024-01-01T00:00:00.12"'


@pytest.mark.parametrize("shape", [set[int], frozenset[int], set[int | str], set, Any])
def test_a_set_is_written_in_one_order(shape: Any) -> None:
    # 32 and 0 share a place in a small table, so that their order there is that of arrival.
    for items in ([0, 32, 64], [64, 32, 0]):
        value = frozenset(items) if shape == frozenset[int] else set(items)
        assert Codec(shape).encode(value) == b"[0,32,64]"
        assert encode(value) == b"[0,32,64]"


def test_a_set_of_what_has_no_order_is_still_written_in_one_order() -> None:
    assert Codec(set[int | str]).encode({"a", 1}) == b'["a",1]'


def test_a_typed_dict_is_written_in_declaration_order_by_alias() -> None:
    codec = Codec(Parcel)
    raw = b'{"id":1,"data":"+/+/","kg":2.0}'
    assert codec.encode({"weight": 2, "data": DATA, "id": 1}) == raw
    assert codec.decode(raw) == {"id": 1, "data": DATA, "weight": 2.0}


def test_a_dataclass_is_validated_before_it_is_written() -> None:
    codec = Codec(Order)
    raw = b'{"id":1,"data":"+/+/","price":2.0,"code":"abc"}'
    assert codec.encode(Order(1, price=2)) == raw
    assert codec.decode(raw) == Order(1, price=2.0)
    with pytest.raises(
        PayloadError, match=r"2 problems\n  id: .* valid integer\n  code: .* at most"
    ):
        codec.encode(Order("1", code="long"))  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match=r"code: String should have at most 3 characters"):
        codec.encode(Order(1, code="long"))


@pytest.mark.parametrize(
    ("shape", "value", "problem"),
    [
        (Welcome, {"user_id": 1}, "expected Welcome, got dict"),
        (Welcome, None, "expected Welcome, got NoneType"),
        (CheckedOrder, Order(1), "expected CheckedOrder, got Order"),
        (int, "1", "not a valid int: Input should be a valid integer"),
        (int, True, "not a valid int"),
        (list[int], (1, 2), r"not a valid list\[int\]: Input should be a valid list"),
        (list[int], [1, "2"], "1: Input should be a valid integer"),
        (dict[str, int], {"a<\n": "x"}, r"a<\\n: Input should be a valid integer"),
        (Annotated[int, Field(gt=0)], 0, "not a valid int: .* greater than 0"),
        (Cat | Dog, Welcome(user_id=1), "Cat: .* or instance of Cat\n  Dog: "),
        (bytes, "text", "not a valid bytes: Input should be a valid bytes"),
        (Annotated[bytes, Field(max_length=1)], b"xx", "at most 1 byte"),
        (None, 0, "Input should be None"),
        (Colour, "red", "not a valid Colour"),
        (Parcel, {"id": 1}, "kg: Field required"),
    ],
)
def test_a_value_that_is_not_of_the_shape_is_not_written(
    shape: Any, value: Any, problem: str
) -> None:
    with pytest.raises(PayloadError, match=problem):
        Codec(shape).encode(value)


def test_a_model_that_was_spoilt_after_its_validation_is_not_written() -> None:
    value = Welcome(user_id=1)
    value.user_id = "one"  # type: ignore[assignment]
    with pytest.raises(PayloadError, match=r"^not a valid Welcome: user_id: .* valid integer$"):
        Codec(Welcome).encode(value)
    with pytest.raises(PayloadError, match=r"^not a valid list.*: 0.user_id: .* valid integer$"):
        Codec(list[Welcome]).encode([value])


def test_a_default_that_pydantic_would_warn_of_is_written_when_it_can_be_read() -> None:
    class Sloppy(BaseModel):
        tags: list[str] = ()  # type: ignore[assignment]

    assert Codec(Sloppy).encode(Sloppy()) == b'{"tags":[]}'


def test_a_frozen_model_is_written_like_any_other() -> None:
    class Frozen(Welcome):
        model_config = ConfigDict(frozen=True)

    assert Codec(Frozen).encode(Frozen(user_id=1)) == encode(Welcome(user_id=1))


def test_an_instance_of_a_subclass_has_the_fields_of_the_shape() -> None:
    class More(Welcome):
        extra: int = 1

    assert Codec(Welcome).encode(More(user_id=1)) == encode(Welcome(user_id=1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_not_written(value: float) -> None:
    match = "JSON has no (NaN|Infinity)"
    with pytest.raises(PayloadError, match=match):
        encode([value])
    with pytest.raises(PayloadError, match=match):
        Codec(Anything).encode(Anything(value={"a": "\\", "b": [value]}))
    with pytest.raises(PayloadError, match=match):
        Codec(Number).encode(Number(value=value))
    with pytest.raises(PayloadError, match=r"finite number"):
        Codec(list[float]).encode([value])


def test_text_that_looks_like_no_number_is_text() -> None:
    value = {"NaN": 'say "Infinity" or \\', "x": ["-Infinity", "NaN"]}
    raw = encode(value)
    assert raw is not None
    assert Codec(dict[str, Any]).decode(raw) == value
    assert Codec(Welcome).decode(b'{"user_id":1,"template":"NaN"}').template == "NaN"


@pytest.mark.parametrize("raw", [b"NaN", b"[1,NaN]", b"-Infinity", b'{"\\"":Infinity}'])
def test_a_number_that_is_none_is_not_read(raw: bytes) -> None:
    with pytest.raises(PayloadError, match=r"JSON has no"):
        Codec(object).decode(raw)
    with pytest.raises(PayloadError, match=r"not a valid list"):
        Codec(list[float]).decode(raw)
    with pytest.raises(PayloadError, match=r"value: Input should be a finite number"):
        Codec(Number).decode(b'{"value":NaN}')


class Unknown:
    pass


def circle() -> list[Any]:
    around: list[Any] = []
    around.append({"again": around})
    return around


def deep() -> list[Any]:
    inner: list[Any] = []
    for _ in range(500):
        inner = [inner]
    return inner


def vine() -> Tree:
    tree = Tree()
    for _ in range(500):
        tree = Tree(children=[tree])
    return tree


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (Unknown(), "Unable to serialize unknown type: .*Unknown"),
        ([{"a": Unknown()}], "Unable to serialize unknown type: .*Unknown"),
        (circle(), "refers to itself, or is nested too deeply"),
        (deep(), "refers to itself, or is nested too deeply"),
        (TypeAdapter(list[Tree]).validate_python([vine()]), "is nested too deeply"),
        ("\ud800", r"surrogates not allowed"),
        (Anything(value=Unknown()), "Unable to serialize unknown type: .*Unknown"),
    ],
)
def test_what_json_cannot_say_is_not_written(value: Any, problem: str) -> None:
    with pytest.raises(PayloadError, match=f"^cannot be written as JSON: .*{problem}"):
        encode(value)


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "invalid UTF-8": b'"\xff\xfe"',
    "half a surrogate pair": b'"\\ud800"',
    "nested too deeply": b"[" * 100_000,
    "too many digits": b"9" * 5000,
    "a control character": b'"\x01"',
    "two values": b"1 2",
}


@pytest.mark.parametrize(
    "shape", [Welcome, Tree, Order, Parcel, list[int], int, datetime, Cat | Dog]
)
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_json_is_a_payload_error(shape: Any, name: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Codec(shape).decode(MALFORMED[name])
    assert len(str(caught.value)) < 300


@given(st.binary())
def test_any_bytes_are_read_or_refused_with_a_payload_error(raw: bytes) -> None:
    for shape in (Everywhere, dict[str, Any], Cat | Dog):
        try:
            Codec(shape).decode(raw)
        except PayloadError:
            pass


def test_an_error_has_a_line_a_problem_and_neither_the_payload_nor_a_url() -> None:
    raw = b'{"user_id":"secret","tags":[1],"score":{},"active":"secret"}'
    with pytest.raises(PayloadError) as caught:
        Codec(Welcome).decode(raw)
    assert str(caught.value).split("\n") == [
        "not a valid Welcome: 4 problems",
        "  user_id: Input should be a valid integer, unable to parse string as an integer",
        "  tags.0: Input should be a valid string",
        "  score: Input should be a valid number",
        "  active: Input should be a valid boolean, unable to interpret input",
    ]
    assert caught.value.__suppress_context__  # pydantic's own text shows the payload


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


@pytest.mark.parametrize("character", ["k", "\x1b", "\u2028", "\u202e", "é", "😀", "\U000e0001"])
def test_an_error_fits_in_one_kibibyte_and_shows_no_control_characters(character: str) -> None:
    payload = {character * 1000 + str(i): 1 for i in range(100)}
    with pytest.raises(PayloadError) as caught:
        Codec(Strict).decode(json.dumps(payload).encode())
    message = str(caught.value)
    assert len(message.encode()) <= 1024
    assert "and 96 more" in message
    assert all(line.isprintable() for line in message.split("\n"))


def test_a_million_problems_are_not_listed() -> None:
    with pytest.raises(PayloadError, match=r"^not a valid list\[int\]: 0: .*integer$"):
        Codec(list[int]).decode(b"[" + b",".join([b'"x"'] * 100_000) + b"]")
    many = json.dumps(dict.fromkeys(map(str, range(5000)), "x")).encode()
    with pytest.raises(PayloadError, match=r"^not a valid dict\[str, int\]: 5000 problems$"):
        Codec(dict[str, int]).decode(many)


def test_a_bug_in_a_validator_is_not_the_fault_of_the_payload() -> None:
    def broken(value: object) -> object:
        raise KeyError(value)

    with pytest.raises(KeyError):
        Codec(Annotated[int, BeforeValidator(broken)]).decode(b"1")


def test_a_validator_may_refuse_a_payload_with_its_own_words() -> None:
    class Even(BaseModel):
        value: int

        @field_validator("value")
        @classmethod
        def even(cls, value: int) -> int:
            if value % 2:
                raise ValueError("must be even")
            return value

    with pytest.raises(PayloadError, match=r"^not a valid Even: value: Value error, must be even$"):
        Codec(Even).decode(b'{"value":1}')


def test_bytes_are_the_payload_itself() -> None:
    codec = Codec(bytes)
    for value in (b"", b"\xff\x00", b'{"a":1}'):
        assert codec.encode(value) == value
        assert codec.decode(value) == value
    assert Codec(object).encode(b"a") == b'"YQ=="'


@pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"abc")])
def test_other_buffers_are_taken_for_bytes(value: Any) -> None:
    assert Codec(bytes).encode(value) == b"abc"
    assert encode(value) == b"abc"


def test_bytes_with_validators_are_still_raw() -> None:
    codec = Codec(Annotated[bytes, Field(max_length=3), AfterValidator(bytes.strip)])
    assert codec.decode(b" a ") == b"a"
    with pytest.raises(PayloadError, match=r"^not a valid bytes: Data should have at most 3 bytes"):
        codec.decode(b"abcd")


def test_bytes_or_none_are_raw_and_no_payload_is_none() -> None:
    codec = Codec(bytes | None)
    assert codec.encode(None) is None
    assert codec.encode(b"null") == b"null"
    assert codec.decode(b"null") == b"null"
    assert codec.decode(b"") is None


@pytest.mark.parametrize("shape", [None, type(None)])
def test_none_is_no_payload(shape: Any) -> None:
    codec = Codec(shape)
    assert codec.encode(None) is None
    assert codec.decode(b"") is None
    assert codec.decode(b"null") is None
    with pytest.raises(PayloadError, match=r"Input should be null"):
        codec.decode(b"{}")


def test_no_payload_is_none_where_the_shape_allows_none() -> None:
    assert Codec(Welcome | None).decode(b"") is None
    assert Codec(Any).decode(b"") is None
    assert Codec(Welcome | None).encode(None) == b"null"
    with pytest.raises(PayloadError, match=r"^there is no payload, expected Welcome$"):
        Codec(Welcome).decode(b"")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, None),
        (b"raw", b"raw"),
        ({"b": 1, "a": (1, {2})}, b'{"b":1,"a":[1,[2]]}'),
        (Order(1), b'{"id":1,"data":"+/+/","price":0.5,"code":"abc"}'),
        (CheckedOrder(1), b'{"id":1,"data":"+/+/"}'),
        ({"o": Order(1), "c": CheckedOrder(1)}, None),
        ({"a": Aliased(userId=1, createdBy="<")},
         b'{"a":{"userId":1,"createdBy":"\\u003c"}}'),
        (MappingProxyType({"a": Colour.RED}), b'{"a":"red"}'),
        ([UUID(int=1), Decimal("1.50")], b'["00000000-0000-0000-0000-000000000001","1.50"]'),
        ({UUID(int=1): 1, 2: 2}, b'{"00000000-0000-0000-0000-000000000001":1,"2":2}'),
        ([at(2024, 1, 1, 0, 0, 0, 500_000)], b'["2024-01-01T00:00:00.5Z"]'),
        (timedelta(seconds=1), b'"PT1S"'),
        ("<", b'"\\u003c"'),
    ],
)  # fmt: skip
def test_a_value_of_no_declared_type_is_written(value: Any, written: bytes | None) -> None:
    if isinstance(value, dict) and written is None:
        written = b'{"o":' + (encode(Order(1)) or b"") + b',"c":' + (
            encode(CheckedOrder(1)) or b""
        ) + b"}"  # fmt: skip
    assert encode(value) == written


def test_a_type_adapter_is_a_shape_also_one_that_is_not_built_yet() -> None:
    adapter: TypeAdapter[list[bytes]] = TypeAdapter(
        list[bytes], config=ConfigDict(defer_build=True)
    )
    assert Codec(adapter).encode([DATA]) == b'["+/+/"]'
    assert Codec(TypeAdapter(Welcome)).decode(b'{"user_id":1}') == Welcome(user_id=1)


@pytest.mark.parametrize("shape", [5, "Nowhere", bytearray, Unknown])
def test_what_cannot_be_a_shape_is_refused_when_the_codec_is_made(shape: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot be the type of a payload: "):
        Codec(shape)


def test_no_warning_of_pydantic_is_left_to_the_filters_of_the_application() -> None:
    value = Welcome(user_id=1)
    value.score = "high"  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(PayloadError):
            Codec(Welcome).encode(value)
    assert caught == []


def test_the_types_of_a_codec_are_known() -> None:
    assert_type(Codec(Welcome), Codec[Welcome])
    assert_type(Codec(Welcome).decode(b'{"user_id":1}'), Welcome)
    assert_type(Codec(TypeAdapter(list[int])).decode(b"[1]"), list[int])
    assert repr(Codec(list[Welcome])) == "Codec(list[Welcome])"
