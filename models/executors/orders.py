"""The plan that travels: what the first rank's executor is told, for the others, as JSON. No arrays.

Segments and checkpoints stay with their rank, each under the number that the first rank gave it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np

from models.executors.base import EncodedPicture, Row, Span, Step

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


@dataclass(frozen=True, slots=True)
class Forward:
    """See `Executor.forward`."""

    step: Step


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens were drawn for these slots, a place each, and the next step may begin before anybody has read them."""

    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """See `Executor.segment`."""

    number: int
    slot: int
    tokens: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Part:
    """See `Segment.part`."""

    number: int
    whole: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Keep:
    """See `Executor.checkpoint`."""

    number: int
    slot: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Restore:
    """See `Executor.restore`."""

    slot: int
    segments: tuple[int, ...]
    checkpoint: int | None


@dataclass(frozen=True, slots=True)
class Forget:
    """Segments and checkpoints that nobody holds any more."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """See `Executor.release`."""

    slot: int


@dataclass(frozen=True, slots=True)
class GiveBack:
    """See `Executor.give_back`."""


@dataclass(frozen=True, slots=True)
class Close:
    """See `Executor.close`."""


Order: TypeAlias = Forward | Sample | Copy | Part | Keep | Restore | Forget | Release | GiveBack | Close


_PLAIN: Mapping[str, type[Any]] = {
    each.__name__.lower(): each for each in (Sample, Copy, Part, Keep, Restore, Forget, Release, GiveBack, Close)
}


def to_json(order: Order) -> JSON:
    """An order in JSON's words: its name and its numbers. Thread: any."""
    if isinstance(order, Forward):
        return ["forward", *(_row_to_json(row) for row in order.step.rows)]
    values = (getattr(order, field.name) for field in fields(order))
    return [type(order).__name__.lower(), *(list(value) if isinstance(value, tuple) else value for value in values)]


def from_json(value: Any) -> Order:  # noqa: ANN401 - JSON's edge
    """The order that `to_json` made of it. Thread: any.

    Raises:
        ValueError: it is none.
    """
    match value:
        case ["forward", *rows]:
            return Forward(Step(tuple(_row_from_json(row) for row in rows)))
        case [str(name), *values] if name in _PLAIN and len(values) == len(fields(_PLAIN[name])):
            order: Order = _PLAIN[name](*(tuple(each) if isinstance(each, list) else each for each in values))
            return order
    raise ValueError(f"no order is {str(value)[:80]}")


def _row_to_json(row: Row) -> JSON:
    plain: list[JSON] = [row.slot, row.begin, list(row.tokens), row.wanted]
    if not (row.shift or row.positions or row.spans or row.runs):
        return plain
    spans: JSON = [
        [span.at, span.begin, span.end, *span.picture.rows.shape, len(span.picture.deep)] for span in row.spans
    ]
    return [*plain, row.shift, [list(each) for each in row.positions], spans, [list(run) for run in row.runs]]


def _row_from_json(value: Sequence[Any]) -> Row:
    match value:
        case [int(slot), int(begin), [*tokens], int(wanted)]:
            return Row(slot, begin, tuple(tokens), wanted)
        case [int(slot), int(begin), [*tokens], int(wanted), int(shift), [*positions], [*spans], [*runs]]:
            return Row(
                slot,
                begin,
                tuple(tokens),
                wanted,
                shift,
                tuple((time, height, width) for time, height, width in positions),
                tuple(_span(span) for span in spans),
                tuple((first, end) for first, end in runs),
            )
    raise ValueError(f"no row is {str(value)[:80]}")


def _span(value: Sequence[int]) -> Span:
    """A picture's place. What it looks like the first rank knows, and adds to the others' nothing."""
    at, begin, end, rows, width, deep = value
    nothing = np.zeros((rows, width), np.float32)
    return Span(at, EncodedPicture(nothing, (nothing,) * deep), begin, end)
