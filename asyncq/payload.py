"""JSON payloads: a Python type on one side, the bytes Go's encoding/json would write on the other.

A uniqueness lock is a hash of the payload, so a model here and a struct of the same fields in Go
have to give the same bytes: fields in declaration order, by alias, without spaces; bytes as
standard base64; `<`, `>`, `&`, U+2028 and U+2029 escaped; no trailing zeros in the fraction of a
datetime. Sets are written sorted, so that two processes agree. A field with a plain serializer
of its own, and a model that sets `ser_json_bytes`, `val_json_bytes`, `ser_json_temporal`,
`ser_json_inf_nan` or `allow_inf_nan`, keep what they say; so does SecretStr: `**********`.

What still differs, because making it equal would cost every payload or change what it means:

- whole floats below 1e21 are `1.0` or `1e+16` (Go: `1`, all digits), floats from 1e-6 to 1e-5
  are `1.5e-6` (Go: `0.0000015`); both sides read either as the same number
- a dict keeps its order, Go sorts the keys of a map
- timedelta is ISO 8601 (`PT1S`), Go's time.Duration counts nanoseconds; a naive datetime has no
  offset, Go's time.Time always has one, and nanoseconds, which are cut off here
- a nil slice, map or pointer is `null` in Go: declare `list[int] | None` where Go may send it
- text that is not valid Unicode is refused, Go replaces it by U+FFFD
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import lru_cache
from typing import Annotated, Any, Generic, Literal, cast, get_origin, overload

from pydantic import PydanticUndefinedAnnotation, PydanticUserError, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import (
    CoreConfig,
    PydanticSerializationUnexpectedValue,
    SchemaSerializer,
    SchemaValidator,
    ValidationError,
)
from typing_extensions import TypeVar

from asyncq.errors import PayloadError

__all__ = ["Codec", "encode"]

T = TypeVar("T", default=Any)


class Codec(Generic[T]):
    """The codec of one type, built once and used for every task.

    `shape` is a BaseModel, dataclass, TypedDict, builtin, union, Annotated or TypeAdapter.
    `bytes`, also with validators or `| None`, is not JSON but the payload as it is, and `None`
    is no payload. An empty payload is read as `None` where the shape allows `None`.

    Raises:
        TypeError: pydantic cannot make a schema of the shape.
    """

    __slots__ = (
        "_class",
        "_from_json",
        "_from_python",
        "_is_json",
        "_is_raw",
        "_may_hold_floats",
        "_name",
        "_read",
        "_to_json",
        "_to_python",
        "_untyped",
        "_warnings",
    )

    @overload
    def __init__(self, shape: type[T]) -> None: ...
    @overload
    def __init__(self, shape: TypeAdapter[T]) -> None: ...
    @overload
    def __init__(self: Codec[Any], shape: object) -> None: ...
    def __init__(self, shape: Any) -> None:
        adapter = _adapter(shape)
        config = _author_config(shape)
        own = cast("CoreConfig", {k: config[k] for k in CoreConfig.__annotations__ if k in config})
        rewriter = _Rewriter()
        schema = rewriter.rewrite(adapter.core_schema, own)
        # Prebuilt would mean the serializers of nested models as pydantic made them.
        validator = SchemaValidator(schema, _go_config(own), _use_prebuilt=False)
        serializer = SchemaSerializer(schema, _go_config(own), _use_prebuilt=False)

        self._name = _name(shape, adapter)
        self._class: Any = shape if _is_validated(shape) else None
        self._is_raw = _is_raw(adapter.core_schema)
        self._is_json = not self._is_raw and schema["type"] != "none"
        self._untyped = "any" in rewriter.kinds
        self._may_hold_floats = not rewriter.kinds.isdisjoint(_MAY_HOLD_FLOATS)
        # The word costs a microsecond, in which pydantic-core makes and drops two exceptions
        # because it is not a bool. A frozen model needs it not: it is as it was validated.
        self._warnings: Literal[False, "error"] = "error" if rewriter.mutable else False
        self._from_json = validator.validate_json
        self._from_python = validator.validate_python
        self._to_json = serializer.to_json
        self._to_python = serializer.to_python
        self._read: Callable[[bytes], Any] = validator.validate_json
        if self._is_raw:
            # No payload and an empty one are the same in a message, so None is tried first.
            check = self._read = validator.validate_python
            if validator.isinstance_python(None, strict=True):
                self._read = lambda raw: check(raw or None)

    def __repr__(self) -> str:
        return f"Codec({self._name})"

    def encode(self, value: T) -> bytes | None:
        """Write a value of the shape; `None` is no payload.

        Raises:
            PayloadError: The value is not of the shape, or JSON cannot say it.
        """
        if self._class is not None:
            if isinstance(value, self._class):
                return self._write(value)
            raise PayloadError(f"expected {self._name}, got {type(value).__name__}")
        checked = self._checked(value)
        return self._write(checked) if self._is_json else cast("bytes | None", checked)

    def decode(self, raw: bytes) -> T:
        """Read a payload.

        Raises:
            PayloadError: The payload is not of the shape; one line a problem, at most 1 KiB.
        """
        try:
            value: T = self._read(raw)
        except ValidationError as error:
            if not raw:
                return self._without_payload()
            raise self._error(error) from None
        except RecursionError as error:
            raise self._error(error) from None
        if self._untyped:
            _refuse_non_finite(raw)
        return value

    def to_builtins(self, value: T) -> Any:
        """Turn a value of the shape into dicts, lists, strings and numbers, as they are written."""
        return self._to_python(value, mode="json", by_alias=True, warnings=self._warnings)

    def _write(self, value: Any) -> bytes:
        try:
            raw = self._to_json(value, by_alias=True, warnings=self._warnings)
        except (ValueError, TypeError, RecursionError):
            raw = self._write_and_read(value)
        # Most payloads hold none of these, and one byte is found faster than any pattern.
        if 0x3C in raw or 0x3E in raw or 0x26 in raw or 0xE2 in raw:
            for character, escape in _ESCAPES:
                raw = raw.replace(character, escape)
        if self._may_hold_floats:
            _refuse_non_finite(raw)
        return raw

    def _write_and_read(self, value: Any) -> bytes:
        """Write what pydantic warned of, provided that the other side can read it.

        Some warnings are harmless (a tuple as the default of a list); for the others, reading
        gives the better message.
        """
        try:
            raw = self._to_json(value, by_alias=True, warnings=False)
            self._from_json(raw, strict=True)
        except ValidationError as error:
            raise self._error(error) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise PayloadError(f"cannot be written as JSON: {_reason(error)}") from None
        return raw

    def _checked(self, value: Any) -> Any:
        """Validate without conversions; gives a TypedDict its order and a float its form."""
        if self._is_raw and isinstance(value, _BYTES):
            value = bytes(value)
        try:
            return self._from_python(value, strict=True, by_alias=True, by_name=True)
        except (ValidationError, RecursionError) as error:
            raise self._error(error) from None

    def _without_payload(self) -> T:
        try:
            value: T = self._from_python(None, strict=True)
        except ValidationError:
            raise PayloadError(f"there is no payload, expected {self._name}") from None
        return value

    def _error(self, error: ValidationError | RecursionError) -> PayloadError:
        start = f"not a valid {self._name}:"
        if isinstance(error, RecursionError):
            return PayloadError(f"{start} it is nested too deeply")
        count = error.error_count()
        if count > _TOO_MANY:
            return PayloadError(f"{start} {count} problems")
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [_line(problem["loc"], problem["msg"]) for problem in problems[:_MOST_LINES]]
        if count == 1:
            return PayloadError(f"{start} {lines[0]}")
        if count > len(lines):
            lines.append(f"and {count - len(lines)} more")
        return PayloadError("\n  ".join((f"{start} {count} problems", *lines)))


def encode(value: object) -> bytes | None:
    """Write a value of no declared type: `None` is no payload, bytes are the payload itself.

    Anything else is JSON as a Codec writes it, models and dataclasses by their fields.

    Raises:
        PayloadError: JSON cannot say the value.
    """
    if value is None:
        return None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(cast("bytes", value))
    kind: Any = type(value)
    codec = _codec_of(kind) if _is_validated(kind) else _ANYTHING
    return codec.encode(value)


_BYTES: tuple[type[Any], ...] = (bytes, bytearray, memoryview)
_SETS: tuple[type[Any], ...] = (set, frozenset)
_SEQUENCES: tuple[type[Any], ...] = (list, tuple)
_MAPPING: type[Any] = Mapping
_SCALARS = frozenset({str, int, float, bool, type(None)})
_MAY_HOLD_FLOATS = {"any", "callable", "enum", "float", "function-plain", "is-instance", "literal"}
_NOT_FINITE = re.compile(rb"NaN|Infinity")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_ESCAPES = (
    (b"<", rb"\u003c"),
    (b">", rb"\u003e"),
    (b"&", rb"\u0026"),
    ("\u2028".encode(), rb"\u2028"),
    ("\u2029".encode(), rb"\u2029"),
)
# Together with the name and the rest, 1 KiB: what a worker writes to Redis as the last error.
_MOST_LINES = 4
_MOST_BYTES_A_LINE = 200
_TOO_MANY = 1000  # pydantic tells of all or none, a microsecond or more each


class _Rewriter:
    """Copies a core schema, with Go's way of writing where pydantic has another.

    A copy, because the models are the application's: its own model_dump_json() stays as it is.
    `kinds` are the types of schema found; `mutable` tells whether a value can have been changed
    since it was validated.
    """

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.mutable = False

    def rewrite(self, schema: Any, own: CoreConfig, *, kept: bool = False) -> Any:
        """Copy one schema: `own` is the config around it as its author wrote it, `kept` is true
        below a plain serializer of the author's, where everything stays pydantic's."""
        kind: str = schema["type"]
        new = dict(schema)
        self.kinds.add(kind)
        if kind in ("model", "dataclass", "typed-dict"):
            own = schema.get("config", {})
            new["config"] = _go_config(own)
            self._look_at_class(schema.get("cls"), new)
        elif kind in ("list", "tuple", "set", "frozenset", "deque"):
            # One bad item archives the task; to tell of a million would hold up the event loop.
            new["fail_fast"] = True

        serialization: dict[str, Any] = schema.get("serialization", {})
        if serialization:
            self.kinds.add(serialization["type"])
            kept = kept or serialization["type"] == "function-plain"
            if "schema" in serialization:
                inner = self.rewrite(serialization["schema"], own, kept=kept)
                new["serialization"] = {**serialization, "schema": inner}
        if kind in ("model-fields", "typed-dict") and own.get("extra_fields_behavior") == "allow":
            new.setdefault("extras_schema", {"type": "any"})
        for key in _INNER_SCHEMAS & new.keys():
            new[key] = self._rewrite_inner(new[key], own, kept)

        if kept:
            return _utf8_bytes(new) if kind == "bytes" and _BYTES_KEYS.isdisjoint(own) else new
        go = _go_serialization(new, own)
        if go is not None and not serialization:
            new["serialization"] = go
        elif go is not None and serialization["type"] == "function-wrap":
            wrapped = {key: new[key] for key in new.keys() - {"ref"}} | {"serialization": go}
            new["serialization"] = {"schema": wrapped, **new["serialization"]}
        return new

    def _rewrite_inner(self, inner: Any, own: CoreConfig, kept: bool) -> Any:
        if isinstance(inner, str):  # the name of a field, the label of a choice
            return inner
        if isinstance(inner, _SEQUENCES):
            return type(inner)(self._rewrite_inner(item, own, kept) for item in inner)
        if isinstance(inner.get("type"), str):
            return self.rewrite(inner, own, kept=kept)
        return {key: self.rewrite(item, own, kept=kept) for key, item in inner.items()}

    def _look_at_class(self, cls: Any, new: dict[str, Any]) -> None:
        if new["type"] == "dataclass" and not is_pydantic_dataclass(cls):
            new["revalidate_instances"] = "always"  # nobody validated it when it was made
            self.mutable = True
        elif new["type"] != "typed-dict":
            self.mutable = self.mutable or not _author_config(cls).get("frozen")


_BYTES_KEYS = frozenset({"ser_json_bytes", "val_json_bytes"})
_FLOAT_KEYS = frozenset({"ser_json_inf_nan", "allow_inf_nan"})
_INNER_SCHEMAS = frozenset(
    {
        "arguments_schema",
        "choices",
        "computed_fields",
        "definitions",
        "extras_schema",
        "fields",
        "items_schema",
        "json_schema",
        "keys_schema",
        "lax_schema",
        "python_schema",
        "return_schema",
        "schema",
        "steps",
        "strict_schema",
        "values_schema",
        "var_args_schema",
        "var_kwargs_schema",
    }
)


def _go_config(own: CoreConfig) -> CoreConfig:
    config = own.copy()
    if _BYTES_KEYS.isdisjoint(own):
        config["val_json_bytes"] = "base64"  # reads the standard alphabet and the URL-safe one
    if _FLOAT_KEYS.isdisjoint(own):
        config["allow_inf_nan"] = False
        config["ser_json_inf_nan"] = "constants"  # so that they are found, and refused
    return config


def _go_serialization(schema: Any, own: CoreConfig) -> dict[str, Any] | None:
    function: Callable[[Any], Any]
    if schema["type"] == "bytes" and _BYTES_KEYS.isdisjoint(own):
        function = _base64
    elif schema["type"] == "any" and _BYTES_KEYS.isdisjoint(own):
        function = _builtins
    elif schema["type"] == "datetime" and "ser_json_temporal" not in own:
        function = _rfc3339
    elif schema["type"] in ("set", "frozenset"):
        function = _sorted
    else:
        return None
    go: dict[str, Any] = {"type": "function-plain", "function": function}
    go["when_used"] = "json-unless-none"
    if function is _sorted and "items_schema" in schema:
        go["return_schema"] = {"type": "list", "items_schema": schema["items_schema"]}
    return go


def _utf8_bytes(schema: Any) -> dict[str, Any]:
    function = {"type": "no-info", "function": _utf8}
    return {"type": "function-before", "function": function, "schema": schema}


def _utf8(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


# The writers. One that gets another type says so, and a union tries its next choice.


def _base64(value: Any) -> str:
    if not isinstance(value, _BYTES):
        raise _unexpected("bytes", value)
    return b2a_base64(value, newline=False).decode("ascii")


def _rfc3339(value: Any) -> datetime | str:
    if not isinstance(value, datetime):
        raise _unexpected("datetime", value)
    if value.microsecond % 10 or not value.microsecond:
        return value  # pydantic writes it as Go would, and fast
    text = value.isoformat()
    offset = text[26:]
    return text[:26].rstrip("0") + ("Z" if offset == "+00:00" else offset)


def _sorted(value: Any) -> list[Any]:
    if not isinstance(value, _SETS):
        raise _unexpected("set", value)
    try:
        return sorted(value)
    except TypeError:
        return sorted(value, key=repr)


def _builtins(value: Any) -> Any:
    """Turn a value of unknown type into what pydantic writes as Go would."""
    kind: Any = value.__class__
    if kind in _SCALARS:
        return value
    if isinstance(value, _SEQUENCES):
        return [item if type(item) in _SCALARS else _builtins(item) for item in value]
    if kind is dict or isinstance(value, _MAPPING):
        return {
            key: item if type(item) in _SCALARS else _builtins(item) for key, item in value.items()
        }
    if isinstance(value, _BYTES):
        return _base64(value)
    if isinstance(value, _SETS):
        return [_builtins(item) for item in _sorted(value)]
    if isinstance(value, datetime):
        return _rfc3339(value)
    if _is_validated(kind):
        return _codec_of(kind).to_builtins(value)
    if is_dataclass(kind):
        return {field.name: _builtins(getattr(value, field.name)) for field in fields(value)}
    return value  # pydantic knows it, or says that it does not


def _unexpected(expected: str, value: object) -> PydanticSerializationUnexpectedValue:
    return PydanticSerializationUnexpectedValue(f"expected {expected}, got {type(value).__name__}")


def _refuse_non_finite(raw: bytes) -> None:
    if (0x4E in raw or 0x49 in raw) and _NOT_FINITE.search(raw):
        token = _NOT_FINITE.search(_STRING.sub(b"", raw))
        if token is not None:
            raise PayloadError(f"JSON has no {token[0].decode()}: use None or a string for it")


def _adapter(shape: Any) -> TypeAdapter[Any]:
    try:
        adapter = cast("TypeAdapter[Any]", shape)
        if not isinstance(shape, TypeAdapter):
            adapter = TypeAdapter(shape)
        adapter.rebuild()
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"{shape!r} cannot be the type of a payload: {reason}") from error
    return adapter


def _author_config(shape: Any) -> dict[str, Any]:
    """Find what a shape says itself; pydantic keeps it in three places."""
    for name in ("model_config", "__pydantic_config__", "_config"):
        config = getattr(shape, name, None)
        if isinstance(config, dict):
            return cast("dict[str, Any]", config)
    return {}


def _is_validated(shape: Any) -> bool:
    """Tell whether making an instance validates it: a BaseModel or a dataclass of pydantic's."""
    return isinstance(shape, type) and hasattr(shape, "__pydantic_validator__")


def _is_raw(schema: Any) -> bool:
    """Tell whether a shape is bytes, perhaps with validators or None, but no serializer."""
    while schema["type"] in {"nullable", "function-after", "function-before", "function-wrap"}:
        if "serialization" in schema:
            return False
        schema = schema["schema"]
    return schema["type"] == "bytes" and "serialization" not in schema


def _name(shape: Any, adapter: TypeAdapter[Any]) -> str:
    if get_origin(shape) is Annotated:
        shape = shape.__origin__
    if isinstance(shape, type):
        return _clip(shape.__name__, 100)
    return _clip(repr(adapter).removeprefix("TypeAdapter(").removesuffix(")"), 100)


def _line(location: tuple[int | str, ...], problem: str) -> str:
    place = ".".join(map(str, location))
    return _clip(f"{place}: {problem}" if place else problem, _MOST_BYTES_A_LINE)


def _reason(error: Exception) -> str:
    text = repr(error)
    if "RecursionError" in text or "Circular reference" in text or "depth exceeded" in text:
        return "it refers to itself, or is nested too deeply"
    return _clip(str(error).rpartition("Error: ")[2], _MOST_BYTES_A_LINE)


def _clip(text: str, most_bytes: int) -> str:
    """Make a line of what others wrote: control characters escaped, cut at so many bytes."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
        for c in text[:most_bytes]
    )
    if len(text) <= most_bytes and len(line.encode()) <= most_bytes:
        return line
    return line.encode()[: most_bytes - 3].decode(errors="ignore") + "..."


@lru_cache(maxsize=256)
def _codec_of(kind: Any) -> Codec[Any]:
    return Codec(kind)


_ANYTHING: Codec[Any] = Codec(object)
