"""The plan that travels: what the first rank's executor is told, for the others, as JSON. No arrays.

Segments and checkpoints stay with their rank, each under the number that the first rank gave it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


def to_json(order: Order) -> JSON:
    """An order in JSON's words. Thread: any."""
    match order:
        case Forward(step):
            return ["forward", *(_row_to_json(row) for row in step.rows)]
        case Sample(slots):
            return ["sample", list(slots)]
        case Copy(number, slot, tokens, begin, end):
            return ["copy", number, slot, tokens, begin, end]
        case Part(number, whole, begin, end):
            return ["part", number, whole, begin, end]
        case Keep(number, slot, tokens):
            return ["keep", number, slot, tokens]
        case Restore(slot, segments, checkpoint):
            return ["restore", slot, list(segments), checkpoint]
        case Forget(numbers):
            return ["forget", list(numbers)]
        case Release(slot):
            return ["release", slot]
        case GiveBack():
            return ["give_back"]
        case Close():
            return ["close"]


def from_json(value: Any) -> Order:  # noqa: ANN401, PLR0911 - JSON's edge; an order a return
    """The order that `to_json` made of it. Thread: any.

    Raises:
        ValueError: it is none.
    """
    match value:
        case ["forward", *rows]:
            return Forward(Step(tuple(_row_from_json(row) for row in rows)))
        case ["sample", [*slots]]:
            return Sample(tuple(slots))
        case ["copy", int(number), int(slot), int(tokens), int(begin), int(end)]:
            return Copy(number, slot, tokens, begin, end)
        case ["part", int(number), int(whole), int(begin), int(end)]:
            return Part(number, whole, begin, end)
        case ["keep", int(number), int(slot), int(tokens)]:
            return Keep(number, slot, tokens)
        case ["restore", int(slot), [*segments], checkpoint]:
            return Restore(slot, tuple(segments), checkpoint)
        case ["forget", [*numbers]]:
            return Forget(tuple(numbers))
        case ["release", int(slot)]:
            return Release(slot)
        case ["give_back"]:
            return GiveBack()
        case ["close"]:
            return Close()
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
                tuple(_span(*span) for span in spans),
                tuple((first, end) for first, end in runs),
            )
    raise ValueError(f"no row is {str(value)[:80]}")


def _span(at: int, begin: int, end: int, rows: int, width: int, deep: int) -> Span:
    """A picture's place. What it looks like the first rank knows, and adds to the others' nothing."""
    nothing = np.zeros((rows, width), np.float32)
    return Span(at, EncodedPicture(nothing, (nothing,) * deep), begin, end)


