"""What an answer shall look like, as it was asked for: plain data."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class JSONSchema:
    """One JSON value that a schema describes."""

    text: str
    """The schema, as JSON. Its keys are in the order in which the answer's are to come."""


@dataclass(frozen=True, slots=True)
class GBNF:
    """A text that llama.cpp's GBNF describes; its rule `root` is the whole."""

    text: str


Grammar: TypeAlias = JSONSchema | GBNF


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A grammar, and what may come before it."""

    grammar: Grammar
    closings: tuple[str, ...] = ()
    """Not empty: the answer is any text up to the first of these, and behind it, after some white space at most, what
    the grammar describes. It may also end before."""
