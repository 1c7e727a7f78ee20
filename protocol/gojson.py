"""JSON in Go's manners, both ways: what `encoding/json` would read, and what it can decode.

Reading: a missing or null field is the zero value, a field's name matches in any case, unknown fields are ignored,
bytes after the first value are ignored (Go's `json.Decoder.Decode`, which every runner of Ollama uses), invalid UTF-8
and lone surrogates become U+FFFD. A value of the wrong kind is refused: 1.5 is no int and 1 is no string.
Writing: `OMIT_EMPTY` leaves a zero value out, None is null (Go's nil slice), bytes are base64, durations are whole ns.

Where this reader is narrower than Go's: nesting ends at Python's recursion limit instead of 10,000 levels, a number of
more than 4300 digits and a body of more than a million brackets are refused, and the second of two equal object-valued
keys replaces the first instead of being merged into it.

Source: Go's encoding/json (decode.go, encode.go) and its package documentation.
"""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from json.decoder import JSONDecoder
from typing import Annotated, ClassVar, Final, Self, TypeAlias

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ValidationInfo

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_WHITESPACE: Final = re.compile(r"[ \t\n\r]*")
_FLOAT32_OVERFLOW: Final = 3.4028235677973366e38
"""Half a step above the largest float32: from here on a number does not round to one."""
_MAX_CONTAINERS: Final = 1_000_000
"""More brackets than a prompt has tokens; to build millions of objects would hold up the event loop for seconds."""
_SHOWN: Final = 24
"""Characters of a refused number that its refusal repeats."""


class WireError(ValueError):
    """The bytes are not what the wire allows; the message says what is wrong in Go's words."""


class OmitEmpty:
    """Marks a field that is left out of the output while it is zero (Go's `omitempty`)."""


OMIT_EMPTY: Final = OmitEmpty()


def _replace_surrogates(value: object) -> object:
    if isinstance(value, str) and not value.isascii():
        return _SURROGATE.sub("\ufffd", value)
    return value


def _fits_float32(value: float) -> float:
    if abs(value) >= _FLOAT32_OVERFLOW:
        raise ValueError(f"cannot unmarshal number {value} into a field of type float32")
    return value


def _from_numbers(value: list[object]) -> bytes:
    """Go reads an array of numbers as bytes, too."""
    if not all(item is None or (type(item) is int and 0 <= item < 256) for item in value):
        raise ValueError("cannot unmarshal array into a field of type []byte")
    return bytes(item if isinstance(item, int) else 0 for item in value)


def _from_base64(value: object) -> object:
    if isinstance(value, list):
        return _from_numbers(value)
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value.replace("\r", "").replace("\n", ""), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("illegal base64 data") from error


def _null_is_empty(value: object) -> object:
    return ["" if item is None else item for item in value] if isinstance(value, list) else value


def _null_is_zero(value: object) -> object:
    return [0 if item is None else item for item in value] if isinstance(value, list) else value


def _null_is_object(value: object) -> object:
    return [{} if item is None else item for item in value] if isinstance(value, list) else value


Int: TypeAlias = Annotated[int, Strict(), Ge(-(2**63)), Le(2**63 - 1)]
Int32: TypeAlias = Annotated[int, Strict(), Ge(-(2**31)), Le(2**31 - 1)]
Bool: TypeAlias = Annotated[bool, Strict()]
Float32: TypeAlias = Annotated[float, Strict(), AfterValidator(_fits_float32)]
Str: TypeAlias = Annotated[str, Strict(), BeforeValidator(_replace_surrogates)]
Bytes: TypeAlias = Annotated[bytes, Strict(), BeforeValidator(_from_base64)]
# FailFast: one reason is enough, and gathering those of millions of wrong elements would take minutes.
Strings: TypeAlias = Annotated[tuple[Str, ...], FailFast(), BeforeValidator(_null_is_empty)]
Ints: TypeAlias = Annotated[tuple[Int, ...], FailFast(), BeforeValidator(_null_is_zero)]
Blobs: TypeAlias = Annotated[tuple[Bytes, ...], FailFast(), BeforeValidator(_null_is_empty)]
NilInts: TypeAlias = tuple[Int, ...] | None
NilStrings: TypeAlias = tuple[Str, ...] | None
"""Slices of an answer, where nil is null."""
FAIL_FAST: Final = FailFast()
NULL_IS_OBJECT: Final = BeforeValidator(_null_is_object)
"""For a slice of structs: a null element is a zero struct."""


def _refuse_constant(name: str) -> None:
    raise WireError(f"invalid character {name.lstrip('-')[0]!r} looking for beginning of value")


def _object(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    result: dict[str, JSON] = {}
    for key, value in pairs:
        # A repeated key moves to its last place, so that the last of several spellings wins, as in Go.
        result.pop(key, None)
        result[key] = value
    return result


_DECODER: Final = JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def parse(body: bytes) -> JSON:
    """The first JSON value of `body`; what follows it is ignored.

    Raises:
        WireError: there is no value, or it is not JSON, or it is nested too deeply.
    """
    # Every invalid byte becomes a lone surrogate here, and in a string, as in Go, one U+FFFD.
    text = body.decode("utf-8", errors="surrogateescape")
    if body.count(b"[") + body.count(b"{") > _MAX_CONTAINERS:
        raise WireError(f"more than {_MAX_CONTAINERS} objects and arrays")
    start = _WHITESPACE.match(text).end()  # type: ignore[union-attr]
    if start == len(text):
        raise WireError("EOF")
    try:
        value: JSON = _DECODER.raw_decode(text, start)[0]
    except json.JSONDecodeError as error:
        raise WireError(f"invalid JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise WireError("exceeded max depth") from error
    except WireError:
        raise
    except ValueError as error:
        raise WireError("a number has too many digits") from error
    return value


class GoModel(BaseModel):
    """A Go struct: aliases are the names on the wire, defaults are Go's zero values."""

    model_config = ConfigDict(frozen=True, extra="ignore", validate_by_name=True, validate_by_alias=True)

    _by_fold: ClassVar[Mapping[str, str]] = {}
    """Case-folded wire name to wire name."""
    _plan: ClassVar[tuple[tuple[str, str, bool], ...]] = ()
    """Attribute, wire name and omitempty of every field."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """Lay down how the fields are read and written, once a class."""
        super().__pydantic_init_subclass__(**kwargs)
        cls._plan = tuple(
            (name, field.alias or name, OMIT_EMPTY in field.metadata) for name, field in cls.model_fields.items()
        )
        cls._by_fold = {wire.casefold(): wire for _, wire, _ in cls._plan}

    @model_validator(mode="before")
    @classmethod
    def _read_as_go(cls, data: object, info: ValidationInfo) -> object:
        if info.context is not _WIRE or not isinstance(data, dict):
            return data
        fields: dict[str, JSON] = {}
        for key, value in data.items():
            wire = cls._by_fold.get(key.casefold())
            if wire is not None and value is not None:
                fields[wire] = value
        return fields

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Decode a request's body.

        Raises:
            WireError: it is not JSON, or a field has the wrong type.
        """
        data = parse(body)
        return cls.from_value({} if data is None else data)

    @classmethod
    def from_value(cls, data: JSON) -> Self:
        """Decode a parsed value.

        Raises:
            WireError: it is no object, or a field has the wrong type.
        """
        if not isinstance(data, dict):
            raise WireError(f"cannot unmarshal {_kind(data)} into a value of type {cls.__name__}")
        try:
            return cls.model_validate(data, context=_WIRE)
        except ValidationError as error:
            raise WireError(_reason(error.errors(include_url=False)[0])) from error

    def to_value(self) -> dict[str, JSON]:
        """What is written for this struct."""
        result: dict[str, JSON] = {}
        for name, wire, omit_empty in self._plan:
            value = getattr(self, name)
            if not (omit_empty and not value):
                result[wire] = _written(value)
        return result

    def to_line(self) -> bytes:
        """One line of JSON, newline included."""
        return write_line(self.to_value())


_WIRE: Final = object()
"""The validation context that says: this came from outside, read it as Go would."""


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def write_line(value: JSON) -> bytes:
    """One line of JSON, newline included."""
    return _ENCODER.encode(value).encode() + b"\n"


class TextLine:
    """Lines alike but for one field's text: written for every token, and so without a model for each."""

    def __init__(self, model: GoModel, field: str) -> None:
        """The lines of `model` with other texts in `field`."""
        mark = "\0"
        self._empty = model.model_copy(update={field: ""}).to_line()
        line = model.model_copy(update={field: mark}).to_line()
        self._before, self._after = line.split(_ENCODER.encode(mark).encode())

    def __call__(self, text: str) -> bytes:
        """The line with this text, newline included."""
        return self._before + _ENCODER.encode(text).encode() + self._after if text else self._empty


def _written(value: object) -> JSON:
    match value:
        case GoModel():
            return value.to_value()
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case tuple() | list():
            return [_written(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TypeError(f"{type(value).__name__} has no place on the wire")


def _kind(value: object) -> str:
    match value:
        case bool():
            return "bool"
        case int() | float():
            return f"number {str(value)[:_SHOWN]}"
        case str():
            return "string"
        case list() | tuple():
            return "array"
        case None:
            return "null"
        case _:
            return "object"


_GO_TYPES: Final = {
    "int_type": "int",
    "int_from_float": "int",
    "greater_than_equal": "int",
    "less_than_equal": "int",
    "float_type": "float",
    "finite_number": "float",
    "string_type": "string",
    "bool_type": "bool",
    "bytes_type": "[]byte",
    "tuple_type": "array",
    "model_type": "object",
}


def _reason(detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "value_error":
        return f"{where}: {detail['msg'].removeprefix('Value error, ')}"
    kind = _kind(detail["input"])
    return f"cannot unmarshal {kind} into field {where} of type {_GO_TYPES.get(detail['type'], detail['msg'])}"
